"""What the papers say about DPO and data curricula, as arms (settings of dpo.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make

BETAS = [0.05, 0.1, 0.3, 1.0]
STRONG = {"pairs": "strong>weak", "loss": "sft", "lr": 5e-4}
CONTRASTIVE = {"start": "SFT on strong", "pairs": "strong>weak", "lr": 1e-4}       # lr: chosen by --tune
GOLD_LABELS = {"pair_labels": "gold"}
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "eval/win_rate_judge": "win rate, judge", "cpu_seconds": "CPU s"}

SETTINGS = [{"lr": 2.5e-4}, {"lr": 5e-4}, {"lr": 1e-3}, {"lr": 5e-4, "epochs": 1.0}]
BOLDER = [{"lr": 2e-3}, {"lr": 4e-3}]                    # likelihoods bear more than a contrast
TUNING = {
    name: dict(arm=arm, settings=SETTINGS + more)
    for name, arm, more in (("DPO", {}, []), ("DPO, gold labels", GOLD_LABELS, []),
                            ("Preferred-FT", {"loss": "sft"}, BOLDER),
                            ("unlikelihood", {"loss": "unlikelihood"}, BOLDER))} | {
    "strong>weak, after SFT on strong": dict(
        start=STRONG | {"epochs": 4}, arm={"pairs": "strong>weak"},
        settings=[{"lr": 5e-5}, {"lr": 1e-4}, {"lr": 2e-4}, {"lr": 5e-4}]),
    "SFT continued": dict(
        start=STRONG | {"epochs": 4}, arm=STRONG, settings=[{"lr": 5e-5}, {"lr": 1e-4}, {"lr": 2e-4},
                                                            {"lr": 5e-4}])}

EXPERIMENTS = {
    "beta": dict(
        question="Does beta trade reward for KL, and what becomes of the chosen answers?",
        arms={"SFT": {"epochs": 0}, "SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}} | {
            f"beta {beta:g}": {"beta": beta, "eval_every": 24} for beta in BETAS},
        columns=COLUMNS,
        claims=[
            dict(claim="gold rises above SFT at every beta", source="IMDb frontier", paper="plot only:",
                 metric="eval/gold", holds=[(f"beta {beta:g}", ">", "SFT") for beta in BETAS]),
            dict(claim="larger beta, smaller KL", source="Eq. 3, IMDb frontier", paper="plot only:",
                 metric="eval/kl",
                 holds=[(f"beta {b:g}", "<", f"beta {a:g}") for a, b in zip(BETAS, BETAS[1:])]),
            dict(claim="the log-prob of chosen answers falls (nats)", paper="reported in",
                 source="official code, issues 8, 32, 36", metric="eval/logps/chosen:change",
                 holds=[(f"beta {beta:g}", "<", 0.0) for beta in BETAS]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL",
                     arms=[f"beta {beta:g}" for beta in BETAS]),
                dict(x="step", y=["eval/logps/chosen", "eval/logps/rejected"], arms=["beta 0.1"],
                     title="beta 0.1: held-out log-probs, nats")],
    ),
    "against others": dict(
        question="On the same pairs, what is the contrast worth, and labels without errors?",
        arms={"DPO": {}, "Preferred-FT": {"loss": "sft", "lr": 2.5e-4},
              "unlikelihood": {"loss": "unlikelihood", "lr": 1e-3},
              "DPO, gold labels": GOLD_LABELS | {"lr": 2.5e-4}, "PPO": {"method": "ppo"},
              "PPO on gold": {"method": "ppo", "reward": "gold", "eval_every": 2},
              "DPO, temperature 0.5": {"eval_temperature": 0.5}},
        columns=COLUMNS,
        claims=[
            dict(claim="DPO beats Preferred-FT", source="Figures 2 and 3", paper="plots only:",
                 metric="eval/gold", holds=[("DPO", ">", "Preferred-FT")]),
            dict(claim="and unlikelihood", source="Figure 2", paper="plot only:", metric="eval/gold",
                 holds=[("DPO", ">", "unlikelihood")]),
            dict(claim="on pairs labelled by gold it has more gold than PPO on gold, at equal KL",
                 source="IMDb frontier", paper="plot only:", metric="eval/gold", at="eval/kl",
                 holds=[("DPO, gold labels", ">", "PPO on gold")]),
        ],
        panels=[dict(kind="points", x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
    "curriculum": dict(
        question="Do pairs of known writers add to SFT on the strong one, and does their order matter?",
        arms={"SFT on strong": STRONG | {"epochs": 4},
              "SFT continued": STRONG | {"start": "SFT on strong", "lr": 5e-5},
              "strong>weak": CONTRASTIVE,
              "strong>medium": CONTRASTIVE | {"pairs": "strong>medium"},
              "easy to hard": CONTRASTIVE | {"hard_pairs": "strong>medium", "curriculum": "easy_to_hard"},
              "hard to easy": CONTRASTIVE | {"hard_pairs": "strong>medium", "curriculum": "hard_to_easy"},
              "style only": CONTRASTIVE | {"pairs": "chatty>dry"}},
        columns=COLUMNS,
        claims=[
            dict(claim="where SFT on the strong writer saturates, DPO on strong>weak steps beyond it",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("strong>weak", ">", "SFT continued")]),
            dict(claim="easy to hard beats either kind of pair alone",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("easy to hard", ">", "strong>weak"), ("easy to hard", ">", "strong>medium")]),
            dict(claim="easy to hard beats the other order",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("easy to hard", ">", "hard to easy")]),
            dict(claim="control: pairs of equal gold and other style gain nothing (gold, within 0.1)",
                 source="ours: that a contrast alone is not enough", paper="-", metric="eval/gold:change",
                 holds=[("style only", "=", 0.0, 0.1)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/kl"], title="KL to the policy that the arm started from, nats")],
    ),
}
