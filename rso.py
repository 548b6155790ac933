"""Statistical Rejection Sampling Improves Preference Optimization (RSO)
Liu, Zhao, Joshi, Khalman, Saleh, Liu and Liu, ICLR 2024, https://arxiv.org/abs/2309.06657

DPO is maximum likelihood of preferences, but the preferences are between texts of some other policy. The likelihood is about the
optimal one, pi_r(y|x) = pi_sft(y|x) exp(r(x, y) / beta) / Z(x)  (Eq. 4), so its pairs should come from there. RSO samples many
responses of the SFT policy, keeps each with probability

    exp((r(x, y) - max r) / beta)                                                                    (Algorithm 1)

which makes them samples of pi_r as their number grows, pairs them, and lets the reward model say who wins. On these pairs (w over l)
any loss will do:

    sigmoid-norm: -log sigmoid(gamma [log pi(w)/pi_sft(w) - log pi(l)/pi_sft(l)])            (Eq. 8; DPO's, with beta = gamma)
    hinge:        max(0, 1 - gamma [log pi(w) - log pi(l)])                                  (Eq. 9; SLiC's, no reference)
    hinge-norm:   max(0, 1 - gamma [log pi(w)/pi_sft(w) - log pi(l)/pi_sft(l)])              (Eq. 10)

    python rso.py                    # 11 s on two cores (two minutes more at first): gold 0.18 to 0.46, KL 4.9 nats
    python rso.py --reproduce        # losses x sources, gold against beta and label noise: 23 arms, 8 minutes a seed
    python rso.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data Anthropic/hh-rlhf:harmless-base/train.jsonl.gz

What to look at: `--source direct` (the data's pairs), `sft` (random samples) and `rso`: the pairs change, the loss does not.
beta is in units of the reward's standard deviation; 0 keeps the top of the candidates, a large one keeps a random choice.

Compared with dpo.py: its loss, and two of its relatives, on other pairs.
No official code. As printed, the algorithm runs out of candidates when they are fewer than the samples asked for; here all are
kept, and counted. The candidates are shuffled first: at a large beta the algorithm stops before it reaches the end of the list. What is
kept is drawn without replacement, so later picks are worse than pi_r, and the best candidate is kept nearly always.
The paper keeps 8 of 64; the pool at hand here has 16 for each prompt, so 4 of them (--candidates 64 --num_samples 8 samples more).
Left out: a reward model that reads two responses at once (here a difference of scores), SLiC's regulariser (no effect in Table 5).
"""
import math
import random
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

import torch
import torch.nn.functional as F

import common
from common import Ranking, option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 1e-3, "real": 1e-5}      # tiny: tuned on validation seed 100; real: the paper's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 1.0}    # tiny: tuned likewise
    epochs: Optional[float] = option(None, "passes over the pairs; the default depends on the model")
    loss: Literal["sigmoid_norm", "hinge", "hinge_norm"] = option("sigmoid_norm", "Eq. 8, 9 or 10")
    gamma: float = option(0.05, "scale of the loss's margin (paper: 0.05)")
    source: Literal["rso", "sft", "direct"] = option("rso", "pairs of rejection-sampled or of plain samples, or the data's own")
    candidates: int = option(16, "samples of the SFT policy for each prompt (paper: 64)")
    num_samples: int = option(4, "how many of them are kept (paper: 8)")
    beta: float = option(0.5, "temperature of rejection sampling in standard deviations of the reward (paper: 0.5); 0: the top")
    pairs: Literal["first_round", "tournament"] = option("first_round", "n/2 pairs of n samples, or n-1: winners meet again")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises linearly")

    def __post_init__(self):
        super().__post_init__()
        self.check(lambda value: value > 0, "be above 0", "gamma")
        self.check(lambda value: value >= 0, "not be negative", "beta")
        self.check(lambda value: value > 1, "be at least 2: a pair", "num_samples")
        self.check(lambda value: value >= self.num_samples, f"be at least --num_samples {self.num_samples}", "candidates")


def preference_loss(kind, policy_chosen_logps, policy_rejected_logps, sft_chosen_logps, sft_rejected_logps, gamma):
    """Loss of each pair: kind is sigmoid_norm (Eq. 8), hinge_norm (Eq. 10) or hinge (Eq. 9, which ignores the SFT policy).

    Args: four log-probs [B], log pi(y|x) in nats, summed over the response, EOS included; gamma: above 0.
    Returns: [B].  Raises ValueError for another kind.
    """
    margins = policy_chosen_logps - policy_rejected_logps
    if kind == "hinge":
        return (1 - gamma * margins).clamp(min=0)
    margins = margins - (sft_chosen_logps - sft_rejected_logps)
    if kind == "hinge_norm":
        return (1 - gamma * margins).clamp(min=0)
    if kind == "sigmoid_norm":
        return -F.logsigmoid(gamma * margins)
    raise ValueError(f"kind must be sigmoid_norm, hinge_norm or hinge, not {kind!r}")


def statistical_rejection_sampling(rewards, num_samples, beta, rng):
    """Algorithm 1: which of N samples of the SFT policy to keep as samples of pi_sft exp(r / beta) / Z.

    Args:
        rewards: N numbers. num_samples: at most N. beta: at least 0, in the rewards' units; 0 is the limit, the largest rewards.
        rng: has random(), uniform on [0, 1), called once for each decision.
    Returns: indices, in the order of acceptance.  Raises ValueError for other arguments, or a reward that is not finite.
    """
    rewards, accepted = [float(reward) for reward in rewards], []
    if num_samples > len(rewards):
        raise ValueError(f"{num_samples} samples asked for, of {len(rewards)} candidates")
    if not (beta >= 0 and all(map(math.isfinite, rewards))):
        raise ValueError(f"beta must not be negative, and rewards must be finite: beta {beta}, rewards {rewards}")
    remaining = list(range(len(rewards)))
    while len(accepted) < num_samples:
        best = max(rewards[i] for i in remaining)                         # stays for the whole pass, and always passes
        for i in remaining:
            gap = rewards[i] - best
            if rng.random() < (math.exp(gap / beta) if beta else gap == 0):
                accepted.append(i)
                if len(accepted) == num_samples:
                    break
        remaining = [i for i in remaining if i not in accepted]
    return accepted


def ranked_pairs(indices, rewards, tournament=False):
    """(winner, loser) indices: neighbours in the list are paired off and the larger reward wins; equal rewards make no pair.

    A tournament goes on among the winners until one is left (n - 1 pairs of n); one who has no opponent goes through.
    """
    pairs = []
    while len(indices) > 1:
        matches = [(a, b) if rewards[a] >= rewards[b] else (b, a) for a, b in zip(indices[::2], indices[1::2])]
        pairs += [(a, b) for a, b in matches if rewards[a] > rewards[b]]
        indices = [a for a, _ in matches] + (indices[-1:] if len(indices) % 2 else [])
        if not tournament:
            break
    return pairs


def collect_pairs(run):
    """The preference pairs of --source: rows of two responses, the winner first."""
    config, rng, pairs, short = run.config, random.Random(f"pairs {run.config.seed}"), [], 0
    if config.source == "direct":
        return direct_pairs(run.task, config.num_samples // 2)
    rankings = common.candidates(run, common.reward_to_maximise(run), [], config.candidates)
    for row in rankings:
        order = rng.sample(range(len(row.scores)), len(row.scores))                  # or a large beta would keep the head
        n = min(config.num_samples, len(order))
        short += n < config.num_samples
        if config.source == "rso":
            kept = [order[i] for i in statistical_rejection_sampling([row.scores[i] for i in order], n, config.beta, rng)]
            rng.shuffle(kept)                                                        # else early picks, the good ones, meet
        else:
            kept = order[:n]
        for w, l in ranked_pairs(kept, row.scores, config.pairs == "tournament"):
            pairs.append(Ranking(row.prompt, (row.responses[w], row.responses[l]), (row.scores[w], row.scores[l]),
                                 ended=(row.ended[w], row.ended[l])))
    if short:
        common.warn(f"{short} of {len(rankings)} prompts have fewer than --num_samples {config.num_samples} different candidates: "
                    "all of them are kept")
    return pairs


def direct_pairs(task, n):
    """The data's own pairs, labelled by people; those of the embedded task's off-policy writer, n for each prompt."""
    if "off_policy" not in task.pairs:
        return task.pairs.get("train", [])
    by_prompt = {}
    for pair in task.pairs["off_policy"]:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    return [pair for pairs in by_prompt.values() for pair in pairs[:n]]


def train(run, pairs):
    """Minimise the loss on the pairs. Before the first step the policy is the SFT policy: its log-probs are taken then."""
    config = run.config
    if not pairs:
        raise common.UserError("there are no pairs to train on: the data has none, or all candidates of each prompt are equal")
    sft_logps = dict(zip(pairs, common.response_logps(run, pairs)[0]))                                # [2] each

    def losses_of(rows, batch):
        logps = common.sequence_logps(run.policy, batch).view(-1, 2)                                  # [n, 2]
        sft = torch.stack([sft_logps[pair] for pair in rows])
        losses = preference_loss(config.loss, *logps.T, *sft.T, config.gamma)
        chosen, rejected = (config.gamma * (logps - sft)).unbind(1)
        return losses, {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
                        "logps/chosen": logps[:, 0], "logps/rejected": logps[:, 1]}

    for step, rows in common.steps(run, common.plan_of(pairs, config)):
        common.log(run, step, common.minimise(run, step, rows, losses_of))


def run(config):
    """One training run; returns the metrics after it, and the trace of evaluations."""
    run = common.start(config)
    train(run, collect_pairs(run))
    return common.finish(run)


LOSSES = {"sigmoid-norm": "sigmoid_norm", "hinge": "hinge", "hinge-norm": "hinge_norm"}
SOURCES = ["direct", "sft", "rso"]
ONE_ROUND = {"method": "raft", "rounds": 1, "candidates": 16, "prompts": 0, "lr": 1e-3, "epochs": 3}      # tuned likewise
NOISE = 0.25                                      # on top of the annotators' own errors


def over_beta(name, **settings):
    """Arms from the top of the candidates to a random choice, the limits of beta 0 and of a large one."""
    return {f"top 4 of 16{name}": {"beta": 0.0} | settings, f"beta 0.25{name}": {"beta": 0.25} | settings,
            f"beta 0.5{name}": settings, f"beta 1{name}": {"beta": 1.0} | settings, f"beta 2{name}": {"beta": 2.0} | settings,
            f"random 4 of 16{name}": {"source": "sft"} | settings}


def on_every_loss(left, right):
    return [(f"{loss}, {left}", ">", f"{loss}, {right}") for loss in LOSSES]


EXPERIMENTS = {
    "losses and sources": dict(
        question="Does the source of the pairs matter more than the loss?",
        arms={f"{name}, {source}": {"loss": loss, "source": source} for name, loss in LOSSES.items() for source in SOURCES} | {
            "RAFT": ONE_ROUND, "ReST": ONE_ROUND | {"ranking": "global", "share": 0.25}},
        columns={"eval/win_rate_proxy": "win rate, proxy", "eval/win_rate_judge": "win rate, judge", "eval/win_rate": "win rate, gold",
                 "eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency", "eval/length": "length"},
        claims=[
            dict(claim="SFT samples beat the data's own pairs, under every loss", source="Table 1", paper="78.1 over 76.1% (sigmoid-norm)",
                 metric="eval/win_rate", holds=on_every_loss("sft", "direct")),
            dict(claim="rejection sampling beats SFT samples, under every loss", source="Table 1",
                 paper="82.2 over 78.1% (sigmoid-norm)", metric="eval/win_rate", holds=on_every_loss("rso", "sft")),
            dict(claim="hacking: the hinge without a reference wins most by the proxy", source="Table 1",
                 paper="93.4 over 92.4, 92.8%", metric="eval/win_rate_proxy",
                 holds=[("hinge, rso", ">", "sigmoid-norm, rso"), ("hinge, rso", ">", "hinge-norm, rso")]),
            dict(claim="but less than the others by the judge", source="Table 1 (AutoSxS)", paper="69.3 under 71.9, 70.8%",
                 metric="eval/win_rate_judge", holds=[("hinge, rso", "<", "sigmoid-norm, rso"), ("hinge, rso", "<", "hinge-norm, rso")]),
            dict(claim="and it drifts further", source="ours", paper="-", metric="eval/kl",
                 holds=[("hinge, rso", ">", "sigmoid-norm, rso"), ("hinge, rso", ">", "hinge-norm, rso")]),
            dict(claim="the two losses with a reference are level (win rate within 0.05)", source="Table 1", paper="82.2, 83.5%",
                 metric="eval/win_rate", holds=[("hinge-norm, rso", "<", "sigmoid-norm, rso", 0.05),
                                                ("hinge-norm, rso", ">", "sigmoid-norm, rso", -0.05)]),
            dict(claim="RAFT lies below DPO on the data's own pairs", source="Table 1", paper="68.5 under 76.1%",
                 metric="eval/win_rate", holds=[("RAFT", "<", "sigmoid-norm, direct")]),
            dict(claim="and ReST below RAFT", source="Table 1", paper="46.2 under 68.5%", metric="eval/win_rate",
                 holds=[("ReST", "<", "RAFT")]),
        ],
        panels=[dict(kind="bars", y=["eval/win_rate_proxy", "eval/win_rate_judge", "eval/win_rate"], title="win rate against SFT"),
                dict(kind="bars", y=["eval/kl"], title="KL")],
    ),
    "beta": dict(
        question="Is there a best beta, and does noise in the labels move it?",
        arms=over_beta("") | over_beta(", noisy labels", label_noise=NOISE) | {
            "8 of 64, equal pairs": {"candidates": 64, "num_samples": 8, "epochs": 1.0},
            "tournament, equal pairs": {"pairs": "tournament", "epochs": 4 / 3}},
        columns={"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/kl": "KL", "eval/fluency": "fluency",
                 "eval/win_rate": "win rate"},
        claims=[
            dict(claim="rejection sampling beats the top of the candidates", source="Figure 3 (beta 0.5 over 0)", paper="plot only:",
                 metric="eval/gold", holds=[("beta 0.5", ">", "top 4 of 16")]),
            dict(claim="and a random choice", source="Table 2", paper="71.9 over 68.5%", metric="eval/gold",
                 holds=[("beta 0.5", ">", "random 4 of 16")]),
            dict(claim="under noisy labels it beats the top", source="sec. 3.2, what beta is for", paper="expected from",
                 metric="eval/gold", holds=[("beta 0.5, noisy labels", ">", "top 4 of 16, noisy labels")]),
            dict(claim="and so does a beta of 2", source="ours", paper="-", metric="eval/gold",
                 holds=[("beta 2, noisy labels", ">", "top 4 of 16, noisy labels")]),
            dict(claim="more candidates help (8 of 64 over 4 of 16, equal pairs)", source="ours", paper="-", metric="eval/gold",
                 holds=[("8 of 64, equal pairs", ">", "beta 0.5")]),
            dict(claim="a tournament is no better than a first round (gold within 0.1, equal pairs)", source="Table 2",
                 paper="71.9, 71.7% (AutoSxS)", metric="eval/gold", holds=[("tournament, equal pairs", "<", "beta 0.5", 0.1)]),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"), dict(kind="bars", y=["eval/proxy"], title="proxy reward")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
