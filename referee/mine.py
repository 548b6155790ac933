"""An engineer's evening: some methods on your model and your pairs, within so many minutes, compared.

    python -m referee mine --model DIR --data pairs.jsonl --methods dpo,rrhf,raft --minutes 60

One split of the data, one reward, the same test prompts for all. What it makes is in runs/mine/<number>, or
--out: a directory for each method with its policy, and report.html (page.py). The same command goes on with a
run that was cut; methods that are finished are kept.

Time. First what all share: the reward model (if none is given), and the evaluation of your model. Then a
short trial of each method, on few prompts, gives its seconds for each training prompt and those of loading,
saving and evaluation. The rest is divided equally; what a method does not need goes to the others. Each takes
as many training prompts as fit, at most all. A method with rounds first makes fewer of them.
"""
import argparse
import math
import signal
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Optional

import torch

import harness
from harness import UserError, directory, option
from harness.command_line import parser_of
from harness.run import Stop
from referee import page
from referee.arms import OWN, config_class, load, method_names
from referee.budget import BATCH, STEPS, finish, fit, in_words, say, shares, trial

NAME = "mine"
HOME = Path("runs/mine")
EVALUATION = 0.3                             # of all the minutes: what evaluations may take together
NOT_HERE = "prompt", "reproduce", "seeds", "jobs", "resume"
OF_ONE = (OWN | {"token_budget", "gradient_checkpointing"}) - {"temperature"}     # what one may have alone


@dataclass
class Config(harness.Config):
    methods: str = option("dpo,rrhf,raft", "the methods to try, of: " + ", ".join(method_names()))
    minutes: float = option(60.0, "for everything: what all methods share, then equal parts", "(0, inf)")
    options: str = option("", "'dpo.lr=1e-5 raft.candidates=4': options of single methods")
    batch_size: Optional[int] = option(
        None, f"prompts per optimizer step (default: {BATCH}, or fewer, for at least {STEPS} steps)",
        "(0, inf)")


def given(cls, words, prog):
    """The options that a command line gives: {name: value}, without defaults."""
    unset = object()
    found = argparse.Namespace(**{f.name: unset for f in fields(cls)})
    parser_of(cls, prog=prog).parse_args(words, found)
    return {name: value for name, value in vars(found).items() if value is not unset}


def options_of(name, flags):
    """Keyword arguments of a method's Config: what is given for all methods, and for this one.

    RAFT reads all prompts in every round, as the plan counts.
    """
    shared = {k: v for k, v in flags.items() if k in {f.name for f in fields(harness.Config)}}
    words = [word.partition(".") for word in flags.get("options", "").split()]
    own = [f"--{option}" for method, _, option in words if method == name]
    shared |= {"prompts": 0} if name == "raft" else {}
    return shared | given(config_class(name), own, f"--options, {name}")


def check(config, flags):
    """The names of the methods. UserError for what cannot be run."""
    names = list(dict.fromkeys(filter(None, config.methods.split(","))))
    if config.model == "tiny" and not config.policy or config.data == "reviews":
        raise UserError("mine compares methods on your model and your data: give --model and --data")
    for name in NOT_HERE:
        if name in flags:
            raise UserError(f"--{name} is not for mine")
    unknown = [name for name in names if name not in method_names()]
    if unknown or not names:
        raise UserError(f"--methods: no method {', '.join(unknown) or 'named'}; there are: "
                        f"{', '.join(method_names())}")
    for word in config.options.split():
        name, _, option = word.partition("=")[0].replace("-", "_").partition(".")
        if name not in names or "=" not in word:
            raise UserError(f"--options {word!r}: write METHOD.OPTION=VALUE, with a method of --methods")
        if option in {f.name for f in fields(harness.Config)} - OF_ONE:
            raise UserError(f"--options {word!r}: --{option} is the same for all methods")
    if config.reward == "none":
        raise UserError("mine compares by a reward: leave out --reward none")
    for name in names:
        config_class(name)(**options_of(name, flags))                   # says what is wrong with an option
    return names


def place(config, flags):
    """(directory, what mine.json there says): of a run that this command has begun, else a new one."""
    taken = [path for path in HOME.glob("*") if path.name.isdigit()]
    last = max(taken, key=lambda path: int(path.name), default=HOME / "none")
    out = Path(config.out or last)
    state = load(out / "mine.json")
    if state.get("flags") == flags and (config.out or not (out / page.NAME).exists()):
        return out, state
    if config.out and out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} was made by another command: give that one again, or another --out")
    return out if config.out else directory.free_directory(HOME), {"flags": flags, "spent": 0.0}


# ------------------------------------------------------------------------------------- what all methods share

def check_reward_time(config, minutes):
    """Say how long the training of a reward model takes. UserError for more than half of the time."""
    pairs = harness.load_task(config).pairs.get("train", [])
    if config.reward or not pairs or harness.trained_path(config, pairs).exists():
        return
    recipe = harness.Recipe(config.reward_lr, batch_size=4, token_budget=config.token_budget)
    model, tokenizer, few = harness.load_scorer(config), harness.load_tokenizer(config), pairs[:4]
    for _ in range(2):                                   # the first holds what a GPU does only once
        began = time.time()
        harness.train_reward_model(model, tokenizer, few, recipe)
    seconds = (time.time() - began) / len(few) * len(pairs)
    print(f"a reward model from your {len(pairs)} training pairs, once: about {in_words(seconds)}")
    if seconds > 30 * minutes:
        raise UserError(f"a reward model takes {in_words(seconds)}, more than half of --minutes {minutes:g}: "
                        f"give --minutes {math.ceil(seconds / 30)}, or --limit (rows to read), or --reward")


def measure(config, run, minutes, n_methods):
    """Your model on the held-out prompts, and the reward on the held-out pairs: what mine.json keeps of it.

    The number of samples is what EVALUATION allows. The reward gets mean 0 and deviation 1 on these samples,
    for all methods.
    """
    def evaluated(prompts, samples):
        began, sized = time.time(), replace(config, eval_prompts=prompts, eval_samples=samples)
        found = harness.evaluate(sized, run.task, run.policy, run.tokenizer, run.rewards)
        return sized, found, time.time() - began

    proxy, held_out = run.rewards["proxy"], run.task.prompts["test"]
    prompts = min(config.eval_prompts, len(held_out))
    few = min(8, prompts)
    each = evaluated(few, 1)[2] / few                                        # seconds of a sample
    possible = int(EVALUATION * 60 * minutes / (n_methods + 1) / each)
    if possible < min(2, prompts):
        raise UserError(f"--minutes {minutes:g} is too short: an answer to one held-out prompt takes "
                        f"{in_words(each)}; give --minutes {math.ceil(each * (n_methods + 1) / 3)}")
    sized, (metrics, samples), seconds = evaluated(
        min(prompts, possible), max(1, min(config.eval_samples, possible // prompts)))
    scores = samples["proxy"]
    harness.check_finite(torch.tensor(scores), 0, samples["prompts"], "the reward")
    if max(scores) == min(scores):
        raise UserError(f"the reward is {scores[0]:.3g} for each of {len(scores)} answers of your model: "
                        "nothing to compare by")
    pairs, right = run.task.pairs.get("test", []), {}
    if pairs:
        chosen, rejected = (proxy([p.prompt for p in pairs], texts) for texts in
                            ([p.chosen for p in pairs], [p.rejected for p in pairs]))
        for pair, gap in zip(pairs, (chosen - rejected).tolist()):
            right.setdefault(pair.prompt, []).append((gap > 0) + 0.5 * (gap == 0))
    mean, std = fmean(scores), stdev(scores)
    samples["proxy"] = [(score - mean) / std for score in scores]
    metrics |= {"eval/proxy": 0.0} | {k: v / std for k, v in metrics.items() if k == "eval/proxy_se"}
    scale = proxy.mean + proxy.std * mean, proxy.std * std                   # of the raw scores
    harness.set_scale(proxy, *scale)
    return {"scale": scale, "agreement": [fmean(values) for values in right.values()], "pairs": len(pairs),
            "train": len(run.task.prompts["train"]), "evaluation": seconds,
            "sized": {"eval_prompts": sized.eval_prompts, "eval_samples": sized.eval_samples},
            "initial": {"metrics": metrics, "samples": samples},
            "key": harness.what_initial_evaluation_needs(sized, run.rewards)}


def share(flags, out, minutes, n_methods):
    """Load what all methods share, and measure it."""
    names = {f.name for f in fields(harness.Config)}
    config = harness.Config(**{k: v for k, v in flags.items() if k in names}
                            | {"out": str(out / "initial"), "quiet": True})
    check_reward_time(config, minutes)
    run = harness.start(config)
    try:
        if "proxy" not in run.rewards:
            raise UserError("nothing to compare by: give --reward, or data with pairs for a reward model")
        return measure(config, run, minutes, n_methods)
    finally:
        directory.give_back(run.out, run.lock)


# ------------------------------------------------------------------------------------------------ the evening

def mine(config, flags):
    """Do what is not done yet; write report.html. Returns its path. UserError while another process does."""
    names = check(config, flags)
    out, state = place(config, flags)
    with directory.claimed(out):
        return in_place(config, flags, names, out, state)


def in_place(config, flags, names, out, state):
    print(f"{out}: a run that is cut goes on from there by the same command")
    began, spent = time.time(), state["spent"]

    def keep(**more):
        state.update(more, spent=spent + time.time() - began)
        harness.write_json(out / "mine.json", state)

    keep()
    if "scale" not in state:
        keep(**share(flags, out, config.minutes, len(names)))
    sized = state["sized"]
    print(f"your model: {sized['eval_prompts']} held-out prompts, {sized['eval_samples']} answers each, "
          f"{in_words(state['evaluation'])}; so long again after each method")
    options = {name: options_of(name, flags) | sized for name in names}
    if "plans" not in state:
        tried = {name: trial(name, options[name], state, out) for name in names}
        seconds = max(0.0, 60 * config.minutes - spent - (time.time() - began))
        each = shares(names, options, tried, state, seconds)
        fits = {name: fit(name, options[name], tried[name], state, each[name]) for name in names}
        if not all(plan["prompts"] for plan, _ in fits.values()):
            slow = max(names, key=lambda name: fits[name][1])
            needed = config.minutes + (fits[slow][1] * len(names) - seconds) / 60
            raise UserError(f"--minutes {config.minutes:g} is too short for {slow}: with these methods give "
                            f"--minutes {math.ceil(1.1 * needed)}, or fewer methods, or a smaller "
                            "--max_new_tokens")
        keep(plans={name: plan for name, (plan, _) in fits.items()})
    for name, plan in state["plans"].items():
        print(say(name, plan, state["train"]))
    known = {state["key"]: (state["initial"]["metrics"], state["initial"]["samples"])}
    for name, plan in state["plans"].items():
        finish(name, plan, options[name], state, out, known)
    runs = {name: load(out / f"{name}.json") for name in names}
    failed = {name: run["diverged"] for name, run in runs.items() if "diverged" in run}
    if failed.keys() == runs.keys():
        raise UserError(f"every method has diverged ({[*failed.values()][0]}): give another --out, and lower "
                        "learning rates")
    whole = {name: run for name, run in runs.items() if name not in failed}
    print(page.write(out, state, whole, config, failed))
    return out / page.NAME


def main(words):
    """The command line: python -m referee mine."""
    parser = parser_of(Config, __doc__.split("\n")[0], f"python -m referee {NAME}")
    config = Config(**vars(parser.parse_args(words)))
    for number in (signal.SIGINT, signal.SIGTERM):                           # a step is ended, and saved
        signal.signal(number, Stop.handle)
    mine(config, given(Config, words, parser.prog))
