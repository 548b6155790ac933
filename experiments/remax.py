"""What the paper says about ReMax, as arms (settings of remax.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make

VARIANCES = {f"eval/variance/{name}": name for name in (
    "REINFORCE, 1 sample", "ReMax", "REINFORCE", "REINFORCE +2", "REINFORCE -2", "batch mean",
    "leave-one-out")}
STAGES = ["SFT", "trained", "collapsed"]

EXPERIMENTS = {
    "variance": dict(
        question="How much variance does each baseline leave in the gradient, at three stages of training?",
        arms={"SFT": {"epochs": 0, "variance_prompts": 256},
              "trained": {"variance_prompts": 256},
              "collapsed": {"epochs": 16, "kl_coef": 0.0, "variance_prompts": 256}},
        columns=VARIANCES | {"eval/entropy": "entropy", "eval/fluency": "fluency"},
        claims=[
            dict(claim="less variance than REINFORCE with one sample each", source="ReMax",
                 paper="no number checked:", metric="eval/variance/ReMax / REINFORCE, 1 sample",
                 holds=[(stage, "<", 1.0) for stage in STAGES]),
            dict(claim="also where every reward is 2 higher, and ReMax pays for its greedy response",
                 source="ours", paper="-", metric="eval/variance/ReMax / REINFORCE +2",
                 holds=[(stage, "<", 1.0) for stage in STAGES]),
            dict(claim="less than the batch mean as baseline, at equal generation", source="ours", paper="-",
                 metric="eval/variance/ReMax / batch mean", holds=[(stage, "<", 1.0) for stage in STAGES]),
            dict(claim="less than leave-one-out, at equal generation", source="ours", paper="-",
                 metric="eval/variance/ReMax / leave-one-out",
                 holds=[(stage, "<", 1.0) for stage in STAGES]),
        ],
        panels=[dict(kind="bars", log=True, y=list(VARIANCES), title="trace of the covariance, one prompt"),
                dict(kind="bars", y=["eval/entropy"], title="entropy of a response, nats")],
    ),
    "against PPO": dict(
        question="Does the greedy baseline replace PPO's value model?",
        arms={"PPO": {"method": "ppo"}, "ReMax, equal time": {},
              "ReMax, equal tokens": {"epochs": 2, "batch_size": 64, "lr": 3e-3}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
                 "state_mb": "MB trained", "tokens_generated": "tokens generated",
                 "seconds_training": "seconds training", "seconds_per_step": "s a step"},
        claims=[
            dict(claim="no less gold than PPO in equal time (within 0.1)",
                 source="README of the official code", paper="63.6% win rate over PPO", metric="eval/gold",
                 holds=[("ReMax, equal time", ">", "PPO", -0.1)]),
            dict(claim="no less gold than PPO for equal tokens generated (within 0.1)", source="ours",
                 paper="-", metric="eval/gold", holds=[("ReMax, equal tokens", ">", "PPO", -0.1)]),
            dict(claim="less memory for weights, gradients and optimizer",
                 source="abstract, of all GPU memory", paper="46% less", metric="state_mb",
                 holds=[("ReMax, equal time", "<", "PPO")]),
            dict(claim="less time a step", source="survey of the paper", paper="no number checked:",
                 metric="seconds_per_step", holds=[("ReMax, equal time", "<", "PPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
}
