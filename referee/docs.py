"""Blocks in Markdown files that are made from results/*.json: in README.md and in docs/<method>.md.

A block stands between two marks, each on a line of its own (BEGIN and END below). Edit nothing between them:
    python -m referee --docs
writes every block anew. All paths are below the current directory.
"""
from pathlib import Path

from harness import UserError
from referee.arms import default_arm, experiments_of, method_names
from referee.tables import COLUMNS, RULES, arm_rows, claim_rows, collect, markdown_table, provenance, stored

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OVERVIEW = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
            "seconds": "seconds"}


def method_block(name, results_dir="results"):
    """A method's page: claims and verdicts, the arms of every experiment, the figure, seeds and software."""
    results = stored(name, results_dir)
    collected = collect(name, results)
    claims = claim_rows(name, results, collected)
    words = [row[3] for row in claims[1:]]
    tally = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    parts = [f"Claims: {tally}.", markdown_table(claims)]
    for title, experiment in experiments_of(name).items():
        rows = arm_rows(collected[title], experiment.get("columns", COLUMNS))
        parts += [f"**{title}**: {experiment['question']}", markdown_table(rows)]
    if (Path(results_dir) / f"{name}.png").exists():
        parts.append(f"![{name}: figure](../{Path(results_dir).name}/{name}.png)")
    parts.append(f"{RULES} More: [protocol](protocol.md).")
    return "\n\n".join(parts + [provenance(results)])


def overview_block(results_dir="results"):
    """README: a row for each method's default run; before them, where it is stored, SFT's."""
    methods, untrained, sources = {}, {}, {}
    for name in method_names():
        if not (Path(results_dir) / f"{name}.json").exists():
            continue
        results = stored(name, results_dir)
        collected, flags = collect(name, results), results["config"]
        sources.setdefault(provenance(results), []).append(name)
        link = f"[{name}](docs/{name}.md)"
        if found := default_arm(name, flags):
            title, arm = found
            methods[link] = arm.name, collected[title][arm.name]
        if found := default_arm(name, flags, untrained=True):
            title, arm = found
            untrained.setdefault("SFT", (f"{arm.name} of {link}", collected[title][arm.name]))
    rows = untrained | methods
    table = arm_rows({label: runs for label, (_, runs) in rows.items()}, OVERVIEW)
    second = ["arm"] + [arm for arm, _ in rows.values()]
    table = [[row[0], arm, *row[1:]] for row, arm in zip(table, second)]
    table[0][0] = "method"
    text = ("± is half a 95% t-interval over seeds. KL is in nats, to the policy that the run started from. "
            "The arm is the row with the default settings on the method's page.")
    where = [f"{', '.join(names)}: {source}" if len(sources) > 1 else source for source, names in sources.items()]
    return "\n\n".join([markdown_table(table), text, *where])


def block(path, results_dir="results"):
    """What has to stand between the marks of a file."""
    name = Path(path).stem
    return overview_block(results_dir) if name.startswith("README") else method_block(name, results_dir)


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
    """Write the blocks of all pages; returns their paths."""
    found = pages()
    for path in found:
        write(path)
    return found
