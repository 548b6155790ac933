"""Aligning Language Models with Offline Learning from Human Feedback
Hu, Tao, Yang and Zhou, 2023, https://arxiv.org/abs/2308.12050
after Decision Transformer: Reinforcement Learning via Sequence Modeling
Chen, Lu, Rajeswaran, Lee, Grover, Laskin, Abbeel, Srinivas and Mordatch, NeurIPS 2021, https://arxiv.org/abs/2106.01345

Responses y to prompts x, each with a reward r, collected once: what can supervised learning make of them? Four objectives,
each a weighted likelihood, L = -sum over samples of w log pi(y | x'):

    sft        x' = x        w = 1                                   imitate everything
    filter     x' = x        w = 1 for the best quarter, else 0      imitate the best (the second paper's %BC)
    rwr        x' = x        w = softmax(r / beta) over the batch    reward-weighted regression
    dt         x' = x<r>     w = 1                                   imitate everything, told how good it was

The last learns p(y | x, r) from good and bad samples alike; afterwards it is asked for the best. Training needs no reference and
no sampling. A response is one action, so the return-to-go of the Decision Transformer is the reward itself. Rewards fall into
ten bins of equally many samples, each a token of its own, <reward:0> to <reward:9>.

    python decision_transformer.py           # 29 s on two cores (two minutes more at first): gold 0.18 to 0.36, KL 1.0 nats
    python decision_transformer.py --steer reward=0 --prompt "review this french western and mention the songs:"
    python decision_transformer.py --reproduce           # the four and PPO, calibration, data: 22 arms, 13 minutes a seed on one core
    python decision_transformer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data ranked.jsonl --reward none

What to look at: the table of what was asked for and what came. It rises less steeply than the diagonal. The bin to ask for is
chosen on prompts that are not trained on.

Compared with raft.py: no new samples; `filter` is one global round of it. steerlm.py is `dt` with several attributes.
Official code: none was found for the first paper. OpenRLHF's conditional SFT writes the reward as text, standardised over the
data set, and trains the answer only: --control text, <reward:1.3>. Small models read bins better. Not in the paper: --normalise
prompt, which compares a sample with those of its own prompt. Left out: mixing in SFT data.
"""
import random
import statistics
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Optional

import torch

import common
from common import UserError, option


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 6e-3, "real": 5e-6}       # tiny: tuned on validation seed 100; real: OpenRLHF's
    EPOCHS: ClassVar = {"tiny": 5.0, "real": 1.0}     # tiny: tuned likewise
    epochs: Optional[float] = option(None, "passes over the samples that are trained on; the default depends on the model")
    batch_size: int = option(32, "samples per optimizer step")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option("linear", "of the learning rate")
    objective: Literal["dt", "filter", "rwr", "sft"] = option("dt", "what to make of the samples, see above")
    sources: Optional[Literal["P", "D", "DP"]] = option(None, "samples: P the data's own, D of the policy, DP both (file: P)")
    candidates: int = option(8, "samples of the policy for each prompt")
    systems: str = option("", "'A,B': the writers whose answers count in P (default: all)")
    normalise: Literal["global", "prompt"] = option("global", "rewards have mean 0 over all samples, or for each prompt")
    bins: int = option(10, "levels of the reward, with equally many samples each")
    control: Optional[Literal["tokens", "text"]] = option(None, "a level as one token (tiny), or the reward as text (real)")
    share: float = option(0.25, "part of the samples that filter keeps")
    beta: float = option(0.1, "temperature of rwr: small values trust few samples (tuned here)")
    validation: float = option(0.125, "share of the train prompts that are kept apart, to choose what to ask for")
    steer: str = option("", "'reward=9': the level to ask for (default: the best on the validation prompts)")
    prompt: str = option("", "no training: print responses of --policy to this prompt (default policy: the last run's)")

    def __post_init__(self):
        super().__post_init__()
        kind = ("D", "tokens") if self.model == "tiny" else ("P", "text")
        self.sources, self.control = self.sources or kind[0], self.control or kind[1]
        self.check(lambda value: value > 0, "be above 0", "candidates", "beta")
        self.check(lambda value: value > 1, "be at least 2", "bins")
        self.check(lambda value: 0 < value <= 1, "be in (0, 1]", "share")
        self.check(lambda value: 0 <= value < 1, "be in [0, 1)", "validation")


def rwr_weights(rewards, beta):
    """Weights of reward-weighted regression: softmax(rewards / beta) over the batch [B], so they sum to 1."""
    return (rewards / beta).softmax(0)


def effective_share(weights):
    """Effective sample size over the number of samples: (sum w)^2 / (B sum w^2), from 1/B to 1. weights [B] -> scalar."""
    return weights.sum() ** 2 / (len(weights) * (weights ** 2).sum())


def reward_bins(rewards, n):
    """Edges between n bins of equally many of the rewards [N]: ascending, [n-1], or fewer where ties forbid it.

    Each edge lies half-way between two different rewards, so that no bin is empty and equal rewards share a bin.
    Raises UserError where all rewards are equal.
    """
    values, counts = torch.as_tensor(rewards, dtype=torch.float64).unique(return_counts=True)
    if len(values) < 2:
        raise UserError(f"all {int(counts.sum())} rewards are {values[0]:.3g}: there are no bins to make, nothing to ask for")
    below = counts.cumsum(0)[:-1] / counts.sum()                        # of all rewards, below each place for an edge
    wanted = torch.arange(1, n) / n
    places = (below - wanted[:, None]).abs().argmin(1).unique()
    return (values[places] + values[places + 1]) / 2


def assign_bins(rewards, edges):
    """The bin, 0 to len(edges), of each reward [N] -> [N]; whatever lies beyond the edges is in the first or the last."""
    return torch.bucketize(torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(edges, dtype=torch.float64))


class Sample(NamedTuple):
    prompt: str
    responses: list[str]         # one
    ended: list[bool]
    reward: float
    weight: float = 1.0


def offline_samples(run, reward):
    """(samples to train on, validation prompts): scored once, their rewards with mean 0 and deviation 1 over what is trained on."""
    config, task = run.config, run.task
    given = common.given_answers(task, config.sources, config.systems)
    rankings = common.candidates(run, reward, given, config.candidates * ("D" in config.sources))
    prompts = sorted({row.prompt for row in rankings})
    apart = set(random.Random(f"validation {config.seed}").sample(prompts, round(config.validation * len(prompts))))
    samples = []
    for row in (row for row in rankings if row.prompt not in apart):
        baseline = statistics.fmean(row.scores) if config.normalise == "prompt" else 0.0
        samples += [Sample(row.prompt, [text], [ended], round(score - baseline, 9))        # or equal rewards would come to differ
                    for text, ended, score in zip(row.responses, row.ended, row.scores)]
    if not samples:
        raise UserError(f"--validation {config.validation} leaves no prompt to train on: lower it")
    mean, deviation = statistics.fmean(s.reward for s in samples), statistics.pstdev(s.reward for s in samples)
    reward_bins([sample.reward for sample in samples], 2)               # refuses equal rewards, under any objective
    return [s._replace(reward=(s.reward - mean) / deviation) for s in samples], sorted(apart)


def levels_of(config, samples):
    """The levels of the reward, from the samples that are trained on: {"edges": [n-1], "means": [n], "control"}."""
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    edges = reward_bins(rewards, config.bins)
    bins = assign_bins(rewards, edges)
    means = [rewards[bins == level].mean().item() for level in range(len(edges) + 1)]
    return {"edges": edges.tolist(), "means": means, "control": config.control}


def tag(levels, reward):
    """How a reward is written after a prompt, in training and inference: <reward:LEVEL> as one token, or <reward:VALUE>."""
    if levels["control"] == "text":
        return f"<reward:{round(reward, 1) + 0.0:.1f}>"                 # + 0.0: one spelling of zero
    return f"<reward:{int(assign_bins([reward], levels['edges']))}>"


def learn_tags(run, levels, samples):
    """Make the tags readable: one token a level; as text, what the tokenizer cannot spell (tiny)."""
    texts = {tag(levels, reward): [] for reward in levels["means"]}
    if levels["control"] == "tokens":
        for sample in samples:
            texts[tag(levels, sample.reward)] += sample.responses
        common.add_tags(run, {"reward": texts})
    elif run.tokenizer.unk_token_id in run.tokenizer(tag(levels, -1.0), add_special_tokens=False).input_ids:
        common.add_tags(run, {"spelling": {piece: [] for piece in ("<reward:", ">", *"-0123456789")}})


def plan_of(config, samples, levels):
    """The samples of every step, with prompts and weights as the objective has them; the weights of a step have mean 1."""
    if config.objective == "filter":
        samples = sorted(samples, key=lambda sample: -sample.reward)[:max(1, round(config.share * len(samples)))]
    if config.objective == "dt":
        samples = [sample._replace(prompt=sample.prompt + tag(levels, sample.reward)) for sample in samples]
    plan = common.plan_of(samples, config)
    for step in plan if config.objective == "rwr" else ():
        weights = rwr_weights(torch.tensor([sample.reward for sample in step]), config.beta) * len(step)
        step[:] = [sample._replace(weight=weight) for sample, weight in zip(step, weights.tolist())]
    return plan


def train(run, plan, levels, held_out, reward):
    """Minimise the weighted negative log-likelihood; after the last step, choose what a conditioned policy is asked for."""
    config, top = run.config, len(levels["means"]) - 1
    run.state["level"] = common.parse_request(config.steer, {"reward": top}).get("reward", top)
    if config.objective == "dt":
        run.ask = lambda prompt: prompt + tag(levels, levels["means"][run.state["level"]])

    def losses_of(rows, batch):
        nll = -common.sequence_logps(run.policy, batch)                                           # [n], the tag not in it
        weights = torch.tensor([row.weight for row in rows], device=nll.device)
        return weights * nll, {"nll": nll}

    def measure():
        if config.objective == "dt":
            return calibration_metrics(run, levels, reward)
        shares = [effective_share(torch.tensor([row.weight for row in rows])).item() for rows in plan]
        return {"eval/effective_share": statistics.fmean(shares)}

    for step, rows in common.steps(run, plan, measure):
        common.log(run, step, common.minimise(run, step, rows, losses_of))
        if step == len(plan) - 1 and config.objective == "dt" and not config.steer and reward and held_out:
            asked = calibration(run, levels, levels["means"], held_out * 4, reward)
            run.state["level"] = max(range(top + 1), key=lambda level: asked[level]["reward"])


def calibration(run, levels, rewards, prompts, reward):
    """Ask every prompt for each of the rewards: rows of common.curve with the mean reward and gold that came, as far as known."""
    def measure(texts, ended):
        came = {"reward": reward(prompts, texts).mean().item()} if reward else {}
        return came | ({"gold": statistics.fmean(map(run.task.gold, prompts, texts, ended))} if run.task.gold else {})

    return common.curve(run, [(r, [prompt + tag(levels, r) for prompt in prompts]) for r in rewards], measure)


def calibration_metrics(run, levels, reward):
    """Does a trained policy give what it is asked for? Slopes and rank correlations on test prompts. {} before training.

    As text it is also asked for more than any sample has, up to 3 deviations above the highest level.
    """
    if not run.trace:
        return {}
    n, top = len(levels["means"]), levels["means"][-1]
    beyond = [top + more for more in (0.5, 1.0, 2.0, 3.0)] if levels["control"] == "text" else []
    prompts = run.task.prompts["test"][:run.config.eval_prompts]
    rows = run.state["calibration"] = calibration(run, levels, levels["means"] + beyond, prompts, reward)
    metrics = {"eval/level": run.state["level"]}
    for name in [name for name in rows[0] if name != "asked"]:
        came = [row[name] for row in rows[:n]]
        metrics |= {f"eval/slope_{name}": common.slope(rows[:n], name), f"eval/spearman_{name}": common.spearman(came)}
    if beyond and run.task.gold:
        metrics["eval/gold_beyond"] = rows[-1]["gold"] - rows[n - 1]["gold"]
    return metrics


def run(config):
    """One training run, or with --prompt one question to a trained policy; returns the metrics after it."""
    if config.prompt:
        return steer(config)
    run = common.start(config)
    reward = common.candidate_reward(run, config.sources)
    samples, held_out = offline_samples(run, reward)
    levels = levels_of(config, samples)
    common.begin(run)
    if config.objective == "dt":
        learn_tags(run, levels, samples)
    plan = plan_of(config, samples, levels)
    train(run, plan, levels, held_out, reward or run.rewards.get("proxy"))
    metrics = common.finish(run)
    if config.objective != "dt":
        return metrics
    common.write_json(run.out / "attributes.json", levels | {"method": "decision_transformer", "chat": config.chat,
                      "levels": {"reward": len(levels["means"]) - 1}, "asked": run.state["level"]})
    rows = run.state.get("calibration", [])
    if rows and not config.quiet:
        print(common.table([list(rows[0]), *(row.values() for row in rows)]))
    return metrics | {"calibration": rows}


def steer(config):
    """Print responses of a trained policy to --prompt, asked for --steer, or for the level that was chosen when it was trained."""
    common.complete_prompt(config, "decision_transformer", lambda saved, request: tag(
        saved, saved["means"][request.get("reward", saved["asked"])]))
    return {}


# Each objective with the settings that were best for it on validation seed 100.
SFT = {"objective": "sft", "lr": 5e-4, "epochs": 2}
FILTER = {"objective": "filter", "lr": 1e-3, "epochs": 4}
RWR = {"objective": "rwr", "lr": 1e-3, "epochs": 2}
NOISE = {"reward_noise": "prompt"}
DATA = {f"{k} of each": {"candidates": k} for k in (2, 16)} | {
    f"{writer} writers": {"sources": "P", "systems": f"{writer},medium"} for writer in ("weak", "strong")}

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/effective_share": "effective", "eval/slope_reward": "slope", "eval/spearman_reward": "rank corr."}


def more_gold(claim, source, paper, *holds):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=list(holds))


EXPERIMENTS = {
    "objectives": dict(
        question="What can be made of one set of scored samples, and does it replace PPO?",
        arms={"start": {"epochs": 0, "objective": "sft"}, "SFT on all": SFT, "filter": FILTER}
        | {f"RWR beta {beta:g}": RWR | {"beta": beta} for beta in (0.1, 0.3, 1.0, 3.0)}
        | {"DT": {}, "DT, reward as text": {"control": "text"}, "PPO": {"method": "ppo"},
           "PPO, as many samples": {"method": "ppo", "epochs": 8}},
        columns=COLUMNS,
        claims=[
            more_gold("conditioning beats SFT on everything", "abstract", "no number checked:", ("DT", ">", "SFT on all")),
            more_gold("and the other objectives", "abstract", "no number checked:", ("DT", ">", "filter"), ("DT", ">", "RWR beta 0.1")),
            more_gold("or filtering is as good or better (within 0.05)", "2507.10174", "reported in", ("filter", ">", "DT", -0.05)),
            more_gold("it beats PPO", "abstract", "no number checked:", ("DT", ">", "PPO")),
            more_gold("and PPO that scores as many samples", "ours", "-", ("DT", ">", "PPO, as many samples")),
            dict(claim="what is asked for comes: rank correlation of bin and reward above 0.8", source="DT", paper="plots only:",
                 metric="eval/spearman_reward", holds=[("DT", ">", 0.8)]),
            dict(claim="and of bin and gold", source="ours", paper="-", metric="eval/spearman_gold", holds=[("DT", ">", 0.8)]),
            dict(claim="3 deviations more than the best bin give no more gold", source="DT's code, issue 37", paper="mixed reports in",
                 metric="eval/gold_beyond", holds=[("DT, reward as text", "<", 0.0)]),
            dict(claim="RWR at beta 0.1 learns from a tenth of the samples or less", source="ours", paper="-",
                 metric="eval/effective_share", holds=[("RWR beta 0.1", "<", 0.1)]),
            more_gold("and a beta in between is best", "ours", "-", *(("RWR beta 0.3", ">", f"RWR beta {beta}") for beta in (0.1, 3))),
        ],
        panels=[dict(kind="curve", curve="calibration", x="asked", y=["reward", "gold"], arms=["DT", "DT, reward as text"],
                     title="what comes for the reward asked for"),
                dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward")],
    ),
    "data": dict(
        question="How do size and quality of the data matter, and what is a reward to be compared with?",
        arms={f"{name}, {data}": settings | source for data, source in DATA.items() for name, settings in (("filter", FILTER), ("DT", {}))}
        | {"DT, shifted rewards": NOISE, "DT, shifted, per prompt": NOISE | {"normalise": "prompt"},
           "DT, per prompt": {"normalise": "prompt"}, "DT": {}, "filter": FILTER},
        columns=COLUMNS,
        claims=[
            more_gold("it needs more data than filtering: behind with 2 samples a prompt", "2305.14550", "reported in",
                      ("filter, 2 of each", ">", "DT, 2 of each")),
            more_gold("more data helps it", "2305.14550", "reported in", ("DT, 16 of each", ">", "DT"), ("DT", ">", "DT, 2 of each")),
            more_gold("it stands bad data better", "2305.14550", "reported in", ("DT, weak writers", ">", "filter, weak writers")),
            more_gold("a shift of each prompt's rewards hurts it", "ours", "-", ("DT", ">", "DT, shifted rewards")),
            more_gold("unless compared within a prompt", "ours", "-", ("DT, shifted, per prompt", ">", "DT, shifted rewards")),
        ],
        panels=[dict(kind="bars", y=["eval/gold", "eval/proxy"], title="gold and proxy reward"),
                dict(kind="curve", curve="calibration", x="asked", y=["reward"], title="reward that came",
                     arms=["DT, 2 of each", "DT", "DT, 16 of each", "DT, shifted rewards", "DT, shifted, per prompt"])],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
