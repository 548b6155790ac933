"""Figures, to be read on a wall: one row an experiment, one column a panel (docs/protocol.md).

12 inches are 1600 pixels, no type is below 13 points. Whiskers are 95% intervals. Black: not trained.
"""
import math
import re
import textwrap
from itertools import cycle, product

import numpy as np

from referee.arms import experiments_of
from referee.statistics import plus_minus, t_interval, value

STYLE = {"font.size": 13, "axes.titlesize": 14, "errorbar.capsize": 4, "axes.formatter.min_exponent": 7,
         "legend.handlelength": 3, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#E69F00"             # safe for colour-blind people
SHADES = "#440154", "#3B528B", "#21918C", "#5EC962", "#A0DA39"               # dark to light
ABOVE = dict(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)    # a legend over the axes
SIDES = [way for way in product((-1, -0.5, 0, 0.5, 1), repeat=2) if 1 in map(abs, way)]         # of a point
DASHES = "-", "--", ":", "-."
NAMES = {"eval/gold": "gold reward", "eval/proxy": "proxy reward", "eval/kl": "KL to the initial policy"}
UNIT = {"eval/proxy": ", SFT standard deviations", "eval/kl": ", nats", "eval/fluency": ", share that parses"}


def name_of(*metrics, unit=False):                                               # the unit of a single metric
    names = [NAMES.get(metric, metric.split("/")[-1].replace("_", " ")) for metric in metrics]
    return ", ".join(names) + (UNIT.get(metrics[0], "") if unit and len(metrics) == 1 else "")


def interval(values):
    """Mean and half-width of the numbers among the values: half-width 0 of a single one, mean nan of none."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return t_interval(values) if len(values) > 1 else (values[0] if values else math.nan, 0.0)


def final(arms, name, metric):
    return interval(value(run, metric) for run in arms.get(name, {}).values())


def colours(arms):
    """{arm: colour}. Arms that differ only in a number get shades, more than five arms the same colour."""
    rest = [name for name in arms if any(r["trace"][0] != r["trace"][-1] for r in arms[name].values())]
    alike = len(rest) > 2 and len({re.sub(r"[\d.]+(e-?\d+)?", "", name) for name in rest}) == 1
    hues = COLOURS[:1] if len(rest) > len(COLOURS) else SHADES if alike else COLOURS
    return dict.fromkeys(arms, "black") | dict(zip(rest, cycle(hues)))


def place_labels(figure):
    """Each label goes where it covers no other label and little else, beside its own point, with a line."""
    figure.draw_without_rendering()                                   # before that nothing has its position
    for ax in figure.axes:
        frame, scale, taken = ax.get_window_extent(), figure.dpi / 72, []
        paths = [line.get_transform().transform(line.get_xydata()) for line in ax.lines]
        paths += [ax.transData.transform(bar) for bars in ax.collections for bar in bars.get_segments()]
        marks = np.array([np.linspace(a, b, 40) for path in paths for a, b in zip([*path[:1], *path], path)])
        labels = [text for text in ax.texts if text.get_gid() == "label"]
        points = {text: ax.transData.transform(text.xy) for text in labels}
        for text in labels:
            size = super(type(text), text).get_window_extent().size                   # without the line to it
            point, choices = points[text], []
            for far, way in product((8, 14, 22, 33, 50, 75, 110), SIDES):
                corner = point + (far * scale + size / 2) * way - size / 2
                low, high = corner - 3, corner + size + 3
                faults = sum(np.all((box < high) & (box + other > low)) for box, other in taken)
                faults += np.any(low < frame.min) or np.any(high > frame.max)
                covered = np.all((marks > low) & (marks < high), axis=-1).sum()
                away = {other: np.linalg.norm(points[other] - corner - size / 2) for other in labels}
                nearer = sum(distance < away[text] for distance in away.values())
                choices.append((1000 * faults + covered + 10 * nearer + far / 4, *corner))
            corner = np.array(min(choices)[1:])
            marks = np.concatenate([marks, np.linspace(point, corner + size / 2, 40)[None]])
            text.set_position((corner - point) / scale)
            taken.append((corner, size))


def track(run, panel, y):
    """{step: (x, y)} of a run: all evaluations, the ends of rounds, or (kind="points") the final values."""
    trace = [run | {"step": 0}] if panel.get("kind") == "points" else run["trace"]
    return {e["step"]: pair for e in trace if (e is trace[0] or e["step"] % panel.get("ends", 1) == 0)
            and None not in (pair := (e.get(panel["x"]), e.get(y))) and all(map(math.isfinite, pair))}


def draw_lines(ax, panel, arms, palette, curves):
    """y over x, means over seeds, with the intervals of both at the end; with `ends`, at every point."""
    x, several, labels = panel["x"], len(panel["y"]) > 1, []
    hues = dict(zip(panel.get("families", ()), ("black", *COLOURS)))
    palette = palette | {name: hues[family] for family in hues for name in panel["families"][family]}
    for (name, runs), (y, dash, hue) in product(arms.items(), zip(panel["y"], cycle(DASHES), cycle(COLOURS))):
        tracks = [found for run in runs.values() if (found := track(run, panel, y))]
        steps = sorted(set.intersection(*map(set, tracks))) if tracks else []
        if steps:
            spread = np.array([[interval(t[step][i] for t in tracks) for i in (0, 1)] for step in steps])
            colour, star = hue if several and len(arms) == 1 else palette[name], palette[name] == "black"
            ax.plot(*spread[..., 0].T, dash, color=colour, linewidth=1.2 if hues else 2.5)
            shown = spread if "ends" in panel else spread[-1:]
            ax.errorbar(*shown[..., 0].T, shown[:, 1, 1], shown[:, 0, 1], fmt="*" if star else "o",
                        color=colour, markersize=16 if star else 8, zorder=4)
            words = [name] * (len(arms) > 1 or not several) + [name_of(y)] * several
            labels.append((spread[-1, :, 0], ", ".join(words), colour))
    column, curves = {"eval/kl": 1, "eval/gold": 2, "eval/proxy": 3}, [c for c in curves.values() if c]
    for y in panel["y"] if panel.get("best_of_n") and curves else ():
        means = np.mean(list(zip(*curves)), axis=1)[:, [0, column[x], column[y]]]
        ax.plot(*means[:, 1:].T, "--", color="black", zorder=1)
        label = f"best of {means[-1, 0]:.0f}"
        labels += [(means[-1, 1:], label, "black")] * (label not in arms)
    for point, text, colour in labels:
        ax.annotate(text, point, (6, 6), textcoords="offset points", va="bottom", gid="label", color=colour,
                    in_layout=False, arrowprops=dict(arrowstyle="-", color=colour, shrinkA=1, shrinkB=3))
    if hues:
        ax.legend(handles=[ax.plot([], [], "o", color=hue, label=name)[0] for name, hue in hues.items()],
                  **ABOVE | {"ncols": 3, "handlelength": 1})
    ax.margins(0.12)
    ax.set(xlabel=panel.get("over", name_of(x, unit=True)), ylabel=name_of(*panel["y"], unit=True))


def draw_bars(ax, panel, arms, *_):
    """The final value of each metric in y for each arm: a bar, its interval, the number beside it."""
    n, log = len(panel["y"]), panel.get("log")
    for j, (y, colour) in enumerate(zip(panel["y"], cycle(COLOURS))):
        bars = [(i + 0.8 * (j + 0.5) / n - 0.4, *final(arms, name, y)) for i, name in enumerate(arms)]
        bars = [bar for bar in bars if bar[1] > (0 if log else -math.inf)]                        # never nan
        places, means, halves = zip(*bars) if bars else ((), (), ())
        ax.barh(places, means, 0.72 / n, xerr=halves, color=colour, label=name_of(y))
        for place, mean, half in bars:
            ax.annotate(plus_minus(mean, math.inf, size=1), (max(mean + half, 0), place), (6, 0),
                        textcoords="offset points", va="center", annotation_clip=False)
    ax.axvline(0, color="black", linewidth=0.8)
    start = min((bar.get_width() for bar in ax.patches), default=0) / 4 if log else None    # whiskers reach 0
    ax.set(xscale="log" if start else "linear", xlim=(start, None),
           yticks=range(len(arms)), yticklabels=[textwrap.fill(name, 28) for name in arms],
           ylim=(len(arms) - 0.5, -0.5), xlabel=name_of(y, unit=True) if n == 1 else "")
    if n > 1:
        ax.legend(**ABOVE)


def draw_line(ax, panel, arms, *_):
    """Final values over a number, a line for each series; dashed, the mean of each arm in levels."""
    numbers = sorted(set().union(*panel["series"].values()))
    said = {y: f", {name_of(y)}" if len(panel["y"]) > 1 else "" for y in panel["y"]}
    for ((name, found), y), hue in zip(product(panel["series"].items(), panel["y"]), cycle(COLOURS)):
        points = [(number, *final(arms, found[number], y)) for number in sorted(found)]
        ax.errorbar(*zip(*points), color=hue, marker="o", lw=2.5, elinewidth=1.5, label=name + said[y])
    for (name, arm), dash in zip(panel.get("levels", {}).items(), cycle(DASHES[1:])):
        for y, hue in zip(panel["y"], COLOURS if len(panel["y"]) > 1 else ["black"]):
            ax.axhline(final(arms, arm, y)[0], ls=dash, color=hue, zorder=1, label=name + said[y])
    ax.set(xscale="log" if panel.get("log") else "linear", xticks=numbers, xlabel=panel["x"],
           xticklabels=[f"{number:,g}" for number in numbers], ylabel=name_of(*panel["y"], unit=True))
    ax.minorticks_off()
    ax.legend(**ABOVE)


def draw_curve(ax, panel, arms, palette, *_):
    """run[panel["curve"]], a list of {x, y, ...} with the same x for every seed. On the diagonal, x is y."""
    for name, runs in arms.items():
        rows = list(zip(*(run[panel["curve"]] for run in runs.values() if run.get(panel["curve"]))))
        for y, dash, hue in zip(panel["y"], cycle(DASHES), cycle(COLOURS)):
            points = [(row[0][panel["x"]], *interval(p.get(y) for p in row)) for row in rows]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                words = [name] * (len(arms) > 1 or len(panel["y"]) == 1) + [y] * (len(panel["y"]) > 1)
                ax.errorbar(*zip(*points), color=palette[name] if len(arms) > 1 else hue, ls=dash, marker="o",
                            lw=2.5, elinewidth=1.5, label=": ".join(words))
    ax.axline((0, 0), slope=1, color="black", linewidth=1, linestyle="--", zorder=0)
    ax.set(xlabel="asked for", ylabel=name_of(*panel["y"], unit=True))
    ax.legend(handles=ax.containers, frameon=bool(ax.containers))


def draw_grid(ax, panel, arms, *_):
    """Final values in a table: each cell is an arm's, mean over seeds and half interval."""
    rows, columns = panel["rows"], panel["columns"]
    cells = np.array([[final(arms, panel["name"].format(row=row, column=column), panel["y"][0])
                       for column in columns] for row in rows])
    image = ax.imshow(cells[..., 0], "Blues", aspect="auto")
    for (i, j), mean in np.ndenumerate(cells[..., 0]):
        if math.isfinite(mean):
            text = plus_minus(mean, cells[i, j, 1] or math.inf, size=1).replace(" ", "\n")
            dark = sum(image.cmap(image.norm(mean))[:3]) < 1.5
            ax.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    ax.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)


def height(panel, arms):                                                                          # in inches
    kind, n, long = panel.get("kind"), len(panel["y"]), any(len(name) > 28 for name in arms)
    bars = max(2.4, 1.2 + 0.24 * (n + len(arms) * max(1.5, 1.1 * n, 2.2 * long)))
    return bars if kind == "bars" else 1.2 + 0.75 * len(panel["rows"]) if kind == "grid" else (
        6.4 if "families" in panel else 4.8)


def draw_rows(rows, curves, path):
    """A figure of rows: (title, panels, {arm: runs})."""
    import matplotlib.figure
    kinds = {"lines": draw_lines, "points": draw_lines, "bars": draw_bars, "line": draw_line,
             "curve": draw_curve, "grid": draw_grid}
    heights = [0.5 + max(height(p, p.get("arms") or arms) for p in panels) for _, panels, arms in rows]
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure((12, sum(heights)), 1600 / 12, layout="constrained")
        parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, (title, panels, found) in zip(parts, rows):
            part.suptitle(textwrap.fill(title, 10 + len(title) // (1 + len(title) // 85)), fontweight="bold")
            left = None
            for ax, panel in zip(part.subplots(1, len(panels), squeeze=False)[0], panels):
                arms = {name: found.get(name, {}) for name in panel.get("arms") or found}
                kind = panel.get("kind", "lines")
                kinds[kind](ax, panel, arms, colours(arms), curves)
                above = ax.get_legend().get_texts() if kind in ("bars", "line") and ax.get_legend() else []
                words = panel.get("title", name_of(*panel["y"], unit=True) if kind == "grid" else "")
                ax.set_title(textwrap.fill(words, 100 // len(panels)), pad=8 + 25 * math.ceil(len(above) / 2))
                ax.tick_params("y", labelleft=kind != "bars" or left != ("bars", list(arms)))
                left = kind, list(arms)                              # the same names are not written twice
        place_labels(figure)
        figure.savefig(path, metadata={"Software": None})


def draw_overview(arms, path):                                                       # {method: {seed: run}}
    draw_rows([("", [dict(kind="points", x="eval/kl", y=["eval/gold"]), dict(kind="bars", y=["eval/gold"])],
                arms)], {}, path)


def draw(method_name, results, collected, path):
    rows = [(f"{title}: {e['question']}", e["panels"], collected[title])
            for title, e in experiments_of(method_name).items() if e.get("panels")]
    if rows:
        draw_rows(rows, results["best_of_n"], path)
