"""Runs a method's experiments: every arm with every seed, stored as they finish.

    python dpo.py --reproduce --seeds 10 --jobs 2     # the same: python -m referee dpo --seeds 10 --jobs 2

Seeds 0, 1, 2, ... are for reporting. Their number is fixed before the first one runs. Tuning (tuning.py) uses
seeds from 100 on, so that nothing reported was chosen by looking at it.

A run that is stored is not made again: stop at any time and give the same command to go on. A stored run
belongs to an arm if the keys are equal (arms.py), and counts if it is of the seed's present build. All is
written below the current directory: results/ (store.py), and runs/referee/<method>/ for the policies, which
only arms that start from another arm need again. Several processes may work on one result: a lock beside a
run's directory says that one of them has it, <directory>.json that it is finished.
"""
import importlib
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean

import filelock
from tqdm import tqdm

import harness
from harness import UserError
from harness.config import differences
from referee import jobs
from referee.arms import config_class, config_of, experiments_of, given_flags, load, plan
from referee.statistics import best_of_n_curve
from referee.store import Store, curve_name, results_path, run_id
from referee.tables import report

SECONDS_PER_ARM, SECONDS_PER_SEED = 20, 100                  # first guess: one run; building a seed's models


def rounded(x):
    """Six significant digits: enough to judge by, and a file whose diff can be read. NaN becomes null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


class Work:
    """What has to be run of a method's experiments, as one process sees it. Others may work on the same."""

    def __init__(self, method_name, given, seeds, results_dir, runs_dir, experiments):
        self.method_name, self.given, self.seeds = method_name, given, list(seeds)
        self.config_class = config_class(method_name)
        methods = {arm.get("method", method_name) for e in experiments.values() for arm in e["arms"].values()}
        self.store = Store(method_name, given, methods, results_path(method_name, given, results_dir))
        self.runs_dir = Path(runs_dir) / self.store.path.stem             # keys are of one file of results
        self.arms = {}                                   # experiments share the runs of identical arms
        for planned in plan(method_name, given, experiments, self.store.defaults).values():
            for arm in planned.values():
                self.arms.setdefault(arm.key, arm)
        panels = [panel for e in experiments.values() for panel in e.get("panels", [])]
        self.wants_curve = any(panel.get("best_of_n") for panel in panels)
        self.builds = {}                                 # of each seed, where it is known
        self.known = {}                                  # evaluations of initial policies of this seed

    def config(self, seed):
        return self.config_class(**self.given | {"seed": seed, "quiet": True})

    def places(self, arm, seed):
        """Options of a run that are no part of its arm: where its model and data lie on this machine."""
        return {}

    def folder(self, key, seed):
        slug = re.sub(r"[^a-z0-9.]+", "-", self.arms[key].name.lower()).strip("-")
        return self.runs_dir / f"{slug}-{key}" / f"seed{seed}"

    def note(self, key, seed):
        """The file that says that a run's directory is complete."""
        return Path(f"{self.folder(key, seed)}.json")

    def missing(self, seed):
        """Keys of the arms to run for a seed, each after the arm that it starts from."""
        if seed not in self.builds and any(run["seed"] == seed for run in self.store.runs.values()):
            self.builds[seed] = harness.fingerprint(self.config(seed))
        todo = []

        def stored(key):
            return seed in self.builds and (key, seed, self.builds[seed]) in self.store.runs

        def need(key):
            start = self.arms[key].start
            # Results are committed, policies are not: in a fresh clone a finished starter has no directory.
            if start and not (stored(start.key) and self.has_policy(start.key, seed)):
                need(start.key)
            if key not in todo:
                todo.append(key)

        for key in self.arms:
            if not stored(key):
                need(key)
        return todo

    def has_policy(self, key, seed):
        """Is the policy of a stored run here? Of one that has diverged, what is here is that it has."""
        note = load(self.note(key, seed))
        return note.get("build", "") == self.builds[seed] and (
            "diverged" in note or self.folder(key, seed).is_dir())

    def lacks_curve(self, seed):
        known = seed in self.builds and curve_name(seed, self.builds[seed]) in self.store.curves
        return self.wants_curve and not known

    def left(self):
        """{seed: what is missing}, of the seeds that need anything, by what is stored now."""
        self.store.merge()
        todo = {seed: self.missing(seed) for seed in self.seeds}
        return {seed: keys for seed, keys in todo.items() if keys or self.lacks_curve(seed)}

    def go(self):
        """Do the work; yields (seed, what comes next). At first what no other process has, then the rest."""
        for wait in (False, True):
            for seed in self.left():
                yield seed, "building"
                self.prepare(seed)
                for key in self.missing(seed):
                    yield seed, self.arms[key].name
                    self.take(key, seed, wait)

    def prepare(self, seed):
        """The models, the build and the best-of-n curve of a seed."""
        config, self.known = self.config(seed), {}
        harness.load_task(config)
        self.builds[seed] = harness.fingerprint(config)
        self.store.note_machine(self.builds[seed], config.device)
        if self.lacks_curve(seed):
            pool = harness.test_pool(config)
            curve = rounded(best_of_n_curve(*pool)) if pool else None
            self.store.merge(curves={curve_name(seed, self.builds[seed]): curve})

    def take(self, key, seed, wait):
        """Run an arm, unless another process has it (if wait: once that one is through) or has run it."""
        try:
            with harness.lock(self.folder(key, seed)).acquire(timeout=-1 if wait else 0):
                self.store.merge()
                todo, start = self.missing(seed), self.arms[key].start
                if key in todo and not (start and start.key in todo):      # else another has the starter
                    run = self.elsewhere(self.arms[key], seed) or self.run_arm(self.arms[key], seed)
                    self.store.merge([run])
        except filelock.Timeout:
            pass

    def described(self, arm, seed):
        """What a stored run says of itself."""
        overrides = {k: v for k, v in arm.changes.items() if not (arm.start and k == "policy")}
        if arm.method != self.method_name:
            overrides["method"] = arm.method
        if arm.start:
            overrides["start"] = arm.start.name
        # The build is the seed's, even where the run began from the policy of another arm.
        return {"arm": arm.name, "seed": seed, "key": arm.key, "config": overrides,
                "build": self.builds[seed]}

    def elsewhere(self, arm, seed):
        """The same run, where another file of results has it (PPO is an arm of many methods).

        Not of an arm that starts from another one, or that another one starts from: that needs a policy.
        """
        wanted = arm.key, seed, self.builds[seed]
        alone = not arm.start and arm.key not in {a.start.key for a in self.arms.values() if a.start}
        others = self.store.path.parent.glob("[!.]*.json") if alone else ()
        for stored in (load(path) for path in sorted(others) if path != self.store.path):
            # Equal keys mean equal settings only if the defaults that they rest on are equal.
            if stored.get("defaults", {}).get(arm.method) == self.store.defaults[arm.method]:
                for run in stored.get("runs", []):
                    if run_id(run) == wanted:
                        return run | self.described(arm, seed)

    def run_arm(self, arm, seed):
        """One run of an arm; returns what is stored of it."""
        out, note = self.folder(arm.key, seed), self.note(arm.key, seed)
        more = self.places(arm, seed)
        if arm.start:                                # "{start}" in a setting stands for that arm's directory
            start = str(self.folder(arm.start.key, seed))
            more |= {k: v.replace("{start}", start) for k, v in arm.settings.items() if "{start}" in str(v)}
            more["policy"] = start
        config = config_of(arm, seed=seed, quiet=True, out=str(out), **more)
        note.unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)                              # left by a run that was killed
        try:
            if arm.start and "diverged" in load(self.note(arm.start.key, seed)):
                raise harness.Diverged(f"{arm.start.name}, from which it starts, has diverged")
            result = harness.launch(importlib.import_module(arm.method).train, config, self.known)
        except harness.Diverged as error:                 # stored, so that no verdict leaves this seed out
            print(f"{arm.name}, seed {seed}: {error}", file=sys.stderr)
            result = {"diverged": str(error), "trace": []}
        run = rounded({k: v for k, v in result.items() if k != "out"} | self.described(arm, seed))
        harness.write_json(note, run)
        return run


def complete(method_name, config, seeds, results_dir, runs_dir, experiments, make_work=Work, given=None,
             guess=(SECONDS_PER_ARM, SECONDS_PER_SEED)):
    """Run what is missing of the experiments for the seeds, in config.jobs processes."""
    given = given_flags(config) if given is None else given
    arguments = method_name, given, seeds, results_dir, runs_dir, experiments
    work = make_work(*arguments)
    left = work.left()
    total = sum(map(len, left.values()))
    seconds = [run["seconds"] for run in work.store.runs.values() if run.get("seconds")]
    seconds = total * (fmean(seconds) if seconds else guess[0]) + len(left) * guess[1]
    minutes = math.ceil(seconds / 60 / config.jobs)
    estimate = f"{total} runs to do, about {minutes} min" if left else "nothing to run"
    print(f"{method_name}: {estimate}; {len(work.store.runs)} stored in {work.store.path}")
    with tqdm(total=total, disable=not total) as bar:
        def show(text):
            bar.set_description(text, refresh=False)
            bar.update(total - sum(map(len, work.left().values())) - bar.n)
            bar.refresh()

        if config.jobs == 1:
            for seed, what in work.go():
                show(f"seed {seed}: {what}")
            show("done")
        elif left:
            jobs.run(config.jobs, make_work, arguments, lambda: show(f"{config.jobs} processes"))


def check_flags(config):
    """UserError for what the referee would not do."""
    for name in differences(config).keys() & {"seed", "out", "resume"}:
        raise UserError(f"--{name} is for one run: the referee takes --seeds, and goes on by itself")


def reproduce(method_name, config, results_dir="results", runs_dir="runs/referee"):
    """Run what is missing of the method's experiments for seeds 0 .. config.seeds - 1, then report."""
    complete(method_name, config, range(config.seeds), results_dir, runs_dir, experiments_of(method_name))
    return report(method_name, results_dir, given_flags(config))
