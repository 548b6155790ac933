"""Aligning Language Models with Offline Learning from Human Feedback
Hu, Tao, Yang and Zhou, 2023, https://arxiv.org/abs/2308.12050
after Decision Transformer: Reinforcement Learning via Sequence Modeling, by Chen, Lu, Rajeswaran, Lee,
Grover, Laskin, Abbeel, Srinivas and Mordatch, NeurIPS 2021, https://arxiv.org/abs/2106.01345

Responses y to prompts x are collected once, and each gets a reward r. What can supervised learning make of
them? Four objectives, each a weighted likelihood, L = -mean over samples of w log pi(y | x'):

    sft       x' = x         w = 1                                imitate all samples
    filter    x' = x         w = 1; only the best tenth is used   imitate the best ones
    rwr       x' = x         w ~ exp(r / beta), mean 1 in a batch imitate the better ones more
    dt        x' = x<r>      w = 1                                imitate all, with r in the prompt

The first paper calls the last three filtering alignment, reward-weighted regression and conditional
alignment; in the second, filter is %BC. With dt the policy learns p(y | x, r) from good and bad samples. Then
it is asked for the level whose answers the proxy scores best, on an eighth of the prompts that is kept apart
(--validation). A response is one action, so the return-to-go is the reward itself, standardised. There is no
reference model. Rewards fall into ten levels of equally many samples, tokens <reward:0> to <reward:9>.

    python decision_transformer.py    # 78 s (at first two minutes more): gold 0.16 to 0.83, KL 1.7
    python decision_transformer.py --steer reward=0 --prompt "you saw this old fantasy. how was the score?"
    python decision_transformer.py --reproduce   # the four objectives and PPO; amounts of data
    python decision_transformer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data ranked.jsonl

What to look at: the table of the reward asked for (standardised) and found (on the reward model's scale).
Compared with raft.py: no new samples; `filter` is one round of it, ranked globally. steerlm.py is `dt` with
several attributes. Version 2 of the first paper calls conditional alignment comparable to PPO (version 1:
better). Its equations could not be checked. OpenRLHF's conditional_sft_processor takes 128,000
demonstrations scored by a reward model, one epoch, from the SFT policy; here 23,000 that SFT has seen, less
an eighth. It writes the reward as text (--control text: <reward:1.3>). Left out: SFT rows without a tag.

Elsewhere:
    log-probs in float32, dropout off, EOS counted (none after a cut response): common.py; AdamW (0.9, 0.95,
    no decay), lr from 0 up for 5% of the steps, then down to 0: common.adamw; clip norm 1: harness/config.py
    demonstrations, true reward (gold): tasks/build.py, reviews.py; or a file's rows. Tags: harness.add_tags
    the reward: trained on the pairs, or --reward; mean 0, deviation 1 on SFT samples: harness/rewards.py
    --sources D: samples at temperature 1, from the task's pool if it has enough: harness/samples.py
    run.steps: seeds, checkpoints; run.evaluate: samples, KL to the initial policy (tiny: SFT): harness/run.py
"""
import random
import statistics
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Optional

import torch

import common
import harness
from harness import UserError, option


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 4e-3, "real": 5e-6}      # tiny: tuned on seeds 100 to 102; real: OpenRLHF's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 1.0}    # tiny: likewise; real: OpenRLHF's
    batch_size: int = option(64, "samples per optimizer step (OpenRLHF: 128)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "cosine", "how the learning rate goes on after the warm-up")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    objective: Literal["dt", "filter", "rwr", "sft"] = option(
        "dt", "dt: reward in the prompt; filter: SFT on the best; rwr: SFT weighted by reward; sft: on all")
    sources: Optional[Literal["S", "P", "D", "DP"]] = option(
        None, "S demonstrations for SFT (tiny), P the data's ranked answers, D the policy's samples, DP both")
    demonstrations: int = option(23000, "how many demonstrations count, with --sources S", "(0, inf)")
    candidates: int = option(8, "samples of the policy for each prompt", "(0, inf)")
    systems: str = option("", "'A,B': the writers whose answers count in P (default: all)")
    bins: int = option(10, "levels of the reward, with equally many samples each", "[2, inf)")
    control: Optional[Literal["tokens", "text"]] = option(None, "a token a level (tiny), or reward as text")
    share: float = option(0.1, "part of the samples that filter keeps", "(0, 1]")
    beta: float = option(0.1, "temperature of rwr; small: few samples count (best in tuning: 1)", "(0, inf)")
    validation: float = option(0.125, "share of the prompts kept apart, to choose what to ask for", "[0, 1)")
    steer: str = option("", "'reward=9': level to ask for (default: chosen after training, by --validation)")

    def __post_init__(self):
        super().__post_init__()
        kind = ("S", "tokens") if self.model == "tiny" else ("P", "text")
        self.sources, self.control = self.sources or kind[0], self.control or kind[1]
        if harness.parse_request(self.steer, {"reward": self.bins - 1}) and self.objective != "dt":
            raise UserError("--steer is for --objective dt: the other objectives have no tags")


def rwr_weights(rewards, beta):
    """Weights of reward-weighted regression: softmax(rewards / beta) over the batch [B], with sum 1."""
    return (rewards / beta).softmax(0)


def effective_share(weights):
    """Effective sample size over the number of samples, from 1/B to 1. weights [B] -> scalar."""
    return weights.sum() ** 2 / (len(weights) * (weights ** 2).sum())


def reward_bins(rewards, n):
    """Edges between n bins of equally many of the rewards [N]: ascending, [n-1], or fewer because of ties.

    Edges lie half-way between different rewards, so no bin is empty. UserError where all rewards are equal.
    """
    values, counts = torch.as_tensor(rewards, dtype=torch.float64).unique(return_counts=True)
    if len(values) < 2:
        raise UserError(f"all {int(counts.sum())} rewards are {values[0]:.3g}: no bins, nothing to ask for")
    below = counts.cumsum(0)[:-1] / counts.sum()             # share of the rewards below each possible edge
    wanted = torch.arange(1, n) / n
    places = (below - wanted[:, None]).abs().argmin(1).unique()
    return (values[places] + values[places + 1]) / 2


def assign_bins(rewards, edges):
    """The bin, 0 to len(edges), of each reward [N] -> [N]. The first and the last bin have no outer end."""
    return torch.bucketize(*(torch.as_tensor(values, dtype=torch.float64) for values in (rewards, edges)))


class Sample(NamedTuple):
    prompt: str
    responses: list[str]         # one
    ended: list[bool]            # with EOS; False: cut off, and then no EOS is trained
    reward: float
    weight: float = 1.0


def offline_samples(run, reward):
    """(samples to train on, validation prompts). Rewards have mean 0 and deviation 1 over the former."""
    config = run.config
    if config.sources == "S":
        rankings = harness.scored_demonstrations(run, reward, config.demonstrations)      # one response each
    else:
        given = harness.given_answers(run.task, config.sources, config.systems)          # [] with --sources D
        rankings = harness.candidates(run, reward, given, config.candidates * ("D" in config.sources))
    prompts, rng = sorted({row.prompt for row in rankings}), random.Random(f"validation {config.seed}")
    apart = set(rng.sample(prompts, round(config.validation * len(prompts))))
    samples = [Sample(row.prompt, [text], [ended], score) for row in rankings if row.prompt not in apart
               for text, ended, score in zip(row.responses, row.ended, row.scores)]
    if not samples:
        raise UserError(f"--validation {config.validation} leaves no prompt to train on: lower it")
    reward_bins([s.reward for s in samples], 2)             # UserError for equal rewards, under any objective
    mean, deviation = (f(s.reward for s in samples) for f in (statistics.fmean, statistics.pstdev))
    return [s._replace(reward=(s.reward - mean) / deviation) for s in samples], sorted(apart)


def levels_of(config, samples):
    """The levels of the reward among the samples: {"edges": [n-1], "means": [n], "control"}."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    edges = reward_bins(rewards, config.bins)
    bins = assign_bins(rewards, edges)
    means = [rewards[bins == level].mean().item() for level in range(len(edges) + 1)]
    return {"edges": edges.tolist(), "means": means, "control": config.control}


def tag(levels, reward):
    """A reward as it stands after a prompt, in training and inference: <reward:LEVEL> or <reward:VALUE>."""
    if levels["control"] == "text":
        return f"<reward:{round(reward, 1) + 0.0:.1f}>"                      # + 0.0: never -0.0
    return f"<reward:{int(assign_bins([reward], levels['edges']))}>"


def learn_tags(run, levels, samples):
    """New tokens: one for each level; or, as text, for what the tokenizer cannot spell (tiny)."""
    texts = {tag(levels, reward): [] for reward in levels["means"]}
    if levels["control"] == "tokens":
        for sample in samples:
            texts[tag(levels, sample.reward)] += sample.responses
        harness.add_tags(run, {"reward": texts})
    elif run.tokenizer.unk_token_id in run.tokenizer(tag(levels, -1.0), add_special_tokens=False).input_ids:
        harness.add_tags(run, {"spelling": {piece: [] for piece in ("<reward:", ">", *"-0123456789")}})


def plan_of(config, samples, levels):
    """The samples of every step, with tags and weights; passes in new orders, the very last step smaller."""
    if config.objective == "filter":
        samples = sorted(samples, key=lambda s: -s.reward)[:max(1, round(config.share * len(samples)))]
    if config.objective == "dt":
        samples = [s._replace(prompt=s.prompt + tag(levels, s.reward)) for s in samples]
    batches = harness.shuffled_batches(len(samples), config.epochs, config.batch_size, config.seed)
    plan = [[samples[i] for i in step] for step in batches]
    for step in plan if config.objective == "rwr" else ():
        weights = rwr_weights(torch.tensor([s.reward for s in step]), config.beta) * len(step)      # mean 1
        step[:] = [s._replace(weight=weight) for s, weight in zip(step, weights.tolist())]
    return plan


def calibration(run, levels, rewards, prompts, reward):
    """Ask every prompt for each of the rewards: rows with the mean reward and gold of the responses."""
    asked = [(r, [prompt + tag(levels, r) for prompt in prompts]) for r in rewards]
    return harness.reward_curve(run, asked, prompts, reward)


def calibration_metrics(run, levels, reward):
    """Slopes and rank correlations on test prompts; with --control text, gold beyond the top level, too."""
    n, top = len(levels["means"]), levels["means"][-1]
    beyond = [top + more for more in (0.5, 1.0, 2.0, 3.0)] if levels["control"] == "text" else []
    prompts = run.task.prompts["test"][:run.config.eval_prompts]
    rows = run.state["calibration"] = calibration(run, levels, levels["means"] + beyond, prompts, reward)
    metrics = {"eval/level": run.state["level"]} | harness.trends(rows[:n])
    if beyond and run.task.gold:
        metrics["eval/gold_beyond"] = rows[-1]["gold"] - rows[n - 1]["gold"]
    return metrics


def train(run):
    """Minimise the weighted negative log-likelihood of samples that were collected and scored once."""
    config, policy, conditioned = run.config, run.policy, run.config.objective == "dt"
    reward = harness.candidate_reward(run, config.sources)      # None: the data's own scores are the rewards
    samples, held_out = offline_samples(run, reward)
    judge = reward or run.rewards.get("proxy")                         # scores what the policy answers later
    levels = levels_of(config, samples)
    top = len(levels["means"]) - 1
    run.state["level"] = harness.parse_request(config.steer, {"reward": top}).get("reward", top)
    run.evaluate()                                    # before training, and before the policy has any tags
    if conditioned:
        learn_tags(run, levels, samples)
        run.ask = lambda prompt: prompt + tag(levels, levels["means"][run.state["level"]])
    plan = plan_of(config, samples, levels)
    optimizer, schedule = common.adamw(policy, config.lr, len(plan), config.schedule, config.warmup)
    for step, rows in run.steps(plan, policy, optimizer, schedule):
        means = harness.Means()
        for part, batch in run.microbatches(rows):              # part: n of the step's samples; batch [n, T]
            nll = -common.sequence_logps(policy, batch)         # [n], sums over the response; no loss on tags
            weights = torch.tensor([rows[i].weight for i in part], device=nll.device)
            losses = weights * nll
            harness.check_finite(losses, step + 1, [rows[i].prompt for i in part])
            (losses.sum() / len(rows)).backward()               # the mean over the step's samples, in parts
            means.add({"loss": losses, "nll": nll})
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == len(plan) and conditioned and judge and held_out and not config.steer:   # else: top
            found = calibration(run, levels, levels["means"], (held_out * 4)[:512], judge)
            run.state["level"] = max(range(top + 1), key=lambda level: found[level]["reward"])
        run.log(step, means.result() | {"grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate()
            shares = [effective_share(torch.tensor([s.weight for s in part])).item() for part in plan]
            run.amend(**(calibration_metrics(run, levels, judge) if conditioned else
                         {"eval/effective_share": statistics.fmean(shares)}))
    if conditioned:
        run.save_json("attributes.json", levels | {
            "method": "decision_transformer", "chat": run.task.chat, "levels": {"reward": top},
            "asked": run.state["level"]})
        rows = run.results["calibration"] = run.state.get("calibration", [])
        run.notes += [harness.table([list(rows[0]), *(row.values() for row in rows)])] if rows else []


def answer(config):
    """Print responses to --prompt for the level of --steer, or for the level that training chose."""
    harness.ask(config, "decision_transformer", lambda saved, request: tag(
        saved, saved["means"][request.get("reward", saved["asked"])]))


if __name__ == "__main__":
    harness.main(Config, train, answer)
