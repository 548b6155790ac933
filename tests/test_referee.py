"""The referee: resumable runs, what is kept, tables, figures, blocks in Markdown files.

On a method that trains nothing; at the end, on the committed results.
"""
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
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

import harness
from conftest import ROOT, method_names
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
    eval_prompts: int = 128
    eval_samples: int = 4

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
    module.calls, module.die_at, module.loads, module.build, module.known = [], None, [], None, []
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
                        "cpu_seconds": 9.87654321, "state_mb": 3.0, "trace": trace, "out": config.out}

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

    def launch(train, config, known):
        assert train is {ToyConfig: module, OtherConfig: other}.get(type(config), module).train
        module.known.append((config.seed, known))
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
    assert len(reproduce(toy, seeds=4, device="cuda")) == 7 and {c.device for c in toy.calls} == {"cuda"}


def test_run_that_diverges_ends_all_or_is_left_out_of_the_verdict(toy, capsys, monkeypatch):
    launch = harness.launch

    def diverging(train, config, known):
        if config.seed == 1 and config.beta in (1.0, 3.0):
            raise harness.Diverged("step 3: loss is nan")
        return launch(train, config, known)

    monkeypatch.setattr(harness, "launch", diverging)
    assert len(reproduce(toy, seeds=3)) == 7 * 3 - 3                 # "then" starts from "strong"
    out, said = capsys.readouterr()
    assert "beta 1, seed 1: step 3: loss is nan" in said
    assert "then, seed 1: strong, from which it starts, has diverged" in said
    assert "beta 1 (1 of 3 seeds diverged)" in out and "then (1 of 3 seeds diverged)" in out
    lost = [run for run in in_file()["runs"] if "diverged" in run]
    assert [(run["arm"], run["seed"], run["trace"]) for run in lost] == [
        ("beta 1", 1, []), ("strong", 1, []), ("then", 1, [])]
    collected = tables.collect("toy", in_file())
    words = {claim["claim"]: statistics.verdict(claim, collected[title])[0]
             for title, experiment in toy.EXPERIMENTS.items() for claim in experiment["claims"]}
    assert [*words.values()] == ["not measured"] * 4
    assert reproduce(toy, seeds=3) == [] and len(in_file()["runs"]) == 21
    assert docs.method_block("toy")


@pytest.mark.parametrize("flags", [["--seed", "7"], ["--out", "here"], ["--resume"]])
def test_flag_of_one_run_is_ignored_in_silence(toy, flags):
    with pytest.raises(UserError, match="is for one run: the referee takes --seeds"):
        command_line.main(["toy", *flags])
    assert not toy.calls


@pytest.mark.parametrize("change, said", [
    (lambda results: results.pop("config"), "lacks config: restore or delete it"),
    (lambda results: results["runs"][0].pop("key"), "lacks key of a run: restore or delete it"),
    (lambda results: results["runs"][2].pop("trace"), "lacks trace of a run: restore or delete it")])
def test_results_that_lack_something_are_a_traceback(toy, change, said):
    reproduce(toy, seeds=1)
    results = in_file()
    change(results)
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        command_line.main(["toy", "--report"])


def test_page_is_cut_where_the_disk_is_full(toy, monkeypatch):
    reproduce(toy, seeds=1)
    path = page("docs/toy.md", f"# Title\n{docs.BEGIN}\nold\n{docs.END}\n")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError):
        docs.write("docs/toy.md")
    assert path.read_text(encoding="utf-8").startswith(f"# Title\n{docs.BEGIN}\nold\n")


def test_what_is_stored(toy, tmp_path):
    reproduce(toy)
    results = in_file()
    runs = {(r["arm"], r["seed"]): r for r in results["runs"]}
    often = {"eval_prompts": 512, "eval_samples": 8}
    assert runs["beta 1", 1]["config"] == {"beta": 1.0} | often and runs["beta 0.1", 0]["config"] == often
    assert runs["PPO", 0]["config"] == {"method": "other"} | often and runs["PPO", 0]["eval/kl"] == 28.0
    assert runs["then", 0]["config"] == {"beta": 0.2, "start": "strong"} | often
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


def test_runs_of_a_seed_share_the_evaluations_of_initial_policies_and_seeds_do_not(toy):
    reproduce(toy)
    by_seed = {seed: {id(known) for s, known in toy.known if s == seed} for seed in (0, 1)}
    assert all(len(ids) == 1 for ids in by_seed.values()) and by_seed[0] != by_seed[1]


@pytest.mark.parametrize("change, again", [(None, 0), ("build", 2), ("default", 2), ("flag", 2)])
def test_run_that_another_method_has_stored_is_taken_from_there(toy, monkeypatch, change, again):
    """PPO is an arm of many methods: "other" has run it with its defaults, as toy's arm "PPO" does."""
    other = sys.modules["other"]
    other.EXPERIMENTS = {"its own": dict(question="?", claims=[], arms={"default": {}})}
    monkeypatch.setitem(sys.modules, "experiments.other", other)
    work = runs.Work("other", {}, range(2), "results", "runs/referee", other.EXPERIMENTS)
    assert [what for _, what in work.go()].count("default") == 2
    stored = in_file("results/other.json")
    for run in stored["runs"]:
        run["eval/gold"] = 123.0                                      # to be known again
    if change == "build":
        stored["runs"] = [run | {"build": "another"} for run in stored["runs"]]
    if change == "default":
        stored["defaults"]["other"]["beta"] = 8.0                     # equal keys, other settings
    Path("results/other.json").write_text(json.dumps(stored), encoding="utf-8")
    ran = reproduce(toy, **{"model": "large"} if change == "flag" else {})
    assert sum(name == "ppo" for name, _ in ran) == again
    path = "results/toy@model=large.json" if change == "flag" else RESULTS
    found = [run for run in in_file(path)["runs"] if run["arm"] == "PPO"]
    assert len(found) == 2 and all(run["config"]["method"] == "other" for run in found)
    assert [run["eval/gold"] == 123.0 for run in found] == [not again] * 2


def test_changed_arm_runs_again_alone(toy):
    reproduce(toy)
    toy.EXPERIMENTS["strength"]["arms"]["beta 1"] = {"beta": 2.0}
    assert tables.report("toy")["runs"] and "not run" in docs.method_block("toy")   # stale runs are not shown
    assert reproduce(toy) == [("beta-1", 0), ("beta-1", 1)]
    stored = [r for r in in_file()["runs"] if r["arm"] == "beta 1"]
    assert sorted(r["config"]["beta"] for r in stored) == [1.0, 1.0, 2.0, 2.0]       # the old runs stay


def stored_under(toy, default):
    """Results of ToyConfig (beta 0.1, LR 1), then a Config of another day with these attributes."""
    reproduce(toy)
    annotations = {name: type(value) for name, value in default.items() if name != "LR"}
    toy.Config = dataclass(type("Config", (ToyConfig,), {"__annotations__": annotations} | default))
    return in_file()


def again(toy, seeds=2):
    toy.calls.clear()
    runs.reproduce("toy", toy.Config(seeds=seeds))
    return [(Path(c.out).parent.name.rsplit("-", 1)[0], c.seed) for c in toy.calls]


def test_new_option_runs_nothing_until_an_arm_sets_it(toy):
    stored_under(toy, {"novelty": 3})
    assert "not run" not in docs.method_block("toy") and again(toy) == []
    toy.EXPERIMENTS["strength"]["arms"]["beta 1"]["novelty"] = 4
    assert again(toy, 1) == [("beta-1", 0)]


def test_changed_default_runs_anew_only_what_relies_on_it_and_loses_nothing(toy, capsys):
    before = stored_under(toy, {"beta": 0.2})
    assert "not run |" in docs.method_block("toy") and in_file() == before
    capsys.readouterr()
    # "then" sets 0.2 itself. "plain" sets 0.1: its runs are those that "beta 0.1" once had.
    assert again(toy) == [("sft", 0), ("beta-0.1", 0), ("sft", 1), ("beta-0.1", 1)]
    assert {c.beta for c in toy.calls} == {0.2}
    assert "18 runs" not in (out := capsys.readouterr().out)
    assert "16 stored runs shown, 2 kept but not shown (2 of other arms)" in out and "not run" not in out
    after = in_file()
    assert all(run in after["runs"] for run in before["runs"]) and len(after["runs"]) == 18
    assert after["defaults"]["toy"]["beta"] == 0.1                  # those that the stored keys are made with
    assert [r["config"]["beta"] for r in after["runs"] if r["arm"] == "SFT" and "beta" in r["config"]] == [
        0.2, 0.2]
    assert again(toy) == []
    toy.Config = ToyConfig                                          # and back
    assert again(toy) == [] and "not run" not in docs.method_block("toy")
    assert sorted(path.name for path in Path("results").rglob("*.json")) == ["toy.json"]


def test_changed_default_that_depends_on_the_model_counts_too(toy):
    toy.EXPERIMENTS["strength"]["arms"]["beta 1"]["lr"] = 1.0       # the default, said
    stored_under(toy, {"LR": 2.0})
    relying = ["beta-0.05", "beta-0.1", "sft", "strong", "then"]
    assert sorted(again(toy, 1)) == [(name, 0) for name in relying]
    assert {c.lr for c in toy.calls} == {2.0}
    assert again(toy, 1) == [] and len(in_file()["runs"]) == 14 + 5
    toy.calls.clear()
    runs.reproduce("toy", toy.Config(seeds=1, model="big"))
    assert {c.lr for c in toy.calls if isinstance(c, toy.Config)} == {0.02, 1.0}
    said = {r["arm"]: r["config"].get("lr") for r in in_file("results/toy@model=big.json")["runs"]}
    assert said == dict.fromkeys(["SFT", "beta 0.05", "beta 0.1", "PPO", "strong", "then"]) | {"beta 1": 1.0}


def evaluated(toy):
    return {(c.eval_prompts, c.eval_samples) for c in toy.calls}


def test_all_arms_are_evaluated_on_512_prompts_unless_the_user_or_the_arm_says_otherwise(toy, monkeypatch):
    assert (ToyConfig().eval_prompts, ToyConfig().eval_samples) == (128, 4)
    reproduce(toy, seeds=1)
    assert evaluated(toy) == {(512, 8)}
    assert len(reproduce(toy, seeds=1, eval_prompts=64)) == 7 and evaluated(toy) == {(64, 8)}
    toy.EXPERIMENTS["strength"]["arms"]["beta 1"]["eval_samples"] = 2
    assert reproduce(toy, seeds=1) == [("beta-1", 0)] and evaluated(toy) == {(512, 2)}
    for said in (["--eval_prompts", "128"], ["--eval-prompts=128"]):     # as many as the script's own default
        monkeypatch.setattr(sys, "argv", ["-m", "toy", "--seeds", "1", *said])
        shutil.rmtree("results", ignore_errors=True)
        command_line.main(sys.argv[1:])
        assert {c.eval_prompts for c in toy.calls[-7:]} == {128}
        assert [path.name for path in Path("results").glob("*.json")] == ["toy@eval_prompts=128.json"]
        command_line.main(["toy", "--report", *said])


def test_experiment_may_have_an_evaluation_of_its_own_under_the_users(toy):
    toy.EXPERIMENTS = {"own": dict(question="?", claims=[], arms={"a": {}, "b": {"eval_prompts": 7}},
                                   evaluation={"eval_prompts": 32, "eval_samples": 1})}
    found = {name: (arm.settings["eval_prompts"], arm.settings["eval_samples"])
             for name, arm in planning.plan("toy", {"eval_samples": 3})["own"].items()}
    assert found == {"a": (32, 3), "b": (7, 3)}


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


def test_setting_does_not_name_the_starters_directory(toy):
    toy.EXPERIMENTS["start"]["arms"]["then"]["model"] = "{start}/reward_model"
    reproduce(toy)
    strong = {c.seed: c.out for c in toy.calls if c.beta == 3.0}
    assert {c.seed: c.model for c in toy.calls if c.policy} == {
        seed: f"{out}/reward_model" for seed, out in strong.items()}
    stored = {run["config"]["model"] for run in in_file("results/toy.json")["runs"] if run["arm"] == "then"}
    assert stored == {"{start}/reward_model"}                       # no directory of one machine


def test_start_is_an_option_of_the_method_where_no_arm_has_that_name(toy):
    @dataclass
    class WithStart(ToyConfig):
        start: str | None = None

        def __post_init__(self):
            super().__post_init__()
            self.start = self.start or "base"

    toy.Config = WithStart
    arms = {"a": {"start": "policy"}, "b": {"start": "a"}, "c": {"start": "base"}, "d": {}}
    planned = planning.plan("toy", {}, {"any": {"arms": arms}})["any"]
    found = {name: (arm.start and arm.start.name, arm.changes.get("start")) for name, arm in planned.items()}
    assert found == {"a": (None, "policy"), "b": ("a", None), "c": (None, None), "d": (None, None)}
    assert planned["c"].key == planned["d"].key != planned["a"].key


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


def test_flags_that_make_another_experiment_have_a_file_of_their_own(toy, capsys):
    reproduce(toy, seeds=1)
    plain = RESULTS.read_bytes()
    ran = [name for name, _ in reproduce(toy, seeds=1, beta=0.3)]
    assert ran == ["sft", "beta-0.1", "strong", "then"] and RESULTS.read_bytes() == plain  # known: the rest
    assert all(Path(c.out).is_relative_to("runs/referee/toy@beta=0.3") for c in toy.calls)
    assert reproduce(toy, seeds=1, beta=0.3, device="cuda") == []                    # no other experiment
    assert [path.name for path in sorted(Path("results").glob("*.json"))] == ["toy.json", "toy@beta=0.3.json"]
    capsys.readouterr()
    command_line.main(["toy", "--beta", "0.3", "--report", "--seeds", "4"])
    out = capsys.readouterr().out
    assert out.startswith("results/toy@beta=0.3.json: 8 stored runs shown, 0 kept but not shown\n")
    assert "Flags: beta=0.3." in out and "not run" not in out
    with pytest.raises(UserError, match="toy@beta=0.4.json does not exist .* --seeds 10 --beta 0.4 makes"):
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
    arms = {"PPO": {"eval_every": 2}, "DPO beta 0.1": {"method": "dpo", "beta": 0.1}}
    planned = planning.plan("ppo", given, {"any": {"arms": arms}})["any"]
    plain = {"eval_samples": 8}
    assert planned["PPO"].settings == plain | given | {"eval_every": 2}
    assert planned["DPO beta 0.1"].settings == plain | situation | {"beta": 0.1}


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
    if Path("disk").exists() and config.beta == 3:
        raise OSError("the disk is full")
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
harness.launch = lambda train, config, known: train(config)
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
    ("mistake", "error: three is too much\n"), ("disk", "error: the disk is full\n"),
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

def test_an_experiment_may_choose_its_columns():
    table = {"a": {0: {"eval/gold": 1.0, "mine": 2.0}}}
    assert tables.arm_rows(table, {"mine": "my own"}) == [["arm", "my own"], ["a", "2.00"]]
    assert tables.arm_rows(table)[0] == ["arm", "gold"]


def test_report_fits_the_terminal_and_states_every_claim(toy, capsys):
    reproduce(toy, seeds=3)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110
    table = out[:out.index("± is half")]
    assert [table.count(w) for w in ("reproduced", "not reproduced", "not measured")] == [2, 1, 1]
    assert table.count("inconclusive") == 1                          # three equal values: too few seeds
    assert "fluency" not in out[out.index("strength:"):]             # no arm has it
    assert "Seeds 0, 1, 2 (3 of the 10 that were set beforehand)." in out and "Flags" not in out


def test_a_column_has_one_number_of_decimals(toy):
    reproduce(toy, seeds=1)
    rows = tables.arm_rows(tables.collect("toy", in_file())["strength"])
    assert [row[2] for row in rows] == ["KL, nats", "0.0", "0.2", "0.4", "4.0", "28.0"]


def test_costs_are_shown_once_for_arms_that_experiments_share_and_not_for_older_runs(toy, capsys):
    reproduce(toy, seeds=2)
    collected = tables.collect("toy", in_file())
    collected["start"]["beta 1"] = {0: {"cpu_seconds": 1.0, "tokens_scored_reward": 20}}   # taken
    header, *rows = tables.cost_rows(collected)
    assert header == ["arm", "CPU s", "tokens generated", "tokens scored by rewards", "MB trained"]
    assert [row[0] for row in rows] == ["SFT", "beta 0.05", "beta 0.1", "beta 1", "PPO", "strong", "then",
                                        "beta 1 (start)"]
    assert rows[0] == ["SFT", "9.88 ±0.00", "123,456,789 ±0", "-", "3.00 ±0.00"]
    assert rows[-1] == ["beta 1 (start)", "1.00", "-", "20.0", "-"]
    assert tables.COSTS_ARE in capsys.readouterr().out and tables.COSTS_ARE in docs.method_block("toy")
    for run in (results := in_file())["runs"]:
        del run["cpu_seconds"]
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    tables.report("toy")
    assert "Costs" not in capsys.readouterr().out + docs.method_block("toy")


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
    assert f"{docs.BEGIN}\nClaims: 1 reproduced, 1 inconclusive, 1 not reproduced, 1 not measured.\n" in first
    command_line.main(["--docs"])
    assert path.read_text(encoding="utf-8") == first

    results = in_file()
    for run in results["runs"]:
        if run["arm"] == "beta 1":
            run["eval/gold"] -= 2
    RESULTS.write_text(json.dumps(results), encoding="utf-8")
    assert "Claims: 2 not reproduced, 1 inconclusive, 1 not measured.\n" in docs.method_block("toy")


def test_page_of_defaults_has_a_row_for_sft_and_one_for_each_method(toy, capsys, monkeypatch):
    reproduce(toy, seeds=2)
    drawn = []
    monkeypatch.setattr(figures, "draw_overview", lambda arms, path: drawn.append((list(arms), str(path))))
    path = page("docs/defaults.md", f"{docs.BEGIN}\n{docs.END}")
    page("docs/other.md", f"the marks `{docs.BEGIN}` and `{docs.END}` in a sentence are none")
    command_line.main(["--docs"])
    assert "written: docs/defaults.md results/methods.png\n" in capsys.readouterr().out
    assert drawn == [(["SFT", "toy"], "results/methods.png")]
    lines = path.read_text(encoding="utf-8").split("\n")
    half = 12.7062 / 2                     # of a difference of 1 between two seeds: t / sqrt(2) * 1 / sqrt(2)
    table = [line.strip("| ").split(" | ") for line in lines[1:5]]
    assert lines[0] == docs.BEGIN and table[0] == ["method", "gold", "KL, nats", "CPU s", "MB trained"]
    assert table[2] == ["SFT", f"0.17 ±{half / 3:.2f}", "0.000 ±0.000", "-", "-"]        # nothing is trained
    gold = 1 / 6 + 0.08 + 0.004                                                     # 0.08 and 0.008 of seed 1
    assert table[3] == ["[toy](toy.md)", f"{gold:.2f} ±{half * (1 / 3 + 0.008):.2f}",
                        "0.400 ±0.000", "9.88 ±0.00", "3.00 ±0.00"]
    assert "CPU seconds are of training on one thread" in lines[6] and "MB trained are" in lines[6]
    assert {name: arm for name,
            (arm, _) in docs.overview()[0].items()} == {"SFT": "SFT of toy", "toy": "beta 0.1"}
    assert lines[-1] == docs.END and "Seeds 0, 1 (2 of the 10 that were set beforehand)." in lines[-2]
    command_line.main(["--docs"])
    assert path.read_text(encoding="utf-8").split("\n") == lines
    RESULTS.unlink()
    assert "toy" not in docs.overview_block()                                   # a method that nobody has run


def test_page_of_a_method_that_nobody_has_run_says_so_and_a_page_of_no_method_is_a_user_error(toy):
    assert docs.block("docs/toy.md") == "Not run yet: `python -m referee toy --seeds 10`."
    with pytest.raises(UserError, match="docs/data.md is not the page of a method"):
        docs.block("docs/data.md")


def test_defaults_say_which_rows_are_of_another_build_and_take_sft_from_the_common_one(toy, monkeypatch):
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
    assert "For some seeds toy began with models from another machine or an older build. " in text
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
        eval_temperature: float = 1.0

    toy.Config = Evaluated
    title, arm = planning.default_arm("toy", {})
    assert (title, arm.name) == ("first", "one")
    toy.EXPERIMENTS["second"]["arms"]["looked at often"] = {"eval_every": 3}
    assert planning.default_arm("toy", {})[1].name == "looked at often"
    assert planning.default_arm("toy", {}, untrained=True)[1].name == "SFT"
    del toy.EXPERIMENTS["first"]["arms"]["SFT"], toy.EXPERIMENTS["second"]["arms"]["SFT too"]
    toy.EXPERIMENTS["first"]["arms"]["SFT, cold"] = {"epochs": 0, "eval_temperature": 0.5}
    assert planning.default_arm("toy", {}, untrained=True) is None
    toy.EXPERIMENTS = {"only": dict(question="?", claims=[], arms={"other's": {"method": "other"}})}
    assert planning.default_arm("toy", {}) is None


@pytest.mark.parametrize("text", ["nothing here", docs.BEGIN, f"{docs.END}\n{docs.BEGIN}",
                                  f"{docs.BEGIN}\n{docs.BEGIN}\n{docs.END}"])
def test_page_without_marks_is_a_user_error(toy, text):
    path = page("docs/toy.md", text)
    with pytest.raises(UserError, match="lacks the lines"):
        docs.write(path)
    assert path.read_text(encoding="utf-8") == text


def test_report_and_docs_draw_their_figures(toy, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "draw", DRAW)
    reproduce(toy, seeds=3)
    before = Path("results/toy.png").read_bytes()
    tables.report("toy")
    assert Path("results/toy.png").read_bytes() == before            # the same figure for the same results
    assert "pip install" not in capsys.readouterr().out
    assert Path("results/methods.png") in docs.write_all() and Path("results/methods.png").exists()
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
                 "experiments/steerlm.py"):
        page(tmp_path / name, "")
    for name in ("comparison.py", "real_text.py"):
        shutil.copy(ROOT / "experiments" / name, tmp_path / "experiments")
    done = python("-m", "referee", "dpp", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no method 'dpp'; there are: rrhf, steerlm, comparison, real_text, mine\n"


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
    """Runs take hours: arms may still be missing. But an arm has all seeds or none, and no run is stale."""
    results = tables.stored(method, ROOT / "results")
    seeds = set(results["seeds"])
    found = tables.collect(method, results)
    for title, arms_of in found.items():
        for name, stored in arms_of.items():
            assert set(stored) in (seeds, set()), f"{title}, {name}"
    plan = store.planned(method, results)
    keys = {arm.key for planned in plan.values() for arm in planned.values()}
    assert {run["key"] for run in results["runs"]} <= keys
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
    found = tables.collect(method, in_file(f"results/{method}.json"))
    for title, experiment in planning.experiments_of(method).items():
        assert f"{title}: {experiment['question']}" in on_one_line
        for arm in (arm for arm in experiment["arms"] if found[title][arm]):
            start = re.escape(re.split("[ -]", arm)[0])         # a long name is broken at a space or a hyphen
            assert re.search(rf"^{start}.* ±\d", out, re.M), f"{arm} has no figures"
    missing = any(not found[title][arm] for title, experiment in planning.experiments_of(method).items()
                  for claim in experiment["claims"] for part in claim["holds"]
                  for arm in (part[0], part[2])
                  if isinstance(arm, str))
    assert ("not run" in out) == missing


def test_pages_hold_what_the_committed_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Path("README.md") in docs.pages()
    stale = [f"{path} ({kind})" for path in docs.pages() for kind in docs.kinds(path)
             if docs.split(path, kind)[1] != docs.block(path, kind).split("\n")]
    assert not stale, f"run python -m referee --docs for {', '.join(stale)}"
