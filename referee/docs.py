"""Blocks in Markdown files that are made from results/: in README.md, README.zh.md and in pages of docs/.

A block stands between two marks, each on a line of its own (MARKS below). Edit nothing between them:
    python -m referee --docs
writes every block anew, and draws the figure of docs/defaults.md. All paths are below the current directory.
"""
import importlib.util
import itertools
import re
from pathlib import Path

from harness import CONTROL as CHARACTERS
from harness import UserError, write_text
from referee import choosing, figures, real_text, side_by_side, survey, which
from referee.arms import default_arm, experiments_of, method_names
from referee.store import shown
from referee.tables import (COLUMNS, COSTS, COSTS_ARE, RULES, arm_rows, claim_rows, collect, cost_rows,
                            markdown_table, provenance, stored)
from referee.tuning import tuning_block

MARKS = {kind: (f"<!-- {kind}:begin -->", f"<!-- {kind}:end -->") for kind in (
    "results", "tuning", "survey", "comparison", "choosing", "surprises", "which", "real text")}
BEGIN, END = MARKS["results"]
SFT, CONTROL = "SFT", "SFT, temperature 0.5"      # the policy that all start from; what sampling alone gains
FIGURE = Path("results/methods.png")
OVERVIEW = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL, nats", "eval/fluency": "fluency",
            "cpu_seconds": "CPU s", "state_mb": "MB trained"}
MEANINGS = {"KL, nats": "KL is to that policy.",
            "CPU s": "CPU seconds are of training on one thread, evaluation excluded.",
            "MB trained": "MB trained are the weights that are trained, their gradients and the optimizer's "
                          "moments, in megabytes."}


def method_block(name, results_dir="results"):
    """A method's page: claims and verdicts, the arms of every experiment, the figure, seeds and software."""
    if not (Path(results_dir) / f"{name}.json").exists():
        return f"Not run yet: `python -m referee {name} --seeds 10`."
    results = stored(name, results_dir)
    view, collected = shown(name, results), collect(name, results)
    claims = claim_rows(name, view, collected)
    words = [row[3] for row in claims[1:]]
    tally = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    parts = [f"Claims: {tally}.", markdown_table(claims)]
    for title, experiment in experiments_of(name).items():
        rows = arm_rows(collected[title], experiment.get("columns", COLUMNS))
        parts += [f"**{title}**: {experiment['question']}", markdown_table(rows)]
    if costs := cost_rows(collected):
        parts += [COSTS_ARE, markdown_table(costs)]
    if (Path(results_dir) / f"{name}.png").exists():
        parts.append(f"![{name}: figure](../{Path(results_dir).name}/{name}.png)")
    parts.append(f"{RULES} More: [protocol](protocol.md).")
    return "\n\n".join(parts + [provenance(view)])


def before_training(runs):
    """Build and rewards of the initial policy, by seed: equal only where runs share the task's models."""
    first = {seed: (runs[seed].get("build"), runs[seed]["trace"][0]) for seed in sorted(runs)}
    return tuple((seed, build, e.get("eval/gold"), e.get("eval/proxy")) for seed, (build, e) in first.items())


def overview(results_dir="results"):
    """What the table and the figure of the default runs are made of.

    Returns: {method: (name of its default arm, runs)}, first SFT where it is stored; methods of another build
        of the task's models than most; {provenance: methods}.
    """
    trained, untrained, controls, sources = {}, {}, {}, {}
    for name in method_names():
        if not (Path(results_dir) / f"{name}.json").exists():
            continue
        results = stored(name, results_dir)
        collected, flags = collect(name, results), results["config"]
        sources.setdefault(provenance(shown(name, results)), []).append(name)
        for runs in (arms[CONTROL] for arms in collected.values() if arms.get(CONTROL)):
            controls[name] = CONTROL, runs
        for rows in (trained, untrained):
            found = default_arm(name, flags, untrained=rows is untrained)
            if found:
                title, arm = found
                rows[name] = arm.name, collected[title][arm.name]
    builds = {}
    for name, (_, runs) in trained.items():
        builds.setdefault(before_training(runs), []).append(name)
    *others, most = sorted(builds.values(), key=len) or [[]]
    sft = [(f"{arm} of {name}", runs) for name, (arm, runs) in untrained.items() if name in most and runs]
    control = [row for name, row in controls.items() if name in most]
    rows = dict(zip([SFT], sft)) | dict(zip([CONTROL], control)) | trained
    return rows, sorted(itertools.chain(*others)), sources


def overview_block(results_dir="results"):
    """docs/defaults.md: a row for each method's default run; before them those of SFT and its control."""
    rows, others, sources = overview(results_dir)
    header, *body = arm_rows({name: runs for name, (_, runs) in rows.items()}, OVERVIEW, "method")
    table = [header]
    for name, *cells in body:
        if name in (SFT, CONTROL):                                # its run scores candidates, trains nothing
            cells = ["-" if word in COSTS.values() else cell for word, cell in zip(header[1:], cells)]
        table.append([name if name in (SFT, CONTROL) else f"[{name}]({name}.md)", *cells])
    text = " ".join([f"All methods but SteerLM start from the policy {SFT}; SteerLM replaces it."
                     + f" {CONTROL}: the same policy, sampled at this temperature." * (CONTROL in rows),
                     "± is half a 95% confidence interval over seeds.",
                     *(MEANINGS[word] for word in header if word in MEANINGS)])
    if others:
        text += (f" For some seeds {', '.join(others)} began with models from another machine or an older "
                 "build. Compare with the other rows only roughly.")
    where = [source if len(sources) == 1 else f"{', '.join(names)}: {source}"
             for source, names in sources.items()]
    return "\n\n".join([markdown_table(table), text, *where])


def block(path, kind="results", results_dir="results"):
    """What has to stand between the marks of a file. Tags and marks of HTML in stored names are text."""
    name = Path(path).stem
    if kind == "survey":
        text = survey.statements(path, results_dir)
    elif kind == "comparison":
        text = survey.compared(path, results_dir)
    elif kind == "which":
        text = which.block(survey.chinese(path), results_dir)
    elif kind == "surprises":
        text = which.surprises(results_dir)
    elif kind == "choosing":
        text = choosing.block(results_dir)
    elif kind == "real text":
        text = real_text.block(results_dir)
    elif kind == "results" and survey.chinese(path):
        text = survey.substitutes(*overview(results_dir), results_dir)
    elif name == "defaults":
        text = overview_block(results_dir)
    elif name == side_by_side.NAME:
        text = (side_by_side.block if kind == "results" else side_by_side.tuning_block)(results_dir)
    elif name not in method_names():
        raise UserError(f"{path} is not the page of a method: it may not have the line {MARKS[kind][0]}")
    else:
        text = method_block(name, results_dir) if kind == "results" else tuning_block(name, results_dir)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text).translate(CHARACTERS)


def split(path, kind="results"):
    """The lines before, between and after the marks of this kind."""
    lines, (begin, end) = Path(path).read_text(encoding="utf-8").split("\n"), MARKS[kind]
    if lines.count(begin) != 1 or lines.count(end) != 1 or lines.index(begin) > lines.index(end):
        raise UserError(f"{path} lacks the lines {begin} and {end}, once each and in this order")
    first, last = lines.index(begin), lines.index(end)
    return lines[:first], lines[first + 1:last], lines[last + 1:]


def kinds(path):
    """The kinds of marks that a file has."""
    lines = set(Path(path).read_text(encoding="utf-8").split("\n"))
    return [kind for kind, marks in MARKS.items() if lines & set(marks)]


def pages():
    """README and the pages in docs/ that have marks."""
    return [path for path in [*sorted(Path().glob("README*.md")), *sorted(Path("docs").glob("*.md"))]
            if kinds(path)]


def write(path, results_dir="results"):
    """Write the blocks of a file anew; UserError if the file has no marks."""
    for kind in kinds(path) or ["results"]:
        before, _, after = split(path, kind)
        begin, end = MARKS[kind]
        lines = [*before, begin, block(path, kind, results_dir), end, *after]
        write_text(path, "\n".join(lines))


def write_all():
    """Write the blocks of all pages, and the figure of all methods; returns the paths."""
    found = pages()
    for path in found:
        write(path)
    rows = {name: runs for name, (_, runs) in overview()[0].items()}
    if rows and importlib.util.find_spec("matplotlib"):
        figures.draw_overview(rows, FIGURE)
        found.append(FIGURE)
    return found
