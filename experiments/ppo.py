"""What the papers say about PPO for language models, as arms (settings of ppo.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make

COEFFICIENTS = (0.0, 0.02, 0.05, 0.2, 1.0)
LONG = {"epochs": 6, "eval_every": 3}
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "cpu_seconds": "CPU s"}

TUNING = {"PPO": dict(arm={}, settings=[{"lr": 5e-4}, {"lr": 1e-3}, {"lr": 2e-3},
                                       {"lr": 1e-3, "kl_coef": 0.02}])}

EXPERIMENTS = {
    "over-optimisation": dict(
        question="What does the KL penalty buy, and when does the proxy stop meaning gold?",
        arms={"SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}, "default": {}}
        | {f"KL {kl:g}": LONG | {"kl_coef": kl} for kl in COEFFICIENTS} | {
            "pushed": {"epochs": 12, "eval_every": 6, "kl_coef": 0.0, "lr": 3e-3}},       # longer, lr x 1.5
        columns=COLUMNS,
        claims=[
            dict(claim="PPO raises gold", source="Stiennon et al.", paper="no number checked:",
                 metric="eval/gold:change", holds=[("default", ">", 0.0)]),
            dict(claim="without a penalty gold turns over (it falls in the second half of training)",
                 source="Gao et al., sec. 3", paper="plot only:", metric="eval/gold:second_half",
                 holds=[("KL 0", "<", 0.0)]),
            dict(claim="while the proxy keeps rising", source="Gao et al., sec. 3", paper="plot only:",
                 metric="eval/proxy:second_half", holds=[("KL 0", ">", 0.0)]),
            dict(claim="pushed on, gold ends below its start", source="Gao et al., sec. 3",
                 paper="plot only:", metric="eval/gold:change", holds=[("pushed", "<", 0.0)]),
            dict(claim="the penalty does not move the gold-KL frontier (gold at equal KL, within 0.1)",
                 source="Gao et al., sec. 3.6", paper="plot only:", metric="eval/gold", at="eval/kl",
                 holds=[(f"KL {kl:g}", "=", "KL 0", 0.1) for kl in (0.05, 0.2)]),
            dict(claim="no penalty and a large one are both poor", source="InstructGPT, E.7",
                 paper="no number checked:", metric="eval/gold",
                 holds=[("KL 0.05", ">", "KL 0"), ("KL 0.05", ">", "KL 1")]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL",
                     arms=[f"KL {kl:g}" for kl in COEFFICIENTS]),
                dict(x="step", y=["eval/gold", "eval/proxy"], arms=["pushed"],
                     title="pushed on without a penalty")],
    ),
}
