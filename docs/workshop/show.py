"""Numbers of a run, with all their digits: the first and the last value of metrics.

    python docs/workshop/show.py RUN loss kl          # RUN: the run's directory, such as runs/dpo/001
    python docs/workshop/show.py RUN kl --all         # the value at every step, not only at both ends

NAME finds the metric NAME and every metric that ends in /NAME: `loss` finds `loss`, which is of the training
steps, and `eval/loss`, which is of the evaluations. Without names it lists all metrics.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path


def rows_of(folder):
    """The objects of metrics.jsonl. A last line that a cut run has torn is left out."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        rows = [json.loads(line) for line in lines[:-1]]
        with contextlib.suppress(ValueError):
            rows += map(json.loads, lines[-1:])
        rows = [row for row in rows if isinstance(row, dict) and "step" in row]
        if rows:
            return rows
    sys.exit(f"error: {folder} has no metrics.jsonl that can be read: give the directory of a run")


def lines_of(rows, names, every=False):
    """A line for each metric that one of the names stands for, in the order of the file; or one a value."""
    known = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]
    if not names:
        return known
    lines = []
    for asked in names:
        found = [name for name in known if name == asked or name.endswith(f"/{asked}")]
        lines += [] if found else [f"{asked}: no such metric"]
        for name in found:
            having = [row for row in rows if name in row]
            values = [f"{row[name]} (step {row['step']})" for row in having]
            lines += [f"{name}: {value}" for value in values] if every else [
                f"{name}: first {values[0]}, last {values[-1]}"]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true", help="the value at every step")
    options = parser.parse_intermixed_args()                       # --all may stand anywhere
    for line in lines_of(rows_of(options.run), options.names, options.all):
        print(line.translate({i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160))}))   # for the terminal


if __name__ == "__main__":
    main()
