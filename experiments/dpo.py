"""What the papers say about DPO and data curricula, as arms (settings of dpo.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make


def at_beta(beta):
    return {"beta": beta, "eval_every": 24}


BETAS = [0.05, 0.1, 0.3, 1.0, 3.0]
STRONG = {"pairs": "strong>weak", "loss": "sft"}
CONTRASTIVE = {"start": "SFT on strong", "pairs": "strong>weak"}

EXPERIMENTS = {
    "beta": dict(
        question="Does beta trade reward for KL, and what becomes of the chosen answers?",
        arms={"SFT": {"epochs": 0}} | {f"beta {beta:g}": at_beta(beta) for beta in BETAS},
        claims=[
            dict(claim="gold rises above SFT at every beta", source="IMDb frontier", paper="plot only:",
                 metric="eval/gold", holds=[(f"beta {beta:g}", ">", "SFT") for beta in BETAS]),
            dict(claim="larger beta, smaller KL", source="Eq. 3, IMDb frontier", paper="plot only:",
                 metric="eval/kl",
                 holds=[(f"beta {b:g}", "<", f"beta {a:g}") for a, b in zip(BETAS, BETAS[1:])]),
            dict(claim="chosen log-prob falls", source="official code, issues 8, 32, 36", paper="reported in",
                 metric="eval/logps/chosen:change", holds=[(f"beta {beta:g}", "<", 0.0) for beta in BETAS]),
            dict(claim="while the margin rises", source="Eq. 7", paper="expected from",
                 metric="eval/rewards/margins:change",
                 holds=[(f"beta {beta:g}", ">", 0.0) for beta in BETAS]),
        ],
        panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold reward against KL"),
                dict(x="step", y=["eval/logps/chosen", "eval/logps/rejected"], arms=["beta 0.1", "beta 1"],
                     title="held-out log-probs")],
    ),
    "curriculum": dict(
        question="Do pairs of known writers add to SFT on the strong one, and does their order matter?",
        arms={"SFT on strong": STRONG | {"epochs": 4},
              "SFT continued": STRONG | {"start": "SFT on strong"},
              "strong>weak": CONTRASTIVE,
              "strong>medium": CONTRASTIVE | {"pairs": "strong>medium"},
              "mixed": CONTRASTIVE | {"hard_pairs": "strong>medium", "curriculum": "mixed"},
              "easy to hard": CONTRASTIVE | {"hard_pairs": "strong>medium", "curriculum": "easy_to_hard"},
              "hard to easy": CONTRASTIVE | {"hard_pairs": "strong>medium", "curriculum": "hard_to_easy"},
              "style only": CONTRASTIVE | {"pairs": "chatty>dry"}},
        claims=[
            dict(claim="where SFT on the strong writer saturates, DPO on strong>weak steps beyond it",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("strong>weak", ">", "SFT continued")]),
            dict(claim="easy to hard beats either kind of pair alone",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("easy to hard", ">", "strong>weak"), ("easy to hard", ">", "strong>medium")]),
            dict(claim="easy to hard beats other orders",
                 source="Xu et al., abstract", paper="no number checked:", metric="eval/gold",
                 holds=[("easy to hard", ">", "mixed"), ("easy to hard", ">", "hard to easy")]),
            dict(claim="control: pairs of equal gold and other style gain nothing (within 0.1)",
                 source="ours", paper="-", metric="eval/gold:change",
                 holds=[("style only", "<", 0.1), ("style only", ">", -0.1)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/kl"], title="KL to the policy that the arm started from")],
    ),
}
