"""What the papers say about offline alignment, as arms (of decision_transformer.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--epochs", "0.35"]     # flags of the short run that the tests make

# Each objective with the settings that were best for it on validation seed 100.
SFT = {"objective": "sft", "lr": 5e-4, "epochs": 2}
FILTER = {"objective": "filter", "lr": 1e-3, "epochs": 4}
RWR = {"objective": "rwr", "lr": 1e-3, "epochs": 2}
NOISE = {"reward_noise": "prompt"}
DATA = {f"{k} of each": {"candidates": k} for k in (2, 16)} | {
    f"{writer} writers": {"sources": "P", "systems": f"{writer},medium"} for writer in ("weak", "strong")}

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/effective_share": "effective", "eval/slope_reward": "slope",
           "eval/spearman_reward": "rank corr."}


def more_gold(claim, source, paper, *holds):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=list(holds))


EXPERIMENTS = {
    "objectives": dict(
        question="What can be made of one set of scored samples, and does it replace PPO?",
        arms={"start": {"epochs": 0, "objective": "sft"}, "SFT on all": SFT, "filter": FILTER}
        | {f"RWR beta {beta:g}": RWR | {"beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)}
        | {"DT": {}, "DT, reward as text": {"control": "text"}, "PPO": {"method": "ppo"},
           "PPO, as many samples": {"method": "ppo", "epochs": 8}},
        columns=COLUMNS,
        claims=[
            more_gold("conditioning beats SFT on everything", "abstract", "no number checked:",
                      ("DT", ">", "SFT on all")),
            more_gold("and the other objectives", "abstract", "no number checked:",
                      ("DT", ">", "filter"), ("DT", ">", "RWR beta 0.1")),
            more_gold("or filtering is as good or better (within 0.05)", "2507.10174", "reported in",
                      ("filter", ">", "DT", -0.05)),
            more_gold("it beats PPO", "abstract of version 1; version 2: comparable", "no number checked:",
                      ("DT", ">", "PPO")),
            more_gold("and PPO that scores as many samples", "ours", "-",
                      ("DT", ">", "PPO, as many samples")),
            dict(claim="what is asked for comes: rank correlation of bin and reward above 0.8", source="DT",
                 paper="plots only:", metric="eval/spearman_reward", holds=[("DT", ">", 0.8)]),
            dict(claim="and of bin and gold", source="ours", paper="-", metric="eval/spearman_gold",
                 holds=[("DT", ">", 0.8)]),
            dict(claim="3 deviations more than the best bin give no more gold", source="DT's code, issue 37",
                 paper="mixed reports in", metric="eval/gold_beyond",
                 holds=[("DT, reward as text", "<", 0.0)]),
            dict(claim="RWR at beta 0.1 learns from a tenth of the samples or less", source="ours", paper="-",
                 metric="eval/effective_share", holds=[("RWR beta 0.1", "<", 0.1)]),
            more_gold("and a beta in between is best", "ours", "-",
                      *(("RWR beta 0.3", ">", f"RWR beta {beta}") for beta in (0.1, 3))),
        ],
        panels=[dict(kind="curve", curve="calibration", x="asked", y=["reward", "gold"],
                     arms=["DT", "DT, reward as text"], title="what comes for the reward asked for"),
                dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward")],
    ),
    "data": dict(
        question="How do size and quality of the data matter, and what is a reward to be compared with?",
        arms={f"{name}, {data}": settings | source for data, source in DATA.items()
              for name, settings in (("filter", FILTER), ("DT", {}))}
        | {"DT, shifted rewards": NOISE, "DT, shifted, per prompt": NOISE | {"normalise": "prompt"},
           "DT, per prompt": {"normalise": "prompt"}, "DT": {}, "filter": FILTER},
        columns=COLUMNS,
        claims=[
            more_gold("it needs more data than filtering: behind with 2 samples a prompt", "2305.14550",
                      "reported in", ("filter, 2 of each", ">", "DT, 2 of each")),
            more_gold("more data helps it", "2305.14550", "reported in",
                      ("DT, 16 of each", ">", "DT"), ("DT", ">", "DT, 2 of each")),
            more_gold("it stands bad data better", "2305.14550", "reported in",
                      ("DT, weak writers", ">", "filter, weak writers")),
            more_gold("a shift of each prompt's rewards hurts it", "ours", "-",
                      ("DT", ">", "DT, shifted rewards")),
            more_gold("unless compared within a prompt", "ours", "-",
                      ("DT, shifted, per prompt", ">", "DT, shifted rewards")),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="curve", curve="calibration", x="asked", y=["reward"],
                     title="reward that came",
                     arms=["DT, 2 of each", "DT", "DT, 16 of each", "DT, shifted rewards",
                           "DT, shifted, per prompt"])],
    ),
}
