"""Whole runs of the methods through their command line, as a user starts them.

The methods are found by looking (conftest.method_names). What holds for every method runs over all of them, with
the short flags QUICK of experiments/<method>.py. What holds for a kind of method runs over those whose Config has
a certain option. The table OWN says what single methods add.

A process costs seconds, so nearly every run is made inside this process: `script` runs the file of a method as
Python runs a script, `here` and `train` call harness.main with what the file defines. One real process is kept for
each kind of thing. The tests of the embedded task come last: they build its models where the cache lacks them.
"""
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import runpy
import shutil
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig,
                          LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast)

import common
import harness
import tasks
from conftest import method_names
from tasks import build

ROOT = Path(__file__).resolve().parents[1]
LN2 = 0.6931
LETTERS = string.ascii_letters + string.digits + " .,:<>\n"
SMALL = ["--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 2, "--eval_samples", 1, "--epochs", 0.5,
         "--batch_size", 8, "--lr", 1e-3]

METHODS = {name: importlib.import_module(name) for name in method_names()}
QUICK = {name: importlib.import_module(f"experiments.{name}").QUICK for name in METHODS}


def options(method):
    return {field.name: field.default for field in dataclasses.fields(METHODS[method].Config)}


def having(option, without=""):
    """The methods that have one option and lack another."""
    return [name for name in METHODS if option in options(name) and without not in options(name)]


ON_POLICY = having("kl_coef", without="candidates")         # each step scores samples of its own
ON_CANDIDATES = having("candidates", without="steer")       # scored answers are collected, then trained on
ON_RANKINGS = having("sources", without="steer")            # these may come from the data
CONDITIONED = having("steer")                               # the policy is asked for attributes

every = pytest.mark.parametrize("method", METHODS)
on_policy = pytest.mark.parametrize("method", ON_POLICY)
on_candidates = pytest.mark.parametrize("method", ON_CANDIDATES)
on_rankings = pytest.mark.parametrize("method", ON_RANKINGS)
conditioned = pytest.mark.parametrize("method", CONDITIONED)


# -------------------------------------------------------------------------------------- what single methods add

# default     an option and its default
# steps       of the short run
# metrics     names in every row of a step
# after_only  rows of the table with a number after training only
# resume      (flags, steps) of the run that is cut, and {metric: how many values it takes}
# rates       more runs whose learning rate must end at 0
# bad         (flags, what the error line says)
# noise       does noise that is the same for all answers to a prompt change the gradients?
# embedded    (flags, steps) on the embedded task, and whether it samples there
# smollm2     flags with SmolLM2
OWN = {
    "dpo": dict(
        default=("beta", 0.1), steps=3, resume=([], 5, {}),
        bad=[(["--beta", 0], ["--beta", "above 0"]), (["--beta", -0.1], ["--beta", "above 0", "-0.1"]),
             (["--pairs", "strong>weak"], ["--pairs", "names no systems"])]),
    "ppo": dict(
        default=("kl_coef", 0.05), steps=3,
        metrics={"loss/policy", "loss/value", "val/explained_variance", "policy/clipfrac", "policy/approxkl"},
        scores=["objective/scores"],
        resume=(["--kl_target", 0.001, "--kl_horizon", 20], 5, {"objective/kl_coef": 5}),
        rates=[["--minibatch_size", 2], ["--batch_size", 64, "--minibatch_size", 16]],    # larger than the data
        bad=[(["--kl_coef", -0.1], ["--kl_coef", "must not be negative", "-0.1"]),
             (["--minibatch_size", 3], ["--batch_size 8", "--minibatch_size 3"]),
             (["--minibatch_size", 16], ["--batch_size 8", "--minibatch_size 16"]),
             (["--kl_target", 0], ["--kl_target", "above 0"]), (["--ppo_epochs", 0], ["--ppo_epochs", "above 0"])],
        noise=True, embedded=(["--epochs", 0.25], 1, True), smollm2=["--ppo_epochs", 1]),
    "remax": dict(
        default=("kl_coef", 0.05), steps=3, metrics={"loss", "objective/greedy_scores"},
        scores=["objective/scores", "objective/greedy_scores"], resume=([], 5, {}), rates=[[]],
        bad=[(["--kl_coef", -0.1], ["--kl_coef", "must not be negative", "-0.1"]),
             (["--reward_clip", 0], ["--reward_clip", "above 0"]),
             (["--variance_prompts", 1], ["--variance_prompts", "at least 2"])],
        embedded=(["--epochs", 0.25, "--reward", "gold"], 1, True), smollm2=[]),
    "rrhf": dict(
        default=("sources", "DP"), steps=3, after_only=["to_best"],
        resume=(["--rounds", 2, "--epochs", 0.5], 6, {}),       # cut in the first round, which has three steps
        rates=[["--rounds", 2]],
        bad=[(["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
             (["--rounds", 0], ["--rounds", "above 0"]), (["--length_penalty", -1], ["--length_penalty", "not be negative"])],
        noise=False, embedded=(["--epochs", 0.25, "--sources", "D", "--eval_pairs", 32], 2, False)),
    "pro": dict(
        default=("sft_weight", 0.05), steps=3, resume=([], 5, {}),
        bad=[(["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
             (["--terms", -1], ["--terms", "not be negative"]), (["--sft_weight", -1], ["--sft_weight", "not be negative"])],
        embedded=(["--epochs", 0.25, "--eval_pairs", 32, "--label_noise", 0], 2, False), smollm2=["--sources", "P"]),
    "rso": dict(
        default=("beta", 0.5), steps=3, resume=([], 5, {}), rates=[["--schedule", "cosine"]],
        bad=[(["--candidates", 3, "--num_samples", 4], ["--candidates must be at least --num_samples 4, not 3"]),
             (["--num_samples", 1], ["--num_samples", "at least 2"]), (["--beta", -0.1], ["--beta", "not be negative"]),
             (["--gamma", 0], ["--gamma", "above 0"]), (["--loss", "dpo"], ["--loss", "dpo"])],
        noise=False, embedded=(["--epochs", 0.125], 2, False)),
    "raft": dict(
        default=("ranking", "local"), steps=3, after_only=["to_best"],
        resume=(["--rounds", 2, "--epochs", 0.5, "--pool", "all", "--restart", True, "--kl_coef", 0.1], 6,
                {"round/mean": 2}),
        rates=[["--rounds", 2, "--schedule", "linear"]],
        bad=[(["--candidates", 0], ["--candidates", "above 0"]), (["--share", 1.5], ["--share", "[0, 1]"]),
             (["--share", 0.5], ["--share is for --ranking global"]), (["--kl_coef", -1], ["--kl_coef", "not be negative"]),
             (["--rare", "say"], ["--rare say", "every train prompt"]), (["--refresh", True], ["--refresh needs annotators"])],
        noise=False, smollm2=[],
        embedded=(["--rounds", 2, "--prompts", 32, "--epochs", 1, "--candidates", 4, "--refresh", True,
                   "--rare", "villain"], 2, True)),
    "decision_transformer": dict(
        default=("bins", 10), steps=3, attribute="reward", resume=(["--epochs", 1, "--reward_noise", "response"], 8, {}),
        embedded=(["--epochs", 0.02], 3, None), attribute_of_reviews="reward"),
    "steerlm": dict(
        default=("share", 1.0), steps=3, attribute="score",
        resume=(["--rounds", 1, "--bootstrap_epochs", 0.3], 6, {}),                            # cut in the round
        embedded=(["--epochs", 0.01, "--bootstrap_epochs", 0.05, "--predictor_epochs", 0.02], 4, None),
        attribute_of_reviews="sentiment", smollm2=["--predictor_epochs", 0.2, "--epochs", 0.15]),
}


def own(method, key, default=None):
    return OWN.get(method, {}).get(key, default)


def own_cases(key):
    """Every case that OWN has under this key, for parametrize: the method and the case."""
    rows = [(name, case) for name in METHODS for case in own(name, key, [])]
    return [pytest.param(name, *case, id=f"{name} {' '.join(map(str, case[0]))}") for name, case in rows]


def test_every_method_of_this_table_is_found():
    assert not OWN.keys() - METHODS.keys()


# ---------------------------------------------------------------------------------------------- models and data

def characters(bos=None, pad="<pad>", alphabet=LETTERS):
    """A token for each character; EOS is always there."""
    special = ["<eos>", *{token for token in (bos, pad) if token and token != "<eos>"}]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*special, *alphabet])}, unk_token="a"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token=bos, pad_token=pad)


def save_toy(folder, tokenizer, model_class=LlamaForCausalLM, spoil=None, **settings):
    """A random Llama of two layers; `spoil` may change it before it is saved."""
    torch.manual_seed(0)
    model = model_class(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **settings))
    if spoil:
        with torch.no_grad():
            spoil(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward(folder, tokenizer=None, **settings):
    """A reward model with a wide enough head that texts get scores of their own."""
    return save_toy(folder, tokenizer or characters(), LlamaForSequenceClassification, num_labels=1,
                    initializer_range=0.3, **settings)


def spoil_everything(model):
    model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan


def spoil_letter_q(model):
    model.model.embed_tokens.weight[characters().convert_tokens_to_ids("q")] = math.nan


def spoil_head(model):
    model.score.weight.fill_(math.nan)


def set_eos_logit(sign):
    """Every hidden state gets a large first entry, and the head reads it for EOS alone: a logit of about -60 or 60."""
    def spoil(model):
        model.model.embed_tokens.weight[:, 0] = 10
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[model.config.eos_token_id, 0] = sign * 10
    return spoil


def write_rows(path, rows):
    opened = gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else open(path, "w", encoding="utf-8")
    with opened as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def pair_rows(n=40, **changes):
    return [{"prompt": f"say it {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} | changes for i in range(n)]


def hh_rows():
    return [{"chosen": f"\n\nHuman: hi {i}\n\nAssistant: yes {i}", "rejected": f"\n\nHuman: hi {i}\n\nAssistant: no {i}"}
            for i in range(20)]


def ranked_rows():
    return [{"prompt": f"say {i}:", "responses": [f" yes {i}", f" hm {i}", f" no {i}"], "scores": [2, 1, 0],
             "systems": ["strong", "medium", "weak"]} for i in range(20)]


def chat_rows():
    return [{"prompt": [{"role": "user", "content": f"hi {i}"}], "chosen": [{"role": "assistant", "content": f"yes {i}"}],
             "rejected": [{"role": "assistant", "content": f"no {i}"}]} for i in range(20)]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy") / "model", characters())


@pytest.fixture(scope="session")
def reversed_toy(tmp_path_factory):
    """As the toy, but the vocabulary is in the opposite order."""
    return save_toy(tmp_path_factory.mktemp("reversed") / "model", characters(alphabet=LETTERS[::-1]))


@pytest.fixture(scope="session")
def chat_toy(tmp_path_factory):
    tokenizer = characters()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    return save_toy(tmp_path_factory.mktemp("chat") / "model", tokenizer)


@pytest.fixture(scope="session")
def toy_reward(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows())


@pytest.fixture(scope="session")
def prompts_only(tmp_path_factory):
    rows = [{"prompt": f"say it {i}:"} for i in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


# --------------------------------------------------------------------------------------------------------- runs

def command(*arguments, **environment):
    """A real process, run to its end; unlike run_script it serves fixtures of any scope."""
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                             encoding="utf-8", timeout=900, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)
    return SimpleNamespace(status=process.returncode, out=process.stdout, err=process.stderr)


def in_process(start, method, *arguments, cache):
    """start() with this command line and cache: exit status and what it printed."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{method}.py", *map(str, arguments)])
        patch.setattr(tasks, "CACHE", cache)
        try:
            start()
        except SystemExit as stop:
            status = stop.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def script(method, *arguments, cache):
    """<method>.py as Python runs a script, but in this process."""
    return in_process(lambda: runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__"), method, *arguments,
                      cache=cache)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Reward models that runs of this file train; they are named by all that makes them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(shared_cache):
    """A method's command line in this process: harness.main with what its file defines."""
    def run(method, *arguments, cache=shared_cache):
        module = METHODS[method]
        return in_process(lambda: harness.main(module.Config, module.train, getattr(module, "answer", None)),
                          method, *arguments, cache=cache)
    return run


@pytest.fixture
def train(here, toy, pairs, tmp_path):
    """A short run of a method on the toy and the pairs, unless others are given. Later flags count.

    Returns status, out, err, and the folder that it was told to write.
    """
    def run(method, *flags, model=toy, data=pairs, out=tmp_path / "out", quick=True, **cache):
        arguments = ["--model", model, "--data", data, "--out", out, *SMALL, *(QUICK[method] if quick else [])]
        return SimpleNamespace(**vars(here(method, *arguments, *flags, **cache)), folder=out)
    return run


def sampled(method):
    """Flags by which the policy's own samples are the only candidates."""
    return ["--sources", "D"] if "sources" in options(method) else []


# ------------------------------------------------------------------------------------------------------- checks

def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def table_of(screen):
    """The rows of the table on the screen: {first word of a line: its numbers with three decimals}."""
    return {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in screen.splitlines() if line.strip()}


def fingerprints(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def check_starts_as_reference(out):
    """The loss of the first evaluation and of the first step is ln 2: the policy is still its own reference."""
    before, first = lines_of(out / "metrics.jsonl")[:2]
    assert before["step"] == 0 and before["eval/loss"] == pytest.approx(LN2, abs=1e-4)
    assert first["step"] == 1 and first["loss"] == pytest.approx(LN2, abs=1e-4)


def check_trains(out, steps=None):
    """Every step has its row, the policy starts as the initial one and moves, all is finite. Returns the steps' rows."""
    rows = lines_of(out / "metrics.jsonl")
    steps = steps or rows[-1]["step"]
    assert [row["step"] for row in rows] == [0, *range(1, steps + 1), steps]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["eval/kl"] != 0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[1:-1]


def check_samples_from_reference(out, steps):
    """The KL of the first evaluation and of the first step's samples is 0; all is finite. Returns the steps' rows."""
    rows = lines_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, *range(1, steps + 1), steps]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4) and rows[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[1:-1]


def check_generates(out):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("say", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=2, min_new_tokens=2).shape == (1, prompt.shape[1] + 2)
    return model


def warnings_of(run):
    return [line for line in run.err.splitlines() if line.startswith("warning: ")]


def check_refused(run, *parts, after_warnings=False):
    """Status 2 and one line that says what is wrong; where warnings may come before it, it is the last."""
    lines = [line for line in run.err.splitlines() if not (after_warnings and line.startswith("warning: "))]
    assert run.status == 2, run.err
    assert len(lines) == 1 and lines[0].startswith("error: "), run.err
    assert not [part for part in parts if part not in lines[0]], run.err
    return lines[0]


def check_refused_by_argparse(run, *parts):
    """Status 2, and the parts in the last line, which follows the usage."""
    assert run.status == 2 and not [part for part in parts if part not in run.err.splitlines()[-1]], run.err
    assert "Traceback" not in run.err


def check_does_not_block(out):
    assert not out.exists() or not any(out.iterdir()), f"left {[p.name for p in out.iterdir()]} in --out"


# ---------------------------------------------------------------------- every method: one short run on pairs

@pytest.fixture(scope="module")
def first_run(toy, pairs, shared_cache, tmp_path_factory):
    """first_run(method): one short run of its file, with a reward model trained from the pairs; made once.

    Beside status, out and err it has the folder, and all arguments, as a command line has them.
    """
    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method) / "out"
        arguments = ["--model", toy, "--data", pairs, "--out", folder, *SMALL, *QUICK[method]]
        return SimpleNamespace(**vars(script(method, *arguments, cache=shared_cache)), folder=folder, arguments=arguments)
    return run


@every
def test_quick_flags_are_strings(method):
    assert isinstance(QUICK[method], list) and all(isinstance(flag, str) for flag in QUICK[method])


@every
def test_help_names_every_option(here, method):
    run = here("--help", method=method)
    assert run.status == 0 and not [name for name in options(method) if f"--{name}" not in run.out]


@every
def test_run_writes_every_file(first_run, method):
    run = first_run(method)
    assert run.status == 0, run.err
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "args.json",
                     "metrics.jsonl", "samples.txt"}
    assert not [name for name in names if name.endswith(".part")]
    assert ("attributes.json" in names) == (method in CONDITIONED)
    samples = (run.folder / "samples.txt").read_text(encoding="utf-8")
    assert len(re.findall("^  after: ", samples, re.M)) == 2


@every
def test_options_that_are_not_given_keep_their_defaults(first_run, method):
    run = first_run(method)
    args, given = json.loads((run.folder / "args.json").read_text(encoding="utf-8")), map(str, run.arguments)
    given = {flag.removeprefix("--") for flag in given if flag.startswith("--")}
    defaults = {name: value for name, value in options(method).items() if value is not None and name not in given}
    assert args.keys() == options(method).keys() and args.items() >= defaults.items()
    name, value = own(method, "default", ("seed", 0))
    assert args[name] == value


@every
def test_run_trains(first_run, method):
    rows = check_trains(first_run(method).folder, own(method, "steps"))
    assert len(rows) > 1 and all(row["grad_norm"] > 0 for row in rows)


@every
def test_saved_policy_loads_generates_and_every_weight_was_trained(first_run, toy, method):
    after = check_generates(first_run(method).folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(toy).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.isfinite(w).all() for w in after.values())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before), "every weight of so small a model gets a gradient"


@every
def test_screen_shows_table_and_samples(first_run, method):
    run = first_run(method)
    assert re.search(r"^ +before +after$", run.out, re.M)
    table = table_of(run.out)
    for name in ("kl", "length", "eos_rate", "proxy"):
        assert len(table[name]) == 4, name                             # two means, two standard errors
    for name in own(method, "after_only", []):
        assert len(table[name]) == 1, name
    assert table["kl"][0] == "0.000"
    assert "  before: " in run.out and "  after:  " in run.out
    if method in ON_POLICY + ON_CANDIDATES:
        assert re.search(r"^\d+ tokens/s generated, \d+% of the training time$", run.out, re.M)


@every
def test_second_run_into_the_same_out_is_refused_and_loses_nothing(first_run, shared_cache, method):
    run = first_run(method)
    before = fingerprints(run.folder)
    check_refused(script(method, *run.arguments, cache=shared_cache), "holds another run", "--resume", "another --out")
    assert fingerprints(run.folder) == before


def test_process_does_what_the_run_in_this_process_does(first_run, shared_cache, tmp_path):
    """Then it is refused, as a process: the same command into the same --out."""
    run = first_run("dpo")
    arguments = [tmp_path / "out" if argument == run.folder else argument for argument in run.arguments]
    process = command("dpo.py", *arguments, ALIGNMENT_CACHE=str(shared_cache))
    assert process.status == 0 and process.err == run.err, process.err
    ours, theirs = (lines_of(folder / "metrics.jsonl") for folder in (run.folder, tmp_path / "out"))
    assert [row.keys() for row in theirs] == [row.keys() for row in ours]
    for row, other in zip(ours, theirs):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)              # the number of threads may differ
    before = fingerprints(tmp_path / "out")
    again = command("dpo.py", *arguments, ALIGNMENT_CACHE=str(shared_cache))
    check_refused(again, "holds another run", "--resume", "another --out")
    assert fingerprints(tmp_path / "out") == before


# --------------------------------------------------------------------------- every method: the rest of a run's life

@every
def test_resumed_run_equals_a_straight_one(here, toy, pairs, tmp_path, monkeypatch, method):
    """Each with a cache of its own: the run that is cut trains its reward model, and finds it there when it goes on."""
    flags, steps, different = own(method, "resume", ([], None, {}))
    base = ["--model", toy, "--data", pairs, *SMALL, "--epochs", 1, "--save_every", 2, "--eval_every", 1,
            *QUICK[method], *flags]
    run = here(*base, "--out", tmp_path / "straight", method=method, cache=tmp_path / "cache of straight")
    assert run.status == 0, run.err
    straight = lines_of(tmp_path / "straight" / "metrics.jsonl")
    assert steps is None or straight[-1]["step"] == steps
    for name, values in different.items():
        assert len({row[name] for row in straight if name in row}) == values

    last, log = min(3, straight[-1]["step"] - 1), harness.Run.log              # step 3: two past the checkpoint

    def kill(run, step, metrics):
        log(run, step, metrics)
        if step == last:
            raise KeyboardInterrupt

    again = functools.partial(here, *base, "--out", tmp_path / "cut", method=method, cache=tmp_path / "cache of cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(harness.Run, "log", kill)
        again()
    assert lines_of(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == last + 1
    run = again("--resume")
    assert run.status == 0, run.err
    assert lines_of(tmp_path / "cut" / "metrics.jsonl") == straight
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("method, flags", [
    *[pytest.param(name, ["--schedule", "linear"], id=f"{name} --schedule linear") for name in METHODS],
    *[pytest.param(name, flags, id=f"{name} {' '.join(map(str, flags))}")
      for name in METHODS for flags in own(name, "rates", [])]])
def test_learning_rate_falls_to_0(here, toy, pairs, tmp_path, monkeypatch, method, flags):
    """35 prompts: for PPO the last batch has fewer minibatches than a full one; of rounds, only the last ends at 0."""
    runs, plain = [], harness.Run.finish
    monkeypatch.setattr(harness.Run, "finish", lambda run: runs.append(run) or plain(run))
    run = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, "--epochs", 1, *QUICK[method], *flags,
               method=method)
    assert run.status == 0, run.err
    assert runs[0].schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bos, pad", [("<bos>", "<eos>"), (None, None)], ids=["PAD is EOS", "neither PAD nor BOS"])
@every
def test_tokenizers_without_pad_or_bos_train(here, pairs, tmp_path, method, bos, pad):
    model, out = save_toy(tmp_path / "model", characters(bos, pad)), tmp_path / "out"
    run = here("--model", model, "--data", pairs, "--out", out, *SMALL, *QUICK[method], method=method)
    assert run.status == 0, run.err
    check_trains(out)
    check_generates(out)


# -------------------------------------------------------------------------------------- every method: bad input

@pytest.mark.parametrize("flags, parts", [
    (["--reward", "gold"], ["--reward gold", "only the embedded task"]),
    (["--label_noise", 0.5], ["--label_noise must be in [0, 0.5)"]),
    (["--lr", 0], ["--lr", "above 0"]),
    (["--resume"], ["nothing to resume"]),
    (["--data", "."], ["is a directory", ".jsonl"]),
], ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "")
@every
def test_bad_shared_settings_are_refused(here, toy, pairs, tmp_path, method, flags, parts):
    run = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, *QUICK[method], *flags, method=method)
    check_refused(run, *parts)
    check_does_not_block(tmp_path / "out")


@every
def test_unknown_flags_and_values_are_refused_before_anything_is_loaded(here, tmp_path, method):
    for flags in (["--betta", 0.1], ["--schedule", "constnat"], ["--reward_noise", "word"]):
        run = here(*flags, "--model", "/nowhere", "--data", "/nowhere", "--out", tmp_path / "out", method=method)
        check_refused_by_argparse(run, *map(str, flags))
    check_does_not_block(tmp_path / "out")


@every
def test_without_a_reward_a_method_trains_or_is_refused(here, toy, pairs, tmp_path, method):
    """On pairs: a method of pairs trains, and one that maximises a reward says that there is none."""
    run = here("--model", toy, "--data", pairs, "--reward", "none", "--out", tmp_path / "out", *SMALL, *QUICK[method],
               method=method)
    if run.status:
        check_refused(run, "no reward to maximise", "--reward")
        check_does_not_block(tmp_path / "out")
    else:
        check_trains(tmp_path / "out")
    assert run.status or method not in ON_POLICY + ON_CANDIDATES


@every
def test_prompts_alone_train_or_are_refused(here, toy, prompts_only, toy_reward, tmp_path, method):
    """With a reward model: a method of its own samples trains; one of the data's answers says that there are none."""
    run = here("--model", toy, "--data", prompts_only, "--reward", toy_reward, "--out", tmp_path / "out", *SMALL,
               *QUICK[method], method=method)
    if run.status:
        check_refused(run)
        check_does_not_block(tmp_path / "out")
    else:
        check_trains(tmp_path / "out")
        check_generates(tmp_path / "out")


@pytest.mark.parametrize("cause", ["weights", "training"])
@every
def test_nan_in_the_policy_stops_the_run_naming_step_and_prompt(here, toy, pairs, toy_reward, tmp_path, method, cause):
    """Sampling from it would raise deep inside; the run must say first what is wrong.

    An exception that harness.main lets through, which would be a traceback on the screen, fails this test by itself.
    """
    model = save_toy(tmp_path / "model", characters(), spoil=spoil_everything) if cause == "weights" else toy
    run = here("--model", model, "--data", pairs, "--out", tmp_path / "out", *SMALL, "--reward", toy_reward,
               "--lr", 1e-3 if cause == "weights" else 1e10, *QUICK[method], method=method)
    line = check_refused(run, after_warnings=True)
    assert re.search(r"step \d", line) and re.search(r"say it \d+:", line), line


@pytest.mark.parametrize("scale", [None, {"mean": 0.5, "std": 2.0}], ids=["without scale", "with scale"])
@every
def test_reward_of_nan_is_never_trained_on(here, toy, pairs, tmp_path, method, scale):
    """Who maximises it is stopped, naming step and prompt. A model without scale is asked before the run begins.

    A model with a scale of its own is first asked when the candidates are made, or at the first step.
    """
    reward = save_reward(tmp_path / "reward", spoil=spoil_head, **({"reward_scale": scale} if scale else {}))
    run = here("--model", toy, "--data", pairs, "--reward", reward, "--out", tmp_path / "out", *SMALL, *QUICK[method],
               method=method)
    if run.status:
        step = 1 if scale and method in ON_POLICY else 0
        check_refused(run, f"step {step}", "the reward is nan", "'say it ", after_warnings=True)
        if not scale:
            check_does_not_block(tmp_path / "out")
    else:
        rows = [row for row in lines_of(tmp_path / "out" / "metrics.jsonl") if "eval/kl" not in row]
        assert rows and all(math.isfinite(value) for row in rows for value in row.values())
    assert run.status or method not in ON_POLICY + ON_CANDIDATES


# -------------------------------------------------------------------- kinds of methods: each step samples anew

@on_policy
def test_first_samples_are_the_references_and_each_step_has_its_own(first_run, method):
    rows = check_samples_from_reference(first_run(method).folder, 3)
    names = {"objective/scores", "objective/kl", "grad_norm", "eos_rate"} | own(method, "metrics", set())
    assert all(row.keys() >= names for row in rows)
    assert len({row["objective/scores"] for row in rows}) == 3, "each step scores samples of its own"


@on_policy
def test_prompts_with_a_reward_train(here, toy, prompts_only, toy_reward, tmp_path, method):
    out = tmp_path / "out"
    run = here("--model", toy, "--data", prompts_only, "--reward", toy_reward, "--out", out, *SMALL, *QUICK[method],
               method=method)
    assert run.status == 0, run.err
    check_samples_from_reference(out, 3)
    check_generates(out)
    assert re.search(r"^proxy +-?\d", run.out, re.M) and "no pairs" not in run.err


@on_policy
def test_reward_model_with_another_tokenizer_reads_text(here, toy, pairs, tmp_path, monkeypatch, method):
    """It must not read the policy's ids: the scores of a step are those that the model alone gives to the step's texts."""
    tokenizer, out = characters(alphabet=LETTERS[::-1]), tmp_path / "out"
    reward = save_reward(tmp_path / "reward", tokenizer, reward_scale={"mean": 0.5, "std": 2.0})
    model, rollouts, plain = AutoModelForSequenceClassification.from_pretrained(reward), [], harness.rollout

    def spy(run, prompts, greedy=False):
        batch, responses, ended = plain(run, prompts, greedy)
        rollouts.append(list(zip(prompts, responses)))
        return batch, responses, ended

    def alone(prompt, response):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            return (model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - 0.5) / 2

    monkeypatch.setattr(harness, "rollout", spy)
    run = here("--model", toy, "--data", pairs, "--reward", reward, "--out", out, *SMALL, *QUICK[method], method=method)
    assert run.status == 0, run.err
    names = own(method, "scores", ["objective/scores"])
    logged = [row[name] for row in check_samples_from_reference(out, 3) for name in names]
    want = [[alone(*row) for row in rows] for rows in rollouts]
    assert logged == pytest.approx([sum(scores) / len(scores) for scores in want], abs=1e-4)
    assert max(want[0]) - min(want[0]) > 0.1, "else any reading would do"


@pytest.mark.parametrize("sign, rate, said", [(-1, 0, "0 of 8 responses end with EOS, 0 are empty"),
                                              (1, 1, "8 of 8 responses end with EOS, 8 are empty")],
                         ids=["never stops", "stops at once"])
@on_policy
def test_policy_that_never_stops_or_says_nothing_is_warned_of(here, pairs, toy_reward, tmp_path, method, sign, rate, said):
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(sign)), tmp_path / "out"
    run = here("--model", model, "--data", pairs, "--reward", toy_reward, "--out", out, *SMALL, *QUICK[method],
               method=method)
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    assert len(warnings) == 1 and "step 1" in warnings[0] and said in warnings[0], warnings
    assert all(row["eos_rate"] == rate for row in check_samples_from_reference(out, 3))
    check_generates(out)


# ------------------------------------------------------------------ kinds of methods: a reward that is maximised

@pytest.mark.parametrize("method", ON_POLICY + ON_CANDIDATES)
def test_noise_in_the_reward_changes_what_it_can_change(here, toy, pairs, toy_reward, tmp_path, method):
    """One draw a prompt changes no order of a prompt's candidates, so what only ranks them does not see it."""
    norms = {}
    for noise in ("none", "prompt", "response"):
        run = here("--model", toy, "--data", pairs, "--reward", toy_reward, "--out", tmp_path / noise, *SMALL,
                   "--epochs", 0.25, "--reward_noise", noise, *QUICK[method], method=method)
        assert run.status == 0, run.err
        norms[noise] = [row["grad_norm"] for row in lines_of(tmp_path / noise / "metrics.jsonl") if "grad_norm" in row]
    assert norms["response"] != norms["none"]
    if own(method, "noise") is not None:
        assert (norms["prompt"] != norms["none"]) == own(method, "noise")


@pytest.mark.parametrize("method", [name for name in ON_POLICY + ON_CANDIDATES if name not in ON_RANKINGS])
def test_prompts_without_a_reward_are_refused(here, toy, prompts_only, tmp_path, method):
    run = here("--model", toy, "--data", prompts_only, "--out", tmp_path / "out", *SMALL, *QUICK[method], method=method)
    warning, _ = run.err.splitlines()
    assert warning.startswith("warning: no pairs to train a reward model from")
    check_refused(run, "no reward to maximise", "--reward", after_warnings=True)
    check_does_not_block(tmp_path / "out")


# ----------------------------------------------------------------------------- kinds of methods: scored candidates

@on_candidates
def test_prompts_with_a_reward_make_candidates(here, toy, prompts_only, toy_reward, tmp_path, method):
    run = here("--model", toy, "--data", prompts_only, "--reward", toy_reward, "--out", tmp_path / "out", *SMALL,
               *sampled(method), method=method)
    assert run.status == 0, run.err
    check_trains(tmp_path / "out", 3)


@pytest.mark.parametrize("method, flags, said", [
    *[(name, ["--sources", "P"], "the data has no answers of its own") for name in ON_RANKINGS],
    *[(name, ["--source", "direct"], "no pairs to train on") for name in having("source")]])
def test_prompts_alone_have_no_answers_of_their_own(here, toy, prompts_only, toy_reward, tmp_path, method, flags, said):
    run = here("--model", toy, "--data", prompts_only, "--reward", toy_reward, "--out", tmp_path / "own", *SMALL,
               *QUICK[method], *flags, method=method)
    check_refused(run, said)
    check_does_not_block(tmp_path / "own")


@on_candidates
def test_policy_that_never_stops_is_not_taught_to_stop(here, pairs, toy_reward, tmp_path, method):
    """Each sample is cut off, so EOS (60 nats away) must not be among what is trained: losses stay those of letters."""
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(-1)), tmp_path / "out"
    run = here("--model", model, "--data", pairs, "--reward", toy_reward, "--out", out, *SMALL, *sampled(method),
               method=method)
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    assert len(warnings) == 1 and "step 1: 0 of" in warnings[0], warnings
    assert "responses end with EOS, 0 are empty" in warnings[0], warnings
    first, whole = check_trains(out)[0], 8 * math.log(len(characters()) - 1)
    name = next(name for name in ("loss/sft", "logps/chosen", "loss") if name in first)
    assert abs(first[name]) == pytest.approx(whole, rel=0.1)
    check_generates(out)


@on_candidates
def test_policy_that_says_nothing_has_one_candidate(here, pairs, toy_reward, tmp_path, method):
    """Every sample is empty, so there is nothing to rank: pairs are refused, the rest trains on."""
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(1)), tmp_path / "out"
    run = here("--model", model, "--data", pairs, "--reward", toy_reward, "--out", out, *SMALL, *sampled(method),
               method=method)
    said = warnings_of(run)
    assert "are empty (said once)" in said[0]
    assert len(said) == {"raft": 1, "rso": 3}.get(method, 2)
    assert method == "raft" or "of 35 rankings, 35 have one response only" in said[1]
    if method == "rso":
        check_refused(run, "no pairs to train on", after_warnings=True)
    else:
        assert run.status == 0, run.err
        assert all(math.isfinite(value) for row in lines_of(out / "metrics.jsonl") for value in row.values())


@pytest.mark.parametrize("rows, prompt", [(hh_rows(), r"\n\nHuman: hi \d+\n\nAssistant:\n"), (ranked_rows(), r"say \d+:\n"),
                                          (chat_rows(), r"<user>hi \d+<a>\n")], ids=["HH", "ranking", "chat"])
@pytest.mark.parametrize("method, flags", [*[(name, ["--sources", "P"]) for name in having("sources")],
                                           *[(name, ["--source", "direct"]) for name in having("source")]])
def test_data_with_answers_of_its_own_needs_no_reward(here, chat_toy, tmp_path, method, flags, rows, prompt):
    """Scored answers and pairs speak for themselves: no reward model, and nothing is sampled but for evaluation."""
    out = tmp_path / "out"
    run = here("--model", chat_toy, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--out", out, "--reward", "none",
               *SMALL, "--batch_size", 3, *QUICK[method], *flags, method=method)
    assert run.status == 0, run.err
    check_trains(out)
    assert re.match(prompt, (out / "samples.txt").read_text(encoding="utf-8")) and "tokens/s generated" not in run.out
    assert not [line for line in run.err.splitlines() if "--reward" in line]


@on_rankings
def test_systems_and_scores_of_rankings_count(here, toy, tmp_path, method):
    """What is imitated is the best by score, of the named writers: " yes i" costs a token more than " hm i" or " no i"."""
    upside_down = [row | {"scores": row["scores"][::-1]} for row in ranked_rows()]
    data, loss = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((ranked_rows(), upside_down))], {}
    base = ["--model", toy, "--reward", "none", *SMALL, *QUICK[method], "--sources", "P"]
    for i, systems in ((0, ""), (1, ""), (0, "medium,weak"), (0, "weak,strong"), (0, "weak,nobody")):
        out = tmp_path / f"{i} {systems}"
        run = here(*base, "--data", data[i], "--out", out, "--systems", systems, method=method)
        assert run.status == 0, run.err
        assert ("have one response only" in run.err) == (systems == "weak,nobody")
        loss[i, systems] = lines_of(out / "metrics.jsonl")[1]["loss/sft"]
    token = pytest.approx(math.log(len(characters())), rel=0.1)
    assert [loss[0, ""] - loss[key] for key in ((1, ""), (0, "medium,weak"), (0, "weak,nobody"))] == [token] * 3
    assert loss[0, "weak,strong"] == pytest.approx(loss[0, ""], rel=1e-5)
    run = here(*base, "--data", data[0], "--out", tmp_path / "out", "--systems", "nobody", method=method)
    check_refused(run, "no answers of its own by nobody", "medium, strong, weak")


# ------------------------------------------------------------------------------ kinds of methods: conditioned ones

@conditioned
def test_conditioned_policy_is_steered_after_reload(first_run, here, toy, pairs, method):
    run = first_run(method)
    known = json.loads((run.folder / "attributes.json").read_text(encoding="utf-8"))["levels"]
    name = own(method, "attribute", [*known][0])
    assert name in known
    ask = functools.partial(here, "--model", toy, "--data", pairs, "--max_length", 64, "--max_new_tokens", 8,
                            "--prompt", "say it 1:", method=method)
    for level in (0, 1):
        answer = ask("--eval_samples", 3, "--policy", run.folder, "--steer", f"{name}={level}")
        lines = answer.out.split("\n  ")
        assert answer.status == 0, answer.err
        assert lines[0].startswith(f"say it 1:<{name}:") and len(lines) == 4
    check_refused(ask("--policy", run.folder, "--steer", f"{name}=99"), "--steer", f"levels of {name}")
    check_refused(ask("--policy", toy), "attributes.json", f"{method}.py")


# --------------------------------------------------------------------------------- single methods: what they log

def only(*names):
    return pytest.mark.parametrize("method", [name for name in names if name in METHODS])


@pytest.mark.parametrize("method, flags, parts", own_cases("bad"))
def test_bad_settings_are_refused(here, toy, pairs, tmp_path, method, flags, parts):
    run = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, *flags, method=method)
    if "invalid choice" in run.err:
        check_refused_by_argparse(run, *parts)
    else:
        check_refused(run, *parts)
    check_does_not_block(tmp_path / "out")


@only("dpo")
def test_dpo_loss_starts_at_ln_2(first_run, method):
    run = first_run(method)
    check_starts_as_reference(run.folder)
    loss = table_of(run.out)["loss"]
    assert loss[0] == "0.693" and loss[1] != "0.693"


@only("dpo")
@pytest.mark.parametrize("bos, pad", [("<bos>", None), (None, "<pad>"), ("<bos>", "<eos>"), (None, None)],
                         ids=["no PAD", "no BOS", "PAD is EOS", "neither PAD nor BOS"])
def test_dpo_loss_starts_at_ln_2_without_pad_or_bos(here, pairs, tmp_path, method, bos, pad):
    model, out = save_toy(tmp_path / "model", characters(bos, pad)), tmp_path / "out"
    run = here("--model", model, "--data", pairs, "--out", out, *SMALL, method=method)
    assert run.status == 0, run.err
    check_starts_as_reference(out)
    assert all(math.isfinite(v) for row in lines_of(out / "metrics.jsonl") for v in row.values())
    check_generates(out)


@only("dpo")
def test_dpo_takes_systems_as_named(here, toy, tmp_path, method):
    """--pairs "weak>strong" against the scores: the pairs come from the names."""
    data, first = write_rows(tmp_path / "r.jsonl", ranked_rows()), {}
    for kind in ("strong>weak", "weak>strong"):
        out = tmp_path / kind.replace(">", "-")
        run = here("--model", toy, "--data", data, "--out", out, "--reward", "none", *SMALL, "--pairs", kind, method=method)
        assert run.status == 0, run.err
        first[kind] = lines_of(out / "metrics.jsonl")[1]
    assert first["strong>weak"]["logps/chosen"] == pytest.approx(first["weak>strong"]["logps/rejected"], abs=1e-3)
    longer = first["strong>weak"]["logps/rejected"] - first["strong>weak"]["logps/chosen"]
    assert longer == pytest.approx(math.log(len(characters())), rel=0.1)         # "yes" has a character more than "no"


@only("dpo")
@pytest.mark.parametrize("spoil, flags", [(spoil_everything, []), (spoil_letter_q, ["--max_new_tokens", 1])],
                         ids=["in every forward pass", "in some answers only"])
def test_dpo_without_a_reward_stops_at_nan_in_the_weights(here, tmp_path, method, spoil, flags):
    model = save_toy(tmp_path / "model", characters(), spoil=spoil)
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(chosen=" quiet"))
    run = here("--model", model, "--data", data, "--out", tmp_path / "out", "--reward", "none", *SMALL, *flags,
               method=method)
    line = check_refused(run, after_warnings=True)
    assert re.search(r"step \d", line) and re.search(r"say it \d+:", line), line


@only("dpo")
def test_dpo_counts_long_prompts_and_keeps_their_answers(here, toy, tmp_path, method):
    """A nearly uniform model gives each of the answer's 7 tokens ln V nats: fewer would show as a smaller sum."""
    rows = [{"prompt": f"{'long ' * 30}{i:02}:", "chosen": f"yes {i:02}", "rejected": f"no  {i:02}"} for i in range(20)]
    rows += [row | {"prompt": f"{i}"} for i, row in enumerate(rows[:5])]
    out = tmp_path / "out"
    run = here("--model", toy, "--data", write_rows(tmp_path / "long.jsonl", rows), "--out", out, "--reward", "none",
               *SMALL, "--max_length", 32, method=method)
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    assert len(warnings) == 1 and "20 of 25 prompts" in warnings[0] and "--max_length" in warnings[0]
    check_starts_as_reference(out)
    whole = 7 * math.log(len(characters()))
    for row in lines_of(out / "metrics.jsonl")[:2]:
        for name in ("logps/chosen", "logps/rejected"):
            assert -row.get(name, row.get(f"eval/{name}")) == pytest.approx(whole, rel=0.05)


@only("ppo")
def test_ppo_refuses_a_value_model_that_reads_other_tokens(here, toy, reversed_toy, pairs, tmp_path, method):
    base = ["--model", toy, "--data", pairs, *SMALL, *QUICK[method], "--out", tmp_path / "out", "--value_model"]
    check_refused(here(*base, reversed_toy, method=method), "value model", str(reversed_toy), "another tokenizer")
    check_does_not_block(tmp_path / "out")
    run = here(*base, save_toy(tmp_path / "same", characters()), method=method)
    assert run.status == 0, run.err                                    # the same tokens under another name are welcome


@only("rrhf", "pro")
def test_ranking_and_imitation_add_up_and_start_at_the_sft_policy(first_run, method):
    """The toy policy is nearly uniform: a token costs ln V nats."""
    run = first_run(method)
    first, token = check_trains(run.folder)[0], math.log(len(characters()))
    candidates = json.loads((run.folder / "args.json").read_text(encoding="utf-8"))["candidates"]
    weight = 1 if method == "rrhf" else 0.05 * (candidates - 1) ** 2                                   # Eq. 5 of both
    assert first["loss"] == pytest.approx(first["loss/rank"] + weight * first["loss/sft"], rel=1e-4)
    if method == "pro":
        assert [-first["scores/best"], -first["scores/worst"]] == pytest.approx([token] * 2, rel=0.05)
    else:
        assert first["rewards/best"] > 0, "the best of four, by a reward whose mean is 0"
    evaluated = [row for row in lines_of(run.folder / "metrics.jsonl") if "eval/kl" in row]
    assert [0 <= row["eval/score_accuracy"] <= 1 for row in evaluated] == [True, True]
    assert evaluated[0]["eval/nll"] == pytest.approx(token, rel=0.05)


@only("rso")
def test_rso_starts_as_its_reference(first_run, method):
    rows = check_trains(first_run(method).folder)
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-4) and rows[0]["rewards/accuracies"] == 0.5
    assert rows[-1]["rewards/margins"] != 0


@only("raft")
def test_raft_imitates_whole_samples_better_than_their_mean(first_run, method):
    """The samples have nearly all of the 8 tokens, each of ln V nats."""
    first, token = check_trains(first_run(method).folder)[0], math.log(len(characters()))
    assert 6 * token < first["loss"] < 8.5 * token and first["round/best"] > first["round/mean"]


@only("raft")
def test_raft_scores_text_and_each_prompts_best_is_its_own(here, toy, pairs, tmp_path, monkeypatch, method):
    """With a reward model that reads other tokens than the policy."""
    tokenizer, out, rollouts, plain = characters(alphabet=LETTERS[::-1]), tmp_path / "out", [], harness.samples.rollout
    reward = save_reward(tmp_path / "reward", tokenizer, reward_scale={"mean": 0.5, "std": 2.0})
    model = AutoModelForSequenceClassification.from_pretrained(reward)

    def spy(run, prompts):
        rollouts.append((prompts, *plain(run, prompts)))
        return rollouts[-1][1:]

    monkeypatch.setattr(harness.samples, "rollout", spy)
    run = here("--model", toy, "--data", pairs, "--reward", reward, "--out", out, *SMALL, "--candidates", 2, "--rounds", 2,
               method=method)
    assert run.status == 0, run.err
    for row, (prompts, _, texts, _) in zip(check_trains(out, 6)[::3], rollouts, strict=True):
        ids = [tokenizer(prompt + text).input_ids + [tokenizer.eos_token_id] for prompt, text in zip(prompts, texts)]
        with torch.no_grad():
            scores = torch.cat([model.score(model.model(torch.tensor([each])).last_hidden_state[0, -1]) for each in ids])
        scores = (scores.view(-1, 2) - 0.5) / 2
        assert prompts[::2] == prompts[1::2] and len(set(prompts)) == len(scores)
        assert row["round/mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert row["round/best"] == pytest.approx(scores.amax(1).mean().item(), abs=1e-4)


# ------------------------------------------------------------------------------- forms of data, shown with dpo.py

@pytest.mark.parametrize("rows, name, flags, prompt", [
    (hh_rows(), "hh.jsonl", [], r"\n\nHuman: hi \d+\n\nAssistant:\n"),
    (ranked_rows(), "ranked.jsonl", ["--pairs", "strong>weak"], r"say \d+:\n"),
    (ranked_rows(), "curriculum.jsonl", ["--pairs", "strong>weak", "--hard_pairs", "strong>medium"], r"say \d+:\n"),
    (chat_rows(), "chat.jsonl", [], r"<user>hi \d+<a>\n"),
    (pair_rows(20), "zipped.jsonl.gz", [], r"say it \d+:\n"),
], ids=["HH", "systems", "curriculum", "chat", "gzip"])
def test_every_form_of_data_trains(here, chat_toy, tmp_path, rows, name, flags, prompt):
    out = tmp_path / "out"
    run = here("--model", chat_toy, "--data", write_rows(tmp_path / name, rows), "--out", out, "--reward", "none", *SMALL,
               *flags)
    assert run.status == 0, run.err
    check_starts_as_reference(out)
    assert re.match(prompt, (out / "samples.txt").read_text(encoding="utf-8"))


GOOD = pair_rows(3)
HH_STRANGERS = {"chosen": "\n\nHuman: a\n\nAssistant: yes", "rejected": "\n\nHuman: b\n\nAssistant: no"}


@pytest.mark.parametrize("rows, parts", [
    ([*GOOD, '{"prompt": '], ["line 4", "not JSON"]),
    ([*GOOD, {"prompt": "a", "chosen": "b"}], ["line 4", '"rejected"']),
    ([*GOOD, *pair_rows(1, chosen="")], ["line 4", '"chosen" is empty', "--skip_bad_rows"]),
    ([*GOOD, *pair_rows(1, rejected=" ")], ["line 4", '"rejected" is empty', "--skip_bad_rows"]),
    ([*GOOD, *pair_rows(1, chosen="a", rejected="a")], ["line 4", "equal", "--skip_bad_rows"]),
    ([HH_STRANGERS], ["line 1", "share the prompt", "--skip_bad_rows"]),
    ([], ["no usable row"]),
    ([{"prompt": "a"}, {"prompt": "b"}], ["no preference pairs", "chosen and rejected"]),
], ids=["malformed", "missing field", "empty chosen", "empty rejected", "equal", "HH strangers", "no row", "prompts only"])
def test_bad_rows_are_refused(here, toy, tmp_path, rows, parts):
    data, out = write_rows(tmp_path / "bad.jsonl", rows), tmp_path / "out"
    check_refused(here("--model", toy, "--data", data, "--out", out, "--reward", "none", *SMALL), *parts)
    check_does_not_block(out)


def test_no_row_left_after_skipping_is_refused(here, toy, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", pair_rows(3, chosen=""))
    run = here("--model", toy, "--data", data, "--out", tmp_path / "out", "--skip_bad_rows", *SMALL)
    assert run.status == 2
    assert run.err.splitlines() == ["left out 3 of 3 rows: 3 empty response", "error: bad.jsonl: no usable row"]


def test_missing_data_file_is_refused_in_one_line(here, toy, tmp_path):
    run = here("--model", toy, "--data", "/nowhere/pairs.jsonl", "--out", tmp_path / "out", *SMALL)
    check_refused(run, "no such file", "/nowhere/pairs.jsonl")
    assert run.out == ""
    check_does_not_block(tmp_path / "out")


def test_process_refuses_an_unknown_hub_model_in_one_line(pairs, tmp_path):
    process = command("dpo.py", "--model", "nobody/no-such-model", "--data", pairs, "--out", tmp_path / "out", *SMALL)
    check_refused(process, "nobody/no-such-model", "local directory")
    assert process.out == ""
    check_does_not_block(tmp_path / "out")


def test_out_and_resume_that_make_no_sense_are_refused(here, toy, pairs, tmp_path):
    base = ["--model", toy, "--data", pairs, "--reward", "none", *SMALL]
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("mine", encoding="utf-8")
    other.mkdir()
    (other / "args.json").write_text("{}", encoding="utf-8")
    for flags, parts in [(["--out", file], ["is a file", "directory"]),
                         (["--out", other], ["holds another run", "--resume"]),
                         (["--resume"], ["--resume needs --out"]),
                         (["--resume", "--out", tmp_path / "new"], ["nothing to resume"]),
                         (["--resume", "--out", other], ["nothing to resume"])]:
        check_refused(here(*base, *flags), *parts)
    assert file.read_text(encoding="utf-8") == "mine" and [p.name for p in other.iterdir()] == ["args.json"]
    check_does_not_block(tmp_path / "new")


def test_reward_model_of_several_labels_needs_one_of_them(here, toy, pairs, tmp_path):
    labels = ["helpful", "harmless", "funny"]
    reward, out = tmp_path / "reward", tmp_path / "out"
    save_toy(reward, characters(), LlamaForSequenceClassification, id2label=dict(enumerate(labels)),
             label2id={name: i for i, name in enumerate(labels)})
    base = ["--model", toy, "--data", pairs, "--out", out, "--reward", reward, *SMALL]
    for flags in ([], ["--reward_label", "sad"]):
        check_refused(here(*base, *flags), "--reward_label", "helpful, harmless, funny")
        check_does_not_block(out)
    run = here(*base, "--reward_label", "funny")
    assert run.status == 0, run.err

    samples = (out / "samples.txt").read_text(encoding="utf-8")
    prompts, responses = zip(*re.findall(r"(say it \d+:)\n  before: (.*)\n", samples))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward), characters()
    scores = []
    for prompt, response in zip(prompts, responses):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        scores.append(model.score(hidden)[2].item())
    assert lines_of(out / "metrics.jsonl")[0]["eval/proxy"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


# ------------------------------------------------------------------------------------------------ a real chat model

def test_smollm2_answers_a_chat_and_its_logps_are_the_plain_ones(smollm2):
    model, tokenizer = common.load_policy(smollm2, "cpu"), common.load_tokenizer(smollm2, 64)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Name a fruit."}], tokenize=False,
                                           add_generation_prompt=True)
    torch.manual_seed(0)
    batch = common.generate(model, tokenizer, [prompt], 2, max_new_tokens=12)
    for text, ended, length in zip(common.decode(tokenizer, batch), common.finished(tokenizer, batch), batch.lengths):
        assert text.strip() and "<|im_" not in text
        assert length <= 12 and (ended or length == 12)

    ours = common.sequence_logps(model, batch)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    for row, mask, logp in zip(batch.input_ids, batch.response_mask, ours):
        whole = torch.tensor([ids + row[mask.bool()].tolist()])
        with torch.no_grad():
            logps = model(whole).logits.log_softmax(-1)
        plain = logps[0, :-1].gather(1, whole[0, 1:, None])[len(ids) - 1:].sum()
        assert logp.item() == pytest.approx(plain.item(), abs=1e-3)


def test_smollm2_trains_two_steps_and_loads_again(smollm2, tmp_path):
    """DPO, as a process."""
    rows = [{"chosen": f"\n\nHuman: Name {what}.\n\nAssistant: {good}", "rejected": f"\n\nHuman: Name {what}.\n\nAssistant: {bad}"}
            for what, good, bad in [("a fruit", "Apple.", "Car."), ("a colour", "Red.", "Two."), ("a city", "Rome.", "Soup."),
                                    ("a bird", "Owl.", "Tea."), ("a tree", "Oak.", "Sock."), ("a number", "Six.", "Hat.")]]
    out = tmp_path / "out"
    process = command("dpo.py", "--model", smollm2, "--data", write_rows(tmp_path / "hh.jsonl", rows), "--out", out,
                      "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 2, "--eval_samples", 1,
                      "--reward", "none", "--epochs", 1, "--batch_size", 3, "--save_every", 0)
    assert process.status == 0, process.err
    check_starts_as_reference(out)
    assert [row["step"] for row in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 2]
    check_generates(out)


@pytest.mark.parametrize("method", [name for name in METHODS if own(name, "smollm2") is not None])
def test_smollm2_trains_one_step_and_loads_again(smollm2, here, toy_reward, tmp_path, method):
    """On its own samples or on ranked answers of the data. The reward model is tiny and reads letters: one of SmolLM2's
    size would say no more about the methods."""
    rows = [{"prompt": f"\n\nHuman: Name a {what}.\n\nAssistant:", "responses": [" Well.", " No.", " Car."], "scores": [2, 1, 0]}
            for what in ("fruit", "bird", "city", "tree", "hat")]
    out = tmp_path / "out"
    run = here("--model", smollm2, "--data", write_rows(tmp_path / "ranked.jsonl", rows), "--out", out,
               "--reward", toy_reward, "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 1,
               "--eval_samples", 1, "--epochs", 0.5, "--batch_size", 2, "--save_every", 0, *QUICK[method],
               *own(method, "smollm2"), method=method)
    assert run.status == 0, run.err
    if method in ON_POLICY:
        check_samples_from_reference(out, 1)
    else:
        check_trains(out, 1)
    check_generates(out)


# ------------------------------------------------------------------------------- the embedded task: slow at first use

@pytest.fixture(scope="module")
def built():
    """`python -m tasks.build`, and the directory of seed 0's models that it built or found."""
    process = command("-m", "tasks.build")
    assert process.status == 0, process.err
    return process, build.home(SimpleNamespace(seed=0))


def test_build_prints_the_vital_figures(built):
    process, folder = built
    for name, value in json.loads((folder / "vitals.json").read_text(encoding="utf-8")).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(str(value))}$", process.out, re.M), name
    assert str(folder) in process.out


@every
def test_method_on_the_embedded_task_starts_at_the_sft_policy(built, tmp_path, method):
    """DPO's run is a process."""
    flags, steps, samples = own(method, "embedded", ([*QUICK[method], "--epochs", 0.05], None, None))
    arguments = ["--eval_prompts", 16 if method == "dpo" else 8, "--eval_samples", 2, "--out", tmp_path / "out", *flags]
    run = command("dpo.py", *arguments) if method == "dpo" else script(method, *arguments, cache=tasks.CACHE)
    assert run.status == 0 and not run.err.strip(), run.err
    first = check_trains(tmp_path / "out", steps)[0]
    table = table_of(run.out)
    for name in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(table[name]) == 4, name
    assert all(len(table[name]) == 2 for name in ("win_rate", "win_rate_proxy", "win_rate_judge"))
    assert table["kl"][0] == "0.000"
    assert float(table["fluency"][0]) > 0.5, "the start must be the SFT policy, not a random model"
    generated = re.search(r"^\d+ tokens/s generated, \d+% of the training time$", run.out, re.M)
    assert samples is None or bool(generated) == samples, "as long as the policy is the SFT policy, its samples are the pool"
    if method == "dpo":
        check_starts_as_reference(tmp_path / "out")
    if method in ON_POLICY:                         # on the SFT policy the rewards have mean 0 and deviation 1
        check_samples_from_reference(tmp_path / "out", steps)
        assert abs(first["objective/scores"]) < 0.4 and first["eos_rate"] > 0.9
    if "--rare" in flags:
        assert len(table["rare_gold"]) == 2
    if method in CONDITIONED:                       # before training it is asked in plain words, afterwards with tags
        name, question = own(method, "attribute_of_reviews"), "review this french western and mention the songs:"
        answer = script(method, "--policy", tmp_path / "out", "--prompt", question, "--steer", f"{name}=9", cache=tasks.CACHE)
        lines = answer.out.split("\n  ")
        assert answer.status == 0 and lines[0].startswith(question) and f"<{name}:9>" in lines[0] and len(lines) == 5


def test_killed_build_goes_on_with_the_missing_judge(built, tmp_path, monkeypatch):
    """As if killed before the judge: it is made now, and nothing before it is made again.

    (Its weights equal the old ones only under the same number of threads, so they are not compared.)"""
    _, whole = built
    half = tmp_path / whole.relative_to(tasks.CACHE)
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("judge", "vitals.json"))
    shutil.copytree(whole / "judge", half / "judge.part")                 # an attempt that was not renamed
    (half / "judge.part" / "model.safetensors").write_bytes(b"half")
    kept = {name: (half / name).stat().st_mtime_ns for name in ("sft/model.safetensors", "samples.json", "proxy/model.safetensors")}
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    build.report(SimpleNamespace(seed=0, device="auto", dtype="auto"))
    assert {name: (half / name).stat().st_mtime_ns for name in kept} == kept
    AutoModelForSequenceClassification.from_pretrained(half / "judge")
    old, new = (json.loads((path / "vitals.json").read_text(encoding="utf-8")) for path in (whole, half))
    assert new.pop("judge accuracy") > 0.6 and new.pop("seconds") and new.items() <= old.items()
