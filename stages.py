"""The steps of any training, the two stages that every method starts from (SFT, reward model), and the reward to maximise.

Methods see all of this as `common.<name>`.
"""
import math
import random
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from lm import batches, decode, generate, sequence_logps, sequence_scores
from tasks import UserError


def epochs(n, config):
    """Index lists of one optimizer step each: config.epochs passes over range(n), every pass in a new order."""
    rng, order = random.Random(config.seed), []
    for _ in range(math.ceil(config.epochs)):
        order += rng.sample(range(n), n)
    order = order[:round(config.epochs * n)]
    return [order[i:i + config.batch_size] for i in range(0, len(order), config.batch_size)]


def optimizer_and_schedule(model, config, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = round(config.warmup * steps)
    return optimizer, transformers.get_scheduler(config.schedule, optimizer, warmup, max(steps, 1))


def optimizer_step(model, optimizer, schedule, config):
    """Clip, step, clear; returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm.item()


def check_finite(values, step, prompts, name="loss"):
    """Stop the run, naming step and example, when one of the values [n] is not finite."""
    for value, prompt in zip(values.tolist(), prompts):
        if not math.isfinite(value):
            raise UserError(f"step {step}: {name} is {value} for the prompt {prompt!r}; lower --lr, or mend the data or "
                            "the reward")


def fit(model, tokenizer, rows, losses_of, config, title):
    """Plain training for the stages before a method: rows of (prompt, responses), losses_of(model, batch) -> [n]."""
    plan = epochs(len(rows), config)
    optimizer, schedule = optimizer_and_schedule(model, config, len(plan))
    for step, indices in enumerate(tqdm(plan, title, leave=False, disable=None)):
        prompts, responses = zip(*(rows[i] for i in indices))
        for part, batch in batches(tokenizer, prompts, responses, config.token_budget, model.device):
            losses = losses_of(model, batch)
            check_finite(losses, step + 1, [prompts[i] for i in part])
            (losses.sum() / len(indices)).backward()
        optimizer_step(model, optimizer, schedule, config)
    return model


def train_sft(model, tokenizer, demonstrations, config):
    """Maximum likelihood of the responses: summed over tokens, averaged over examples."""
    return fit(model, tokenizer, [(d.prompt, [d.response]) for d in demonstrations],
               lambda model, batch: -sequence_logps(model, batch), config, "SFT")


def reward_model_losses(model, batch):
    """Bradley-Terry: -log sigmoid(r(chosen) - r(rejected)) of each pair [n]; rows are chosen, rejected by turns."""
    chosen, rejected = sequence_scores(model, batch).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected)


def train_reward_model(model, tokenizer, pairs, config):
    """Fit a sequence-classification model with one label to preference pairs."""
    return fit(model, tokenizer, [(p.prompt, [p.chosen, p.rejected]) for p in pairs], reward_model_losses, config,
               "reward model")


@dataclass
class TrueReward:
    """The task's gold reward, called like a RewardModel; it reads complete responses."""
    gold: Callable
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, prompts, responses):
        return (torch.tensor([self.gold(*row, True) for row in zip(prompts, responses)]) - self.mean) / self.std


def reward_to_maximise(run):
    """The function (prompts, responses) -> rewards [N] that a method optimises: the proxy, or with --reward gold the truth.

    Either has mean 0 and deviation 1 on samples of the initial policy (Huang et al. 2023, "reward normalization"), so
    that one KL coefficient means the same for every reward. A reward model without a scale of its own is given one here.
    """
    if run.config.reward == "gold":
        reward = TrueReward(run.task.gold)
    elif "proxy" not in run.rewards:
        raise UserError("there is no reward to maximise: give --reward, or data with pairs to train a reward model from")
    else:
        reward = run.rewards["proxy"]
        if hasattr(reward.model.config, "reward_scale"):
            return reward
    config, prompts = run.config, run.task.prompts["train"][:run.config.batch_size]
    torch.manual_seed(config.seed)                                   # whatever was trained or loaded from the cache before
    samples = generate(run.policy, run.tokenizer, prompts, 4, config.temperature, max_new_tokens=config.max_new_tokens)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = reward(prompts, decode(run.tokenizer, samples))
    check_finite(scores, 0, prompts, "the reward")
    if scores.max() == scores.min():
        raise UserError(f"the reward is {scores[0]:.3g} for each of the policy's {len(scores)} first samples: no signal")
    reward.mean, reward.std = scores.mean().item(), scores.std().item()
    return reward
