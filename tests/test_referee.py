"""The referee: intervals, verdicts, best of n, resumable runs, tables, figures, blocks in Markdown files.

On a method that trains nothing; at the end, on the committed results.
"""
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

import harness
from conftest import ROOT, cases, method_names
from harness import UserError
from referee import __main__ as command_line
from referee import arms as planning
from referee import docs, figures, runs, statistics, store, tables
from tasks import build

DRAW = figures.draw
FINGERPRINT = harness.fingerprint
STORED = [name for name in method_names() if (ROOT / "results" / f"{name}.json").exists()]


def python(*arguments, cwd, first=None):
    """A finished process, started in cwd, that finds the project's modules as an installed one does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(first or cwd), str(ROOT)]),
                                "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, timeout=300,
                          text=True, encoding="utf-8", env=environment)


# --------------------------------------------------------------------------------------------- statistics

def draws(n):
    rng = random.Random(n)
    return [rng.gauss(3, 2) for _ in range(n)]


@pytest.mark.parametrize("df, level, expected", [
    (1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.95, 3.1824), (4, 0.95, 2.7764), (5, 0.95, 2.5706),
    (9, 0.95, 2.2622), (30, 0.95, 2.0423), (120, 0.95, 1.9799), (4, 0.99, 4.6041), (10, 0.99, 3.1693)])
def test_t_interval_against_printed_tables_of_the_quantile(df, level, expected):
    values = draws(df + 1)
    assert statistics.t_interval(values, level)[1] / stats.sem(values) == pytest.approx(expected, abs=1e-4)


def test_t_interval_against_scipys_own():
    for df, level in itertools.product(range(1, 61), (0.5, 0.9, 0.95, 0.975, 0.99, 1 - 0.05 / 7)):
        values = draws(df + 1)
        mean, half = statistics.t_interval(values, level)
        low, high = stats.t.interval(level, df, loc=mean, scale=stats.sem(values))
        assert mean == pytest.approx(np.mean(values), rel=1e-9)
        assert half == pytest.approx((high - low) / 2, rel=1e-9)


def test_t_interval_by_hand():
    # Mean 2, sample variance 1, so half = 4.3027 / sqrt(3).
    assert statistics.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)), abs=1e-5)
    assert statistics.t_interval([1.5]) == (1.5, math.inf)


def test_t_interval_covers_the_mean_95_times_in_100():
    rng = random.Random(0)
    hits = 0
    for _ in range(4000):
        mean, half = statistics.t_interval([rng.gauss(3, 2) for _ in range(5)])
        hits += abs(mean - 3) <= half
    assert 0.94 < hits / 4000 < 0.96                                 # the normal quantile would give 0.88


def arms(**columns):
    """{arm: {seed: run}} with one metric, m."""
    return {name: {seed: {"m": v, "trace": [{"m": 0.0}, {"m": v}]} for seed, v in enumerate(values)}
            for name, values in columns.items()}


def word(arms, *holds, metric="m"):
    return statistics.verdict({"metric": metric, "holds": holds}, arms)[0]


UP, DOWN, WIDE = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [3.0, -2.0, 0.5]


@pytest.mark.parametrize("op, values, expected", [
    (">", UP, "reproduced"), (">", DOWN, "not reproduced"), (">", WIDE, "inconclusive"),
    ("<", DOWN, "reproduced"), ("<", UP, "not reproduced"), ("<", WIDE, "inconclusive"),
    (">", [1.0], "inconclusive"), ("<", [1.0], "inconclusive"),     # one seed decides nothing
    (">", [0.0, 0.0, 0.0], "not reproduced"), ("<", [0.0, 0.0, 0.0], "not reproduced"),     # strictly
    (">", [None, 1.0, 1.0], "not measured")])
def test_verdict_of_one_comparison(op, values, expected):
    assert word(arms(a=values, b=[0.0] * len(values)), ("a", op, "b")) == expected
    assert word(arms(a=values), ("a", op, 0.0)) == expected


def test_boundary_is_open_when_the_interval_only_touches_zero_on_the_claimed_side(monkeypatch):
    monkeypatch.setattr(statistics, "t_interval", lambda values, level=0.95: (1.0, 1.0))        # [0, 2]
    assert word(arms(a=UP), ("a", ">", 0.0)) == "inconclusive"
    assert word(arms(a=UP), ("a", "<", 0.0)) == "not reproduced"                       # none of it is below 0


def test_conjunctions():
    table = arms(up=UP, down=DOWN, wide=WIDE, zero=[0.0] * 3)
    up, down, wide = (("up", ">", "zero"), ("down", ">", "zero"), ("wide", ">", "zero"))
    assert word(table, up, up) == "reproduced"
    assert word(table, up, wide) == "inconclusive"
    assert word(table, up, wide, down) == "not reproduced"
    assert word(table, up, ("absent", ">", "zero")) == "not run"
    weakest = tables.measured(*statistics.verdict({"metric": "m", "holds": [up, wide]}, table), 3)
    assert weakest.startswith("wide - zero: +0.50 ±") and weakest.endswith("(weakest of 2)")


def test_excluding_one_of_many_needs_more_evidence_than_excluding_the_only_one():
    values = [-1.5, -0.7, -1.1]                                     # -1.1 ± 0.99 at 95%, ± 2.04 at 1 - 0.05/4
    table = arms(a=values, up=UP)
    assert word(table, ("a", ">", 0.0)) == "not reproduced"
    assert word(table, ("a", ">", 0.0), *[("up", ">", 0.0)] * 3) == "inconclusive"
    # Accepting a conjunction needs no correction: the same evidence, mirrored, is enough beside three others.
    assert word(table, ("a", "<", 0.0), *[("up", ">", 0.0)] * 3) == "reproduced"


def test_false_verdicts_are_rare_when_the_claim_is_on_its_boundary():
    rng, words = random.Random(1), []
    for _ in range(2000):
        table = arms(**{name: [rng.gauss(0, 1) for _ in range(5)] for name in "abc"})
        words.append(word(table, *[(name, ">", 0.0) for name in "abc"]))
    assert words.count("reproduced") / 2000 < 0.025
    assert 0.012 < words.count("not reproduced") / 2000 < 0.036      # 2.5%, and 7.5% without Bonferroni


def test_pairing_finds_a_small_difference_under_a_large_seed_effect():
    seed_effect = [0.0, 10.0, -7.0, 4.0, 25.0]
    table = arms(a=[e + 0.1 + 0.01 * i for i, e in enumerate(seed_effect)], b=seed_effect)
    assert word(table, ("a", ">", "b")) == "reproduced"
    table["b"] = {seed: table["b"][(seed + 1) % 5] for seed in range(5)}               # the pairing destroyed
    assert word(table, ("a", ">", "b")) == "inconclusive"


def test_only_common_seeds_count():
    table = arms(a=UP, b=[0.0, 0.0, 0.0])
    del table["a"][0], table["b"][2]
    comparison = statistics.verdict({"metric": "m", "holds": [("a", ">", "b")]}, table)[1][0]
    assert comparison.n == 1 and comparison.mean == pytest.approx(1.1)


def test_change_metric_is_last_minus_first_trace_entry():
    table = {"a": {s: {"m": 5.0, "trace": [{"m": 7.0 + s}, {"m": 99.0}, {"m": 5.0}]} for s in range(3)}}
    comparison = statistics.verdict({"metric": "m:change", "holds": [("a", "<", 0.0)]}, table)[1][0]
    assert comparison.mean == pytest.approx(-3.0)                    # of -2, -3, -4


# --------------------------------------------------------------------------------------------- best of n

def test_second_half_is_the_last_entry_minus_the_one_half_way():
    entries = [{"step": step, "m": value} for step, value in ((0, 5.0), (4, 1.0), (6, 9.0), (8, 4.0))]
    assert statistics.value({"trace": entries}, "m:second_half") == 3.0
    assert statistics.value({"trace": entries[2:]}, "m:second_half") is None         # nobody looked at step 4


def test_value_where_another_metric_first_reaches_a_level():
    points = [(0.0, 0.0), (2.0, 1.0), (4.0, 5.0), (3.0, 9.0), (6.0, -3.0)]                # KL falls back once
    run = {"trace": [{"kl": kl, "gold": gold} for kl, gold in points]}
    for level, expected in ((0.0, 0.0), (1.0, 0.5), (2.0, 1.0), (3.5, 4.0), (5.0, 1.0), (6.0, -3.0)):
        assert statistics.when_reached(run, "kl", level, "gold") == pytest.approx(expected)
    assert statistics.when_reached(run, "kl", 6.1, "gold") is None
    assert statistics.when_reached({"trace": run["trace"][:1]}, "kl", 0.0, "gold") is None


def test_comparison_at_equal_kl_takes_the_other_arm_from_its_trace():
    trace = [{"kl": 0.0, "m": 0.0}, {"kl": 10.0, "m": 10.0}]
    table = {"a": {s: {"m": 3.0 + e, "kl": 2.0} for s, e in enumerate((0.0, 0.1, -0.1))},
             "b": {s: {"m": 10.0, "kl": 10.0, "trace": trace} for s in range(3)}}
    claim = {"metric": "m", "at": "kl", "holds": [("a", ">", "b")]}
    said, (comparison,) = statistics.verdict(claim, table)
    assert said == "reproduced" and comparison.mean == pytest.approx(1.0)                # 3 against 2, not 10
    assert statistics.verdict(claim | {"at": None}, table)[0] == "not reproduced"
    table["a"][1]["kl"] = 11.0
    assert statistics.verdict(claim, table)[0] == "not measured"


def test_offset_moves_the_boundary_not_the_number_shown():
    table = arms(a=[0.05, 0.06, 0.04], b=[0.0] * 3)
    assert word(table, ("a", "<", "b", 0.1), ("a", ">", "b", -0.1)) == "reproduced"         # equal within 0.1
    assert word(table, ("a", "<", "b", 0.01)) == "not reproduced"
    said, (comparison,) = statistics.verdict({"metric": "m", "holds": [("a", "<", "b", 0.1)]}, table)
    assert comparison.mean == pytest.approx(0.05) and comparison.text == "a - b (against 0.1)"


def test_spread_of_a_group_is_the_standard_deviation_over_its_arms():
    table = arms(a=[0.0, 0.0, 0.0], b=[2.0, 2.1, 1.9], c=[1.0] * 3, d=[1.1] * 3)
    groups = {"wide": ["a", "b"], "narrow": ["c", "d"]}
    claim = {"metric": "m", "holds": [("wide", ">", "narrow")]}
    said, (comparison,) = statistics.verdict(claim, table, groups)
    assert said == "reproduced" and comparison.mean == pytest.approx((2.0 - 0.1) / 2 ** 0.5)
    del table["b"][0]
    assert statistics.verdict(claim, table, groups)[1][0].n == 2                    # seeds that all arms have
    assert statistics.verdict(claim, {k: v for k, v in table.items() if k != "a"}, groups)[0] == "not run"


def test_an_experiment_may_choose_its_columns():
    table = {"a": {0: {"eval/gold": 1.0, "mine": 2.0}}}
    assert tables.arm_rows(table, {"mine": "my own"}) == [["arm", "my own"], ["a", "2.00"]]
    assert tables.arm_rows(table)[0] == ["arm", "gold"]


@pytest.mark.parametrize("distinct", [True, False])
def test_best_of_n_is_the_mean_over_all_subsets(distinct):
    rng = np.random.default_rng(0)
    tied, order = rng.integers(0, 3, (3, 7)).astype(float), np.tile(np.arange(7.0), (3, 1))
    proxy = rng.permuted(order, axis=1) if distinct else tied
    gold = rng.normal(size=(3, 7))
    for n in range(1, 8):
        picked = []
        for p, g in zip(proxy, gold):
            golds = []
            for subset in map(list, itertools.combinations(range(7), n)):
                golds.append(g[subset][p[subset] == p[subset].max()].mean())               # ties: a fair draw
            picked.append(np.mean(golds))
        tops = [np.mean([max(p[list(s)]) for s in itertools.combinations(range(7), n)]) for p in proxy]
        mean_gold, mean_proxy, _ = statistics.best_of_n(proxy, gold, n)
        assert mean_gold == pytest.approx(np.mean(picked), abs=1e-12)
        assert mean_proxy == pytest.approx(np.mean(tops), abs=1e-12)


def test_best_of_n_shares_ties_fairly_and_ignores_their_order():
    proxy, gold = np.zeros((1, 4)), np.array([[1.0, 2.0, 3.0, 6.0]])
    for n in (1, 2, 4):
        assert statistics.best_of_n(proxy, gold, n)[0] == pytest.approx(3.0)
    torch = pytest.importorskip("torch")
    proxy, gold = [[0.0, 1.0, 1.0, 0.5]], [[0.0, 4.0, 8.0, 1.0]]
    assert statistics.best_of_n(torch.tensor(proxy), torch.tensor(gold), 4)[0] == pytest.approx(6.0)


def test_best_of_n_kl():
    kl = {n: statistics.best_of_n(np.eye(64)[:1], np.eye(64)[:1], n)[2] for n in (1, 2, 16)}
    assert kl == pytest.approx({1: 0.0, 2: 0.1931471805599453, 16: 1.8350887222397811}, abs=1e-15)


def test_best_of_n_fixtures():
    found = cases("bon")
    subset = [c for c in found if c["inputs"]["kind"] == "subset_max"]
    kl = [c for c in found if c["inputs"]["kind"] == "kl"]
    assert subset and kl
    for case in subset:
        rewards = [case["inputs"]["rewards"]]
        for n, expected in zip(case["inputs"]["n"], case["expected"]["expected_max"]):
            found = statistics.best_of_n(rewards, rewards, n)[:2]
            assert found == pytest.approx((expected, expected), abs=1e-12)
    for case in kl:
        for n, expected in zip(case["inputs"]["n"], case["expected"]["kl_bound"]):
            if n <= 128:
                pool = [list(range(n))]
                assert statistics.best_of_n(pool, pool, n)[2] == pytest.approx(expected, abs=1e-12)


# --------------------------------------------------------------------------------------------- runs

@dataclass
class Config:
    LR: ClassVar = 1.0
    seed: int = 0
    seeds: int = 2
    jobs: int = 1
    out: str = "runs/x"
    policy: str = ""
    model: str = "tiny"
    resume: bool = False
    reproduce: bool = False
    device: str = "cpu"
    quiet: bool = False
    lr: float | None = None

    def __post_init__(self):
        if self.lr is None:
            self.lr = self.LR * (1 if self.model == "tiny" else 0.01)
        if self.resume and not self.out:
            raise UserError("--resume needs --out")


@dataclass
class ToyConfig(Config):
    beta: float = 0.1
    epochs: int = 1


@dataclass
class OtherConfig(Config):
    LR: ClassVar = 5.0
    beta: float = 7.0


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A method whose "training" is arithmetic; `toy.calls` lists what ran, `toy.die_at` kills it there.

    toy.build is the fingerprint of the SFT weights of every seed.
    """
    monkeypatch.chdir(tmp_path)
    module, other = types.ModuleType("toy"), types.ModuleType("other")
    module.calls, module.die_at, module.loads, module.build = [], None, [], None
    module.Config, other.Config = ToyConfig, OtherConfig

    def write_json(path, obj):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(obj, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(temporary, path)

    def test_pool(config):
        rng = np.random.default_rng(config.seed)
        gold = rng.normal(size=(5, 16))
        return gold + rng.normal(size=(5, 16)), gold

    def train(config):
        if len(module.calls) == module.die_at:
            raise KeyboardInterrupt
        assert config.quiet and not config.reproduce and not config.resume
        assert not config.policy or (Path(config.policy) / "gold").exists()
        assert not Path(config.out).exists()             # harness.start refuses a directory that is taken
        module.calls.append(config)
        policy = Path(config.policy) / "gold"
        start = float(policy.read_text(encoding="utf-8")) if config.policy else config.seed / 3
        steps = 4 * getattr(config, "epochs", 1)
        trace = [{"step": i, "eval/gold": start + config.beta * i / (i + 1) + 0.002 * config.seed * i,
                  "eval/kl": config.beta * i, "eval/logps/chosen": -20 - i,
                  "eval/logps/rejected": -22 - 3 * i}
                 for i in range(steps + 1)]
        Path(config.out).mkdir(parents=True)
        (Path(config.out) / "gold").write_text(str(trace[-1]["eval/gold"]), encoding="utf-8")
        final = {k: v for k, v in trace[-1].items() if k != "step"}
        return final | {"eval/fluency": float("nan"), "seconds": 12.3456789, "tokens_generated": 123456789,
                        "trace": trace, "out": config.out}

    module.train, other.train = train, lambda config: train(config)
    module.EXPERIMENTS = {
        "strength": dict(
            question="Does gold rise with beta?",
            arms={"SFT": {"epochs": 0}, "beta 0.05": {"beta": 0.05}, "beta 0.1": {}, "beta 1": {"beta": 1.0},
                  "PPO": {"method": "other"}},
            claims=[dict(claim="gold rises above SFT at every beta", source="Fig. 2", paper="(plot only)",
                         metric="eval/gold", holds=[("beta 0.1", ">", "SFT"), ("beta 1", ">", "SFT")]),
                    dict(claim="the log-probability of the chosen answer falls", source="section 4",
                         paper="a|b", metric="eval/logps/chosen:change", holds=[("beta 1", "<", 0.0)])],
            panels=[dict(x="eval/kl", y=["eval/gold"], best_of_n=True, arms=None, title="frontier"),
                    dict(x="step", y=["eval/logps/chosen", "eval/logps/rejected"], arms=["beta 0.1"]),
                    dict(kind="bars", y=["eval/gold"])]),
        "start": dict(
            question="Does a strong start help?",
            arms={"then": {"start": "strong", "beta": 0.2}, "strong": {"beta": 3.0}, "plain": {"beta": 0.1}},
            claims=[dict(claim="less than plain", source="made up", paper="-1", metric="eval/gold",
                         holds=[("then", "<", "plain")]),
                    dict(claim="fluent", source="made up", paper="1", metric="eval/fluency",
                         holds=[("then", ">", "plain")])],
            panels=[dict(kind="bars", y=["eval/gold", "eval/kl"])]),
    }
    for name, m in {"toy": module, "other": other, "experiments.toy": module}.items():
        monkeypatch.setitem(sys.modules, name, m)

    def launch(train, config):
        assert train is {ToyConfig: module, OtherConfig: other}.get(type(config), module).train
        return train(config)

    def load_task(config):
        module.loads.append((config.seed, config.model))

    stand_ins = {"Config": Config, "launch": launch, "write_json": write_json, "test_pool": test_pool,
                 "load_task": load_task, "fingerprint": lambda config: module.build}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(harness, name, stand_in)
    for holder in (planning, docs):
        monkeypatch.setattr(holder, "method_names", lambda: ["toy"])
    monkeypatch.setattr(figures, "draw", lambda *args: None)         # half a second each; one test draws
    return module


RESULTS = Path("results/toy.json")


def in_file(path=RESULTS):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def reproduce(toy, **flags):
    """What ran, as (folder name without its hash, seed)."""
    toy.calls.clear()
    runs.reproduce("toy", ToyConfig(**flags))
    return [(Path(c.out).parent.name.rsplit("-", 1)[0], c.seed) for c in toy.calls]


def test_runs_once_shares_arms_and_repeats_nothing(toy, capsys):
    ran = reproduce(toy)
    # "plain" is "beta 0.1" spelled out; "then" waits for "strong".
    assert [name for name, seed in ran if seed == 0] == ["sft", "beta-0.05", "beta-0.1", "beta-1", "ppo",
                                                         "strong", "then"]
    assert len(ran) == 14 and "14 runs to do, about 8 min" in capsys.readouterr().out
    assert toy.loads == [(0, "tiny"), (1, "tiny")]
    before = RESULTS.read_bytes()
    assert reproduce(toy) == [] and "nothing to run" in capsys.readouterr().out
    assert RESULTS.read_bytes() == before and len(toy.loads) == 2
    assert len(reproduce(toy, seeds=3)) == 7                         # only the new seed
    assert reproduce(toy, seeds=1, device="cuda", resume=True, out="elsewhere") == []    # no other experiment
    assert in_file()["seeds"] == [0, 1, 2]


def test_what_is_stored(toy, tmp_path):
    reproduce(toy)
    results = in_file()
    runs = {(r["arm"], r["seed"]): r for r in results["runs"]}
    assert runs["beta 1", 1]["config"] == {"beta": 1.0} and runs["beta 0.1", 0]["config"] == {}
    assert runs["PPO", 0]["config"] == {"method": "other"} and runs["PPO", 0]["eval/kl"] == 28.0
    assert runs["then", 0]["config"] == {"beta": 0.2, "start": "strong"}
    assert runs["beta 1", 1]["seconds"] == 12.3457 and runs["beta 1", 1]["tokens_generated"] == 123456789
    assert runs["beta 1", 1]["eval/fluency"] is None
    assert [row[0] for row in results["best_of_n"]["0"]] == [1, 2, 4, 8, 16]
    assert set(results["best_of_n"]) == {"0", "1"}
    assert "torch" in results["software"] and str(tmp_path) not in RESULTS.read_text(encoding="utf-8")
    assert "runs/referee" not in RESULTS.read_text(encoding="utf-8")


@pytest.mark.parametrize("die_at", [0, 1, 6, 9, 13])
def test_killed_and_continued_equals_uninterrupted(toy, die_at):
    reproduce(toy)
    expected, png = RESULTS.read_bytes(), RESULTS.with_suffix(".png")
    RESULTS.unlink(), png.unlink(missing_ok=True)
    toy.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        reproduce(toy)
    assert len(in_file()["runs"]) == die_at  # all that finished was saved
    toy.die_at = None
    assert len(reproduce(toy)) == 14 - die_at
    assert RESULTS.read_bytes() == expected


def test_changed_arm_runs_again_alone(toy):
    reproduce(toy)
    toy.EXPERIMENTS["strength"]["arms"]["beta 1"] = {"beta": 2.0}
    assert tables.report("toy")["runs"] and "not run" in docs.method_block("toy")   # stale runs are not shown
    assert reproduce(toy) == [("beta-1", 0), ("beta-1", 1)]
    stored = [r for r in in_file()["runs"] if r["arm"] == "beta 1"]
    assert sorted(r["config"]["beta"] for r in stored) == [1.0, 1.0, 2.0, 2.0]       # the old runs stay


def test_changed_default_runs_all_again_and_a_new_option_nothing(toy):
    reproduce(toy)

    @dataclass
    class WithNewOption(ToyConfig):
        novelty: int = 3

    @dataclass
    class WithOtherDefault(ToyConfig):
        beta: float = 0.2

    toy.Config = WithNewOption
    assert "not run" not in docs.method_block("toy")
    toy.Config = WithOtherDefault
    assert "reproduced |" not in docs.method_block("toy") and "not run |" in docs.method_block("toy")
    toy.calls.clear()
    runs.reproduce("toy", WithOtherDefault(seeds=1))
    # "beta 0.1" relies on the default, "plain" no longer equals it
    assert len(toy.calls) == 8


def test_flags_reach_all_methods_but_only_where_they_mean_the_same(toy, capsys):
    # "plain" now differs from "beta 0.1", which inherits 0.3
    assert len(reproduce(toy, seeds=1, model="big", beta=0.3)) == 8
    configs = {Path(c.out).parent.name.rsplit("-", 1)[0]: c for c in toy.calls}
    assert {c.model for c in toy.calls} == {"big"}
    # No --lr was given, so each method keeps its own for a model that is not tiny.
    assert configs["ppo"].lr == pytest.approx(0.05) and configs["sft"].lr == pytest.approx(0.01)
    assert configs["ppo"].beta == 7.0 and configs["beta-0.1"].beta == 0.3 and configs["beta-1"].beta == 1.0
    assert toy.loads == [(0, "big")]
    # The flags are stored, so a report finds the runs. They are no runs of the method's page.
    out = " ".join(capsys.readouterr().out.split())
    assert "not run" not in out and "Flags: model=big, beta=0.3." in out
    assert docs.method_block("toy").startswith("Not run yet")


def test_a_given_learning_rate_reaches_all_own_arms_even_where_it_is_the_default_of_another_model(toy):
    reproduce(toy, seeds=1, model="big", lr=1.0)
    assert {c.lr for c in toy.calls if isinstance(c, ToyConfig)} == {1.0}
    assert [c.lr for c in toy.calls if isinstance(c, OtherConfig)] == [pytest.approx(0.05)]        # its own
    assert in_file("results/toy@lr=1.0,model=big.json")["config"] == {"model": "big", "lr": 1.0}


def test_start_hands_over_the_starters_directory(toy):
    reproduce(toy)
    then = [c for c in toy.calls if c.policy]
    strong = {c.seed: c.out for c in toy.calls if c.beta == 3.0}
    assert [(c.beta, c.policy) for c in then] == [(0.2, strong[0]), (0.2, strong[1])]

    toy.EXPERIMENTS["start"]["arms"]["strong"]["beta"] = 4.0
    assert reproduce(toy) == [("strong", 0), ("then", 0), ("strong", 1), ("then", 1)]


def test_lost_policy_of_a_starter_is_made_again_only_when_needed(toy):
    reproduce(toy, seeds=1)
    Path("runs").rename("gone")                                      # a fresh clone: results without runs
    assert reproduce(toy, seeds=1) == []
    toy.EXPERIMENTS["start"]["arms"]["then"]["beta"] = 0.4
    toy.die_at = 1                                                   # after the starter
    with pytest.raises(KeyboardInterrupt):
        reproduce(toy, seeds=1)
    assert [c.beta for c in toy.calls] == [3.0]
    toy.die_at = None
    assert reproduce(toy, seeds=1) == [("then", 0)]


def test_starter_killed_while_it_is_made_again_does_not_count_as_finished(toy):
    reproduce(toy, seeds=1)
    Path("runs").rename("gone")
    toy.EXPERIMENTS["start"]["arms"]["then"]["beta"] = 0.4
    toy.die_at, strong = 0, next(Path(c.out) for c in toy.calls if c.beta == 3.0)
    with pytest.raises(KeyboardInterrupt):
        reproduce(toy, seeds=1)
    (strong / "half").mkdir(parents=True)                            # what a kill in mid-training leaves
    toy.die_at = None
    assert reproduce(toy, seeds=1) == [("strong", 0), ("then", 0)]


def test_task_without_gold_has_no_best_of_n_curve(toy, monkeypatch):
    monkeypatch.setattr(harness, "test_pool", lambda config: None)
    reproduce(toy, seeds=1)
    assert in_file()["best_of_n"] == {"0": None}
    assert reproduce(toy, seeds=1) == [] and toy.loads == [(0, "tiny")]


# --------------------------------------------------------------------------------------------- what is kept

def test_runs_of_an_edited_or_removed_arm_stay_and_are_not_shown(toy, capsys):
    reproduce(toy)
    before = in_file()["runs"]
    del toy.EXPERIMENTS["start"]["arms"]["plain"]                    # "beta 0.1" shares its runs
    toy.EXPERIMENTS["strength"]["arms"]["PPO"]["beta"] = 9.0
    reproduce(toy, seeds=1)
    del toy.EXPERIMENTS["strength"]["arms"]["beta 0.05"]
    toy.EXPERIMENTS["strength"]["claims"][0]["holds"] = [("beta 1", ">", "SFT")]
    capsys.readouterr()
    assert reproduce(toy, seeds=1) == []
    stored = in_file()["runs"]
    assert len(stored) == 15 and all(run in stored for run in before)
    line = next(line for line in capsys.readouterr().out.splitlines() if "shown" in line)
    assert line == "results/toy.json: 11 stored runs shown, 4 kept but not shown (4 of other arms)"
    assert {name: len(of) for name, of in tables.collect("toy", in_file())["strength"].items()} == {
        "SFT": 2, "beta 0.1": 2, "beta 1": 2, "PPO": 1}


def test_changed_default_moves_the_file_and_nothing_is_lost_if_it_changes_again(toy, capsys):
    reproduce(toy, seeds=1)
    first, original = in_file(), toy.Config

    @dataclass
    class WithOtherDefault(ToyConfig):
        beta: float = 0.2

    toy.Config = WithOtherDefault
    tables.report("toy")
    out = capsys.readouterr().out
    assert "results/toy.json: 0 stored runs shown, 7 kept but not shown (7 of other defaults)\n" in out
    assert "Seeds none." in out and in_file() == first                        # a report moves nothing
    runs.reproduce("toy", WithOtherDefault(seeds=1))
    old, = Path("results/old").glob("*.json")
    assert re.fullmatch(r"toy-[0-9a-f]{8}\.json", old.name) and in_file(old) == first
    out = capsys.readouterr().out
    assert out.count("is of other defaults than now") == 1 and out.count(str(old)) == 1
    assert "8 stored runs shown, 7 kept but not shown (7 of other defaults)" in out
    second = in_file()["runs"]
    toy.Config = original
    reproduce(toy, seeds=2)
    toy.Config = WithOtherDefault
    runs.reproduce("toy", WithOtherDefault(seeds=1))
    kept = [run for path in Path("results").rglob("toy*.json") for run in in_file(path)["runs"]]
    assert len(kept) == 14 + 8 + 8 and all(run in kept for run in first["runs"] + second)


def test_flags_that_make_another_experiment_have_a_file_of_their_own(toy, capsys):
    reproduce(toy, seeds=1)
    plain = RESULTS.read_bytes()
    assert len(reproduce(toy, seeds=1, beta=0.3)) == 8 and RESULTS.read_bytes() == plain
    assert reproduce(toy, seeds=1, beta=0.3, device="cuda") == []                    # no other experiment
    assert [path.name for path in sorted(Path("results").glob("*.json"))] == ["toy.json", "toy@beta=0.3.json"]
    capsys.readouterr()
    command_line.main(["toy", "--beta", "0.3", "--report", "--seeds", "4"])
    out = capsys.readouterr().out
    assert out.startswith("results/toy@beta=0.3.json: 8 stored runs shown, 0 kept but not shown\n")
    assert "Flags: beta=0.3." in out and "not run" not in out
    with pytest.raises(UserError, match="toy@beta=0.4.json does not exist .* --seeds 5 --beta 0.4 makes"):
        command_line.main(["toy", "--report", "--beta", "0.4"])


@pytest.mark.parametrize("flags, name", [
    ({}, "dpo.json"), ({"device": "cuda"}, "dpo.json"),
    ({"lr": 1e-05, "beta": 0.3}, "dpo@beta=0.3,lr=1e-05.json"),
    ({"pairs": "strong>weak"}, r"dpo@pairs=strong_weak-[0-9a-f]{8}.json"),
    ({"data": "/home/x/my pairs.jsonl"}, r"dpo@data=_home_x_my_pairs.jsonl-[0-9a-f]{8}.json"),
    ({"model": "x" * 65}, "dpo@model=x{65}.json"), ({"model": "x" * 66}, "dpo@[0-9a-f]{8}.json")])
def test_name_of_a_results_file(flags, name):
    path = store.results_path("dpo", flags)
    assert re.fullmatch(name, path.name) and len(path.name) <= 80 and path.parent == Path("results")


def test_names_that_would_be_alike_differ():
    names = {store.results_path("dpo", {"data": data}) for data in ("a/b", "a_b", "a:b")}
    assert len(names) == 3


def test_file_of_flags_under_the_plain_name_is_renamed(toy, capsys):
    """As files were before they had names of their own."""
    reproduce(toy, seeds=1, beta=0.3)
    flagged = Path("results/toy@beta=0.3.json")
    old = in_file(flagged)
    flagged.rename(RESULTS)
    assert len(reproduce(toy, seeds=1)) == 7 and in_file(flagged) == old
    assert "results/toy.json is of other flags than now: kept as results/toy@beta=0.3.json\n" in (
        capsys.readouterr().out)


def test_run_of_another_build_is_kept_and_no_table_mixes_two(toy, capsys):
    reproduce(toy)
    for run in (results := in_file())["runs"]:
        del run["build"]                                             # as runs were stored before
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    old, curves = results["runs"], results["best_of_n"]
    assert "2 seeds" not in docs.method_block("toy") and "not run" not in docs.method_block("toy")
    toy.build, toy.die_at = "b1", 3                                  # seed 0: 3 new runs, 7 old ones
    with pytest.raises(KeyboardInterrupt):
        reproduce(toy)
    stored = in_file()
    assert len(stored["runs"]) == 17 and set(stored["best_of_n"]) == {"0", "1", "0 b1"}
    builds = {run.get("build") for of in tables.collect("toy", stored).values()
              for runs in of.values() for run in runs.values()}
    assert builds == {None} and store.shown("toy", stored)["best_of_n"] == curves
    toy.die_at = None
    assert len(reproduce(toy)) == 14 - 3 and reproduce(toy) == []
    stored = in_file()
    assert all(run in stored["runs"] for run in old) and len(stored["runs"]) == 28
    view = store.shown("toy", stored)
    assert [run["build"] for run in view["runs"]] == ["b1"] * 14     # of equals the newer
    assert "14 stored runs shown, 14 kept but not shown (14 of other builds)" in capsys.readouterr().out
    toy.build = None
    assert reproduce(toy) == []                                      # the first models are back


def test_build_of_a_seed_is_chosen_by_the_number_of_runs_then_by_the_newest():
    def made(build, *times):
        return [{"build": build, "finished": time} for time in times]
    assert store.build_to_show(made("a", "1", "2") + made("b", "9")) == "a"
    assert store.build_to_show(made("a", "1", "2") + made("b", "1", "3")) == "b"
    assert store.build_to_show(made("b", "1", "2") + made("a", "0", "3")) == "a"
    assert store.build_to_show([{}, {}] + made("a", "1", "2")) == "a"
    assert store.build_to_show([{}, {}] + made("a", "1")) is None


def test_starter_of_another_build_is_trained_again(toy):
    reproduce(toy, seeds=1)
    toy.build = "b1"
    assert ("strong", 0) in reproduce(toy, seeds=1)
    toy.build = None                                                 # its directory is now that of b1
    toy.EXPERIMENTS["start"]["arms"]["then"]["beta"] = 0.4
    assert reproduce(toy, seeds=1) == [("strong", 0), ("then", 0)]


def test_machines_are_those_of_the_runs_that_are_shown(toy, monkeypatch):
    reproduce(toy, seeds=1)
    here = docs.method_block("toy").splitlines()[-1]
    monkeypatch.setattr(store.platform, "python_version", lambda: "9.9")
    toy.build, toy.die_at = "b1", 2
    with pytest.raises(KeyboardInterrupt):
        reproduce(toy, seeds=1)
    assert docs.method_block("toy").splitlines()[-1] == here and "9.9" not in here
    toy.die_at = None
    reproduce(toy, seeds=1)
    assert "python 9.9" in docs.method_block("toy").splitlines()[-1]


def test_fingerprint(tmp_path, monkeypatch):
    config = types.SimpleNamespace(data="reviews", policy="elsewhere", model="tiny")
    weights = tmp_path / "sft" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"small")
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    small = FINGERPRINT(config)
    assert small == hashlib.sha256(b"small").hexdigest()[:12]
    config = types.SimpleNamespace(data="pairs.jsonl", policy=str(tmp_path / "sft"), model="tiny")
    assert FINGERPRINT(config) == small
    found = []
    for at in (None, 0, 2 ** 20 * 3 // 2, 2 ** 20 * 3 - 1):          # the middle megabyte is not read
        content = bytearray(2 ** 20 * 3)
        if at is not None:
            content[at] = 1
        weights.write_bytes(content)
        found.append(FINGERPRINT(config))
    assert found[0] == found[2] and len(set(found)) == 3
    assert FINGERPRINT(types.SimpleNamespace(data="pairs.jsonl", policy="", model="someone/model")) is None


def test_flags_of_training_reach_the_methods_own_arms_only():
    situation = {"label_noise": 0.1, "eval_prompts": 64, "max_new_tokens": 30}
    given = situation | {"lr": 1e-3, "batch_size": 32, "temperature": 0.9, "kl_coef": 0.5}
    arms = planning.plan("ppo", given)["frontier"]
    assert arms["PPO"].settings == given | {"eval_every": 2}
    assert arms["DPO beta 0.1"].settings == situation | {"beta": 0.1}


def test_own_options_are_options_of_all_scripts_and_none_that_describes_the_situation():
    shared = {f.name for f in dataclasses.fields(harness.Config)}
    assert planning.OWN < shared
    assert not planning.OWN & {"model", "policy", "data", "reward", "reward_lr", "max_length", "seed",
                               "max_new_tokens", "eval_prompts", "reward_noise", "label_noise", "device",
                               "dtype"}


# --------------------------------------------------------------------------------------------- processes

JOBTOY = '''
"""A method whose "training" is arithmetic, in a module that other processes can import."""
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import harness
from harness import UserError

@dataclass
class Config(harness.Config):
    beta: float = 0.1

def train(config):
    with open("calls", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {Path(config.out).parent.name.rsplit('-', 1)[0]} {config.seed}\\n")
    assert not Path(config.out).exists()
    policy = Path(config.policy) / "gold"
    start = float(policy.read_text(encoding="utf-8")) if config.policy else config.seed
    Path(config.out).mkdir(parents=True)
    time.sleep(float(os.environ.get("TOY_SLEEP", 0.3)))
    if Path("mistake").exists() and config.beta == 3:
        raise UserError("three is too much")
    if Path("crash").exists() and config.beta == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    gold = start + config.beta
    (Path(config.out) / "gold").write_text(str(gold), encoding="utf-8")
    return {"eval/gold": gold, "seconds": 1.5, "out": config.out,
            "trace": [{"step": 0, "eval/gold": start}, {"step": 1, "eval/gold": gold}]}

EXPERIMENTS = {"one": dict(question="?", claims=[], panels=[dict(x="step", y=["eval/gold"], best_of_n=True)],
    arms={"then": {"start": "three", "beta": 0.2}, "three": {"beta": 3.0}} | {
          f"beta {b}": {"beta": b} for b in (0.3, 0.4, 0.5, 0.6)})}
sys.modules["experiments.jobtoy"] = sys.modules[__name__]
harness.launch = lambda train, config: train(config)
harness.load_task = lambda config: None
harness.fingerprint = lambda config: f"build{config.seed}"
harness.test_pool = lambda config: ([[0.0, 1.0]], [[2.0, config.seed]])
'''
JOBS = '''
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)             # which a shell's background job ignores
import jobtoy
from referee import figures, runs
figures.draw = lambda *arguments: None
if __name__ == "__main__":
    try:
        runs.reproduce("jobtoy", jobtoy.Config(seeds=2, jobs=int(sys.argv[1])))
    except jobtoy.UserError as mistake:
        sys.exit(f"error: {mistake}")
'''
JOB_RESULTS = Path("results/jobtoy.json")


@pytest.fixture
def jobtoy(tmp_path, monkeypatch):
    """start(jobs) starts a process that reproduces jobtoy's experiments, in so many processes."""
    monkeypatch.chdir(tmp_path)
    page(tmp_path / "jobtoy.py", JOBTOY), page(tmp_path / "run_jobs.py", JOBS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
                                "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = []

    def start(jobs, sleep=0.3):
        started.append(subprocess.Popen(
            [sys.executable, "run_jobs.py", str(jobs)], text=True, encoding="utf-8", stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment | {"TOY_SLEEP": str(sleep)}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def calls():
    """(process, arm, seed) of all that was run."""
    return [line.split() for line in Path("calls").read_text(encoding="utf-8").splitlines()]


def wait_until(true, seconds=200):
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "waited too long"
        time.sleep(0.05)


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"


def test_jobs_give_what_one_process_gives_and_a_kill_loses_nothing(jobtoy):
    out, errors = (one := jobtoy(1, 0)).communicate(timeout=300)
    assert one.returncode == 0, errors
    expected = JOB_RESULTS.read_bytes()
    assert len(calls()) == 12 and len({pid for pid, *_ in calls()}) == 1
    JOB_RESULTS.unlink(), Path("calls").unlink(), shutil.rmtree("runs")
    done = 0
    for number in (signal.SIGINT, signal.SIGKILL):                   # Ctrl-C; what nobody can catch
        two = jobtoy(2, 0.6)
        wait_until(lambda: JOB_RESULTS.exists() and len(in_file(JOB_RESULTS)["runs"]) > done + 1)
        two.send_signal(number)
        two.communicate(timeout=60)
        pids = {int(pid) for pid, *_ in calls()}
        assert two.returncode and two.pid not in pids
        wait_until(lambda: not any(map(alive, pids)), 30)            # no children are left
        last, done = done, len(in_file(JOB_RESULTS)["runs"])
        assert last + 2 <= done < 12
    out, errors = (two := jobtoy(2, 1.5)).communicate(timeout=300)
    assert two.returncode == 0, errors
    assert JOB_RESULTS.read_bytes() == expected and f"jobtoy: {12 - done} runs to do" in out
    assert len({int(pid) for pid, *_ in calls()} - pids) == 2        # both took part


def test_two_processes_at_once_share_the_work_and_lose_nothing(jobtoy):
    both = [jobtoy(1, 0.6), jobtoy(1, 0.6)]
    for process in both:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    runs_made = [tuple(call[1:]) for call in calls()]
    assert len(runs_made) == len(set(runs_made)) == 12               # nothing is run twice
    assert len(in_file(JOB_RESULTS)["runs"]) == 12
    assert set(in_file(JOB_RESULTS)["best_of_n"]) == {"0 build0", "1 build1"}


@pytest.mark.parametrize("kind, said", [
    ("mistake", "error: three is too much\n"),
    ("crash", "error: a process of --jobs ended with exit code -9. What is stored is safe, and the same "
              "command goes on\n")])
def test_mistake_or_crash_of_a_child_is_one_line_and_ends_all(jobtoy, kind, said):
    Path(kind).write_text("", encoding="utf-8")
    process = jobtoy(2, 0.1)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    lines = [line for line in errors.replace("\r", "\n").splitlines(True)
             if "it/s" not in line and line.strip()]
    assert lines == [said]
    assert not any(alive(int(pid)) for pid, *_ in calls())


def test_two_stores_of_one_file_lose_nothing(toy):
    """Each has read the file before the other wrote."""
    first, second = (store.Store("toy", {}, {"toy"}, RESULTS) for _ in range(2))
    for i in range(6):
        (first, second)[i % 2].merge([{"arm": "a", "key": "k", "seed": i, "build": None}], {str(i): None})
    assert in_file()["seeds"] == [0, 1, 2, 3, 4, 5] and set(in_file()["best_of_n"]) == set("012345")
    second.merge([{"arm": "a", "key": "k", "seed": 0, "build": None, "another": 1}])
    assert "another" not in in_file()["runs"][0]                     # what is stored stays


def test_writers_in_several_processes_lose_nothing(tmp_path):
    page(tmp_path / "write.py", """
import sys
from pathlib import Path
from referee.store import Store
for seed in range(15):
    run = {"arm": "a", "key": sys.argv[1], "seed": seed, "build": None}
    Store("dpo", {}, {"dpo"}, Path("results/dpo.json")).merge([run])
""")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    writers = [subprocess.Popen([sys.executable, "write.py", key], cwd=tmp_path, env=environment)
               for key in "xy"]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert len(in_file(tmp_path / "results" / "dpo.json")["runs"]) == 30


def test_jobs_must_be_positive():
    with pytest.raises(UserError, match="--jobs must be above 0"):
        harness.Config(jobs=0)


def test_lock_files_are_not_committed():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"results/*.lock", "results/**/*.lock"} <= set(lines)


# --------------------------------------------------------------------------------------------- tables, figure

def test_report_fits_the_terminal_and_states_every_claim(toy, capsys):
    reproduce(toy, seeds=3)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110
    table = out[:out.index("± is half")]
    assert [table.count(w) for w in ("reproduced", "not reproduced", "not measured")] == [3, 1, 1]
    assert "fluency" not in out[out.index("strength:"):]             # no arm has it
    assert "Seeds 0, 1, 2." in out and "Flags" not in out


def test_a_column_has_one_number_of_decimals(toy):
    reproduce(toy, seeds=1)
    rows = tables.arm_rows(tables.collect("toy", in_file())["strength"])
    assert [row[2] for row in rows] == ["KL", "0.0", "0.2", "0.4", "4.0", "28.0"]


def test_text_table_aligns_and_wraps_without_losing_words():
    rows = [["claim", "verdict"], ["word " * 40, "reproduced"], ["short", "no"]]
    lines = tables.text_table(rows, 60).splitlines()
    assert max(map(len, lines)) <= 60 and " ".join(lines).count("word") == 40
    columns = {line.index(w) for line in lines for w in ("verdict", "reproduced", "no") if line.endswith(w)}
    assert columns == {lines[0].index("verdict")}


@pytest.mark.parametrize("mean, half, expected", [
    (0.5123, 0.0312, "0.512 ±0.031"), (0.5, math.inf, "0.500"), (14.21, 0.3, "14.2 ±0.3"),
    (0.1, 25.0, "0.1 ±25.0"), (-1.234, 0.5, "-1.23 ±0.50"), (123.4, 9.6, "123 ±10")])
def test_plus_minus(mean, half, expected):
    assert tables.plus_minus(mean, half) == expected


def page(name, text):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_block_of_a_page_is_a_function_of_the_results(toy):
    reproduce(toy, seeds=3)
    path = page("docs/toy.md", f"# Title\n{docs.BEGIN}\nold\n{docs.END}\nthe end\n")
    command_line.main(["--docs"])
    first = path.read_text(encoding="utf-8")
    assert first.startswith("# Title\n") and first.endswith(f"{docs.END}\nthe end\n")
    assert "\nold\n" not in first
    assert docs.method_block("toy") in first and "a\\|b" in first
    assert f"{docs.BEGIN}\nClaims: 2 reproduced, 1 not reproduced, 1 not measured.\n" in first
    command_line.main(["--docs"])
    assert path.read_text(encoding="utf-8") == first

    results = in_file()
    for run in results["runs"]:
        if run["arm"] == "beta 1":
            run["eval/gold"] -= 2
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    assert "Claims: 2 not reproduced, 1 reproduced, 1 not measured.\n" in docs.method_block("toy")


def test_readme_has_a_row_for_sft_and_one_for_each_method_with_its_defaults(toy, capsys, monkeypatch):
    reproduce(toy, seeds=2)
    drawn = []
    monkeypatch.setattr(figures, "draw_overview", lambda arms, path: drawn.append((list(arms), str(path))))
    path = page("README.md", f"{docs.BEGIN}\n{docs.END}")
    page("docs/other.md", f"the marks `{docs.BEGIN}` and `{docs.END}` in a sentence are none")
    command_line.main(["--docs"])
    assert "written: README.md results/methods.png\n" in capsys.readouterr().out
    assert drawn == [(["SFT", "toy"], "results/methods.png")]
    lines = path.read_text(encoding="utf-8").split("\n")
    half = 12.7062 / 2                     # of a difference of 1 between two seeds: t / sqrt(2) * 1 / sqrt(2)
    table = [line.strip("| ").split(" | ") for line in lines[1:5]]
    assert lines[0] == docs.BEGIN and table[0] == ["method", "gold", "KL", "seconds"]    # no proxy
    assert table[2] == ["SFT", f"0.17 ±{half / 3:.2f}", "0.000 ±0.000", "12.3 ±0.0"]
    gold = 1 / 6 + 0.08 + 0.004                                                     # 0.08 and 0.008 of seed 1
    assert table[3] == ["[toy](docs/toy.md)", f"{gold:.2f} ±{half * (1 / 3 + 0.008):.2f}",
                        "0.400 ±0.000", "12.3 ±0.0"]
    assert {name: arm for name,
            (arm, _) in docs.overview()[0].items()} == {"SFT": "SFT of toy", "toy": "beta 0.1"}
    assert lines[-1] == docs.END and "Seeds 0, 1." in lines[-2]
    command_line.main(["--docs"])
    assert path.read_text(encoding="utf-8").split("\n") == lines
    RESULTS.unlink()
    assert "toy" not in docs.overview_block()                                   # a method that nobody has run


def test_page_of_a_method_that_nobody_has_run_says_so_and_a_page_of_no_method_is_a_user_error(toy):
    assert docs.block("docs/toy.md") == "Not run yet: `python -m referee toy --seeds 5`."
    with pytest.raises(UserError, match="docs/data.md is not the page of a method"):
        docs.block("docs/data.md")


def test_readme_says_which_rows_are_of_another_build_and_takes_sft_from_the_common_one(toy, monkeypatch):
    results = reproduce(toy, seeds=2) and in_file()
    for name in ("toy2", "toy3"):
        for module in (name, f"experiments.{name}"):
            monkeypatch.setitem(sys.modules, module, toy)
        planned = {arm.name: arm.key for found in planning.plan(name, {}).values() for arm in found.values()}
        defaults = {name: results["defaults"]["toy"]}
        copy = json.loads(json.dumps(results | {"method": name, "defaults": defaults}))
        for run in copy["runs"]:
            run["key"] = planned[run["arm"]]
            run["trace"][0]["eval/proxy"] = 0.5                     # toy has none
        Path(f"results/{name}.json").write_text(json.dumps(copy), encoding="utf-8")
    for holder in (planning, docs):
        monkeypatch.setattr(holder, "method_names", lambda: ["toy", "toy2", "toy3"])
    text = docs.overview_block()
    found = {name: arm for name, (arm, _) in docs.overview()[0].items()}
    assert found == {"SFT": "SFT of toy2"} | dict.fromkeys(["toy", "toy2", "toy3"], "beta 0.1")
    assert "older build of the task's models: toy. " in text
    monkeypatch.setattr(docs, "method_names", lambda: ["toy2", "toy3"])
    assert "older build" not in docs.overview_block()


def test_default_arm_has_the_fewest_settings_is_the_methods_own_and_starts_from_no_other(toy):
    toy.EXPERIMENTS = {
        "first": dict(question="?", claims=[], arms={
            "SFT": {"epochs": 0}, "two": {"beta": 0.2, "epochs": 2}, "other's": {"method": "other"},
            "after": {"start": "two"}, "one": {"beta": 0.2}}),
        "second": dict(question="?", claims=[], arms={"SFT too": {"epochs": 0}, "also one": {"epochs": 2}})}

    @dataclass
    class Evaluated(ToyConfig):
        eval_every: int = 0

    toy.Config = Evaluated
    title, arm = planning.default_arm("toy", {})
    assert (title, arm.name) == ("first", "one")
    toy.EXPERIMENTS["second"]["arms"]["looked at often"] = {"eval_every": 3}
    assert planning.default_arm("toy", {})[1].name == "looked at often"
    assert planning.default_arm("toy", {}, untrained=True)[1].name == "SFT"
    toy.EXPERIMENTS = {"only": dict(question="?", claims=[], arms={"other's": {"method": "other"}})}
    assert planning.default_arm("toy", {}) is None


@pytest.mark.parametrize("text", ["nothing here", docs.BEGIN, f"{docs.END}\n{docs.BEGIN}",
                                  f"{docs.BEGIN}\n{docs.BEGIN}\n{docs.END}"])
def test_page_without_marks_is_a_user_error(toy, text):
    path = page("README.md", text)
    with pytest.raises(UserError, match="lacks the lines"):
        docs.write(path)
    assert path.read_text(encoding="utf-8") == text


def test_figure_is_drawn_wide_enough_to_read(toy, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "draw", DRAW)
    from matplotlib.image import imread
    reproduce(toy, seeds=3)
    image = imread("results/toy.png")
    assert image.shape[1] == pytest.approx(1600, abs=2)
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50
    before = Path("results/toy.png").read_bytes()
    tables.report("toy")
    assert Path("results/toy.png").read_bytes() == before            # the same figure for the same results
    assert "pip install" not in capsys.readouterr().out
    docs.write_all()
    assert len(np.unique(imread("results/methods.png")[..., :3].reshape(-1, 3), axis=0)) > 10
    assert "![toy: figure](../results/toy.png)" in docs.method_block("toy")


def test_no_matplotlib_is_said_and_not_fatal(toy, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reproduce(toy, seeds=1)
    assert 'pip install -e ".[plot]"' in capsys.readouterr().out and not Path("results/toy.png").exists()


# --------------------------------------------------------------------------------------------- command line

def test_flags_of_the_method_are_flags_here(toy):
    command_line.main(["toy", "--seeds", "1", "--beta", "0.3"])
    assert {c.seed for c in toy.calls} == {0} and 0.3 in [c.beta for c in toy.calls]
    toy.calls.clear()
    command_line.main(["toy", "--report", "--beta", "0.3"])
    assert toy.calls == []
    with pytest.raises(UserError, match="results/toy.json does not exist yet"):
        command_line.main(["toy", "--report"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["toy", "--no-such-flag", "1"])
    assert stopped.value.code == 2


def test_report_before_any_run_is_a_user_error(toy):
    with pytest.raises(UserError, match="does not exist yet"):
        tables.report("toy")


def test_unknown_method_is_one_line_and_status_2(tmp_path):
    shutil.copytree(ROOT / "referee", tmp_path / "referee", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("other.py", "rrhf.py", "steerlm.py", "experiments/__init__.py", "experiments/rrhf.py",
                 "experiments/steerlm.py", "experiments/comparison.py"):
        page(tmp_path / name, "")
    done = python("-m", "referee", "dpp", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no method 'dpp'; there are: rrhf, steerlm\n"


@pytest.mark.parametrize("arguments", [("-m", "referee", STORED[0], "--report"),
                                       (ROOT / f"{STORED[0]}.py", "--reproduce")], ids=["module", "script"])
def test_missing_scipy_is_one_line_that_says_what_to_install(tmp_path, arguments):
    page(tmp_path / "blocked" / "scipy.py", "raise ImportError('as if it were not installed')")
    done = python(*arguments, cwd=tmp_path, first=str(tmp_path / "blocked"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'error: the referee needs scipy: pip install -e ".[plot]"\n'
    assert [path.name for path in tmp_path.iterdir()] == ["blocked"]             # said before anything is run


def test_packaging_finds_files_by_pattern(monkeypatch):
    found, setuptools = {}, types.ModuleType("setuptools")
    setuptools.setup = lambda **arguments: found.update(arguments)
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(found) == {"py_modules", "packages"}
    assert found["packages"] == ["experiments", "harness", "referee", "tasks"]
    assert {"common", *method_names()} <= set(found["py_modules"]) and "setup" not in found["py_modules"]
    for name in ("setup.py", "pyproject.toml"):
        words = set(re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")))
        assert not words & set(method_names()), f"{name} lists methods"


# ------------------------------------------------------------------------------------------ committed results

@pytest.mark.parametrize("method", STORED)
def test_committed_runs_are_those_of_the_experiments(method):
    results = tables.stored(method, ROOT / "results")
    assert not planning.outdated(results)
    seeds = set(results["seeds"])
    found = tables.collect(method, results)
    for title, arms_of in found.items():
        for name, stored in arms_of.items():
            assert set(stored) == seeds, f"{title}, {name}"
    plan = planning.plan(method, results["config"])
    keys = {arm.key for planned in plan.values() for arm in planned.values()}
    assert {run["key"] for run in results["runs"]} == keys
    title, arm = planning.default_arm(method, results["config"])
    assert found[title][arm.name]


@pytest.mark.parametrize("method", STORED)
def test_report_of_the_committed_results(tmp_path, method, monkeypatch, capsys):
    """Run on a copy: the figure must not be drawn anew into the repository. One in a process of its own."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / f"{method}.json", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    if method == STORED[0]:
        process = python("-m", "referee", method, "--report", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        out = process.stdout
    else:
        command_line.main([method, "--report"])
        out = capsys.readouterr().out
    on_one_line = " ".join(out.split())
    for title, experiment in planning.experiments_of(method).items():
        assert f"{title}: {experiment['question']}" in on_one_line
        for arm in experiment["arms"]:
            start = re.escape(re.split("[ -]", arm)[0])         # a long name is broken at a space or a hyphen
            assert re.search(rf"^{start}.* ±\d", out, re.M), f"{arm} has no figures"
    assert re.search("reproduced|inconclusive", out) and "not run" not in out


def test_pages_hold_what_the_committed_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Path("README.md") in docs.pages()
    stale = [str(path) for path in docs.pages() if docs.split(path)[1] != docs.block(path).split("\n")]
    assert not stale, f"run python -m referee --docs for {', '.join(stale)}"
