"""ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models
Li, Xu, Zhang, Lin, Yu, Sun and Luo, ICML 2024, https://arxiv.org/abs/2310.10505

PPO needs a value model, GAE, a clip and several epochs on every batch. In language generation sampling is
fast, the effect of a token is certain, and the reward comes once, at the end. So REINFORCE is enough, if its
variance is reduced. ReMax subtracts the reward of the policy's own greedy response. That costs one more
response a prompt, and no second network:

    g = 1/N sum_i sum_t grad log pi(y_t | x, y_<t) [ r(x, y) - r(x, greedy response to x) ]            (1)

The baseline does not depend on the sampled tokens, so g is unbiased. The KL penalty is a reward of each
token. A token is credited with its own and with all that follow (KL to go):

    A_t = r(x, y) - r(x, greedy response to x) - kl_coef sum_{s>=t} log(pi(y_s)/pi_ref(y_s))           (2)

(These numbers are ours: the paper's own could not be checked.)

    python remax.py                # 22 s of one core (at first two minutes more): gold 0.16 to 0.81, KL 6.1
    python remax.py --reproduce    # the gradient's variance, and against PPO
    python remax.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

What to look at: `objective/greedy_scores` may start below `objective/scores`. Soon it is above, and later the
two come closer.
Compare --variance_prompts 256 with and without --reward_noise prompt. This noise is equal for all responses
to a prompt: it adds variance to REINFORCE, and none to ReMax.

Compared with ppo.py: the same rollout, reward and KL penalty, but no penalty where a response does not stop,
no value model, one update for each rollout, the sum over a response's tokens where PPO has the mean over all
tokens, and no whitening. The paper compares it with PPO at one update a batch. So does --reproduce; ppo.py's
default makes four passes over each.
Official code (liziniu/ReMax) differs: a token gets its own KL term only (the variable cumulative_kl is
overwritten, not summed), the last token's reward is discounted too, the loss is a mean over tokens, and
samples are drawn with top-p 0.9 but scored without it. This file follows (2); the official gamma 0.99 and
reward clip 5 are options.

Elsewhere:
    log-probs in float32, dropout off, EOS counted, no EOS where a sample was cut off: common.py
    AdamW's betas (0.9, 0.95), eps 1e-8, no weight decay: common.adamw; clipping at norm 1: harness/config.py
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    samples: at --temperature (1), without top-k or top-p; their token ids are kept: harness/samples.py
    the tiny model, its film reviews and gold, their true reward, which no method sees: tasks/reviews.py
    run.steps seeds each step and writes checkpoints; run.evaluate samples the test prompts: harness/run.py
"""
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import torch

import common
import harness
from harness import option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 2e-3, "real": 1e-6}     # tiny: tuned at 4 epochs; real: official code's
    EPOCHS: ClassVar = {"tiny": 10.0, "real": 1.0}    # tiny: takes as many seconds as ppo.py
    batch_size: int = option(
        128, "prompts of each step, each answered twice: a sample and the greedy response")
    epochs: Optional[float] = option(
        None, "passes over the training prompts; the default depends on the model")
    kl_coef: float = option(0.05, "weight of the KL penalty (official code: 0.05)", "[0, inf)")
    gamma: float = option(1.0, "discount of the reward and of the KL to go (official code: 0.99)", "[0, 1]")
    reward_clip: Optional[float] = option(
        None, "cut reward less baseline at +- this (official code: 5)", "(0, inf)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "cosine", "how the learning rate goes on after the warm-up; cosine ends at 0")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")
    variance_prompts: int = option(
        0, "measure the gradient's variance on so many prompts at every evaluation", "[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        self.check(lambda value: value == 0 or value > 1, "be 0 or at least 2", "variance_prompts")
        if self.shard and self.variance_prompts:
            raise harness.UserError("--variance_prompts needs whole gradients: leave out --shard")


@torch.no_grad()
def remax_returns(rewards, baseline_rewards, logps, ref_logps, mask, kl_coef, gamma=1.0):
    """What the log-prob of each sampled token is multiplied with: A_t of (2).

    Args: rewards, baseline_rewards [B], of the sample and of the greedy response; logps, ref_logps, mask
        [B, T], where the mask of a row is one run of ones.
    Returns: [B, T], 0 outside the mask, without gradient. With gamma below 1: gamma^(tokens that follow)
        (reward - baseline) - kl_coef (discounted sum of this and the later log-ratios).
    """
    mask = mask.bool()
    kl = torch.where(mask, logps - ref_logps, 0)
    returns, following = torch.zeros_like(kl), torch.zeros_like(kl[:, 0])
    ends = mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)   # the last token of each row
    for t in reversed(range(mask.shape[1])):
        reward = torch.where(ends[:, t], rewards - baseline_rewards, 0)         # comes with the last token
        following = reward - kl_coef * kl[:, t] + gamma * following                                 # (2)
        returns[:, t] = following * mask[:, t]
    return returns


def remax_loss(logps, returns, mask):
    """Sum over tokens, mean over sequences; its gradient is -g, with A_t of (2). All [B, T] -> scalar."""
    return -torch.where(mask.bool(), returns * logps, 0).sum(1).mean()                                 # (1)


def gradient_variance(gradients, rewards, greedy_rewards):
    """Trace of the covariance of one prompt's estimate of the policy gradient, over M prompts; without KL.

    Args: gradients: iterable over M prompts of [2, P], grad log pi of two samples; rewards [M, 2];
        greedy_rewards [M].
    Returns: {estimator: variance}; a mean over N prompts has 1/N of it. All but "1 sample" use two responses
        a prompt; for ReMax one of them is the greedy response. "+2" and "-2" are added to every reward,
        which changes only estimators without a baseline.
    """
    (a, b), mean, zero = rewards.T, rewards.mean(), torch.zeros_like(greedy_rewards)
    weights = {"REINFORCE, 1 sample": (a, zero), "ReMax": (a - greedy_rewards, zero),
               "REINFORCE": (a / 2, b / 2),
               "REINFORCE +2": (a / 2 + 1, b / 2 + 1), "REINFORCE -2": (a / 2 - 1, b / 2 - 1),
               "batch mean": ((a - mean) / 2, (b - mean) / 2), "leave-one-out": ((a - b) / 2, (b - a) / 2)}
    table = torch.stack([torch.stack(pair) for pair in weights.values()])                     # [E, 2, M]
    total, squares, n = 0.0, 0.0, len(rewards)
    for i, gradient in enumerate(gradients):
        wide = torch.float64 if gradient.device.type != "mps" else torch.float32        # which has no float64
        estimates = table[:, :, i].to(gradient) @ gradient                                    # [E, P]
        total, squares = total + estimates, squares + estimates.to(wide).pow(2).sum(1)
    variances = (squares - total.to(wide).pow(2).sum(1) / n) / (n - 1)
    return dict(zip(weights, variances.tolist()))


def measured_variance(run, reward):
    """gradient_variance of the current policy on train prompts, and the entropy of a response in nats."""
    prompts = run.task.prompts["train"][:run.config.variance_prompts]
    if not prompts:
        return {}
    config, policy, entropy = run.config, run.policy, []
    weights = [weight for weight in policy.parameters() if weight.requires_grad]             # with LoRA: few

    def sampled(n, **how):
        batch = common.generate(policy, run.tokenizer, prompts, n, config.temperature,
                                max_new_tokens=config.max_new_tokens, **how)
        return batch, reward([p for p in prompts for _ in range(n)], common.decode(run.tokenizer, batch))

    def gradients():
        for row in range(0, len(batch), 2):                                      # two samples of one prompt
            pair = batch[[row, row + 1]].to(policy.device)
            logps = common.sequence_logps(policy, pair, config.temperature)                        # [2]
            entropy.append(-logps.mean().item())
            both = [torch.autograd.grad(logp, weights, retain_graph=True) for logp in logps]
            yield torch.stack([torch.cat([g.flatten() for g in grads]) for grads in both])         # [2, P]

    with harness.ranks.fork_rng():
        torch.manual_seed(config.seed)
        (batch, rewards), (_, greedy_rewards) = sampled(2), sampled(1, greedy=True)
    variances = gradient_variance(gradients(), rewards.view(-1, 2), greedy_rewards)
    ratios = {f"ReMax / {name}": variances["ReMax"] / variance if variance else math.inf
              for name, variance in variances.items() if name != "ReMax"}
    return {"eval/entropy": sum(entropy) / len(entropy)} | {
        f"eval/variance/{name}": value for name, value in (variances | ratios).items()}


def train(run):
    """One gradient step on each batch of new samples."""
    config, policy, device, prompts = run.config, run.policy, run.policy.device, run.task.prompts["train"]

    # A step is one batch of config.batch_size prompts, with one sample each. Training makes config.epochs
    # passes over the train prompts, each in a new random order. Only the very last batch may be smaller.
    steps = harness.shuffled_batches(len(prompts), config.epochs, config.batch_size, config.seed)
    plan = [[prompts[i] for i in indices] for indices in steps]

    reward, reference = harness.reward_to_maximise(run), run.load_reference()        # a frozen initial policy
    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    run.evaluate()                                                                          # before training
    run.amend(**measured_variance(run, reward))
    for step, prompts in run.steps(plan, policy, optimizer, schedule):
        batch, responses, ended = harness.rollout(run, prompts)           # one sample each, current policy
        _, greedy_responses, _ = harness.rollout(run, prompts, greedy=True)             # by the same weights
        # The reward reads each text as complete. A sample that was cut off has no penalty.
        scores, greedy_scores = (harness.score(run, reward, prompts, texts).float()                  # [B]
                                 for texts in (responses, greedy_responses))
        baselines = greedy_scores
        if config.reward_clip is not None:                               # the clip is of the difference
            baselines = scores - (scores - greedy_scores).clamp(-config.reward_clip, config.reward_clip)

        loss, kl = 0.0, 0.0
        for rows in run.parts(batch):                                    # microbatches of b responses
            part = batch[rows].to(device)
            mask = part.response_mask[:, 1:]                             # [b, T]: response tokens, with EOS
            logps = common.token_logps(policy, part, config.temperature)                  # [b, T], as sampled
            with torch.no_grad():
                ref_logps = common.token_logps(reference, part, config.temperature)
            returns = remax_returns(scores[rows].to(device), baselines[rows].to(device), logps, ref_logps,
                                    mask, config.kl_coef, config.gamma)                  # no gradient
            share = len(rows) / len(batch) * run.weight  # a step's mean, in parts; weight: 1 without --shard
            part_loss = share * remax_loss(logps, returns, mask)
            part_loss.backward()
            loss = loss + part_loss.detach()
            kl += share * ((logps - ref_logps) * mask).sum(1).mean().item()             # nats a response
            for count in ("tokens_scored_reference", "tokens_trained"):
                run.counts[count] += int(part.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, {"objective/scores": scores.mean(), "objective/kl": run.total(kl),
                       "objective/greedy_scores": greedy_scores.mean(), "eos_rate": ended.float().mean(),
                       "loss": run.total(loss), "grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            run.amend(**measured_variance(run, reward))


if __name__ == "__main__":
    harness.main(Config, train)
