"""What the paper says about SteerLM, as arms (settings of steerlm.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = ["--attributes", "score", "--rounds", "0", "--epochs", "0.3",       # flags of the short run that the
         "--predictor_epochs", "0.5"]                                       # tests make

ALL = 23000                                             # of the demonstrations; the default trains on so many
PREDICTED = {"rated": ALL}                              # people rated all, the prediction model rates anew
HUMAN = {"labels": "human", "demonstrations": ALL, "rated": ALL}
OWN_SAMPLES = {"start": "policy", "demonstrations": 0, "lr": 5e-3, "batch_size": 32, "schedule": "linear",
               "epochs": 6}                             # 4,096 samples of the SFT policy, all of them rated
COLUMNS = {"eval/gold": "gold", "eval/judge": "judge", "eval/kl": "KL, nats", "eval/fluency": "fluency",
           "eval/label_error": "label error, levels", "eval/slope": "slope", "eval/cross_talk": "cross-talk",
           "cpu_seconds": "CPU s"}
SLOPES = ("sentiment", "topicality", "verbosity")


def more_gold(claim, source, paper, left, right):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=[(left, ">", right)])


TUNING = {
    "SteerLM": dict(arm={}, grid={"lr": (4e-3, 8e-3, 1.2e-2), "epochs": (1.0, 2.0)}),
}

EXPERIMENTS = {
    "ladder": dict(
        question="What does each step of SteerLM add, and does it replace PPO?",
        arms={"SFT": {"epochs": 0, "labels": "none", "start": "policy"},
              "SFT, temperature 0.5": {"epochs": 0, "labels": "none", "start": "policy",
                                       "eval_temperature": 0.5},
              "no attributes": {"labels": "none"}, "human attributes": HUMAN,
              "human, best quarter": HUMAN | {"share": 0.25}, "predicted": PREDICTED,
              "predicted from 4,096 ratings": {}, "bootstrapped": {"rounds": 1},
              "own samples": OWN_SAMPLES, "PPO": {"method": "ppo"}},
        columns=COLUMNS,
        claims=[
            more_gold("attributes that people gave help", "ablation", "79.7 to 96.2% of ChatGPT",
                      "human attributes", "no attributes"),
            more_gold("the best of the data alone helps further", "ablation", "96.2 to 98.1% of ChatGPT",
                      "human, best quarter", "human attributes"),
            more_gold("predicted attributes beat people's", "ablation", "98.1 to 102.7% of ChatGPT",
                      "predicted", "human attributes"),
            more_gold("bootstrapping adds to that", "ablation", "103.7 to 104.2% of ChatGPT",
                      "bootstrapped", "predicted from 4,096 ratings"),
            more_gold("it beats RLHF", "automatic Elo", "1139 over 925 Elo, another team's model:",
                      "predicted from 4,096 ratings", "PPO"),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="points", x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL")],
    ),
    "steering": dict(
        question="How far does each attribute follow its request?",
        arms={"demonstrations": {}, "own samples": OWN_SAMPLES},
        columns={"eval/slope": "slope", "eval/cross_talk": "cross-talk"} | {
            f"eval/slope_{name}": name for name in SLOPES},
        claims=[
            dict(claim="every attribute rises with its request (levels per level)", source="toxicity",
                 paper=".063, .086, .096, .104 at 0, 3, 6, 9", metric="eval/slope_min",
                 holds=[("demonstrations", ">", 0.0)]),
            dict(claim="sentiment by at least half a level a level", source="ours: what a user would notice",
                 paper="-", metric="eval/slope_sentiment", holds=[("demonstrations", ">", 0.5)]),
        ],
        panels=[dict(kind="curve", curve="followed", x="asked", y=list(SLOPES), arms=[arm],
                     title=f"level found for the level asked for: {arm}")
                for arm in ("demonstrations", "own samples")],
    ),
    "noise": dict(
        question="When is rating anew worth it?",
        arms={f"{name}, noise {noise} levels": settings | {"rating_noise": noise} for noise in (2.0, 4.0)
              for name, settings in (("human", HUMAN), ("predicted", PREDICTED))},
        columns=COLUMNS,
        claims=[
            dict(claim="with very noisy ratings, predicted ones are nearer to the truth (levels)",
                 source="step 2", paper="no number:", metric="eval/label_error",
                 holds=[("predicted, noise 4.0 levels", "<", "human, noise 4.0 levels")]),
            more_gold("and more gold comes of them", "ablation", "98.1 to 102.7% of ChatGPT",
                      "predicted, noise 4.0 levels", "human, noise 4.0 levels"),
        ],
        panels=[dict(kind="bars", y=["eval/label_error"], title="labels' distance from the truth, levels"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}
