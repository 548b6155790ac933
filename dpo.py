"""Direct Preference Optimization: Your Language Model is Secretly a Reward Model
Rafailov, Sharma, Mitchell, Ermon, Manning and Finn, 2023, https://arxiv.org/abs/2305.18290

RLHF fits a reward model to preferences, then maximises E[r] - beta KL(pi || pi_ref) with RL (Eq. 3). That
optimum is known, pi_r(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x) (Eq. 4), so every policy is optimal for
the reward

    r(x, y) = beta log(pi(y|x) / pi_ref(y|x)) + beta log Z(x)                                          (Eq. 5)

Z(x) cancels in a comparison of two answers to one prompt. Fitting this reward to preferences, by the same
logistic regression as any reward model, therefore trains the policy itself, with no sampling and no RL:

    L = -log sigmoid(beta [log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)])                 (Eq. 7)

    python dpo.py                  # 26 s of one core (at first two minutes more): gold 0.16 to 0.68, KL 1.7
    python dpo.py --reproduce      # beta, other losses and PPO, the data curriculum: ten seeds
    python dpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data pairs.jsonl

What to look at: the loss starts at log 2 = 0.693, because the policy starts as the reference. `logps/chosen`
falls while `rewards/margins` rises. That is no bug: Eq. 7 sees only chosen minus rejected.

The same loss on pairs that nobody labelled: Contrastive Post-training Large Language Models on Data
Curriculum (Xu et al., 2023, https://arxiv.org/abs/2310.02263) takes the chosen answer from a stronger writer
and the rejected one from a weaker, and moves from easy pairs (far apart) to hard ones: --pairs "strong>weak"
--hard_pairs "strong>medium".

Official code (eric-mitchell/direct-preference-optimization): the same sums over response tokens, EOS
included, no length normalisation; RMSprop where this file has AdamW. There the reference runs beside the
policy at every step; here its log-probs are taken once, before the first step. Evaluations load it again, for
the KL, and keep a reward model, which is first trained from the pairs of --data (--reward none: none). Left
out: IPO and the reference-free loss. The curriculum's schedule could not be checked against its paper.

Elsewhere:
    log-probs in float32, dropout off, left-padded prompts, right-padded responses: common.py
    EOS ends every answer of a pair, except one that is cut to fit --max_length: common.batches
    AdamW's betas (0.9, 0.95), no weight decay: common.adamw; 64 pairs a step, lr constant after a linear
        warm-up from 0 over the first tenth (the first step changes nothing): harness/config.py
    the default pairs: complete SFT samples at temperature 1, labelled by annotators who err: tasks/build.py
    the tiny model, its film reviews and gold, their true reward, which no method sees: tasks/reviews.py
    run.steps: seeds, checkpoints; run.evaluate: samples, KL to the initial policy (tiny: SFT): harness/run.py
"""
import random
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

import common
import harness
from harness import Pair, UserError, option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 5e-4, "real": 1e-6}  # tiny: tuned, seeds 100 to 102; real: paper's (code: 5e-7)
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 1.0}   # tiny: tuned likewise; real: the official code's
    beta: float = option(
        0.1, "KL constraint: larger stays closer to the reference (paper: 0.1; TL;DR 0.5)", "(0, inf)")
    label_smoothing: float = option(0.0, "share of labels taken to be wrong (conservative DPO)", "[0, 0.5)")
    loss: Literal["dpo", "sft", "unlikelihood"] = option(
        "dpo", "'dpo', or a baseline of the paper: 'sft' on the chosen (Preferred-FT), 'unlikelihood'")
    alpha: float = option(
        0.1, "weight of the rejected answer in the unlikelihood loss (paper: 0 to 1)", "[0, inf)")
    pairs: str = option("", "'A>B': answers of system A against those of B; default: the data's own pairs")
    hard_pairs: str = option("", "'A>C': a second kind of pairs, closer together, for a data curriculum")
    curriculum: Literal["easy_to_hard", "hard_to_easy", "mixed"] = option(
        "easy_to_hard", "order of --pairs and --hard_pairs")
    eval_pairs: int = option(512, "held-out pairs scored at each evaluation", "[0, inf)")
    max_grad_norm: float = option(10.0, "gradients are clipped to this norm (official code: 10)")

    def __post_init__(self):
        super().__post_init__()
        if self.hard_pairs and not self.pairs:
            raise UserError("--hard_pairs needs --pairs: the easy kind to start from")

    def check_task(self, task):
        training_plan(self, task)                          # its mistakes are said before a model is trained


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
             label_smoothing=0.0):
    """DPO loss of each pair (Eq. 7).

    Args:
        the four log-probs: [B], log pi(y|x) in nats, summed over the response, EOS included.
        beta: above 0. label_smoothing: in [0, 0.5); 0 is Eq. 7.
    Returns: losses [B]; chosen_rewards [B] and rejected_rewards [B], the implicit rewards (Eq. 5 less beta
        log Z), detached.
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)                                   # Eq. 5
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    margins = chosen_rewards - rejected_rewards
    losses = (-(1 - label_smoothing) * F.logsigmoid(margins)                                  # Eq. 7
              - label_smoothing * F.logsigmoid(-margins))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def curriculum(progress):
    """Probability of a hard pair: rises linearly from 0 at progress 0 to 1 at progress 1."""
    return min(max(progress, 0.0), 1.0)


def pairs_between(rankings, systems, flag="--pairs"):
    """The pairs of "A>B", one a ranking: A's answer chosen, B's rejected; None where one is missing."""
    better, _, worse = systems.partition(">")
    known = sorted({name for ranking in rankings for name in ranking.systems})
    if better not in known or worse not in known:
        raise UserError(f'{flag} {systems!r} must be "A>B" with A and B of: '
                        f'{", ".join(known) or "(the data names no systems)"}')
    rows = [(r.prompt, dict(zip(r.systems, r.responses))) for r in rankings]
    pairs = [Pair(prompt, texts.get(better, ""), texts.get(worse, "")) for prompt, texts in rows]
    return [pair if pair.chosen and pair.rejected and pair.chosen != pair.rejected else None
            for pair in pairs]


def training_plan(config, task):
    """The pairs of every step, lists of Pair: config.epochs passes, each in a new random order.

    Batches run on from one pass into the next; only the very last may be smaller.
    A curriculum draws each pair as easy or hard, by the progress of training.
    """
    if not config.pairs:
        easy = hard = task.pairs.get("train", [])
    else:
        rankings = task.rankings.get("train", [])
        easy = pairs_between(rankings, config.pairs)
        hard = pairs_between(rankings, config.hard_pairs, "--hard_pairs") if config.hard_pairs else easy
        both = [row for row in zip(easy, hard) if None not in row]
        easy, hard = [row[0] for row in both], [row[1] for row in both]
    if not easy:
        raise UserError("the data has no preference pairs to train on: DPO needs chosen and rejected answers")
    steps = harness.shuffled_batches(len(easy), config.epochs, config.batch_size, config.seed)
    rng, plan = random.Random(config.seed), []
    for step, rows in enumerate(steps):
        progress = curriculum(step / max(len(steps) - 1, 1))
        hardness = {"easy_to_hard": progress, "hard_to_easy": 1 - progress, "mixed": 0.5}[config.curriculum]
        plan.append([hard[i] if rng.random() < hardness else easy[i] for i in rows])
    return plan


def held_out_pairs(config, task):
    """Test pairs of the kind that is trained on; the data's own where it has no test rankings."""
    if config.pairs and task.rankings.get("test"):
        rows = [row for row in task.rankings["test"] if {*config.pairs.split(">")} <= {*row.systems}]
        pairs = [pair for pair in pairs_between(rows, config.pairs) if pair] if rows else []
    else:
        pairs = task.pairs.get("test", [])
    return pairs[:config.eval_pairs]


def losses_and_metrics(config, logps, ref_logps):
    """Losses [n] of pairs from log-probs [n, 2] of policy and reference; what to log, [n] per name."""
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps.T, *ref_logps.T, config.beta,
                                                        config.label_smoothing)
    if config.loss == "sft":
        losses = -logps[:, 0]
    elif config.loss == "unlikelihood":
        losses = -logps[:, 0] + config.alpha * logps[:, 1]               # has no lower bound
    margins = chosen_rewards - rejected_rewards
    return losses, {"loss": losses, "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
                    "rewards/margins": margins, "rewards/accuracies": (margins > 0) + 0.5 * (margins == 0),
                    "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}


def train(run):
    """Minimise Eq. 7 on preference pairs."""
    config, policy = run.config, run.policy
    plan, held_out = training_plan(config, run.task), held_out_pairs(config, run.task)

    # Before the first step the policy is the reference, so one pass gives all that is ever needed of it.
    pairs = list(dict.fromkeys(pair for step in plan for pair in step))
    ref = harness.response_logps(run, pairs, counted="tokens_scored_reference")[0]   # [N, 2], torch.no_grad
    ref_logps = dict(zip(pairs, ref))
    run.evaluate()                                                                          # before training
    held_out_ref_logps, _ = harness.response_logps(run, held_out)                           # [N, 2]

    def held_out_metrics():
        if not held_out:
            return {}
        _, metrics = losses_and_metrics(config, harness.response_logps(run, held_out)[0], held_out_ref_logps)
        return harness.held_out(metrics)                        # means, and their standard errors

    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    run.amend(**held_out_metrics())
    for step, pairs in run.steps(plan, policy, optimizer, schedule):
        means = harness.Means()
        for rows, batch in run.microbatches(pairs):              # rows [n] of the step's pairs; batch [2n, T]
            logps = common.sequence_logps(policy, batch).view(-1, 2)                # [n, 2]: chosen, rejected
            ref = torch.stack([ref_logps[pairs[i]] for i in rows])
            losses, metrics = losses_and_metrics(config, logps, ref)
            harness.check_finite(losses, step + 1, [pairs[i].prompt for i in rows])
            (losses.sum() / len(pairs)).backward()                 # the mean over the step's pairs, in parts
            means.add(metrics)
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, means.result() | {"grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            run.amend(**held_out_metrics())


if __name__ == "__main__":
    harness.main(Config, train)
