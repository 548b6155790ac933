"""Preference Ranking Optimization for Human Alignment (PRO)
Song, Yu, Li, Yu, Huang, Li and Wang, AAAI 2024, https://arxiv.org/abs/2306.17492

A pair says which of two responses is better; a ranking y_1 > y_2 > ... > y_n says more. PRO lets each response in turn contend with
all that rank below it, by the policy's log-prob per token s(y) = 1/|y| log pi(y|x):

    L_rank = -sum_{k<n} log [ exp(s(y_k) / T_kk) / sum_{i>=k} exp(s(y_i) / T_ki) ]                  (Eq. 4, with Eq. 7 to 9)

A dynamic temperature says by how much each loses: 1/T_ki = r(y_k) - r(y_i) for the losers, and 1/T_kk is the largest of these.
Without it every 1/T is 1 (the Plackett-Luce likelihood of the ranking; for n = 2 a logistic loss without a reference). The best
response is also imitated:

    L = L_rank + 0.05 (n-1)^2 (-log pi(y_1|x))                                                              (Eq. 5)

    python pro.py                    # 13 s on two cores (two minutes more at first): gold 0.18 to 0.50, KL 1.2 nats
    python pro.py --reproduce        # ranking length, ablations, against RRHF and DPO: 15 arms, 4 minutes a seed
    python pro.py --model HuggingFaceTB/SmolLM2-135M-Instruct --sources P --data ranked.jsonl

What to look at: with n the weight of the SFT term grows from 0.05 to 0.8, so longer rankings are also more imitation. Compare
`--sft_weight 0`, and `--dynamic_temperature False` with it.

Compared with rrhf.py: the same score and the same candidates; a softmax over the list, where RRHF has a hinge for each pair, and
the size of the reward gaps counts, not only their signs. The gaps are in units of the reward's standard deviation.
Official code (AlibabaResearch/DAMO-ConvAI, PRO) differs: it adds 1e-10 inside the logarithm and takes no log-sum-exp, so it can
overflow; it appends no EOS, and scores one padding token after all but the longest response; its default SFT weight is 2, its
script's 0.05. In either, the gaps multiply scores that are negative: a small gap brings a loser's logit near 0, above the winner's,
so that near-ties weigh most in the softmax.
Left out: bootstrapping (a fresh sample that joins the ranking), which lost more than it gained in the paper.
"""
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import torch

import common
from common import option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 3e-3, "real": 5e-6}      # tiny: tuned on validation seed 100; real: the paper's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 2.0}    # the paper's
    epochs: Optional[float] = option(None, "passes over the rankings; the default depends on the model")
    sources: Literal["P", "D", "DP"] = option("D", "candidates: P the data's own answers, D samples of the policy, DP both")
    candidates: int = option(5, "samples of the policy for each prompt: with --sources D the ranking length (paper: 2 to 5)")
    systems: Optional[str] = option(None, "'A,B': the writers whose answers count in P (default: off_policy,weak; of a file all)")
    sft_weight: float = option(0.05, "weight of the SFT loss, times (ranking length - 1)^2 (paper: 0.05)")
    dynamic_temperature: bool = option(True, "scale each score by its reward gap (Eq. 7 to 9)")
    terms: int = option(0, "how many of the ranking's terms count, from the top (0: all)")
    warmup: float = option(0.0, "share of the steps over which the learning rate rises linearly")
    eval_pairs: int = option(512, "held-out pairs scored at each evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.systems is None:
            self.systems = "off_policy,weak" if self.data == "reviews" else ""
        self.check(lambda value: value >= 0, "not be negative", "sft_weight", "terms")
        self.check(lambda value: value > 0, "be above 0", "candidates", "eval_pairs")
        self.check(lambda value: self.sources != "D" or value > 1, "be at least 2 with --sources D: one has no rank", "candidates")


def pro_loss(scores, rewards, temperature=True, terms=None):
    """Ranking loss of each prompt: the sum over the places k of a ranking of -log softmax of y_k among y_k and all below it.

    Args:
        scores: [B, K], log-prob per token, best response first. rewards: [B, K] in the same order.
        temperature: scale by reward gaps (Eq. 7 to 9); else plain Plackett-Luce (Eq. 4). terms: the first so many places; None: all.
    Returns: [B]. An equal reward has gap 0: it adds 1 to the denominator, and no gradient.
    """
    if scores.dim() != 2 or scores.shape != rewards.shape:
        raise ValueError(f"scores and rewards must be [B, K], not {list(scores.shape)} and {list(rewards.shape)}")
    losses = scores.new_zeros(len(scores))
    for k in list(range(scores.shape[1] - 1))[:terms]:
        rivals = scores[:, k:]                                                              # [B, K-k]: y_k and all below
        if temperature:
            gaps = rewards[:, k:k + 1] - rewards[:, k + 1:]                                 # 1/T_ki              (Eq. 8)
            rivals = rivals * torch.cat([gaps.amax(1, keepdim=True), gaps], 1)              # 1/T_kk comes first  (Eq. 9)
        losses = losses + rivals.logsumexp(1) - rivals[:, 0]                                #                     (Eq. 7)
    return losses


def sft_coefficient(k, weight=0.05):
    """Weight of the SFT loss beside a ranking of length k (Eq. 5)."""
    return weight * (k - 1) ** 2


def train(run, rankings):
    """Minimise Eq. 5 on scored candidates."""
    config = run.config
    held_out = run.task.pairs.get("test", [])[:config.eval_pairs]

    def losses_of(rows, batch):
        rewards = torch.tensor([row.scores for row in rows], device=run.policy.device)
        rewards, order = rewards.sort(dim=1, descending=True, stable=True)                               # best first
        logps = common.sequence_logps(run.policy, batch).view(len(rows), -1).gather(1, order)         # [B, K]
        scores = logps / batch.lengths.view(len(rows), -1).gather(1, order)                           # Eq. 6
        rank_losses = pro_loss(scores, rewards, config.dynamic_temperature, config.terms or None)
        sft_losses = -logps[:, 0]                                  # summed over tokens, though the scores are means
        losses = rank_losses + sft_coefficient(logps.shape[1], config.sft_weight) * sft_losses
        return losses, {"loss/rank": rank_losses, "loss/sft": sft_losses, "scores/best": scores[:, 0],
                        "scores/worst": scores[:, -1]}

    for step, rows in common.steps(run, common.plan_of(rankings, config), lambda: common.score_metrics(run, held_out)):
        common.log(run, step, common.minimise(run, step, rows, losses_of))


def run(config):
    """One training run; returns the metrics after it, and the trace of evaluations."""
    run = common.start(config)
    given = common.given_answers(run.task, config.sources, config.systems)
    reward = common.candidate_reward(run, config.sources)
    train(run, common.candidates(run, reward, given, config.candidates * ("D" in config.sources)))
    return common.finish(run)


def lengths(epochs, name):
    """Arms of ranking length 2 to 5, `epochs(n)` passes each."""
    return {name.format(n=n): {"candidates": n, "epochs": epochs(n)} for n in (2, 3, 4, 5)}


BY_PROMPTS, BY_RESPONSES = lengths(lambda n: 2.0, "{n}, equal prompts"), lengths(lambda n: 10 / n, "{n}, equal responses")
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/nll": "nll of good text", "eval/distinct_2": "distinct-2", "eval/length": "length"}


def rising(names):
    return [(longer, ">", shorter) for shorter, longer in zip(names, names[1:])]


EXPERIMENTS = {
    "length": dict(
        question="Do longer rankings help, for equal prompts and for equal responses seen?",
        arms=BY_PROMPTS | BY_RESPONSES,
        columns=COLUMNS,
        claims=[
            dict(claim="5 responses beat 2, at equal prompts", source="Figure 3", paper="plot only:", metric="eval/gold",
                 holds=[("5, equal prompts", ">", "2, equal prompts")]),
            dict(claim="every response more helps, at equal prompts", source="Figure 3", paper="plot only:", metric="eval/gold",
                 holds=rising(list(BY_PROMPTS))),
            dict(claim="5 responses beat 2, at equal responses", source="ours", paper="-", metric="eval/gold",
                 holds=[("5, equal responses", ">", "2, equal responses")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
    "ablation": dict(
        question="What do the SFT term, the temperature and the lower places do?",
        arms={"SFT": {"epochs": 0}, "PRO": {}, "no SFT": {"sft_weight": 0.0}, "no temperature": {"dynamic_temperature": False},
              "neither": {"sft_weight": 0.0, "dynamic_temperature": False}, "first place only": {"terms": 1}},
        columns=COLUMNS,
        claims=[
            dict(claim="without SFT and temperature the policy collapses: fluency falls by a tenth or more", source="Table 3",
                 paper="BLEU 21.5 to 5.1, reward 55.4 to 46.2", metric="eval/fluency", holds=[("neither", "<", "PRO", -0.1)]),
            dict(claim="and gold falls below SFT's", source="Table 3", paper="-", metric="eval/gold",
                 holds=[("neither", "<", "SFT")]),
            dict(claim="either of the two saves it", source="Table 3", paper="reward 53.3, 55.0", metric="eval/gold",
                 holds=[("no SFT", ">", "neither"), ("no temperature", ">", "neither")]),
            dict(claim="the temperature adds little or nothing (within 0.1)", source="Table 3", paper="+0.3, +0.3, -0.4 points",
                 metric="eval/gold", holds=[("PRO", "<", "no temperature", 0.1), ("PRO", ">", "no temperature", -0.1)]),
            dict(claim="the lower places add to the first", source="Table 3", paper="+0.2 to +0.6 points", metric="eval/gold",
                 holds=[("PRO", ">", "first place only")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "against others": dict(
        question="On the same samples, is the list worth more than its pairs or its best?",
        arms={"PRO": {}, "RRHF": {"method": "rrhf", "sources": "D", "candidates": 5},
              "DPO": {"method": "rso", "source": "sft", "candidates": 5, "num_samples": 5, "pairs": "tournament"},
              "SFT on the best": {"method": "rrhf", "sources": "D", "candidates": 5, "rank_weight": 0.0}},
        columns=COLUMNS,
        claims=[
            dict(claim="PRO beats SFT on the best", source="Table 1", paper="68.0 over 63.8 (HH and ChatGPT)",
                 metric="eval/gold", holds=[("PRO", ">", "SFT on the best")]),
            dict(claim="PRO beats RRHF", source="Table 1", paper="68.0 over 63.1", metric="eval/gold",
                 holds=[("PRO", ">", "RRHF")]),
            dict(claim="PRO beats DPO", source="Table 1", paper="68.0 over 64.1; 58.7 under 59.3", metric="eval/gold",
                 holds=[("PRO", ">", "DPO")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
