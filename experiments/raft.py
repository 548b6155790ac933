"""What the papers say about RAFT and the Llama 2 rounds, as arms (settings of raft.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "2", "--rounds", "1"]        # flags of the short run that the tests make


def in_rounds(k):
    return {"candidates": k, "eval_every": 16}


ROUNDS = {"restart": True, "rare": "villain", "refresh": True, "epochs": 4, "lr": 1e-3, "eval_every": 16}

EXPERIMENTS = {
    "K and rounds": dict(
        question="What do more candidates buy, and does each round reach the best of K of the one before?",
        arms={"SFT": {"epochs": 0}} | {f"K {k}": in_rounds(k) for k in (2, 4, 8, 16)} | {
            "K 8, one round, as many steps": {"rounds": 1, "epochs": 10},
            "K 8, KL in the ranking": in_rounds(8) | {"kl_coef": 0.1},
            "K 8, global": in_rounds(8) | {"ranking": "global"}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
                 "eval/distinct_2": "distinct-2", "eval/round_mean": "last round's mean",
                 "eval/round_best": "its best of K", "eval/recovered": "share recovered",
                 "tokens_generated": "tokens generated"},
        claims=[
            dict(claim="more candidates, more reward", source="Table of K (T 0.85)",
                 paper="2.18, 2.25, 2.33 for K 8, 16, 32", metric="eval/proxy",
                 holds=[(f"K {2 * k}", ">", f"K {k}") for k in (2, 4, 8)]),
            dict(claim="the same in gold", source="ours", paper="-", metric="eval/gold",
                 holds=[(f"K {2 * k}", ">", f"K {k}") for k in (2, 4, 8)]),
            dict(claim="the gain grows like sqrt(log K): the same per sqrt(log K) for 4 and 16 (within 0.2)",
                 source="sec. 3.2", paper="a bound:", metric="gain_per_sqrt_log_k",
                 holds=[("K 16", "<", "K 4", 0.2), ("K 16", ">", "K 4", -0.2)]),
            dict(claim="after a round the policy is as good as its best of K before "
                       "(0.8 of the way or more)",
                 source="Figure: rounds", paper="plot only:", metric="eval/recovered",
                 holds=[("K 8, one round, as many steps", ">", 0.8)]),
            dict(claim="rounds pay: five beat one of as many steps", source="sec. 4",
                 paper="10 to 18 rounds to converge", metric="eval/gold",
                 holds=[("K 8", ">", "K 8, one round, as many steps")]),
            dict(claim="a KL penalty in the ranking costs reward", source="Table of KL",
                 paper="2.143 to 2.029", metric="eval/proxy",
                 holds=[("K 8, KL in the ranking", "<", "K 8")]),
            dict(claim="local ranking beats global", source="LMFlow PR 460", paper="reported in",
                 metric="eval/gold", holds=[("K 8", ">", "K 8, global")]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, arms=["K 2", "K 4", "K 8", "K 16"],
                     title="gold reward against KL, by rounds"),
                dict(x="step", y=["eval/proxy", "eval/round_best"], arms=["K 8"],
                     title="proxy: policy, and best of K before")],
    ),
    "noise": dict(
        question="Which noise in the reward hurts, and does it hurt PPO more?",
        arms={"RAFT": in_rounds(8), "RAFT, prompt noise": in_rounds(8) | {"reward_noise": "prompt"},
              "RAFT, response noise": in_rounds(8) | {"reward_noise": "response"},
              "global": in_rounds(8) | {"ranking": "global"},
              "global, prompt noise": in_rounds(8) | {"ranking": "global", "reward_noise": "prompt"},
              "PPO": {"method": "ppo"}, "PPO, prompt noise": {"method": "ppo", "reward_noise": "prompt"},
              "PPO, response noise": {"method": "ppo", "reward_noise": "response"}},
        claims=[
            dict(claim="a shift of each prompt's rewards changes nothing under local ranking "
                       "(gold within 0.000001)",
                 source="App. A.3", paper="exact:", metric="eval/gold",
                 holds=[("RAFT, prompt noise", "<", "RAFT", 1e-6),
                        ("RAFT, prompt noise", ">", "RAFT", -1e-6)]),
            dict(claim="and hurts a global ranking", source="ours", paper="-", metric="eval/gold",
                 holds=[("global, prompt noise", "<", "global")]),
            dict(claim="PPO is hurt by it", source="App. A.3", paper="no number checked:",
                 metric="eval/gold", holds=[("PPO, prompt noise", "<", "PPO")]),
            dict(claim="noise of each response hurts RAFT", source="App. A.3", paper="no number checked:",
                 metric="eval/gold", holds=[("RAFT, response noise", "<", "RAFT")]),
            dict(claim="and PPO", source="App. A.3", paper="no number checked:", metric="eval/gold",
                 holds=[("PPO, response noise", "<", "PPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/proxy"], title="proxy reward")],
    ),
    "Llama 2": dict(
        question="Do versions climb, are rare skills kept, does PPO add to the last version?",
        arms={"last round": ROUNDS, "all rounds": ROUNDS | {"pool": "all"},
              "all rounds, first version": ROUNDS | {"pool": "all", "rounds": 1},
              "all rounds, reward model frozen": ROUNDS | {"pool": "all", "refresh": False},
              "then PPO": {"method": "ppo", "start": "all rounds"},               # its KL is to its own start
              "PPO alone": {"method": "ppo"}},
        columns={"eval/gold": "gold", "eval/rare_gold": "gold, rare sub-task", "eval/proxy": "proxy",
                 "eval/judge": "judge", "eval/kl": "KL", "eval/fluency": "fluency",
                 "eval/distinct_2": "distinct-2"},
        claims=[
            dict(claim="versions climb: the fifth beats the first", source="Figure 11", paper="plot only:",
                 metric="eval/gold", holds=[("all rounds", ">", "all rounds, first version")]),
            dict(claim="a pool of the last round alone forgets a rare sub-task", source="sec. 3.2.3",
                 paper="no number:", metric="eval/rare_gold", holds=[("all rounds", ">", "last round")]),
            dict(claim="a reward model refreshed by new labels helps", source="sec. 3.2.1",
                 paper="no number:", metric="eval/gold",
                 holds=[("all rounds", ">", "all rounds, reward model frozen")]),
            dict(claim="PPO adds to the last version", source="Figure 11, read off by others",
                 paper="+6 to +12 points of win rate", metric="eval/gold",
                 holds=[("then PPO", ">", "all rounds")]),
            dict(claim="more than PPO alone reaches", source="ours", paper="-", metric="eval/gold",
                 holds=[("then PPO", ">", "PPO alone")]),
        ],
        panels=[dict(x="step", y=["eval/gold", "eval/rare_gold"], arms=["last round", "all rounds"],
                     title="gold by rounds, all and rare"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
