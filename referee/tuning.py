"""Chooses settings on validation seeds: python -m referee METHOD --tune

experiments/<method>.py says what is tried, in the form of docs/protocol.md:
    TUNING = {title: dict(arm={options}, grid={option: (values)}, method="dpo", start={options})}
The settings are all combinations of the grid's values, laid over `arm`; or settings=[{options}, ...] lists
them. With `start` they begin from the policy that these options make. Each runs on the validation seeds,
which no report uses, and is stored in results/tuning/<method>.json.
The proxy is what a method may maximise, so it is no judge of the method, and gold must not choose. The judge
chooses: people's scores, which no method sees. Fluency keeps out policies that break the language.
"""
import importlib
import itertools
import math
import textwrap
from pathlib import Path
from statistics import fmean, variance

from harness import UserError
from referee.arms import given_flags
from referee.runs import complete
from referee.statistics import seeds_needed
from referee.store import results_path, run_id, shown, once
from referee.tables import (arm_rows, collect, markdown_table, provenance, said_of_file, seeds_in_words,
                            stored, text_table)

SEEDS = 100, 101, 102
START = "start"                                 # the arm that settings of an entry with `start` begin from
EVALUATION = {"eval_prompts": 128, "eval_samples": 8}
FLUENCY_LOST, DIFFERENCE = 0.03, 0.1            # allowed in a chosen setting; for which seeds are counted
COLUMNS = {"eval/win_rate_judge": "win rate by judge", "eval/judge": "judge", "eval/fluency": "fluency",
           "eval/kl": "KL, nats", "cpu_seconds": "CPU s", "eval/gold": "gold (not used)"}
RULES = ("± is half a 95% t-interval over the validation seeds. The chosen setting has the highest win rate "
         "by the judge over the policy that the runs start from, of the settings whose fluency is at least "
         f"that policy's less {FLUENCY_LOST}.")


def in_words(settings):
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())


def settings_of(title, entry):
    """The settings that an entry of TUNING tries, without what they share."""
    if ("grid" in entry) == ("settings" in entry):
        raise UserError(f"TUNING, {title}: give either grid or settings")
    grid = entry.get("grid", {})
    return entry.get("settings") or [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def experiments_to_tune(method_name):
    """TUNING in the form of EXPERIMENTS. UserError where a method has none."""
    tuning = getattr(importlib.import_module(f"experiments.{method_name}"), "TUNING", {})
    if not tuning:
        raise UserError(f"experiments/{method_name}.py has no TUNING: nothing to tune")
    return as_experiments(tuning)


def as_experiments(tuning):
    """TUNING in the form of EXPERIMENTS: an experiment for each title, an arm for each setting."""
    experiments = {}
    for title, entry in tuning.items():
        shared = entry.get("arm", {}) | {k: entry[k] for k in ("method",) if k in entry}
        begin = {"start": START} if "start" in entry else {}
        experiments[title] = dict(
            question=f"{title} ({in_words(shared)})" if shared else title, evaluation=EVALUATION,
            arms={START: entry["start"]} if begin else {})
        for some in settings_of(title, entry):
            experiments[title]["arms"][in_words(some) or "as it is"] = shared | some | begin
    return experiments


def no_judge(what):
    return UserError(f"{what}: no judge (eval/win_rate_judge) or no fluency; --tune chooses by them. Only "
                     "the embedded task has them: leave out --data and --reward")


def whole(arms):
    """The arms {name: {seed: run}} of which no run has diverged."""
    return {name: runs for name, runs in arms.items() if not any("diverged" in run for run in runs.values())}


def choose(what, arms, sft=None):
    """(name of the chosen setting, why) of {name: {seed: run}}; no name while runs are missing.

    sft: the fluency of the SFT policy, if the runs start from another one.
    """
    tried, arms = len(arms), whole(arms)
    if not arms:
        raise UserError(f"{what}: all settings have diverged; give lower learning rates")
    runs = [run for of_arm in arms.values() for run in of_arm.values()]
    for metric in ("eval/win_rate_judge", "eval/fluency"):
        if any(run.get(metric) is None for run in runs):
            raise no_judge(what)
    missing = len(arms) * len(SEEDS) - len(runs)
    if missing:
        return None, f"Nothing is chosen yet. Runs missing: {missing} of {len(arms) * len(SEEDS)}."
    least = (fmean(run["trace"][0]["eval/fluency"] for run in runs) if sft is None else sft) - FLUENCY_LOST
    wins, fluency = ({name: fmean(run[metric] for run in of_arm.values()) for name, of_arm in arms.items()}
                     for metric in ("eval/win_rate_judge", "eval/fluency"))
    fluent = [name for name in arms if fluency[name] >= least - 1e-9]
    if not fluent:
        name = max(arms, key=fluency.get)
        return name, (f"No setting has a fluency of at least {least:.3f}. So the one with the highest "
                      f"fluency is chosen: {name}.")
    name = max(fluent, key=wins.get)
    return name, (f"Chosen: {name}. {len(fluent)} of {tried} settings have a fluency of at least "
                  f"{least:.3f}.")


def power(chosen):
    """How many seeds find a difference in gold, as {seed: run} of the chosen settings say; "" for just one.

    Only settings of the same builds of the models are paired; where there are several groups, the largest.
    The variances of the paired differences are averaged over all pairs of settings. The pairs share settings:
    the mean is twice the residual variance of the table of settings by seeds, and has its degrees of freedom.
    """
    groups = {}
    for runs in chosen:
        groups.setdefault(tuple(runs[seed].get("build") for seed in SEEDS), []).append(runs)
    largest = max(groups.values(), key=len, default=[])
    gold = [[runs[seed].get("eval/gold") for seed in SEEDS] for runs in largest]
    if len(gold) < 2 or any(None in row for row in gold):
        return ""
    pairs = itertools.combinations(gold, 2)
    deviation = math.sqrt(fmean(variance([a - b for a, b in zip(*pair)]) for pair in pairs))
    needed = seeds_in_words(seeds_needed(DIFFERENCE, deviation))
    return (f"Paired gold differences between chosen settings have a standard deviation of {deviation:.3f} "
            f"(d.f. {(len(gold) - 1) * (len(SEEDS) - 1)}); {needed} seeds find a difference of {DIFFERENCE} "
            "with 80% power.")


def tables_of(method_name, results):
    """[(heading, rows of the table, what is chosen and why)] of the titles, and the line about power."""
    experiments = experiments_to_tune(method_name)
    found, chosen = [], []
    for title, experiment in experiments.items():
        arms = collect(method_name, results, {title: experiment})[title]
        arms = {name: runs for name, runs in arms.items() if name != START}
        choice, why = choose(f"{method_name}, {title}", arms)
        marked = {f"{name} (chosen)" if name == choice else name: runs for name, runs in arms.items()}
        found.append((experiment["question"], arm_rows(marked, COLUMNS, "setting"), why))
        if choice and arms[choice] not in chosen:                      # two titles may choose the same runs
            chosen.append(arms[choice])
    return found, power(chosen)


def view_of(method_name, results):
    """What a report shows of a file. Each title is a table of its own: of the builds that most of it has."""
    experiments = experiments_to_tune(method_name)
    views = [shown(method_name, results, {title: experiments[title]}) for title in experiments]
    runs = {run_id(run): run for view in views for run in view["runs"]}
    machines = [machine for view in views for machine in view["machines"]]
    others = shown(method_name, results, experiments)["kept"]["other arms"]
    return results | {"runs": [*runs.values()], "seeds": sorted({run["seed"] for run in runs.values()}),
                      "machines": once(machines),
                      "kept": {"other arms": others,
                               "other builds": len(results["runs"]) - len(runs) - others}}


def report(method_name, given={}, results_dir="results"):
    """Print a table for each title."""
    experiments_to_tune(method_name)                                       # UserError where there are none
    folder = Path(results_dir) / "tuning"
    results = stored(method_name, folder, given, "--tune")
    view = view_of(method_name, results)
    found, line = tables_of(method_name, results)
    print(textwrap.fill(said_of_file(results_path(method_name, given, folder), view), 110))
    for heading, rows, why in found:
        print(f"\n{heading}\n{text_table(rows)}\n{textwrap.fill(why, 110)}")
    for text in (RULES, line, provenance(view)):
        if text:
            print("\n" + textwrap.fill(text, 110))


def tune(method_name, config, results_dir="results", runs_dir="runs/tuning"):
    """Run what is missing of the settings on the validation seeds, then report."""
    if config.data != "reviews" or config.reward not in ("", "gold"):
        raise no_judge(f"{method_name} with these flags")
    folder = Path(results_dir) / "tuning"
    complete(method_name, config, SEEDS, folder, runs_dir, experiments_to_tune(method_name))
    report(method_name, given_flags(config), results_dir)


def tuning_block(method_name, results_dir="results"):
    """The same tables in Markdown, for the page of a method."""
    experiments_to_tune(method_name)
    folder = Path(results_dir) / "tuning"
    if not results_path(method_name, {}, folder).exists():
        return f"Not tuned yet: `python -m referee {method_name} --tune`."
    results = stored(method_name, folder)
    found, line = tables_of(method_name, results)
    parts = [part for heading, rows, why in found for part in (f"**{heading}**", markdown_table(rows), why)]
    parts += [RULES, line, provenance(view_of(method_name, results))]
    return "\n\n".join(part for part in parts if part)
