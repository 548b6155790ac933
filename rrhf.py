"""RRHF: Rank Responses to Align Language Models with Human Feedback without tears
Yuan, Yuan, Tan, Wang, Huang and Huang, NeurIPS 2023, https://arxiv.org/abs/2304.05302

Take K responses to a prompt, from any source: the data's own answers, samples of the policy, other models.
A reward r_i ranks them. The policy ranks them too, by its log-prob per token p_i, and learns to agree with
the reward:

    p_i = 1/|y_i| sum_t log pi(y_i,t | x, y_i,<t)                                                     (Eq. 1)
    L_rank = sum over all pairs with r_i < r_j of max(0, p_i - p_j)                                   (Eq. 2)
    L_ft = -sum_t log pi(y_b,t | x, y_b,<t)  of the best response b = argmax r                (Eq. 3 and 4)
    L = L_rank + L_ft                                                                                 (Eq. 5)

There is no value model and no reference model, and only the order of the rewards counts.

    python rrhf.py                 # 19 s of one core (at first two minutes more): gold 0.16 to 0.65, KL 1.4
    python rrhf.py --reproduce     # terms of the loss, sources of candidates
    python rrhf.py --model HuggingFaceTB/SmolLM2-135M-Instruct --sources P --data ranked.jsonl

What to look at: `loss/rank` is small beside `loss/sft`. In L_ft each token of the best response has weight 1,
in L_rank at most (K-1)/|y|, so the ranking loss works mostly on the other candidates. `eval/to_best` is the
mean reward of the policy's samples minus that of the best candidates of the training prompts. The paper finds
it near 0: the policy is a best-of-n learner (Eq. 7 of arXiv version 2). With --sft_weight 0 --epochs 9 the
ranking loss is alone, and destroys the language model: fluency 0.96 to 0.54, gold 0.16 to -0.14 (seed 0).

Compared with dpo.py: any number of responses, a log-prob per token in place of a log-ratio, and imitation of
the best. With --rank_weight 0 --sources D only imitation of own samples is left: one round of raft.py.

Official code (GanjinZero/RRHF): it overwrites the labels before it counts tokens, so each |y| of L_rank is
the padded width of the batch. L_ft is a mean over that width, too. That is Eq. 5 with --length_penalty 0,
divided by the width: at the SFT policy the gradient of L_rank is then 15 times that of L_ft, and 0.7 times in
Eq. 5. Its weight of L_rank is 100 unless the script says 1, and its loss is right for one prompt a batch
only. This file follows the paper, but evaluates by sampling at temperature 1, where the paper decodes
greedily.
Left out: beam search as a source (the paper prefers diverse candidates) and the online variant.

Elsewhere:
    log-probs in float32, dropout off, EOS counted (none where --max_new_tokens cut): common.py
    AdamW's betas (0.9, 0.95), no weight decay: common.adamw; clip norm 1, 64 prompts: harness/config.py
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    candidates: samples at temperature 1 (in round 1 from the task's pool, where it has enough), then
        given answers; equal texts once, scored (a cut text as if complete): harness/samples.py
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
    LR: ClassVar = {"tiny": 3e-3, "real": 2e-5}      # tiny: tuned on seeds 100 to 102; real: the paper's
    EPOCHS: ClassVar = {"tiny": 3.0, "real": 3.0}    # the paper's
    epochs: Optional[float] = option(
        None, "passes over the prompts, in every round; the default depends on the model")
    sources: Literal["P", "D", "DP"] = option(
        "DP", "candidates: P the data's own answers, D samples of the policy, DP both")
    candidates: int = option(
        4, "samples of the policy for each prompt (paper: 4, beside 2 of the data's)", "(0, inf)")
    systems: Optional[str] = option(
        None, "'A,B': the writers whose answers count in P (default: off_policy,weak; of a file all)")
    rounds: int = option(
        1, "in each round the policy, as it is then, samples new candidates (paper: 1 to 3)", "(0, inf)")
    rank_weight: float = option(
        1.0, "weight of the ranking loss (paper: 1; 10 and 100 were worse)", "[0, inf)")
    sft_weight: float = option(1.0, "weight of the SFT loss on the best candidate (paper: 1)", "[0, inf)")
    length_penalty: float = option(
        1.0, "exponent of the length in Eq. 1 (above 1: favours long responses)", "[0, inf)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "linear", "how the learning rate goes on after the warm-up (paper: linear; official scripts: cosine)")
    warmup: float = option(
        0.03, "share of the steps over which the learning rate rises linearly from 0 (official code: 0.03)")
    eval_pairs: int = option(512, "held-out pairs scored at each evaluation", "[0, inf)")

    def __post_init__(self):
        super().__post_init__()
        if self.systems is None:
            self.systems = "off_policy,weak" if self.data == "reviews" else ""
        self.check(lambda value: self.sources != "D" or value > 1,
                   "be at least 2 with --sources D: one has no rank", "candidates")


def rank_loss(scores, rewards):
    """Ranking loss of each prompt (Eq. 2): a sum over pairs. Pairs with equal rewards add nothing.

    Args: scores, rewards [B, K].  Returns: [B].
    """
    check_shapes(scores, rewards)
    worse = rewards[:, :, None] < rewards[:, None, :]                               # [B, i, j]: r_i < r_j
    gaps = scores[:, :, None] - scores[:, None, :]                                  # [B, i, j]: p_i - p_j
    return torch.where(worse, gaps.relu(), 0).sum((1, 2))                                             # Eq. 2


def loss_terms(logps, lengths, rewards, length_penalty=1.0):
    """L_rank [B] and L_ft [B] of each prompt. Arguments as in rrhf_loss."""
    check_shapes(logps, lengths, rewards)
    scores = logps / lengths ** length_penalty                                                        # Eq. 1
    best = rewards.argmax(1, keepdim=True)                                                            # Eq. 3
    return rank_loss(scores, rewards), -logps.gather(1, best).squeeze(1)                       # Eq. 2, Eq. 4


def rrhf_loss(logps, lengths, rewards, length_penalty=1.0, rank_weight=1.0, sft_weight=1.0):
    """RRHF loss of each prompt (Eq. 5): rank_weight L_rank + sft_weight L_ft.

    Args:
        logps: [B, K], log pi(y|x) in nats, summed over the response, EOS included.
        lengths: [B, K] in tokens, EOS included.
        rewards: [B, K]; the first of the largest is the best response.
    Returns: [B].
    """
    rank_losses, sft_losses = loss_terms(logps, lengths, rewards, length_penalty)
    return rank_weight * rank_losses + sft_weight * sft_losses                                        # Eq. 5


def check_shapes(*tensors):
    if tensors[0].dim() != 2 or any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"all must be [B, K], not {', '.join(str(list(t.shape)) for t in tensors)}")


def best_of_n_learner(run, reward):
    """Proxy reward of the training candidates and of the policy's own samples.

    Returns: means over the training prompts of all candidates and of the best one; and the mean of the last
        evaluation's samples (test prompts) minus the latter. {} where the proxy did not score the candidates.
    """
    if reward is None or reward is not run.rewards.get("proxy"):
        return {}
    scores = [row.scores for row in run.state["rankings"]]
    mean = sum(sum(row) / len(row) for row in scores) / len(scores)
    best = sum(max(row) for row in scores) / len(scores)
    proxy = run.samples["after"]["proxy"]
    return {"eval/candidates_mean": mean, "eval/candidates_best": best,
            "eval/to_best": sum(proxy) / len(proxy) - best}


def train(run):
    """Each round collects candidates, from the policy as it is then, and minimises Eq. 5 on them."""
    config, policy = run.config, run.policy
    reward = harness.candidate_reward(run, config.sources)      # None: the data's own scores rank its answers
    given = harness.given_answers(run.task, config.sources, config.systems)         # [] with --sources D
    samples = config.candidates if "D" in config.sources else 0
    held_out = run.task.pairs.get("test", [])[:config.eval_pairs]

    # A step is one batch of config.batch_size prompts with all their candidates. A round is config.epochs
    # passes over the prompts, each in another random order; all rounds have the same orders. The last batch
    # of a round may be smaller.
    n = len(given) or len(run.task.prompts["train"])
    one_round = harness.shuffled_batches(n, config.epochs, config.batch_size, config.seed)
    plan = [(i == 0, indices) for _ in range(config.rounds) for i, indices in enumerate(one_round)]

    # One schedule for all rounds. Warm-up starts at a learning rate of 0: the first step changes nothing, if
    # --warmup gives one step at least.
    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    run.evaluate()                                                                          # before training
    run.amend(**harness.score_metrics(run, held_out))
    for step, (new_round, indices) in run.steps(plan, policy, optimizer, schedule):
        if new_round:                            # here new candidates are sampled, from the current policy
            run.state["rankings"] = harness.candidates(run, reward, given, samples)
        rankings = [run.state["rankings"][i] for i in indices]
        means = harness.Means()
        for rows, batch in run.microbatches(rankings):      # rows: n of the step's prompts; batch [n*K, T]
            # The K responses of a prompt lie together, and all prompts of a microbatch have the same K.
            logps = common.sequence_logps(policy, batch).view(len(rows), -1)                         # [n, K]
            lengths = batch.lengths.view_as(logps)
            rewards = torch.tensor([rankings[i].scores for i in rows], device=logps.device)   # no gradient
            losses = rrhf_loss(logps, lengths, rewards, config.length_penalty, config.rank_weight,
                               config.sft_weight)
            harness.check_finite(losses, step + 1, [rankings[i].prompt for i in rows])
            (losses.sum() / len(rankings)).backward()         # the mean over the step's prompts, in parts
            rank_losses, sft_losses = loss_terms(logps.detach(), lengths, rewards, config.length_penalty)
            means.add({"loss": losses, "loss/rank": rank_losses, "loss/sft": sft_losses,
                       "rewards/best": rewards.amax(1)})
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, means.result() | {"grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            run.amend(**harness.score_metrics(run, held_out), **best_of_n_learner(run, reward))


if __name__ == "__main__":
    harness.main(Config, train)
