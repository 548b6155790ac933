"""Rewards: which models judge a run, and which function a method maximises."""
import hashlib
import json
import random
from dataclasses import dataclass
from typing import Callable

import torch
from transformers import AutoModelForSequenceClassification

import common
import tasks
from common import UserError, warn
from harness.loading import fit_positions, policy_path
from harness.stages import Recipe, check_finite, train_reward_model
from tasks import chat


def load_rewards(config, task):
    """{"proxy": what methods may optimise, "judge": people, never seen}, as far as the run has them.

    The proxy is --reward, or the embedded task's, or one trained here from the task's pairs and kept in the
    cache.
    """
    def load(path, label=""):
        reward = common.load_reward_model(path, config.max_length, config.device, config.dtype, label,
                                          config.token_budget)
        if config.data != "reviews":
            fit_positions(reward.model, reward.tokenizer, path)
        if task.chat:
            reward.render = lambda prompts: chat.as_read_by(reward.tokenizer, prompts)
            if reward.tokenizer.chat_template:
                chat.end_turns(reward.tokenizer)
        return reward

    if config.reward == "none":
        return {}
    if config.reward == "gold" and not task.gold:
        raise UserError("--reward gold: only the embedded task has a true reward; name a reward model, "
                        "or leave it out")
    if config.reward not in ("", "gold"):
        return {"proxy": load(config.reward, config.reward_label)}
    if config.data == "reviews":
        from tasks import build
        return {"proxy": load(build.proxy(config), config.reward_label), "judge": People(task.opinion)}
    pairs = task.pairs.get("train")
    if not pairs:
        warn("no pairs to train a reward model from and no --reward: samples go without a proxy reward")
        return {}
    start = policy_path(config)
    key = json.dumps([str(start), config.reward_lr, config.seed, config.max_length, pairs])
    path = tasks.CACHE / "rewards" / hashlib.sha256(key.encode()).hexdigest()[:16]
    with tasks.lock(path):
        if not path.exists():
            torch.manual_seed(config.seed)
            tokenizer = common.load_tokenizer(start, config.max_length)
            model = common.load(AutoModelForSequenceClassification, start, config.device, config.dtype,
                                num_labels=1)
            recipe = Recipe(config.reward_lr, batch_size=16, schedule="linear",
                            token_budget=config.token_budget, seed=config.seed)
            tasks.save_model(train_reward_model(model, tokenizer, pairs, recipe), tokenizer, path)
    return {"proxy": load(path, config.reward_label)}


@dataclass
class People:
    """Scores by people who read complete responses, one person each; called like a RewardModel."""
    opinion: Callable

    def __call__(self, prompts, responses):
        return torch.tensor([self.opinion(*row) for row in zip(prompts, responses)])


@dataclass
class TrueReward:
    """The task's gold reward, called like a RewardModel; it reads complete responses."""
    gold: Callable
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, prompts, responses):
        scores = torch.tensor([self.gold(*row, True) for row in zip(prompts, responses)])
        return (scores - self.mean) / self.std


@dataclass
class NoisyReward:
    """A reward plus noise of deviation 1: one draw for all responses to a prompt, or for each response."""
    reward: Callable
    kind: str                                                        # "prompt" or "response"
    seed: int

    def __call__(self, prompts, responses):
        keys = prompts if self.kind == "prompt" else zip(prompts, responses)
        noise = [random.Random(f"{self.seed} {key}").gauss(0, 1) for key in keys]
        noise = torch.tensor(noise, dtype=torch.float64)              # float64: a shift changes no order
        return self.reward(prompts, responses) + noise


def reward_to_maximise(run):
    """The reward of `scaled_reward`, with the noise of --reward_noise."""
    reward, kind = scaled_reward(run), run.config.reward_noise
    return NoisyReward(reward, kind, run.config.seed) if kind != "none" else reward


def scaled_reward(run):
    """The function (prompts, responses) -> rewards [N] that a method optimises: the proxy, or gold.

    Either has mean 0 and deviation 1 on samples of the initial policy (Huang et al. 2023, "reward
    normalization"), so that one KL coefficient means the same for every reward and method. A reward without
    a scale gets one here, from four samples for each of the first 128 train prompts.
    """
    if run.config.reward == "gold":
        reward = TrueReward(run.task.gold)
    elif "proxy" not in run.rewards:
        raise UserError("there is no reward to maximise: give --reward, or data with pairs to train a reward "
                        "model from")
    else:
        reward = run.rewards["proxy"]
        if hasattr(reward.model.config, "reward_scale"):
            return reward
    config, prompts = run.config, run.task.prompts["train"][:128]
    torch.manual_seed(config.seed)                                   # whatever was trained or loaded before
    samples = common.generate(run.policy, run.tokenizer, prompts, 4, config.temperature,
                              max_new_tokens=config.max_new_tokens)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = reward(prompts, common.decode(run.tokenizer, samples))
    check_finite(scores, 0, prompts, "the reward")
    if scores.max() == scores.min():
        raise UserError(f"the reward is {scores[0]:.3g} for each of the policy's {len(scores)} first samples")
    reward.mean, reward.std = scores.mean().item(), scores.std().item()
    return reward
