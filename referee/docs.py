"""Blocks in Markdown files that are made from results/*.json: in README.md and in docs/<method>.md.

A block stands between two marks, each on a line of its own (BEGIN and END below). Edit nothing between them:
    python -m referee --docs
writes every block anew, and draws the README's figure. All paths are below the current directory.
"""
import importlib.util
import itertools
from pathlib import Path

from harness import UserError
from referee import figures
from referee.arms import default_arm, experiments_of, method_names
from referee.store import shown
from referee.tables import (COLUMNS, RULES, arm_rows, claim_rows, collect, markdown_table, provenance,
                            stored)

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SFT = "SFT"
FIGURE = Path("results/methods.png")
OVERVIEW = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
            "seconds": "seconds"}


def method_block(name, results_dir="results"):
    """A method's page: claims and verdicts, the arms of every experiment, the figure, seeds and software."""
    if not (Path(results_dir) / f"{name}.json").exists():
        return f"Not run yet: `python -m referee {name} --seeds 5`."
    results = stored(name, results_dir)
    view, collected = shown(name, results), collect(name, results)
    claims = claim_rows(name, view, collected)
    words = [row[3] for row in claims[1:]]
    tally = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    parts = [f"Claims: {tally}.", markdown_table(claims)]
    for title, experiment in experiments_of(name).items():
        rows = arm_rows(collected[title], experiment.get("columns", COLUMNS))
        parts += [f"**{title}**: {experiment['question']}", markdown_table(rows)]
    if (Path(results_dir) / f"{name}.png").exists():
        parts.append(f"![{name}: figure](../{Path(results_dir).name}/{name}.png)")
    parts.append(f"{RULES} More: [protocol](protocol.md).")
    return "\n\n".join(parts + [provenance(view)])


def before_training(runs):
    """Build and rewards of the initial policy, by seed: equal only where runs share the task's models."""
    first = {seed: (runs[seed].get("build"), runs[seed]["trace"][0]) for seed in sorted(runs)}
    return tuple((seed, build, e.get("eval/gold"), e.get("eval/proxy")) for seed, (build, e) in first.items())


def overview(results_dir="results"):
    """What the README's table and figure are made of.

    Returns: {method: (name of its default arm, runs)}, first SFT where it is stored; methods of another build
        of the task's models than most; {provenance: methods}.
    """
    trained, untrained, sources = {}, {}, {}
    for name in method_names():
        if not (Path(results_dir) / f"{name}.json").exists():
            continue
        results = stored(name, results_dir)
        collected, flags = collect(name, results), results["config"]
        sources.setdefault(provenance(shown(name, results)), []).append(name)
        for rows in (trained, untrained):
            found = default_arm(name, flags, untrained=rows is untrained)
            if found:
                title, arm = found
                rows[name] = arm.name, collected[title][arm.name]
    builds = {}
    for name, (_, runs) in trained.items():
        builds.setdefault(before_training(runs), []).append(name)
    *others, most = sorted(builds.values(), key=len) or [[]]
    sft = [(f"{arm} of {name}", runs) for name, (arm, runs) in untrained.items() if name in most]
    rows = {SFT: sft[0]} | trained if sft else trained
    return rows, sorted(itertools.chain(*others)), sources


def overview_block(results_dir="results"):
    """README: a row for each method's default run; before them, where it is stored, SFT's."""
    rows, others, sources = overview(results_dir)
    header, *body = arm_rows({name: runs for name, (_, runs) in rows.items()}, OVERVIEW)
    table = [["method", *header[1:]]]
    for name, *cells in body:
        table.append([name if name == SFT else f"[{name}](docs/{name}.md)", *cells])
    text = ("SFT is the policy that every method starts from. ± is half a 95% confidence interval over "
            "seeds. KL is in nats, to that policy. Seconds are for the whole run, evaluation included.")
    if others:
        text += (f" From other seeds or an older build of the task's models: {', '.join(others)}. Compare "
                 "with the other rows only roughly.")
    where = [source if len(sources) == 1 else f"{', '.join(names)}: {source}"
             for source, names in sources.items()]
    return "\n\n".join([markdown_table(table), text, *where])


def block(path, results_dir="results"):
    """What has to stand between the marks of a file."""
    name = Path(path).stem
    if name.startswith("README"):
        return overview_block(results_dir)
    if name not in method_names():
        raise UserError(f"{path} is not the page of a method: it may not have the line {BEGIN}")
    return method_block(name, results_dir)


def split(path):
    """The lines before, between and after the marks."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    if lines.count(BEGIN) != 1 or lines.count(END) != 1 or lines.index(BEGIN) > lines.index(END):
        raise UserError(f"{path} lacks the lines {BEGIN} and {END}, once each and in this order")
    begin, end = lines.index(BEGIN), lines.index(END)
    return lines[:begin], lines[begin + 1:end], lines[end + 1:]


def pages():
    """README and the pages in docs/ that have marks."""
    found = [*sorted(Path().glob("README*.md")), *sorted(Path("docs").glob("*.md"))]
    return [path for path in found if {BEGIN, END} & set(path.read_text(encoding="utf-8").split("\n"))]


def write(path, results_dir="results"):
    """Write the block of a file anew; UserError if the file has no marks."""
    before, _, after = split(path)
    lines = [*before, BEGIN, block(path, results_dir), END, *after]
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def write_all():
    """Write the blocks of all pages, and the figure of all methods; returns the paths."""
    found = pages()
    for path in found:
        write(path)
    if importlib.util.find_spec("matplotlib"):
        figures.draw_overview({name: runs for name, (_, runs) in overview()[0].items()}, FIGURE)
        found.append(FIGURE)
    return found
