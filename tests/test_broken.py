"""Figures of broken runs: pages, results/broken.json and benchmarks/broken.py say the same. Runs no model."""
import ast
import json
import re
import struct
from difflib import unified_diff

import pytest

from benchmarks.broken import BUGS, FILE, FOLDER, texts_of
from conftest import ROOT, method_names
from harness import UserError

FOUND = json.loads(FILE.read_text(encoding="utf-8"))
every_method = pytest.mark.parametrize("name", BUGS)
every_figure = pytest.mark.parametrize("name", FOUND)


def section_of(name):
    """What the page says under "What wrong looks like"."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    return page.partition("\n## What wrong looks like\n")[2].partition("\n## ")[0]


def paragraph_of(name):
    """What stands below the figure."""
    return section_of(name).partition(f"(../results/broken/{name}.png)")[2]


def code_of(name):
    """Lines of code that the section shows, as (those taken out, those put in)."""
    lines = "".join(re.findall(r"(?ms)^```diff\n(.*?)^```", section_of(name))).splitlines()
    return tuple([line[1:].strip() for line in lines if line[0] == sign] for sign in "-+")


def distance(right, broken):
    """How far two curves lie apart: mean gap at common steps, over the range of both."""
    right, broken = dict(right), dict(broken)
    steps, values = right.keys() & broken.keys(), [*right.values(), *broken.values()]
    return sum(abs(right[s] - broken[s]) for s in steps) / len(steps) / ((max(values) - min(values)) or 1)


def unknown_numbers(text, curves):
    """The text's numbers with a decimal point that are no value of the curves, rounded to as many digits."""
    values = [value for curve in curves for _, value in curve]
    return [number for number in re.findall(r"-?\d+\.\d+", text)
            if not any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in values)]


def test_a_bug_is_of_no_method_or_two_are_the_same():
    assert set(BUGS) <= set(method_names()) and len({bug.what for bug in BUGS.values()}) == len(BUGS)


def test_a_bug_was_not_run():
    assert [*BUGS] == [*FOUND]


@every_method
def test_bug_changes_no_line_or_more_than_one(name):
    texts = texts_of(name)
    lines = unified_diff(*(text.splitlines() for text in texts.values()), n=0)
    assert len([line for line in lines if re.match(r"[+-] ", line)]) == 2 and ast.parse(texts["broken"])
    assert len(BUGS[name].panels) in (2, 3)


def test_text_that_is_not_in_the_file_is_not_noticed(monkeypatch):
    monkeypatch.setitem(BUGS, "dpo", BUGS["dpo"]._replace(old="no such line"))
    with pytest.raises(UserError, match="dpo.py must have this text once, not 0 times: no such line"):
        texts_of("dpo")
    monkeypatch.setitem(BUGS, "dpo", BUGS["dpo"]._replace(old="import"))
    with pytest.raises(UserError, match="once, not [1-9]"):
        texts_of("dpo")


@every_method
def test_planted_bug_is_one_of_the_workshops(name):
    patches = [file.read_text(encoding="utf-8") for file in (ROOT / "docs/workshop/bugs").glob("*.patch")]
    assert len(patches) == 10 and not any(f"+++ b/{name}.py" in text and BUGS[name].new in text
                                          for text in patches)


@every_figure
def test_page_shows_other_code_than_was_run(name):
    out, into = code_of(name)
    assert (len(out), len(into)) == (1, 1)
    assert BUGS[name].old.strip() in out[0] and BUGS[name].new.strip() in into[0]
    assert out[0] in texts_of(name)["right"] and into[0] in texts_of(name)["broken"]


@every_figure
def test_page_lacks_its_figure_or_the_figure_is_too_large(name):
    assert f"](../results/broken/{name}.png)" in section_of(name)
    data = (FOLDER / f"{name}.png").read_bytes()
    assert len(data) < 100_000 and struct.unpack(">II", data[16:24]) == (1200, 400)


@every_figure
def test_curves_of_the_broken_run_look_like_the_right_ones(name):
    right, broken = FOUND[name]["right"], FOUND[name]["broken"]
    assert list(right) == list(broken) == list(BUGS[name].panels)
    assert max(distance(right[metric], broken[metric]) for metric in right) > 0.2


@every_figure
def test_number_below_a_figure_was_not_measured(name):
    text = paragraph_of(name)
    assert 20 < len(text.split()) < 110 and re.search(r"\d\.\d", text)
    assert not unknown_numbers(text, [curve for kind in FOUND[name].values() for curve in kind.values()])


def test_the_checks_cannot_fail():
    assert distance([[0, 1.0], [1, 2.0]], [[0, 1.0], [1, 2.0]]) == 0
    assert distance([[0, 0.0], [1, 1.0]], [[0, 0.0], [1, 0.0], [2, 0.0]]) == 0.5
    assert not unknown_numbers("from 0.69 to -1.3, in 3 steps", [[[0, 0.6931]], [[5, -1.26]]])
    assert unknown_numbers("0.70 and 1.3, 2.0", [[[0, 0.6931], [1, 2.04]], [[5, -1.26]]]) == ["0.70", "1.3"]
