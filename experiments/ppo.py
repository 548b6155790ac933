"""What the papers say about PPO for language models, as arms (settings of ppo.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make

BETAS = [0.05, 0.1, 0.3]

# Around both methods' defaults: lr times 3 or 1/3, weight of the KL times 4 or 1/4, epochs times 1 or 1/2.
PPO_GRID = {f"PPO lr {lr:.2g}, KL {kl:g}, {n} epochs": {"lr": lr, "kl_coef": kl, "ppo_epochs": n}
            for lr in (3.3e-4, 3e-3) for kl in (0.0125, 0.2) for n in (2, 4)}
DPO_GRID = {f"DPO lr {lr:.2g}, beta {beta:g}, {n} epochs": {"method": "dpo", "lr": lr, "beta": beta,
                                                            "epochs": n}
            for lr in (1.7e-4, 1.5e-3) for beta in (0.025, 0.4) for n in (1, 2)}

EXPERIMENTS = {
    "over-optimisation": dict(
        question="What does the KL penalty buy, and when does the proxy stop meaning gold?",
        arms={f"KL {kl:g}": {"epochs": 6, "eval_every": 2, "kl_coef": kl} for kl in (0.0, 0.02, 0.2, 2.0)} | {
            "pushed": {"epochs": 12, "eval_every": 4, "kl_coef": 0.0, "lr": 3e-3}},       # longer, lr x 3
        claims=[
            dict(claim="without a penalty gold turns over (it falls in the second half of training)",
                 source="Gao et al., sec. 3", paper="plot only:", metric="eval/gold:second_half",
                 holds=[("KL 0", "<", 0.0)]),
            dict(claim="while the proxy keeps rising", source="Gao et al., sec. 3", paper="plot only:",
                 metric="eval/proxy:second_half", holds=[("KL 0", ">", 0.0)]),
            dict(claim="pushed on, gold ends below its start", source="Gao et al., sec. 3",
                 paper="plot only:", metric="eval/gold:change", holds=[("pushed", "<", 0.0)]),
            dict(claim="at the highest proxy reward of all arms", source="ours", paper="-",
                 metric="eval/proxy", holds=[("pushed", ">", f"KL {kl:g}") for kl in (0.0, 0.02, 0.2, 2.0)]),
            dict(claim="the penalty does not move the gold-KL frontier "
                       "(at equal KL, within 0.1 of the unpenalised run)",
                 source="Gao et al., sec. 3.6", paper="plot only:", metric="eval/gold", at="eval/kl",
                 holds=[(f"KL {kl}", *side) for kl in (0.02, 0.2)
                        for side in (("<", "KL 0", 0.1), (">", "KL 0", -0.1))]),
            dict(claim="no penalty and a large one are both poor", source="InstructGPT, E.7",
                 paper="no number checked:", metric="eval/gold",
                 holds=[("KL 0.2", ">", "KL 0"), ("KL 0.2", ">", "KL 2")]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold reward against KL"),
                dict(x="eval/kl", y=["eval/proxy"], best_of_n=True, title="proxy reward against KL"),
                dict(x="step", y=["eval/gold"], title="gold reward over training")],
    ),
    "frontier": dict(
        question="How much gold does a nat of KL buy: PPO, PPO on the true reward, or DPO?",
        arms={f"DPO beta {beta:g}": {"method": "dpo", "beta": beta} for beta in BETAS} | {
            "PPO": {"eval_every": 2},
            "PPO on gold": {"eval_every": 2, "reward": "gold"},
            "DPO, then PPO": {"start": "DPO beta 0.1"}},
        claims=[
            dict(claim="PPO raises gold", source="Stiennon et al.", paper="no number checked:",
                 metric="eval/gold:change", holds=[("PPO", ">", 0.0)]),
            dict(claim="DPO has more gold than PPO at equal KL", source="DPO, IMDb frontier",
                 paper="plot only:", metric="eval/gold", at="eval/kl",
                 holds=[(f"DPO beta {beta:g}", ">", "PPO") for beta in BETAS]),
            dict(claim="even than PPO on the true reward", source="DPO, IMDb frontier", paper="plot only:",
                 metric="eval/gold", at="eval/kl",
                 holds=[(f"DPO beta {beta:g}", ">", "PPO on gold") for beta in BETAS]),
            dict(claim="PPO adds gold on top of DPO", source="ours", paper="-", metric="eval/gold:change",
                 holds=[("DPO, then PPO", ">", 0.0)]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold reward against KL",
                     arms=[f"DPO beta {beta:g}" for beta in BETAS] + ["PPO", "PPO on gold"])],
    ),
    "sensitivity": dict(
        question="Is PPO more sensitive to its settings than DPO: how far does final gold spread over a "
                 "grid around the defaults?",
        arms=PPO_GRID | DPO_GRID,
        spreads={"PPO's spread": list(PPO_GRID), "DPO's spread": list(DPO_GRID)},
        claims=[dict(claim="final gold spreads further over PPO's grid "
                           "(standard deviation of eight settings)",
                     source="folklore; InstructGPT, E.9", paper="-", metric="eval/gold",
                     holds=[("PPO's spread", ">", "DPO's spread")])],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
}
