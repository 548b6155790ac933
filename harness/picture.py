"""run.png: the picture of one run, to be read on a wall; made after everything else is saved.

12 inches are 1600 pixels, no type is below 13 points. matplotlib is optional, and imported only to draw.
"""
import json
import math
import textwrap
from itertools import cycle
from pathlib import Path

from harness.config import SET_HERE, differences, method_name
from harness.directory import rows_until
from harness.evaluation import SCORES

FILE = "run.png"
MOST = 6                                                              # panels
KEY = "whiskers: standard errors over test prompts or pairs; faint: single steps; dashed: sample means"
STYLE = {"font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold", "legend.fontsize": 13,
         "legend.handlelength": 1.2, "legend.columnspacing": 1.0, "axes.spines.top": False,
         "axes.spines.right": False, "errorbar.capsize": 4, "axes.formatter.min_exponent": 7,
         "text.parse_math": False}
# Safe for colour-blind people. A label that is not named takes the next of OTHERS.
COLOURS = {"gold": "#D55E00", "proxy": "#0072B2", "training samples": "#009E73", "training": "#009E73"}
OTHERS = "black", "#CC79A7", "#E69F00", "#0072B2"
DETAILS = "eval", "objective", "logps", "policy", "val"               # metrics that get no panel of their own
# Title, unit, {metric: label}. A panel is drawn if metrics.jsonl has one of its metrics.
PANELS = [
    ("Reward", "score", {"eval/gold": "gold", "eval/proxy": "proxy", "objective/scores": "training samples"}),
    ("KL to the initial policy", "nats per response", {"eval/kl": "test samples",
                                                       "objective/kl": "training samples"}),
    ("Well-formed responses", "share", {"eval/fluency": "fluency", "eval/eos_rate": "end with EOS"}),
    ("Loss", "loss", {"loss": "training", "eval/loss": "held-out pairs"}),
    ("Reward margin of the pairs", "chosen minus rejected", {"rewards/margins": "training",
                                                            "eval/rewards/margins": "held-out pairs"})]
ACCURACY = ("Pairs in the right order", "share",
            {"rewards/accuracies": "training", "eval/rewards/accuracies": "held-out pairs",
             "eval/score_accuracy": "held-out pairs"})


def title_of(config):
    """Method, seed, and the options that are not the default; of a path its last part."""
    changed = {k: v for k, v in differences(config).items() if k not in SET_HERE | {"device"}}
    options = [f"{k} {Path(v).name if isinstance(v, str) else v}" for k, v in changed.items()]
    return textwrap.shorten(", ".join([method_name(config), f"seed {config.seed}", *options]), 100)


def panels_of(rows):
    """The panels with lines, [(title, unit, {metric: label})], the most important first, from metrics.jsonl.

    A metric named <group>/<name> that stands in no panel above gets the panel of its group.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    placed = {name for _, _, lines in (*PANELS, ACCURACY) for name in lines}
    groups = {}
    for name in names:
        group, _, rest = name.partition("/")
        if rest and group not in DETAILS and name not in placed:
            groups.setdefault(group, {})[name] = rest.replace("_", " ")
    parts = groups.pop("loss", {})
    wanted = [(title, unit, lines | parts if title == "Loss" else lines) for title, unit, lines in PANELS]
    wanted += [(group.capitalize(), "", lines) for group, lines in groups.items()]
    found = [(title, unit, {name: label for name, label in lines.items() if name in names})
             for title, unit, lines in (*wanted, ACCURACY)]
    return [panel for panel in found if panel[2]]


def track(rows, name):
    """Steps, values and standard errors (0 where there are none) of a metric: three tuples."""
    points = [(row["step"], row[name], row.get(f"{name}_se", 0)) for row in rows
              if name in row and math.isfinite(row[name])]
    return tuple(zip(*points)) or ((), (), ())


def smooth(values, n=20):
    """Each value as the mean of its neighbours, together at most an n-th of all."""
    half = len(values) // n // 2
    parts = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_lines(ax, rows, unit, lines):
    """Metrics over steps: evaluations with standard errors; of the steps' rows pale values and their mean."""
    others = cycle(OTHERS)
    for name, label in lines.items():
        steps, values, errors = track(rows, name)
        style = dict(color=COLOURS.get(label) or next(others), label=label)
        if name.startswith("eval/"):                                    # few points: not taken for a trend
            ax.errorbar(steps, values, errors, fmt="o--", markersize=8, linewidth=1.5, elinewidth=2.5,
                        zorder=3, **style)
        else:
            ax.plot(steps, smooth(values), linewidth=2.5, **style)
            ax.plot(steps, values, color=style["color"], linewidth=1, alpha=0.4)
    if unit == "share":
        ax.set_ylim(0, 1.05)
    ax.set(xlabel="step", ylabel=unit)


def draw_histogram(ax, score, samples):
    """How often a sample has which score, before and after training; dashed lines are the means."""
    import numpy as np
    values = {when: [v for v in found[score] if math.isfinite(v)] for when, found in samples.items()}
    edges = np.histogram_bin_edges(sum(values.values(), []), 24)
    looks = {"before": dict(color="0.7"), "after": dict(color=COLOURS[score], histtype="step", linewidth=2.5)}
    for when, found in values.items():
        ax.hist(found, edges, label=when, **looks[when])
        if found:
            ax.axvline(sum(found) / len(found), linestyle="--", linewidth=2,
                       color=COLOURS[score] if when == "after" else "0.4")
    ax.set(xlabel=f"{score} reward", ylabel="responses")


def draw(out, samples, title=""):
    """Write out/run.png. Returns "", or why there is no picture: a run never fails because of it.

    Args: out: the run's directory, with metrics.jsonl. samples: {"before": as evaluate() returned them, with
        lists of scores, "after": likewise or missing}.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        return "pip install matplotlib"
    except (OSError, ValueError) as error:                         # MPLBACKEND, MPLCONFIGDIR, matplotlibrc
        return " ".join(str(error).split())[:100]
    rows = [json.loads(line) for line in rows_until(out / "metrics.jsonl", math.inf)]
    scores = [name for name in SCORES if all(name in found for found in samples.values())]
    lines = panels_of(rows)[:MOST - bool(scores)]
    count = min(MOST, len(lines) + len(scores))
    columns = count if count < 4 else 2 if count == 4 else 3
    height = 3.4 * math.ceil(count / columns)
    try:
        with matplotlib.rc_context(STYLE):
            figure = matplotlib.figure.Figure((12, height), 1600 / 12, layout="constrained")
            figure.suptitle(f"{title}\n{KEY}")
            axes = figure.subplots(math.ceil(count / columns), columns, squeeze=False).ravel()
            for ax, panel in zip(axes, [*lines, *scores]):
                draw_histogram(ax, panel, samples) if panel in scores else draw_lines(ax, rows, *panel[1:])
                ax.set_title(f"{panel.capitalize()} of test samples" if panel in scores else panel[0], pad=30)
                ax.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), frameon=False, ncols=4)
            for ax in axes[count:]:
                ax.set_axis_off()
            figure.savefig(out / FILE, metadata={"Software": None})
    except (OSError, RuntimeError, ValueError) as error:              # no room, no fonts: not worth a run
        return " ".join(str(error).split())[:100]
    return ""
