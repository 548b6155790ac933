"""Tuning: which settings run, which is chosen, what is printed and kept. On a method that trains nothing."""
import itertools
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import harness
from conftest import ROOT
from harness import UserError
from referee import __main__ as command_line
from referee import arms, docs, figures, statistics, tuning

RESULTS = Path("results/tuning/toy.json")
GRID = {"DT": dict(arm={"objective": "dt"}, grid={"lr": (0.002, 0.004), "beta": (1.0, 2.0)}),
        "other": dict(method="other", settings=[{}, {"lr": 0.5}])}


@dataclass
class Config(harness.Config):
    LR: ClassVar = {"tiny": 0.002, "real": 1e-6}
    objective: str = "sft"
    beta: float = 1.0


@dataclass
class OtherConfig(harness.Config):
    pass


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A method whose final metrics are toy.outcome(config); toy.calls lists what ran, toy.die_at kills it."""
    monkeypatch.chdir(tmp_path)
    module, other, experiments = types.ModuleType("toy"), types.ModuleType("other"), types.ModuleType("e")
    module.calls, module.die_at, module.sft_fluency = [], None, 0.95
    module.Config, other.Config, experiments.TUNING = Config, OtherConfig, dict(GRID)
    module.experiments = experiments

    def outcome(config):
        """The judge likes lr 0.004 and beta 2; gold has the opposite taste. Seeds differ."""
        wins = 0.5 + 50 * config.lr * getattr(config, "beta", 1.0) + 0.01 * (config.seed - 101)
        return {"eval/win_rate_judge": wins, "eval/gold": -wins, "eval/fluency": 0.93, "eval/judge": 2 * wins,
                "eval/kl": 1.0}

    def train(config):
        if len(module.calls) == module.die_at:
            raise KeyboardInterrupt
        module.calls.append(config)
        return module.outcome(config) | {"cpu_seconds": 4.0, "seconds": 5.0, "out": config.out,
                                         "trace": [{"step": 0, "eval/fluency": module.sft_fluency}]}

    module.outcome, module.train, other.train = outcome, train, lambda config: train(config)
    experiments.EXPERIMENTS = {"x": dict(question="?", claims=[], arms={"plain": {}})}
    for name, m in {"toy": module, "other": other, "experiments.toy": experiments}.items():
        monkeypatch.setitem(sys.modules, name, m)
    for name, stand_in in {"launch": lambda train, config, known: train(config),
                           "load_task": lambda config: None, "fingerprint": lambda config: "b"}.items():
        monkeypatch.setattr(harness, name, stand_in)
    for holder in (arms, docs):
        monkeypatch.setattr(holder, "method_names", lambda: ["toy"])
    monkeypatch.setattr(figures, "draw", lambda *args: None)
    return module


def tune(toy, **flags):
    """What ran, as (type of the Config, lr, beta, seed)."""
    toy.calls.clear()
    tuning.tune("toy", toy.Config(**flags))
    return [(type(c), c.lr, getattr(c, "beta", None), c.seed) for c in toy.calls]


def stored(path=RESULTS):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- what is tried

def test_settings_are_the_product_of_the_grid_over_the_arm_or_a_list(toy):
    found = tuning.experiments_to_tune("toy")
    assert {title: experiment["question"] for title, experiment in found.items()} == {
        "DT": "DT (objective dt)", "other": "other (method other)"}
    dt = {"objective": "dt"}
    assert found["DT"]["arms"] == {f"lr {lr}, beta {beta}": dt | {"lr": lr, "beta": float(beta)}
                                   for lr in (0.002, 0.004) for beta in (1, 2)}
    other = {"method": "other"}
    assert found["other"]["arms"] == {"as it is": other, "lr 0.5": other | {"lr": 0.5}}
    toy.experiments.TUNING = {"over": dict(arm={"lr": 0.1, "beta": 3.0}, grid={"lr": (0.2,)})}
    assert tuning.experiments_to_tune("toy")["over"]["arms"] == {"lr 0.2": {"lr": 0.2, "beta": 3.0}}
    toy.experiments.TUNING = {"plain": dict(grid={"objective": ("sft", "dt"), "eval_every": (3,)})}
    assert tuning.experiments_to_tune("toy")["plain"] == dict(
        question="plain", evaluation=tuning.EVALUATION,
        arms={f"objective {o}, eval_every 3": {"objective": o, "eval_every": 3} for o in ("sft", "dt")})


@pytest.mark.parametrize("entry", [{}, dict(arm={"beta": 1.0}), dict(grid={"beta": (1.0,)}, settings=[{}])])
def test_neither_grid_nor_settings_or_both_is_a_user_error(toy, entry):
    toy.experiments.TUNING = {"DT": entry}
    with pytest.raises(UserError, match="TUNING, DT: give either grid or settings"):
        tuning.experiments_to_tune("toy")


def test_method_without_tuning_is_a_user_error(toy):
    del toy.experiments.TUNING
    for call in (lambda: tune(toy), lambda: tuning.report("toy"), lambda: tuning.tuning_block("toy")):
        with pytest.raises(UserError, match="experiments/toy.py has no TUNING"):
            call()


# ---------------------------------------------------------------------------------------------- what is run

def test_each_setting_runs_once_on_each_validation_seed_and_in_a_file_of_its_own(toy, capsys):
    ran = tune(toy, seeds=2)
    tried = [(Config, lr, beta) for lr in (0.002, 0.004) for beta in (1.0, 2.0)]
    tried += [(OtherConfig, lr, None) for lr in (5e-4, 0.5)]
    assert ran == [(*setting, seed) for seed in (100, 101, 102) for setting in tried]
    assert {(c.eval_prompts, c.eval_samples) for c in toy.calls} == {(128, 8)}
    assert {c.objective for c in toy.calls if isinstance(c, Config)} == {"dt"}
    assert all(Path(c.out).is_relative_to("runs/tuning/toy") for c in toy.calls)
    assert stored()["seeds"] == [100, 101, 102] and len(stored()["runs"]) == 18
    assert [path.name for path in Path("results").rglob("*.json")] == ["toy.json"]
    assert "toy: 18 runs to do" in capsys.readouterr().out
    before = RESULTS.read_bytes()
    assert tune(toy) == [] and RESULTS.read_bytes() == before


@pytest.mark.parametrize("die_at", [0, 7, 17])
def test_interrupted_tuning_goes_on(toy, die_at):
    tune(toy)
    expected = RESULTS.read_bytes()
    RESULTS.unlink()
    toy.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        tune(toy)
    assert len(stored()["runs"]) == die_at
    toy.die_at = None
    assert len(tune(toy)) == 18 - die_at and RESULTS.read_bytes() == expected


def test_wider_grid_runs_only_what_is_new_and_a_smaller_one_loses_nothing(toy, capsys):
    tune(toy)
    toy.experiments.TUNING = GRID | {"DT": GRID["DT"] | {"grid": {"lr": (0.004, 0.008), "beta": (1.0,)}}}
    assert tune(toy) == [(Config, 0.008, 1.0, seed) for seed in (100, 101, 102)]
    assert len(stored()["runs"]) == 21
    assert "12 stored runs shown, 9 kept but not shown (9 of other arms)" in capsys.readouterr().out


def test_users_evaluation_goes_before_that_of_tuning(toy):
    assert len(tune(toy, eval_prompts=64)) == 18
    assert {(c.eval_prompts, c.eval_samples) for c in toy.calls} == {(64, 8)}
    assert [path.name for path in RESULTS.parent.glob("*.json")] == ["toy@eval_prompts=64.json"]


def test_processes_share_the_settings(tmp_path):
    (tmp_path / "tuned.py").write_text('''
import os, sys, time
from dataclasses import dataclass
import harness

@dataclass
class Config(harness.Config):
    beta: float = 0.1

def train(config):
    with open("calls", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {config.beta} {config.seed}\\n")
    time.sleep(0.5)
    return {"eval/win_rate_judge": config.beta, "eval/fluency": 1.0, "eval/gold": 0.0, "out": config.out,
            "trace": [{"step": 0, "eval/fluency": 1.0}]}

TUNING = {"beta": dict(grid={"beta": (0.1, 0.2)})}
EXPERIMENTS = {}
sys.modules["experiments.tuned"] = sys.modules[__name__]
harness.launch = lambda train, config, known: train(config)
harness.load_task = lambda config: None
harness.fingerprint = lambda config: f"build{config.seed}"
''', encoding="utf-8")
    (tmp_path / "both.py").write_text('''
import tuned
from referee import tuning
if __name__ == "__main__":
    tuning.tune("tuned", tuned.Config(jobs=2))
''', encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
                                "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "both.py"], cwd=tmp_path, env=environment, timeout=300, text=True,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text(encoding="utf-8").splitlines()]
    expected = [[beta, seed] for beta in ("0.1", "0.2") for seed in ("100", "101", "102")]
    assert sorted(call[1:] for call in calls) == expected
    assert len({pid for pid, *_ in calls}) == 2 and "Chosen: beta 0.2. " in done.stdout


# -------------------------------------------------------------------------------------------- what is chosen

def runs(*rows, sft=0.95):
    """{setting: {seed: run}} of rows (name, win rate, fluency), with the same spread over seeds."""
    return {name: {seed: {"eval/win_rate_judge": win + e, "eval/fluency": fluency - e, "eval/gold": -win,
                          "trace": [{"eval/fluency": sft + e}]}
                   for seed, e in zip(tuning.SEEDS, (-0.01, 0.0, 0.01))} for name, win, fluency in rows}


@pytest.mark.parametrize("rows, expected, why", [
    ([("a", 0.6, 0.94), ("b", 0.7, 0.93)], "b", "Chosen: b. 2 of 2 settings have"),
    ([("a", 0.6, 0.94), ("b", 0.9, 0.91)], "a", "Chosen: a. 1 of 2 settings have"),
    ([("a", 0.6, 0.94), ("b", 0.9, 0.92)], "b", "Chosen: b. 2 of 2 settings have"),
    ([("a", 0.6, 0.91), ("b", 0.9, 0.5)], "a", "No setting has")])
def test_highest_win_rate_of_the_fluent_or_else_the_highest_fluency(rows, expected, why):
    why += " a fluency of at least 0.920."
    if why.startswith("No"):
        why += " So the one with the highest fluency is chosen: a."
    for order in (rows, rows[::-1]):
        assert tuning.choose("toy, DT", runs(*order)) == (expected, why)


def test_fluency_is_compared_with_sfts_on_the_same_seeds():
    rows = [("a", 0.6, 0.8), ("b", 0.9, 0.75)]
    assert tuning.choose("", runs(*rows, sft=0.8))[0] == "a"
    assert tuning.choose("", runs(*rows, sft=0.78))[0] == "b"


def test_nothing_is_chosen_while_runs_are_missing(toy, capsys):
    found = runs(("a", 0.6, 0.94), ("b", 0.7, 0.93))
    del found["a"][101]
    assert tuning.choose("", found) == (None, "Nothing is chosen yet. Runs missing: 1 of 6.")
    assert tuning.choose("", {"a": {}, "b": {}}) == (None, "Nothing is chosen yet. Runs missing: 6 of 6.")
    toy.die_at = 8
    with pytest.raises(KeyboardInterrupt):
        tune(toy)
    tuning.report("toy")
    out = capsys.readouterr().out
    assert "Nothing is chosen yet. Runs missing: 6 of 12." in out and "(chosen)" not in out
    assert "standard deviation" not in out
    assert "Nothing is chosen yet. Runs missing: 4 of 6." in tuning.tuning_block("toy")


@pytest.mark.parametrize("metric", ["eval/win_rate_judge", "eval/fluency"])
def test_run_without_a_judge_or_fluency_is_one_line(toy, metric):
    plain = toy.outcome
    toy.outcome = lambda config: {k: v for k, v in plain(config).items() if k != metric}
    with pytest.raises(UserError, match="^toy, DT: no judge .*: leave out --data and --reward$"):
        tune(toy)
    assert len(stored()["runs"]) == 18


@pytest.mark.parametrize("flags", [{"data": "pairs.jsonl"}, {"reward": "none"}, {"reward": "someone/model"}])
def test_flags_that_leave_no_judge_are_refused_before_anything_runs(toy, flags):
    with pytest.raises(UserError, match="^toy with these flags: no judge"):
        tune(toy, **flags)
    assert toy.calls == [] and not Path("results").exists()
    assert len(tune(toy, reward="gold")) == 18                       # the judge is there all the same


# ------------------------------------------------------------------------------------- what is printed, kept

def rows_of(text):
    """The cells of the Markdown tables, line by line."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")]


def test_table_has_every_setting_marks_the_chosen_and_shows_gold_last(toy):
    tune(toy)
    table = rows_of(tuning.tuning_block("toy"))
    assert table[0] == ["setting", "win rate by judge", "judge", "fluency", "KL, nats", "CPU s",
                        "gold (not used)"]
    assert [row[0] for row in table[2:]] == [
        "lr 0.002, beta 1", "lr 0.002, beta 2", "lr 0.004, beta 1", "lr 0.004, beta 2 (chosen)", "setting",
        "---", "as it is", "lr 0.5 (chosen)"]
    half = 4.302653 * 0.01 / 3 ** 0.5
    assert table[5] == ["lr 0.004, beta 2 (chosen)", f"0.900 ±{half:.3f}", "1.80 ±0.05", "0.930 ±0.000",
                        "1.00 ±0.00", "4.00 ±0.00", f"-0.900 ±{half:.3f}"]


def test_cpu_seconds_are_shown_if_stored(toy):
    tune(toy)
    results = stored()
    for run in results["runs"]:
        del run["cpu_seconds"]
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    assert "CPU s" not in tuning.tuning_block("toy") and "(chosen)" in tuning.tuning_block("toy")


def test_gold_changes_no_choice(toy):
    tune(toy)
    results = stored()
    before = rows_of(tuning.tuning_block("toy"))
    for run in results["runs"]:
        run["eval/gold"] = hash(run["key"]) % 100
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    after = rows_of(tuning.tuning_block("toy"))
    assert [row[:-1] for row in after] == [row[:-1] for row in before] and after != before


def test_report_prints_what_the_block_has_within_110_columns_and_runs_nothing(toy, capsys):
    tune(toy)
    toy.calls.clear(), capsys.readouterr()
    command_line.main(["toy", "--tune", "--report"])
    out = capsys.readouterr().out
    assert toy.calls == [] and max(map(len, out.splitlines())) <= 110
    assert out.startswith("results/tuning/toy.json: 18 stored runs shown, 0 kept but not shown\n\n"
                          "DT (objective dt)\nsetting ")
    words = out.split()
    for line in tuning.tuning_block("toy").splitlines():
        if not line.startswith("| --"):
            found = [word.strip("*") for word in line.split() if word != "|"]
            assert all(word in words for word in found), line
    command_line.main(["toy", "--report", "--tune"])
    assert capsys.readouterr().out == out


def test_command_line_tunes_with_the_methods_flags(toy, capsys):
    command_line.main(["toy", "--tune", "--label_noise", "0.1"])
    assert {c.label_noise for c in toy.calls} == {0.1} and len(toy.calls) == 18
    out = capsys.readouterr().out
    assert "results/tuning/toy@label_noise=0.1.json: 18 stored" in out and "Flags: label_noise=0.1." in out
    with pytest.raises(UserError, match="^results/tuning/toy.json does not exist yet: "
                                        "python -m referee toy --tune makes it$"):
        command_line.main(["toy", "--tune", "--report"])


def test_chosen_setting_may_become_the_default(toy, capsys):
    """The runs stay those of their settings, and the block stays as it is."""
    tune(toy)
    before, block = stored(), tuning.tuning_block("toy")

    @dataclass
    class Tuned(Config):
        LR: ClassVar = {"tiny": 0.004, "real": 1e-6}
        beta: float = 2.0

    toy.Config = Tuned
    assert tuning.tuning_block("toy") == block and tune(toy) == [] and stored() == before
    toy.Config = dataclass(type("Longer", (Config,), {"EPOCHS": {"tiny": 3.0, "real": 1.0}}))
    assert len(tune(toy)) == 12 and {c.epochs for c in toy.calls} == {3.0}       # no setting says epochs
    assert len(stored()["runs"]) == 30


# ----------------------------------------------------------------------------------------------------- power

def gold(*rows):
    return [dict(zip(tuning.SEEDS, ({"eval/gold": v} for v in row))) for row in rows]


def test_power_of_two_settings_by_hand():
    # Differences 0.2, 0.1, 0.0: deviation 0.1 with 2 degrees of freedom, so that a size of 1 needs 10 seeds.
    assert tuning.power(gold([0.5, 0.5, 0.5], [0.3, 0.4, 0.5])) == (
        "Paired gold differences between chosen settings have a standard deviation of 0.100 (d.f. 2); "
        "about 10 seeds find a difference of 0.1 with 80% power.")


def test_pooled_deviation_is_that_of_the_residuals_of_settings_by_seeds():
    table = np.random.default_rng(0).normal(size=(5, 3)) * 0.1 + np.array([3.0, -2.0, 7.0])
    pairs = [np.var(a - b, ddof=1) for a, b in itertools.combinations(table, 2)]
    residuals = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    deviation = np.mean(pairs) ** 0.5
    assert deviation == pytest.approx((2 * (residuals ** 2).sum() / (4 * 2)) ** 0.5)
    assert f"of {deviation:.3f} (d.f. 8); about {statistics.seeds_needed(0.1, deviation)} seeds" in (
        tuning.power(gold(*table.tolist())))


def test_power_needs_two_settings_that_have_gold_and_says_over_1000():
    assert tuning.power([]) == tuning.power(gold([1, 2, 3])) == ""
    assert tuning.power(gold([1, 2, 3], [1, None, 3])) == ""
    assert "; over 1000 seeds find" in tuning.power(gold([1, 2, 3], [1, 9, -3]))


def test_power_compares_the_chosen_settings_of_the_titles_each_once(toy, capsys):
    tune(toy)
    line = "Paired gold differences between chosen settings have a standard deviation of 0.000 (d.f. 2)"
    assert line in capsys.readouterr().out and line in tuning.tuning_block("toy")
    toy.experiments.TUNING = GRID | {"DT again": GRID["DT"]}          # chooses the same runs as DT
    assert line in tuning.tuning_block("toy")
    toy.experiments.TUNING = {"DT": GRID["DT"], "DT again": GRID["DT"]}
    assert "standard deviation" not in tuning.tuning_block("toy")


# ----------------------------------------------------------------------------------------------------- pages

def page(name, text):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


BEGIN, END = docs.MARKS["tuning"]


def test_docs_writes_the_tables_between_their_marks(toy, capsys):
    assert (BEGIN, END) == ("<!-- tuning:begin -->", "<!-- tuning:end -->")
    text = f"# Title\n{docs.BEGIN}\nold\n{docs.END}\nbetween\n{BEGIN}\nolder\n{END}\nthe end\n"
    path = page("docs/toy.md", text)
    command_line.main(["--docs"])
    written = path.read_text(encoding="utf-8")
    assert f"between\n{BEGIN}\nNot tuned yet: `python -m referee toy --tune`.\n{END}\nthe end\n" in written
    assert "\nold\n" not in written and "\nolder\n" not in written
    tune(toy)
    command_line.main(["--docs"])
    written = path.read_text(encoding="utf-8")
    assert f"between\n{BEGIN}\n{tuning.tuning_block('toy')}\n{END}\nthe end\n" in written
    assert docs.split(path, "tuning")[1] == docs.block(path, "tuning").split("\n")
    assert docs.split(path)[1] == ["Not run yet: `python -m referee toy --seeds 10`."]
    assert "written: docs/toy.md" in capsys.readouterr().out


def test_page_may_have_either_kind_of_marks_or_none(toy):
    path = page("docs/toy.md", f"{BEGIN}\n{END}")
    page("docs/none.md", f"the marks `{BEGIN}` in a sentence are none")
    assert docs.pages() == [path] and docs.kinds(path) == ["tuning"]
    docs.write(path)
    assert path.read_text(encoding="utf-8").startswith(f"{BEGIN}\nNot tuned yet")
    path.write_text(f"{docs.BEGIN}\n{docs.END}", encoding="utf-8")
    docs.write(path)
    assert docs.kinds(path) == ["results"] and "tuned" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name, text, said", [
    ("docs/toy.md", BEGIN, f"docs/toy.md lacks the lines {BEGIN} and {END}"),
    ("docs/toy.md", f"{END}\n{BEGIN}", "lacks the lines"),
    ("README.md", f"{BEGIN}\n{END}", f"README.md is not the page of a method: .* the line {BEGIN}"),
    ("docs/data.md", f"{BEGIN}\n{END}", "docs/data.md is not the page of a method")])
def test_marks_of_tuning_that_are_wrong_are_user_errors(toy, name, text, said):
    path = page(name, text)
    with pytest.raises(UserError, match=said):
        docs.write(path)
    assert path.read_text(encoding="utf-8") == text
