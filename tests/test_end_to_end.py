"""Whole runs of the methods through their command line, as a user starts them.

The methods are found by looking (conftest.method_names). What holds for every method runs over all of them,
with the short flags QUICK of experiments/<method>.py. What holds for a kind of method runs over those whose
Config has a certain option. The table OWN says what single methods add.

A process costs seconds, so nearly every run is made inside this process: `script` runs the file of a method
as Python runs a script, `here` and `train` call harness.main with what the file defines. One real process is
kept for each kind of thing. The tests of the embedded task come last: they build its models where the cache
lacks them.
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
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          PreTrainedTokenizerFast)

import common
import harness
import tasks
from conftest import method_names
from harness import picture
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
conditioned = pytest.mark.parametrize("method", CONDITIONED)


# ------------------------------------------------------------------------------------ what single methods add

# default     an option and its default
# steps       of the short run
# metrics     names in every row of a step
# scores      metrics that are means of the rollouts' scores, in the order of the rollouts
# after_only  rows of the table with a number after training only
# sft         weight of the SFT loss beside the ranking loss
# resume      flags and steps of the run that is cut, and {metric: how many values it takes}
# rates       flags of more runs whose learning rate must end at 0
# bad         flags, and what the error line says
# noise       does noise that is the same for all answers to a prompt change the gradients?
# silence     warnings about a policy that says nothing
# attribute   what the policy can be asked for: with the pairs, and on the embedded task
# embedded    flags and steps on the embedded task, and whether it samples there
# smollm2     flags with SmolLM2
OWN = {
    "dpo": dict(
        default=("beta", 0.1), steps=3, resume=([], 5, {}), embedded=(["--epochs", 0.05], 3, False),
        bad=[(["--beta", 0], ["--beta", "above 0"]),
             (["--beta", -0.1], ["--beta", "above 0", "-0.1"]),
             (["--pairs", "strong>weak"], ["--pairs", "names no systems"])]),
    "ppo": dict(
        default=("kl_coef", 0.05), steps=3, scores=["objective/scores"],
        metrics={"loss/policy", "loss/value", "val/explained_variance", "policy/clipfrac", "policy/approxkl"},
        resume=(["--kl_target", 0.001, "--kl_horizon", 20], 5, {"objective/kl_coef": 5}),
        rates=[["--minibatch_size", 2], ["--batch_size", 64, "--minibatch_size", 16]],  # larger than the data
        bad=[(["--kl_coef", -0.1], ["--kl_coef", "must not be negative", "-0.1"]),
             (["--minibatch_size", 3], ["--batch_size 8", "--minibatch_size 3"]),
             (["--minibatch_size", 16], ["--batch_size 8", "--minibatch_size 16"]),
             (["--kl_target", 0], ["--kl_target", "above 0"]),
             (["--ppo_epochs", 0], ["--ppo_epochs", "above 0"])],
        noise=True, embedded=(["--epochs", 0.25], 1, True), smollm2=["--ppo_epochs", 1]),
    "remax": dict(
        default=("kl_coef", 0.05), steps=3, scores=["objective/scores", "objective/greedy_scores"],
        metrics={"loss", "objective/greedy_scores"}, resume=([], 5, {}), rates=[["--schedule", "cosine"]],
        bad=[(["--kl_coef", -0.1], ["--kl_coef", "must not be negative", "-0.1"]),
             (["--reward_clip", 0], ["--reward_clip", "above 0"]),
             (["--variance_prompts", 1], ["--variance_prompts", "at least 2"])],
        embedded=(["--epochs", 0.25, "--reward", "gold"], 1, True), smollm2=[]),
    "rrhf": dict(
        default=("sources", "DP"), steps=3, after_only=["to_best"], sft=1, silence=2,
        resume=(["--rounds", 2, "--epochs", 0.5], 6, {}),      # cut in the first round, which has three steps
        rates=[["--rounds", 2]],
        bad=[(["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
             (["--rounds", 0], ["--rounds", "above 0"]),
             (["--length_penalty", -1], ["--length_penalty", "not be negative"])],
        noise=False, embedded=(["--epochs", 0.25, "--sources", "D", "--eval_pairs", 32], 2, False)),
    "pro": dict(
        default=("sft_weight", 0.05), steps=3, sft=0.05 * (3 - 1) ** 2, silence=2, resume=([], 5, {}),
        bad=[(["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
             (["--terms", -1], ["--terms", "not be negative"]),
             (["--sft_weight", -1], ["--sft_weight", "not be negative"])],
        embedded=(["--epochs", 0.25, "--eval_pairs", 32, "--label_noise", 0], 2, False),
        smollm2=["--sources", "P"]),
    "rso": dict(
        default=("beta", 0.5), steps=3, silence=3, resume=([], 5, {}), rates=[["--schedule", "cosine"]],
        bad=[(["--candidates", 3, "--num_samples", 4],
              ["--candidates must be at least --num_samples 4, not 3"]),
             (["--num_samples", 1], ["--num_samples", "at least 2"]),
             (["--beta", -0.1], ["--beta", "not be negative"]),
             (["--gamma", 0], ["--gamma", "above 0"]),
             (["--loss", "dpo"], ["--loss", "dpo"])],
        noise=False, embedded=(["--epochs", 0.125], 2, False)),
    "raft": dict(
        default=("ranking", "local"), steps=3, after_only=["to_best"], silence=1,
        resume=(["--rounds", 2, "--epochs", 0.5, "--pool", "all", "--restart", True, "--kl_coef", 0.1], 6,
                {"round/mean": 2}),
        rates=[["--rounds", 2, "--schedule", "linear"]],
        bad=[(["--candidates", 0], ["--candidates", "above 0"]),
             (["--share", 1.5], ["--share", "[0, 1]"]),
             (["--share", 0.5], ["--share is for --ranking global"]),
             (["--kl_coef", -1], ["--kl_coef", "not be negative"]),
             (["--rare", "say"], ["--rare say", "every train prompt"]),
             (["--refresh", True], ["--refresh needs annotators"])],
        embedded=(["--rounds", 2, "--prompts", 32, "--epochs", 1, "--candidates", 4, "--refresh", True,
                   "--rare", "villain"], 2, True),
        noise=False, smollm2=[]),
    "decision_transformer": dict(
        default=("bins", 10), steps=3, attribute=("reward", "reward"),
        resume=(["--reward_noise", "response"], 8, {}),
        embedded=(["--demonstrations", 800, "--epochs", 0.3], None, False)),
    "steerlm": dict(
        default=("share", 1.0), steps=3, attribute=("score", "sentiment"),
        resume=(["--epochs", 0.3, "--rounds", 1, "--bootstrap_epochs", 0.3], 6, {}),     # cut in the round
        rates=[["--rounds", 2, "--bootstrap_epochs", 0.3, "--schedule", "linear"]],
        embedded=(["--demonstrations", 800, "--rated", 400, "--epochs", 0.2, "--rounds", 1,
                   "--bootstrap_epochs", 0.05, "--predictor_epochs", 0.2], 4, True),    # 160 and 51 responses
        smollm2=["--predictor_epochs", 0.2, "--epochs", 0.15]),
}


def own(method, key, default=None):
    return OWN.get(method, {}).get(key, default)


def case(method, flags, *rest):
    return pytest.param(method, flags, *rest, id=" ".join(map(str, [method, *flags])))


on_rankings_and_the_best = pytest.mark.parametrize("method", [name for name in METHODS if own(name, "sft")])


def test_every_method_of_this_table_is_found():
    assert not OWN.keys() - METHODS.keys()


# -------------------------------------------------------------------------------------------- models and data

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
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **settings))
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


def reversed_reward(folder):
    """A reward model whose vocabulary has the opposite order; and (prompt, response) -> its reward."""
    tokenizer = characters(alphabet=LETTERS[::-1])
    save_reward(folder, tokenizer, reward_scale={"mean": 0.5, "std": 2.0})
    model = AutoModelForSequenceClassification.from_pretrained(folder)

    def alone(prompt, response):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            return (model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - 0.5) / 2
    return folder, alone


def spoil_everything(model):
    model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan


def spoil_letter_q(model):
    model.model.embed_tokens.weight[characters().convert_tokens_to_ids("q")] = math.nan


def spoil_head(model):
    model.score.weight.fill_(math.nan)


def set_eos_logit(sign):
    """EOS gets a logit of about -60 or 60: hidden states have a large first entry, read for EOS alone."""
    def spoil(model):
        model.model.embed_tokens.weight[:, 0] = 10
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[model.config.eos_token_id, 0] = sign * 10
    return spoil


def write_rows(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def pair_rows(n=40, **changes):
    return [{"prompt": f"say it {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} | changes
            for i in range(n)]


def hh_rows():
    return [{"chosen": f"\n\nHuman: hi {i}\n\nAssistant: yes {i}",
             "rejected": f"\n\nHuman: hi {i}\n\nAssistant: no {i}"} for i in range(20)]


def ranked_rows():
    return [{"prompt": f"say {i}:", "responses": [f" yes {i}", f" hm {i}", f" no {i}"], "scores": [2, 1, 0],
             "systems": ["strong", "medium", "weak"]} for i in range(20)]


def chat_rows():
    return [{"prompt": [{"role": "user", "content": f"hi {i}"}],
             "chosen": [{"role": "assistant", "content": f"yes {i}"}],
             "rejected": [{"role": "assistant", "content": f"no {i}"}]} for i in range(20)]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy") / "model", characters())


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


# ------------------------------------------------------------------------------------------------------- runs

def command(*arguments, **environment):
    """A real process, run to its end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                             encoding="utf-8", timeout=900, env=environment)
    return SimpleNamespace(status=process.returncode, out=process.stdout, err=process.stderr)


def in_process(start, method, *arguments, cache):
    """start() with this command line and cache: exit status and what it printed."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", [f"{method}.py", *map(str, arguments)])
        patch.setattr(tasks, "CACHE", cache)
        try:
            start()
        except SystemExit as stop:
            status = stop.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def script(method, *arguments, cache):
    """<method>.py as Python runs a script, but in this process."""
    return in_process(lambda: runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__"),
                      method, *arguments, cache=cache)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Only real processes draw run.png, see test_picture.py: here a third of the time would go into it."""
    monkeypatch.setattr(picture, "draw", lambda *args: "")


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
        flags = [*SMALL, *(QUICK[method] if quick else []), *flags]
        made = here(method, "--model", model, "--data", data, "--out", out, *flags, **cache)
        return SimpleNamespace(**vars(made), folder=out)
    return run


def sampled(method):
    """Flags by which the policy's own samples are the only candidates."""
    return ["--sources", "D"] if "sources" in options(method) else []


# ----------------------------------------------------------------------------------------------------- checks

def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def table_of(screen):
    """The rows of the table on the screen: {first word of a line: its numbers with three decimals}."""
    lines = [line for line in screen.splitlines() if line.strip()]
    return {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in lines}


def fingerprints(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def check_starts_as_reference(out):
    """The loss of the first evaluation and of the first step is ln 2: the policy is still the reference."""
    before, first = lines_of(out / "metrics.jsonl")[:2]
    assert before["step"] == 0 and before["eval/loss"] == pytest.approx(LN2, abs=1e-4)
    assert first["step"] == 1 and first["loss"] == pytest.approx(LN2, abs=1e-4)


def check_rows(out, steps=None):
    """Each step has a row, the policy starts as the initial one, all is finite. Returns the steps' rows."""
    rows = lines_of(out / "metrics.jsonl")
    steps = steps or rows[-1]["step"]
    assert [row["step"] for row in rows] == [0, *range(1, steps + 1), steps]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[1:-1]


def check_trains(out, steps=None):
    """And the policy has moved."""
    assert lines_of(out / "metrics.jsonl")[-1]["eval/kl"] != 0
    return check_rows(out, steps)


def check_samples_from_reference(out, steps=None):
    """And the samples of the first step have a KL of 0: they come from the initial policy."""
    rows = check_rows(out, steps)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    return rows


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
    """Status 2, and the parts in the last line, which follows one line of usage."""
    assert len(run.err.splitlines()) == 2, run.err
    assert run.status == 2 and not [part for part in parts if part not in run.err.splitlines()[-1]], run.err
    assert "Traceback" not in run.err


def check_does_not_block(out):
    assert not out.exists() or not any(out.iterdir()), f"left {[p.name for p in out.iterdir()]} in --out"


# ----------------------------------------------------------------------- every method: one short run on pairs

@pytest.fixture(scope="module")
def first_run(toy, pairs, shared_cache, tmp_path_factory):
    """first_run(method): one short run of its file, with a reward model trained from the pairs; made once.

    Beside status, out and err it has the folder, and all arguments, as a command line has them.
    """
    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method) / "out"
        arguments = ["--model", toy, "--data", pairs, "--out", folder, *SMALL, *QUICK[method]]
        made = script(method, *arguments, cache=shared_cache)
        return SimpleNamespace(**vars(made), folder=folder, arguments=arguments)
    return run


@every
def test_quick_flags_are_strings(method):
    assert isinstance(QUICK[method], list) and all(isinstance(flag, str) for flag in QUICK[method])


@every
def test_help_names_every_option(here, method):
    run = here(method, "--help")
    assert run.status == 0 and not [name for name in options(method) if f"--{name}" not in run.out]


@every
def test_run_writes_every_file(first_run, method):
    run = first_run(method)
    assert run.status == 0, run.err
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                     "args.json", "metrics.jsonl", "samples.txt"}
    assert not [name for name in names if name.endswith(".part")]
    assert ("attributes.json" in names) == (method in CONDITIONED)
    samples = (run.folder / "samples.txt").read_text(encoding="utf-8")
    assert len(re.findall("^  after: ", samples, re.M)) == 2


@every
def test_options_that_are_not_given_keep_their_defaults(first_run, method):
    run = first_run(method)
    args = json.loads((run.folder / "args.json").read_text(encoding="utf-8"))
    given = {flag.removeprefix("--") for flag in map(str, run.arguments) if flag.startswith("--")}
    defaults = {name: value for name, value in options(method).items()
                if value is not None and name not in given}
    assert args.keys() == {*options(method), "method", "conversations", "build", "data_fingerprint",
                           "other_models", "commits", "processes"}
    assert args["method"] == method
    assert args.items() >= defaults.items()
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
    again = script(method, *run.arguments, cache=shared_cache)
    check_refused(again, "holds another run", "--resume", "another --out")
    assert fingerprints(run.folder) == before


def test_process_does_what_the_run_in_this_process_does(first_run, shared_cache, tmp_path):
    """Then it is refused, as a process: the same command into the same --out."""
    run = first_run("dpo")
    arguments = [tmp_path / "out" if argument == run.folder else argument for argument in run.arguments]
    process = command("dpo.py", *arguments, ALIGNMENT_CACHE=str(shared_cache))
    assert process.status == 0 and process.err == run.err, process.err
    ours, theirs = (lines_of(folder / "metrics.jsonl") for folder in (run.folder, tmp_path / "out"))
    for row, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)              # the number of threads may differ
    before = fingerprints(tmp_path / "out")
    again = command("dpo.py", *arguments, ALIGNMENT_CACHE=str(shared_cache))
    check_refused(again, "holds another run", "--resume", "another --out")
    assert fingerprints(tmp_path / "out") == before


# ------------------------------------------------------------------ every method: resuming, rates, tokenizers

@every
def test_resumed_run_equals_a_straight_one(train, tmp_path, monkeypatch, method):
    """Each has a cache of its own: the run that is cut trains its reward model, and finds it afterwards."""
    flags, steps, different = own(method, "resume", ([], None, {}))
    flags = ["--epochs", 1, "--save_every", 2, "--eval_every", 1, *flags]
    run = train(method, *flags, out=tmp_path / "straight", cache=tmp_path / "cache of straight")
    assert run.status == 0, run.err
    straight = lines_of(run.folder / "metrics.jsonl")
    assert steps is None or straight[-1]["step"] == steps
    for name, values in different.items():
        assert len({row[name] for row in straight if name in row}) == values

    last, log = min(3, straight[-1]["step"] - 1), harness.Run.log           # 3: two steps past the checkpoint

    def kill(run, step, metrics):
        log(run, step, metrics)
        if step == last:
            raise KeyboardInterrupt

    again = functools.partial(train, method, *flags, out=tmp_path / "cut", cache=tmp_path / "cache of cut")
    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "log", kill)
        assert again().status == 130
    assert lines_of(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == last + 1
    run = again("--resume")
    assert run.status == 0, run.err
    assert lines_of(run.folder / "metrics.jsonl") == straight
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
                for name in ("straight", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method, flags", [
    case(name, flags) for name in METHODS for flags in [["--schedule", "linear"], *own(name, "rates", [])]])
def test_learning_rate_falls_to_0(train, monkeypatch, method, flags):
    """35 prompts: PPO's last batch has fewer minibatches than others."""
    runs, plain = [], harness.Run.finish
    monkeypatch.setattr(harness.Run, "finish", lambda run: runs.append(run) or plain(run))
    run = train(method, "--epochs", 1, *flags)
    assert run.status == 0, run.err
    assert runs[0].schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


@every
def test_order_does_not_follow_the_seed_or_warmup_is_ignored(train, monkeypatch, method):
    seeds, made, order, adamw = [], [], harness.shuffled_batches, common.adamw
    monkeypatch.setattr(harness, "shuffled_batches", lambda *args: seeds.append(args[3]) or order(*args))

    def note(model, lr, steps, schedule="constant_with_warmup", warmup=0.1):
        made.append((lr, schedule, warmup))
        return adamw(model, lr, steps, schedule, warmup)

    monkeypatch.setattr(common, "adamw", note)
    run = train(method, "--seed", 7, "--schedule", "linear", "--warmup", 0.25)
    assert run.status == 0, run.err
    assert {*seeds} == {7} and (1e-3, "linear", 0.25) in made


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ON_POLICY])
def test_tokens_trained_are_not_those_that_were_read(train, toy_reward, monkeypatch, method):
    read, runs, plain, finish = [], [], harness.Run.microbatches, harness.Run.finish

    def note(run, rows):
        for part, batch in plain(run, rows):
            read.append(int(batch.attention_mask.sum()) * torch.is_grad_enabled())
            yield part, batch

    monkeypatch.setattr(harness.Run, "microbatches", note)
    monkeypatch.setattr(harness.Run, "finish", lambda run: runs.append(run) or finish(run))
    flags = ["--labels", "human", "--rounds", 0] if method == "steerlm" else []
    run = train(method, "--reward", toy_reward, *flags)
    assert run.status == 0, run.err
    assert runs[0].counts["tokens_trained"] == sum(read) > 0


@pytest.mark.parametrize("method", [name for name in METHODS if "check_finite" in (
    ROOT / f"{name}.py").read_text(encoding="utf-8")])
def test_loss_that_is_not_finite_is_of_another_step(train, monkeypatch, method):
    """What a script says of a step has the number of that step in metrics.jsonl."""
    seen, steps, check, log = [], [], harness.check_finite, harness.Run.log

    def note(values, step, prompts, name="loss", flag="--lr"):
        seen.append((step, len(steps) + 1, flag))
        check(values, step, prompts, name, flag)

    monkeypatch.setattr(harness, "check_finite", note)
    monkeypatch.setattr(harness.Run, "log", lambda *args: steps.append(args[1]) or log(*args))
    run = train(method, "--epochs", 0.5)
    assert run.status == 0, run.err
    of_steps = [(step, expected) for step, expected, flag in seen if flag == "--lr"]
    assert len({step for step, _ in of_steps}) > 1 and all(step == expected for step, expected in of_steps)


@every
def test_small_forward_passes_change_nothing(first_run, train, method):
    """A step is split into parts that fit --token_budget: a mean over a part instead of the step would show.

    Accuracies are left out: they count ties as a half, and rounding breaks ties.
    """
    run = train(method, "--token_budget", 150)
    assert run.status == 0, run.err
    whole, parts = ([{name: value for name, value in row.items() if "accurac" not in name}
                     for row in lines_of(folder / "metrics.jsonl")]
                    for folder in (first_run(method).folder, run.folder))
    for row, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(row, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("bos, pad", [("<bos>", "<eos>"), (None, None)],
                         ids=["PAD is EOS", "neither PAD nor BOS"])
@every
def test_tokenizers_without_pad_or_bos_train(train, tmp_path, method, bos, pad):
    run = train(method, model=save_toy(tmp_path / "model", characters(bos, pad)))
    assert run.status == 0, run.err
    check_trains(run.folder)
    check_generates(run.folder)
    if method == "dpo":
        check_starts_as_reference(run.folder)


# ------------------------------------------------------------------------------------ every method: bad input

@pytest.mark.parametrize("flags, parts", [
    (["--reward", "gold"], ["--reward gold", "only the embedded task"]),
    (["--label_noise", 0.5], ["--label_noise must be in [0, 0.5)"]),
    (["--lr", 0], ["--lr", "above 0"]),
    (["--resume"], ["nothing to resume"]),
    (["--data", "."], ["is a directory", ".jsonl"]),
], ids=["reward", "label noise", "learning rate", "resume", "data"])
def test_bad_shared_settings_are_refused(train, flags, parts):
    """The harness refuses them, for all methods alike."""
    run = train("dpo", *flags)
    check_refused(run, *parts)
    check_does_not_block(run.folder)


@every
def test_unknown_flags_and_values_are_refused_before_anything_is_loaded(train, method):
    for flags in (["--betta", 0.1], ["--schedule", "constnat"], ["--reward_noise", "word"]):
        run = train(method, *flags, model="/nowhere", data="/nowhere")
        check_refused_by_argparse(run, *map(str, flags))
        check_does_not_block(run.folder)


@every
def test_without_a_reward_a_method_trains_or_is_refused(train, method):
    """On pairs: a method of pairs trains, and one that maximises a reward says that there is none."""
    run = train(method, "--reward", "none")
    if run.status:
        check_refused(run, "no reward to maximise", "--reward")
        check_does_not_block(run.folder)
    else:
        check_trains(run.folder)
    assert run.status or method not in ON_POLICY + ON_CANDIDATES


@every
def test_prompts_alone_train_or_are_refused(train, prompts_only, toy_reward, method):
    """With a reward model: a method that samples trains; one that needs answers says that there are none."""
    run = train(method, "--reward", toy_reward, data=prompts_only)
    if run.status:
        check_refused(run)
        check_does_not_block(run.folder)
    else:
        check_trains(run.folder)
        check_generates(run.folder)


@pytest.mark.parametrize("cause", ["weights", "training"])
@every
def test_nan_in_the_policy_is_named_with_step_and_prompt(train, toy, toy_reward, tmp_path, method, cause):
    """Sampling from it would raise deep inside; the run must say first what is wrong.

    An exception that harness.main lets through, a traceback on the screen, fails this test too.
    """
    spoiled = cause == "weights"
    model = save_toy(tmp_path / "model", characters(), spoil=spoil_everything) if spoiled else toy
    run = train(method, "--reward", toy_reward, "--lr", 1e-3 if spoiled else 1e10, model=model)
    line = check_refused(run, after_warnings=True)
    assert re.search(r"step \d", line) and re.search(r"say it \d+:", line), line


@pytest.mark.parametrize("scale", [None, {"mean": 0.5, "std": 2.0}], ids=["without scale", "with scale"])
@every
def test_reward_of_nan_is_never_trained_on(train, tmp_path, method, scale):
    """A run is stopped before its first step, naming the prompt: an evaluation would show nan as a score.

    A reward model without a scale gets one before the run begins. One with a scale of its own is first asked
    when the candidates are made, or in the first evaluation.
    """
    settings = {"reward_scale": scale} if scale else {}
    run = train(method, "--reward", save_reward(tmp_path / "reward", spoil=spoil_head, **settings))
    line = check_refused(run, "the reward is nan", "'say it ", after_warnings=True)
    before = method in ("decision_transformer", "pro", "rso")         # candidates come before the evaluation
    assert f"step {int(bool(scale) and before)}:" in line, line
    if not scale and method in ON_POLICY + ON_CANDIDATES:
        check_does_not_block(run.folder)


# ------------------------------------------------------------------- kinds of methods: each step samples anew

@on_policy
def test_first_samples_are_the_references_and_each_step_has_its_own(first_run, method):
    rows = check_samples_from_reference(first_run(method).folder, own(method, "steps"))
    names = {"objective/scores", "objective/kl", "grad_norm", "eos_rate"} | own(method, "metrics", set())
    assert all(row.keys() >= names for row in rows)
    assert len(rows) > 1 and len({row["objective/scores"] for row in rows}) == len(rows), "samples of its own"


@on_policy
def test_prompts_with_a_reward_train(train, prompts_only, toy_reward, method):
    run = train(method, "--reward", toy_reward, data=prompts_only)
    assert run.status == 0, run.err
    check_samples_from_reference(run.folder, own(method, "steps"))
    check_generates(run.folder)
    assert re.search(r"^proxy +-?\d", run.out, re.M) and "no pairs" not in run.err


@on_policy
def test_reward_model_with_another_tokenizer_reads_text(train, tmp_path, monkeypatch, method):
    """Not the policy's ids: the scores of a step are those that the model alone gives to the step's texts."""
    reward, alone = reversed_reward(tmp_path / "reward")
    rollouts, plain = [], harness.rollout

    def spy(run, prompts, greedy=False):
        batch, responses, ended = plain(run, prompts, greedy)
        rollouts.append([alone(prompt, response) for prompt, response in zip(prompts, responses)])
        return batch, responses, ended

    monkeypatch.setattr(harness, "rollout", spy)
    run = train(method, "--reward", reward)
    assert run.status == 0, run.err
    names = own(method, "scores", ["objective/scores"])
    rows = check_samples_from_reference(run.folder, own(method, "steps"))
    logged = [row[name] for row in rows for name in names]
    assert logged == pytest.approx([sum(scores) / len(scores) for scores in rollouts], abs=1e-4)
    assert max(rollouts[0]) - min(rollouts[0]) > 0.1, "else any reading would do"


@pytest.mark.parametrize("sign, rate, said", [
    (-1, 0, r"0 of (\d+) responses end with EOS, 0 are empty"),
    (1, 1, r"(\d+) of \1 responses end with EOS, \1 are empty")], ids=["never stops", "stops at once"])
@on_policy
def test_policy_that_never_stops_or_is_silent(train, toy_reward, tmp_path, method, sign, rate, said):
    model = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(sign))
    run = train(method, "--reward", toy_reward, model=model)
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    found = re.search(r"(?<!\d)" + said, warnings[0])
    assert len(warnings) == 1 and "step 1" in warnings[0] and found, warnings
    assert method not in OWN or int(found[1]) == 8                   # the batch size of SMALL
    rows = check_samples_from_reference(run.folder, own(method, "steps"))
    assert all(row["eos_rate"] == rate for row in rows)
    check_generates(run.folder)


# --------------------------------------------------------------- kinds of methods: a reward that is maximised

@pytest.mark.parametrize("method", ON_POLICY + ON_CANDIDATES)
def test_noise_in_the_reward_changes_what_it_can_change(train, toy_reward, tmp_path, method):
    """One draw a prompt changes no order of its candidates, so methods that only rank them do not see it."""
    norms = {}
    for noise in ("none", "prompt", "response"):
        run = train(method, "--reward", toy_reward, "--epochs", 0.25, "--reward_noise", noise,
                    out=tmp_path / noise)
        assert run.status == 0, run.err
        norms[noise] = [row["grad_norm"] for row in check_rows(run.folder)]
    assert norms["response"] != norms["none"]
    if own(method, "noise") is not None:
        assert (norms["prompt"] != norms["none"]) == own(method, "noise")


@pytest.mark.parametrize("method", [name for name in ON_POLICY + ON_CANDIDATES if name not in ON_RANKINGS])
def test_prompts_without_a_reward_are_refused(train, prompts_only, method):
    run = train(method, data=prompts_only)
    warning, _ = run.err.splitlines()
    assert warning.startswith("warning: no pairs to train a reward model from")
    check_refused(run, "no reward to maximise", "--reward", after_warnings=True)
    check_does_not_block(run.folder)


# ------------------------------------------------------------------------ kinds of methods: scored candidates

@on_candidates
def test_prompts_with_a_reward_make_candidates(train, prompts_only, toy_reward, method):
    run = train(method, "--reward", toy_reward, *sampled(method), data=prompts_only)
    assert run.status == 0, run.err
    check_trains(run.folder, 3)


@pytest.mark.parametrize("method, flags, said", [
    *[(name, ["--sources", "P"], "the data has no answers of its own") for name in ON_RANKINGS],
    *[(name, ["--source", "direct"], "no pairs to train on") for name in having("source")]])
def test_prompts_alone_have_no_answers_of_their_own(train, prompts_only, toy_reward, method, flags, said):
    run = train(method, "--reward", toy_reward, *flags, data=prompts_only)
    check_refused(run, said)
    check_does_not_block(run.folder)


@on_candidates
def test_policy_that_never_stops_is_not_taught_to_stop(train, toy_reward, tmp_path, method):
    """Each sample is cut off, so EOS (60 nats away) must not be trained: losses stay those of letters."""
    model = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(-1))
    run = train(method, "--reward", toy_reward, *sampled(method), model=model)
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    assert len(warnings) == 1 and "step 1: 0 of" in warnings[0], warnings
    assert "responses end with EOS, 0 are empty" in warnings[0], warnings
    first, whole = check_trains(run.folder)[0], 8 * math.log(len(characters()) - 1)
    name = next(name for name in ("loss/sft", "logps/chosen", "loss") if name in first)
    assert abs(first[name]) == pytest.approx(whole, rel=0.1)
    check_generates(run.folder)


@on_candidates
def test_policy_that_says_nothing_has_nothing_to_rank(train, toy_reward, tmp_path, method):
    """Every sample is empty, so a prompt has one candidate and no pair. Methods without pairs train on it."""
    model = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(1))
    run = train(method, "--reward", toy_reward, *sampled(method), model=model)
    said = warnings_of(run)
    assert "are empty (said once)" in said[0] and own(method, "silence", len(said)) == len(said), said
    assert len(said) == 1 or "of 35 rankings, 35 have one response only" in said[1]
    if method in having("source"):
        check_refused(run, "no pairs to train on", after_warnings=True)
    else:
        assert run.status == 0, run.err
        check_rows(run.folder)


@pytest.mark.parametrize("rows, prompt", [
    (hh_rows(), r"\n\nHuman: hi \d+\n\nAssistant:\n"),
    (ranked_rows(), r"say \d+:\n"),
    (chat_rows(), r"<user>hi \d+<a>\n"),
], ids=["HH", "ranking", "chat"])
@pytest.mark.parametrize("method, flags", [*[(name, ["--sources", "P"]) for name in having("sources")],
                                           *[(name, ["--source", "direct"]) for name in having("source")]])
def test_data_with_answers_of_its_own_needs_no_reward(train, chat_toy, tmp_path, method, flags, rows, prompt):
    """Scored answers and pairs are enough: no reward model, and nothing is sampled but for evaluation."""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run = train(method, "--reward", "none", "--batch_size", 3, *flags, model=chat_toy, data=data)
    assert run.status == 0, run.err
    check_trains(run.folder)
    assert re.match(prompt, (run.folder / "samples.txt").read_text(encoding="utf-8"))
    assert "tokens/s generated" not in run.out and "--reward" not in run.err


@on_rankings_and_the_best
def test_systems_and_scores_of_rankings_count(train, tmp_path, method):
    """What is imitated is the best by score, of the named writers.

    " yes i" costs a token more than " hm i" or " no i".
    """
    upside_down, loss = [row | {"scores": row["scores"][::-1]} for row in ranked_rows()], {}
    data = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((ranked_rows(), upside_down))]
    for i, systems in ((0, ""), (1, ""), (0, "medium,weak"), (0, "weak,strong"), (0, "weak,nobody")):
        run = train(method, "--reward", "none", "--sources", "P", "--systems", systems, data=data[i],
                    out=tmp_path / f"{i} {systems}")
        assert run.status == 0, run.err
        assert ("have one response only" in run.err) == (systems == "weak,nobody")
        loss[i, systems] = lines_of(run.folder / "metrics.jsonl")[1]["loss/sft"]
    token = pytest.approx(math.log(len(characters())), rel=0.1)
    others = (1, ""), (0, "medium,weak"), (0, "weak,nobody")
    assert [loss[0, ""] - loss[key] for key in others] == [token] * 3
    assert loss[0, "weak,strong"] == pytest.approx(loss[0, ""], rel=1e-5)
    run = train(method, "--reward", "none", "--sources", "P", "--systems", "nobody", data=data[0])
    check_refused(run, "no answers of its own by nobody", "medium, strong, weak")


# ------------------------------------------------------------------------- kinds of methods: conditioned ones

@conditioned
def test_conditioned_policy_is_steered_after_reload(first_run, here, toy, pairs, method):
    folder = first_run(method).folder
    known = json.loads((folder / "attributes.json").read_text(encoding="utf-8"))["levels"]
    name, _ = own(method, "attribute", ([*known][0], None))
    assert name in known
    ask = functools.partial(here, method, "--model", toy, "--data", pairs, "--max_length", 64,
                            "--max_new_tokens", 8, "--prompt", "say it 1:")
    for level in (0, 1):
        answer = ask("--eval_samples", 3, "--policy", folder, "--steer", f"{name}={level}")
        lines = answer.out.split("\n  ")
        assert answer.status == 0, answer.err
        assert lines[0].startswith(f"say it 1:<{name}:") and len(lines) == 1 + 2 * 3       # before and after
    check_refused(ask("--policy", folder, "--steer", f"{name}=99"), "--steer", f"levels of {name}")
    check_refused(ask("--policy", toy), "attributes.json", f"{method}.py")


# ----------------------------------------------------------------- single methods: their settings and metrics

@pytest.mark.parametrize("method, flags, parts", [
    case(name, *row) for name in METHODS for row in own(name, "bad", [])])
def test_bad_settings_are_refused(train, method, flags, parts):
    run = train(method, *flags, quick=False)
    if "invalid choice" in run.err:
        check_refused_by_argparse(run, *parts)
    else:
        check_refused(run, *parts)
    check_does_not_block(run.folder)


def test_dpo_loss_starts_at_ln_2(first_run):
    run = first_run("dpo")
    check_starts_as_reference(run.folder)
    loss = table_of(run.out)["loss"]
    assert loss[0] == "0.693" and loss[1] != "0.693"


def test_dpo_loss_starts_at_ln_2_without_pad(train, tmp_path):
    """Other tokenizers: in the test above, and in test_tokenizers_without_pad_or_bos_train."""
    run = train("dpo", model=save_toy(tmp_path / "model", characters("<bos>", None)))
    assert run.status == 0, run.err
    check_starts_as_reference(run.folder)
    assert all(math.isfinite(v) for row in lines_of(run.folder / "metrics.jsonl") for v in row.values())
    check_generates(run.folder)


def test_dpo_takes_systems_as_named(train, tmp_path):
    """--pairs "weak>strong" against the scores: the pairs come from the names."""
    data, first = write_rows(tmp_path / "r.jsonl", ranked_rows()), {}
    for kind in ("strong>weak", "weak>strong"):
        out = tmp_path / kind.replace(">", "-")
        run = train("dpo", "--reward", "none", "--pairs", kind, data=data, out=out)
        assert run.status == 0, run.err
        first[kind] = lines_of(out / "metrics.jsonl")[1]
    right, wrong = first["strong>weak"], first["weak>strong"]
    assert right["logps/chosen"] == pytest.approx(wrong["logps/rejected"], abs=1e-3)
    longer = right["logps/rejected"] - right["logps/chosen"]            # "yes" has a character more than "no"
    assert longer == pytest.approx(math.log(len(characters())), rel=0.1)


@pytest.mark.parametrize("spoil, flags", [(spoil_everything, []), (spoil_letter_q, ["--max_new_tokens", 1])],
                         ids=["in every forward pass", "in some answers only"])
def test_dpo_without_a_reward_stops_at_nan_in_the_weights(train, tmp_path, spoil, flags):
    model = save_toy(tmp_path / "model", characters(), spoil=spoil)
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(chosen=" quiet"))
    run = train("dpo", "--reward", "none", *flags, model=model, data=data)
    line = check_refused(run, after_warnings=True)
    assert re.search(r"step \d", line) and re.search(r"say it \d+:", line), line


def test_dpo_counts_long_prompts_and_keeps_their_answers(train, tmp_path):
    """A nearly uniform model gives each of the answer's 7 tokens ln V nats: fewer give a smaller sum."""
    rows = [{"prompt": f"{'long ' * 30}{i:02}:", "chosen": f"yes {i:02}", "rejected": f"no  {i:02}"}
            for i in range(20)]
    rows += [row | {"prompt": f"{i}"} for i, row in enumerate(rows[:5])]
    run = train("dpo", "--reward", "none", "--max_length", 32, data=write_rows(tmp_path / "long.jsonl", rows))
    assert run.status == 0, run.err
    warnings = warnings_of(run)
    assert len(warnings) == 1 and "20 of 25 prompts" in warnings[0] and "--max_length" in warnings[0]
    check_starts_as_reference(run.folder)
    whole = 7 * math.log(len(characters()))
    for row in lines_of(run.folder / "metrics.jsonl")[:2]:
        for name in ("logps/chosen", "logps/rejected"):
            assert -row.get(name, row.get(f"eval/{name}")) == pytest.approx(whole, rel=0.05)


def test_ppo_refuses_a_value_model_that_reads_other_tokens(train, tmp_path):
    other = save_toy(tmp_path / "other", characters(alphabet=LETTERS[::-1]))
    run = train("ppo", "--value_model", other)
    check_refused(run, "value model", str(other), "another tokenizer")
    check_does_not_block(run.folder)
    run = train("ppo", "--value_model", save_toy(tmp_path / "same", characters()))
    assert run.status == 0, run.err                              # the same tokens under another name are fine


@on_rankings_and_the_best
def test_ranking_and_imitation_add_up_and_start_at_the_sft_policy(first_run, method):
    """The toy policy is nearly uniform: a token costs ln V nats."""
    rows = check_trains(first_run(method).folder)
    first, token = rows[0], math.log(len(characters()))
    whole = first["loss/rank"] + own(method, "sft") * first["loss/sft"]
    assert first["loss"] == pytest.approx(whole, rel=1e-4)
    evaluated = [row for row in lines_of(first_run(method).folder / "metrics.jsonl") if "eval/kl" in row]
    assert [0 <= row["eval/score_accuracy"] <= 1 for row in evaluated] == [True, True]
    assert evaluated[0]["eval/nll"] == pytest.approx(token, rel=0.05)


def test_pro_scores_are_means_over_tokens(first_run):
    first, token = check_trains(first_run("pro").folder)[0], math.log(len(characters()))
    assert [-first["scores/best"], -first["scores/worst"]] == pytest.approx([token] * 2, rel=0.05)


def test_rrhf_has_the_best_of_four(first_run):
    assert check_trains(first_run("rrhf").folder)[0]["rewards/best"] > 0, "by a reward whose mean is 0"


def test_rso_starts_as_its_reference(first_run):
    rows = check_trains(first_run("rso").folder)
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-4) and rows[0]["rewards/accuracies"] == 0.5
    assert rows[-1]["rewards/margins"] != 0


def test_raft_imitates_whole_samples_that_are_better_than_the_mean(first_run):
    """The samples have nearly all of the 8 tokens, each of ln V nats."""
    first, token = check_trains(first_run("raft").folder)[0], math.log(len(characters()))
    assert 6 * token < first["loss"] < 8.5 * token and first["round/best"] > first["round/mean"]


def test_raft_scores_text_and_each_prompts_best_is_its_own(train, tmp_path, monkeypatch):
    """With a reward model that reads other tokens than the policy."""
    reward, alone = reversed_reward(tmp_path / "reward")
    rollouts, plain = [], harness.samples.rollout

    def spy(run, prompts):
        rollouts.append((prompts, *plain(run, prompts)))
        return rollouts[-1][1:]

    monkeypatch.setattr(harness.samples, "rollout", spy)
    run = train("raft", "--reward", reward, "--candidates", 2, "--rounds", 2)
    assert run.status == 0, run.err
    for row, (prompts, _, texts, _) in zip(check_trains(run.folder, 6)[::3], rollouts, strict=True):
        scores = torch.tensor([alone(*pair) for pair in zip(prompts, texts)]).view(-1, 2)
        assert prompts[::2] == prompts[1::2] and len(set(prompts)) == len(scores)
        assert row["round/mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert row["round/best"] == pytest.approx(scores.amax(1).mean().item(), abs=1e-4)


# ------------------------------------------------------- forms of data, output and rewards, shown with dpo.py

@pytest.mark.parametrize("rows, name, flags, prompt", [
    (hh_rows(), "hh.jsonl", [], r"\n\nHuman: hi \d+\n\nAssistant:\n"),
    (ranked_rows(), "ranked.jsonl", ["--pairs", "strong>weak"], r"say \d+:\n"),
    (ranked_rows(), "curriculum.jsonl", ["--pairs", "strong>weak", "--hard_pairs", "strong>medium"],
     r"say \d+:\n"),
    (chat_rows(), "chat.jsonl", [], r"<user>hi \d+<a>\n"),
    (pair_rows(20), "zipped.jsonl.gz", [], r"say it \d+:\n"),
], ids=["HH", "systems", "curriculum", "chat", "gzip"])
def test_every_form_of_data_trains(train, chat_toy, tmp_path, rows, name, flags, prompt):
    run = train("dpo", "--reward", "none", *flags, model=chat_toy, data=write_rows(tmp_path / name, rows))
    assert run.status == 0, run.err
    check_starts_as_reference(run.folder)
    assert re.match(prompt, (run.folder / "samples.txt").read_text(encoding="utf-8"))


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
], ids=["malformed", "missing field", "empty chosen", "empty rejected", "equal", "HH strangers", "no row",
        "prompts only"])
def test_bad_rows_are_refused(train, tmp_path, rows, parts):
    run = train("dpo", "--reward", "none", data=write_rows(tmp_path / "bad.jsonl", rows))
    check_refused(run, *parts)
    check_does_not_block(run.folder)


def test_no_row_left_after_skipping_is_refused(train, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", pair_rows(3, chosen=""))
    run = train("dpo", "--skip_bad_rows", data=data)
    assert run.status == 2
    assert run.err.splitlines() == ["left out 3 of 3 rows: 3 empty response",
                                    "error: bad.jsonl: no usable row"]


def test_missing_data_file_is_refused_in_one_line(train):
    run = train("dpo", data="/nowhere/pairs.jsonl")
    check_refused(run, "no such file", "/nowhere/pairs.jsonl")
    assert run.out == ""
    check_does_not_block(run.folder)


def test_process_refuses_an_unknown_hub_model_in_one_line(pairs, tmp_path):
    out = tmp_path / "out"
    process = command("dpo.py", "--model", "nobody/no-such-model", "--data", pairs, "--out", out, *SMALL)
    check_refused(process, "nobody/no-such-model", "check the id and the network")
    assert process.out == ""
    check_does_not_block(out)


def test_out_and_resume_that_make_no_sense_are_refused(train, here, toy, pairs, tmp_path):
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("mine", encoding="utf-8")
    other.mkdir()
    (other / "args.json").write_text("{}", encoding="utf-8")
    for out, flags, parts in [(file, [], ["is a file", "directory"]),
                              (other, [], ["holds another run", "--resume"]),
                              (tmp_path / "new", ["--resume"], ["nothing to resume"]),
                              (other, ["--resume"], ["nothing to resume"])]:
        check_refused(train("dpo", "--reward", "none", *flags, out=out), *parts)
    run = here("dpo", "--model", toy, "--data", pairs, "--reward", "none", "--resume", *SMALL)
    check_refused(run, "--resume needs --out")
    assert file.read_text(encoding="utf-8") == "mine" and [p.name for p in other.iterdir()] == ["args.json"]
    check_does_not_block(tmp_path / "new")


def test_reward_model_of_several_labels_needs_one_of_them(train, tmp_path):
    labels = ["helpful", "harmless", "funny"]
    reward = save_toy(tmp_path / "reward", characters(), LlamaForSequenceClassification,
                      id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    for flags in ([], ["--reward_label", "sad"]):
        run = train("dpo", "--reward", reward, *flags)
        check_refused(run, "--reward_label", "helpful, harmless, funny")
        check_does_not_block(run.folder)
    run = train("dpo", "--reward", reward, "--reward_label", "funny")
    assert run.status == 0, run.err

    samples = (run.folder / "samples.txt").read_text(encoding="utf-8")
    model, tokenizer, scores = AutoModelForSequenceClassification.from_pretrained(reward), characters(), []
    for prompt, response in re.findall(r"(say it \d+:)\n  before: (.*)\n", samples):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        scores.append(model.score(hidden)[2].item())
    first = lines_of(run.folder / "metrics.jsonl")[0]
    assert first["eval/proxy"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


# ------------------------------------------------------------------------------------------ a real chat model

def test_smollm2_answers_a_chat_and_its_logps_are_the_plain_ones(smollm2):
    model, tokenizer = common.load_policy(smollm2, "cpu"), common.load_tokenizer(smollm2, 64)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Name a fruit."}], tokenize=False,
                                           add_generation_prompt=True)
    torch.manual_seed(0)
    batch = common.generate(model, tokenizer, [prompt], 2, max_new_tokens=12)
    texts, ended = common.decode(tokenizer, batch), common.finished(tokenizer, batch)
    for text, stopped, length in zip(texts, ended, batch.lengths):
        assert text.strip() and "<|im_" not in text
        assert length <= 12 and (stopped or length == 12)

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
    answers = [("a fruit", "Apple.", "Car."), ("a colour", "Red.", "Two."), ("a city", "Rome.", "Soup."),
               ("a bird", "Owl.", "Tea."), ("a tree", "Oak.", "Sock."), ("a number", "Six.", "Hat.")]
    rows = [{"chosen": f"\n\nHuman: Name {what}.\n\nAssistant: {good}",
             "rejected": f"\n\nHuman: Name {what}.\n\nAssistant: {bad}"} for what, good, bad in answers]
    data, out = write_rows(tmp_path / "hh.jsonl", rows), tmp_path / "out"
    process = command("dpo.py", "--model", smollm2, "--data", data, "--out", out, "--reward", "none",
                      "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 2, "--eval_samples", 1,
                      "--epochs", 1, "--batch_size", 3, "--save_every", 0)
    assert process.status == 0, process.err
    check_starts_as_reference(out)
    assert [row["step"] for row in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 2]
    check_generates(out)


@pytest.fixture(scope="module")
def eight_layers(smollm2, tmp_path_factory):
    """The first eight of SmolLM2's thirty layers, with its weights, its embedding and its tokenizer."""
    folder, model = tmp_path_factory.mktemp("smollm2-8"), common.load_policy(smollm2, "cpu")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:8], 8
    tasks.save_model(model, common.load_tokenizer(smollm2, 64), folder / "model")
    return folder / "model"


@pytest.mark.parametrize("method", [name for name in METHODS if own(name, "smollm2") is not None])
def test_smollm2_trains_one_step_and_loads_again(eight_layers, here, toy_reward, tmp_path, method):
    """On its own samples or on ranked answers of the data. The whole model: DPO, above.

    The reward model is tiny and reads letters: one of SmolLM2's size would say no more about the methods.
    """
    rows = [{"prompt": f"\n\nHuman: Name a {what}.\n\nAssistant:", "responses": [" Well.", " No.", " Car."],
             "scores": [2, 1, 0]} for what in ("fruit", "bird", "city", "tree", "hat")]
    data, out = write_rows(tmp_path / "ranked.jsonl", rows), tmp_path / "out"
    run = here(method, "--model", eight_layers, "--data", data, "--out", out, "--reward", toy_reward,
               "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 1, "--eval_samples", 1,
               "--batch_size", 2, "--save_every", 0, *QUICK[method], "--epochs", 0.5, *own(method, "smollm2"))
    assert run.status == 0, run.err
    if method in ON_POLICY:
        check_samples_from_reference(out, 1)
    else:
        check_trains(out, 1)
    check_generates(out)


# ----------------------------------------------------------------------- the embedded task: slow at first use

@pytest.fixture(scope="module")
def built():
    """`python -m tasks.build`, and the directory of seed 0's models that it built or found."""
    process = command("-m", "tasks.build")
    assert process.status == 0, process.err
    return process, build.home(harness.Config())


def test_build_prints_the_vital_figures(built):
    process, folder = built
    for name, value in json.loads((folder / "vitals.json").read_text(encoding="utf-8")).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(str(value))}$", process.out, re.M), name
    assert str(folder) in process.out


@every
def test_method_on_the_embedded_task_starts_at_the_sft_policy(built, tmp_path, method):
    """DPO's run is a process."""
    out = tmp_path / "out"
    flags, steps, samples = own(method, "embedded", ([*QUICK[method], "--epochs", 0.05], None, None))
    arguments = ["--eval_prompts", 8, "--eval_samples", 2, "--out", out, *flags]
    process = method == "dpo"
    run = command("dpo.py", *arguments) if process else script(method, *arguments, cache=tasks.CACHE)
    assert run.status == 0 and not run.err.strip(), run.err
    first, table = check_trains(out, steps)[0], table_of(run.out)
    for name in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(table[name]) == 4, name
    assert all(len(table[name]) == 2 for name in ("win_rate", "win_rate_proxy", "win_rate_judge"))
    assert table["kl"][0] == "0.000"
    assert float(table["fluency"][0]) > 0.5, "the start must be the SFT policy, not a random model"
    generated = re.search(r"^\d+ tokens/s generated, \d+% of the training time$", run.out, re.M)
    assert samples in (None, bool(generated)), "the samples of the SFT policy come from the pool"
    if method == "dpo":
        check_starts_as_reference(out)
    if method in ON_POLICY:                        # on the SFT policy the rewards have mean 0 and deviation 1
        check_samples_from_reference(out, steps)
        assert abs(first["objective/scores"]) < 0.4 and first["eos_rate"] > 0.9
    if "--rare" in flags:
        assert len(table["rare_gold"]) == 2
    if method in CONDITIONED:                      # before training it is asked without tags, afterwards with
        known = json.loads((out / "attributes.json").read_text(encoding="utf-8"))["levels"]
        _, name = own(method, "attribute", (None, [*known][0]))
        question = "review this french western and mention the songs:"
        answer = script(method, "--policy", out, "--prompt", question, "--steer", f"{name}=9",
                        cache=tasks.CACHE)
        lines = answer.out.split("\n  ")
        assert answer.status == 0, answer.err
        assert lines[0].startswith(question) and f"<{name}:9>" in lines[0] and len(lines) == 1 + 2 * 4


def test_build_keeps_other_models_or_samples_than_were_made(built):
    """What later stages need: the base that SFT began with, what it read, which samples were cut off."""
    _, folder = built
    base, sft = (common.load_policy(folder / name, "cpu", "float32") for name in ("base", "sft"))
    tokenizer = common.load_tokenizer(folder / "sft", 160)
    seen = json.loads((folder / "demonstrations.json").read_text(encoding="utf-8"))
    assert len(seen) == build.DEMONSTRATIONS
    batch = common.encode(tokenizer, *map(list, zip(*seen[:200])))
    with torch.no_grad():
        before, after = (-common.sequence_logps(model, batch).sum() / batch.lengths.sum()
                         for model in (base, sft))
    assert before.item() == pytest.approx(math.log(len(tokenizer)), rel=0.1) and after < 2.5
    rows = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    sizes = {name: (len(some), len(some[0]["responses"])) for name, some in rows.items()}
    assert sizes == {"pool": (512, 16), "shown": (512, 12), "test": (512, 4)}
    texts = [(text, ended) for row in rows["pool"] for text, ended in zip(row["responses"], row["ended"],
                                                                          strict=True)]
    assert 0.8 < sum(ended for _, ended in texts) / len(texts) <= 1
    ids, eos = [tokens for row in rows["pool"] for tokens in row["ids"]], tokenizer.eos_token_id
    assert all(tokens[-1] == eos if ended else len(tokens) == 40 and eos not in tokens
               for tokens, (_, ended) in zip(ids, texts, strict=True))
    pool = build.load_task(harness.Config()).pool
    again = common.response_ids(tokenizer, [text for row in pool.values() for text in row.responses])
    assert again == ids                                          # what was sampled is what is trained on
    vitals = json.loads((folder / "vitals.json").read_text(encoding="utf-8"))
    assert 0.65 < vitals["judge accuracy"] < 0.85 and 0.65 < vitals["proxy accuracy"] < 0.9


def test_best_of_n_curves_are_made_of_other_samples(built, tmp_path, monkeypatch):
    _, whole = built
    for name in ("sft", "proxy"):
        shutil.copytree(whole / name, tmp_path / name)
    for name in ("samples.json", "rankings.json"):
        shutil.copy(whole / name, tmp_path / name)
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    monkeypatch.setattr(build, "BEST_OF", (3, 5))
    config = harness.Config(device="cpu")
    proxy, gold = harness.test_pool(config)
    rows = json.loads((tmp_path / "test_pool.json").read_text(encoding="utf-8"))
    assert [row["prompt"] for row in rows] == build.load_task(config).prompts["test"][:3]
    assert proxy.shape == gold.shape == (3, 5) and gold.tolist() == pytest.approx([
        pytest.approx(row["gold"]) for row in rows])
    reward = common.load_reward_model(tmp_path / "proxy", 160, "cpu")
    for row, scores in zip(rows, proxy):
        own = reward([row["prompt"]] * 5, row["responses"])
        torch.testing.assert_close(own, scores, rtol=1e-3, atol=1e-3)
    again, _ = harness.test_pool(config)
    assert torch.equal(again, proxy) and proxy.std() > 0.1


def test_killed_build_goes_on_with_the_missing_proxy(built, tmp_path, monkeypatch):
    """As if killed before the proxy: it is made now, and nothing before it is made again.

    It gets two passes instead of four, to save time. (Its weights equal the old ones only under the same
    number of threads, so they would not be compared anyway.)
    """
    _, whole = built
    half = tmp_path / whole.relative_to(tasks.CACHE)
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("proxy*", "vitals.json", "test_pool*"))
    shutil.copytree(whole / "proxy", half / "proxy.part")                 # an attempt that was not renamed
    (half / "proxy.part" / "model.safetensors").write_bytes(b"half")
    files = ("base/model.safetensors", "sft/model.safetensors", "samples.json", "rankings.json",
             "demonstrations.json")
    kept = {name: (half / name).stat().st_mtime_ns for name in files}
    monkeypatch.setattr(tasks, "CACHE", tmp_path)
    monkeypatch.setattr(build, "Recipe", lambda **settings: harness.Recipe(**settings | {"epochs": 2}))
    build.report(harness.Config())
    assert {name: (half / name).stat().st_mtime_ns for name in files} == kept
    made = AutoModelForSequenceClassification.from_pretrained(half / "proxy")
    assert set(made.config.reward_scale) == {"mean", "std"}
    old, new = (json.loads((path / "vitals.json").read_text(encoding="utf-8")) for path in (whole, half))
    assert new.pop("proxy accuracy") > 0.6 and new.pop("best-of-16 gold, by proxy") > 0.3
    assert new.pop("seconds") and new.items() <= old.items() and len(new) > 4
