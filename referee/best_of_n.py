"""Best of n at inference, as an arm: nothing is trained; of n samples the one with the highest reward counts.

It has the form of a method, so that the referee runs it as it runs the nine. Its KL is log n - (n-1)/n, an
upper bound that is exact where all samples differ in reward. That of the evaluation, sample by sample, would
say 0, because the policy itself stays as it was.
"""
from dataclasses import dataclass

import torch

import harness
from harness import option
from raft import kl_best_of_n


@dataclass
class Config(harness.Config):
    n: int = option(16, "samples of which the best is kept", "[1, inf)")


def train(run):
    """One step that trains nothing, between the usual evaluations."""
    n = run.config.n
    reward = harness.reward_to_maximise(run)
    run.evaluate()
    idle = torch.optim.AdamW(run.policy.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(idle)
    for step, _ in run.steps([None], run.policy, idle, schedule):
        run.log(step, {})
    run.draw = harness.best_of(n, reward)
    run.evaluate()
    run.amend(**{"eval/kl": kl_best_of_n(n), "eval/kl_se": 0.0})
