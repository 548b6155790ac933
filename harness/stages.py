"""The stages before every method: supervised fine-tuning (SFT) and a Bradley-Terry reward model."""
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
from common import UserError
from harness import progress


@dataclass
class Recipe:
    """How a stage is trained. All fields as in harness.Config."""
    lr: float
    batch_size: int = 64
    epochs: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    token_budget: int = 16384
    seed: int = 0
    flag: str = "--lr"                                             # whose learning rate it is, for messages


def shuffled_batches(n, epochs, batch_size, seed):
    """Index lists of one optimizer step each: `epochs` passes over range(n), each in a new random order.

    Batches run on from one pass into the next; the last one may be smaller.
    """
    rng, order = random.Random(seed), []
    for _ in range(math.ceil(epochs)):
        order += rng.sample(range(n), n)
    order = order[:round(epochs * n)]
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


class Diverged(UserError):
    """A loss, a reward or a policy is no longer finite."""


def check_finite(values, step, prompts, name="loss", flag="--lr"):
    """Diverged, naming step and prompt, where one of the values [n] is not finite."""
    for value, prompt in zip(values.tolist(), prompts):
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value} for the prompt {prompt!r}; lower {flag}, or "
                           "correct the data or the reward")


def fit(model, tokenizer, rows, losses_of, recipe, title, counts=None):
    """Train on the mean loss of rows (prompt, responses).

    losses_of(model, batch, part) -> [n], where part lists which n of the rows the batch holds. The tokens
    that are read are added to counts["tokens_trained"].
    """
    counts = {"tokens_trained": 0} if counts is None else counts
    plan = shuffled_batches(len(rows), recipe.epochs, recipe.batch_size, recipe.seed)
    optimizer, schedule = common.adamw(model, recipe.lr, len(plan), recipe.schedule, recipe.warmup)
    for step, indices in enumerate(progress.steps(plan, title)):
        prompts, responses = zip(*(rows[i] for i in indices))
        for part, batch in common.batches(tokenizer, prompts, responses, recipe.token_budget, model.device):
            losses = losses_of(model, batch, [indices[i] for i in part])
            check_finite(losses, step + 1, [prompts[i] for i in part], f"{title} loss".strip(), recipe.flag)
            (losses.sum() / len(indices)).backward()
            counts["tokens_trained"] += int(batch.attention_mask.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def train_sft(model, tokenizer, demonstrations, recipe, counts=None):
    """Maximum likelihood of the responses: summed over tokens, averaged over examples."""
    return fit(model, tokenizer, [(d.prompt, [d.response]) for d in demonstrations],
               lambda model, batch, _: -common.sequence_logps(model, batch), recipe, "SFT", counts)


def reward_model_losses(model, batch):
    """Bradley-Terry: -log sigmoid(r(chosen) - r(rejected)) of each pair [n]; rows alternate."""
    chosen, rejected = common.sequence_scores(model, batch).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected)


def train_reward_model(model, tokenizer, pairs, recipe, counts=None):
    """Fit a sequence-classification model with one label to preference pairs: texts, read as complete."""
    return fit(model, tokenizer, [(p.prompt, [str(p.chosen), str(p.rejected)]) for p in pairs],
               lambda model, batch, _: reward_model_losses(model, batch), recipe, "reward model",
               counts)
