"""What the papers say about RAFT and the Llama 2 rounds, as arms (settings of raft.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "2", "--rounds", "1"]        # flags of the short run that the tests make


def in_rounds(k):
    return {"candidates": k, "eval_every": 16}


KS = (2, 4, 8, 16)
RARE = "you saw"                # a wording of its own: the only one that asks "how was the ...?"
ROUNDS = {"restart": True, "rare": RARE, "refresh": True, "epochs": 4, "lr": 1e-3, "eval_every": 32}
PPO = {"method": "ppo"}
REFRESHED = {"reward": "{start}/reward_model"}                 # as the last round left it, as in Llama 2
AFTER_ROUNDS = [{}, {"lr": 5e-4}, {"kl_coef": 0.2}, {"lr": 5e-4, "kl_coef": 0.2},
                {"lr": 2.5e-4}, {"lr": 2.5e-4, "kl_coef": 0.2}]
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "tokens_generated": "tokens generated", "cpu_seconds": "CPU s"}

TUNING = {
    "RAFT": dict(arm={}, settings=[{"lr": 2.5e-4}, {"lr": 5e-4}, {"lr": 1e-3},
                                   {"lr": 5e-4, "epochs": 4.0}]),
    "one round": dict(arm={"rounds": 1}, settings=[
        {"lr": 5e-4, "epochs": 10.0}, {"lr": 1e-3, "epochs": 5.0}, {"lr": 1e-3, "epochs": 10.0},
        {"lr": 2e-3, "epochs": 5.0}]),
    "PPO after the rounds": dict(arm=PPO | REFRESHED, start=ROUNDS, settings=AFTER_ROUNDS),
    "PPO after the rounds, on the first reward model": dict(arm=PPO, start=ROUNDS, settings=AFTER_ROUNDS),
}

EXPERIMENTS = {
    "K and rounds": dict(
        question="What do more candidates and more rounds buy, and is it as good as PPO?",
        arms={"SFT": {"epochs": 0}, "SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}}
        | {f"K {k}": in_rounds(k) for k in KS} | {
            "K 8, one round": {"rounds": 1, "epochs": 5},
            "K 8, KL in the ranking": {"candidates": 8, "kl_coef": 0.1}, "PPO": PPO},
        columns=COLUMNS,
        claims=[
            dict(claim="it is as good as PPO or better (proxy, within 0.1)", source="Table 2",
                 paper="no number checked:", metric="eval/proxy", holds=[("K 8", ">", "PPO", -0.1)]),
            dict(claim="the same by gold (within 0.1)", source="Table 2", paper="no number checked:",
                 metric="eval/gold", holds=[("K 8", ">", "PPO", -0.1)]),
            dict(claim="more candidates, more reward (proxy)", source="Table of K (T 0.85)",
                 paper="2.18, 2.25, 2.33 for K 8, 16, 32", metric="eval/proxy",
                 holds=[(f"K {2 * k}", ">", f"K {k}") for k in (2, 4, 8)]),
            dict(claim="rounds pay: five beat one, tuned for itself", source="sec. 4",
                 paper="10 to 18 rounds to converge", metric="eval/gold",
                 holds=[("K 8", ">", "K 8, one round")]),
            dict(claim="a KL penalty in the ranking costs reward (proxy)", source="Table of KL",
                 paper="2.143 to 2.029", metric="eval/proxy",
                 holds=[("K 8, KL in the ranking", "<", "K 8")]),
        ],
        panels=[dict(kind="line", x="K, samples of each prompt", y=["eval/gold", "eval/proxy"], log=True,
                     title="reward after five rounds", series={"RAFT": {k: f"K {k}" for k in KS}},
                     levels={"PPO": "PPO"}),
                dict(x="eval/kl", y=["eval/gold"], best_of_n=True, ends=16, arms=["K 2", "K 8", "K 16"],
                     title="ends of rounds: gold against KL")],
    ),
    "noise": dict(
        question="Which noise in the reward hurts, and does it hurt PPO more?",
        arms={"RAFT": {}, "RAFT, prompt noise": {"reward_noise": "prompt"},
              "RAFT, response noise": {"reward_noise": "response"},
              "PPO": PPO, "PPO, prompt noise": PPO | {"reward_noise": "prompt"},
              "PPO, response noise": PPO | {"reward_noise": "response"}},
        columns=COLUMNS,
        claims=[
            dict(claim="a shift of each prompt's rewards changes nothing under local ranking "
                       "(gold, within 0.000001)",
                 source="App. A.3", paper="exact:", metric="eval/gold",
                 holds=[("RAFT, prompt noise", "=", "RAFT", 1e-6)]),
            dict(claim="PPO is hurt by it", source="App. A.3", paper="no number checked:",
                 metric="eval/gold", holds=[("PPO, prompt noise", "<", "PPO")]),
            dict(claim="noise of each response hurts both", source="App. A.3", paper="no number checked:",
                 metric="eval/gold", holds=[("RAFT, response noise", "<", "RAFT"),
                                            ("PPO, response noise", "<", "PPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
    "Llama 2": dict(
        question="Do versions climb, are rare skills kept, does PPO add to the last version?",
        arms={"last round": ROUNDS, "all rounds": ROUNDS | {"pool": "all"},
              "all rounds, reward model frozen": ROUNDS | {"pool": "all", "refresh": False},
              "then PPO": PPO | REFRESHED | {"start": "last round", "lr": 2.5e-4, "kl_coef": 0.2},
              "then PPO, first reward model": PPO | {"start": "last round", "lr": 5e-4, "kl_coef": 0.2},
              "PPO alone": PPO},
        columns={"eval/gold": "gold", "eval/rare_gold": "gold, rare wording", "eval/proxy": "proxy",
                 "eval/judge": "judge", "eval/fluency": "fluency", "cpu_seconds": "CPU s"},
        claims=[
            dict(claim="versions climb: the fifth has more gold than the second (half-way)",
                 source="Figure 11", paper="plot only:", metric="eval/gold:second_half",
                 holds=[("last round", ">", 0.0)]),
            dict(claim="a pool of the last round alone forgets a rare wording", source="sec. 3.2.3",
                 paper="no number:", metric="eval/rare_gold", holds=[("all rounds", ">", "last round")]),
            dict(claim="a reward model refreshed by new labels helps", source="sec. 3.2.1",
                 paper="no number:", metric="eval/gold",
                 holds=[("all rounds", ">", "all rounds, reward model frozen")]),
            dict(claim="PPO adds to the last version", source="Figure 11, read off by others",
                 paper="+6 to +12 points of win rate", metric="eval/gold",
                 holds=[("then PPO", ">", "last round")]),
            dict(claim="on the first reward model PPO ends lower than on the refreshed one",
                 source="sec. 3.2.1", paper="no number:", metric="eval/gold",
                 holds=[("then PPO, first reward model", "<", "then PPO")]),
        ],
        panels=[dict(x="step", y=["eval/gold", "eval/rare_gold"], ends=32, arms=["last round", "all rounds"],
                     title="gold at the ends of versions"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
