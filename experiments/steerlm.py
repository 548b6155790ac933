"""What the paper says about SteerLM, as arms (settings of steerlm.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--attributes", "score", "--rounds", "0", "--epochs", "0.3",       # flags of the short run that the
         "--predictor_epochs", "0.5"]                                       # tests make

PLAIN = {"labels": "none", "rounds": 0, "lr": 5e-4, "epochs": 2}
HUMAN, PREDICTED, NOISE = {"labels": "human", "rounds": 0}, {"rounds": 0}, (1, 2, 4)
FIVE = "sentiment,topicality,verbosity,intensity,personal"
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/label_error": "label error", "eval/slope": "slope", "eval/cross_talk": "cross-talk"}


def more_gold(claim, source, paper, left, right):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=[(left, ">", right)])


EXPERIMENTS = {
    "ladder": dict(
        question="What does each step of SteerLM add, and does it replace PPO?",
        arms={"start": PLAIN | {"epochs": 0}, "no attributes": PLAIN, "human attributes": HUMAN,
              "human, best quarter": HUMAN | {"share": 0.25}, "predicted": PREDICTED, "bootstrapped": {},
              "bootstrapped 3 times": {"rounds": 3}, "predicted by an LM": PREDICTED | {"predictor": "lm"},
              "PPO": {"method": "ppo"}, "Decision Transformer": {"method": "decision_transformer"}},
        columns=COLUMNS,
        claims=[
            more_gold("attributes that people gave help", "ablation", "79.7 to 96.2% of ChatGPT",
                      "human attributes", "no attributes"),
            more_gold("the best of the data alone helps further", "ablation", "96.2 to 98.1",
                      "human, best quarter", "human attributes"),
            more_gold("predicted attributes beat people's", "ablation", "98.1 to 102.7",
                      "predicted", "human attributes"),
            more_gold("the same, predicted by an LM as in the paper", "ablation", "98.1 to 102.7",
                      "predicted by an LM", "human attributes"),
            more_gold("bootstrapping adds to that", "ablation", "103.7 to 104.2",
                      "bootstrapped", "predicted"),
            more_gold("two rounds more add more", "ours", "-", "bootstrapped 3 times", "bootstrapped"),
            more_gold("it beats RLHF", "automatic Elo", "1139 over 925, another team's model:",
                      "bootstrapped", "PPO"),
            more_gold("several attributes beat one reward", "ours", "-",
                      "bootstrapped", "Decision Transformer"),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "steering": dict(
        question="How far does each attribute follow its request, and what else moves?",
        arms={"bootstrapped": {}, "predicted": PREDICTED, "human attributes": HUMAN,
              "exact attributes": HUMAN | {"rating_noise": 0.0},
              "five attributes": PREDICTED | {"attributes": FIVE}},
        columns={"eval/slope": "slope", "eval/cross_talk": "cross-talk"} | {
            f"eval/slope_{name}": name for name in FIVE.split(",")},
        claims=[
            dict(claim="every attribute rises with its request", source="toxicity",
                 paper=".063, .086, .096, .104 at 0, 3, 6, 9", metric="eval/slope_min",
                 holds=[("predicted", ">", 0.0)]),
            dict(claim="by at least half a level a level", source="ours", paper="-", metric="eval/slope",
                 holds=[("predicted", ">", 0.5)]),
            dict(claim="and the others stay (within a twentieth of a level)", source="ours", paper="-",
                 metric="eval/cross_talk", holds=[("predicted", "<", 0.05)]),
            dict(claim="labels without noise steer further", source="ours", paper="-", metric="eval/slope",
                 holds=[("exact attributes", ">", "human attributes")]),
        ],
        panels=[dict(kind="curve", curve="followed", x="asked", y=["sentiment", "topicality", "verbosity"],
                     arms=["predicted"], title="level that came for the level asked for")]
        + [dict(kind="matrix", matrix="matrix", arms=[arm], title=f"matrix: {arm}")
           for arm in ("predicted", "exact attributes")],
    ),
    "noise": dict(
        question="When is rating anew worth it?",
        arms={f"{name}, noise {noise}": settings | {"rating_noise": float(noise)} for noise in NOISE
              for name, settings in (("human", HUMAN), ("predicted", PREDICTED))},
        columns=COLUMNS,
        claims=[
            dict(claim="with very noisy ratings, predicted ones are nearer to the truth", source="step 2",
                 paper="no number:", metric="eval/label_error",
                 holds=[("predicted, noise 4", "<", "human, noise 4")]),
            more_gold("and more gold comes of them", "ablation", "98.1 to 102.7",
                      "predicted, noise 4", "human, noise 4"),
            dict(claim="with little noise, people's own are nearer", source="ours", paper="-",
                 metric="eval/label_error", holds=[("human, noise 1", "<", "predicted, noise 1")]),
            more_gold("and better to train on", "ours", "-", "human, noise 1", "predicted, noise 1"),
        ],
        panels=[dict(kind="bars", y=["eval/label_error"], title="labels' distance from the truth, levels"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
