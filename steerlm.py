"""SteerLM: Attribute Conditioned SFT as an (User-Steerable) Alternative to RLHF
Dong, Wang, Sreedhar, Wu and Kuchaiev, Findings of EMNLP 2023, https://arxiv.org/abs/2310.05344

People rate responses y to prompts x on several attributes v: quality, but also humour, length, toxicity. All are put into the
prompt, and the policy learns by supervised learning alone, from good and bad responses:

    1. An attribute prediction model learns what people would say:  L = -sum_t log P(v_t | x, y, v_<t)       (Eq. 1)
    2. It rates all responses anew, without the raters' noise:      v' = argmax P(v | x, y)                  (Eq. 2)
    3. Attribute-conditioned SFT:                                   L = -sum_t log pi(y_t | v', x, y_<t)
    4. Bootstrapping: ask for combinations v that were seen with the highest quality, sample y' from pi(y | v, x) (Eq. 3), rate
       them as in step 2 (Eq. 4), and train on (x, v'', y') as in step 3.

At inference the user says which levels, 0 to 9, are wanted.

    python steerlm.py                # 56 s on two cores (two minutes more at first): gold 0.18 to 0.38, KL 5.6 nats
    python steerlm.py --steer sentiment=9,verbosity=0 --prompt "review this french western and mention the songs:"
    python steerlm.py --reproduce    # the paper's ladder, steering, noise in the ratings: 16 arms, 16 minutes a seed on one core
    python steerlm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data rated.jsonl

What to look at: the steering matrix. Its diagonal says how far each attribute follows its request, the rest what else moves.
`label_error` says what rating anew is worth: how far, in levels, the labels that the policy learns from are from the truth.

Compared with decision_transformer.py: several attributes in place of one, the reward, and people in place of a reward model.
Official code (NeMo-Aligner) differs: its prediction model is a regression head with the squared error (the default here too; the
paper's is --predictor lm), levels go from 0 to 4, and there is no bootstrapping. It writes "quality:4,humor:0"; here every attribute is
a tag of its own, <humor:0><quality:4>, in alphabetical order, so that a tag can be one token. Left out: top-k sampling in step 4,
and the choice of checkpoints by validation.
"""
import copy
import math
import random
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Optional

import torch
from transformers import AutoModelForSequenceClassification

import common
from common import UserError, option

TOP = 9                          # levels go from 0 to 9, as in the paper


@dataclass
class Config(common.Config):
    LR: ClassVar = {"tiny": 5e-3, "real": 5e-6}       # tiny: tuned on validation seed 100; real: the paper's
    EPOCHS: ClassVar = {"tiny": 6.0, "real": 5.0}     # tiny: tuned likewise; real: the paper's
    PREDICTOR_LR: ClassVar = {"tiny": 4e-3, "real": 5e-6}
    epochs: Optional[float] = option(None, "passes over the responses in step 3; the default depends on the model")
    batch_size: int = option(32, "responses per optimizer step")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option("linear", "of the learning rate")
    labels: Literal["predicted", "human", "none"] = option("predicted", "what step 3 is conditioned on; 'none': plain SFT")
    attributes: Optional[str] = option(None, "'A,B': those to use (default: sentiment,topicality,verbosity; of a file all)")
    quality: str = option("", "'A,B': the attributes that stand for quality (default: quality, score, or sentiment and topicality)")
    share: float = option(1.0, "train on this part of the responses only, those with the highest quality")
    predictor: Literal["lm", "regression"] = option("regression", "step 1: an LM that writes the tags, or a regression head")
    predictor_lr: Optional[float] = option(None, "its learning rate; the default depends on the model")
    predictor_epochs: float = option(4.0, "passes over the rated responses in step 1")
    rounds: int = option(1, "rounds of bootstrapping")
    bootstrap_epochs: float = option(2.0, "passes over a round's samples, two for each prompt")
    steer: str = option("", "'quality=9,verbosity=0': what to ask for; the other attributes as they go with that in the data")
    prompt: str = option("", "no training: print responses of --policy to this prompt (default policy: the last run's)")

    def __post_init__(self):
        super().__post_init__()
        if self.predictor_lr is None:
            self.predictor_lr = self.PREDICTOR_LR["tiny" if self.model == "tiny" else "real"]
        if self.attributes is None:
            self.attributes = "sentiment,topicality,verbosity" if self.data == "reviews" else ""
        self.check(lambda value: value > 0, "be above 0", "predictor_epochs", "bootstrap_epochs", "predictor_lr")
        self.check(lambda value: value >= 0, "not be negative", "rounds")
        self.check(lambda value: 0 < value <= 1, "be in (0, 1]", "share")
        if self.labels != "predicted" and self.rounds:
            raise UserError("--rounds: bootstrapping rates its samples by predicted labels; give --rounds 0 or --labels predicted")


def format_attributes(levels):
    """{"quality": 9, "humor": 0} as "<humor:0><quality:9>": by name, whatever the order they come in."""
    for name, level in levels.items():
        if not re.fullmatch(r"[\w-]+", name) or type(level) is not int or not 0 <= level <= TOP:
            raise UserError(f"{name!r}: {level!r} is no attribute: a name of letters, and a whole level from 0 to {TOP}")
    return "".join(f"<{name}:{levels[name]}>" for name in sorted(levels))


def parse_attributes(text):
    """What format_attributes wrote, read back. Raises UserError for any other text."""
    tags = re.findall(r"<([\w-]+):(\d)>", text)
    levels = {name: int(level) for name, level in tags}
    if not tags or len(levels) < len(tags) or format_attributes(levels) != text:
        raise UserError(f"{text!r} is no row of tags like <humor:0><quality:9>")
    return levels


class Sample(NamedTuple):
    prompt: str
    responses: list[str]         # one
    ended: list[bool]
    levels: dict[str, int]       # of each attribute, 0 to 9


def quality_of(config, names):
    """The attributes that stand for quality: the more the better."""
    known = [found for found in (["quality"], ["score"], ["sentiment", "topicality"]) if set(found) <= set(names)]
    wanted = [name.strip() for name in config.quality.split(",")] if config.quality else next(iter(known), [])
    if not wanted or not set(wanted) <= set(names):
        raise UserError(f"--quality must name what is better the more there is of it, of {', '.join(names)}")
    return wanted


def rated_samples(config, task, split):
    return [Sample(row.prompt, [row.response], [True], row.attributes) for row in common.rated_rows(task, split, config.attributes)]


def train_predictor(run, samples):
    """Fit the attribute prediction model to people's ratings, in the form that --predictor names.

    lm, the paper's: a language model that writes the tags after prompt and response (Eq. 1) and is read greedily (Eq. 2).
    Returns: predict(prompts, responses) -> the levels of each, or None where the model wrote something else.
    """
    config, names, path = run.config, sorted(samples[0].levels), common.policy_path(run.config)
    settings = common.Config(seed=config.seed, lr=config.predictor_lr, epochs=config.predictor_epochs, batch_size=32,
                             schedule="cosine", token_budget=config.token_budget)
    if config.predictor == "regression":
        model = common.load(AutoModelForSequenceClassification, path, config, num_labels=len(names))
        scores = common.RewardModel(model, common.load_tokenizer(path, config), label=slice(len(names)))           # [N, attributes]
        rows = [common.Demonstration(row.prompt, row.responses[0], row.levels) for row in samples]
        common.train_attribute_model(model, scores.tokenizer, rows, names, settings)
        return lambda *texts: [dict(zip(names, row)) for row in (scores(*texts) * TOP).round().clamp(0, TOP).int().tolist()]
    model, tags = copy.deepcopy(run.policy), [format_attributes(row.levels) for row in samples]
    rows = [common.Demonstration(row.prompt + row.responses[0], text) for row, text in zip(samples, tags)]
    common.train_sft(model, run.tokenizer, rows, settings)
    room = 1 + max(map(len, run.tokenizer(tags, add_special_tokens=False).input_ids))
    wanted = "".join(rf"<{re.escape(name)}:\d>" for name in names)

    def predict(prompts, responses):
        both = [x + y for x, y in zip(prompts, responses)]
        texts = common.decode(run.tokenizer, common.generate(model, run.tokenizer, both, greedy=True, max_new_tokens=room))
        return [parse_attributes(text) if re.fullmatch(wanted, text) else None for text in texts]

    return predict


def rate_anew(predict, samples):
    """The samples with predicted levels in place of people's; those that the model could not rate are left out, and counted."""
    levels = predict([row.prompt for row in samples], [row.responses[0] for row in samples])
    rated = [row._replace(levels=new) for row, new in zip(samples, levels) if new]
    if not rated:
        raise UserError("the prediction model wrote no readable rating: train it longer, or take --predictor regression")
    for name in [name for name in rated[0].levels if len({row.levels[name] for row in rated}) == 1]:
        common.warn(f"the prediction model says {name} {rated[0].levels[name]} of all {len(rated)} responses: train it longer, or "
                    "take --labels human; nothing is to be steered by that")
    if len(rated) < len(samples):
        common.warn(f"{len(samples) - len(rated)} of {len(samples)} ratings by the prediction model cannot be read: left out")
    return rated


def best_of(samples, quality):
    """The levels of the samples whose quality is the highest that one in a hundred reaches."""
    ranked = sorted((sum(row.levels[name] for name in quality) for row in samples), reverse=True)
    return [row.levels for row in samples if sum(row.levels[name] for name in quality) >= ranked[(len(ranked) - 1) // 100]]


def bootstrap(run, predict, combinations, turn):
    """Two samples of the policy for each prompt, asked for combinations drawn evenly from those of the highest quality, rated."""
    rng, prompts = random.Random(f"bootstrap {run.config.seed} {turn}"), run.task.prompts["train"] * 2
    _, texts, ended = common.rollout(run, [prompt + rng.choice(combinations) for prompt in prompts])
    return rate_anew(predict, [Sample(prompt, [text], [end], {}) for prompt, text, end in zip(prompts, texts, ended.tolist())])


def train(run, samples, predict, combinations, measure):
    """Attribute-conditioned SFT on the samples (step 3), then on those of each round of bootstrapping."""
    config = run.config
    sizes = [config.epochs * len(samples)] + [config.bootstrap_epochs * 2 * len(run.task.prompts["train"])] * config.rounds
    steps, now = [math.ceil(size / config.batch_size) for size in sizes], None

    def losses_of(rows, batch):
        return -common.sequence_logps(run.policy, batch), {}                                    # [n], the tags not in it

    for step, (turn, i) in common.steps(run, [(turn, i) for turn, n in enumerate(steps) for i in range(n)], measure):
        if turn and i == 0:
            run.state["samples"] = [tuple(row) for row in bootstrap(run, predict, combinations, turn)]
        if turn != now:
            now, rows = turn, [Sample(*row) for row in run.state["samples"]] if turn else samples
            if config.labels != "none":
                rows = [row._replace(prompt=row.prompt + format_attributes(row.levels)) for row in rows]
            plan = common.plan_of(rows, replace(config, epochs=steps[turn] * config.batch_size / len(rows)))
        common.log(run, step, common.minimise(run, step, plan[i], losses_of))


def run(config):
    """One training run, or with --prompt one question to a trained policy; returns the metrics after it."""
    if config.prompt:
        return steer(config)
    run = common.start(config)
    ratings, held_out = (rated_samples(config, run.task, split) for split in ("train", "test"))
    names, conditioned, errors = sorted(ratings[0].levels), config.labels != "none", {}
    quality, request = quality_of(config, names), common.parse_request(config.steer, dict.fromkeys(names, TOP))

    def truth(prompts, responses):
        return [{name: levels[name] for name in names} for levels in map(run.task.attributes, prompts, responses)]

    common.begin(run)
    if config.model == "tiny":                                 # each tag one token; a real tokenizer spells them
        common.add_tags(run, {name: {format_attributes({name: level}): [
            row.responses[0] for row in ratings if row.levels[name] == level] for level in range(TOP + 1)} for name in names})
    predict = train_predictor(run, ratings) if config.labels == "predicted" else None
    samples = rate_anew(predict, ratings) if predict else ratings
    if predict and held_out:
        errors["eval/predictor_error"] = common.rating_error(held_out, predict)
    if run.task.attributes:
        errors |= {"eval/human_error": common.rating_error(ratings, truth), "eval/label_error": common.rating_error(samples, truth)}
    samples = sorted(samples, key=lambda row: -sum(row.levels[name] for name in quality))
    samples = samples[:max(1, round(config.share * len(samples)))]
    observed, best = [row.levels for row in samples], best_of(samples, quality)
    wanted = common.complete_request(request, observed if request else best)
    if conditioned:
        run.ask = lambda prompt: prompt + format_attributes(wanted)

    def measure():
        judge = truth if run.task.attributes else predict
        if not (run.trace and conditioned and judge):
            return errors
        run.state |= common.steering(run, observed, format_attributes, judge)
        return errors | common.steering_metrics(run.state["matrix"])

    train(run, samples, predict, sorted(set(map(format_attributes, best))), measure)
    metrics = common.finish(run) | {name: run.state.get(name, {}) for name in ("steering", "matrix", "followed")}
    if conditioned:
        common.write_json(run.out / "attributes.json", {
            "method": "steerlm", "chat": config.chat, "levels": dict.fromkeys(names, TOP), "asked": format_attributes(wanted),
            "observed": Counter(map(format_attributes, observed))})
    if metrics["matrix"] and not config.quiet:
        print(f"asked for {format_attributes(wanted)}; levels that came for each level asked for, one attribute (row) at a time:")
        print(common.table([["", *names]] + [[name, *row.values()] for name, row in metrics["matrix"].items()]))
    return metrics


def steer(config):
    """Print responses of a trained policy to --prompt, asked for --steer, or for what it was evaluated with."""
    def tags_of(saved, request):
        observed = [parse_attributes(text) for text, count in saved["observed"].items() for _ in range(count)]
        return format_attributes(common.complete_request(request, observed)) if request else saved["asked"]

    common.complete_prompt(config, "steerlm", tags_of)
    return {}


PLAIN = {"labels": "none", "rounds": 0, "lr": 5e-4, "epochs": 2}
HUMAN, PREDICTED, NOISE = {"labels": "human", "rounds": 0}, {"rounds": 0}, (1, 2, 4)
FIVE = "sentiment,topicality,verbosity,intensity,personal"
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/label_error": "label error", "eval/slope": "slope", "eval/cross_talk": "cross-talk"}


def more_gold(claim, source, paper, left, right):
    return dict(claim=claim, source=source, paper=paper, metric="eval/gold", holds=[(left, ">", right)])


EXPERIMENTS = {
    "ladder": dict(
        question="What does each step of SteerLM add, and does it replace PPO?",
        arms={"start": PLAIN | {"epochs": 0}, "no attributes": PLAIN, "human attributes": HUMAN,
              "human, best quarter": HUMAN | {"share": 0.25}, "predicted": PREDICTED, "bootstrapped": {},
              "bootstrapped 3 times": {"rounds": 3}, "predicted by an LM": PREDICTED | {"predictor": "lm"},
              "PPO": {"method": "ppo"}, "Decision Transformer": {"method": "decision_transformer"}},
        columns=COLUMNS,
        claims=[
            more_gold("attributes that people gave help", "ablation", "79.7 to 96.2% of ChatGPT", "human attributes", "no attributes"),
            more_gold("the best of the data alone helps further", "ablation", "96.2 to 98.1", "human, best quarter", "human attributes"),
            more_gold("predicted attributes beat people's", "ablation", "98.1 to 102.7", "predicted", "human attributes"),
            more_gold("the same, predicted by an LM as in the paper", "ablation", "98.1 to 102.7", "predicted by an LM", "human attributes"),
            more_gold("bootstrapping adds to that", "ablation", "103.7 to 104.2", "bootstrapped", "predicted"),
            more_gold("two rounds more add more", "ours", "-", "bootstrapped 3 times", "bootstrapped"),
            more_gold("it beats RLHF", "automatic Elo", "1139 over 925, another team's model:", "bootstrapped", "PPO"),
            more_gold("several attributes beat one reward", "ours", "-", "bootstrapped", "Decision Transformer"),
        ],
        panels=[dict(kind="bars", y=["eval/gold"], title="gold reward"), dict(kind="bars", y=["eval/fluency"], title="fluency")],
    ),
    "steering": dict(
        question="How far does each attribute follow its request, and what else moves?",
        arms={"bootstrapped": {}, "predicted": PREDICTED, "human attributes": HUMAN, "exact attributes": HUMAN | {"rating_noise": 0.0},
              "five attributes": PREDICTED | {"attributes": FIVE}},
        columns={"eval/slope": "slope", "eval/cross_talk": "cross-talk"} | {
            f"eval/slope_{name}": name for name in FIVE.split(",")},
        claims=[
            dict(claim="every attribute rises with its request", source="toxicity", paper=".063, .086, .096, .104 at 0, 3, 6, 9",
                 metric="eval/slope_min", holds=[("predicted", ">", 0.0)]),
            dict(claim="by at least half a level a level", source="ours", paper="-", metric="eval/slope",
                 holds=[("predicted", ">", 0.5)]),
            dict(claim="and the others stay (within a twentieth of a level)", source="ours", paper="-", metric="eval/cross_talk",
                 holds=[("predicted", "<", 0.05)]),
            dict(claim="labels without noise steer further", source="ours", paper="-", metric="eval/slope",
                 holds=[("exact attributes", ">", "human attributes")]),
        ],
        panels=[dict(kind="curve", curve="followed", x="asked", y=["sentiment", "topicality", "verbosity"], arms=["predicted"],
                     title="level that came for the level asked for")]
        + [dict(kind="matrix", matrix="matrix", arms=[arm], title=f"matrix: {arm}") for arm in ("predicted", "exact attributes")],
    ),
    "noise": dict(
        question="When is rating anew worth it?",
        arms={f"{name}, noise {noise}": settings | {"rating_noise": float(noise)} for noise in NOISE
              for name, settings in (("human", HUMAN), ("predicted", PREDICTED))},
        columns=COLUMNS,
        claims=[
            dict(claim="with very noisy ratings, predicted ones are nearer to the truth", source="step 2", paper="no number:",
                 metric="eval/label_error", holds=[("predicted, noise 4", "<", "human, noise 4")]),
            more_gold("and more gold comes of them", "ablation", "98.1 to 102.7", "predicted, noise 4", "human, noise 4"),
            dict(claim="with little noise, people's own are nearer", source="ours", paper="-", metric="eval/label_error",
                 holds=[("human, noise 1", "<", "predicted, noise 1")]),
            more_gold("and better to train on", "ours", "-", "human, noise 1", "predicted, noise 1"),
        ],
        panels=[dict(kind="bars", y=["eval/label_error"], title="labels' distance from the truth, levels"),
                dict(kind="bars", y=["eval/gold"], title="gold reward")],
    ),
}

if __name__ == "__main__":
    common.main(Config, run, EXPERIMENTS)
