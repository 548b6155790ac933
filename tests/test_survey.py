"""The survey's statements: each has claims that exist, and what stands beside them comes from stored runs."""
import re

import pytest

from conftest import ROOT, method_names
from experiments import comparison as compared_data
from experiments import survey as data
from harness import UserError
from referee import docs, side_by_side, survey, tables
from referee.arms import experiments_of
from referee.statistics import compare_arms
from referee.tables import measured

TESTS = [(method, claim) for *_, tests in data.STATEMENTS for method, claim, _ in tests]
CJK = "[\u4e00-\u9fff]"


def claims_of(method):
    if method == side_by_side.NAME:
        return list(data.COMPARED)
    return [c["claim"] for experiment in experiments_of(method).values() for c in experiment["claims"]]


def runs(metric, *values):
    return {seed: {metric: value, "trace": []} for seed, value in enumerate(values)}


# ------------------------------------------------------------------------------------------------- the data

@pytest.mark.parametrize("method, claim", TESTS)
def test_claim_of_a_statement_does_not_exist_or_is_not_the_only_one(method, claim):
    assert claims_of(method).count(claim) == 1
    assert survey.claim_of(method, claim)[1]["holds"]


@pytest.mark.parametrize("method", ["rso", side_by_side.NAME])
def test_claim_that_does_not_exist_is_no_user_error(method):
    with pytest.raises(UserError, match=f"{method} has no claim 'it wins'"):
        survey.claim_of(method, "it wins")


def test_claim_of_the_comparison_is_not_used_or_its_arms_do_not_exist():
    assert {claim for method, claim in TESTS if method == side_by_side.NAME} == set(data.COMPARED)
    arms = {name for names in compared_data.FAMILIES.values() for name in names}
    assert all({left, right} <= arms for c in data.COMPARED.values() for left, _, right in c["holds"])


def test_substitute_has_no_cell_for_a_need_or_no_runs():
    for name, method, arm, needs in data.SUBSTITUTES:
        assert len(needs) == len(survey.NEEDS), name
        assert not arm or arm[1] in experiments_of(method)[arm[0]]["arms"], name
    known = {method for _, method, _, _ in data.SUBSTITUTES}
    assert known <= {*method_names()} and len(known) == 9                # a tenth gets its row by itself


def test_measured_number_is_written_by_hand():
    page = [line for path, kind in (("README.zh.md", "results"), ("docs/survey.zh.md", "survey"))
            for part in (0, 2) for line in docs.split(ROOT / path, kind)[part]]
    texts = [text for english, zh, tests in data.STATEMENTS for text in (english, zh, *sum(tests, ()))]
    cells = [cell for *_, needs in data.SUBSTITUTES for cell in needs]
    made = [line for kind in ("comparison", "which") for line in docs.split(ROOT / "README.zh.md", kind)[1]]
    texts += [line for line in page if line not in made]
    assert not [text for text in (*texts, *cells) if re.search(r"±\s*\d|\d\.\d{3}", text)]


# ---------------------------------------------------------------------------------------------- what is said

@pytest.mark.parametrize("path", ["docs/survey.zh.md", "docs/comparison.md"])
def test_missing_result_is_said_to_be_measured(tmp_path, path):
    header, *rows = survey.statement_rows(path, tmp_path)
    zh = path.endswith(".zh.md")
    not_run, no_comparison = (survey.CHINESE[word] if zh else word
                              for word in (survey.NOT_RUN, survey.COMPARISON_NOT_RUN))
    assert len(rows) == len(TESTS) and [bool(re.search(CJK, word)) for word in header] == [zh] * 4
    for (method, claim), (_, text, found, verdict) in zip(TESTS, rows):
        assert found == "-" and verdict == (no_comparison if method == side_by_side.NAME else not_run)
        link = "](comparison.md#results)" if method == side_by_side.NAME else f"]({method}.md)"
        assert link in text and (zh or text.endswith(f": {claim}"))
    assert [row[0] for row in rows if row[0]] == [texts[zh] for texts in data.STATEMENTS]


LADDER = "predicted from 4,096 ratings"


@pytest.mark.parametrize("steerlm, ppo, word, zh, number", [
    ((3.0, 3.1, 3.2), (1.0, 1.0, 1.0), "reproduced", "复现", "+2.10 ±0.25"),
    ((0.0, 0.1, 0.2), (1.0, 1.0, 1.0), "not reproduced", "未复现", "-0.900 ±0.248"),
    ((0.0, 2.1), (1.0, 1.0), "inconclusive", "尚无定论", "+0.1 ±13.3"),
    ((3.0, None), (1.0, 1.0), "not measured", "无法测量", "")])
def test_verdict_or_number_is_not_that_of_the_runs(monkeypatch, steerlm, ppo, word, zh, number):
    found = {"ladder": {LADDER: runs("eval/gold", *steerlm), "PPO": runs("eval/gold", *ppo)}}
    monkeypatch.setattr(survey, "runs_of", lambda method, _: found if method == "steerlm" else {})
    place = TESTS.index(("steerlm", "it beats RLHF")) + 1
    english = survey.statement_rows("docs/comparison.md")[place]
    chinese = survey.statement_rows("docs/survey.zh.md")[place]
    assert (english[3], chinese[3]) == (word, zh)
    assert english[2].startswith(f"{LADDER} - PPO" + (f": {number}" if number else ""))
    if number:
        assert f"({len(ppo)} seeds)" in english[2] and f"（{len(ppo)} 个种子）" in chinese[2]
        assert number in chinese[2]


def test_comparison_takes_other_seeds_or_another_situation(tmp_path, monkeypatch):
    first, second = compared_data.SEEDS[0], compared_data.SECOND_SEEDS[0]
    arms = {name: {seed: {"eval/gold": gold + seed / 100, "trace": []} for seed in (first, first + 1, second)}
            for name, gold in (("RRHF", 1.0), ("PPO", 0.5))}
    arms["RRHF"][first]["eval/gold"] += 0.01                                  # else a deviation of 0
    (tmp_path / "comparison.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(side_by_side, "gathered", lambda folder: ({}, {"clean": arms, "noisy labels": {}}))
    word, found = survey.judged("comparison", TESTS[0][1], survey.runs_of("comparison", tmp_path))
    assert TESTS[0][0] == "comparison" and word == "reproduced" and found.endswith("(2 seeds)")
    for arm in arms.values():
        arm[second + 1] = {"eval/gold": arm[second]["eval/gold"] + 0.1 * (arm is arms["RRHF"]), "trace": []}
    word, found = survey.judged("comparison", TESTS[0][1], survey.runs_of("comparison", tmp_path))
    assert word == "reproduced" and found.endswith("(2 seeds); other seeds: +0.550 ±0.635")
    assert survey.in_chinese(found).endswith("（2 个种子）；另一组种子：+0.550 ±0.635")


def test_number_of_claims_is_not_what_the_protocol_says():
    page = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    own = sum(len(claims_of(method)) for method in method_names())
    assert f"There are {own + len(data.COMPARED)}: {own} on the pages" in " ".join(page.split())
    assert len(data.COMPARED) == 10 and "ten of the comparison" in page


# --------------------------------------------------------------------------------------------------- Chinese

def test_header_or_verdict_has_no_chinese_word(tmp_path):
    run = dict.fromkeys(survey.COSTS, 1.0)
    header, *rows = survey.substitute_rows({"SFT": ("SFT", {0: run}), "dpo": ("DPO", {0: run})}, tmp_path)
    assert len(header) == 1 + len(survey.NEEDS) + len(survey.COSTS)
    assert all(re.search(f"{CJK}|KL", word) for word in header), header
    assert {"reproduced", "not reproduced", "inconclusive", "not measured", survey.NOT_RUN, docs.SFT,
            survey.COMPARISON_NOT_RUN, docs.CONTROL, side_by_side.NAME} <= set(survey.CHINESE)
    assert rows[0] == ["SFT", *["-"] * (2 + len(survey.NEEDS)), "1.00", "1.00"]         # it trains nothing
    dpo, = (row for row in rows if row[0] == "[DPO](docs/dpo.md)")
    assert dpo[-4:] == ["1.00"] * 4 and dpo[1] == "不用" and len(rows) == 1 + len(data.SUBSTITUTES)
    assert set(survey.COSTS.values()) <= set(docs.OVERVIEW.values())            # the same as README's columns


A, B = runs("x", 1.0, 2.0, 3.5), runs("x", 2.0, 2.5, 3.0)


@pytest.mark.parametrize("part, k", [
    (("A", ">", "B"), 1), (("A", ">", "B", -0.1), 2), (("A", "=", "B", 0.1), 1), (("A", "=", 0.5, 0.1), 1),
    (("A", "<", 1.5), 2)])
def test_what_was_measured_is_left_in_english(part, k):
    one = compare_arms({"A": A, "B": B}, "x", *part, k=k)
    for word in ("inconclusive", "not measured"):
        for settles in (one.settles, 40, 2000):
            text = survey.in_chinese(measured(word, [one._replace(settles=settles, status="open")] * k, 0))
            assert not re.search("[a-z]{2,}|[()]", text), text
    text = survey.in_chinese(measured("inconclusive", [one._replace(settles=40, status="open")] * k, 0))
    assert "约 40 个种子" in text and "（3 个种子）" in text and ("2 项比较" in text) == (k == 2)


def test_provenance_is_left_in_english():
    machine = {"device": "auto: x86_64, 2 cores", "software": {"python": "3.11.7", "torch": "2.13.0+cpu"}}
    text = survey.in_chinese(tables.provenance(
        {"config": {"beta": 0.3}, "seeds": [0, 1], "machines": [machine, machine]}))
    assert text.startswith("种子：0, 1。选项：beta=0.3。设备 auto：x86_64，2 核；python 3.11.7")
    assert not re.search("Seeds|Flags|cores", text) and text.count("2 核") == 2
    text = survey.in_chinese(tables.provenance({"config": {}, "seeds": [0, 1], "machines": [machine]}))
    assert text.startswith("种子：0, 1（事先定下 10 个，已运行 2 个）。设备 auto：x86_64，2 核；python 3.11.7")
    assert not re.search("Seeds|beforehand|cores", text)


# ------------------------------------------------------------------------------------------------ substitutes

def test_variant_lacks_the_cost_of_its_start_or_has_a_kl_to_another_policy(monkeypatch, tmp_path):
    costs = dict.fromkeys(tables.COSTS, 1.0) | {"trace": []}
    hard, start = costs | {"eval/kl": 3.0, "cpu_seconds": 5.0}, costs | {"cpu_seconds": 2.0}
    found = {"curriculum": {"easy to hard": {0: hard, 1: hard}, "SFT on strong": {0: start}}}
    monkeypatch.setattr(survey, "runs_of", lambda *_: found)
    monkeypatch.setattr(survey, "stored", lambda *_: {"config": {}, "defaults": {}})
    run, = survey.runs_of_arm("dpo", "curriculum", "easy to hard").values()          # seed 1 has no start
    assert run["cpu_seconds"] == 7.0 and run["eval/kl"] is None
    alone, = survey.runs_of_arm("dpo", "curriculum", "SFT on strong").values()
    assert alone["cpu_seconds"] == 2.0


def test_method_that_the_survey_does_not_know_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(survey, "method_names", lambda: [*method_names(), "tenth"])
    rows = survey.substitute_rows({"tenth": ("x", runs("eval/gold", 0.25))}, tmp_path)
    assert rows[-1] == ["[tenth](docs/tenth.md)", *["-"] * len(survey.NEEDS), "0.250"]


def test_page_in_chinese_is_not_written_with_the_others(monkeypatch):
    monkeypatch.chdir(ROOT)                         # test_referee.py: every page in pages() is up to date
    assert {"README.zh.md", "docs/survey.zh.md"} <= {*map(str, docs.pages())}
    assert {*docs.kinds("README.zh.md")} == {"results", "comparison", "which"}
    assert docs.kinds("docs/survey.zh.md") == ["survey"]
