"""What an arm is, and which stored runs are its own.

experiments/<method>.py names arms: settings of a method. An arm's key is a hash of its method, of the
settings that differ from the method's defaults, and of the arm that it starts from. The defaults are those
that the results file holds: so a key stays, whatever the default of today is. Seed, device and directories
are not part of it, and neither is the code: after a change of an algorithm, move its JSON.
"""
import dataclasses
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import UserError
from harness.config import SET_HERE, differences

EVALUATION = {"eval_prompts": 512, "eval_samples": 8}          # of every arm, unless the user gave another
NO_IDENTITY = SET_HERE | {"device", "token_budget", "gradient_checkpointing", "save_every",
                          "prompt"}                                        # these make no other experiment
# Options that all scripts share but every method tunes for itself: flags for one are not for the others.
OWN = {"lr", "schedule", "warmup", "batch_size", "epochs", "max_grad_norm", "temperature"}


class Arm(NamedTuple):
    name: str
    method: str
    settings: dict             # keyword arguments of the method's Config
    changes: dict              # those of them that are not the default
    start: Any                 # the Arm whose saved policy it starts from, or None
    key: str                   # hash of everything that makes it this experiment, the seed apart


def method_names():
    """The methods: every experiments/<name>.py that has a <name>.py beside the package."""
    root = Path(__file__).resolve().parents[1]
    return sorted(path.stem for path in root.glob("experiments/[!.]*.py") if (root / path.name).exists())


def config_class(name):
    """The Config of a method; for what is no script (the comparisons) the options that all share."""
    return harness.Config if name in ("comparison", "real_text") else importlib.import_module(name).Config


def experiments_of(method_name):
    return importlib.import_module(f"experiments.{method_name}").EXPERIMENTS


def given_flags(config):
    """What the user chose, as far as it reaches the arms.

    Only the command line tells whether an option of EVALUATION was given that is the script's own default.
    """
    said = {word.split("=")[0].strip("-").replace("-", "_") for word in sys.argv if word.startswith("--")}
    chosen = {k: v for k, v in differences(config).items() if k not in SET_HERE}
    return chosen | {k: getattr(config, k) for k in EVALUATION if k in said}


def identity(config, then={}):
    """The settings that make it another experiment."""
    return {k: v for k, v in differences(config, then).items() if k not in NO_IDENTITY}


def config_of(arm, **more):
    return config_class(arm.method)(**arm.settings | more)


def plan(method_name, given, experiments=None, then={}):
    """{experiment: {name: Arm}}, an arm after the one that it starts from; `given` are the user's flags.

    Args: experiments: as in EXPERIMENTS, which they are by default. then: {method: its defaults} of a file.
    """
    situation = {f.name for f in dataclasses.fields(harness.Config)} - OWN

    def add(name, experiment, arms):
        if name in arms:
            return arms[name]
        overrides = dict(experiment["arms"][name])
        method = overrides.pop("method", method_name)
        # SteerLM has an option --start: "start" is an arm only where an arm has that name.
        start = overrides.pop("start") if overrides.get("start") in experiment["arms"] else None
        starter = add(start, experiment, arms) if start else None
        # dpo's --beta is not rso's, nor is its --lr: another method gets only the model, the data and so on.
        reaching = {k: v for k, v in given.items() if method == method_name or k in situation}
        settings = experiment.get("evaluation", EVALUATION) | reaching | overrides
        changes = identity(config_class(method)(**settings), then.get(method, {}))
        text = json.dumps([method, changes, starter and starter.key], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        arms[name] = Arm(name, method, settings, changes, starter, key)
        return arms[name]

    planned = {}
    for title, experiment in (experiments or experiments_of(method_name)).items():
        planned[title] = {}
        for name in experiment["arms"]:
            add(name, experiment, planned[title])
    return planned


def default_arm(method_name, given, untrained=False):
    """(experiment, arm) that is nearest to the method's default run, or None.

    Of the method's own arms that start from no other arm, and are evaluated at their own temperature: the
    first with the fewest settings that differ from the defaults. How often, and on how many prompts, a run is
    evaluated does not count. With `untrained`: of the arms of 0 epochs (the policy that every method starts
    from), else of all others.
    """
    found = []
    for title, arms in plan(method_name, given).items():
        for arm in arms.values():
            config = config_of(arm)
            changes = identity(config).keys() - {"eval_every", *EVALUATION}
            own = arm.method == method_name and not arm.start and "eval_temperature" not in changes
            if own and (config.epochs == 0) == untrained:
                found.append((len(changes), title, arm))
    return min(found, key=lambda entry: entry[0])[1:] if found else None


def defaults(method_names):
    """{method: {option: default}}, stored with the runs, since a key holds only what differs from it."""
    configs = {name: config_class(name)() for name in sorted(method_names)}
    return {name: {k: v for k, v in dataclasses.asdict(config).items() if k not in NO_IDENTITY}
            for name, config in configs.items()}


KINDS = {"runs": list, "config": dict, "defaults": dict, "best_of_n": dict, "machines": dict}


def load(path):
    """What a results file holds; {} where there is none. UserError for one that is damaged."""
    if not Path(path).exists():
        return {}
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
        if not isinstance(stored, dict):
            raise ValueError("no JSON object")
        wrong = [name for name, kind in KINDS.items() if not isinstance(stored.get(name, kind()), kind)]
        if wrong or not all(isinstance(run, dict) for run in stored.get("runs", [])):
            raise ValueError(f"{(wrong or ['runs'])[0]} is of a wrong type")
        return stored
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): restore or delete it") from None
