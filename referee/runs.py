"""Runs a method's experiments: every arm with every seed, stored as they finish.

    python dpo.py --reproduce --seeds 5        # the same: python -m referee dpo --seeds 5

Seeds 0, 1, 2, ... are for reporting. Their number is fixed before the first one runs. Tuning uses seeds from
100 on, so that nothing reported was chosen by looking at it.

A run that is stored is not made again: stop at any time and give the same command to go on. A stored run
belongs to an arm if the keys are equal (arms.py). Runs of other settings are dropped from the file. All is
written below the current directory: results/<method>.json, and runs/referee/<method>/ for the policies, which
only arms that start from another arm need again.
"""
import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

import harness
from referee.arms import (NO_IDENTITY, SET_HERE, config_of, defaults, differences, experiments_of, identity,
                          load, outdated, plan)
from referee.statistics import best_of_n_curve
from referee.tables import report

SECONDS_PER_ARM, SECONDS_PER_SEED = 20, 100                  # first guess: one run; building a seed's models
PACKAGES = "torch", "transformers", "tokenizers", "numpy"


def rounded(x):
    """Six significant digits: enough to judge by, and a file whose diff can be read. NaN becomes null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


class Results:
    """results/<method>.json while runs are added to it."""

    def __init__(self, method_name, given, arms, path):
        self.method_name, self.given, self.arms, self.path = method_name, given, arms, path
        stored = load(path)
        all_runs = stored.get("runs", [])
        self.runs = {(run["key"], run["seed"]): run for run in all_runs
                     if run["key"] in arms and not outdated(stored)}
        self.dropped = len(all_runs) - len(self.runs)
        self.header = {k: stored.get(k) for k in ("software", "device")}
        self.curves = stored.get("best_of_n", {})
        seconds = [run["seconds"] for run in all_runs if run.get("seconds")]
        self.seconds_per_run = fmean(seconds) if seconds else SECONDS_PER_ARM

    def note_machine(self, device):
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        processor = platform.processor() or platform.machine()
        self.header = {"software": {"python": platform.python_version()} | versions,
                       "device": f"{device}: {processor}, {os.cpu_count()} cores"}

    def save(self):
        harness.write_json(self.path, {
            "method": self.method_name, **self.header,
            "defaults": defaults({arm.method for arm in self.arms.values()}),
            "config": {k: v for k, v in self.given.items() if k not in NO_IDENTITY},
            "seeds": sorted({seed for _, seed in self.runs}),
            "runs": sorted(self.runs.values(), key=lambda r: (r["arm"], r["seed"], r["key"])),
            "best_of_n": dict(sorted(self.curves.items(), key=lambda item: int(item[0]))),
        })


def missing(arms, runs, seed, folder):
    """Keys of the arms to run for a seed, each after the arm that it starts from."""
    todo = []

    def need(key):
        start = arms[key].start
        # Results are committed, policies are not: in a fresh clone a finished starter has no directory.
        if start and not ((start.key, seed) in runs and folder(start, seed).is_dir()):
            need(start.key)
        if key not in todo:
            todo.append(key)

    for key in arms:
        if (key, seed) not in runs:
            need(key)
    return todo


def run_arm(arm, method_name, seed, folder):
    """One run of an arm; returns what is stored of it."""
    out = folder(arm, seed)
    more = {"policy": str(folder(arm.start, seed))} if arm.start else {}
    config = config_of(arm, seed=seed, quiet=True, out=str(out), **more)
    shutil.rmtree(out, ignore_errors=True)                              # left by a run that was killed
    result = harness.launch(importlib.import_module(arm.method).train, config)
    overrides = {k: v for k, v in identity(config).items() if not (arm.start and k == "policy")}
    if arm.method != method_name:
        overrides["method"] = arm.method
    if arm.start:
        overrides["start"] = arm.start.name
    return rounded({"arm": arm.name, "seed": seed, "key": arm.key, "config": overrides}
                   | {k: v for k, v in result.items() if k != "out"})


def reproduce(method_name, config, results_dir="results", runs_dir="runs/referee"):
    """Run what is missing of the method's experiments for seeds 0 .. config.seeds - 1, then report."""
    given = {k: v for k, v in differences(config).items() if k not in SET_HERE}
    arms = {}                                            # experiments share the runs of identical arms
    for planned in plan(method_name, given).values():
        for arm in planned.values():
            arms.setdefault(arm.key, arm)
    results = Results(method_name, given, arms, Path(results_dir) / f"{method_name}.json")
    panels = [panel for e in experiments_of(method_name).values() for panel in e.get("panels", [])]
    wants_curve = any(panel.get("best_of_n") for panel in panels)

    def folder(arm, seed):
        name = arms[arm.key].name                       # of the first of identical arms, which is the one run
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        return Path(runs_dir) / method_name / f"{slug}-{arm.key}" / f"seed{seed}"

    work = {seed: missing(arms, results.runs, seed, folder) for seed in range(config.seeds)}
    work = {seed: todo for seed, todo in work.items()
            if todo or (wants_curve and str(seed) not in results.curves)}
    total = sum(map(len, work.values()))
    minutes = math.ceil((total * results.seconds_per_run + len(work) * SECONDS_PER_SEED) / 60)
    estimate = f"{total} runs to do, about {minutes} min" if work else "nothing to run"
    print(f"{method_name}: {estimate}; "
          f"{len(results.runs)} stored, {results.dropped} of other settings dropped")

    # A starter that is trained again must not count as finished while its directory is half written.
    for seed, todo in work.items():
        for key in todo:
            results.runs.pop((key, seed), None)
    if work:
        results.note_machine(config.device)
    results.save()
    with tqdm(total=total, disable=not total) as bar:
        for seed, todo in work.items():
            bar.set_description(f"seed {seed}: building")
            seed_config = type(config)(**given | {"seed": seed, "quiet": True})
            harness.load_task(seed_config)
            if wants_curve:
                pool = harness.test_pool(seed_config)
                results.curves[str(seed)] = rounded(best_of_n_curve(*pool)) if pool else None
            for key in todo:
                bar.set_description(f"seed {seed}: {arms[key].name}")
                results.runs[key, seed] = run_arm(arms[key], method_name, seed, folder)
                results.save()
                bar.update()
    results.save()
    return report(method_name, results_dir)
