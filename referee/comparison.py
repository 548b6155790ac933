"""The substitutes side by side, in one limit of time: which settings are tried and chosen, what is run.

    python -m referee comparison --tune --jobs 2      # choose settings on validation seeds
    python -m referee comparison --jobs 2             # the arms with the chosen settings, on reporting seeds
    python -m referee comparison --report             # tables and figure from results/comparison.json

experiments/comparison.py says what is compared. The settings of each arm are chosen as in tuning.py, of
those that take at most MOST times the CPU seconds of ppo.py's default on the same validation seeds.
The arms are made from results/tuning/comparison.json, so no setting is copied by hand. `given` are the user's
flags: with those that make another experiment, the files are others (store.results_path).
"""
import itertools
import random
from pathlib import Path
from statistics import fmean

from experiments.comparison import (ARMS, FEW, LABELS, MAIN, MORE_PASSES, PPO, RECIPES, SECOND_SEEDS, SEEDS,
                                    SITUATIONS, TRIED, UNTRAINED)
from harness import UserError
from referee.arms import config_class, given_flags, load
from referee.runs import complete
from referee.store import results_path
from referee.tables import checked, collect
from referee.tuning import SEEDS as VALIDATION
from referee.tuning import START, as_experiments, choose, in_words, no_judge, whole

NAME, BUDGET, QUARTER, LITTLE = "comparison", "budget", "a quarter of the work", "little data"
MOST = 1.25                          # of the seconds of ppo.py's default; runs of the same work differ by 10%
EIGHTH = "demonstrations", "rated"                           # data of an arm's own: --limit does not cut it


# --------------------------------------------------------------------------------------------------- settings

def settings_of(name, entry):
    """The settings of an arm that are tried: the default, if the grid has it, and others drawn at random."""
    grid, shared = entry["grid"], {k: v for k, v in entry["arm"].items() if k != "method"}
    usual = vars(config_class(entry["arm"]["method"])(**shared))
    every = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    first = [settings for settings in every if settings == {k: usual[k] for k in grid}]
    others = [settings for settings in every if settings not in first]
    return first + random.Random(f"settings {name}").sample(others, TRIED - len(first))


def to_tune():
    """What is tried, in the form of TUNING; the first title is the run whose time is the budget."""
    return {BUDGET: dict(arm=PPO, settings=[{}])} | {
        name: dict(arm=entry["arm"], settings=settings_of(name, entry))
        | ({"start": entry["start"]} if "start" in entry else {}) for name, entry in ARMS.items()}


def little(name):
    """The title under which an arm is tuned where there are few data."""
    return f"{name}, {LITTLE}"


def with_few(settings, more={}):
    """The settings where there is an eighth of the data."""
    return settings | {k: v // 8 for k, v in settings.items() if k in EIGHTH} | {"limit": FEW} | more


def few_arm(name, settings):
    """An arm with its chosen settings where there are few data."""
    return with_few(ARMS[name]["arm"] | settings, {} if "start" in ARMS[name] else ARMS[name].get("few", {}))


def few_start(entry):
    """What an arm starts from where there are few data."""
    return with_few(entry["start"], entry.get("few", {}))


def to_tune_again(chosen):
    """How often the data are used where there are few; of chosen: {arm: settings}, the rest stays."""
    found = {}
    for name, settings in chosen.items():
        entry, passes = ARMS[name], ARMS[name].get("passes", "epochs")
        found[little(name)] = dict(
            arm=few_arm(name, settings),
            settings=[{passes: settings[passes] * factor} for factor in MORE_PASSES]) | (
            {"start": few_start(entry)} if "start" in entry else {})
    return found


def cost(run, start=None):
    """CPU seconds of training; those of the run that it starts from are added."""
    return run["cpu_seconds"] + (start["cpu_seconds"] if start else 0)


def affordable(arms, units):
    """The arms whose mean cost, in units of the budget's run on the same seed, is at most MOST.

    arms: {name: {seed: run}}, START among them where they start from it; units: {seed: run}.
    """
    starts, arms = arms.get(START, {}), whole(arms)
    share = {name: fmean(cost(run, starts.get(seed)) / cost(units[seed]) for seed, run in runs.items())
             for name, runs in arms.items() if name != START}
    return {name: arms[name] for name in share if share[name] <= MOST}


def choices(tuning, collected):
    """{title: (the chosen settings, or None; a sentence)}, BUDGET left out.

    collected: {title: {setting: {seed: run}}}. None where runs are missing, or no setting fits the budget.
    """
    (units,), found = collected[BUDGET].values(), {}
    for title in (title for title in tuning if title != BUDGET):
        arms, tried = collected[title], {in_words(s): s for s in tuning[title]["settings"]}
        missing = sum(len(VALIDATION) - len(runs) for runs in (*arms.values(), units))
        fit = {} if missing else affordable(arms, units)
        if fit:
            name, why = choose(title, fit, fmean(run["trace"][0]["eval/fluency"] for run in units.values()))
            found[title] = tried[name], f"{len(fit)} of {len(tried)} settings fit the time. {why}"
        else:
            found[title] = None, (f"Nothing is chosen yet. Runs missing: {missing}." if missing else
                                  f"No setting takes at most {MOST} times the budget: its grid in "
                                  "experiments/comparison.py needs cheaper ones.")
    return found


def tuned(results_dir="results", given={}):
    """({title: entry of TUNING}, {title: {setting: {seed: run}}}, {title: choice}), as far as there are runs.

    The second round, of LITTLE, is there once all settings of the first are chosen.
    """
    path = results_path(NAME, given, Path(results_dir) / "tuning")
    stored = checked(load(path), path) if path.exists() else {}
    tuning, collected, chosen = {}, {}, {}
    for more in (to_tune, lambda: to_tune_again({name: chosen[name][0] for name in ARMS})):
        if all(settings is not None for settings, _ in chosen.values()):
            new = more()
            experiments = as_experiments(new)
            collected |= collect(NAME, stored, experiments) if stored else {
                title: {name: {} for name in e["arms"]} for title, e in experiments.items()}
            tuning, chosen = tuning | new, chosen | choices(new, collected)
    return tuning, collected, chosen


def tune(config, results_dir="results", runs_dir="runs/tuning"):
    """Run what is missing on the validation seeds: first all settings, then how often to use few data."""
    given, folder = given_flags(config), Path(results_dir) / "tuning"
    if config.data != "reviews" or config.reward not in ("", "gold"):
        raise no_judge(f"{NAME} with these flags")
    for _ in range(2):
        tuning, _, _ = tuned(results_dir, given)
        complete(NAME, config, VALIDATION, folder, runs_dir, as_experiments(tuning))


# ------------------------------------------------------------------------------------------------------- arms

def smaller(settings, sizes):
    """The settings with the options `sizes` divided by 4; whole numbers stay whole, and at least 1."""
    return settings | {k: max(1, round(settings[k] / 4)) if isinstance(settings[k], int) else settings[k] / 4
                       for k in sizes}


def start_of(name):
    return f"{name}: start"


def arms_with(chosen, situation):
    """ARMS with chosen settings {name: settings} in a situation, each after the arm that it starts from."""
    found = {}
    for name, settings in chosen.items():
        entry, arm = ARMS[name], ARMS[name]["arm"] | settings | situation
        if "start" in entry:
            found[start_of(name)] = few_start(entry) if "limit" in situation else entry["start"] | situation
            arm |= {"start": start_of(name)}
        found[name] = arm
    return found


def experiments(results_dir="results", given={}):
    """All arms with the chosen settings, in the form of EXPERIMENTS. UserError before all are chosen."""
    if not results_path(NAME, given, Path(results_dir) / "tuning").exists():
        given = {}                                          # a larger model has the small one's settings
    chosen = {title: settings for title, (settings, _) in tuned(results_dir, given)[2].items()}
    missing = [title for title in (*ARMS, *map(little, ARMS)) if chosen.get(title) is None]
    if missing:
        raise UserError(f"no settings are chosen yet for {missing[0]}"
                        + f" and {len(missing) - 1} others" * (len(missing) > 1)
                        + f": python -m referee {NAME} --tune (with --report it says why)")
    full, found = {name: chosen[name] for name in ARMS}, {}
    for title, (question, situation) in SITUATIONS.items():
        own = full if title != LITTLE else {
            name: few_arm(name, full[name]) | chosen[little(name)] for name in ARMS}
        others = UNTRAINED | (RECIPES if title != LITTLE else {}) | ({BUDGET: PPO} if not situation else {})
        arms = {name: arm | situation for name, arm in others.items()} | arms_with(own, situation)
        found[title] = dict(question=question, claims=[], arms=arms, panels=[dict(best_of_n=True)])
    less = {name: smaller(full[name], ARMS[name].get("size", ("epochs",))) for name in ARMS
            if "start" not in ARMS[name]}
    found[QUARTER] = dict(question="The chosen settings with about a quarter of the passes.", claims=[],
                          arms=arms_with(less, {}))
    return found


def run(config, seeds=(), results_dir="results", runs_dir="runs/referee"):
    """Run what is missing: every situation on the first seeds, the clean one on the second seeds too.

    With flags that make another experiment, or with `seeds`, only the clean one, on these or the first. With
    flags, only the main arms that have a rank.
    """
    given = given_flags(config)
    planned = experiments(results_dir, given)
    clean = {"clean": planned["clean"]}
    if given:
        arms = {name: arm for name, arm in clean["clean"]["arms"].items()
                if LABELS.get(name, name) in MAIN and name not in RECIPES}
        clean = {"clean": clean["clean"] | {"arms": arms}}
    complete(NAME, config, seeds or SEEDS, results_dir, runs_dir, clean if given or seeds else planned)
    if not (seeds or given):
        complete(NAME, config, SECOND_SEEDS, results_dir, runs_dir, clean)
