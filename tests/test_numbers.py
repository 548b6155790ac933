"""The numbers of seed 0 on the pages are those that were measured: results/pages.json.

A number with a decimal point belongs to the name of a metric before it, in the same exercise, card or table
column. It has to be the first, last, least or largest value of this metric, rounded, in one of the runs whose
commands stand there, or in the method's default run. Settings stand in code, where no number is checked.
"""
import json
import re
import shlex

import pytest

from conftest import ROOT, method_names
from referee import pages
from test_docs import page_of, read, section, table_rows

STORED = json.loads(read(pages.FILE))
WORDS = {"gold": "eval/gold", "proxy": "eval/proxy", "judge": "eval/judge", "kl": "eval/kl",
         "fluency": "eval/fluency", "length": "eval/length", "win rate": "eval/win_rate",
         "distinct-2": "eval/distinct_2", "nll": "eval/nll", "score accuracy": "eval/score_accuracy",
         "by proxy": "eval/win_rate_proxy", "by judge": "eval/win_rate_judge", "held-out loss": "eval/loss",
         "held-out logps/chosen": "eval/logps/chosen", "held-out logps/rejected": "eval/logps/rejected",
         "label error": "eval/label_error"}
# A piece of text: code, the name of a metric, or a number.
PIECES = re.compile(r"`(?P<code>[^`]+)`|\b(?P<word>" + "|".join(sorted(WORDS, key=len, reverse=True))
                    + r")\b|(?P<number>(?<![\w.,/-])(?P<error>± ?)?-?\d+\.\d+)(?![\w]|\.\d)", re.I)


def runs_of(text, *default):
    """The stored runs of the commands in a text, and the default runs of these methods."""
    names = [" ".join(words) for words in pages.commands_of(text)] + [f"{name}.py" for name in default]
    return [STORED[name] for name in names if name in STORED]


def known(number, metric, runs, which=slice(None)):
    """Is the number, as far as it is written, a value of the metric in one of the runs?"""
    digits = len(number.partition(".")[2])
    return any(f"{value:.{digits}f}" == number for run in runs for value in run.get(metric, [])[which])


def number_faults(text, runs):
    faults, metric = [], None
    names = {name for run in runs for name in run}
    for piece in PIECES.finditer(" ".join(text.split())):
        if piece["code"] in names or f"eval/{piece['code']}" in names:
            metric = piece["code"] if piece["code"] in names else f"eval/{piece['code']}"
        elif piece["word"]:
            metric = WORDS[piece["word"].lower()]
        elif piece["number"]:
            number = piece["number"].lstrip("± ")
            asked = metric and metric + "_se" * bool(piece["error"])
            if not asked or not known(number, asked, runs):
                faults.append(f"{number} is no value of {asked}")
    return faults


def seconds_faults(text, runs):
    """The seconds of a card are those of its commands."""
    told = re.search(r"(?s)\*\*Seconds\.\*\* (.+?)\n\n", text)[1]
    measured = {round(run["cpu_seconds"][0]) for run in runs}
    return [f"{n} seconds were not measured" for n in map(int, re.findall(r"\d+", told)) if n not in measured]


def asked_faults(text, runs):
    """What a text asks show.py for is in the metrics of each of its runs."""
    words = [word for found in re.findall(r"`python docs/workshop/show\.py RUN ([^`]+)`", text)
             for word in found.split() if not word.startswith("--")]
    return [f"{word} is no metric" for word in words for run in runs
            if not any(name == word or name.endswith(f"/{word}") for name in run)]


def table_faults(text, run):
    """The table of a default run: its columns are metrics, its rows say what was before and after."""
    header = re.search(r"(?m)^\| \| (.+) \|$", text)
    if not header:
        return ["no table of the default run"]
    columns, faults = header[1].split(" | "), []
    for label, *cells in table_rows(text[header.start():])[:2]:
        which = slice(0, 1) if label.startswith("before") else slice(1, 2)
        for column, cell in zip(columns, cells, strict=True):
            names = [name.replace("`", "").strip() for name in column.split(" / ")]
            metrics = [WORDS.get(name.lower(), name) for name in names]
            for metric, part in zip(metrics, cell.split(" / "), strict=True):
                for number, name in zip(part.split(" ± "), (metric, f"{metric}_se")):
                    if re.match(r"-?\d", number) and not known(number, name, [run], which):
                        faults.append(f"{label}: {number} is not {name}")
    return faults


def exercises(name):
    return re.split(r"(?m)^(?=\d+\. )", section(page_of(name), "Exercises"))[1:]


def cards():
    return re.split(r"(?m)^(?=## )", read(ROOT / "docs" / "workshop" / "cards.md"))[1:]


def prose(text):
    """Without tables and blocks of code."""
    return "\n".join(line for line in re.sub(r"(?ms)^```.*?^```", "", text).splitlines()
                     if not line.startswith("|"))


every_method = pytest.mark.parametrize("name", method_names())


def test_command_of_a_page_was_not_measured_or_a_measured_one_is_on_no_page():
    assert sorted(pages.commands()) == sorted(STORED)


@every_method
def test_table_of_the_default_run_differs_from_what_was_measured(name):
    assert not table_faults(section(page_of(name), "Commands and expected numbers"), STORED[f"{name}.py"])


@every_method
def test_number_beside_the_table_was_not_measured(name):
    text = section(page_of(name), "Commands and expected numbers")
    assert not number_faults(prose(text), runs_of(text, name))


@every_method
def test_number_of_an_exercise_was_not_measured(name):
    assert not [fault for text in exercises(name) for fault in number_faults(text, runs_of(text, name))]


def test_number_of_a_card_was_not_measured():
    for text in cards():
        methods = {words[0].removesuffix(".py") for words in pages.commands_of(text)}
        assert not number_faults(text, runs_of(text, *methods))


def test_card_tells_other_seconds_or_asks_for_a_metric_that_is_not_there():
    for text in cards():
        methods = {words[0].removesuffix(".py") for words in pages.commands_of(text)}
        runs = runs_of(text, *methods)
        assert runs and not seconds_faults(text, runs) + asked_faults(text, runs_of(text)), text
        wanted = re.search("the first `|the last `|all digits", text.partition("<details>")[0], re.I)
        assert "show.py RUN" in text or not wanted, text


@every_method
def test_exercise_asks_for_a_metric_that_is_not_there(name):
    assert not [fault for text in exercises(name) for fault in asked_faults(text, runs_of(text))]


@every_method
def test_docstring_tells_other_numbers(name):
    run = STORED[f"{name}.py"]
    told = re.findall(r"gold (\S+) to (\S+), KL (\S+)", read(ROOT / f"{name}.py"))
    assert len(told) == 1 and all(known(*each) for each in zip(
        told[0], ("eval/gold", "eval/gold", "eval/kl"), [[run]] * 3, (slice(0, 1), slice(1, 2), slice(1, 2))))


def test_readme_prints_another_run():
    printed = read(ROOT / "README.md").split("before             after")[1]
    rows = re.findall(r"(?m)^([\w/]+) +(-?\d.*)$", printed.split("\n\n")[0])
    assert len(rows) > 8
    for name, numbers in rows:
        found = re.findall(r"(± )?(-?\d+\.\d{3})", numbers)
        values = [number for error, number in found if not error]
        for number, place in zip(values, (0, 1) if len(values) == 2 else (1,), strict=True):
            assert known(number, f"eval/{name}", [STORED["dpo.py"]], slice(place, place + 1)), (name, number)


def test_seconds_differ_from_what_was_measured():
    told = [(command, seconds) for name in method_names() for command, seconds in re.findall(
        r"`?python ([^`|\n#]+?)`? *(?:\||#) *(\d+) CPU s", page_of(name))]
    assert len(told) > 10
    told += [(f"{name}.py", seconds) for name in method_names() for seconds in re.findall(
        r"\| seconds of the default run \| (\d+) CPU s", page_of(name))]
    measured = {name: round(run["cpu_seconds"][0]) for name, run in STORED.items()}
    assert not [row for row in told if measured[" ".join(shlex.split(row[0]))] != int(row[1])]
    for card in cards():                                                     # those of a default run
        said = re.search(r"\*\*Seconds\.\*\* (?:.* default run's )?(\d+)", card)
        assert not said or measured[pages.commands_of(card)[0][0]] == int(said[1]), card


# --------------------------------------------------------------------------------------- every check can fail

RUN = {"eval/gold": [0.1234, 0.5678, 0.1, 0.6], "eval/gold_se": [0.04, 0.05, 0.04, 0.05],
       "eval/kl": [0.0, 2.0, 0.0, 2.5], "loss/rank": [7.25, 1.0, 0.5, 8.0]}


@pytest.mark.parametrize("text, faults", [
    ("Gold 0.123 ± 0.040, then 0.568; KL 2.00", 0), ("gold 0.57, and `--beta 0.3` KL 2.5", 0),
    ("`loss/rank` is 7.25", 0), ("`kl` goes to 2.5", 0), ("gold 0.124", 1), ("gold 0.123 ± 0.123", 1),
    ("it is 0.123", 1), ("KL 0.568", 1), ("judge 0.123", 1), ("`loss/sft` is 0.1", 1)])
def test_number_check_cannot_fail(text, faults):
    assert len(number_faults(text, [RUN])) == faults


def test_seconds_check_and_check_of_what_is_asked_cannot_fail():
    run = RUN | {"cpu_seconds": [18.7]}
    card = "**Seconds.** Two runs: 19, then {}.\n\n**Write down.** `python docs/workshop/show.py RUN {}`\n"
    assert not seconds_faults(card.format(19, "gold"), [run])
    assert seconds_faults(card.format(18, "gold"), [run]) == ["18 seconds were not measured"]
    assert not asked_faults(card.format(19, "gold loss/rank rank --all"), [run])
    assert asked_faults(card.format(19, "gold ank"), [run, run]) == ["ank is no metric"] * 2


def test_table_check_cannot_fail():
    table = ("| | gold | KL / `loss/rank` |\n| --- | --- | --- |\n| before | {} ± 0.04 | 0 / 7.3 |\n"
             "| after | {} | 2.0 / 1 |\n")
    assert table_faults("", RUN)
    assert table_faults(table.format("0.123", "0.568"), RUN) == ["before: 7.3 is not loss/rank"]
    assert len(table_faults(table.format("0.568", "0.123"), RUN)) == 3
