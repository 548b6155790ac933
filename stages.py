"""The steps of any training, and the two stages that every method starts from: SFT and the reward model.

Methods see all of this as `common.<name>`.
"""
import math
import random

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from lm import batches, sequence_logps, sequence_scores
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
            raise UserError(f"step {step}: {name} is {value} for the prompt {prompt!r}; lower --lr or mend the data")


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
