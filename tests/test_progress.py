"""Those who wait see what is going on: on a terminal, after three seconds, and nowhere else."""
import functools
import io
import os
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

import harness
from conftest import PAIRS, ROOT, count_a, pair_task, toy_run
from harness import command_line, directory, progress
from tasks import Demonstration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(monkeypatch):
    """show(stream): bars come at once, and go to this stream."""
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(progress, "tqdm", functools.partial(tqdm, mininterval=0))
    monkeypatch.setattr(progress.Show, "on", True)

    def to(stream):                          # not in the fixture: pytest sets stderr anew before the test
        monkeypatch.setattr(sys, "stderr", stream)
        return stream
    return to


def work(toy, tmp_path):
    run = toy_run(toy, pair_task(count_a), out=tmp_path)
    harness.response_logps(run, PAIRS[:5])
    run.evaluate()
    assert list(progress.steps(["abc", "de"], "prediction model")) == ["abc", "de"]


def test_long_work_is_done_in_silence(toy, tmp_path, show):
    terminal = show(Terminal())
    work(toy, tmp_path)
    shown = terminal.getvalue()
    for what, total in (("log-probs", 5), ("sampling", 6), ("KL to the initial policy", 6),
                        ("prediction model", 2)):
        assert re.search(rf"{what}: 100%.* {total}/{total} ", shown), what
    assert max(map(len, re.split("[\r\n]", shown))) <= 80
    assert not shown.splitlines()[-1].strip()                                    # no bar stays on the screen


def test_bar_of_a_stage_stays_on_the_screen(toy, show):
    terminal, run = show(Terminal()), toy_run(toy)
    harness.train_sft(run.policy, run.tokenizer, [Demonstration("a", "b")], harness.Recipe(lr=1e-3))
    assert "SFT: " in terminal.getvalue() and not terminal.getvalue().splitlines()[-1].strip()


@pytest.mark.parametrize("change", ["file", "quiet", "short"])
def test_bar_is_written_to_a_file_or_with_quiet_or_for_short_work(toy, tmp_path, show, monkeypatch, change):
    stream = show(io.StringIO() if change == "file" else Terminal())
    if change == "quiet":
        progress.begin(False, "loading")
    if change == "short":
        monkeypatch.setattr(progress, "SECONDS", 60)
    work(toy, tmp_path)
    assert not stream.getvalue()


def test_first_line_comes_late_or_in_a_pipe(show, monkeypatch):
    """After the imports, before anything is loaded."""
    terminal, loaded = show(Terminal()), []
    monkeypatch.setattr(harness.command_line, "output_directory", lambda config: loaded.append(
        terminal.getvalue()) or sys.exit())
    for quiet in (False, True):
        with pytest.raises(SystemExit):
            harness.start(harness.Config(data="pairs.jsonl", model="m", seed=7, quiet=quiet))
    assert loaded[0].endswith(": loading the model m and the data pairs.jsonl, seed 7\n")
    assert loaded[1] == loaded[0]
    command = [sys.executable, "dpo.py", "--model", "nowhere", "--data", "nothing.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_directory_on_another_drive_ends_a_finished_run(toy, tmp_path, monkeypatch):
    """os.path.relpath raises ValueError on Windows where no path leads from one drive to another."""
    def other_drive(path):
        raise ValueError("path is on mount 'Z:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert directory.short(tmp_path / "run") == str(tmp_path / "run")
    assert f"--out {tmp_path / 'run'}" in command_line.command_that_resumes(tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert directory.short(tmp_path / "run") == "run"
