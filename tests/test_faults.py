"""Crashes, races, interruptions and damaged files: nothing is lost, nothing mixes, and one line says it."""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForSequenceClassification

import decision_transformer
import dpo
import harness
import ppo
import pro
import raft
import rrhf
import steerlm
import tasks
from common import UserError
from conftest import ROOT, killed_after, method_names, save_toy, settings, started, toy_run
from harness import asking, command_line, directory
from harness.config import interval_of, is_number, outside
from harness.command_line import check_embedded, command_that_resumes, in_one_line
from harness.run import Stop
from referee import docs, tables
from tasks import Ranking, build

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


# ---- options

NUMBERS = [(name, field) for name in method_names() for field in dataclasses.fields(__import__(name).Config)
           if is_number(field.type)]


def test_a_number_has_no_interval():
    assert len(NUMBERS) > 150
    assert not [(name, field.name) for name, field in NUMBERS if not interval_of(field)]


@pytest.mark.parametrize("name", method_names())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_number_outside_its_interval_passes_or_another_flag_is_named(name, data):
    config = __import__(name).Config
    field = data.draw(st.sampled_from([f for f in dataclasses.fields(config) if is_number(f.type)]))
    value = data.draw(st.one_of(st.floats(), st.integers(-2 ** 80, 2 ** 80)))
    if "int" in str(field.type):
        value = int(value) if math.isfinite(value) else 2 ** 70
    interval = interval_of(field)
    low, high = (float(end) for end in interval[1:-1].split(", "))
    inside = math.isfinite(value) and (low < value or interval[0] == "[" and value == low) and (
        value < high or interval[-1] == "]" and value == high) and value <= (
        2 ** 62 if isinstance(value, int) else 1e30)
    assert bool(outside(value, interval)) != inside
    if not inside:
        with pytest.raises(UserError, match=f"^--{field.name} must "):
            config(**{field.name: value})


def edges(field):
    """Numbers of a field that are allowed, the extreme ones too; few where each costs time."""
    interval = interval_of(field)
    low, high = (float(end) for end in interval[1:-1].split(", "))
    if "int" in str(field.type):
        return [value for value in (0, 1, 2, 3) if not outside(value, interval)]
    return [value for value in (low, 1e-30, 1e-3, 0.4, min(high, 1e30), 1e300)
            if not outside(value, interval)]


LONG = {"epochs", "predictor_epochs", "bootstrap_epochs", "max_length", "max_new_tokens", "seeds", "jobs",
        "demonstrations", "rated", "lora_rank"}              # huge ones take for ever, or belong elsewhere


@pytest.mark.parametrize("name", method_names())
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_allowed_number_gives_neither_finite_numbers_nor_one_line(name, data, toy, tmp_path):
    module = __import__(name)
    field = data.draw(st.sampled_from([f for f in dataclasses.fields(module.Config)
                                       if is_number(f.type) and f.name not in LONG]))
    value = data.draw(st.sampled_from(edges(field)))
    out = tmp_path / "run"
    shutil.rmtree(out, ignore_errors=True)
    flags = {"epochs": 0.5, "reward": str(save_reward(tmp_path)), "out": str(out), field.name: value}
    flags |= {"sources": "P", "control": "tokens"} if name == "decision_transformer" else {}
    flags |= {"labels": "human"} if name == "steerlm" else {}
    try:
        result = harness.launch(module.train, settings(toy, module.Config, **flags))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        numbers = [value for key, value in result.items() if key.startswith("eval/")]
        assert numbers and all(math.isfinite(value) for value in numbers if value is not None)


def save_reward(folder):
    path = folder / "reward"
    return path if path.exists() else save_toy(path, LlamaForSequenceClassification, num_labels=1)


@pytest.mark.parametrize("value, interval, must", [
    (0, "(0, inf)", "be above 0"), (-1, "[0, inf)", "not be negative"), (1, "[2, inf)", "be at least 2"),
    (2, "[0, 1]", "be in [0, 1]"), (1.0, "[0, 1)", "be in [0, 1)"), (-0.1, "[0, 1)", "be in [0, 1)"),
    (math.nan, "[0, 1)", "be in [0, 1)"), (math.inf, "(0, inf)", "be a finite number"),
    (2 ** 63, "[0, inf)", "be at most 4.61169e+18"), (1e31, "[0, inf)", "be at most 1e+30"),
    (0, "[0, 1)", ""), (1, "[0, 1]", ""), (3, "(0, inf)", ""), (1e30, "(0, inf)", "")])
def test_what_a_number_must_be(value, interval, must):
    assert outside(value, interval) == must


# ---- races

def test_two_runs_get_one_number(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
            "from harness.directory import free_directory\n"
            "for _ in range(20): print(free_directory(Path(sys.argv[2])).name)")
    both = [subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path / "dpo")],
                             stdout=subprocess.PIPE, text=True, encoding="utf-8") for _ in range(2)]
    names = sum((process.communicate(timeout=120)[0].split() for process in both), [])
    assert sorted(names) == [f"{number:03d}" for number in range(1, 41)]


def held(out):
    """A process that writes `out` until it is killed."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\n"
            "from harness.directory import claim\nlock = claim(Path(sys.argv[2]))\n"
            "print('held', flush=True); time.sleep(300)")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(out)], stdout=subprocess.PIPE,
                               text=True, encoding="utf-8")
    assert process.stdout.readline() == "held\n"
    return process


def test_second_writer_is_let_in_or_a_dead_one_still_holds(toy, tmp_path):
    other = held(tmp_path / "run")
    try:
        with pytest.raises(UserError, match=f"process {other.pid} is writing .*run: wait, or give"):
            started(toy, tmp_path / "run")
    finally:
        other.kill()
        other.wait()
    run = started(toy, tmp_path / "run")                         # what the dead process left does not hold
    directory.give_back(run.out, run.lock)
    assert not (tmp_path / "run").exists()


def test_second_writer_with_an_equal_process_number_is_let_in(toy, tmp_path):
    """As in two containers that share a disk: both are process 1."""
    other = held(tmp_path / "run")
    try:
        (tmp_path / "run" / ".process").write_text(str(os.getpid()), encoding="utf-8")
        with pytest.raises(UserError, match=f"process {os.getpid()} is writing"):
            directory.claim(tmp_path / "run")
    finally:
        other.kill()
        other.wait()


def test_failed_start_leaves_a_directory(toy, tmp_path):
    with pytest.raises(UserError):
        started(toy, tmp_path / "run", data="missing.jsonl")
    assert not (tmp_path / "run").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds another run"):
        started(toy, tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes"]


# ---- interruptions

def config_of(toy, out, **more):
    return settings(toy, dpo.Config, **{"out": str(out), "epochs": 2.0, "eval_every": 3, **more})


@pytest.fixture
def straight(toy, tmp_path):
    """The files of a run that was not cut."""
    harness.launch(dpo.train, config_of(toy, tmp_path / "straight"))
    return {name: (tmp_path / "straight" / name).read_bytes()
            for name in ("model.safetensors", "metrics.jsonl", "samples.txt")}


def same(out, files):
    return all((out / name).read_bytes() == content for name, content in files.items())


@pytest.fixture(autouse=True)
def no_signal():
    yield
    Stop.signal, Stop.stepping = 0, False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_step_is_lost_or_saved_in_halves(number, toy, tmp_path, monkeypatch, straight, capsys):
    log = harness.Run.log

    def interrupt(run, step, metrics):
        log(run, step, metrics)
        if step == 3:
            Stop.handle(number, None)                             # within a step: it is ended first

    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "log", interrupt)
        with pytest.raises(SystemExit) as left:
            in_one_line(lambda: harness.launch(dpo.train, config_of(toy, tmp_path / "cut")))
    error = capsys.readouterr().err
    assert left.value.code == 128 + number and "stopping after this step" in error
    assert "to go on: python" in error and " --resume\n" in error and error.endswith("stopped\n")
    assert torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"] == 4
    Stop.signal = 0
    harness.launch(dpo.train, config_of(toy, tmp_path / "cut", resume=True))
    assert same(tmp_path / "cut", straight)
    assert not any((tmp_path / "cut" / name).exists() for name in (".process", "state-before.pt"))


@pytest.mark.parametrize("given, printed", [
    ("dpo.py --epochs 2", "python dpo.py --epochs 2 --out runs/x --resume"),
    ("dpo.py --resume True --out runs/x", "python dpo.py --out runs/x --resume"),
    ("dpo.py --out=runs/x --resume=True", "python dpo.py --out=runs/x --resume"),
    ("dpo.py --resume --out runs/x --quiet", "python dpo.py --out runs/x --quiet --resume")])
def test_printed_command_is_not_the_one_that_goes_on(given, printed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", given.split())
    assert command_that_resumes(tmp_path / "runs" / "x") == printed


def test_second_interruption_waits():
    Stop.stepping = True
    Stop.handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        Stop.handle(signal.SIGINT, None)
    Stop.stepping, Stop.signal = False, 0
    with pytest.raises(KeyboardInterrupt):
        Stop.handle(signal.SIGTERM, None)                        # between steps nothing has to be waited for


def test_default_run_has_nothing_to_resume(toy, tmp_path, monkeypatch, straight):
    """Without --save_every a checkpoint is due after a time, and seldom where writing it is slow."""
    saved, clock = [], [0.0]
    checkpoint = harness.Run.checkpoint

    def slowly(run):
        saved.append(run.step)
        checkpoint(run)
        clock[0] += 50 if len(saved) > 1 else 1

    def tick(run, step, metrics, log=harness.Run.log):
        clock[0] += 70
        log(run, step, metrics)

    monkeypatch.setattr(harness.Run, "checkpoint", slowly)
    monkeypatch.setattr(harness.Run, "log", tick)
    monkeypatch.setattr(harness.run.time, "time", lambda: clock[0])
    harness.launch(dpo.train, config_of(toy, tmp_path / "run"))
    assert saved == [2, 4]                                      # then not for 20 times 50 seconds
    assert same(tmp_path / "run", straight)


@pytest.mark.parametrize("options, lines", [
    ({}, [f"step {step} of 11, about {left} min left" for step, left in (
        (2, 10), (4, 8), (6, 6), (8, 4), (10, 1))]),
    ({"save_every": 1}, []), ({"quiet": True}, [])])
def test_long_run_into_a_file_is_silent(toy, tmp_path, monkeypatch, capsys, options, lines):
    """A log of nohup has no bar. It has a line with every checkpoint that is due after a time."""
    clock = [0.0]

    def tick(run, step, metrics, log=harness.Run.log):
        clock[0] += 70
        log(run, step, metrics)

    monkeypatch.setattr(harness.Run, "log", tick)
    monkeypatch.setattr(harness.run.time, "time", lambda: clock[0])
    harness.launch(dpo.train, config_of(toy, tmp_path / "run", **{"quiet": False} | options))
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")] == lines


def test_candidates_that_took_minutes_are_drawn_again(toy, tmp_path, monkeypatch):
    run, made = started(toy, tmp_path / "run"), []
    rows = [Ranking("ab", ["c", "d"], [1.0, 0.5], ended=[True, False])]

    def make():
        made.append(1)
        return rows

    assert directory.kept(run, "candidates", make) == rows and not (run.out / "candidates.pt").exists()
    monkeypatch.setattr(directory, "SLOW_SECONDS", -1)
    run.counts["tokens_generated"] = 7
    assert directory.kept(run, "candidates", make) == rows and len(made) == 2
    run.config = dataclasses.replace(run.config, resume=True)
    run.counts["tokens_generated"] = 0
    assert directory.kept(run, "candidates", make) == rows and len(made) == 2
    assert run.counts["tokens_generated"] == 7                   # what they cost counts
    (run.out / "candidates.pt").write_bytes(b"cut")
    assert directory.kept(run, "candidates", make) == rows and len(made) == 3
    directory.give_back(run.out, run.lock)
    again = started(toy, tmp_path / "run", resume=True)          # there is no checkpoint yet: it begins anew
    assert not again.resumes


# ---- what a crash leaves

@pytest.fixture(scope="module")
def cut(toy, tmp_path_factory):
    """The directory of a run that was killed after two checkpoints."""
    out = tmp_path_factory.mktemp("cut") / "run"
    with killed_after(4):
        harness.launch(dpo.train, config_of(toy, out, save_every=2))
    assert {"state.pt", "state-before.pt", "args.json", "metrics.jsonl"} <= {*os.listdir(out)}
    return out


def damaged(content, kind, place):
    place = min(int(place * len(content)), len(content) - 1)
    before, byte, after = content[:place], content[place], content[place + 1:]
    return {"cut": before, "padded": before + bytes(40), "appended": content + b"\0{torn",
            "flipped": before + bytes([byte ^ 255]) + after, "empty": b""}[kind]


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(name=st.sampled_from(["state.pt", "args.json", "metrics.jsonl", "state-before.pt"]),
                  kind=st.sampled_from(["cut", "padded", "appended", "flipped", "empty"]),
                  place=st.floats(0, 1))
def test_damaged_file_of_a_run_is_a_traceback(name, kind, place, toy, cut, tmp_path):
    out = tmp_path / "again"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(cut, out)
    (out / name).write_bytes(damaged((out / name).read_bytes(), kind, place))
    try:
        result = harness.launch(dpo.train, config_of(toy, out, save_every=2, resume=True))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert math.isfinite(result["eval/loss"])
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            json.loads(line)


def test_flipped_byte_of_a_checkpoint_goes_unseen(cut, tmp_path):
    """In values or names of a record: the checkpoint before is taken. Between records it changes nothing."""
    good, found = directory.load_plain(cut / "state.pt"), set()
    file = shutil.copytree(cut, tmp_path / "again") / "state.pt"
    content = file.read_bytes()
    for place in range(200):
        file.write_bytes(damaged(content, "flipped", place / 200))
        state = directory.load_state(file.parent)
        found.add(state["step"])
        if state["step"] == good["step"]:
            for name, weight in good["trained"].items():
                assert torch.equal(weight, state["trained"][name])
            assert str(state["optimizer"]) == str(good["optimizer"])
    assert good["step"] - 2 in found


@pytest.mark.parametrize("mask", [1, 16, 255])
def test_flipped_byte_of_a_list_of_records_goes_unseen(mask, tmp_path):
    """Every byte behind the records: an error, or what was saved. A record may be marked as a folder."""
    saved = {"step": 3, "trained": {str(i): torch.full((2, 3), i + 0.5) for i in range(3)}}
    file = tmp_path / "state.pt"
    torch.save(saved, file)
    content = file.read_bytes()
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        flipped = bytes([content[place] ^ mask])
        file.write_bytes(content[:place] + flipped + content[place + 1:])
        try:
            assert str(directory.load_plain(file)) == str(saved), place
        except directory.UNREADABLE:
            pass


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(name=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json",
                                        "tokenizer_config.json", "generation_config.json"]),
                  kind=st.sampled_from(["cut", "padded", "appended", "flipped", "empty"]),
                  place=st.floats(0, 1))
def test_damaged_file_of_a_policy_is_a_traceback(name, kind, place, toy, tmp_path):
    model = tmp_path / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(toy, model)
    (model / name).write_bytes(damaged((model / name).read_bytes(), kind, place))
    try:
        run = started(toy, tmp_path / "run", policy=str(model))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        directory.give_back(run.out, run.lock)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"runs": [}', b'{"runs": null}',
                                     b'{"runs": [5]}', b'{"config": 5}', b'{"machines": []}'])
def test_damaged_results_are_a_traceback(content, tmp_path):
    (tmp_path / "dpo.json").write_bytes(content)
    with pytest.raises(UserError, match="dpo.json cannot be read .*: restore or delete it"):
        tables.report("dpo", tmp_path)


def test_checkpoint_before_the_last_is_not_used_or_gives_another_run(toy, cut, tmp_path, straight, capsys):
    for name in ("state.pt", "metrics.jsonl"):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(cut, tmp_path / "again")
        file = tmp_path / "again" / name
        file.write_bytes(file.read_bytes()[:-200] + bytes(7))
        harness.launch(dpo.train, config_of(toy, tmp_path / "again", save_every=2, resume=True))
        error = capsys.readouterr().err
        assert ("going on from state-before.pt, step 2" in error) == (name == "state.pt")
        assert same(tmp_path / "again", straight)


def test_other_data_or_weights_are_resumed_on(toy, cut, tmp_path):
    shutil.copytree(toy, tmp_path / "model")
    rows = (toy / "pairs.jsonl").read_text(encoding="utf-8").splitlines(True)
    for what, change in (
            ("data file is", lambda: (tmp_path / "model" / "pairs.jsonl").write_text(
                "".join(rows[:-1]), encoding="utf-8")),
            ("initial weights are", lambda: save_toy(tmp_path / "model", tie_word_embeddings=True))):
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(toy, tmp_path / "model")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(cut, tmp_path / "run")
        args = json.loads((cut / "args.json").read_text(encoding="utf-8"))
        args |= {"model": str(tmp_path / "model"), "data": str(tmp_path / "model" / "pairs.jsonl")}
        (tmp_path / "run" / "args.json").write_text(json.dumps(args), encoding="utf-8")
        change()
        config = config_of(tmp_path / "model", tmp_path / "run", save_every=2, resume=True)
        with pytest.raises(UserError, match=f"the {what} not what .*run was begun with"):
            harness.launch(dpo.train, config)


@pytest.mark.parametrize("name", ["reward", "value_model"])
def test_other_reward_or_value_model_is_resumed_on(name, toy, tmp_path):
    path = save_toy(tmp_path / "other", LlamaForSequenceClassification, num_labels=1)
    options = {"reward": str(path)} | ({"value_model": str(path)} if name == "value_model" else {})
    if name == "value_model":
        options["reward"] = str(save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1))
    config = settings(toy, ppo.Config, out=str(tmp_path / "run"), save_every=1, epochs=1.0, kl_coef=0.1,
                      **options)
    with killed_after(1):
        harness.launch(ppo.train, config)
    model = LlamaForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.neg_()
    model.save_pretrained(path)
    with pytest.raises(UserError, match="the base, reward or value model is not what .*run was begun with"):
        harness.launch(ppo.train, dataclasses.replace(config, resume=True))


def test_step_0_is_written_twice_or_kept_samples_are_to_be_deleted(toy, tmp_path, monkeypatch, capsys):
    """Killed between the candidates, which took minutes, and the first checkpoint."""
    monkeypatch.setattr(directory, "SLOW_SECONDS", -1)
    config = settings(toy, pro.Config, out=str(tmp_path / "run"), reward=f"{count.__module__}:count",
                      sources="D", candidates=3, epochs=1.0)
    with killed_after(1):
        harness.launch(pro.train, config)
    assert "to go on:" in capsys.readouterr().err
    harness.launch(pro.train, dataclasses.replace(config, resume=True))
    harness.launch(pro.train, dataclasses.replace(config, out=str(tmp_path / "straight")))
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
                         for name in ("straight", "run"))
    assert resumed == straight


def test_samples_that_are_drawn_again_cut_the_metrics(toy, tmp_path, monkeypatch):
    """There is a checkpoint, and the file of the samples is lost: they are slow again."""
    monkeypatch.setattr(directory, "SLOW_SECONDS", -1)
    config = settings(toy, pro.Config, out=str(tmp_path / "run"), reward=f"{count.__module__}:count",
                      sources="D", candidates=3, epochs=1.0, save_every=1)
    with killed_after(3):
        harness.launch(pro.train, config)
    next((tmp_path / "run").glob("candidates*.pt")).unlink()
    harness.launch(pro.train, dataclasses.replace(config, resume=True))
    harness.launch(pro.train, dataclasses.replace(config, out=str(tmp_path / "straight")))
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
                         for name in ("straight", "run"))
    assert resumed == straight


def count(prompts, responses):
    return [text.count("a") + 0.1 * len(text) for text in responses]


def test_so_few_epochs_that_nothing_is_trained(toy, tmp_path):
    with pytest.raises(UserError, match="nothing to train on: --epochs 0.001 gives no step"):
        harness.launch(dpo.train, config_of(toy, tmp_path / "run", epochs=0.001))
    harness.launch(dpo.train, config_of(toy, tmp_path / "other", epochs=0.0))           # on purpose


def test_disk_without_room_is_found_after_training(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(UserError, match="0 MB are free where .*run lies; the weights take 0 MB"):
        started(toy, tmp_path / "run")


# ---- what texts do to a terminal and to README

def test_control_characters_reach_the_terminal(toy, tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J\r\x9b"
    with pytest.raises(SystemExit):
        in_one_line(raising(UserError(f"no {evil}")))
    harness.warn(f"a {evil}")
    in_one_line(lambda: print(f"{evil}\nnext\tline"))
    shown = capsys.readouterr()
    assert not {"\x1b", "\x07", "\r", "\x9b"} & {*shown.out, *shown.err}
    assert shown.out.endswith("\\x9b\nnext\tline\n") and shown.err.count("\\x1b") == 4


def test_marks_in_stored_names_reach_a_page(monkeypatch):
    text = "| <script>x</script> | <!-- results:end --> a < b |"
    monkeypatch.setattr(docs, "method_block", lambda *args: text)
    assert docs.block("docs/dpo.md") == "| &lt;script>x&lt;/script> | &lt;!-- results:end --> a < b |"
    monkeypatch.setattr(docs, "method_block", lambda *args: "| cpu \x1b]0;x\x07 |\n\n± \r")
    assert docs.block("docs/dpo.md") == "| cpu \\x1b]0;x\\x07 |\n\n± \\x0d"


def test_learning_rate_of_another_model_is_blamed(toy, tmp_path, no_traces):
    with pytest.raises(UserError, match="step .: reward model loss is nan .*; lower --reward_lr, or"):
        started(toy, tmp_path / "run", reward="", reward_lr=1e30)


# ---- the command line

def left(function):
    with pytest.raises(SystemExit) as caught:
        in_one_line(function)
    return caught.value.code


def raising(error):
    def function():
        raise error
    return function


def test_full_memory_of_a_gpu_is_a_traceback(capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
                  RuntimeError("MPS backend out of memory (MPS allocated: 17 GB). Tried to allocate 1 GB")):
        with pytest.raises(SystemExit) as stopped:
            in_one_line(raising(error))
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert " out of memory" in said and "): give --lora_rank 16" in said
    with pytest.raises(RuntimeError, match="shape"):
        in_one_line(raising(RuntimeError("shape [2] is invalid")))


def test_file_that_is_read_by_another_program_ends_a_run(tmp_path, monkeypatch):
    refused, replace = [1, 2], type(tmp_path).replace
    monkeypatch.setattr(tasks.time, "sleep", lambda seconds: None)

    def busy(part, path):
        if refused and refused.pop():
            raise PermissionError(13, "used by another process", str(path))
        return replace(part, path)

    monkeypatch.setattr(type(tmp_path), "replace", busy)
    tasks.write_text(tmp_path / "a.txt", "one\ntwo\n")
    assert (tmp_path / "a.txt").read_bytes() == b"one\ntwo\n" and not refused


def test_command_to_go_on_has_quotes_that_windows_does_not_know(monkeypatch):
    words = ["python", ".\\dpo.py", "--pairs", "a>b", "--out", "runs\\dpo\\001"]
    with monkeypatch.context() as patch:
        patch.setattr(command_line.os, "name", "nt")
        shown = command_line.joined(words)
    assert shown == 'python .\\dpo.py --pairs "a>b" --out runs\\dpo\\001'


def test_what_a_user_causes_is_a_traceback(tmp_path, capsys):
    assert left(raising(UserError("too much"))) == 2 and capsys.readouterr().err == "error: too much\n"
    assert left(lambda: (tmp_path / "missing").read_bytes()) == 2
    assert str(tmp_path / "missing") in (error := capsys.readouterr().err) and error.count("\n") == 1
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert left(lambda: directory.claim(tmp_path / "file" / "run")) == 2
    assert "file" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert left(raising(KeyboardInterrupt())) == 130 and capsys.readouterr().err == "stopped\n"
    with pytest.raises(ZeroDivisionError):                         # a mistake of ours stays one
        in_one_line(lambda: 1 / 0)


def test_full_disk_is_a_traceback_or_damages_the_last_checkpoint(toy, tmp_path, monkeypatch):
    """torch and safetensors raise errors of their own where a disk is full."""
    state = {"step": 1, "trained": {"w": torch.zeros(3)}, "optimizer": {}, "schedule": {}}
    directory.save_state(tmp_path, state)

    def no_room(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 726")

    monkeypatch.setattr(directory.torch, "save", no_room)
    with pytest.raises(OSError, match=r"state.pt.part cannot be written .*is the disk full"):
        directory.save_state(tmp_path, state | {"step": 2})
    monkeypatch.undo()
    assert directory.load_state(tmp_path)["step"] == 1

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    run = started(toy, tmp_path / "run")
    monkeypatch.setattr(type(run.policy), "save_pretrained", full)
    with pytest.raises(OSError, match="run cannot be written .*No space left"):
        harness.run.save_policy(run.policy, run.out, 0)
    with pytest.raises(OSError, match="model.part cannot be written"):
        tasks.save_model(run.policy, run.tokenizer, tmp_path / "model")
    directory.give_back(run.out, run.lock)
    with pytest.raises(RuntimeError, match="out of memory"), tasks.saving(tmp_path):
        raise RuntimeError("CUDA out of memory")


def test_room_for_checkpoints_is_not_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: SimpleNamespace(free=50e6))
    with pytest.raises(UserError, match="50 MB are free where .*; the weights take 51 MB"):
        directory.check_room(tmp_path, 51)
    directory.check_room(tmp_path, 6)
    assert "weights and checkpoints take up to 60 MB" in capsys.readouterr().err
    directory.check_room(tmp_path, 5)
    assert not capsys.readouterr().err


def test_run_of_another_method_is_resumed(toy, tmp_path):
    config = config_of(toy, tmp_path / "run", save_every=1)
    with killed_after(2):
        harness.launch(dpo.train, config)
    flags = {**vars(config), "resume": True}
    known = {field.name for field in dataclasses.fields(pro.Config)}
    other = pro.Config(**{k: v for k, v in flags.items() if k in known})
    with pytest.raises(UserError, match=r"run is a run of dpo\.py, not of pro\.py"):
        harness.start(other)
    harness.launch(dpo.train, dataclasses.replace(config, resume=True))
    (tmp_path / "run" / "state.pt").unlink()
    with pytest.raises(UserError, match="the run in .* is finished: there is nothing to resume"):
        harness.start(dataclasses.replace(config, resume=True))


def test_checkpoint_of_another_method_is_gone_on_with(toy, cut, tmp_path):
    """As after a mix-up of files: args.json says dpo, state.pt is of another script."""
    shutil.copytree(cut, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["method"] == "dpo"
    for name in directory.CHECKPOINTS:
        torch.save(state | {"method": "raft"}, tmp_path / "run" / name)
    with pytest.raises(UserError, match=r"the checkpoint in .* is of raft.py, not of dpo.py"):
        harness.launch(dpo.train, config_of(toy, tmp_path / "run", resume=True))


def test_infinite_gradient_is_logged(toy, tmp_path):
    run = toy_run(toy, out=tmp_path)
    run.bar = SimpleNamespace(set_postfix_str=str)
    run.log(0, {"loss": 1.0, "grad_norm": 2.0})
    with pytest.raises(harness.Diverged, match="^step 2: grad_norm is inf"):
        run.log(1, {"loss": 1.0, "grad_norm": math.inf})
    assert len((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("flags, name", [
    ({"label_noise": 0.3}, "label_noise"), ({"pair_labels": "gold"}, "pair_labels"),
    ({"layers": 3}, "layers"),
    ({"proxy_pairs": "off_policy"}, "proxy_pairs"), ({"rating_noise": 1.0}, "rating_noise")])
def test_option_of_the_embedded_task_is_taken_with_the_users_data(toy, flags, name):
    with pytest.raises(UserError, match=f"--{name} is for the embedded task"):
        check_embedded(settings(toy, **flags))
    check_embedded(settings(toy))
    check_embedded(harness.Config(**flags))
    check_embedded(harness.Config(data="x.jsonl", layers=2))           # the tiny model on the user's prompts


def test_prompt_in_another_encoding_is_a_traceback(toy, tmp_path):
    with pytest.raises(UserError, match="--prompt is not in the encoding of this terminal"):
        asking.ask(settings(toy, prompt="caf\udce9"), "dpo")


def test_late_mistake_is_found_after_the_minutes(toy, tmp_path, monkeypatch):
    """Wrong values that can be seen at the start: no reward model is trained and nothing is sampled first."""
    def early(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr("harness.command_line.load_rewards", early)
    for module, flags, said in (
            (ppo, {"value_model": "./typo"}, "there is no directory ./typo"),
            (raft, {"refresh": True}, "--refresh needs annotators"),
            (dpo, {"pairs": "strong>weak"}, "--pairs 'strong>weak' must be"),
            (decision_transformer, {"steer": "rewrad=3"}, "no attribute 'rewrad'"),
            (steerlm, {"attributes": "wit"}, "has no attribute 'wit'"),
            (steerlm, {"steer": "wit=3", "quality": "score"}, "no attribute 'wit'")):
        with pytest.raises(UserError, match=said):
            harness.start(settings(toy, module.Config, out=str(tmp_path / "run"), **flags))
        assert not (tmp_path / "run").exists()
    row = {"responses": ["a", "b"], "scores": [1, 2], "systems": ["x", "y"]}
    rows = [{"prompt": str(i)} | row for i in range(9)]
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for module in (rrhf, pro, decision_transformer):
        with pytest.raises(UserError, match="no answers of its own by typo"):
            harness.start(settings(toy, module.Config, out=str(tmp_path / "run"), sources="P", systems="typo",
                                   data=str(tmp_path / "ranked.jsonl")))


def test_request_without_tags_is_taken(toy):
    with pytest.raises(UserError, match="--steer is for --objective dt"):
        settings(toy, decision_transformer.Config, objective="rwr", steer="reward=9")
    with pytest.raises(UserError, match="--steer: with --labels none"):
        settings(toy, steerlm.Config, labels="none", steer="score=9")


@pytest.mark.parametrize("text", ["", "  "])
def test_empty_prompt_trains(toy, text):
    with pytest.raises(UserError, match="--prompt is empty"):
        settings(toy, prompt=text)


def test_option_that_is_cut_short_is_guessed(capsys):
    """--limi would pass checks of whole names: that of mine, and that of the referee."""
    with pytest.raises(SystemExit):
        command_line.parser_of(dpo.Config).parse_args(["--limi", "20"])
    assert "--limi" in capsys.readouterr().err


def test_value_model_with_fewer_positions_crashes_on_a_long_row(toy, tmp_path):
    short = save_toy(tmp_path / "short", max_position_embeddings=48)
    run = toy_run(toy)
    assert run.tokenizer.model_max_length == 64
    with pytest.raises(UserError, match="short has 48 positions: lower --max_length"):
        run.load_value_model(str(short))


def test_hub_commit_or_other_number_of_processes_is_refused_or_not_said(toy, tmp_path, monkeypatch, capsys):
    """Neither says that the weights differ, so the run goes on; but a reader of the results should know."""
    config = config_of(toy, tmp_path / "run", save_every=1)
    with killed_after(2):
        harness.launch(dpo.train, config)
    file = tmp_path / "run" / "args.json"
    args = json.loads(file.read_text(encoding="utf-8"))
    assert args["processes"] == 1 and not any(args["commits"])
    file.write_text(json.dumps(args | {"processes": 2, "commits": ["0" * 40]}), encoding="utf-8")
    harness.launch(dpo.train, dataclasses.replace(config, resume=True))
    said = capsys.readouterr().err
    assert "another number of processes" in said and "another commit of a model" in said


def test_environment_of_half_a_torchrun_is_a_traceback(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in harness.ranks.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set, and RANK, LOCAL_RANK, .* is not: .*torchrun"):
        harness.ranks.start("cpu")


def test_closed_stderr_or_a_full_memory_is_a_traceback(monkeypatch, capsys):
    assert left(raising(MemoryError())) == 2 and "the memory is full" in capsys.readouterr().err
    code = "from harness.command_line import in_one_line; in_one_line(lambda: print('done'))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" 2>&-'], cwd=ROOT, timeout=120,
                          stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_mistake_of_the_user_on_the_way_hides_how_to_go_on(toy, tmp_path, monkeypatch, capsys):
    """A reward function that fails after an hour: what was saved is named, as after Ctrl-C."""
    def train(run):
        run.begin()
        directory.save_state(run.out, {"step": 1})
        raise UserError("the judge is gone")

    with pytest.raises(UserError):
        harness.launch(train, config_of(toy, tmp_path / "run"))
    assert not capsys.readouterr().err                       # what --resume would repeat at once is no way on
    with pytest.raises(UserError):
        harness.launch(lambda run: setattr(run, "bar", object()) or train(run),
                       config_of(toy, tmp_path / "later"))
    said = capsys.readouterr().err
    assert "the run's files are in" in said and "to go on:" in said
    with pytest.raises(UserError):
        harness.launch(lambda run: raising(UserError("at once"))(), config_of(toy, tmp_path / "other"))
    assert not capsys.readouterr().err                                    # nothing is there to go on with


def test_damaged_cache_or_a_wrong_size_is_a_traceback_or_poisons_seed_0(tmp_path, capsys):
    (tmp_path / "samples.json").write_text('{"pool": [', encoding="utf-8")
    with pytest.raises(UserError, match=f"samples.json is damaged .*: delete {re.escape(str(tmp_path))}"):
        build.read(tmp_path / "samples.json")
    for words in (["--layers", "0"], ["--seed", "-1"], ["--seed", "9" * 20]):
        assert left(lambda: build.options(words)) == 2 and f"{words[0]} must be" in capsys.readouterr().err
    homes = {build.home(SimpleNamespace(seed=0, layers=layers)) for layers in (-1, 0, 1, 2)}
    assert len(homes) == 4


def test_what_the_cache_keeps_depends_on_the_type_that_a_user_asks_for(monkeypatch, tmp_path):
    """The directory does not name the type, so a run in bfloat16 may not leave other samples or proxies."""
    asked = []
    monkeypatch.setattr(build.common, "load_policy", lambda path, device, dtype: asked.append(dtype))
    monkeypatch.setattr(build.common, "load_tokenizer", lambda *_: None)
    build.load_sft(tmp_path, SimpleNamespace(device="cpu", dtype="bfloat16"))

    def load(*arguments, **_):
        asked.append(arguments[3])
        raise KeyboardInterrupt

    for name in ("load", "load_reward_model"):
        monkeypatch.setattr(build.common, name, load)
    config = SimpleNamespace(device="cpu", dtype="bfloat16", seed=0)
    for call in (lambda: build.rate(tmp_path / "proxy", [], [], config),
                 lambda: build.score_pool(tmp_path, [], config)):
        with pytest.raises(KeyboardInterrupt):
            call()
    assert asked == ["float32"] * 3


def test_command_line_of_the_tasks_has_tracebacks(capsys):
    assert left(lambda: tasks.in_one_line(raising(UserError("no\x1b[2J")))) == 2
    assert capsys.readouterr().err == "error: no\\x1b[2J\n"
    assert left(lambda: tasks.in_one_line(raising(OSError("full")))) == 2
    assert left(lambda: tasks.in_one_line(raising(MemoryError()))) == 2
    assert "the memory is full" in capsys.readouterr().err
    assert left(lambda: tasks.in_one_line(raising(torch.OutOfMemoryError("CUDA out of memory.")))) == 2
    assert "CUDA out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="ours"):
        tasks.in_one_line(raising(RuntimeError("ours")))
    assert left(lambda: tasks.in_one_line(raising(KeyboardInterrupt()))) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_mistake_of_ours_hides_where_the_files_are(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness.Run, "finish", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        harness.launch(dpo.train, config_of(toy, tmp_path / "run", epochs=0.2))
    assert "the run's files are in" in capsys.readouterr().err


def test_closed_pipe_is_a_traceback(toy, tmp_path):
    command = (f'"{sys.executable}" "{ROOT}/dpo.py" --help | head -c 100; echo "${{PIPESTATUS[0]}}"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, encoding="utf-8",
                          timeout=120)
    assert not done.stderr and done.stdout.rstrip().endswith("0")


def test_closed_pipe_is_a_traceback_while_much_is_printed():
    """More than a pipe holds: the write itself fails, not the flush at the end."""
    code = ("from harness.command_line import in_one_line; "
            "in_one_line(lambda: [print('x' * 100) for _ in range(100000)])")
    command = f'"{sys.executable}" -c "{code}" | head -c 100; echo " ${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)
    assert not done.stderr and done.stdout.endswith(" 0\n")


def test_killed_run_resumes_to_the_same_bytes(toy, tmp_path, straight):
    """A real process, killed where nobody can catch it."""
    flags = [f"--{name}={value}" for name, value in (
        ("model", toy), ("data", toy / "pairs.jsonl"), ("reward", "none"), ("max_length", 64),
        ("max_new_tokens", 5), ("lr", 1e-2), ("warmup", 0.0), ("batch_size", 6), ("eval_prompts", 3),
        ("eval_samples", 4), ("device", "cpu"), ("epochs", 2.0), ("eval_every", 3), ("save_every", 1),
        ("out", tmp_path / "killed"))]
    command = [sys.executable, str(ROOT / "dpo.py"), *flags, "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while not (tmp_path / "killed" / "state-before.pt").exists() and process.poll() is None:
        assert time.time() < until
        time.sleep(0.005)
    process.kill()
    process.wait()
    done = subprocess.run([*command, "--resume", "True"], capture_output=True, text=True, encoding="utf-8",
                          timeout=120)
    if process.returncode == 0:                                   # it was faster than we: nothing to resume
        pytest.skip("the run ended before it could be killed")
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "killed", straight)


# ---- odd places

def test_failed_start_hides_its_message_where_its_directory_cannot_be_removed(toy, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for out in (tmp_path / "link", "."):
        with pytest.raises(UserError, match="no such file: absent.jsonl"):
            started(toy, out, data="absent.jsonl")
    assert (tmp_path / "link").is_symlink()


def test_runs_is_a_link_to_nowhere(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "not mounted" / "runs")
    with pytest.raises(OSError, match="runs"):
        directory.free_directory(tmp_path / "runs")


ARGS = dict(model="x", policy="", data="y", seed=0, max_length=64, max_new_tokens=5, temperature=1.0)


@pytest.mark.parametrize("text", ["{", "[]", '{"learning_rate": 1}', "null", json.dumps(ARGS | {"seed": "0"}),
                                  json.dumps(ARGS | {"model": None}), json.dumps(ARGS | {"max_length": "x"})])
def test_policy_whose_args_are_damaged_is_a_traceback(text, toy, tmp_path):
    path = save_toy(tmp_path / "policy")
    (path / "args.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="has no whole args.json: give --policy"):
        asking.ask(settings(toy, policy=str(path), prompt="a"), "dpo")
    (path / "attributes.json").write_text('{"method": "steerlm", "levels": null}', encoding="utf-8")
    with pytest.raises(UserError, match="has no attributes.json of steerlm.py"):
        asking.load_attributes(path, "steerlm")
    (path / "attributes.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="has no attributes.json of steerlm.py"):
        asking.load_attributes(path, "steerlm")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGHUP")
@pytest.mark.parametrize("ignored", [False, True])
def test_closed_terminal_loses_the_run_or_ends_one_under_nohup(ignored, monkeypatch):
    came = signal.SIG_IGN if ignored else signal.SIG_DFL
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--reproduce", "--seed", "3"])
    try:
        signal.signal(signal.SIGHUP, came)
        with pytest.raises(SystemExit):
            harness.main(dpo.Config, dpo.train)
        assert signal.getsignal(signal.SIGHUP) == (came if ignored else command_line.hung_up)
        assert signal.getsignal(signal.SIGTERM) == Stop.handle
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_step_is_not_ended_where_the_terminal_is_gone(toy, tmp_path, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

    def hang_up(run, step, metrics, log=harness.Run.log):
        log(run, step, metrics)
        if step == 1:
            for name in ("stdout", "stderr"):
                monkeypatch.setattr(sys, name, Gone())
            command_line.hung_up(1, None)

    monkeypatch.setattr(harness.Run, "log", hang_up)
    with pytest.raises(SystemExit) as left:
        in_one_line(lambda: harness.launch(dpo.train, config_of(toy, tmp_path / "run")))
    assert left.value.code == 129 and not (tmp_path / "run" / ".process").exists()
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
def test_out_is_not_utf8(toy, tmp_path):
    with pytest.raises(UserError, match="^--out .*not every program can write such a name"):
        harness.start(config_of(toy, tmp_path / os.fsdecode(b"x\xff")))
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode there")
def test_name_of_a_file_is_not_utf8(toy, tmp_path):
    data = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    shutil.copy(toy / "pairs.jsonl", data)
    config = config_of(toy, tmp_path / "run", data=str(data), epochs=0.2)
    harness.launch(dpo.train, config)
    assert directory.read_args(tmp_path / "run")["data"] == str(data)


def test_training_cut_by_a_closed_pipe_counts_as_a_success(toy, tmp_path):
    code = ("import sys, dpo, harness; from conftest import settings; from pathlib import Path; "
            "from harness.command_line import in_one_line\n"
            "def train(run):\n"
            "    for _ in range(100000): print('x' * 100)\n"
            "config = settings(Path(sys.argv[1]), dpo.Config, out=sys.argv[2])\n"
            "in_one_line(lambda: harness.launch(train, config))")
    command = (f'"{sys.executable}" -c "$0" "{toy}" "{tmp_path / "run"}" | head -c 100; '
               'echo " ${PIPESTATUS[0]}"')
    done = subprocess.run(["bash", "-c", command, code], cwd=ROOT, capture_output=True, text=True,
                          encoding="utf-8", timeout=120,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.stdout.endswith(" 141\n") and "Traceback" not in done.stderr


def test_closed_screen_is_a_traceback():
    code = "from harness.command_line import in_one_line; in_one_line(lambda: print('x'))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" >&-'], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
