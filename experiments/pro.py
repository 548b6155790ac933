"""What the paper says about PRO, as arms (settings of pro.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--candidates", "3"]      # flags of the short run that the tests make

LONG = {"epochs": 6}                                     # long enough for a collapse to show
WRITERS = {2: "strong,weak", 3: "strong,medium,weak", 4: "strong,medium,crowd,weak",
           5: "strong,medium,crowd,off_policy,weak"}     # of known strength; the paper ranks several models
LENGTHS = {f"{n} own samples": {"candidates": n} for n in (2, 3, 5)}
LENGTHS |= {f"{n} writers": {"sources": "P", "systems": names} for n, names in WRITERS.items()}
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "eval/nll": "NLL of good text, nats a token", "cpu_seconds": "CPU s"}
ON_FIVE = {"method": "rrhf", "sources": "D", "candidates": 5}
DPO = {"method": "rso", "source": "sft", "candidates": 5, "num_samples": 5, "pairs": "tournament"}

TUNING = {
    name: dict(arm=arm, settings=[{"lr": lr / 2}, {"lr": lr}, {"lr": 2 * lr}, {"lr": lr, "epochs": 6.0}])
    for name, arm, lr in (("PRO", {}, 3e-3), ("RRHF", ON_FIVE | {"epochs": 2.0}, 3e-3), ("DPO", DPO, 3e-4),
                          ("SFT on the best", ON_FIVE | {"epochs": 2.0, "rank_weight": 0.0}, 3e-3))}

EXPERIMENTS = {
    "length": dict(
        question="Do longer rankings help, of own samples and of writers of known strength?",
        arms=LENGTHS,
        columns=COLUMNS,
        claims=[
            dict(claim="a ranking of 5 beats one of 2: own samples", source="Figure 3", paper="plot only:",
                 metric="eval/gold", holds=[("5 own samples", ">", "2 own samples")]),
            dict(claim="a ranking of 5 beats one of 2: writers", source="Figure 3", paper="plot only:",
                 metric="eval/gold", holds=[("5 writers", ">", "2 writers")]),
        ],
        panels=[dict(kind="line", x="ranking length", y=["eval/gold"], title="gold reward", series={
                     "own samples": {n: f"{n} own samples" for n in (2, 3, 5)},
                     "writers": {n: f"{n} writers" for n in WRITERS}}),
                dict(kind="line", x="ranking length", y=["eval/kl"], title="KL", series={
                     "own samples": {n: f"{n} own samples" for n in (2, 3, 5)},
                     "writers": {n: f"{n} writers" for n in WRITERS}})],
    ),
    "ablation": dict(
        question="What do the SFT term, the temperature and the lower places do?",
        arms={"SFT": {"epochs": 0}, "PRO": LONG, "no SFT": LONG | {"sft_weight": 0.0},
              "no temperature": LONG | {"dynamic_temperature": False},
              "neither": LONG | {"sft_weight": 0.0, "dynamic_temperature": False},
              "first place only": LONG | {"terms": 1}},
        columns=COLUMNS,
        claims=[
            dict(claim="without SFT and temperature the policy collapses: fluency falls by a tenth or more",
                 source="Table 3", paper="BLEU 21.5 to 5.1, reward 55.4 to 46.2", metric="eval/fluency",
                 holds=[("neither", "<", "PRO", -0.1)]),
            dict(claim="and gold falls below SFT's", source="Table 3", paper="reward 46.2 under 48.8",
                 metric="eval/gold", holds=[("neither", "<", "SFT")]),
            dict(claim="either of the two saves it", source="Table 3", paper="reward 53.3, 55.0 over 46.2",
                 metric="eval/gold",
                 holds=[("no SFT", ">", "neither"), ("no temperature", ">", "neither")]),
            dict(claim="the temperature makes no difference (gold, within 0.1)", source="Table 3",
                 paper="+0.3, +0.3, -0.4 points", metric="eval/gold",
                 holds=[("PRO", "=", "no temperature", 0.1)]),
            dict(claim="nor do the lower places (gold, within 0.1)", source="Table 3",
                 paper="+0.6, +0.2 points", metric="eval/gold",
                 holds=[("PRO", "=", "first place only", 0.1)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "against others": dict(
        question="On the same samples, is the list worth more than its pairs or its best?",
        arms={"PRO": {}, "RRHF": ON_FIVE, "DPO": DPO | {"lr": 3e-4},
              "SFT on the best": ON_FIVE | {"rank_weight": 0.0, "epochs": 6.0},
              "SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}},
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
        panels=[dict(kind="points", x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
