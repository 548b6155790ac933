"""What results/ holds: which file is whose, how runs are added to it, and which of them a report shows.

A run is known by its arm's key, its seed and its build (harness.fingerprint: the SFT weights that it began
from). Runs that are not shown stay in their file: those of arms that were edited or removed or rely on a
default that is another now, and those of another build of their seed's models.
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

import harness
from referee.arms import NO_IDENTITY, defaults, load, plan

PACKAGES = "torch", "transformers", "tokenizers", "numpy"


def short_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def results_path(method_name, given, results_dir="results"):
    """<method>.json; with flags that make another experiment <method>@<name=value,...>.json.

    Where the flags are too long for a name, a hash stands for them; where a character had to be replaced, a
    hash is added.
    """
    flags = {k: given[k] for k in sorted(given) if k not in NO_IDENTITY}
    text = ",".join(f"{k}={v}" for k, v in flags.items())
    safe = re.sub(r"[^A-Za-z0-9=,._+-]", "_", text)
    name = f"{method_name}@{safe}" + (f"-{short_hash(flags)}" if safe != text else "") + ".json"
    if len(name) > 80:
        name = f"{method_name}@{short_hash(flags)}.json"
    return Path(results_dir) / (name if flags else f"{method_name}.json")


def run_id(run):
    return run["key"], run["seed"], run.get("build")


def curve_name(seed, build):
    """Under which name a seed's best-of-n curve is stored."""
    return str(seed) if build is None else f"{seed} {build}"


def machines_of(stored):
    """{build: machine and software} of the runs of a file. Before there were builds, it had one machine."""
    old = {"None": {k: stored[k] for k in ("software", "device")}} if stored.get("software") else {}
    return stored.get("machines", old)


def once(machines):
    """Each of the machines once, in the order in which they come first."""
    return [machine for i, machine in enumerate(machines) if machine not in machines[:i]]


def in_order(runs):
    return sorted(runs, key=lambda r: (r["arm"], r["seed"], r["key"], str(r.get("build"))))


class Store:
    """A results file that several processes may add to at once."""

    def __init__(self, method_name, given, methods, path):
        self.method_name, self.methods, self.path = method_name, methods, path
        self.flags = {k: v for k, v in given.items() if k not in NO_IDENTITY}
        self.runs, self.curves, self.machines, self.machine, self.defaults = {}, {}, {}, {}, {}
        self.merge()

    def merge(self, runs=(), curves={}):
        """Read the file again, add to it, write it if that changes it. A stored run is never replaced."""
        with harness.lock(self.path):
            stored = load(self.path)
            kept = [*self.runs.values(), *runs, *stored.get("runs", [])]               # the last one stays
            self.runs = {run_id(run): run for run in kept}
            self.curves = self.curves | curves | stored.get("best_of_n", {})
            self.machines = machines_of(stored) | self.machines
            header = self.machine or {k: stored.get(k) for k in ("software", "device")}
            now, then = defaults(self.methods), stored.get("defaults", {})
            self.defaults = then | {name: now[name] | then.get(name, {}) for name in now}      # of the keys
            merged = {
                "method": self.method_name, **header, "machines": dict(sorted(self.machines.items())),
                "defaults": self.defaults,
                "config": self.flags,
                "seeds": sorted({run["seed"] for run in self.runs.values()}),
                "runs": in_order(self.runs.values()),
                "best_of_n": dict(sorted(self.curves.items(),
                                         key=lambda item: (int(item[0].split()[0]), item[0]))),
            }
            if merged != stored:
                harness.write_json(self.path, merged)

    def note_machine(self, build, device):
        """Say on which machine, and with which software, the runs of this build are made from now on."""
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        processor = platform.processor() or platform.machine()
        self.machine = {"software": {"python": platform.python_version()} | versions,
                        "device": f"{device}: {processor}, {os.cpu_count()} cores"}
        self.machines[str(build)] = self.machine


def build_to_show(runs):
    """Of the runs of one seed: the build that most of them have; of equals, the one of the newest run."""
    def rank(build):
        own = [run.get("finished", "") for run in runs if run.get("build") == build]
        return len(own), max(own), str(build)
    return max({run.get("build") for run in runs}, key=rank)


def planned(method_name, results, experiments=None):
    """{experiment: {name: Arm}} whose keys are those of the runs of this file."""
    return plan(method_name, results["config"], experiments, results["defaults"])


def shown(method_name, results, experiments=None):
    """What a report shows of a file: runs of the present arms, of one build for each seed.

    "kept" says how many runs are not shown, and why. "machines" are those of the runs that are shown.
    """
    arms = planned(method_name, results, experiments)
    keys = {arm.key for of_title in arms.values() for arm in of_title.values()}
    ours = [run for run in results["runs"] if run["key"] in keys]
    by_seed = {}
    for run in ours:
        by_seed.setdefault(run["seed"], []).append(run)
    builds = {seed: build_to_show(by_seed[seed]) for seed in sorted(by_seed)}
    runs = [run for run in ours if run.get("build") == builds[run["seed"]]]
    curves = {str(seed): results["best_of_n"].get(curve_name(seed, build)) for seed, build in builds.items()}
    machines = machines_of(results)
    machines = [machines[str(build)] for build in builds.values() if str(build) in machines]
    return results | {
        "runs": runs, "seeds": list(builds), "best_of_n": curves,
        "machines": once(machines),
        "kept": {"other arms": len(results["runs"]) - len(ours), "other builds": len(ours) - len(runs)}}
