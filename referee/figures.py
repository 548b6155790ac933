"""The figure of a method: one row an experiment, one column a panel. Needs matplotlib.

A panel is a dict: lines (x, y over the trace), or kind="bars", "curve" or "matrix" (docs/protocol.md).
"""
import importlib
import itertools
import math
import re
from statistics import fmean

import numpy as np

from referee.statistics import plus_minus, t_interval, value

SINGLES = "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C00", "#0072B2", "#F0E442"
STYLES = "-", "--", ":", "-.", "-"
NAMES = {"eval/kl": "KL", "eval/win_rate": "win rate"}


def name_of(metric):
    return NAMES.get(metric, metric.removeprefix("eval/"))


def finite(half):
    """The half-width to draw: none where one seed says nothing about the spread."""
    return half if math.isfinite(half) else 0


def colours(arms):
    """{arm: colour}. Arms that differ only in a number share a hue, light to dark; the rest take Okabe and
    Ito's colour-blind-safe set. Black is for what was not trained (SFT): its trace ends where it began."""
    import matplotlib
    number = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
    chosen = {name: "black" for name, runs in arms.items()
              if all(r["trace"][0] == r["trace"][-1] for r in runs.values())}
    families = {}
    for name in (name for name in arms if name not in chosen):
        families.setdefault(number.sub("#", name), []).append(name)
    ramps = itertools.cycle(("Blues", "Purples"))
    singles = itertools.cycle(SINGLES)
    for family in families.values():
        if len(family) < 3:
            chosen.update(zip(family, singles))
            continue
        family.sort(key=lambda name: float(number.search(name).group()))
        ramp = matplotlib.colormaps[next(ramps)]
        chosen.update((name, ramp(0.4 + 0.6 * i / (len(family) - 1))) for i, name in enumerate(family))
    return chosen


def draw_lines(ax, panel, arms, palette, curves):
    """y over x along the trace, means over seeds; at its end the 95% intervals of both."""
    x = panel["x"]
    for name in arms:
        untrained, colour = palette[name] == "black", palette[name]
        for y, style in zip(panel["y"], STYLES):
            points = [[(e[x], e[y]) for e in run["trace"] if e.get(x) is not None and e.get(y) is not None]
                      for run in arms[name].values()]
            length = min(map(len, points), default=0)
            if not length:
                continue
            points = np.array([p[:length] for p in points])                       # [seeds, positions, 2]
            means = points.mean(axis=0)
            bars = [finite(t_interval(points[:, -1, i].tolist())[1]) for i in (0, 1)]
            label = name if len(panel["y"]) == 1 else f"{name}: {y.removeprefix('eval/')}"
            ax.plot(*means.T, style, color=colour, label=None if untrained else label, linewidth=1.8)
            ax.errorbar(*means[-1], xerr=bars[0], yerr=bars[1], color=colour, linewidth=1, capsize=2,
                        fmt="*" if untrained else "o", markersize=13 if untrained else 5,
                        zorder=4 + untrained, label=label if untrained else None)
    column = {"eval/kl": 1, "eval/gold": 2, "eval/proxy": 3}
    curves = [curve for curve in curves.values() if curve]
    if panel.get("best_of_n") and curves:
        means = np.mean(curves, axis=0)
        for y in panel["y"]:
            ax.plot(means[:, column[x]], means[:, column[y]], "--", color="grey", linewidth=1.5, zorder=1,
                    label=f"best of n, n up to {means[-1, 0]:.0f}")
    ax.set_xlabel(name_of(x) + (" to the reference, nats" if x == "eval/kl" else ""))
    ax.legend(fontsize=9, framealpha=0.7)


def draw_bars(ax, panel, arms, palette):
    """The final value of each metric in y for each arm, with its 95% interval."""
    log, several = panel.get("log", False), len(panel["y"]) > 1
    thickness = 0.8 / len(panel["y"])
    for j, y in enumerate(panel["y"]):
        for i, (name, runs) in enumerate(arms.items()):
            values = [v for run in runs.values() if (v := value(run, y)) is not None]
            if values:
                mean, half = t_interval(values)
                ax.barh(i + (j - (len(panel["y"]) - 1) / 2) * thickness, mean, thickness * 0.92,
                        color=SINGLES[j] if several else palette[name],
                        label=y.split("/")[-1] if i == 0 else None,
                        xerr=half if math.isfinite(half) else None, capsize=3)
    if log:
        ax.set_xscale("log")
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    if not log:
        ax.axvline(0, color="black", linewidth=0.8)
    if several:                                                         # below the axes: bars leave no room
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)


def draw_curve(ax, panel, arms, palette):
    """run[panel["curve"]], a list of {x, y, ...} with the same x for every seed: means and 95% intervals.

    The diagonal is where x and y are equal.
    """
    for name, runs in arms.items():
        curves = [run[panel["curve"]] for run in runs.values() if run.get(panel["curve"])]
        for j, (y, style) in enumerate(zip(panel["y"], STYLES)) if curves else ():
            rows = [row for row in zip(*curves) if all(point.get(y) is not None for point in row)]
            spread = [t_interval([point[y] for point in row]) for row in rows]
            x = [fmean(point[panel["x"]] for point in row) for row in rows]
            ax.errorbar(x, [mean for mean, _ in spread], [finite(half) for _, half in spread], capsize=2,
                        linestyle=style, marker="o", markersize=4,
                        label=name if len(panel["y"]) == 1 else f"{name}: {y}",
                        color=palette[name] if len(arms) > 1 else SINGLES[j])
    ax.axline((0, 0), slope=1, color="grey", linewidth=1, linestyle="--", zorder=0)
    ax.set_xlabel("asked for")
    ax.legend(fontsize=9, framealpha=0.7)


def draw_matrix(ax, panel, arms):
    """run[panel["matrix"]], {row: {column: number}}: means over seeds of one arm, written into the cells."""
    matrices = [run[panel["matrix"]] for runs in arms.values() for run in runs.values()
                if run.get(panel["matrix"])]
    if not matrices:
        return ax.set_axis_off()
    names = list(matrices[0])
    cells = [[[m[row][column] for m in matrices if m[row][column] is not None] for column in names]
             for row in names]
    spread = [[t_interval(values) if values else (math.nan, math.inf) for values in line] for line in cells]
    ax.imshow([[mean for mean, _ in line] for line in spread], cmap="PuOr", vmin=-1, vmax=1)
    for i, line in enumerate(spread):
        for j, (mean, half) in enumerate(line):
            ax.text(j, i, plus_minus(mean, half, size=1), ha="center", va="center", fontsize=9,
                    color="white" if abs(mean) > 0.7 else "black")
    ax.set_xticks(range(len(names)), names, rotation=20)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylabel("asked for one level more")
    ax.set_xlabel("levels more in the responses")


def draw_panel(ax, panel, arms, palette, curves):
    names = ", ".join(map(name_of, panel.get("y", ())))
    ax.set_title(panel.get("title", ""), fontsize=11)
    if panel.get("kind") == "bars":
        ax.set_xlabel(names if len(panel["y"]) == 1 else "")
        draw_bars(ax, panel, arms, palette)
    elif panel.get("kind") == "curve":
        ax.set_ylabel(names)
        draw_curve(ax, panel, arms, dict(zip(arms, itertools.cycle(SINGLES))))     # distinct within the panel
    elif panel.get("kind") == "matrix":
        draw_matrix(ax, panel, arms)
    else:
        ax.set_ylabel(names)
        draw_lines(ax, panel, arms, palette, curves)


def draw_overview(arms, path):
    """Gold and KL of {method: {seed: run}}, side by side."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 1.2 + 0.35 * len(arms)), dpi=160, layout="constrained")
    palette = dict.fromkeys(arms, "#0072B2")
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        for ax, y in zip(figure.subplots(1, 2), ("eval/gold", "eval/kl")):
            ax.set_xlabel({"eval/gold": "gold reward", "eval/kl": "KL, nats"}[y])
            draw_bars(ax, {"y": [y]}, arms, palette)
    figure.savefig(path, metadata={"Software": None})


def draw(method_name, results, collected, path):
    """All panels of a method, 1600 pixels wide. Bars and whiskers are 95% intervals over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    experiments = importlib.import_module(f"experiments.{method_name}").EXPERIMENTS
    experiments = {title: e for title, e in experiments.items() if e.get("panels")}
    if not experiments:
        return
    columns = max(len(e["panels"]) for e in experiments.values())
    width = max(5.4 * columns, 9)
    figure = Figure(figsize=(width, 4.3 * len(experiments)), dpi=1600 / width, layout="constrained")
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        rows = figure.subfigures(len(experiments), 1, squeeze=False)[:, 0]
        for row, (title, experiment) in zip(rows, experiments.items()):
            row.suptitle(f"{title}: {experiment['question']}", fontweight="bold")
            palette = colours(collected[title])
            axes = row.subplots(1, columns, squeeze=False)[0]
            for ax in axes[len(experiment["panels"]):]:
                ax.set_axis_off()
            for ax, panel in zip(axes, experiment["panels"]):
                arms = {name: collected[title][name] for name in panel.get("arms") or collected[title]}
                draw_panel(ax, panel, arms, palette, results["best_of_n"])
        figure.savefig(path, metadata={"Software": None})
