"""The documentation says what the code does: pages, equations, commands, links, names of metrics.

Builds no model.
"""
import ast
import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from conftest import ROOT, method_names
from harness import UserError
from referee import comparison, mine, real_text
from referee.__main__ import OWN_FLAGS
from referee.arms import config_class
from referee.docs import BEGIN, END

SKELETON = ["Quick facts", "Idea", "Key equations", "What is elsewhere", "Commands and expected numbers",
            "Metrics",
            "Differences from the paper and the official code", "Results", "Tuning",
            "What wrong looks like", "Exercises"]
DOCUMENTS = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
every_method = pytest.mark.parametrize("name", method_names())
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(path):
    return path.read_text(encoding="utf-8")


def page_of(name):
    return read(ROOT / "docs" / f"{name}.md")


# ------------------------------------------------------------------------------------------- reading Markdown

def unfenced(text):
    """The text without its fenced blocks of code."""
    return re.sub(r"(?ms)^ *```.*?^ *```", "", text)


def headings(text):
    return [line[3:].strip() for line in unfenced(text).splitlines() if line.startswith("## ")]


def section(text, title):
    """What stands between a heading and the next one of its level."""
    _, _, rest = f"\n{text}".partition(f"\n## {title}\n")
    return re.split(r"(?m)^## ", rest)[0]


def spans(text):
    """Inline code, its white space as single blanks, its escaped pipes plain."""
    return [" ".join(code.split()).replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", text)]


def table_rows(text):
    """The cells of each row of the tables, without their headers."""
    lines = [line.strip() for line in text.splitlines()]
    heads = {i - 1 for i, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)}
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for i, line in enumerate(lines) if line.startswith("|") and not {i, i - 1} & heads]


# ------------------------------------------------------------------------------------------------- the checks
# Each returns a list of faults, in words.

def skeleton_faults(text):
    faults = [] if headings(text) == SKELETON else [f"headings are {headings(text)}"]
    marks = [line for line in section(text, "Results").splitlines() if line in (BEGIN, END)]
    return faults if marks == [BEGIN, END] else [*faults,
                                                 f"Results lacks the lines {BEGIN} and {END}, once each"]


def equation_faults(text, source):
    """Each row of the table of equations ends with lines of code that the file has, word for word."""
    rows = table_rows(section(text, "Key equations"))
    faults = [] if rows else ["no table of equations"]
    for row in rows:
        codes = [code.replace(r"\|", "|") for code in re.findall(r"`([^`]+)`", row[-1])]
        faults += [] if codes else [f"no code beside {row[0]}"]
        faults += [f"not in the file: {code}" for code in codes if code not in source]
    return faults


def commands(text):
    """The `python ...` commands of a Markdown text: in fenced blocks and in inline code."""
    blocks = re.findall(r"(?ms)^ *```[^\n]*\n(.*?)^ *```", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines + spans(unfenced(text)) for part in re.split(r"&&|;|\|", line)]
    return [part for part in parts if re.match(r"(\w+=\S* )*python ", part)]


def docstring_commands(source):
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("python ")]


def options_of(name):
    own = {mine.NAME: mine.Config, real_text.NAME: real_text.Config}
    return own.get(name) or config_class(name)


@functools.cache
def parser_of(name):
    return HfArgumentParser(options_of(name))


def flag_faults(name, flags):
    """What the script of a method says to these flags, without running it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            values = parser_of(name).parse_args([flag for flag in flags if flag != "--help"])
        options_of(name)(**vars(values))
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1:]
    except UserError as error:
        return [str(error)]
    return []


def command_faults(command):
    """A script of ours exists, and knows its flags and their values."""
    _, _, command = command.partition("python ")
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    module, words = (words[1], words[2:]) if words[0] == "-m" else ("", words)
    if module == "referee":
        if words == ["--docs"]:
            return []
        name, *flags = words or [""]
        known = name in (*method_names(), comparison.NAME, mine.NAME, real_text.NAME)
        faults = [] if known else [f"the referee knows no method {name!r}"]
        return faults or flag_faults(name, [flag for flag in flags if flag not in OWN_FLAGS])
    if module:
        file, flags = ROOT / f"{module.replace('.', '/')}.py", words
        if module in ("pip", "pytest", "venv"):
            return []
    else:
        file, flags = ROOT / words[0], words[1:]
    if not file.exists():
        return [f"no such file: {file.relative_to(ROOT)}"]
    if not module and file.stem in method_names():
        return flag_faults(file.stem, flags)
    return [f"{file.name} has no {flag}" for flag in flags if flag.startswith("--")
            and f'"{flag}"' not in read(file)]


def option_faults(text):
    """Flags that stand alone in inline code are options of one of the methods."""
    known = {field for name in method_names() for field in vars(parser_of(name).parse_args([]))}
    flags = [flag for code in spans(unfenced(text)) if code.startswith("--")
             for flag in re.findall(r"--(\w+)", code)]
    known |= {"help", "report", "tune", "docs"}
    return [f"no method has --{flag}" for flag in flags if flag not in known]


def anchors(text):
    """What GitHub makes of the headings."""
    titles = re.findall(r"(?m)^#+ (.+)$", unfenced(text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def link_faults(path, text):
    """Relative links lead to files of the project, and to headings that exist."""
    faults, plain = [], re.sub(r"`[^`]*`", "", unfenced(text))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)", plain):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if file and not (goal.is_relative_to(ROOT) and goal.exists()):
            faults.append(f"{target} leads to no file of the project")
        elif anchor and anchor not in anchors(read(goal) if file else text):
            faults.append(f"{target} leads to no heading")
    return faults


def strings_of(sources):
    """(string constants, f-strings as patterns with a group for each value) of the code."""
    constants, patterns = set(), set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            constants.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            pieces = [piece.value if isinstance(piece, ast.Constant) else None for piece in node.values]
            if re.search("[a-z]{2}", "".join(filter(None, pieces))):
                patterns.add("".join("(.+)" if piece is None else re.escape(piece) for piece in pieces))
    return constants, patterns


def is_name(name, constants, patterns):
    """Does the code write this name, whole or put together? <words> in it stand for anything."""
    if name in constants or re.fullmatch(r"<[^<>]+>", name):
        return True
    found = [match for match in (re.fullmatch(pattern, name) for pattern in patterns) if match]
    return any(all(is_name(part, constants, patterns) for part in match.groups()) for match in found)


def metric_faults(text, sources):
    """Names of metrics: the code in the first column of the tables.

    `_x` is an ending, of the first name or of many.
    """
    cells, strings = [spans(row[0]) for row in table_rows(section(text, "Metrics"))], strings_of(sources)
    names = [{cell[0] + name, f"eval/<name>{name}"} if name.startswith("_") else {name}
             for cell in cells for name in cell]
    faults = [f"no code writes {min(ways)}"
              for ways in names if not any(is_name(name, *strings) for name in ways)]
    return faults if names else ["no table of metrics"]


# -------------------------------------------------------------------------------------------------- the pages

@every_method
def test_page_lacks_a_heading_or_the_marks_of_its_results(name):
    assert not skeleton_faults(page_of(name))


@every_method
def test_line_beside_an_equation_is_not_in_the_file(name):
    assert not equation_faults(page_of(name), read(ROOT / f"{name}.py"))


@every_method
def test_metric_on_the_page_is_not_in_the_code(name):
    files = [ROOT / f"{name}.py", ROOT / "common.py", *(ROOT / "harness").glob("*.py"),
             *(ROOT / "tasks").glob("*.py")]
    assert not metric_faults(page_of(name), [read(file) for file in files])


@every_method
def test_flag_on_a_page_does_not_exist(name):
    assert not option_faults(page_of(name))


@every_method
def test_command_of_a_docstring_does_not_work(name):
    found = docstring_commands(read(ROOT / f"{name}.py"))
    assert found and not [(command, fault) for command in found for fault in command_faults(command)]


@every_document
def test_command_of_a_document_does_not_work(path):
    assert not [(command, fault) for command in commands(read(path)) for fault in command_faults(command)]


@every_document
def test_link_leads_nowhere(path):
    assert not link_faults(path, read(path))


@every_method
def test_page_has_no_command_of_its_script(name):
    assert any(f"{name}.py" in command for command in commands(page_of(name)))


# --------------------------------------------------------------------------------------- every check can fail

GOOD = "\n".join(f"## {title}\n" + (f"{BEGIN}\n{END}\n" if title == "Results" else "") for title in SKELETON)


def test_skeleton_check_cannot_fail():
    assert not skeleton_faults(GOOD)
    assert not skeleton_faults(GOOD.replace("## Idea\n", "## Idea\n```\n## not a heading\n```\n"))
    assert skeleton_faults(GOOD.replace("## Idea\n", ""))
    assert skeleton_faults(GOOD.replace("## Metrics", "## Names"))
    assert skeleton_faults(GOOD.replace(END, ""))
    assert skeleton_faults(GOOD.replace(f"{BEGIN}\n{END}", f"{END}\n{BEGIN}"))
    assert skeleton_faults(GOOD.replace(f"{BEGIN}\n{END}", "") + f"{BEGIN}\n{END}\n")  # under another heading


def test_equation_check_cannot_fail():
    def page(*cells):
        rows = "\n".join(f"| L | Eq. 1 | {cell} |" for cell in cells)
        return ("## Key equations\n\n| equation | in the paper | line |\n| --- | --- | --- |\n"
                f"{rows}\n\n## Metrics\n")

    source = "a = b + c | d\nprint(a)\n"
    assert not equation_faults(page(r"`a = b + c \| d`", "`print(a)`, `a`"), source)
    assert equation_faults(page("`a = b - c`"), source) == ["not in the file: a = b - c"]
    assert equation_faults(page("`a = b`", "`a  = b`"), source) == ["not in the file: a  = b"]
    assert equation_faults(page("line 1"), source) == ["no code beside L"]
    assert equation_faults(page(), source) == ["no table of equations"]


def test_commands_are_not_found():
    text = ("see `python a.py\n--b 1` and `c`\n```\npip install x && python d.py --e \\\n    --f  # why\n"
            "A=1 python g.py\npython h.py | tail\n```\n```python\nimport python\n```\n")
    assert commands(text) == ["python d.py --e      --f  # why", "A=1 python g.py", "python h.py",
                              "python a.py --b 1"]
    assert docstring_commands('"""A\n\n    python a.py --b\n    text\n"""\n') == ["python a.py --b"]


@pytest.mark.parametrize("command, fault", [
    ("python dpo.py", None), ("python dpo.py --beta 0.3 --help  # a comment", None),
    ("python dpo.py --quiet ...", None), ('python dpo.py --pairs "strong>weak" --lr 1e-5', None),
    ("python benchmarks/logps.py", None), ("A=1 python -m referee dpo --seeds 2", None),
    ("python -m referee dpo --report", None),
    ("python -m referee mine --model DIR --data FILE --minutes 5", None),
    ("python -m referee mine --minute 5.x", "--minute"),
    ("python -m referee --docs", None),
    ("python -m tasks.build --seed 3", None), ("python -m pytest -q", None),
    ("python dpo.py --gamma 1", "--gamma"), ("python dpo.py --beta high", "invalid float"),
    ("python dpo.py --beta", "expected"), ("python dpo.py --loss ipo", "invalid choice"),
    ("python dpo.py --beta 0", "--beta must be above 0"), ("python dpo.py --hard_pairs a", "needs --pairs"),
    ("python lm.py", "no such file: lm.py"), ("python -m referee", "no method"),
    ("python -m referee xyz", "'xyz'"),
    ("python -m referee dpo --gamma 1", "--gamma"), ("python -m tasks.build --seeds 3", "--seeds"),
    ("python -m tasks.make", "tasks/make.py"),
    ("python benchmarks/logps.py --xyz", "--xyz")])
def test_command_check_cannot_fail(command, fault):
    faults = command_faults(command)
    assert (fault in faults[0] if fault else not faults), faults


def test_option_check_cannot_fail():
    assert not option_faults("`--beta 0.1 --lr 1` and `beta`\n```\n--nothing\n```\n`python x.py --nothing`")
    assert option_faults("use `--nothing`, `--lr 1 --none`") == ["no method has --nothing",
                                                                 "no method has --none"]


def test_link_check_cannot_fail(tmp_path):
    home = ROOT / "docs" / "page.md"
    title = "# A title, with `code`\n"
    assert not link_faults(home,
                           title + "[a](../dpo.py) ![b](https://x.y/z) [c](#a-title-with-code) `[d](e)`")
    assert not link_faults(ROOT / "x.md", "[a](dpo.py) [b](docs)")
    assert link_faults(home, "[a](dpo.py)") == ["dpo.py leads to no file of the project"]
    assert link_faults(home, "# B\n[a](#c)") == ["#c leads to no heading"]
    assert link_faults(home, f"[a]({tmp_path})") and link_faults(home, "[a](../../tmp)")
    assert link_faults(home, "[a](../README.md#no-such-heading)") == [
        "../README.md#no-such-heading leads to no heading"]


def test_metric_check_cannot_fail():
    def page(*names):
        rows = "\n".join(f"| {name} | the mean of `x` |" for name in names)
        return f"## Metrics\n\n| name | formula |\n| --- | --- |\n{rows}\n"

    sources = ['a = {f"eval/{n}": 1, f"eval/{n}_se": 2, f"eval/slope_{n}": 3}\n',
               'b = ("gold", "loss", "eval/x", "words")\n']
    assert not metric_faults(page("`loss`", "`eval/gold`, `eval/gold_se`", "`eval/x`", "`eval/slope_words`"),
                             sources)
    assert not metric_faults(page("`eval/slope_<attribute>`", "`eval/gold`, `_se`", "`eval/x`; also `_se`"),
                             sources)
    assert metric_faults(page("`eval/gold`, `_error`"), sources) == ["no code writes eval/<name>_error"]
    assert metric_faults(page("`loss`, `los`"), sources) == ["no code writes los"]
    assert metric_faults(page("`eval/golden`", "`eval/slope_gold`", "`x`"), sources) == [
        "no code writes eval/golden", "no code writes x"]
    assert metric_faults(page(), sources) == metric_faults(page("loss"), sources) == ["no table of metrics"]
