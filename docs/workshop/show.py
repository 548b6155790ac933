"""Numbers of a run, with all their digits: the first and the last value of metrics.

    python docs/workshop/show.py RUN loss kl          # RUN: the run's directory, such as runs/dpo/001

NAME finds the metric NAME and every metric that ends in /NAME: `loss` finds `loss`, which is of the training
steps, and `eval/loss`, which is of the evaluations. Without names it lists all metrics.
"""
import argparse
import json
import sys
from pathlib import Path


def rows_of(folder):
    """The objects of metrics.jsonl."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        sys.exit(f"error: {folder} has no metrics.jsonl that can be read: give the directory of a run")


def lines_of(rows, names):
    """A line for each metric that one of the names stands for, in the order of the file."""
    known = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"]
    if not names:
        return known
    lines = []
    for asked in names:
        found = [name for name in known if name == asked or name.endswith(f"/{asked}")]
        lines += [] if found else [f"{asked}: no such metric"]
        for name in found:
            having = [row for row in rows if name in row]
            ends = [f"{row[name]} (step {row['step']})" for row in (having[0], having[-1])]
            lines.append(f"{name}: first {ends[0]}, last {ends[1]}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    print("\n".join(lines_of(rows_of(options.run), options.names)))


if __name__ == "__main__":
    main()
