"""What the paper says about RSO, as arms (settings of rso.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "4", "--num_samples", "2"]      # flags of the short run that the tests make

LOSSES = {"sigmoid-norm": "sigmoid_norm", "hinge": "hinge", "hinge-norm": "hinge_norm"}
SOURCES = ["direct", "sft", "rso"]
PAPER = {"proxy_pairs": "off_policy"}              # there too the reward model learns from the direct pairs
ONE_ROUND = PAPER | {"method": "raft", "rounds": 1, "candidates": 16, "prompts": 0, "lr": 1e-3, "epochs": 3}
# Chosen on seeds 100 to 102: for each source, and for the hinge without a reference.
CHOSEN = {"direct": {"lr": 1e-3, "gamma": 0.2}, "sft": {"lr": 1e-3, "gamma": 0.5},
          "rso": {"lr": 5e-4, "gamma": 0.2}}
HINGE = {"lr": 2.5e-4, "gamma": 0.5}
NOISE = {"label_noise": 0.25}                      # on top of the annotators' own errors
BETAS = {0.0: "top 4 of 16", 0.25: "beta 0.25", 0.5: "beta 0.5", 2.0: "beta 2"}
RANDOM = "random 4 of 16"


def over_beta(name, **settings):
    """Arms from the top of the candidates to a random choice, the limits of beta 0 and of a large one."""
    arms = {f"{arm}{name}": {"beta": beta} | settings for beta, arm in BETAS.items()}
    return arms | {f"{RANDOM}{name}": {"source": "sft"} | settings}


def on_every_loss(left, right):
    return [(f"{loss}, {left}", ">", f"{loss}, {right}") for loss in LOSSES]


SETTINGS = [{"lr": 5e-4, "gamma": 0.5}, {"lr": 1e-3, "gamma": 0.5}, {"lr": 2e-3, "gamma": 0.5},
            {"lr": 1e-3, "gamma": 0.2}]
MILDER = [{"lr": 2.5e-4, "gamma": 0.5}, {"lr": 5e-4, "gamma": 0.2}]   # the others left little fluency
TUNING = {
    name: dict(arm=PAPER | arm, settings=SETTINGS + MILDER)
    for name, arm in (("direct", {"source": "direct"}), ("sft", {"source": "sft"}), ("rso", {}),
                      ("hinge, rso", {"loss": "hinge"}))} | {
    "proxy of SFT samples": dict(arm={}, settings=SETTINGS)}
COLUMNS = {"eval/win_rate_proxy": "win rate, proxy", "eval/win_rate_judge": "win rate, judge",
           "eval/win_rate": "win rate, gold", "eval/gold": "gold", "eval/proxy": "proxy",
           "eval/kl": "KL, nats", "eval/fluency": "fluency", "cpu_seconds": "CPU s"}

EXPERIMENTS = {
    "losses and sources": dict(
        question="Does the source of the pairs matter more than the loss?",
        arms={f"{name}, {source}": PAPER | {"loss": loss, "source": source}
              | (HINGE if name == "hinge" else CHOSEN[source])
              for name, loss in LOSSES.items() for source in SOURCES} | {
            "RAFT": ONE_ROUND, "ReST": ONE_ROUND | {"ranking": "global", "share": 0.25},
            "SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}},
        columns=COLUMNS,
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
            dict(claim="the two losses with a reference are level (win rate, within 0.05)", source="Table 1",
                 paper="82.2, 83.5%", metric="eval/win_rate",
                 holds=[("hinge-norm, rso", "=", "sigmoid-norm, rso", 0.05)]),
            dict(claim="RAFT lies below DPO on the data's own pairs", source="Table 1",
                 paper="68.5 under 76.1%", metric="eval/win_rate",
                 holds=[("RAFT", "<", "sigmoid-norm, direct")]),
            dict(claim="and ReST below RAFT", source="Table 1", paper="46.2 under 68.5%",
                 metric="eval/win_rate", holds=[("ReST", "<", "RAFT")]),
        ],
        panels=[dict(kind="grid", y=[y], rows=list(LOSSES), columns=SOURCES, name="{row}, {column}",
                     title=f"win rate against SFT by {judge}")
                for y, judge in (("eval/win_rate", "gold"), ("eval/win_rate_proxy", "the proxy"))],
    ),
    "beta": dict(
        question="Is there a best beta, and does noise in the labels move it?",
        arms=over_beta("") | over_beta(", noisy labels", **NOISE),
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
                 "eval/fluency": "fluency", "eval/win_rate": "win rate, gold"},
        claims=[
            dict(claim="rejection sampling beats the top of the candidates",
                 source="Figure 3 (beta 0.5 over 0)", paper="plot only:", metric="eval/gold",
                 holds=[("beta 0.5", ">", BETAS[0.0])]),
            dict(claim="and a random choice", source="Table 2", paper="71.9 over 68.5%", metric="eval/gold",
                 holds=[("beta 0.5", ">", RANDOM)]),
            dict(claim="under noisy labels it beats the top", source="sec. 3.2, what beta is for",
                 paper="expected from", metric="eval/gold",
                 holds=[("beta 0.5, noisy labels", ">", f"{BETAS[0.0]}, noisy labels")]),
        ],
        panels=[dict(kind="line", x="beta", y=["eval/gold"], title="gold reward",
                     series={"clean labels": BETAS,
                             "noisy labels": {beta: f"{arm}, noisy labels" for beta, arm in BETAS.items()}},
                     levels={"random choice": RANDOM, "random, noisy": f"{RANDOM}, noisy labels"})],
    ),
}
