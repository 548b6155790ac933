"""Preference Ranking Optimization for Human Alignment (PRO)
Song, Yu, Li, Yu, Huang, Li and Wang, AAAI 2024, https://arxiv.org/abs/2306.17492

A pair says which of two responses is better; a ranking y_1 > y_2 > ... > y_n says more. In PRO each response
competes with all that rank below it, by the policy's log-prob per token:

    s(y) = 1/|y| log pi(y|x)                                                                          (Eq. 6)
    L_rank = -sum_{k<n} log [ exp(s(y_k) / T_kk) / sum_{i>=k} exp(s(y_i) / T_ki) ]    (Eq. 4, with Eq. 7 to 9)

The dynamic temperature T depends on how far the rewards are apart: 1/T_ki = r(y_k) - r(y_i) for i > k, and
1/T_kk is the largest of these. Without it every T is 1. That is the Plackett-Luce likelihood of the ranking,
and for n = 2 a logistic loss. There is no reference model. The best response is also imitated:

    L = L_rank + 0.05 (n-1)^2 (-log pi(y_1|x))                                                        (Eq. 5)

    python pro.py                  # 16 s of one core (at first two minutes more): gold 0.16 to 0.72, KL 1.2
    python pro.py --reproduce      # ranking length, ablations, RRHF and DPO
    python pro.py --model HuggingFaceTB/SmolLM2-135M-Instruct --sources P --data ranked.jsonl

What to look at: the weight of the SFT term grows from 0.05 at n = 2 to 0.8 at n = 5, so a longer ranking is
also more imitation. At the SFT policy the SFT term's gradient is smaller than that of L_rank for n = 2, and
two to three times as large for n = 5. Compare --sft_weight 0, --dynamic_temperature False, and both together.

Compared with rrhf.py: the same score and the same kind of candidates. PRO has a softmax over the list, RRHF a
hinge for each pair. In PRO the size of the reward gaps counts, not only their signs.

Official code (AlibabaResearch/DAMO-ConvAI, PRO): no log-sum-exp, but 1e-10 inside the logarithm. Where every
product of score and gap is far below log 1e-10 = -23, the losers get no gradient. It appends no EOS, and
scores one padding token after all but the longest response. Its default SFT weight is 2, that of its scripts
0.05. There as here the gaps multiply scores that are negative: a small gap moves a loser's logit up, close to
0, so near-ties weigh most in the softmax.
The paper ranks answers of different models (here: --sources P) and decodes greedily; here the default is
samples of one policy, and evaluation samples at temperature 1.
Left out: bootstrapping (a fresh sample joins the ranking), which lost more than it gained in the paper.

Elsewhere:
    log-probs in float32, dropout off, EOS counted (none after a cut response): common.py
    AdamW's betas (0.9, 0.95), no decay (official code: PyTorch's default, 0.01): common.adamw
    constant lr, norm 1, 64 prompts: harness/config.py
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    candidates: the task's pool of SFT samples (temperature 1) where it has enough, else new samples; equal
        texts once, so K may be smaller: harness/samples.py
    the tiny model, its film reviews and gold, their true reward, which no method sees: tasks/reviews.py
    run.steps: seeds, checkpoints; run.evaluate: samples, KL to the initial policy (tiny: SFT): harness/run.py
"""
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import torch

import common
import harness
from harness import option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 3e-3, "real": 5e-6}      # tiny: tuned on seeds 100 to 102; real: the paper's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 2.0}    # the paper's
    sources: Literal["P", "D", "DP"] = option(
        "D", "candidates: P the data's own answers, D samples of the policy, DP both")
    candidates: int = option(
        5, "samples of the policy for each prompt: with --sources D the ranking length (paper: 2 to 5)",
        "(0, inf)")
    systems: Optional[str] = option(
        None, "'A,B': the writers whose answers count in P (default: off_policy,weak; of a file all)")
    sft_weight: float = option(
        0.05, "weight of the SFT loss, times (ranking length - 1)^2 (paper: 0.05)", "[0, inf)")
    dynamic_temperature: bool = option(True, "scale each score by its reward gap (Eq. 7 to 9)")
    terms: int = option(0, "how many of the ranking's terms count, from the top (0: all)", "[0, inf)")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")
    eval_pairs: int = option(512, "held-out pairs scored at each evaluation", "[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if self.systems is None:
            self.systems = "off_policy,weak" if self.data == "reviews" else ""
        self.check(lambda value: self.sources != "D" or value > 1,
                   "be at least 2 with --sources D: one has no rank", "candidates")


def pro_loss(scores, rewards, temperature=True, terms=None):
    """Ranking loss of each prompt: a sum over the places k of -log softmax of y_k among y_k and all below it.

    Args:
        scores: [B, K], log-prob per token, best response first. rewards: [B, K] in the same order.
        temperature: scale by reward gaps (Eq. 7 to 9); else plain Plackett-Luce (Eq. 4).
        terms: how many places count, from the first; None: all.
    Returns: [B]. A response with the same reward as y_k has gap 0 there: it adds 1 to the denominator, and no
        gradient.
    """
    if scores.dim() != 2 or scores.shape != rewards.shape:
        raise ValueError(f"scores and rewards must be [B, K], not {list(scores.shape)} and "
                         f"{list(rewards.shape)}")
    losses = scores.new_zeros(len(scores))
    for k in list(range(scores.shape[1] - 1))[:terms]:
        logits = scores[:, k:]                                                # [B, K-k]: y_k and all below it
        if temperature:
            gaps = rewards[:, k:k + 1] - rewards[:, k + 1:]                                   # 1/T_ki, Eq. 8
            logits = logits * torch.cat([gaps.amax(1, keepdim=True), gaps], 1)                # 1/T_kk, Eq. 9
        losses = losses + logits.logsumexp(1) - logits[:, 0]                                 # Eq. 7, or Eq. 4
    return losses


def sft_coefficient(k, weight=0.05):
    """Weight of the SFT loss beside a ranking of length k (Eq. 5)."""
    return weight * (k - 1) ** 2


def train(run):
    """Collect scored candidates once, before the first step, and minimise Eq. 5 on them."""
    config, policy = run.config, run.policy
    given = harness.given_answers(run.task, config.sources, config.systems)         # [] with --sources D
    reward = harness.candidate_reward(run, config.sources)      # None: the data's own scores rank its answers
    samples = config.candidates if "D" in config.sources else 0
    rankings = harness.candidates(run, reward, given, samples)     # here only, of the SFT policy
    held_out = run.task.pairs.get("test", [])[:config.eval_pairs]

    # A step is one batch of config.batch_size prompts with all their candidates. Training makes config.epochs
    # passes over the prompts, each in a new random order. Only the very last batch may be smaller.
    steps = harness.shuffled_batches(len(rankings), config.epochs, config.batch_size, config.seed)
    plan = [[rankings[i] for i in indices] for indices in steps]

    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    run.evaluate()                                                                          # before training
    run.amend(**harness.score_metrics(run, held_out))
    for step, rankings in run.steps(plan, policy, optimizer, schedule):
        means = harness.Means()
        for rows, batch in run.microbatches(rankings):      # rows: n of the step's prompts; batch [n*K, T]
            rewards = torch.tensor([rankings[i].scores for i in rows], device=policy.device)   # no gradient
            rewards, order = rewards.sort(dim=1, descending=True, stable=True)           # [n, K], best first
            # log pi(y|x) is a sum over response tokens. The K responses of a prompt lie together, and all
            # prompts of a microbatch have the same K.
            logps = common.sequence_logps(policy, batch).view(len(rows), -1).gather(1, order)        # [n, K]
            scores = logps / batch.lengths.view(len(rows), -1).gather(1, order)                       # Eq. 6
            rank_losses = pro_loss(scores, rewards, config.dynamic_temperature, config.terms or None)  # [n]
            sft_losses = -logps[:, 0]                       # a sum over tokens, though the scores are means
            coefficient = sft_coefficient(logps.shape[1], config.sft_weight)
            losses = rank_losses + coefficient * sft_losses                                     # [n],  Eq. 5
            harness.check_finite(losses, step + 1, [rankings[i].prompt for i in rows])
            (losses.sum() / len(rankings)).backward()         # the mean over the step's prompts, in parts
            means.add({"loss": losses, "loss/rank": rank_losses, "loss/sft": sft_losses,
                       "scores/best": scores[:, 0], "scores/worst": scores[:, -1]})
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, means.result() | {"grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            run.amend(**harness.score_metrics(run, held_out))


if __name__ == "__main__":
    harness.main(Config, train)
