"""What the papers say about offline alignment, as arms (of decision_transformer.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--epochs", "0.35"]     # flags of the short run that the tests make

SFT = {"objective": "sft"}
FILTER = {"objective": "filter", "lr": 2e-3}                            # chosen on seeds 100 to 102
RWR = {"objective": "rwr", "lr": 4e-3, "epochs": 2.0, "beta": 1.0}      # likewise
OWN_SAMPLES = {"sources": "D", "lr": 6e-3, "batch_size": 32, "schedule": "linear", "epochs": 5}
SMALL = {"demonstrations": 2875}                                         # an eighth of the default

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
           "eval/fluency": "fluency", "eval/effective_share": "effective share",
           "eval/slope_reward": "slope", "eval/spearman_reward": "rank correlation", "cpu_seconds": "CPU s"}


def more_gold(claim, source, paper, *holds):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=list(holds))


TUNING = {
    "DT": dict(arm={}, settings=[{"lr": 2e-3, "epochs": 1.0}, {"lr": 4e-3, "epochs": 1.0},
                                 {"lr": 8e-3, "epochs": 1.0}, {"lr": 4e-3, "epochs": 2.0}]),
    "filter": dict(arm={"objective": "filter"}, settings=[
        {"lr": 2e-3, "epochs": 2.0}, {"lr": 4e-3, "epochs": 2.0}, {"lr": 8e-3, "epochs": 2.0},
        {"lr": 4e-3, "epochs": 4.0}]),
    "RWR": dict(arm={"objective": "rwr"}, settings=[{"lr": 2e-3, "epochs": 1.0}, {"lr": 4e-3, "epochs": 1.0},
                                   {"lr": 4e-3, "epochs": 2.0}, {"lr": 4e-3, "epochs": 2.0, "beta": 0.3},
                                   {"lr": 2e-3, "epochs": 2.0, "beta": 0.3},
                                   {"lr": 4e-3, "epochs": 2.0, "beta": 1.0}]),
}

EXPERIMENTS = {
    "objectives": dict(
        question="What can be made of scored demonstrations, and does it replace PPO?",
        arms={"SFT": {"epochs": 0, "objective": "sft"},
              "SFT, temperature 0.5": {"epochs": 0, "objective": "sft", "eval_temperature": 0.5},
              "SFT on all, again": SFT, "filter": FILTER, "RWR": RWR, "DT": {},
              "DT, reward as text": {"control": "text"}, "DT, own samples": OWN_SAMPLES,
              "PPO": {"method": "ppo"}},
        columns=COLUMNS,
        claims=[
            more_gold("conditioning beats SFT on everything", "abstract", "no number checked:",
                      ("DT", ">", "SFT on all, again")),
            more_gold("and the other objectives", "abstract", "no number checked:",
                      ("DT", ">", "filter"), ("DT", ">", "RWR")),
            more_gold("or filtering is as good or better (gold, within 0.05)", "2507.10174", "reported in",
                      ("filter", ">", "DT", -0.05)),
            more_gold("it is comparable to PPO (gold, within 0.1)", "abstract of version 2",
                      "no number checked:", ("DT", "=", "PPO", 0.1)),
            dict(claim="the reward rises with the one asked for (rank correlation above 0.8)", source="DT",
                 paper="plots only:", metric="eval/spearman_reward", holds=[("DT", ">", 0.8)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="curve", curve="calibration", x="asked", y=["reward", "gold"], arms=["DT"],
                     title="DT: found for the reward asked for")],
    ),
    "data": dict(
        question="How much data does conditioning need, against filtering?",
        arms={"DT, 2,875": SMALL, "DT, 2,875, as many steps": SMALL | {"epochs": 16}, "DT, 23,000": {},
              "DT, 46,000": {"demonstrations": 46000},
              "filter, 2,875": FILTER | SMALL, "filter, 23,000": FILTER,
              "filter, 46,000": FILTER | {"demonstrations": 46000}},
        columns=COLUMNS,
        claims=[
            more_gold("it needs more data than filtering: behind with 2,875 rows", "2305.14550",
                      "reported in", ("filter, 2,875", ">", "DT, 2,875")),
            more_gold("new rows help it more than more passes over few (equal steps)", "2305.14550",
                      "reported in", ("DT, 23,000", ">", "DT, 2,875, as many steps")),
        ],
        panels=[dict(kind="line", x="demonstrations", y=["eval/gold"], log=True, series={
                     "DT": {2875: "DT, 2,875", 23000: "DT, 23,000", 46000: "DT, 46,000"},
                     "filter": {2875: "filter, 2,875", 23000: "filter, 23,000", 46000: "filter, 46,000"}},
                     title="gold reward, two passes"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
