"""What the paper says about RRHF, as arms (settings of rrhf.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "2"]      # flags of the short run that the tests make

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/nll": "nll of good text", "eval/distinct_2": "distinct-2", "eval/eos_rate": "EOS rate",
           "eval/score_accuracy": "score accuracy", "eval/length": "length"}
ITERATED = {"DP": {}, "IP-2": {"rounds": 2}, "IP-3": {"rounds": 3}}

EXPERIMENTS = {
    "terms": dict(
        question="What does each term of the loss do, and does ranking alone destroy the language model?",
        arms={"SFT": {"epochs": 0}, "rank + SFT": {}, "SFT only": {"rank_weight": 0.0},
              "rank only": {"sft_weight": 0.0}},
        columns=COLUMNS,
        claims=[
            dict(claim="the ranking loss adds gold to SFT on the best", source="Table 7",
                 paper="-1.14 to -1.03 reward", metric="eval/gold",
                 holds=[("rank + SFT", ">", "SFT only")]),
            dict(claim="ranking alone destroys the language model: good text becomes unlikely",
                 source="SimPO issue 5, of RRHF without SFT", paper="reported in", metric="eval/nll",
                 holds=[("rank only", ">", "SFT", 0.5)]),
            dict(claim="and fluency falls by a tenth or more", source="SimPO issue 5", paper="reported in",
                 metric="eval/fluency", holds=[("rank only", "<", "SFT", -0.1)]),
            dict(claim="as a preference classifier the score is no better than chance before",
                 source="Table 5", paper="45.1% (Alpaca)", metric="eval/score_accuracy",
                 holds=[("SFT", "<", 0.5)]),
            dict(claim="and better after", source="Table 5", paper="61.8%", metric="eval/score_accuracy",
                 holds=[("rank + SFT", ">", "SFT")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/nll"], title="nll of held-out good text, a token")],
    ),
    "sources": dict(
        question="Where should candidates come from, and is the policy a best-of-n learner?",
        arms={"P": {"sources": "P"}, "D": {"sources": "D"}} | ITERATED | {
            "DP, trained as long as IP-3": {"epochs": 9}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/candidates_mean": "candidates' mean",
                 "eval/candidates_best": "candidates' best", "eval/to_best": "proxy - best", "eval/kl": "KL",
                 "eval/fluency": "fluency", "eval/distinct_2": "distinct-2"},
        claims=[
            dict(claim="own samples beat the data's own answers", source="Table 6",
                 paper="-1.08 over -1.31 reward", metric="eval/proxy", holds=[("D", ">", "P")]),
            dict(claim="both together beat own samples alone", source="Table 6", paper="-1.02 over -1.08",
                 metric="eval/proxy", holds=[("DP", ">", "D")]),
            dict(claim="sampling again from the trained policy helps: 3 > 2 > 1", source="Table 6",
                 paper="-0.94, -0.96, -1.02", metric="eval/proxy",
                 holds=[("IP-3", ">", "IP-2"), ("IP-2", ">", "DP")]),
            dict(claim="the same in gold reward", source="ours", paper="-", metric="eval/gold",
                 holds=[("IP-3", ">", "IP-2"), ("IP-2", ">", "DP")]),
            dict(claim="more than training as long on the first candidates", source="ours", paper="-",
                 metric="eval/gold", holds=[("IP-3", ">", "DP, trained as long as IP-3")]),
            dict(claim="a best-of-n learner: its reward is that of its best candidates (within 0.2)",
                 source="Eq. 7", paper="-1.02 against -0.95 (DP)", metric="eval/to_best",
                 holds=[(arm, op, 0.2 * sign) for arm in ("D", "DP") for op, sign in (("<", 1), (">", -1))]),
        ],
        panels=[dict(kind="bars", y=["eval/proxy", "eval/candidates_best"],
                     title="proxy: reached, and candidates' best"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
