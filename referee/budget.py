"""How much of the data a method can train on in its time: a short trial, and what follows from it.

A run takes fixed + evaluation + each * prompts * rounds seconds. The trial measures `fixed` (loading, saving,
held-out pairs) and `each`; the evaluation is measured before. With few prompts a batch is small and less
efficient, so `each` is too large rather than too small.
"""
import contextlib
import gc
import importlib
import io
import math
import random
import shutil
import time

import torch

import harness
from harness import UserError
from referee.arms import config_class

PLANNED = 0.8                # of a method's share; estimates err
STEPS, BATCH = 8, 8          # without --batch_size: at least so many optimizer steps; the largest batch


def in_words(seconds):
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def keep_part(task, n, seed):
    """Leave only n of the train prompts, drawn by the seed, and what belongs to them. More holds fewer."""
    prompts = task.prompts["train"]
    kept = set(random.Random(f"part {seed}").sample(prompts, len(prompts))[:n])
    for rows in (task.prompts, task.pairs, task.rankings, task.demonstrations, task.ratings):
        rows["train"] = [row for row in rows.get("train", []) if getattr(row, "prompt", row) in kept]


def train(name, options, n, state, known):
    """One run of the method on n train prompts: (final metrics, first evaluation, samples)."""
    found = {}

    def on_part(run):
        keep_part(run.task, n, run.config.seed)
        harness.set_scale(run.rewards["proxy"], *state["scale"])
        importlib.import_module(name).train(run)
        found.update(run.samples)

    gc.collect()                                   # models of earlier runs, whose references go in circles
    result = harness.launch(on_part, config_class(name)(**options), known)
    return result, result["trace"][0], found.get("after", found["before"])


def trial(name, options, state, out):
    """Train on very few prompts, and measure {"prompts", "fixed": seconds in any case, "each": of a prompt}.

    2 prompts, on a GPU 32, which samples as fast; where the method refuses so few, four times as many, and so
    on: of all, what it says is the user's to mend.
    """
    few = 32 if torch.cuda.is_available() and options.get("device") != "cpu" else 2
    n, folder = min(few, state["train"]), out / "trial"
    short = {"rounds": 1} if rounds_of(name, options) > 1 else {}
    short |= {"batch_size": min(n, BATCH)} if "batch_size" not in options else {}
    options = options | short | {"out": str(folder), "quiet": True, "eval_prompts": 1, "eval_samples": 1}
    while True:
        began = time.time()
        try:
            with contextlib.redirect_stderr(io.StringIO()):                # warnings come with the run itself
                counts = train(name, options, n, state, {})[0]
            seconds = time.time() - began
            training = counts["seconds_training"]
            return {"prompts": n, "fixed": seconds - training, "each": training / n, "took": seconds}
        except UserError as error:
            if n == state["train"]:
                raise UserError(f"{name}: {error}") from None
            n = min(4 * n, state["train"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def finish(name, plan, options, state, out, known):
    """Train a method as planned, and write <name>.json; go on with its run, or keep it if it is finished.

    Its checkpoints are deleted then: they take three times the trained weights.
    """
    note, folder, began = out / f"{name}.json", out / name, time.time()
    if note.exists():
        return
    resume = any(folder.glob("*.pt"))
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)                            # cut before its first checkpoint
    options = options | {"out": str(folder), "resume": resume, "batch_size": plan["batch_size"]}
    options |= {"rounds": plan["rounds"]} if plan["asked"] > 1 else {}
    print(f"\n{name}")
    try:
        result, before, samples = train(name, options, plan["prompts"], state, known)
    except harness.Diverged as error:                                # it would again: the others go on
        print(f"{name} is left out: {error}")
        harness.write_json(note, {"diverged": str(error)})
        return
    metrics = {k: v for k, v in result.items() if k.startswith("eval/")}
    harness.write_json(note, {"metrics": metrics, "before": before, "samples": samples, "plan": plan,
                              "seconds": time.time() - began})
    for file in folder.glob("*.pt"):
        file.unlink(missing_ok=True)


def rounds_of(name, options):
    return getattr(config_class(name)(**options), "rounds", 0)


def fit(name, options, tried, state, seconds):
    """The most that fits into so many seconds, and the seconds that the least needs that makes sense.

    Returns: {"prompts" (0: not even the least fits), "rounds", "batch_size", "seconds", ...}; seconds.
    """
    asked, total = max(1, rounds_of(name, options)), state["train"]
    epochs, fixed = config_class(name)(**options).epochs or 1, tried["fixed"] + state["evaluation"]
    least = min(total, max(tried["prompts"], math.ceil(STEPS / epochs)))
    room = PLANNED * seconds - fixed
    rounds = max(1, min(asked, int(room / (tried["each"] * total))))
    n = min(total, int(room / (tried["each"] * rounds)))
    batch = options.get("batch_size") or max(1, min(BATCH, int(epochs * rounds * n / STEPS)))
    plan = {"prompts": n if n >= least else 0, "rounds": rounds, "asked": asked, "batch_size": batch,
            "epochs": epochs, "seconds": fixed + tried["each"] * n * rounds, "share": seconds}
    return plan, (fixed + tried["each"] * least) / PLANNED


def shares(names, options, tried, state, seconds):
    """Seconds of each method: equal parts, but what a method does not need goes to the others."""
    need, found = {}, {}
    for name in names:
        work = state["train"] * max(1, rounds_of(name, options[name])) * tried[name]["each"]
        need[name] = (tried[name]["fixed"] + state["evaluation"] + work) / PLANNED
    for i, name in enumerate(sorted(names, key=need.get)):
        found[name] = min(need[name], seconds / (len(names) - i))
        seconds -= found[name]
    return found


def say(name, plan, total):
    """What a method will do, and what was cut."""
    passes = f"{plan['epochs']:g} pass{'es' * (plan['epochs'] != 1)}"
    text = f"{name}: {passes} over {plan['prompts']} of your {total} training prompts"
    if plan["asked"] > 1:
        text += f", {plan['rounds']} of {plan['asked']} rounds"
    cut = plan["prompts"] * plan["rounds"] / total / plan["asked"]
    text += f" ({cut:.0%} of the whole work)" if cut < 1 else " (nothing was cut)"
    return (f"{text}, batches of {plan['batch_size']}: about {in_words(plan['seconds'])} of its "
            f"{in_words(plan['share'])}")
