"""One interval on the wall: collect the runs of many laptops, one seed each, from a shared folder.

    python dpo.py --seed 7 --out FOLDER/seed7        # on each laptop, with a seed of its own
    python docs/workshop/collect.py FOLDER           # prints a table for each group; draws FOLDER/wall.png

A run is a directory below FOLDER with args.json, metrics.jsonl and samples.txt, which is written last. Runs
are grouped by method and settings, whatever their seed, directory, device and machine.
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from harness import CONTROL, UserError
from harness.command_line import in_one_line
from referee.arms import config_class, identity, method_names

try:
    from matplotlib.figure import Figure
    from referee.statistics import plus_minus, t_interval
except (ImportError, UserError):
    sys.exit("error: collect.py needs two more packages: python -m pip install matplotlib scipy")

METRICS = {"gold": "eval/gold", "proxy": "eval/proxy", "KL, nats": "eval/kl", "fluency": "eval/fluency"}


def read(folder):
    """(group, seed, first evaluation, last evaluation) of a run. UserError says why it does not count."""
    if not (folder / "samples.txt").exists():
        raise UserError("not finished")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [row for row in map(json.loads, lines) if "eval/kl" in row]
        rows = [{k: float(row[k]) for k in METRICS.values() if k in row} for row in (found[0], found[-1])]
        return label_of(args).translate(CONTROL), int(args["seed"]), *rows
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        fault = f"args.json or metrics.jsonl cannot be read ({type(error).__name__})"
        raise UserError(error if isinstance(error, UserError) else fault) from None


def label_of(args):
    """Method, settings, data. UserError where the method, or one of its options, is not known."""
    name = args.get("method")
    options = {f.name for f in fields(config_class(name))} if name in method_names() else set()
    if not options or not options <= {*args}:
        raise UserError("its options are those of no method: was it run with another version of the code?")
    settings = identity(config_class(name)(**{k: args[k] for k in options - {"resume"}}))
    flags = [f"--{option} {value}" for option, value in sorted(settings.items())]
    return " ".join([name, *flags, args["data_fingerprint"]]).strip()


def groups_of(folder):
    """{group: {seed: (first, last evaluation, directory)}} of all runs below the folder."""
    groups = {}
    for file in sorted(folder.rglob("args.json")):
        try:
            label, seed, *run = read(file.parent)
            if (kept := groups.setdefault(label, {}).setdefault(seed, (*run, file.parent))[2]) != file.parent:
                raise UserError(f"seed {seed} is there already, in {kept}")
        except UserError as error:
            print(f"left out: {file.parent}: {error}")
    if not groups:
        raise UserError(f"no finished run below {folder}: give the folder that the --out of the runs lie in")
    return dict(sorted(groups.items()))


def table(label, runs):
    """Lines: mean and half a 95% t-interval of each metric, after training and its change."""
    few = " (an interval needs two)" * (len(runs) < 2)
    lines = [f"{label}: n = {len(runs)}{few}, seeds {', '.join(map(str, sorted(runs)))}",
             f"  {'':10}{'after':>18}{'change':>18}"]
    for name, metric in METRICS.items():
        pairs = [(a[metric], b[metric]) for a, b, _ in runs.values() if metric in a and metric in b]
        after, change = [b for _, b in pairs], [b - a for a, b in pairs]
        cells = [plus_minus(*t_interval(after)), plus_minus(*t_interval(change), "+")] if pairs else "--"
        lines.append(f"  {name:10}{cells[0]:>18}{cells[1]:>18}")
    return lines


def draw(groups, file):
    """A panel for each metric: a dot for each seed, grey before training; the mean and its interval below."""
    lines = 2 + max(label.count(" --") for label in groups)                     # of the longest name
    figure = Figure(figsize=(16, 3 + max(1.2, 0.3 * lines) * len(groups)), layout="constrained")
    for ax, (name, metric) in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS.items()):
        for y, runs in enumerate(groups.values()):
            before, after = ({seed: run[i][metric] for seed, run in sorted(runs.items()) if metric in run[i]}
                             for i in (0, 1))
            ax.scatter(before.values(), [y - 0.2] * len(before), color="0.75", zorder=1)
            places = [y - 0.1 - 0.07 * (i % 4) for i in range(len(after))]      # so that none hides another
            ax.plot(after.values(), places, "o", color="#0072B2", alpha=0.6, markersize=9)
            for (seed, number), place in zip(after.items(), places):
                ax.annotate(seed, (number, place), (0, 6), textcoords="offset points", ha="center")
            if len(after) > 1:
                mean, half = t_interval([*after.values()])
                ax.errorbar(mean, y + 0.15, xerr=half, fmt="D", color="black", capsize=6, markersize=8)
        ax.set_title(name, fontsize=20)
        ax.tick_params(labelsize=14)
    names = [f"{label.replace(' --', chr(10) + '--')}\nn = {len(runs)}" for label, runs in groups.items()]
    figure.axes[0].set_yticks(range(len(groups)), names)
    figure.axes[0].set_ylim(len(groups) - 0.5, -0.5)                             # the first group at the top
    figure.suptitle("dots: laptops, by seed (grey: before training). Diamond: mean, 95% interval", size=18)
    figure.savefig(file, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the shared folder")
    groups = groups_of(folder := parser.parse_args().folder)
    for label, runs in groups.items():
        print("", *table(label, runs), sep="\n")
    draw(groups, folder / "wall.png")
    print("", f"the figure is {folder / 'wall.png'}", sep="\n")


if __name__ == "__main__":
    in_one_line(main)
