"""The comparison of all methods: what is tried, what is chosen, which arms run, what the tables say.

On two methods that train nothing; the real grids are read and planned, not run.
"""
import itertools
import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

import experiments.comparison as data
import harness
from conftest import count_a, pair_task, tensor, toy_run
from harness import UserError
from referee import __main__ as command_line
from referee import arms, best_of_n, comparison, docs, figures, side_by_side, statistics, survey
from referee.tuning import START, as_experiments


DRAW_ROWS = figures.draw_rows


# ------------------------------------------------------------------------------------------ the real data

def test_grids_name_options_that_no_script_has_or_that_it_refuses():
    planned = arms.plan(comparison.NAME, {}, as_experiments(comparison.to_tune()))
    assert set(planned) == {*data.ARMS, comparison.BUDGET}
    for name, entry in data.ARMS.items():
        settings = [arm for arm in planned[name] if arm != START]
        assert len(settings) == data.TRIED >= 12, name
        assert {*entry.get("size", ["epochs"]), entry.get("passes", "epochs")} <= {*entry["grid"]}, name
    assert len(data.SEEDS) >= 12 and not {*data.SEEDS} & {*data.SECOND_SEEDS}
    assert not {*data.SEEDS, *data.SECOND_SEEDS} & {*comparison.VALIDATION}


@pytest.mark.parametrize("name", data.ARMS)
def test_settings_are_not_of_the_grid_or_others_at_every_call_or_lack_the_default(name):
    entry = data.ARMS[name]
    found = comparison.settings_of(name, entry)
    assert found == comparison.settings_of(name, entry)
    assert len({json.dumps(settings) for settings in found}) == data.TRIED
    assert all(settings[k] in values for settings in found for k, values in entry["grid"].items())
    shared = {k: v for k, v in entry["arm"].items() if k != "method"}
    usual = vars(arms.config_class(entry["arm"]["method"])(**shared))
    default = {k: usual[k] for k in entry["grid"]}
    assert found[0] == default or not all(usual[k] in values for k, values in entry["grid"].items())


def test_arm_of_no_method():
    assert {entry["arm"]["method"] for entry in data.ARMS.values()} <= {*arms.method_names()}


# ------------------------------------------------------------------------------------------------- best of n

def test_best_of_n_keeps_another_than_the_best_or_trains(toy, tmp_path):
    def reward(prompts, texts):
        return tensor([text.count("a") for text in texts])

    run = toy_run(toy, pair_task(count_a), out=tmp_path / "run", rewards={"proxy": reward}, eval_prompts=6,
                  eval_samples=200, max_new_tokens=4)
    run.config = best_of_n.Config(**vars(run.config) | {"n": 8})
    before = [p.clone() for p in run.policy.parameters()]
    best_of_n.train(run)
    first, last = run.trace
    assert last["eval/kl"] == pytest.approx(math.log(8) - 7 / 8) and first["eval/kl"] == 0
    assert all((a == b).all() for a, b in zip(before, run.policy.parameters()))
    scores = np.reshape(run.samples["before"]["proxy"], (6, 200))            # of samples without a choice
    expected = statistics.best_of_n(scores, scores, 8)[1]
    assert fmean(run.samples["after"]["proxy"]) == pytest.approx(expected, abs=0.1)
    assert expected > first["eval/proxy"] + 0.5
    assert run.samples["after"]["prompts"] == run.samples["before"]["prompts"]


def test_best_of_rows_are_not_their_prompts_own(toy):
    run = toy_run(toy)
    seen = []

    def reward(prompts, texts):
        seen.append((prompts, texts))
        return tensor([len(text) for text in texts])

    batch = harness.best_of(4, reward)(run.policy, run.tokenizer, ["ab", "c"], 3, 1.0, max_new_tokens=5)
    (prompts, texts), = seen
    assert prompts == ["ab"] * 12 + ["c"] * 12 and len(batch) == 6
    lengths = [[len(text) for text in texts[4 * i:4 * i + 4]] for i in range(6)]
    assert [max(row) for row in lengths] == [len(text) for text in
                                             harness.samples.common.decode(run.tokenizer, batch)]


# --------------------------------------------------------------------------------------------- what is chosen

@dataclass
class Config(harness.Config):
    beta: float = harness.option(1.0, "", "(0, inf)")
    demonstrations: int = harness.option(800, "", "[0, inf)")


ARMS = {"slow": dict(about="", arm={"method": "toy"}, grid={"beta": (1.0, 2.0, 3.0), "epochs": (1.0, 2.0)}),
        "fast": dict(about="", arm={"method": "toy", "batch_size": 32},
                     grid={"beta": (1.0, 2.0, 3.0), "demonstrations": (80, 800), "epochs": (1.0,)},
                     size=("demonstrations",)),
        "second": dict(about="", arm={"method": "toy", "batch_size": 16}, start={"method": "toy", "lr": 0.5},
                       grid={"beta": (1.0, 2.0, 3.0), "epochs": (1.0,)}, few={"lr": 0.25})}


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Three arms of a method whose outcome is arithmetic: toys.calls lists what ran."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("toy")
    module.Config, module.calls = Config, []

    def train(config):
        """Gold rises with beta, epochs and the seed; costs with beta; noise and few data take from it."""
        module.calls.append(config)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        noise = 0.01 * math.sin(1000 * config.beta + 77 * config.seed + config.epochs + config.batch_size)
        gold = (0.1 * config.beta * (config.epochs > 0) + 0.3 * (config.batch_size == 16) + config.seed / 10
                - config.label_noise - 0.2 * bool(config.limit) + 0.05 * min(config.epochs, 3) + noise)
        cost = 10 * config.epochs * config.demonstrations / 800 + config.beta
        metrics = {"eval/gold": gold, "eval/win_rate_judge": gold - config.seed / 10, "eval/fluency": 0.95,
                   "eval/kl": config.beta, "eval/proxy": gold, "eval/judge": gold, "eval/win_rate": gold,
                   "eval/length": 9.0}
        costs = {"cpu_seconds": cost, "tokens_generated": 5, "tokens_trained": 7, "tokens_scored_reward": 0,
                 "tokens_scored_reference": 1, "tokens_scored_value": 0, "state_mb": 1.0, "seconds": 1.0}
        before = {"eval/gold": 0.0, "eval/fluency": 0.95, "eval/kl": 0.0}
        return metrics | costs | {"out": config.out, "build": "b", "finished": "2026-01-01T00:00:00+00:00",
                                  "trace": [before | {"step": 0}, metrics | {"step": 9}]}

    module.train = train
    monkeypatch.setitem(sys.modules, "toy", module)
    for name, stand_in in {"launch": lambda train, config, known: train(config),
                           "load_task": lambda config: None, "fingerprint": lambda config: "b",
                           "test_pool": lambda config: None}.items():
        monkeypatch.setattr(harness, name, stand_in)
    for holder in (comparison, data):
        monkeypatch.setattr(holder, "ARMS", ARMS)
        monkeypatch.setattr(holder, "TRIED", 3)
        monkeypatch.setattr(holder, "PPO", {"method": "toy", "epochs": 2.0})
    monkeypatch.setattr(comparison, "RECIPES", {"big": {"method": "toy", "epochs": 9.0, "beta": 4.0}})
    monkeypatch.setattr(side_by_side, "UNRANKED", ("big", data.DEFAULT))
    monkeypatch.setattr(comparison, "SEEDS", range(4))
    monkeypatch.setattr(comparison, "SECOND_SEEDS", range(4, 8))
    monkeypatch.setattr(side_by_side, "SEEDS", range(4))
    monkeypatch.setattr(side_by_side, "SECOND_SEEDS", range(4, 8))
    for holder in (comparison, side_by_side):
        monkeypatch.setattr(holder, "UNTRAINED", {"SFT": {"method": "toy", "epochs": 0}})
    module.rows = []
    monkeypatch.setattr(figures, "draw_rows", lambda rows, curves, path: (
        module.rows.append(rows), path.write_text("drawn", encoding="utf-8")))
    return module


def test_dear_setting_is_chosen_or_the_cost_of_the_start_is_forgotten():
    def run(seconds):
        return {"cpu_seconds": seconds}

    units = {100: run(10.0), 101: run(20.0)}
    found = {"twice": {100: run(20.0), 101: run(40.0)}, "equal": {100: run(12.0), 101: run(24.0)},
             "half": {100: run(5.0), 101: run(10.0)}, "by seed": {100: run(20.0), 101: run(2.0)}}
    assert [*comparison.affordable(found, units)] == ["equal", "half", "by seed"]
    found[START] = {100: run(7.0), 101: run(14.0)}
    assert [*comparison.affordable(found, units)] == ["half"]


def test_fluency_is_that_of_the_policy_that_an_arm_starts_from(toys):
    """What starts from a policy that lost 0.1 of fluency may not lose a little more."""
    def run(fluency, first, wins=0.5, cost=1.0):
        return {"eval/fluency": fluency, "eval/win_rate_judge": wins, "cpu_seconds": cost,
                "trace": [{"eval/fluency": first}]}

    seeds = comparison.VALIDATION
    tuning = {comparison.BUDGET: dict(settings=[{}]), "x": dict(settings=[{"lr": 1.0}, {"lr": 2.0}])}
    runs = {"lr 1": {seed: run(0.84, 0.85, 0.9) for seed in seeds},
            "lr 2": {seed: run(0.93, 0.85, 0.6) for seed in seeds},
            START: {seed: run(0.85, 0.95) for seed in seeds}}
    budget = {"as it is": {seed: run(0.95, 0.95, cost=9.0) for seed in seeds}}
    collected = {comparison.BUDGET: budget, "x": runs}
    assert comparison.choices(tuning, collected)["x"][0] == {"lr": 2.0}


def test_best_affordable_setting_of_the_judge_is_not_what_runs(toys):
    comparison.tune(harness.Config(quiet=True))
    tuning, collected, chosen = comparison.tuned()
    assert {*chosen} == {*ARMS} | {f"{name}, little data" for name in ARMS}
    assert {c.seed for c in toys.calls} == {100, 101, 102}
    tried = comparison.settings_of("slow", ARMS["slow"])
    # the budget is 21 s, so two epochs with beta 3 (23 s) are affordable
    best = max(tried, key=lambda s: 0.1 * s["beta"] + 0.05 * s["epochs"])
    assert chosen["slow"][0] == best and "3 of 3 settings fit the time" in chosen["slow"][1]
    # where there are few data, the chosen beta stays, and only so many passes as the time allows
    few = tuning["slow, little data"]
    assert few["arm"]["limit"] == data.FEW and few["arm"]["beta"] == best["beta"]
    assert [s["epochs"] for s in few["settings"]] == [best["epochs"] * k for k in (1, 3, 8)]
    assert tuning["fast, little data"]["arm"]["demonstrations"] in (10, 100)
    ran = len(toys.calls)
    comparison.tune(harness.Config(quiet=True))
    assert len(toys.calls) == ran                                       # what is stored is not run again


def test_nothing_is_chosen_of_a_part_or_beyond_the_budget(toys, monkeypatch, capsys):
    with pytest.raises(UserError, match="no settings are chosen yet for slow and 5 others"):
        comparison.run(harness.Config(quiet=True))
    assert comparison.tuned()[2]["slow"] == (None, "Nothing is chosen yet. Runs missing: 12.")
    with pytest.raises(UserError, match="no judge"):
        comparison.tune(harness.Config(quiet=True, reward="module:function"))
    assert not toys.calls
    monkeypatch.setattr(comparison, "PPO", {"method": "toy", "epochs": 0.01})
    comparison.tune(harness.Config(quiet=True))
    settings, why = comparison.tuned()[2]["slow"]
    assert settings is None and why.startswith("No setting takes at most 1.25 times the budget")
    side_by_side.report_tuning()                                            # what there is can be seen
    assert "No setting takes" in capsys.readouterr().out


def test_arms_of_a_situation_lack_its_flags_or_the_chosen_settings(toys):
    comparison.tune(harness.Config(quiet=True))
    chosen = {title: settings for title, (settings, _) in comparison.tuned()[2].items()}
    found = comparison.experiments()
    assert [*found] == ["clean", "noisy labels", "little data", comparison.QUARTER]
    clean, noisy, few, less = (found[title]["arms"] for title in found)
    assert [*clean] == ["SFT", "big", comparison.BUDGET, "slow", "fast", "second: start", "second"]
    assert clean.pop(comparison.BUDGET) == comparison.PPO
    assert clean["slow"] == {"method": "toy"} | chosen["slow"]
    assert clean["second"]["start"] == "second: start" and clean["second: start"] == ARMS["second"]["start"]
    for name, arm in noisy.items():
        assert arm == clean[name] | {"label_noise": 0.25, "rating_noise": 4.0}
    assert [*few] == ["SFT", "slow", "fast", "second: start", "second"]               # no recipes
    assert few["second: start"] == clean["second: start"] | {"limit": data.FEW, "lr": 0.25}
    assert "lr" not in few["second"]
    assert few["slow"] == clean["slow"] | chosen["slow, little data"] | {"limit": data.FEW}
    assert few["fast"]["demonstrations"] == clean["fast"]["demonstrations"] // 8
    assert [*less] == ["slow", "fast"]                                  # none of what starts elsewhere
    assert less["slow"]["epochs"] == clean["slow"]["epochs"] / 4
    assert less["fast"]["demonstrations"] == clean["fast"]["demonstrations"] // 4
    keys = [arm.key for of_title in arms.plan("comparison", {}, found).values() for arm in of_title.values()]
    assert len({*keys}) == len(keys)                                    # no arm stands for another


@pytest.mark.parametrize("settings, sizes, want", [
    ({"epochs": 2.0, "n": 5}, ("epochs",), {"epochs": 0.5, "n": 5}),
    ({"epochs": 2.0, "n": 6}, ("n", "epochs"), {"epochs": 0.5, "n": 2}), ({"n": 1}, ("n",), {"n": 1})])
def test_a_quarter_is_not_a_whole_number_or_0(settings, sizes, want):
    assert comparison.smaller(settings, sizes) == want


# ---------------------------------------------------------------------------------------- what the tables say

def everything(toys):
    comparison.tune(harness.Config(quiet=True))
    comparison.run(harness.Config(quiet=True))


def test_tables_mix_seeds_or_rank_what_is_beyond_the_budget(toys, capsys):
    everything(toys)
    ran = {(c.seed, c.label_noise, c.limit) for c in toys.calls if c.seed < 100}
    assert {seed for seed, *_ in ran} == {*range(8)}
    assert all((noise, limit) == (0, 0) for seed, noise, limit in ran if seed >= 4)
    view, collected = side_by_side.gathered()
    first = side_by_side.of_seeds(collected["clean"], range(4))
    assert all(set(runs) == {0, 1, 2, 3} for runs in first.values()) and "second: start" not in first
    # what an arm starts from is a part of its cost
    start, beta = 10 * 1.0 + 1.0, comparison.tuned()[2]["second"][0]["beta"]
    assert first["second"][0]["cpu_seconds"] == pytest.approx(10 + beta + start)
    assert first["second"][0]["tokens_trained"] == 14 and first["second"][0]["state_mb"] == 1.0
    assert first["second"][0]["eval/kl"] is None is first["second"][0]["eval/win_rate"]       # to its start
    assert first["slow"][0]["share"] == pytest.approx(first["slow"][0]["cpu_seconds"] / 21)
    assert comparison.BUDGET not in first and first[data.DEFAULT][0]["share"] == 1
    rows = side_by_side.main_rows(first, side_by_side.of_seeds(collected[comparison.QUARTER], range(4)))
    header, *body = rows
    unranked = [row for row in body if row[2] == "-"]
    assert unranked == body[-2:] and {row[1] for row in unranked} == {"big", data.DEFAULT}
    assert all(row[-1] == "-" for row in unranked)
    body = body[:-2]
    gold = [float(row[header.index("gold")].split()[0]) for row in body]
    assert gold == sorted(gold, reverse=True) and body[0][2] == "1 (1 to 1)"
    matrix = side_by_side.matrix_rows(first)
    names = [row[0].split(" ", 1)[1] for row in matrix[1:]]
    assert names == [row[1] for row in body]
    marks = [row[1:-1] for row in matrix[1:]]
    flip = {">": "<", "<": ">", "·": "·", "": ""}
    assert all(marks[i][j] == flip[marks[j][i]] for i, j in itertools.product(range(len(names)), repeat=2))
    assert marks[0][-1] == ">" and matrix[0][-1] == "ranks" and matrix[1][-1] == "1 to 1"
    side_by_side.report()
    text = capsys.readouterr().out
    for word in ("clean", "noisy labels", "little data", "who beats whom", "Other seeds, ", "Spearman"):
        assert word in text
    assert Path("results/comparison.png").read_text(encoding="utf-8") == "drawn"
    (_, _, points), (_, _, lines) = toys.rows[-1]
    assert {*points} == {*first} - {data.DEFAULT} and {*lines} == {"slow", "fast", "second"}
    for name, steps in (("slow", [0, 1, 2]), ("second", [0, 2])):                # half of it is no quarter
        trace = lines[name][0]["trace"]
        assert [row["step"] for row in trace] == steps
        assert trace[0] == {"step": 0, "eval/gold": first["SFT"][0]["eval/gold"], "cpu_seconds": 0}
        assert trace[-1]["cpu_seconds"] == first[name][0]["cpu_seconds"] > trace[-2]["cpu_seconds"]


def test_arm_below_the_limit_of_fluency_is_not_named():
    def runs(*fluency):
        return {seed: {"eval/fluency": value} for seed, value in enumerate(fluency)}

    arms = {"SFT": runs(0.95, 0.95), "just": runs(0.93, 0.92), "once": runs(0.97, 0.80), "none": {},
            "lost": runs(0.5, 0.5) | {2: {"diverged": "step 3"}}}
    assert side_by_side.less_fluent(arms) == " Mean fluency below SFT's less 0.03: once (on 1 of 2 seeds)."
    assert side_by_side.less_fluent(arms | {"once": {}}) == "" == side_by_side.less_fluent({})


def test_part_of_the_seeds_is_shown_as_all_of_them(toys, monkeypatch):
    everything(toys)
    assert "set beforehand" not in side_by_side.block()
    monkeypatch.setattr(side_by_side, "SEEDS", range(-2, 4))
    assert "Seeds 0, 1, 2, 3 (4 of the 6 that were set beforehand)." in side_by_side.block()


def test_short_table_has_the_gold_of_another_situation_or_another_order(toys, monkeypatch):
    for path in ("README.md", "README.zh.md"):
        assert docs.block(path, "comparison") in (survey.COMPARISON_NOT_RUN, "横向比较尚未运行")
    everything(toys)
    monkeypatch.setattr(side_by_side, "MAIN", ["SFT", "fast", "second"])
    monkeypatch.setattr(survey, "ARMS", {name: {"arm": {"method": name}} for name in ARMS})
    collected = side_by_side.gathered()[1]
    header, *body = rows = side_by_side.short_rows(collected)
    assert header[:5] == ["arm", "rank", "gold, clean", "gold, noisy labels", "gold, little data"]
    place = side_by_side.places(side_by_side.of_seeds(collected["clean"], range(4)))
    assert [(row[0], row[1]) for row in body] == [(name, place[name]) for name in ("second", "fast", "SFT")]
    for row, column in itertools.product(body, (2, 3, 4)):
        title = header[column].removeprefix("gold, ")
        gold = [collected[title][row[0]][seed]["eval/gold"] for seed in range(4)]
        assert float(row[column].split()[0]) == pytest.approx(fmean(gold), abs=0.006)
    english, chinese = (docs.block(path, "comparison") for path in ("README.md", "README.zh.md"))
    assert all(text in english for text in ("| [second](docs/second.md) |", "\n| SFT | ", "Seeds 0, 1, 2, 3"))
    assert "| 做法 | 名次 | gold，标注正常 |" in chinese and "种子：0, 1, 2, 3" in chinese
    assert len(english.splitlines()) == len(rows) + 3


def test_arm_has_two_colours_or_none():
    arms = [name for names in data.FAMILIES.values() for name in names]
    assert sorted(arms) == sorted([*data.UNTRAINED, *(data.LABELS.get(name, name) for name in data.ARMS),
                                   *data.RECIPES])
    assert len(data.FAMILIES) <= 1 + len(figures.COLOURS) and set(data.MAIN) < set(arms)


def test_figure_cannot_be_drawn(toys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    everything(toys)
    monkeypatch.setattr(figures, "draw_rows", DRAW_ROWS)
    assert side_by_side.draw().stat().st_size > 10000


def test_page_is_not_the_report_or_stands_for_runs_that_are_not_there(toys):
    assert side_by_side.block() == "Not run yet: `python -m referee comparison`."
    assert side_by_side.tuning_block() == "Not tuned yet: `python -m referee comparison --tune`."
    everything(toys)
    Path("docs").mkdir()
    page = Path("docs/comparison.md")
    lines = ["# x", docs.BEGIN, docs.END, "", *docs.MARKS["tuning"], ""]
    page.write_text("\n".join(lines), encoding="utf-8")
    docs.write(page)
    text = page.read_text(encoding="utf-8")
    assert "### Clean" in text and "### Who beats whom" in text and "**fast, little data**" in text
    assert text.count("settings fit the time") == 6


def test_command_line_of_the_comparison(toys, monkeypatch, capsys):
    monkeypatch.setattr(command_line.sys, "argv", ["x"])
    command_line.main(["comparison", "--tune", "--quiet", "True"])
    assert "settings fit the time" in capsys.readouterr().out
    command_line.main(["comparison", "--quiet", "True"])
    assert "who beats whom" in capsys.readouterr().out
    ran = len(toys.calls)
    command_line.main(["comparison", "--report"])
    command_line.main(["comparison", "--tune", "--report"])
    assert len(toys.calls) == ran
    with pytest.raises(UserError, match="there are: .*comparison"):
        command_line.main(["nothing"])


def test_larger_model_runs_other_settings_situations_or_arms(toys, capsys, monkeypatch):
    everything(toys)
    toys.calls.clear()
    monkeypatch.setattr(comparison, "MAIN", ["SFT", "slow", "fast", "big"])
    comparison.run(harness.Config(quiet=True, layers=3), range(2))
    assert {(c.layers, c.seed, c.label_noise) for c in toys.calls} == {(3, 0, 0), (3, 1, 0)}
    assert len(toys.calls) == 2 * 3          # no recipe, none but main arms
    assert Path("results/comparison@layers=3.json").exists()
    (rows, text), = [(rows, text) for heading, rows, text in side_by_side.parts()
                     if heading == "a larger model"]
    assert rows[0][-2:] == ["gold, one layer", "gold, three layers"] and len(rows) == 1 + 3
    assert "1.1 million weights, 2 seeds" in text
    command_line.main(["comparison", "--report", "--layers=3"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Flags: layers=3" in text and "noisy" not in text and "Seeds 0, 1." in text
