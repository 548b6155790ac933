"""What the paper says about RSO, as arms (settings of rso.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "4", "--num_samples", "2"]      # flags of the short run that the tests make

LOSSES = {"sigmoid-norm": "sigmoid_norm", "hinge": "hinge", "hinge-norm": "hinge_norm"}
SOURCES = ["direct", "sft", "rso"]
ONE_ROUND = {"method": "raft", "rounds": 1, "candidates": 16, "prompts": 0, "lr": 1e-3,
             "epochs": 3}                          # lr and epochs tuned on validation seed 100
NOISE = 0.25                                       # on top of the annotators' own errors


def over_beta(name, **settings):
    """Arms from the top of the candidates to a random choice, the limits of beta 0 and of a large one."""
    return {f"top 4 of 16{name}": {"beta": 0.0} | settings, f"beta 0.25{name}": {"beta": 0.25} | settings,
            f"beta 0.5{name}": settings, f"beta 1{name}": {"beta": 1.0} | settings,
            f"beta 2{name}": {"beta": 2.0} | settings, f"random 4 of 16{name}": {"source": "sft"} | settings}


def on_every_loss(left, right):
    return [(f"{loss}, {left}", ">", f"{loss}, {right}") for loss in LOSSES]


EXPERIMENTS = {
    "losses and sources": dict(
        question="Does the source of the pairs matter more than the loss?",
        arms={f"{name}, {source}": {"loss": loss, "source": source}
              for name, loss in LOSSES.items() for source in SOURCES} | {
            "RAFT": ONE_ROUND, "ReST": ONE_ROUND | {"ranking": "global", "share": 0.25}},
        columns={"eval/win_rate_proxy": "win rate, proxy", "eval/win_rate_judge": "win rate, judge",
                 "eval/win_rate": "win rate, gold", "eval/gold": "gold", "eval/proxy": "proxy",
                 "eval/kl": "KL", "eval/fluency": "fluency", "eval/length": "length"},
        claims=[
            dict(claim="SFT samples beat the data's own pairs, under every loss", source="Table 1",
                 paper="78.1 over 76.1% (sigmoid-norm)", metric="eval/win_rate",
                 holds=on_every_loss("sft", "direct")),
            dict(claim="rejection sampling beats SFT samples, under every loss", source="Table 1",
                 paper="82.2 over 78.1% (sigmoid-norm)", metric="eval/win_rate",
                 holds=on_every_loss("rso", "sft")),
            dict(claim="hacking: the hinge without a reference wins most by the proxy", source="Table 1",
                 paper="93.4 over 92.4, 92.8%", metric="eval/win_rate_proxy",
                 holds=[("hinge, rso", ">", "sigmoid-norm, rso"), ("hinge, rso", ">", "hinge-norm, rso")]),
            dict(claim="but less than the others by the judge", source="Table 1 (AutoSxS)",
                 paper="69.3 under 71.9, 70.8%", metric="eval/win_rate_judge",
                 holds=[("hinge, rso", "<", "sigmoid-norm, rso"), ("hinge, rso", "<", "hinge-norm, rso")]),
            dict(claim="and it drifts further", source="ours", paper="-", metric="eval/kl",
                 holds=[("hinge, rso", ">", "sigmoid-norm, rso"), ("hinge, rso", ">", "hinge-norm, rso")]),
            dict(claim="the two losses with a reference are level (win rate within 0.05)", source="Table 1",
                 paper="82.2, 83.5%", metric="eval/win_rate",
                 holds=[("hinge-norm, rso", "<", "sigmoid-norm, rso", 0.05),
                        ("hinge-norm, rso", ">", "sigmoid-norm, rso", -0.05)]),
            dict(claim="RAFT lies below DPO on the data's own pairs", source="Table 1",
                 paper="68.5 under 76.1%", metric="eval/win_rate",
                 holds=[("RAFT", "<", "sigmoid-norm, direct")]),
            dict(claim="and ReST below RAFT", source="Table 1", paper="46.2 under 68.5%",
                 metric="eval/win_rate", holds=[("ReST", "<", "RAFT")]),
        ],
        panels=[dict(kind="bars", y=["eval/win_rate_proxy", "eval/win_rate_judge", "eval/win_rate"],
                     title="win rate against SFT"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
    "beta": dict(
        question="Is there a best beta, and does noise in the labels move it?",
        arms=over_beta("") | over_beta(", noisy labels", label_noise=NOISE) | {
            "8 of 64, equal pairs": {"candidates": 64, "num_samples": 8, "epochs": 1.0},
            "tournament, equal pairs": {"pairs": "tournament", "epochs": 4 / 3}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL",
                 "eval/fluency": "fluency", "eval/win_rate": "win rate"},
        claims=[
            dict(claim="rejection sampling beats the top of the candidates",
                 source="Figure 3 (beta 0.5 over 0)", paper="plot only:", metric="eval/gold",
                 holds=[("beta 0.5", ">", "top 4 of 16")]),
            dict(claim="and a random choice", source="Table 2", paper="71.9 over 68.5%", metric="eval/gold",
                 holds=[("beta 0.5", ">", "random 4 of 16")]),
            dict(claim="under noisy labels it beats the top", source="sec. 3.2, what beta is for",
                 paper="expected from", metric="eval/gold",
                 holds=[("beta 0.5, noisy labels", ">", "top 4 of 16, noisy labels")]),
            dict(claim="and so does a beta of 2", source="ours", paper="-", metric="eval/gold",
                 holds=[("beta 2, noisy labels", ">", "top 4 of 16, noisy labels")]),
            dict(claim="more candidates help (8 of 64 over 4 of 16, equal pairs)", source="ours", paper="-",
                 metric="eval/gold", holds=[("8 of 64, equal pairs", ">", "beta 0.5")]),
            dict(claim="a tournament is no better than a first round (gold within 0.1, equal pairs)",
                 source="Table 2", paper="71.9, 71.7% (AutoSxS)", metric="eval/gold",
                 holds=[("tournament, equal pairs", "<", "beta 0.5", 0.1)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/proxy"], title="proxy reward")],
    ),
}
