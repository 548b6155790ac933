"""Every command that the documents and docstrings show is run, at toy size, or NOT_RUN says why not.

All of it happens in one folder, in which every name of the documents is a real thing: SMOLLM2, MODEL and
HuggingFaceTB/SmolLM2-135M-Instruct are tiny models of letters, pairs.jsonl and ranked.jsonl are small files,
RUN is a run's directory, results/ and docs/ are copies. So a command runs as it stands. Flags are only added
(ON_TOP), and only such as the command does not have. The embedded task is small: its models are trained for
seconds, on few prompts. Experiments (--reproduce, --tune) are planned and reported, and none of their runs is
made.

Commands run in this process. Those that go on with another command's work come after it (AFTER).
"""
import contextlib
import dataclasses
import gzip
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import string
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaForSequenceClassification

import harness
import tasks
from conftest import ROOT, method_names, save_toy
from referee import runs, tuning
from referee.arms import config_class, config_of, given_flags
from tasks import build
from test_docs import DOCUMENTS, commands, docstring_commands, read

NOT_RUN = {
    r"python -m pip install": "installs packages",
    r"python -m pytest tests/": "test_workshop.py runs these tests, with and without the bug",
    r"python benchmarks/": "measures for minutes, mostly in processes of its own",
    r"python -m referee (comparison|real_text)": "needs runs that take many hours; test_comparison.py and "
                                                 "test_real_text.py give the same commands on toys",
}
EVALUATION = "--eval_prompts 4 --eval_samples 1 --eval_pairs 8 --max_new_tokens 12"
ON_TOP = {                                               # later entries count where two name one option
    r"python \w+\.py": f"{EVALUATION} --quiet True",
    r"python \w+\.py.* --model": "--max_length 64 --max_new_tokens 8",
    r"python \w+\.py$": "--quiet False",                                    # its tables and picture are made
    r"python raft\.py.* --pool all --refresh True": "--out OUT",                       # docs/raft.md's OUT
    r"python decision_transformer\.py$": "--out runs/decision_transformer/default",    # its page's exercise 1
    r"python steerlm\.py": "--rated 100",
    r"python decision_transformer\.py": "--validation 0.04",               # each level is asked for on them
    r"python -m referee mine": "--model DIR --data pairs.jsonl --max_length 64 --max_new_tokens 8 "
                               "--methods dpo",
    r"python -m tasks\.verifiable": "--train 8 --test 4 --samples 2 --max_new_tokens 8",
    r"python docs/workshop/prepare\.py": "--no_wheels",
}
AFTER = {
    r"python (\w+)\.py.* --prompt": r"python \1.py --seed 0",
    r"python dpo\.py --policy runs/dpo/strong":
        'python dpo.py --pairs "strong>weak" --loss sft --epochs 4 --out runs/dpo/strong',
    r"python decision_transformer\.py --policy runs/decision_transformer/default":
        "python decision_transformer.py",
    r"python ppo\.py --policy OUT":
        "python raft.py --restart True --pool all --refresh True --epochs 4 --lr 1e-3",
    r"python docs/workshop/prepare\.py use FOLDER":
        "python docs/workshop/prepare.py make FOLDER --seeds 0 1 2 3",
    r"python docs/workshop/show\.py runs/dpo/strong":
        'python dpo.py --pairs "strong>weak" --loss sft --epochs 4 --out runs/dpo/strong',
    r"python docs/workshop/show\.py runs/bug04": "python dpo.py --epochs 0.5 --out runs/bug04",
    r"python docs/workshop/plant\.py (\d+) --undo": r"python docs/workshop/plant.py \1",
    r"python docs/workshop/collect\.py wall": "python dpo.py --seed 7 --out wall/seed7",
}
NO_RUN = r"--(reproduce|prompt|help)\b"                      # nothing is added to these: they train nothing
SEEDS = 0, 1, 2, 3, 7                                    # of the embedded task's models, in the commands


def plain(command):
    """Without a comment, white space and environment variables."""
    return shlex.join(shlex.split(command[command.index("python "):], comments=True))


def shown():
    """{command: where it stands}."""
    texts = {path: commands(read(path)) for path in DOCUMENTS}
    for path in (ROOT / f"{name}.py" for name in method_names()):
        texts[path] = docstring_commands(read(path))
    found = {}
    for path, lines in texts.items():
        for line in lines:
            found.setdefault(plain(line), []).append(path.relative_to(ROOT).as_posix())
    return found


def entries(table, command):
    """What a table has for a command."""
    return [entry for pattern, entry in table.items() if re.match(pattern, command)]


def first_of(command):
    """The commands that must come before this one."""
    return [plain(re.match(pattern, command).expand(first)) for pattern, first in AFTER.items()
            if re.match(pattern, command)]


SHOWN = shown()


def on_top(command):
    """The flags that are added to a command."""
    words, added = shlex.split(command), {}
    if re.search(NO_RUN, command):
        return []
    for flags in entries(ON_TOP, command):
        for flag, *values in (entry.split() for entry in re.split(r"(?:^| )(?=--)", flags) if entry):
            added[flag] = values
    if re.match(r"python \w+\.py", command):
        known = {f"--{option.name}" for option in dataclasses.fields(config_class(words[1][:-len(".py")]))}
        added = {flag: values for flag, values in added.items() if flag in known}
    return [word for flag, values in added.items() if flag not in words for word in (flag, *values)]


# ------------------------------------------------------------------------------------------------- the folder

LETTERS = string.ascii_letters + string.digits + " .,:<>-[]\n"
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"
MODELS = "HuggingFaceTB/SmolLM2-135M-Instruct", "SMOLLM2", "MODEL", "DIR"
SYSTEMS = "gpt-4", "davinci", "gpt-4-1106", "text_davinci_003", "strong"
ANSWERS = " yes it is", " well yes", " hm", " no", " never ever"


def rows():
    """{file: its rows}, in the forms that the documents describe."""
    numbers = range(18)
    pairs = [{"prompt": f"say it {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in numbers]
    ranked = [{"prompt": f"say it {i}:", "responses": [f"{text} {i}" for text in ANSWERS],
               "scores": [4, 3, 2, 1, 0], "systems": SYSTEMS} for i in numbers]
    rated = [{"prompt": f"say it {i}:", "completion": f"{text} {i}",
              "attributes": {"helpfulness": 9 - 2 * k, "verbosity": (i + k) % 10}}
             for i in numbers for k, text in enumerate(ANSWERS)]
    transcripts = [{key: f"\n\nHuman: hi {i}\n\nAssistant: {text} {i}"
                    for key, text in (("chosen", "yes"), ("rejected", "no"))} for i in numbers]
    prompts = [{"prompt": f"say it {i}:"} for i in numbers]
    return {"pairs.jsonl": pairs, "my_pairs.jsonl": pairs, "prompts.jsonl": prompts, "FILE": prompts,
            "rated.jsonl": rated, "ranked.jsonl": ranked, "own_ranked.jsonl": ranked,
            "alpacaeval_ranked.jsonl.gz": ranked, "hh_harmless.jsonl.gz": transcripts}


def furnish(folder):
    """Write the models and files that the commands name."""
    for name in MODELS:
        save_toy(folder / name, letters=LETTERS, chat=TEMPLATE)
    save_toy(folder / "REWARD_MODEL", LlamaForSequenceClassification, LETTERS, num_labels=1)
    labels = ["NEGATIVE", "POSITIVE"]
    save_toy(folder / "my_reward_model", LlamaForSequenceClassification, LETTERS,
             id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    (folder / "RUN").mkdir()
    (folder / "RUN" / "metrics.jsonl").write_text('{"step": 0, "eval/kl": 0.0}\n', encoding="utf-8")
    for name, lines in rows().items():
        with (gzip.open if name.endswith(".gz") else open)(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in lines)


def build_small(cache):
    """The embedded task's models of SEEDS, where the scripts look for them: a small build, and its copy."""
    digest = build.code_hash()
    small = {"DEMONSTRATIONS": 2500, "POOL": (8, 16), "TEST": (4, 4), "RANKED": 32}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(tasks, "CACHE", cache)
        patch.setattr(build, "code_hash", lambda: digest)                 # that of a build of the usual size
        for name, size in small.items():
            patch.setattr(build, name, size)
        home = build.models(harness.Config())
    texts = build.read(home / "demonstrations.json")[:200]         # two scripts train on them, in many passes
    tasks.write_json(home / "demonstrations.json", texts)
    for seed in SEEDS[1:]:
        shutil.copytree(home, home.with_name(f"seed{seed}"))


def planned(method_name, config, *where):
    """In place of runs.complete: what is to be run is listed, with valid settings. None of it is run."""
    seeds, results_dir, runs_dir, experiments = where
    work = runs.Work(method_name, given_flags(config), seeds, results_dir, runs_dir, experiments)
    todo = [config_of(arm, seed=seed) for seed in seeds for arm in work.arms.values()]
    assert todo


class Stage:
    """The folder, and what was run in it."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}
        left_out = ".git", "cache", "runs", "tests", "old", "__pycache__", "*.egg-info", ".venv", "wall"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
        furnish(folder)
        build_small(folder / "cache")

    def __call__(self, command):
        """Run a command, once, after those that it needs."""
        if command not in self.made:
            for first in first_of(command):
                assert self(first).status == 0, f"{first}: {self(first).err}"
            self.made[command] = self.start(shlex.split(command)[1:] + on_top(command))
        return self.made[command]

    def start(self, words):
        """What `python WORDS` does, in this process: its exit status, and what it printed."""
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        script = ROOT / words[0] if (ROOT / words[0]).parent == ROOT else self.folder / words[0]
        status = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.delenv("ALIGNMENT_CACHE", raising=False)
            patch.setattr(tasks, "CACHE", self.folder / "cache")
            for module in (harness.command_line, harness.asking):
                patch.setattr(module, "ROOT", self.folder)
            for module in (runs, tuning):
                patch.setattr(module, "complete", planned)
            patch.setattr(runs, "report", lambda *found: None)                # what --report prints, at last
            patch.setattr(subprocess, "run", self.process)
            patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else [str(script), *words[1:]])
            patch.setattr(sys, "path", [str(script.parent), *sys.path])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                if words[0] == "-m":
                    runpy.run_module(words[1], run_name="__main__")
                else:
                    runpy.run_path(str(script), run_name="__main__")
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    streams[1].write(end.code)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                sys.modules.pop("prepare", None)                   # the copy's; check.py imports it
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode("utf-8") for stream in streams)
        return SimpleNamespace(status=status, out=out, err=err)

    def process(self, words, **kwargs):
        """In place of subprocess.run, for prepare.py: Python commands run here, too."""
        assert words[0] == sys.executable
        done = self.start(words[1:])
        return SimpleNamespace(returncode=done.status, stdout=done.out)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    for needed in ("scipy", "matplotlib"):
        pytest.importorskip(needed)
    return Stage(tmp_path_factory.mktemp("commands") / "project")


# ------------------------------------------------------------------------------------------------- the checks

@pytest.mark.parametrize("command", sorted((command for command in SHOWN if not entries(NOT_RUN, command)),
                                           key=lambda command: len(first_of(command))))
def test_command_that_is_shown_fails(stage, command):
    done = stage(command)
    assert done.status == 0, f"{command}  # in {', '.join(SHOWN[command])}\n{done.out[-500:]}{done.err}"


@pytest.mark.parametrize("pattern", [*NOT_RUN, *ON_TOP, *AFTER])
def test_entry_of_a_table_is_for_no_command(pattern):
    assert any(re.match(pattern, command) for command in SHOWN)


def test_what_a_command_needs_is_not_shown():
    for command in SHOWN:
        assert {first.removesuffix(" --seed 0") for first in first_of(command)} <= SHOWN.keys(), command


def test_added_flag_takes_the_place_of_a_commands_own():
    assert on_top("python dpo.py --eval_prompts 9 --quiet False") == ["--eval_samples", "1", "--eval_pairs",
                                                                      "8", "--max_new_tokens", "12"]
    assert "--eval_pairs" not in on_top("python ppo.py") and on_top("python ppo.py --help") == []
    assert not [command for command in SHOWN if {*on_top(command)} & {*re.findall(r"--\w+", command)}]


# --------------------------------------------------------------------------------------- every check can fail

@pytest.mark.parametrize("command, said", [
    ("python dpo.py --model DIR --data your_pairs.jsonl", "no such file: your_pairs.jsonl"),
    ("python dpo.py --model DIR --data prompts.jsonl --reward none", "no preference pairs"),
    ("python ppo.py --model MODEL --data prompts.jsonl", "--reward"),
    ("python steerlm.py --model MODEL --data rated.jsonl --quality kindness", "--quality must name"),
    ("python dpo.py --model DIR --data ranked.jsonl --pairs 'gpt-5>davinci'", "gpt-5"),
    ("python dpo.py --prompt 'how was the score?' --policy DIR", "no args.json"),
    ("python dpo.py --policy DIR", "words of the film reviews: give --data"),
    ("python -m referee dpo --report --beta 0.7", "beta=0.7"),
    ("python -m referee dpo --seed", "expected one argument"),
    ("python docs/workshop/collect.py nowhere", "no finished run"),
    ("python docs/workshop/plant.py 11", "there is no bug 11")])
def test_command_that_must_fail_passes(stage, command, said):
    done = stage(command)
    assert done.status in (1, 2) and said in done.err, done.err


def test_script_that_is_not_there_passes(stage):
    assert not entries(NOT_RUN, "python lm.py")                       # so the test above would run it
    with pytest.raises(FileNotFoundError):
        stage.start(["lm.py"])
    with pytest.raises(ImportError):
        stage.start(["-m", "tasks.make"])


def test_command_of_two_documents_is_found_twice_or_its_comment_counts():
    assert plain("A=1 python dpo.py  --beta 3   # why") == "python dpo.py --beta 3"
    assert {"README.md", "README.zh.md", "docs/dpo.md", "dpo.py"} <= {*SHOWN["python dpo.py"]}
