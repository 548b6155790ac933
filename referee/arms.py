"""What an arm is, and which stored runs are its own.

experiments/<method>.py names arms: settings of a method. An arm's key is a hash of its method, of the
settings that differ from the method's defaults, and of the arm that it starts from. Seed, device and
directories are not part of it, and neither is the code: after a change of an algorithm, move its JSON.
"""
import dataclasses
import hashlib
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import harness

SET_HERE = {"seed", "seeds", "jobs", "out", "quiet", "reproduce", "resume"}      # filled in by the referee
NO_IDENTITY = SET_HERE | {"device"}                                    # options that make no other experiment
# Options that all scripts share but every method tunes for itself: flags for one are not for the others.
OWN = {"lr", "schedule", "warmup", "batch_size", "epochs", "max_grad_norm", "temperature"}


class Arm(NamedTuple):
    name: str
    method: str
    settings: dict             # keyword arguments of the method's Config
    start: Any                 # the Arm whose saved policy it starts from, or None
    key: str                   # hash of everything that makes it this experiment, the seed apart


def method_names():
    """The methods: every experiments/<name>.py that has a <name>.py beside the package."""
    root = Path(__file__).resolve().parents[1]
    return sorted(path.stem for path in root.glob("experiments/*.py") if (root / path.name).exists())


def experiments_of(method_name):
    return importlib.import_module(f"experiments.{method_name}").EXPERIMENTS


def differences(config):
    """The settings that are not the default.

    One whose default is None was perhaps filled in from the others (a learning rate that depends on the
    model). Another method fills it in otherwise, so it counts only if it was really given.
    """
    values, default = vars(config), vars(type(config)())
    chosen = {f.name: values[f.name] for f in dataclasses.fields(config)
              if f.default is not None and values[f.name] != default[f.name]}
    filled = vars(type(config)(**{k: v for k, v in chosen.items() if k not in SET_HERE}))
    return chosen | {f.name: values[f.name] for f in dataclasses.fields(config)
                     if f.default is None and values[f.name] != filled[f.name]}


def given_flags(config):
    """What the user chose, as far as it reaches the arms."""
    return {k: v for k, v in differences(config).items() if k not in SET_HERE}


def identity(config):
    """The settings that make it another experiment."""
    return {k: v for k, v in differences(config).items() if k not in NO_IDENTITY}


def config_of(arm, **more):
    return importlib.import_module(arm.method).Config(**arm.settings | more)


def plan(method_name, given):
    """{experiment: {name: Arm}}, an arm after the one that it starts from; `given` are the user's flags."""
    situation = {f.name for f in dataclasses.fields(harness.Config)} - OWN

    def add(name, experiment, arms):
        if name in arms:
            return arms[name]
        overrides = dict(experiment["arms"][name])
        method = overrides.pop("method", method_name)
        start = overrides.pop("start", None)
        starter = add(start, experiment, arms) if start else None
        # dpo's --beta is not rso's, nor is its --lr: another method gets only the model, the data and so on.
        settings = {k: v for k, v in given.items() if method == method_name or k in situation} | overrides
        config = importlib.import_module(method).Config(**settings)
        text = json.dumps([method, identity(config), starter and starter.key], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        arms[name] = Arm(name, method, settings, starter, key)
        return arms[name]

    planned = {}
    for title, experiment in experiments_of(method_name).items():
        planned[title] = {}
        for name in experiment["arms"]:
            add(name, experiment, planned[title])
    return planned


def default_arm(method_name, given, untrained=False):
    """(experiment, arm) that is nearest to the method's default run, or None.

    Of the method's own arms that start from no other arm: the first with the fewest settings that differ from
    the defaults. How often a run is evaluated does not count. With `untrained`: of the arms of 0 epochs (the
    policy that every method starts from), else of all others.
    """
    found = []
    for title, arms in plan(method_name, given).items():
        for arm in arms.values():
            config = config_of(arm)
            if arm.method == method_name and not arm.start and (config.epochs == 0) == untrained:
                found.append((len(identity(config).keys() - {"eval_every"}), title, arm))
    return min(found, key=lambda entry: entry[0])[1:] if found else None


def defaults(method_names):
    """{method: {option: default}}, stored with the runs, since a key holds only what differs from it."""
    configs = {name: importlib.import_module(name).Config() for name in sorted(method_names)}
    return {name: {k: v for k, v in dataclasses.asdict(config).items() if k not in NO_IDENTITY}
            for name, config in configs.items()}


def outdated(results):
    """Has a default changed under the stored runs? An option that is new since then is no change."""
    now = defaults(results.get("defaults", {}))
    return any(now[name].get(k, v) != v
               for name, then in results.get("defaults", {}).items() for k, v in then.items())


def load(path):
    """What a results file holds; {} where there is none."""
    return json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
