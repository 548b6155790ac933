"""The steps of any training, the two stages that every method starts from (SFT, reward model), and what methods train on:
the reward to maximise, the policy's own samples, scored candidates.

Methods see all of this as `common.<name>`.
"""
import math
import random
import time
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from lm import batches, decode, encode, finished, generate, sequence_logps, sequence_scores, warn
from tasks import Ranking, UserError


def epochs(n, config):
    """Index lists of one optimizer step each: config.epochs passes over range(n), every pass in a new order."""
    rng, order = random.Random(config.seed), []
    for _ in range(math.ceil(config.epochs)):
        order += rng.sample(range(n), n)
    order = order[:round(config.epochs * n)]
    return [order[i:i + config.batch_size] for i in range(0, len(order), config.batch_size)]


def plan_of(rows, config):
    """The rows of each optimizer step: config.epochs passes over them, every pass in a new order."""
    return [[rows[i] for i in step] for step in epochs(len(rows), config)]


def optimizer_and_schedule(model, config, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = round(config.warmup * steps)
    return optimizer, transformers.get_scheduler(config.schedule, optimizer, warmup, max(steps, 1))


def optimizer_step(model, optimizer, schedule, config):
    """Clip, step, clear; returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    return norm.item()


def check_finite(values, step, prompts, name="loss"):
    """Stop the run, naming step and example, when one of the values [n] is not finite."""
    for value, prompt in zip(values.tolist(), prompts):
        if not math.isfinite(value):
            raise UserError(f"step {step}: {name} is {value} for the prompt {prompt!r}; lower --lr, or mend the data or "
                            "the reward")


def fit(model, tokenizer, rows, losses_of, config, title):
    """Plain training for the stages before a method: rows of (prompt, responses), losses_of(model, batch, part) -> [n], where
    part lists which n of the rows the batch holds."""
    plan = epochs(len(rows), config)
    optimizer, schedule = optimizer_and_schedule(model, config, len(plan))
    for step, indices in enumerate(tqdm(plan, title, leave=False, disable=None)):
        prompts, responses = zip(*(rows[i] for i in indices))
        for part, batch in batches(tokenizer, prompts, responses, config.token_budget, model.device):
            losses = losses_of(model, batch, [indices[i] for i in part])
            check_finite(losses, step + 1, [prompts[i] for i in part])
            (losses.sum() / len(indices)).backward()
        optimizer_step(model, optimizer, schedule, config)
    return model


def train_sft(model, tokenizer, demonstrations, config):
    """Maximum likelihood of the responses: summed over tokens, averaged over examples."""
    return fit(model, tokenizer, [(d.prompt, [d.response]) for d in demonstrations],
               lambda model, batch, _: -sequence_logps(model, batch), config, "SFT")


def reward_model_losses(model, batch):
    """Bradley-Terry: -log sigmoid(r(chosen) - r(rejected)) of each pair [n]; rows are chosen, rejected by turns."""
    chosen, rejected = sequence_scores(model, batch).view(-1, 2).unbind(1)
    return -F.logsigmoid(chosen - rejected)


def train_reward_model(model, tokenizer, pairs, config):
    """Fit a sequence-classification model with one label to preference pairs."""
    return fit(model, tokenizer, [(p.prompt, [p.chosen, p.rejected]) for p in pairs],
               lambda model, batch, _: reward_model_losses(model, batch), config, "reward model")


def train_attribute_model(model, tokenizer, demonstrations, names, config):
    """Fit a sequence-classification model with a label for each of the names to people's ratings of them, levels 0 to 9: the
    squared error, with levels scaled to [0, 1] and summed over the names."""
    targets = torch.tensor([[d.attributes[name] / 9 for name in names] for d in demonstrations], device=model.device)  # [N, names]
    return fit(model, tokenizer, [(d.prompt, [d.response]) for d in demonstrations],
               lambda model, batch, part: (sequence_scores(model, batch) - targets[part]).square().sum(1), config, "prediction model")


# --------------------------------------------------------------------------------------- rows: pairs, rankings, one response

def row_batches(run, rows):
    """Token-budget batches of rows (Pair, Ranking): (indices [n], Batch [n*k, T]), the k responses of a row together."""
    return batches(run.tokenizer, [row.prompt for row in rows], [row.responses for row in rows], run.config.token_budget,
                   run.policy.device, [row.ended for row in rows])


@torch.no_grad()
def response_logps(run, rows, model=None):
    """log pi(y|x) of every response, EOS included, and its tokens |y|: two tensors [N, k], for rows of k responses each.

    Of the policy as it is now, unless another model is given.
    """
    model = model or run.policy
    values = torch.zeros(2, len(rows), len(rows[0].responses) if rows else 0, device=model.device)
    for part, batch in row_batches(run, rows):
        values[:, part] = torch.stack([sequence_logps(model, batch), batch.lengths.float()]).view(2, len(part), -1)
    return values.unbind()


def minimise(run, step, rows, losses_of):
    """One optimizer step on the mean loss of the rows, in parts that fit the token budget; returns what to log.

    losses_of(part, batch) -> (losses [n], {name: values [n] to log}) for part, a list of n of the rows, and its Batch
    [n*k, T] on the policy's device, the k responses of a row together.
    """
    seen = {}
    for indices, batch in row_batches(run, rows):
        part = [rows[i] for i in indices]
        losses, metrics = losses_of(part, batch)
        check_finite(losses, step + 1, [row.prompt for row in part])
        (losses.sum() / len(rows)).backward()                      # the mean over the step's rows, in parts
        run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        for name, values in ({"loss": losses} | metrics).items():
            seen.setdefault(name, []).append(values.detach().float())
    norm = optimizer_step(run.policy, run.optimizer, run.schedule, run.config)
    return {name: torch.cat(values).mean() for name, values in seen.items()} | {"grad_norm": norm}


# ------------------------------------------------------------------------------------------------------------- rewards

@dataclass
class TrueReward:
    """The task's gold reward, called like a RewardModel; it reads complete responses."""
    gold: Callable
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, prompts, responses):
        return (torch.tensor([self.gold(*row, True) for row in zip(prompts, responses)]) - self.mean) / self.std


@dataclass
class NoisyReward:
    """A reward with noise of deviation 1 in its own units: the same for all responses to a prompt, or one for each response."""
    reward: Callable
    kind: str                                                        # "prompt" or "response"
    seed: int

    def __call__(self, prompts, responses):
        keys = prompts if self.kind == "prompt" else zip(prompts, responses)
        noise = torch.tensor([random.Random(f"{self.seed} {key}").gauss(0, 1) for key in keys], dtype=torch.float64)
        return self.reward(prompts, responses) + noise                # float64: a shift turns no two scores round


def reward_to_maximise(run):
    """The reward of `scaled_reward`, with the noise of --reward_noise."""
    reward, kind = scaled_reward(run), run.config.reward_noise
    return NoisyReward(reward, kind, run.config.seed) if kind != "none" else reward


def scaled_reward(run):
    """The function (prompts, responses) -> rewards [N] that a method optimises: the proxy, or with --reward gold the truth.

    Either has mean 0 and deviation 1 on samples of the initial policy (Huang et al. 2023, "reward normalization"), so
    that one KL coefficient means the same for every reward. A reward model without a scale of its own is given one here.
    """
    if run.config.reward == "gold":
        reward = TrueReward(run.task.gold)
    elif "proxy" not in run.rewards:
        raise UserError("there is no reward to maximise: give --reward, or data with pairs to train a reward model from")
    else:
        reward = run.rewards["proxy"]
        if hasattr(reward.model.config, "reward_scale"):
            return reward
    config, prompts = run.config, run.task.prompts["train"][:run.config.batch_size]
    torch.manual_seed(config.seed)                                   # whatever was trained or loaded from the cache before
    samples = generate(run.policy, run.tokenizer, prompts, 4, config.temperature, max_new_tokens=config.max_new_tokens)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = reward(prompts, decode(run.tokenizer, samples))
    check_finite(scores, 0, prompts, "the reward")
    if scores.max() == scores.min():
        raise UserError(f"the reward is {scores[0]:.3g} for each of the policy's {len(scores)} first samples: no signal")
    reward.mean, reward.std = scores.mean().item(), scores.std().item()
    return reward


# -------------------------------------------------------------------------------------------------- samples, candidates

def check_policy(run):
    """A policy that has become nan would crash the sampling: say so here, in one line."""
    prompt = (run.task.prompts["train"] + run.task.prompts["test"])[0]
    with torch.no_grad():
        probe = sequence_logps(run.policy, encode(run.tokenizer, [prompt], [""]).to(run.policy.device))
    check_finite(probe, run.step, [prompt], "the policy's log-prob")


def rollout(run, prompts, greedy=False):
    """The policy's own responses to the prompts as it is now: (Batch on the CPU, texts, did each end with EOS? [N])."""
    config, began = run.config, time.time()
    check_policy(run)
    batch = generate(run.policy, run.tokenizer, prompts, 1, config.temperature, greedy, config.max_new_tokens)
    run.counts["seconds_generating"] += time.time() - began
    if run.bar is None:                                              # before the first step; after that steps() keeps the time
        run.counts["seconds_training"] += time.time() - began
    run.counts["tokens_generated"] += int(batch.lengths.sum())
    responses, ended = decode(run.tokenizer, batch), finished(run.tokenizer, batch)
    empty = sum(not text.strip() for text in responses)
    if (not ended.any() or empty == len(responses)) and not run.warned:
        run.warned = True
        warn(f"step {run.step + 1}: {int(ended.sum())} of {len(responses)} responses end with EOS, {empty} are empty (said "
             f"once); --max_new_tokens is {config.max_new_tokens}")
    return batch, responses, ended


def sample_rankings(run, prompts, n):
    """n responses of the policy as it is now to each prompt: Rankings without scores.

    As long as the policy is the one that the task's pool was sampled from, the pool serves, as far as it goes.
    """
    config, pool = run.config, run.task.pool
    fresh = run.step == 0 and not config.policy and config.temperature == 1
    if fresh and all(len(pool.get(prompt, [])) >= n for prompt in prompts):
        return [Ranking(prompt, pool[prompt][:n], [], ended=[True] * n) for prompt in prompts]
    _, texts, ended = rollout(run, [prompt for prompt in prompts for _ in range(n)])
    rows = [slice(i * n, i * n + n) for i in range(len(prompts))]
    return [Ranking(prompt, texts[row], [], ended=ended[row].tolist()) for prompt, row in zip(prompts, rows)]


def distinct(ranking):
    """The ranking with the first of equal responses alone."""
    prompt, responses, *lists = ranking
    keep = [i for i, text in enumerate(responses) if text not in responses[:i]]
    return Ranking(prompt, *([values[i] for i in keep] if values else [] for values in (responses, *lists)))


def scored(rankings, reward, step=0):
    """The rankings with the reward's scores in place of their own. UserError for a score that is not finite."""
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    scores = reward(prompts, [text for ranking in rankings for text in ranking.responses])
    check_finite(scores, step, prompts, "the reward")
    scores = iter(scores.tolist())
    return [ranking._replace(scores=[next(scores) for _ in ranking.responses]) for ranking in rankings]


def candidate_reward(run, sources):
    """What scores the candidates: the reward to maximise. None where the data's own scores do, because its answers stand
    alone (sources P) and no reward is named; the embedded task's scores are gold, which no method may see."""
    config = run.config
    own = sources == "P" and not run.task.gold and config.reward in ("", "none") and config.reward_noise == "none"
    return None if own else reward_to_maximise(run)


def given_answers(task, sources, systems=""):
    """The data's own answers to train prompts, if `sources` has a P; of the writers "A,B" only, where the data names them.

    Raises UserError where there are none.
    """
    known, wanted, given = set(task.prompts["train"]), set(filter(None, systems.split(","))), []
    for row in task.rankings.get("train", []) if "P" in sources else []:
        keep = [i for i in range(len(row.responses)) if not wanted or not row.systems or row.systems[i] in wanted]
        if keep and row.prompt in known:
            given.append(Ranking(row.prompt, [row.responses[i] for i in keep], [row.scores[i] for i in keep],
                                 ended=[True] * len(keep)))
    if "P" in sources and not given:
        names = ", ".join(sorted({name for row in task.rankings.get("train", []) for name in row.systems})) or "no writers"
        raise UserError(f"the data has no answers of its own{' by ' + systems if systems else ''} to rank (it names {names}): "
                        "--sources D samples them from the policy")
    return given


def candidates(run, reward, given, n):
    """Scored candidates: n samples of the policy as it is now for each prompt, beside the given answers.

    Args: reward: from candidate_reward; given: from given_answers; where it is empty, the prompts are the train prompts.
    Returns: one Ranking a prompt, in order, each response once; those with nothing to rank are counted on the screen.
    """
    rankings = sample_rankings(run, [row.prompt for row in given] or run.task.prompts["train"], n) if n else given
    if given and n:
        rankings = [Ranking(row.prompt, row.responses + more.responses, [], ended=row.ended + more.ended)
                    for row, more in zip(rankings, given)]
    rankings = [distinct(row) for row in rankings]
    rankings = scored(rankings, reward, run.step) if reward else rankings
    report_flaws(rankings)
    return rankings


def score_metrics(run, pairs):
    """Of held-out pairs under the policy: how often the chosen answer has the higher log-prob per token, and the nll of a token
    of the chosen answers, in nats. {} without pairs."""
    if not pairs:
        return {}
    logps, lengths = response_logps(run, pairs)                                                       # [N, 2]
    chosen, rejected = (logps / lengths).unbind(1)
    return {"eval/score_accuracy": ((chosen > rejected) + 0.5 * (chosen == rejected)).mean().item(),
            "eval/nll": -(logps[:, 0].sum() / lengths[:, 0].sum()).item()}


def report_flaws(rankings):
    """Say how many rankings have nothing to rank."""
    single = sum(len(row.responses) < 2 for row in rankings)
    tied = sum(len(set(row.scores)) < 2 for row in rankings) - single
    if single or tied:
        warn(f"of {len(rankings)} rankings, {single} have one response only and {tied} have equal scores throughout: no order to "
             "learn there")
