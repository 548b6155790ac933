"""What a policy that is conditioned on attributes needs around it: tags in prompts, and what they bring.

A conditioned policy reads what is wanted of its response as tags after the prompt: "mention the
songs:<sentiment:9><verbosity:0>". They stand in the prompt, so no loss ever falls on them. Training and
inference write them through one function of the method.
"""
import math
import random
import statistics
from collections import Counter

import torch

import common
from common import UserError, warn
from harness.evaluation import extend_vocabulary, probe
from tasks import words


def add_tags(run, attributes):
    """Make each tag one token of the policy and its tokenizer; known ones stay as they are.

    attributes: {attribute: {tag: the responses that carry it}}. A tag starts where prompts end, moved towards
    the words of its responses as far as these differ from the others': it is looked at like the end of a
    prompt, and read like a word of its kind. (Drawn at random, tags went unnoticed for epochs.) Without
    responses, a tag differs from the others by noise.
    """
    old, generator = run.policy.get_input_embeddings().weight.detach(), torch.Generator().manual_seed(0)
    words = {tag for tags in attributes.values() for tag in tags}
    if hasattr(old, "full_tensor") and not words <= {*run.tokenizer.get_vocab()}:                # in shards
        raise UserError("a model in shards takes no new tokens for tags: leave out --shard, or take a model "
                        "whose tokenizer can spell them (decision_transformer.py: with --control text)")

    def tokens_of(texts):
        return sum(run.tokenizer(texts, add_special_tokens=False).input_ids, []) if texts else []

    end = torch.stack([old[tokens_of([prompt])[-1]] for prompt in run.task.prompts["train"]]).mean(0)
    usual, starts = old.norm(dim=1).mean(), {}
    for tags in attributes.values():
        words = [tokens_of(texts) for texts in tags.values()]
        every = sum(words, [])
        noise = torch.randn(len(tags), old.shape[1], generator=generator).to(old) * old.std(0)
        away = torch.stack([old[own].mean(0) - old[every].mean(0) if own else row * (not every)
                            for own, row in zip(words, noise)])
        furthest = away.norm(dim=1).max()
        starts |= zip(tags, end + (away * usual / furthest if furthest > 1e-5 * usual else 0 * away))
    new = [tag for tag in starts if tag not in run.tokenizer.get_vocab()]
    if new:
        run.tokenizer.add_tokens(new)
        rows, first = torch.stack([starts[tag] for tag in new]), run.tokenizer.convert_tokens_to_ids(new[0])
        run.policy.embeddings_came = 0                          # no adapter holds them: it is saved merged
        spare = min(max(len(old) - first, 0), len(new))         # some models have more embeddings than tokens
        run.policy.get_input_embeddings().weight.data[first:first + spare] = rows[:spare]
        if spare < len(new):
            extend_vocabulary(run.policy, rows[spare:])


def rated_rows(task, split, attributes=""):
    """The split's responses with people's ratings of these attributes ("A,B"), or of all; [] if unrated.

    UserError for no ratings to train on, a response without one of the attributes, a level beyond 0 to 9, or
    an attribute that was asked for and never varies in training. Others that never vary are left out.
    """
    rows = task.ratings.get(split, [])
    if not rows and split == "train":
        raise UserError('the data has no ratings: give rows of "prompt", "completion" and "attributes", or '
                        "responses with scores")
    first = (task.ratings.get("train", []) + rows)[:1]
    names = [name.strip() for name in attributes.split(",")] if attributes else sorted(
        name for row in first for name in row.attributes)
    for row in rows:
        for name in names:
            if name not in row.attributes:
                raise UserError(f"a response to {row.prompt!r} has no attribute {name!r}, only "
                                f"{', '.join(row.attributes)}")
            if not 0 <= row.attributes[name] <= 9:
                raise UserError(f"{name} is {row.attributes[name]} in a response to {row.prompt!r}: levels "
                                "go from 0 to 9")
    known = task.ratings.get("train", [])
    constant = [name for name in names if len({row.attributes.get(name) for row in known}) == 1]
    if constant and split == "train":
        text = f"{constant[0]} is {rows[0].attributes[constant[0]]} in all {len(rows)} responses: nothing to"
        if attributes or constant == names:
            raise UserError(f"{text} steer by; leave it out of --attributes")
        warn(f"{text} steer by, so it is left out")
    names = [name for name in names if name not in constant]
    return [row._replace(attributes={name: row.attributes[name] for name in names}) for row in rows]


QUALITIES = "quality", "helpfulness", "score", "sentiment,topicality"         # what --quality is by default


def quality_of(config, names):
    """The attributes that stand for quality: the more the better."""
    for wanted in [config.quality] if config.quality else QUALITIES:
        wanted = [name.strip() for name in wanted.split(",")]
        if set(wanted) <= set(names):
            return wanted
    raise UserError(f"--quality must name what is better the more there is of it, of {', '.join(names)}")


def levels_by_rank(scores, ratings, top):
    """The function from scores [M, names] to [{name: level}] that gives each level as often as ratings do.

    scores: [N, names], of the N rated responses; ratings: [{name: level}] of them, in any order of names.
    A level's lower edge is the quantile of the scores that has as large a share of them below it as people
    gave lower levels.
    """
    names = sorted(ratings[0])
    levels = torch.tensor([[row[name] for name in names] for row in ratings])
    below = torch.stack([(levels < level).float().mean(0) for level in range(1, top + 1)])      # [top, names]
    edges = torch.stack([column.quantile(shares) for column, shares in zip(scores.T, below.T)])
    edges[below.T == 0], edges[below.T == 1] = -math.inf, math.inf                      # levels nobody gave

    def to_levels(new):
        found = torch.searchsorted(edges, new.T.contiguous())
        return [dict(zip(names, row)) for row in found.T.tolist()]

    return to_levels


def check_ratings(levels):
    """UserError or warnings for what a prediction model gave: [{name: level}], None where unreadable."""
    known, n = [row for row in levels if row], len(levels)
    if not known:
        raise UserError("the prediction model wrote no readable rating: train it longer, or take --predictor "
                        "regression")
    for name, level in known[0].items():
        if all(row[name] == level for row in known):
            warn(f"the prediction model says {name} {level} of all {len(known)} responses: nothing to steer "
                 "by; train it longer, or take --labels human")
    if len(known) < n:
        warn(f"{n - len(known)} of {n} ratings by the prediction model cannot be read: left out")


def true_levels(task, names):
    """The function (prompts, responses) -> [{name: level}] that knows the truth; None where nothing does."""
    def judge(prompts, responses):
        return [{name: levels[name] for name in names} for levels in map(task.attributes, prompts, responses)]

    return judge if task.attributes else None


def rating_error(samples, judge):
    """Mean distance of the samples' levels from those that judge(prompts, responses) gives; nan if none."""
    levels = judge([row.prompt for row in samples], [row.responses[0] for row in samples])
    gaps = [abs(given[name] - row.levels[name])
            for row, given in zip(samples, levels) if given for name in given]
    return statistics.fmean(gaps) if gaps else math.nan


def label_errors(run, ratings, samples, held_out, predict, truth):
    """Metrics of labels, as far as they can be known: predictor_error, of predictions for held-out responses
    against people's levels; human_error and label_error, of people's and the samples' levels against the
    truth. No cost of training."""
    with run.aside():
        errors = {"eval/predictor_error": rating_error(held_out, predict)} if predict and held_out else {}
        return errors | ({"eval/human_error": rating_error(ratings, truth),
                          "eval/label_error": rating_error(samples, truth)} if truth else {})


def curve(run, asked, measure):
    """What each request brings: [{"asked", "words": mean length, and what measure(texts, ended) returns}].

    asked: [(what it is called, the prompts that ask for it)].
    """
    rows = []
    for name, prompts in asked:
        texts, ended = probe(run, prompts)
        length = statistics.fmean(len(words(text)) for text in texts)
        rows.append({"asked": name, "words": length} | measure(texts, ended.tolist()))
    return rows


def reward_curve(run, asked, prompts, reward):
    """curve with the mean reward and gold of the responses to the prompts (without tags), where known."""
    def measure(texts, ended):
        found = {"reward": reward(prompts, texts).mean().item()} if reward else {}
        gold = run.task.gold
        return found | ({"gold": statistics.fmean(map(gold, prompts, texts, ended))} if gold else {})

    return curve(run, asked, measure)


def slope(rows, key):
    """By how much the key of a curve's rows rises for each unit asked for: least squares."""
    x, y = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("asked", key))
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


def spearman(values):
    """Rank correlation of values [N] with their places: 1 if they rise throughout, 0 if they are equal."""
    values, places = torch.tensor(values, dtype=torch.float64), torch.arange(len(values), dtype=torch.float64)
    equal = values[:, None] == values
    ranks = ((values[:, None] > values).double() + equal / 2).sum(1)             # ties share their mean rank
    ranks, places = ranks - ranks.mean(), places - places.mean()
    return (ranks @ places / (ranks.norm() * places.norm()).clamp(min=1e-12)).item()


def trends(rows):
    """How each number of a curve's rows follows what was asked for: its slope and its rank correlation."""
    metrics = {}
    for name in [name for name in rows[0] if name != "asked"]:
        metrics[f"eval/slope_{name}"] = slope(rows, name)
        metrics[f"eval/spearman_{name}"] = spearman([row[name] for row in rows])
    return metrics


def steering(run, observed, write, judge):
    """Ask test prompts for levels 0, 3, 6 and 9 of each attribute; the others as in a response of the data.

    Args: observed: [{attribute: level}], one for each response in the data; write(levels): the tags that ask
        for them; judge(prompts, responses): the levels of each response, None where they are unknown.
    Returns: {"steering": {attribute asked for: rows of curve, with the mean level of every attribute},
        "matrix": {attribute asked for: {attribute: by how many levels it rises for each level asked for}},
        "followed": [{"asked": level, each attribute: its mean level where this level of it was asked for}]}.
    """
    prompts = run.task.prompts["test"][:run.config.eval_prompts]
    rng = random.Random(f"steering {run.config.seed}")
    counts = Counter(tuple(sorted(levels.items())) for levels in observed)
    others = [dict(levels) for levels in rng.choices(list(counts), list(counts.values()), k=len(prompts))]
    names = list(others[0])

    def measure(texts, ended):
        known = [levels for levels in judge(prompts, texts) if levels]
        return {name: statistics.fmean(levels[name] for levels in known) if known else math.nan
                for name in names}

    def asked(name, level):
        return level, [prompt + write(levels | {name: level}) for prompt, levels in zip(prompts, others)]

    found = {name: curve(run, [asked(name, level) for level in (0, 3, 6, 9)], measure) for name in names}
    followed = [{name: row[name] for name, row in zip(names, rows)} | {"asked": rows[0]["asked"]}
                for rows in zip(*found.values())]
    matrix = {name: {other: slope(found[name], other) for other in names} for name in names}
    return {"steering": found, "matrix": matrix, "followed": followed}


def steering_metrics(matrix):
    """Means over the matrix of steering.

    slope: by how much an attribute rises for each level asked for. cross_talk: how far the others move.
    """
    own = {name: matrix[name][name] for name in matrix}
    cross = [abs(matrix[name][other]) for name in matrix for other in matrix if other != name] or [0.0]
    return {"eval/slope": statistics.fmean(own.values()), "eval/slope_min": min(own.values()),
            "eval/cross_talk": statistics.fmean(cross)} | {f"eval/slope_{name}": v for name, v in own.items()}


def report_steering(run, asked):
    """The last steering into run.results, its matrix onto the screen; {} and nothing where there was none."""
    run.results |= {name: run.state.get(name, {}) for name in ("steering", "matrix", "followed")}
    if run.results["matrix"]:
        rows = [[name, *row.values()] for name, row in run.results["matrix"].items()]
        run.notes += [f"asked for {asked}; levels found for each level asked for, one attribute (row) at a "
                      "time:", table([["", *run.results["matrix"]], *rows])]


def table(lines, width=12):
    """Rows of cells as text, numbers with two digits."""
    def text(cell):
        return f"{cell:.2f}" if isinstance(cell, float) else str(cell)

    return "\n".join("".join(f"{text(cell):>{width}}" for cell in line) for line in lines)


def parse_request(text, known):
    """--steer "sentiment=9,humor=0" as {"sentiment": 9, "humor": 0}; known: {name: its highest level}."""
    request = {}
    for part in filter(None, text.split(",")):
        name, equals, level = (piece.strip() for piece in part.partition("="))
        if not equals or not level.isdecimal():
            raise UserError(f"--steer {text!r}: write it as NAME=LEVEL,NAME=LEVEL with whole levels")
        if name not in known:
            raise UserError(f"--steer {text!r}: the policy knows no attribute {name!r}, "
                            f"it knows {', '.join(sorted(known))}")
        if int(level) > known[name]:
            raise UserError(f"--steer {text!r}: the levels of {name} go from 0 to {known[name]}")
        if name in request:
            raise UserError(f"--steer {text!r} names {name} twice")
        request[name] = int(level)
    return request


def complete_request(request, combinations):
    """All levels for a request that names some: the others as they go with these in the data.

    combinations: [{name: level}], one for each response in the data. Of those nearest to the request, the
    most frequent one counts; of equally frequent ones, the one in the middle. Warns where no response is what
    is asked for, and names the nearest.
    """
    def distance(levels, other):
        return sum(abs(levels[name] - level) for name, level in other.items())

    nearest = min(distance(levels, request) for levels in combinations)
    near = [levels for levels in combinations if distance(levels, request) == nearest]
    middle = {name: statistics.median(levels[name] for levels in near) for name in near[0]}
    counts = Counter(tuple(levels.values()) for levels in near)
    best = min(near, key=lambda levels: (-counts[tuple(levels.values())], distance(levels, middle)))
    if nearest:
        asked, found = (", ".join(f"{name} {level}" for name, level in levels.items())
                        for levels in (request, best))
        warn(f"no response in the data has {asked}; the nearest ones have {found}")
    return best | request
