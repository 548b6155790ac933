"""Proximal Policy Optimization Algorithms
Schulman, Wolski, Dhariwal, Radford and Klimov, 2017, https://arxiv.org/abs/1707.06347
for language models as in Ziegler et al., 2019 (https://arxiv.org/abs/1909.08593) and Stiennon et al., 2020
(https://arxiv.org/abs/2009.01325), with the "N Implementation Details of RLHF with PPO" of Huang et al., 2023

RLHF maximises E[r(x, y)] - kl_coef KL(pi || pi_ref) over the policy's own samples. Each token is an action.
Its reward is its part of the KL penalty; the last token also gets the score of the whole response:

    r_t = -kl_coef (log pi(y_t) - log pi_ref(y_t)) + [t is last] r(x, y)

A value model predicts the rewards that are still to come. The advantage A_t says how much better a token did
than predicted (GAE, Eq. 11 and 12). One rollout serves several updates. A clip takes away what would be won
by moving the policy further:

    L = -min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t),  ratio_t = pi(y_t) / pi_old(y_t)     (-L^CLIP)

    python ppo.py                  # 27 s of one core (at first two minutes more): gold 0.16 to 0.75, KL 7.4
    python ppo.py --reproduce      # the KL penalty and over-optimisation
    python ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

What to look at: `objective/scores` rises, and `objective/kl` with it. With --kl_coef 0 --lr 3e-3 --epochs 12
the proxy (the reward model's score) keeps rising, while gold (the true reward) and grammar collapse. That is
reward hacking.

Details that decide whether it works; [n] marks where they happen (3 in common.py; 2, 4, 6, 9 there, too):
 [1] reward and value model read prompt and response    [9] the value model's head starts at 0
 [2] masks come from lengths, not from a padding token [10] a penalty for a response that does not stop
 [3] position ids skip the padding                     [11] the KL penalty is a reward of each token
 [4] dropout is off; sampling stops at EOS             [12] advantages are whitened; rewards too, if asked
 [5] the learning rate falls linearly to 0             [13] discount 1
 [6] the reward has mean 0, deviation 1 at the start   [14] the value loss is clipped
 [7] rollout, minibatch, microbatch                    [15] the KL coefficient can adapt
 [8] the temperature divides the logits in scoring too
Left out: responses of fixed length, TensorFlow's Adam (PyTorch's first steps are larger), a trunk shared by
policy and value, an entropy bonus, the pretraining mix (PPO-ptx). Official code (openai/lm-human-preferences)
whitens rewards by default and knows no EOS. TRL's former PPO puts the score one position after EOS.

Elsewhere:
    log-probs and values in float32, prompts left-padded, EOS counted, none after a cut response: common.py
    AdamW's betas (0.9, 0.95), eps 1e-8, no weight decay: common.adamw; clipping at norm 1: harness/config.py
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    samples: at --temperature (1), without top-k or top-p; their token ids are kept: harness/samples.py
    run.steps seeds each step and writes checkpoints; run.evaluate samples the test prompts: harness/run.py
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar, Literal, Optional

import torch

import common
import harness
from harness import UserError, option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 2e-3, "real": 3e-6}      # tiny: tuned on seeds 100 to 102; real: TRL's
    EPOCHS: ClassVar = {"tiny": 4.0, "real": 1.0}    # tiny: fixed while lr was tuned
    batch_size: int = option(128, "prompts, and so responses, of each rollout")
    minibatch_size: Optional[int] = option(
        None, "responses per optimizer step (default: half of a rollout)", "(0, inf)")
    ppo_epochs: int = option(4, "passes over each rollout (Ziegler et al.: 4)", "(0, inf)")
    kl_coef: float = option(0.05, "weight of the KL penalty (Stiennon et al. and TRL: 0.05)", "[0, inf)")
    kl_target: Optional[float] = option(
        None, "adapt kl_coef towards this KL, in nats (Ziegler et al.: 6)", "(0, inf)")
    kl_horizon: int = option(10000, "episodes over which kl_coef adapts (Ziegler et al.: 10000)", "(0, inf)")
    gamma: float = option(1.0, "discount of GAE", "[0, 1]")
    lam: float = option(0.95, "lambda of GAE", "[0, 1]")
    clip: float = option(0.2, "epsilon of L^CLIP: a ratio further from 1 wins nothing more", "(0, inf)")
    value_clip: float = option(0.2, "how far a value may move from its value at the rollout", "(0, inf)")
    vf_coef: float = option(0.1, "weight of the value loss", "[0, inf)")
    missing_eos_penalty: float = option(1.0, "taken from the score if the response did not stop", "[0, inf)")
    whiten_rewards: bool = option(False, "scale token rewards to deviation 1 (Ziegler et al.: yes)")
    value_model: str = option("", "what the value model starts from (directory, hub id; default: the policy)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "linear", "how the learning rate goes on after the warm-up")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")

    def __post_init__(self):
        super().__post_init__()
        if self.minibatch_size is None:
            self.minibatch_size = self.batch_size if self.batch_size % 2 else self.batch_size // 2
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("--kl_target multiplies --kl_coef: it cannot start from --kl_coef 0")
        if self.batch_size % self.minibatch_size:
            raise UserError(f"--batch_size {self.batch_size} is not a multiple of --minibatch_size "
                            f"{self.minibatch_size}")


# Tensors [B, T]: an entry per predicted token. mask is 1 on response tokens, EOS included; only these matter.

def masked_mean(x, mask):
    """Mean of x [B, T] over all tokens of the mask, a scalar: long responses weigh more. 0 if none."""
    return torch.where(mask.bool(), x, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """x [B, T] with deviation 1 over the mask, and mean 0 if shift_mean; biased variance plus 1e-8."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def kl_penalised_rewards(scores, logps, ref_logps, mask, kl_coef):
    """The rewards r_t [B, T] from scores [B] and logps, ref_logps, mask [B, T]; 0 outside the mask."""
    rewards = torch.where(mask.bool(), -kl_coef * (logps - ref_logps), 0)
    rows = mask.any(1).nonzero().squeeze(1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    rewards[rows, last[rows]] += scores[rows]                       # the last response token of each row
    return rewards


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}.

    Args: rewards, values, mask [B, T]; a row's mask is one run of ones, and what follows it has the value 0.
    Returns: advantages (not whitened) and returns = advantages + values, both [B, T], 0 outside the mask.
    """
    rewards, values = torch.where(mask.bool(), rewards, 0), torch.where(mask.bool(), values, 0)
    advantages, next_value, next_advantage = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                                     # Eq. 12
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]                          # Eq. 11
        next_value, advantages[:, t] = values[:, t], next_advantage
    return advantages, advantages + values


def policy_loss(new_logps, old_logps, advantages, mask, clip):
    """-L^CLIP, and the share of tokens where the clip holds: two scalars, means over the mask's tokens."""
    ratio = torch.where(mask.bool(), new_logps - old_logps, 0).exp()
    losses = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    clip_fraction = masked_mean((clipped > losses).to(losses.dtype), mask)
    return masked_mean(torch.maximum(losses, clipped), mask), clip_fraction                         # -L^CLIP


def value_loss(values, old_values, returns, mask, clip):
    """Half the mean over the mask's tokens of the larger of two squared errors: value's, clipped value's."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)                                   # [14]
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def adapted_kl_coef(kl_coef, kl, target, episodes, horizon):
    """The next KL coefficient (Ziegler et al.); kl and target in nats, the relative error is cut at 0.2."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def collect(run, prompts, reward, reference, value_model):
    """Sample a response to each prompt, score it, and work out advantages and returns of its tokens.

    Returns, all without gradient and before any update: batch, scores [B], ended [B]; mask, logps, ref_logps,
        values, advantages and returns [B, T].
    """
    config, policy, device = run.config, run.policy, run.policy.device

    batch, responses, ended = harness.rollout(run, prompts)                                    # [4] until EOS
    mask = batch.response_mask[:, 1:].to(device)                                               # [2]
    scores = harness.score(run, reward, prompts, responses).float()         # [1] [6] cut texts too
    for name in ("tokens_scored_reference", "tokens_scored_value"):         # each reads the batch once, below
        run.counts[name] += int(batch.attention_mask.sum())

    def no_grad(function):                                           # torch.no_grad, one microbatch at a time
        return common.in_parts(function, batch, config.token_budget, device)

    logps = no_grad(lambda part: common.token_logps(policy, part, config.temperature))         # [8]
    ref_logps = no_grad(lambda part: common.token_logps(reference, part, config.temperature))
    values = no_grad(lambda part: common.token_values(value_model, part))                      # [1]

    penalised = (scores - config.missing_eos_penalty * ~ended).to(device)                      # [10]
    rewards = kl_penalised_rewards(penalised, logps, ref_logps, mask, run.state["kl_coef"])    # [11]
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)                               # [12]
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)                 # [13]
    advantages = masked_whiten(advantages, mask)                                 # [12] not the returns
    return SimpleNamespace(batch=batch, scores=scores, ended=ended, mask=mask, logps=logps,
                           ref_logps=ref_logps, values=values, advantages=advantages, returns=returns)


def update(run, old, rows, trained, optimizer, schedule, first):
    """One optimizer step on a minibatch: responses `rows` of the rollout `old`. Returns what to log."""
    config, (policy, value_model) = run.config, trained
    seen, tokens = torch.zeros(5, device=policy.device), old.mask[rows].sum()
    for part in (rows[i] for i in run.parts(old.batch[rows])):                              # [7] microbatches
        batch, mask = old.batch[part].to(policy.device), old.mask[part]
        new_logps = common.token_logps(policy, batch, config.temperature)                   # [8] [b, T]
        new_values = common.token_values(value_model, batch)
        pg_loss, clipped = policy_loss(new_logps, old.logps[part], old.advantages[part], mask, config.clip)
        vf_loss = value_loss(new_values, old.values[part], old.returns[part], mask, config.value_clip)
        share = mask.sum() / tokens * run.weight   # a minibatch's mean, in parts; weight: 1 without --shard
        ((pg_loss + config.vf_coef * vf_loss) * share).backward()

        log_ratio = new_logps - old.logps[part]
        if first:                                  # no update yet: the policy is still the one that sampled
            gap, half = log_ratio.detach().abs(), policy.compute_dtype == torch.bfloat16
            off = masked_mean(gap, mask) if half else gap.max()        # bfloat16 moves single tokens by 0.3
            assert off < (0.1 if half else 1e-3), "the ratio is not 1 before a rollout's first update"
        metrics = (pg_loss, vf_loss, clipped, 0.5 * masked_mean(log_ratio ** 2, mask),
                   masked_mean(log_ratio.exp(), mask))
        seen = seen + share * torch.stack([value.detach() for value in metrics])
        run.counts["tokens_trained"] += int(batch.attention_mask.sum())
    norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), config.max_grad_norm)      # of both together
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    names = "loss/policy", "loss/value", "policy/clipfrac", "policy/approxkl", "val/ratio"
    return dict(zip(names, run.total(seen))) | {"grad_norm": norm}


def train(run):
    """Each step: one rollout, then ppo_epochs passes over it in minibatches."""
    config, policy, prompts = run.config, run.policy, run.task.prompts["train"]

    # A step is a rollout of batch_size prompts (the last may be smaller). Each epoch has a new random order.
    steps = harness.shuffled_batches(len(prompts), config.epochs, config.batch_size, config.seed)
    plan = [[prompts[i] for i in indices] for indices in steps]

    value_model = run.load_value_model(config.value_model)                                   # [9]
    reward, reference = harness.reward_to_maximise(run), run.load_reference()      # a frozen initial policy
    trained = torch.nn.ModuleList([policy, value_model])
    run.state = {"kl_coef": config.kl_coef}                                          # --resume restores it
    updates = config.ppo_epochs * sum(math.ceil(len(rows) / config.minibatch_size) for rows in plan)
    optimizer, schedule = common.adamw(trained, config.lr, updates, config.schedule, config.warmup)   # [5]
    run.evaluate()                                                                   # before training
    for step, prompts in run.steps(plan, trained, optimizer, schedule):
        old, seen = collect(run, prompts, reward, reference, value_model), []
        for _ in range(config.ppo_epochs):
            for rows in torch.randperm(len(prompts)).split(config.minibatch_size):           # [7] minibatches
                seen.append(update(run, old, rows, trained, optimizer, schedule, first=not seen))

        kl = ((old.logps - old.ref_logps) * old.mask).sum(1).mean().item()               # nats a response
        errors, spread = (x - masked_mean(x, old.mask) for x in (old.returns - old.values, old.returns))
        unexplained = masked_mean(errors ** 2, old.mask) / masked_mean(spread ** 2, old.mask).clamp(min=1e-8)
        run.log(step, {
            "objective/scores": old.scores.mean(), "objective/kl": kl,
            "objective/kl_coef": run.state["kl_coef"],
            "objective/entropy": masked_mean(-old.logps, old.mask),      # of a token, from the samples
            "val/explained_variance": 1 - unexplained, "eos_rate": old.ended.float().mean(),
        } | {name: torch.stack([metrics[name] for metrics in seen]).mean() for name in seen[0]})
        if config.kl_target is not None:
            run.state["kl_coef"] = adapted_kl_coef(run.state["kl_coef"], kl, config.kl_target, len(prompts),
                                                   config.kl_horizon)                        # [15]
        if run.evaluation_due(step):                        # every --eval_every steps, and after the last
            run.evaluate()


if __name__ == "__main__":
    harness.main(Config, train)
