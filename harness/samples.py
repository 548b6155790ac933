"""What methods train on: samples of the policy, the task's pool of them, scored candidates, log-probs.

Costs are counted in run.counts here: tokens generated, the pool's too, and tokens that reward and reference
read. Tokens of evaluations are not counted.
"""
import time

import torch

import common
from common import UserError, warn
from harness import progress, ranks
from harness.evaluation import check_policy, held_out
from harness.directory import kept
from harness.loading import demonstrations
from harness.rewards import reward_to_maximise
from harness.stages import check_finite
from tasks import Ranking


def rollout(run, prompts, greedy=False):
    """One response of the current policy to each prompt: (Batch on the CPU, texts, ended with EOS? [N])."""
    config, began = run.config, time.time()
    check_policy(run.policy, run.tokenizer, run.task, run.step)
    batch = ranks.generate(run.policy, run.tokenizer, prompts, 1, config.temperature, greedy,
                           config.max_new_tokens)
    run.counts["seconds_generating"] += time.time() - began
    run.counts["tokens_generated"] += int(batch.lengths.sum())
    responses, ended = common.decode(run.tokenizer, batch), common.finished(run.tokenizer, batch)
    empty = sum(not text.strip() for text in responses)
    if (not ended.any() or empty == len(responses)) and not run.warned:
        run.warned = True
        warn(f"step {run.step + 1}: {int(ended.sum())} of {len(responses)} responses end with EOS, {empty} "
             f"are empty (said once); --max_new_tokens is {config.max_new_tokens}")
    return batch, responses, ended


def sample_rankings(run, prompts, n):
    """n responses of the policy, as it is now, to each prompt: Rankings without scores.

    While the policy is still the one that the task's pool was sampled from, the pool is used, as far as it
    goes.
    """
    config, pool = run.config, run.task.pool
    fresh = run.step == 0 and not config.policy and config.temperature == 1
    if fresh and all(prompt in pool and len(pool[prompt].responses) >= n for prompt in prompts):
        rows = [Ranking(prompt, pool[prompt].responses[:n], [], ended=pool[prompt].ended[:n])
                for prompt in prompts]
        texts = [text for row in rows for text in row.responses]
        ids = run.tokenizer(texts, add_special_tokens=False).input_ids
        for name in ("tokens_generated", "tokens_of_pool"):
            run.counts[name] += sum(map(len, ids)) + sum(sum(row.ended) for row in rows)               # EOS
        return rows
    _, texts, ended = rollout(run, [prompt for prompt in prompts for _ in range(n)])
    rows = [slice(i * n, i * n + n) for i in range(len(prompts))]
    return [Ranking(prompt, texts[row], [], ended=ended[row].tolist()) for prompt, row in zip(prompts, rows)]


def distinct(ranking):
    """The ranking with only the first of equal responses."""
    prompt, responses, *lists = ranking
    keep = [i for i, text in enumerate(responses) if text not in responses[:i]]
    return Ranking(prompt, *([values[i] for i in keep] if values else [] for values in (responses, *lists)))


def score(run, reward, prompts, responses):
    """Rewards [N] of texts, which are read as complete. UserError where one is not finite."""
    model = getattr(reward, "reward", reward)                                            # below its noise
    before = getattr(model, "tokens", 0)
    scores = reward(prompts, responses)
    check_finite(scores.view(len(scores), -1).sum(1), run.step + 1, prompts, "the reward")
    run.counts["tokens_scored_reward"] += getattr(model, "tokens", 0) - before
    return scores


def scored(run, rankings, reward):
    """The rankings with the reward's scores in place of their own."""
    prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
    texts = [text for ranking in rankings for text in ranking.responses]
    scores = iter(score(run, reward, prompts, texts).tolist())
    return [ranking._replace(scores=[next(scores) for _ in ranking.responses]) for ranking in rankings]


def scored_demonstrations(run, reward, n):
    """The first n demonstrations, and a file's rated responses, as scored Rankings of one response each."""
    rows = sum(demonstrations(run.config, run.task, n), [])
    if not rows:
        raise UserError("the data has no demonstrations: give rows of prompt and completion")
    return scored(run, [Ranking(row.prompt, [row.response], [], ended=[True]) for row in rows], reward)


def candidate_reward(run, sources):
    """What scores the candidates: the reward to maximise.

    None where the data's own scores are used: its answers are the only candidates (sources P) and no reward
    is named. The embedded task's own scores are gold, which no method may see.
    """
    config = run.config
    unnamed = config.reward in ("", "none") and config.reward_noise == "none"
    theirs = config.gold or not run.task.gold                          # the scores are the data's, not gold
    return None if sources == "P" and theirs and unnamed else reward_to_maximise(run)


def given_answers(task, sources, systems=""):
    """The data's own answers to train prompts, if `sources` has a P; only of the writers "A,B" if given.

    Raises UserError where there are none.
    """
    known, wanted, given = set(task.prompts["train"]), set(filter(None, systems.split(","))), []
    for row in task.rankings.get("train", []) if "P" in sources else []:
        keep = [i for i in range(len(row.responses))
                if not wanted or not row.systems or row.systems[i] in wanted]
        if keep and row.prompt in known:
            given.append(Ranking(row.prompt, [row.responses[i] for i in keep], [row.scores[i] for i in keep],
                                 ended=[True] * len(keep)))
    if "P" in sources and not given:
        names = sorted({name for row in task.rankings.get("train", []) for name in row.systems})
        raise UserError(f"the data has no answers of its own{' by ' + systems if systems else ''} to rank "
                        f"(it names {', '.join(names) or 'no writers'}): "
                        "--sources D samples them from the policy")
    return given


def candidates(run, reward, given, n):
    """Scored candidates: n samples of the policy, as it is now, for each prompt, and the given answers.

    Args: reward: from candidate_reward; given: from given_answers; where it is empty, all train prompts are
    used.
    Returns: one Ranking a prompt, in order, each response once; those with nothing to rank are counted on the
    screen.
    """
    return kept(run, f"candidates-{run.step}", lambda: scored_candidates(run, reward, given, n))


def scored_candidates(run, reward, given, n):
    """What candidates() returns, made anew."""
    prompts = [row.prompt for row in given] or run.task.prompts["train"]
    rankings = sample_rankings(run, prompts, n) if n else given
    if given and n:
        rankings = [Ranking(row.prompt, row.responses + more.responses, [], ended=row.ended + more.ended)
                    for row, more in zip(rankings, given)]
    rankings = [distinct(row) for row in rankings]
    rankings = scored(run, rankings, reward) if reward else rankings
    single = sum(len(row.responses) < 2 for row in rankings)
    tied = sum(len(set(row.scores)) < 2 for row in rankings) - single
    if single or tied:
        warn(f"of {len(rankings)} rankings, {single} have one response only and {tied} have equal scores "
             "throughout: no order to learn there")
    return rankings


@torch.no_grad()
def response_logps(run, rows, model=None, counted=""):
    """log pi(y|x) of every response, EOS included, and its length |y| in tokens: two tensors [N, k].

    Without gradient. Of the policy as it is now, unless another model is given. The tokens that are read are
    added to run.counts[counted].
    """
    model = model or run.policy
    values = torch.zeros(2, len(rows), len(rows[0].responses) if rows else 0, device=model.device)
    for part, batch in progress.over(run.microbatches(rows), len(rows), "log-probs"):
        logps = common.sequence_logps(model, batch)
        values[:, part] += run.weight * torch.stack([logps, batch.lengths.float()]).view(2, len(part), -1)
        if counted:
            run.counts[counted] += int(batch.attention_mask.sum())
    return run.total(values).unbind()


def score_metrics(run, pairs):
    """Held-out pairs under the policy: {} without pairs, else

    eval/score_accuracy: how often the chosen answer has the higher log-prob per token; a tie counts half.
    eval/nll: mean negative log-likelihood of a token of the chosen answers, in nats.
    """
    if not pairs:
        return {}
    logps, lengths = response_logps(run, pairs)                                                       # [N, 2]
    chosen, rejected = (logps / lengths).unbind(1)
    return held_out({"score_accuracy": (chosen > rejected) + 0.5 * (chosen == rejected)}) | {
        "eval/nll": -(logps[:, 0].sum() / lengths[:, 0].sum()).item()}
