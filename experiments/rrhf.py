"""What the paper says about RRHF, as arms (settings of rrhf.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "2"]      # flags of the short run that the tests make

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "eval/nll": "NLL of good text, nats a token",
           "eval/score_accuracy": "score accuracy", "cpu_seconds": "CPU s"}
ITERATED = {"DP": {}, "IP-2": {"rounds": 2}, "IP-3": {"rounds": 3}}

TUNING = {
    name: dict(arm=arm, settings=[{"lr": 1.5e-3}, {"lr": 3e-3}, {"lr": 6e-3}, {"lr": 3e-3, "epochs": 6.0}])
    for name, arm in (("RRHF", {}), ("SFT only", {"rank_weight": 0.0}))}

EXPERIMENTS = {
    "terms": dict(
        question="What does each term of the loss do, and does ranking alone destroy the language model?",
        arms={"SFT": {"epochs": 0}, "SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5},
              "rank + SFT": {}, "SFT only": {"rank_weight": 0.0, "lr": 1.5e-3},
              "rank only": {"sft_weight": 0.0, "epochs": 9}},
        columns=COLUMNS,
        claims=[
            dict(claim="the ranking loss adds reward to SFT on the best (proxy)", source="Table 7",
                 paper="-1.14 to -1.03 reward", metric="eval/proxy",
                 holds=[("rank + SFT", ">", "SFT only")]),
            dict(claim="ranking alone destroys the language model: gold falls below SFT's",
                 source="SimPO issue 5, of RRHF without SFT", paper="reported in", metric="eval/gold",
                 holds=[("rank only", "<", "SFT")]),
            dict(claim="and fluency falls by a tenth or more", source="SimPO issue 5", paper="reported in",
                 metric="eval/fluency", holds=[("rank only", "<", "SFT", -0.1)]),
            dict(claim="as a preference classifier the score is no better than chance before",
                 source="Table 5", paper="45.1% (Alpaca)", metric="eval/score_accuracy",
                 holds=[("SFT", "<", 0.5)]),
            dict(claim="and better after", source="Table 5", paper="61.8%", metric="eval/score_accuracy",
                 holds=[("rank + SFT", ">", "SFT")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "sources": dict(
        question="Where should candidates come from, and is the policy a best-of-n learner?",
        arms={"P": {"sources": "P"}, "D": {"sources": "D"}} | ITERATED,
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/candidates_mean": "candidates' mean",
                 "eval/candidates_best": "candidates' best", "eval/to_best": "proxy - best",
                 "eval/kl": "KL, nats", "eval/fluency": "fluency", "cpu_seconds": "CPU s"},
        claims=[
            dict(claim="own samples beat the data's own answers (proxy)", source="Table 6",
                 paper="-1.08 over -1.31 reward", metric="eval/proxy", holds=[("D", ">", "P")]),
            dict(claim="both together beat own samples alone (proxy)", source="Table 6",
                 paper="-1.02 over -1.08 reward", metric="eval/proxy", holds=[("DP", ">", "D")]),
            dict(claim="sampling again from the trained policy helps: 3 > 2 > 1 (proxy)", source="Table 6",
                 paper="-0.94, -0.96, -1.02 reward", metric="eval/proxy",
                 holds=[("IP-3", ">", "IP-2"), ("IP-2", ">", "DP")]),
            dict(claim="a best-of-n learner: its reward is that of its best candidates (proxy, within 0.2)",
                 source="Eq. 7", paper="-1.02 against -0.95 (DP)", metric="eval/to_best",
                 holds=[("D", "=", 0.0, 0.2), ("DP", "=", 0.0, 0.2)]),
        ],
        panels=[dict(kind="bars", y=["eval/proxy", "eval/candidates_best"],
                     title="proxy: reached, and candidates' best"),
                dict(kind="line", x="rounds", y=["eval/gold", "eval/proxy"], title="rounds of sampling",
                     series={"DP": {1: "DP", 2: "IP-2", 3: "IP-3"}})],
    ),
}
