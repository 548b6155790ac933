"""RRHF: Rank Responses to Align Language Models with Human Feedback without tears
Yuan, Yuan, Tan, Wang, Huang and Huang, NeurIPS 2023, https://arxiv.org/abs/2304.05302

Take k responses to a prompt, wherever they come from: the data's own answers, samples of the policy, other models. A reward r_i
ranks them. The policy ranks them too, by its log-prob per token, and learns to agree with the reward:

    p_i = 1/|y_i| sum_t log pi(y_i,t | x, y_i,<t)                                                            (Eq. 1)
    L_rank = sum over r_i < r_j of max(0, p_i - p_j)                                                         (Eq. 2)
    L_ft = -sum_t log pi(y_b,t | x, y_b,<t)  of the best response b                                     (Eq. 3 and 4)
    L = L_rank + L_ft                                                                                        (Eq. 5)

No value model, no reference model, no sampling while training. Only the order of the rewards counts.

    python rrhf.py                   # 17 s on two cores (two minutes more at first): gold 0.18 to 0.56, KL 1.4 nats
    python rrhf.py --reproduce       # the terms of the loss, sources of candidates: 9 arms, 4 minutes a seed on one core
    python rrhf.py --model HuggingFaceTB/SmolLM2-135M-Instruct --sources P --data ranked.jsonl

What to look at: `loss/rank` is small beside `loss/sft`: for the best response a token's weight is 1 in L_ft and at most
(k-1)/|y| in L_rank. The ranking loss works on the other candidates. `eval/to_best` compares the reward reached with that of the
best candidates of the training prompts: the paper calls its policy a best-of-n learner.

Compared with dpo.py: any number of responses, a log-prob per token in place of a log-ratio, and imitation of the best. With
--rank_weight 0 only the imitation is left: one round of raft.py.
Official code (GanjinZero/RRHF) differs: it overwrites its labels before it counts tokens, so that all candidates are divided by
one padded width and no score is normalised; its SFT term is a mean over that width, so weaker; its ranking weight is 100 unless
the script says 1; and it holds for one prompt a batch only. This file follows the paper. The exponent of the length is its option.
Left out: beam search as a source (its candidates are alike, and the paper prefers diverse ones) and the online variant.
"""
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import torch

import common
from common import option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 3e-3, "real": 2e-5}      # tiny: tuned on validation seed 100; real: the paper's
    EPOCHS: ClassVar = {"tiny": 3.0, "real": 3.0}    # the paper's
    epochs: Optional[float] = option(None, "passes over the prompts, in every round; the default depends on the model")
    sources: Literal["P", "D", "DP"] = option("DP", "candidates: P the data's own answers, D samples of the policy, DP both")
    candidates: int = option(4, "samples of the policy for each prompt (paper: 4, beside 2 of the data's)")
    systems: Optional[str] = option(None, "'A,B': the writers whose answers count in P (default: off_policy,weak; of a file all)")
    rounds: int = option(1, "sample the candidates anew from the trained policy so many times less one (paper: IP-2, IP-3)")
    rank_weight: float = option(1.0, "weight of the ranking loss (paper: 1; 10 and 100 were worse)")
    sft_weight: float = option(1.0, "weight of the SFT loss on the best candidate (paper: 1)")
    length_penalty: float = option(1.0, "exponent of the length in Eq. 1")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option("linear", "of the learning rate (paper: linear)")
    warmup: float = option(0.03, "share of the steps over which the learning rate rises linearly (official code: 0.03)")
    eval_pairs: int = option(512, "held-out pairs scored at each evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.systems is None:
            self.systems = "off_policy,weak" if self.data == "reviews" else ""
        self.check(lambda value: value >= 0, "not be negative", "rank_weight", "sft_weight", "length_penalty")
        self.check(lambda value: value > 0, "be above 0", "rounds", "candidates", "eval_pairs")
        self.check(lambda value: self.sources != "D" or value > 1, "be at least 2 with --sources D: one has no rank", "candidates")


def rank_loss(scores, rewards):
    """Ranking loss of each prompt: the sum over pairs with r_i < r_j of max(0, p_i - p_j) (Eq. 2). Equal rewards add nothing.

    Args: scores, rewards [B, K].  Returns: [B].
    """
    check_shapes(scores, rewards)
    worse = rewards[:, :, None] < rewards[:, None, :]                                       # [B, i, j]: r_i < r_j
    return torch.where(worse, (scores[:, :, None] - scores[:, None, :]).relu(), 0).sum((1, 2))


def rrhf_loss(logps, lengths, rewards, length_penalty=1.0, rank_weight=1.0, sft_weight=1.0):
    """RRHF loss of each prompt (Eq. 5): rank_weight L_rank + sft_weight L_ft.

    Args: logps [B, K], log pi(y|x) in nats, summed over the response, EOS included; lengths [B, K] in tokens, EOS included;
        rewards [B, K]: the first of the largest is the best response.
    Returns: [B].
    """
    check_shapes(logps, lengths, rewards)
    scores = logps / lengths ** length_penalty                                                        # Eq. 1
    best = rewards.argmax(1, keepdim=True)                                                            # Eq. 3
    sft_loss = -logps.gather(1, best).squeeze(1)                                                      # Eq. 4
    return rank_weight * rank_loss(scores, rewards) + sft_weight * sft_loss


def check_shapes(*tensors):
    if tensors[0].dim() != 2 or any(tensor.shape != tensors[0].shape for tensor in tensors):
        raise ValueError(f"all must be [B, K], not {', '.join(str(list(tensor.shape)) for tensor in tensors)}")


def train(run, reward):
    """Each round collects candidates, from the policy as it is then, and minimises Eq. 5 on them."""
    config = run.config
    given = common.given_answers(run.task, config.sources, config.systems)
    held_out = run.task.pairs.get("test", [])[:config.eval_pairs]
    n = len(given) or len(run.task.prompts["train"])
    plan = [(i == 0, rows) for _ in range(config.rounds) for i, rows in enumerate(common.epochs(n, config))]

    def losses_of(rows, batch):
        logps = common.sequence_logps(run.policy, batch).view(len(rows), -1)                          # [B, K]
        lengths = batch.lengths.view_as(logps)
        rewards = torch.tensor([row.scores for row in rows], device=logps.device)
        losses = rrhf_loss(logps, lengths, rewards, config.length_penalty, config.rank_weight, config.sft_weight)
        best = rewards.argmax(1, keepdim=True)
        return losses, {"loss/rank": rank_loss(logps / lengths ** config.length_penalty, rewards),
                        "loss/sft": -logps.gather(1, best).squeeze(1), "rewards/best": rewards.amax(1)}

    def measure():
        return common.score_metrics(run, held_out) | best_of_n_learner(run, reward)

    for step, (new_round, rows) in common.steps(run, plan, measure):
        if new_round:
            run.state["rankings"] = common.candidates(run, reward, given, config.candidates * ("D" in config.sources))
        common.log(run, step, common.minimise(run, step, [run.state["rankings"][i] for i in rows], losses_of))


def best_of_n_learner(run, reward):
    """Proxy reward of the training candidates, their mean and the mean of each prompt's best, and how far the policy's own
    (on test prompts) lies from the latter. {} before there are candidates, or where something else scored them."""
    by_proxy = reward and reward is run.rewards.get("proxy")
    if not by_proxy or "rankings" not in run.state or "after" not in run.samples:
        return {}
    scores = [row.scores for row in run.state["rankings"]]
    mean, best = (sum(map(f, scores)) / len(scores) for f in (lambda row: sum(row) / len(row), max))
    proxy = run.samples["after"]["proxy"]
    return {"eval/candidates_mean": mean, "eval/candidates_best": best, "eval/to_best": sum(proxy) / len(proxy) - best}


def run(config):
    """One training run; returns the metrics after it, and the trace of evaluations."""
    run = common.start(config)
    train(run, common.candidate_reward(run, config.sources))
    return common.finish(run)


COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency", "eval/nll": "nll of good text",
           "eval/distinct_2": "distinct-2", "eval/eos_rate": "EOS rate", "eval/score_accuracy": "score accuracy",
           "eval/length": "length"}
ITERATED = {"DP": {}, "IP-2": {"rounds": 2}, "IP-3": {"rounds": 3}}

EXPERIMENTS = {
    "terms": dict(
        question="What does each term of the loss do, and does ranking alone destroy the language model?",
        arms={"SFT": {"epochs": 0}, "rank + SFT": {}, "SFT only": {"rank_weight": 0.0}, "rank only": {"sft_weight": 0.0}},
        columns=COLUMNS,
        claims=[
            dict(claim="the ranking loss adds gold to SFT on the best", source="Table 7", paper="-1.14 to -1.03 reward",
                 metric="eval/gold", holds=[("rank + SFT", ">", "SFT only")]),
            dict(claim="ranking alone destroys the language model: good text becomes unlikely",
                 source="SimPO issue 5, of RRHF without SFT", paper="reported in", metric="eval/nll",
                 holds=[("rank only", ">", "SFT", 0.5)]),
            dict(claim="and fluency falls by a tenth or more", source="SimPO issue 5", paper="reported in", metric="eval/fluency",
                 holds=[("rank only", "<", "SFT", -0.1)]),
            dict(claim="as a preference classifier the score is no better than chance before", source="Table 5",
                 paper="45.1% (Alpaca)", metric="eval/score_accuracy", holds=[("SFT", "<", 0.5)]),
            dict(claim="and better after", source="Table 5", paper="61.8%", metric="eval/score_accuracy",
                 holds=[("rank + SFT", ">", "SFT")]),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="bars", y=["eval/nll"], title="nll of held-out good text, a token")],
    ),
    "sources": dict(
        question="Where should candidates come from, and is the policy a best-of-n learner?",
        arms={"P": {"sources": "P"}, "D": {"sources": "D"}} | ITERATED | {"DP, trained as long as IP-3": {"epochs": 9}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/candidates_mean": "candidates' mean",
                 "eval/candidates_best": "candidates' best", "eval/to_best": "proxy - best", "eval/kl": "KL",
                 "eval/fluency": "fluency", "eval/distinct_2": "distinct-2"},
        claims=[
            dict(claim="own samples beat the data's own answers", source="Table 6", paper="-1.08 over -1.31 reward",
                 metric="eval/proxy", holds=[("D", ">", "P")]),
            dict(claim="both together beat own samples alone", source="Table 6", paper="-1.02 over -1.08", metric="eval/proxy",
                 holds=[("DP", ">", "D")]),
            dict(claim="sampling again from the trained policy helps: 3 > 2 > 1", source="Table 6", paper="-0.94, -0.96, -1.02",
                 metric="eval/proxy", holds=[("IP-3", ">", "IP-2"), ("IP-2", ">", "DP")]),
            dict(claim="the same in gold reward", source="ours", paper="-", metric="eval/gold",
                 holds=[("IP-3", ">", "IP-2"), ("IP-2", ">", "DP")]),
            dict(claim="more than training as long on the first candidates", source="ours", paper="-", metric="eval/gold",
                 holds=[("IP-3", ">", "DP, trained as long as IP-3")]),
            dict(claim="a best-of-n learner: its reward is that of its best candidates (within 0.2)", source="Eq. 7",
                 paper="-1.02 against -0.95 (DP)", metric="eval/to_best",
                 holds=[(arm, op, 0.2 * sign) for arm in ("D", "DP") for op, sign in (("<", 1), (">", -1))]),
        ],
        panels=[dict(kind="bars", y=["eval/proxy", "eval/candidates_best"], title="proxy: reached, and candidates' best"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
