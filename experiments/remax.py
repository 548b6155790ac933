"""What the paper says about ReMax, as arms (settings of remax.py) and claims. Data only.

The form of arms, claims and panels is described in docs/protocol.md.
"""
QUICK = []                       # flags of the short run that the tests make

VARIANCES = {f"eval/variance/{name}": name for name in (
    "REINFORCE, 1 sample", "ReMax", "leave-one-out")}
PROBE = {"variance_prompts": 256}
EQUAL = {"epochs": 4}                               # as many prompts as PPO sees
ONE_UPDATE = {"ppo_epochs": 1, "minibatch_size": 128}          # a batch, as in the paper's comparison

TUNING = {
    "ReMax": dict(arm=EQUAL, settings=[{"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3},
                                       {"lr": 4e-3, "kl_coef": 0.02}]),
    "PPO, one update": dict(arm=ONE_UPDATE, method="ppo", settings=[
        {"lr": 1.5e-3}, {"lr": 3e-3}, {"lr": 6e-3}, {"lr": 3e-3, "kl_coef": 0.02}]),
}

EXPERIMENTS = {
    "variance": dict(
        question="When does the greedy baseline reduce the gradient's variance?",
        arms={"SFT": PROBE | {"epochs": 0}, "SFT, rewards shifted by prompt":
              PROBE | {"epochs": 0, "reward_noise": "prompt"}, "trained": PROBE},
        columns=VARIANCES | {"eval/variance/ReMax / REINFORCE, 1 sample": "ReMax / 1 sample",
                             "eval/entropy": "entropy, nats"},
        claims=[
            dict(claim="less variance than REINFORCE with one sample, where rewards differ between prompts",
                 source="ReMax, sec. 3", paper="no number checked:",
                 metric="eval/variance/ReMax / REINFORCE, 1 sample",
                 holds=[("SFT, rewards shifted by prompt", "<", 1.0)]),
            dict(claim="also for this reward, at the start and after training", source="ReMax",
                 paper="no number checked:", metric="eval/variance/ReMax / REINFORCE, 1 sample",
                 holds=[("SFT", "<", 1.0), ("trained", "<", 1.0)]),
        ],
        panels=[dict(kind="bars", log=True, y=list(VARIANCES), title="trace of the covariance, one prompt")],
    ),
    "against PPO": dict(
        question="Does the greedy baseline replace PPO's value model?",
        arms={"SFT, temperature 0.5": {"epochs": 0, "eval_temperature": 0.5}, "ReMax": EQUAL,
              "PPO, one update": ONE_UPDATE | {"method": "ppo", "lr": 6e-3},
              "PPO, eight updates": {"method": "ppo"}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL, nats",
                 "eval/fluency": "fluency", "state_mb": "MB trained", "tokens_generated": "tokens generated",
                 "cpu_seconds": "CPU s", "seconds_per_step": "s a step"},
        claims=[
            dict(claim="no less gold than PPO with one update a batch, for equal prompts (within 0.1)",
                 source="README of the official code", paper="63.6% win rate over PPO", metric="eval/gold",
                 holds=[("ReMax", ">", "PPO, one update", -0.1)]),
            dict(claim="less memory for weights, gradients and optimizer (MB)",
                 source="abstract, of all GPU memory", paper="46% less", metric="state_mb",
                 holds=[("ReMax", "<", "PPO, one update")]),
            dict(claim="less CPU time", source="survey of the paper", paper="no number checked:",
                 metric="cpu_seconds", holds=[("ReMax", "<", "PPO, one update")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"),
                dict(kind="points", x="eval/kl", y=["eval/gold"], best_of_n=True, title="gold against KL")],
    ),
}
