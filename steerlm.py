"""SteerLM: Attribute Conditioned SFT as an (User-Steerable) Alternative to RLHF
Dong, Wang, Sreedhar, Wu and Kuchaiev, Findings of EMNLP 2023, https://arxiv.org/abs/2310.05344

People rate responses y to prompts x on several attributes v: quality, but also humour, length, toxicity. The
levels, 0 to 9, go into the prompt, and the policy learns by supervised learning alone, from good and bad
responses. At inference the user says which levels are wanted. There is no reference model and no reward.

    1. An attribute prediction model learns the ratings:        L = -sum_t log P(v_t | x, y, v_<t)     (Eq. 1)
    2. It rates a larger set of demonstrations, and those of step 1 anew: v' = argmax P(v | x, y)     (Eq. 2)
    3. Attribute-conditioned SFT of the base model:             L = -sum_t log pi(y_t | x, v', y_<t)
    4. Bootstrapping (--rounds 1; off by default): for combinations v of the best hundredth of the responses,
       sample y' from pi(y | x, v) (Eq. 3), rate it as in step 2: v'' (Eq. 4), train on (x, v'', y') as in 3.

    python steerlm.py                # 96 s of one core (at first two minutes more): gold 0.16 to 1.09, KL 3.1
    python steerlm.py --steer sentiment=9,verbosity=0 --prompt "you saw this old fantasy. how was the score?"
    python steerlm.py --reproduce    # the paper's ladder, steering, noise; against PPO
    python steerlm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data rated.jsonl

What to look at: the steering matrix. Its diagonal says how far each attribute follows its request (on your
data: by the model of step 1). Without --steer the policy is asked for the commonest levels of the best
hundredth; the paper asks for quality 9. Tiny: step 3 starts from an untrained model and is the SFT itself
(--start base); "before" is the SFT policy, KL is to it; it saw twice as many demonstrations, untagged.
NeMo-Aligner has a regression head with the squared error in step 1 (as here; paper: --predictor lm), and
levels 0 to 4. Its scores lie too near the mean: levels go by rank, as frequent as people gave them. No top-k.

Elsewhere:
    float32 log-probs, dropout off, EOS counted (none if cut), AdamW (0.9, 0.95; no decay): common.py
    clip norm 1: harness/config.py; demonstrations, ratings, the true reward gold: tasks/build.py, reviews.py
    tags as tokens, requests, levels by rank, the steering matrix: harness/conditioning.py
    run.steps: seeds, checkpoints; run.evaluate: samples, KL to the initial policy (tiny: SFT): harness/run.py
"""
import copy
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Optional

import torch

import common
import harness
from harness import Demonstration, Ranking, UserError, option

TOP = 9                          # levels go from 0 to 9, as in the paper


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 8e-3, "real": 5e-6}       # tiny: tuned on seeds 100 to 102; real: the paper's
    EPOCHS: ClassVar = {"tiny": 2.0, "real": 5.0}     # tiny: likewise; real: the paper's
    batch_size: int = option(64, "responses per optimizer step (paper: 128)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "cosine", "how the learning rate goes on after the warm-up")
    warmup: float = option(0.05, "share of the steps over which the learning rate rises linearly")
    start: Optional[Literal["base", "policy"]] = option(None, "what step 3 trains (tiny: base; else policy)")
    demonstrations: int = option(23000, "how many (0: rated responses alone; tiny: SFT samples)", "[0, inf)")
    rated: int = option(4096, "embedded task: people rated the first so many --demonstrations", "[0, inf)")
    labels: Literal["predicted", "human", "none"] = option("predicted", "human: rated rows; none: plain SFT")
    attributes: Optional[str] = option(None, "'A,B' (default: sentiment,topicality,verbosity; of a file all)")
    quality: str = option("", "'A,B': attributes whose sum is quality (default: see harness.quality_of)")
    share: float = option(1.0, "train on this part of the responses, those of the highest quality", "(0, 1]")
    predictor: Literal["lm", "regression"] = option("regression", "step 1: an LM, or a regression head")
    predictor_lr: Optional[float] = option(None, "learning rate of step 1 (default: by model)", "(0, inf)")
    predictor_epochs: float = option(4.0, "passes over the rated responses in step 1", "(0, inf)")
    rounds: int = option(0, "rounds of bootstrapping (paper: 1)", "[0, inf)")
    bootstrap_epochs: float = option(2.0, "passes over a round's samples, two for each prompt", "(0, inf)")
    steer: str = option("", "'quality=9,verbosity=0': what to ask for; the others: their usual levels then")

    def __post_init__(self):
        super().__post_init__()
        self.start = self.start or (
            "policy" if self.model != "tiny" or self.lora_rank or self.policy else "base")
        self.predictor_lr = self.predictor_lr or (4e-3 if self.model == "tiny" else 5e-6)
        if self.attributes is None:
            self.attributes = "sentiment,topicality,verbosity" if self.data == "reviews" else ""
        if self.start == "base" and self.lora_rank:
            raise UserError("--start base trains all weights of the base model: leave out --lora_rank")
        if self.labels != "predicted" and self.rounds:
            raise UserError("--rounds: bootstrapping needs predicted labels; give --rounds 0")
        if self.labels == "none" and self.steer:
            raise UserError("--steer: with --labels none the policy has no tags; leave one of them out")


def format_attributes(levels):
    """{"quality": 9, "humor": 0} as "<humor:0><quality:9>": by name, in whatever order they come."""
    for name, level in levels.items():
        if not re.fullmatch(r"[\w-]+", name) or type(level) is not int or not 0 <= level <= TOP:
            raise UserError(f"{name!r}: {level!r} is no attribute: letters, and a whole level up to {TOP}")
    return "".join(f"<{name}:{levels[name]}>" for name in sorted(levels))


def parse_attributes(text):
    """What format_attributes wrote, read back. Raises UserError for any other text."""
    levels = {name: int(level) for name, level in re.findall(r"<([\w-]+):(\d)>", text)}
    if not levels or format_attributes(levels) != text:
        raise UserError(f"{text!r} is no row of tags like <humor:0><quality:9>")
    return levels


class Sample(NamedTuple):
    prompt: str
    responses: list[str]         # one
    ended: list[bool]            # with EOS; False: cut off, and then no EOS is trained
    levels: dict[str, int]       # of each attribute, 0 to 9; {}: not rated


def train_regression(run, samples):
    """Step 1 as in the official code. Returns predict(prompts, responses) -> the levels of each response."""
    config, names = run.config, sorted(samples[0].levels)
    model = harness.load_scorer(config, len(names))        # the initial policy (tiny: SFT) with a new head
    tokenizer = harness.load_tokenizer(config, run.tokenizer.model_max_length)
    score = common.RewardModel(model, tokenizer, label=slice(len(names)))
    targets = torch.tensor([[r.levels[name] / TOP for name in names] for r in samples], device=model.device)
    plan = harness.shuffled_batches(len(samples), config.predictor_epochs, 32, config.seed)
    optimizer, schedule = common.adamw(model, config.predictor_lr, len(plan), "cosine", warmup=0.1)
    for step, indices in enumerate(harness.progress.steps(plan, "prediction model")):
        prompts, texts = [samples[i].prompt for i in indices], [samples[i].responses for i in indices]
        for part, batch in common.batches(score.tokenizer, prompts, texts, config.token_budget, model.device):
            scores = common.sequence_scores(model, batch)               # [n, attributes], at the last token
            losses = (scores - targets[[indices[i] for i in part]]).square().sum(1)                     # [n]
            harness.check_finite(losses, step + 1, [prompts[i] for i in part], flag="--predictor_lr")
            (losses.sum() / len(indices)).backward()                    # the mean over responses, in parts
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    prompts, texts = [row.prompt for row in samples], [row.responses[0] for row in samples]
    to_levels = harness.levels_by_rank(score(prompts, texts), [row.levels for row in samples], TOP)
    return lambda *texts: to_levels(harness.score(run, score, *texts))


def train_writer(run, samples):
    """Step 1 as in the paper: an LM writes the tags after prompt and response. Returns predict, as above."""
    config, model, names = run.config, copy.deepcopy(run.policy), sorted(samples[0].levels)
    tags = [format_attributes(row.levels) for row in samples]
    rows = [Demonstration(row.prompt + row.responses[0], text) for row, text in zip(samples, tags)]
    recipe = harness.Recipe(config.predictor_lr, batch_size=32, epochs=config.predictor_epochs,
                            token_budget=config.token_budget, seed=config.seed, flag="--predictor_lr")
    harness.train_sft(model, run.tokenizer, rows, recipe, run.counts)         # Eq. 1: the sum over the tags
    room = 1 + max(map(len, run.tokenizer(tags, add_special_tokens=False).input_ids))
    wanted = "".join(rf"<{re.escape(name)}:\d>" for name in names)

    def predict(prompts, responses):
        both = [x + y for x, y in zip(prompts, responses)]
        batch = common.generate(model, run.tokenizer, both, greedy=True, max_new_tokens=room)          # Eq. 2
        texts = common.decode(run.tokenizer, batch)             # None: it wrote something else than tags
        return [parse_attributes(text) if re.fullmatch(wanted, text) else None for text in texts]
    return predict


def rate_anew(predict, samples):
    """The samples with predicted levels (Eq. 2 and 4). Those that the model could not rate are left out."""
    levels = predict([row.prompt for row in samples], [row.responses[0] for row in samples])
    harness.check_ratings(levels)
    return [row._replace(levels=new) for row, new in zip(samples, levels) if new]


def best_of(samples, quality):
    """The levels of the best hundredth of the samples by quality; ties with its last one count, too."""
    values = [sum(row.levels[name] for name in quality) for row in samples]
    least = sorted(values, reverse=True)[(len(values) - 1) // 100]
    return [row.levels for row, value in zip(samples, values) if value >= least]


def bootstrap(run, predict, combinations, turn):
    """Two samples of the current policy for each prompt, asked for one of the combinations, and rated."""
    rng, prompts = random.Random(f"bootstrap {run.config.seed} {turn}"), run.task.prompts["train"] * 2
    _, texts, ended = harness.rollout(run, [x + rng.choice(combinations) for x in prompts])           # Eq. 3
    samples = [Sample(x, [y], [end], {}) for x, y, end in zip(prompts, texts, ended.tolist())]
    return rate_anew(predict, samples)                                                                # Eq. 4


def train(run):
    """Label the responses (steps 1 and 2), train on them (step 3), then on samples of the policy (step 4)."""
    config, policy, task = run.config, run.policy, run.task
    task.ratings["train"], rows = harness.demonstrations(config, task, config.demonstrations, config.rated)
    unrated = [Sample(row.prompt, [row.response], [True], {}) for row in rows]
    ratings, held_out = ([Sample(row.prompt, [row.response], [True], row.attributes) for row in
                          harness.rated_rows(task, split, config.attributes)] for split in ("train", "test"))
    names, conditioned = sorted(ratings[0].levels), config.labels != "none"
    tags_of = format_attributes if conditioned else lambda levels: ""
    quality, truth = harness.quality_of(config, names), harness.true_levels(task, names)
    request = harness.parse_request(config.steer, dict.fromkeys(names, TOP))
    run.evaluate()                                      # before training, and before the policy has any tags
    if config.start == "base":                          # tiny: untrained weights; else those of --model
        policy.load_state_dict(harness.load_base(config, policy).state_dict())
    if config.model == "tiny":                          # each tag one token; a real tokenizer spells them
        harness.add_tags(run, {name: {f"<{name}:{level}>": [row.responses[0] for row in ratings
                         if row.levels[name] == level] for level in range(TOP + 1)} for name in names})
    fit = train_writer if config.predictor == "lm" else train_regression
    predict = fit(run, ratings) if config.labels == "predicted" else None                             # step 1
    samples = rate_anew(predict, ratings + unrated) if predict else ratings                           # step 2
    errors = harness.label_errors(run, ratings, samples, held_out, predict, truth)
    keep = max(1, round(config.share * len(samples)))
    samples = sorted(samples, key=lambda row: -sum(row.levels[name] for name in quality))[:keep]
    rows = samples if conditioned or config.share < 1 else ratings + unrated
    observed, best = [row.levels for row in samples], best_of(samples, quality)
    wanted = tags_of(harness.complete_request(request, observed if request else best))
    combinations = sorted(set(map(format_attributes, best)))
    run.ask = lambda prompt: prompt + wanted
    # Optimizer steps of step 3 and of each round. In each the lr rises from 0 and is 0 at the end.
    new = config.bootstrap_epochs * 2 * len(task.prompts["train"])
    steps = [math.ceil(n / config.batch_size) for n in [config.epochs * len(rows)] + [new] * config.rounds]
    plan = [(turn, i) for turn, n in enumerate(steps) for i in range(n)]
    optimizer, schedule = common.adamw(policy, config.lr, steps, config.schedule, config.warmup)
    for step, (turn, i) in run.steps(plan, policy, optimizer, schedule):
        if i == 0:                                      # step 3 begins, or a round of step 4
            pool = bootstrap(run, predict, combinations, turn) if turn else rows
            run.state["rows"] = [Ranking(row.prompt + tags_of(row.levels), row.responses, [], ended=row.ended)
                                 for row in pool]
            passes = steps[turn] * config.batch_size / len(pool)   # in new orders; the last batch is full too
            run.state["order"] = harness.shuffled_batches(len(pool), passes, config.batch_size, config.seed)
        batch_rows, means = [run.state["rows"][j] for j in run.state["order"][i]], harness.Means()
        for part, batch in run.microbatches(batch_rows):        # part: n of the step's rows; batch [n, T]
            losses = -common.sequence_logps(policy, batch)      # [n], sums over the response; no loss on tags
            harness.check_finite(losses, step + 1, [batch_rows[j].prompt for j in part])
            (losses.sum() / len(batch_rows)).backward()         # the mean over the step's responses, in parts
            means.add({"loss": losses})
            run.counts["tokens_trained"] += int(batch.attention_mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.log(step, means.result() | {"grad_norm": norm})
        if run.evaluation_due(step):                            # every --eval_every steps, and after the last
            run.evaluate(**errors)
            if conditioned and (truth or predict):
                run.state |= harness.steering(run, observed, format_attributes, truth or predict)
                run.amend(**harness.steering_metrics(run.state["matrix"]))
    harness.report_steering(run, wanted)
    if conditioned:
        run.save_json("attributes.json", {
            "method": "steerlm", "chat": run.task.chat, "levels": dict.fromkeys(names, TOP),
            "asked": wanted, "observed": Counter(map(format_attributes, observed))})


def answer(config):
    """Print responses to --prompt, asked for --steer, or for what the policy was evaluated with."""
    def tags_of(saved, request):
        observed = [parse_attributes(text) for text in Counter(saved["observed"]).elements()]
        return format_attributes(harness.complete_request(request, observed)) if request else saved["asked"]

    harness.ask(config, "steerlm", tags_of)


if __name__ == "__main__":
    harness.main(Config, train, answer)
