"""What the paper says about PRO, as arms (settings of pro.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "3"]      # flags of the short run that the tests make


def lengths(epochs, name):
    """Arms of ranking length 2 to 5, `epochs(n)` passes each."""
    return {name.format(n=n): {"candidates": n, "epochs": epochs(n)} for n in (2, 3, 4, 5)}


BY_PROMPTS = lengths(lambda n: 2.0, "{n}, equal prompts")
BY_RESPONSES = lengths(lambda n: 10 / n, "{n}, equal responses")
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL",
           "eval/fluency": "fluency", "eval/nll": "nll of good text", "eval/distinct_2": "distinct-2",
           "eval/length": "length"}


def rising(names):
    return [(longer, ">", shorter) for shorter, longer in zip(names, names[1:])]


EXPERIMENTS = {
    "length": dict(
        question="Do longer rankings help, for equal prompts and for equal responses seen?",
        arms=BY_PROMPTS | BY_RESPONSES,
        columns=COLUMNS,
        claims=[
            dict(claim="5 responses beat 2, at equal prompts", source="Figure 3", paper="plot only:",
                 metric="eval/gold", holds=[("5, equal prompts", ">", "2, equal prompts")]),
            dict(claim="every response more helps, at equal prompts", source="Figure 3", paper="plot only:",
                 metric="eval/gold", holds=rising(list(BY_PROMPTS))),
            dict(claim="5 responses beat 2, at equal responses", source="ours", paper="-",
                 metric="eval/gold", holds=[("5, equal responses", ">", "2, equal responses")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
    "ablation": dict(
        question="What do the SFT term, the temperature and the lower places do?",
        arms={"SFT": {"epochs": 0}, "PRO": {}, "no SFT": {"sft_weight": 0.0},
              "no temperature": {"dynamic_temperature": False},
              "neither": {"sft_weight": 0.0, "dynamic_temperature": False}, "first place only": {"terms": 1}},
        columns=COLUMNS,
        claims=[
            dict(claim="without SFT and temperature the policy collapses: fluency falls by a tenth or more",
                 source="Table 3", paper="BLEU 21.5 to 5.1, reward 55.4 to 46.2", metric="eval/fluency",
                 holds=[("neither", "<", "PRO", -0.1)]),
            dict(claim="and gold falls below SFT's", source="Table 3", paper="-", metric="eval/gold",
                 holds=[("neither", "<", "SFT")]),
            dict(claim="either of the two saves it", source="Table 3", paper="reward 53.3, 55.0",
                 metric="eval/gold",
                 holds=[("no SFT", ">", "neither"), ("no temperature", ">", "neither")]),
            dict(claim="the temperature adds little or nothing (within 0.1)", source="Table 3",
                 paper="+0.3, +0.3, -0.4 points", metric="eval/gold",
                 holds=[("PRO", "<", "no temperature", 0.1), ("PRO", ">", "no temperature", -0.1)]),
            dict(claim="the lower places add to the first", source="Table 3", paper="+0.2 to +0.6 points",
                 metric="eval/gold", holds=[("PRO", ">", "first place only")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "against others": dict(
        question="On the same samples, is the list worth more than its pairs or its best?",
        arms={"PRO": {}, "RRHF": {"method": "rrhf", "sources": "D", "candidates": 5},
              "DPO": {"method": "rso", "source": "sft", "candidates": 5, "num_samples": 5,
                      "pairs": "tournament"},
              "SFT on the best": {"method": "rrhf", "sources": "D", "candidates": 5, "rank_weight": 0.0}},
        columns=COLUMNS,
        claims=[
            dict(claim="PRO beats SFT on the best", source="Table 1",
                 paper="68.0 over 63.8 (HH and ChatGPT)", metric="eval/gold",
                 holds=[("PRO", ">", "SFT on the best")]),
            dict(claim="PRO beats RRHF", source="Table 1", paper="68.0 over 63.1", metric="eval/gold",
                 holds=[("PRO", ">", "RRHF")]),
            dict(claim="PRO beats DPO", source="Table 1", paper="68.0 over 64.1; 58.7 under 59.3",
                 metric="eval/gold", holds=[("PRO", ">", "DPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
}
