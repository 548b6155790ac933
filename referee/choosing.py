"""What the comparison's arms would have been if other numbers had chosen their settings.

The judge is simulated people: somebody with a reward model and pairs has no such numbers. From the runs of
the tuning alone (results/tuning/comparison.json); nothing is run.
"""
from pathlib import Path
from statistics import fmean, median

from experiments.comparison import ARMS, LABELS
from referee.comparison import BUDGET, NAME, affordable, tuned
from referee.statistics import mean_of
from referee.store import results_path
from referee.tables import markdown_table
from referee.tuning import FLUENCY_LOST, in_words

HEADER = ["arm", "by the judge, if fluent (as chosen)", "by the proxy, if fluent", "by the proxy alone",
          "median of the settings"]


def gold_of(fit, chosen, least):
    """Gold of the settings that four rules choose. fit: {setting: {seed: run}}; chosen: the name of one."""
    gold, proxy, fluency = ({name: mean_of(runs, metric) for name, runs in fit.items()}
                            for metric in ("eval/gold", "eval/proxy", "eval/fluency"))
    fluent = [name for name in fit if fluency[name] >= least - 1e-9] or [max(fit, key=fluency.get)]
    return [gold[chosen], gold[max(fluent, key=proxy.get)], gold[max(fit, key=proxy.get)],
            median(gold.values())]


def rows(results_dir="results"):
    """A row for each arm, the best first, of the settings that fit the time; the first row is the header."""
    _, collected, chosen = tuned(results_dir)
    (units,) = collected[BUDGET].values()
    least = fmean(run["trace"][0]["eval/fluency"] for run in units.values()) - FLUENCY_LOST
    found = {name: gold_of(affordable(collected[name], units), in_words(chosen[name][0]), least)
             for name in ARMS}
    best_first = sorted(found, key=lambda name: -found[name][0])
    return [HEADER] + [[LABELS.get(name, name), *(f"{gold:.2f}" for gold in found[name])]
                       for name in best_first]


def block(results_dir="results"):
    """The table for docs/comparison.md."""
    if not results_path(NAME, {}, Path(results_dir) / "tuning").exists():
        return f"Not tuned yet: `python -m referee {NAME} --tune`."
    return markdown_table(rows(results_dir))
