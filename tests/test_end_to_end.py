"""Whole runs of the methods, common.py and compare.py through their command line, as a user meets them.

Processes cost seconds each, so most bad input goes to the same entry point, common.main, inside this one. The tests of the
embedded task come last: they build its models where the cache lacks them.
"""
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
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
import compare
import decision_transformer
import dpo
import ppo
import pro
import raft
import remax
import rrhf
import rso
import stages
import steerlm
from tasks import build

ROOT = Path(__file__).resolve().parents[1]
LN2 = 0.6931
LETTERS = string.ascii_letters + string.digits + " .,:<>\n"
SMALL = ["--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 2, "--eval_samples", 1, "--epochs", 0.5,
         "--batch_size", 8, "--lr", 1e-3]
METHODS = {f"{method.__name__}.py": method for method in (dpo, ppo, remax, rrhf, pro, rso, raft, decision_transformer, steerlm)}
on_policy = pytest.mark.parametrize("script", ["ppo.py", "remax.py"])
# What learns from scored candidates, with so few of them that SMALL takes three steps on the 35 train prompts of pairs.jsonl.
FEW = {"rrhf.py": ["--candidates", 2], "pro.py": ["--candidates", 3], "rso.py": ["--candidates", 4, "--num_samples", 2],
       "raft.py": ["--candidates", 2, "--rounds", 1]}
# What is conditioned on the scores of the data's own answers; the answers of pairs.jsonl are of equal length.
CONDITIONED = {"decision_transformer.py": ["--epochs", 0.35],
               "steerlm.py": ["--attributes", "score", "--rounds", 0, "--epochs", 0.3, "--predictor_epochs", 0.5]}
on_candidates = pytest.mark.parametrize("script", FEW)


def sampled(script):
    """Options by which the policy's own samples are the only candidates."""
    return FEW[script] + (["--sources", "D"] if script in ("rrhf.py", "pro.py") else [])


def command(*arguments, cwd=ROOT, **environment):
    """One script, run to its end; unlike run_script it serves fixtures of any scope."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=900,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment)


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


def write_rows(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def pair_rows(n=40, **changes):
    return [{"prompt": f"say it {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"} | changes for i in range(n)]


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def fingerprints(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def check_starts_as_reference(out):
    """The loss of the first evaluation and of the first step is ln 2: the policy is still its own reference."""
    before, first = lines_of(out / "metrics.jsonl")[:2]
    assert before["step"] == 0 and before["eval/loss"] == pytest.approx(LN2, abs=1e-4)
    assert first["step"] == 1 and first["loss"] == pytest.approx(LN2, abs=1e-4)


def check_samples_from_reference(out, steps):
    """The KL of the first evaluation and of the first step's samples is 0; all is finite. Returns the steps' rows."""
    rows = lines_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, *range(1, steps + 1), steps]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4) and rows[1]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[1:-1]


def check_trains(out, steps=3):
    """The policy starts as the initial one, and all is finite. Returns the steps' rows."""
    rows = lines_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, *range(1, steps + 1), steps]
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-4) and rows[-1]["eval/kl"] != 0
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return rows[1:-1]


def check_generates(out):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("say", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=2, min_new_tokens=2).shape == (1, prompt.shape[1] + 2)
    return model


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy") / "model", characters())


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows())


@pytest.fixture
def here(monkeypatch, capsys, tmp_path):
    """Run a script's command line in this process: (status, screen). What it caches goes to tmp_path."""
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")

    def run(*arguments, script="dpo.py"):
        capsys.readouterr()
        return main(monkeypatch, script, *arguments), capsys.readouterr()
    return run


def main(monkeypatch, script, *arguments):
    """Exit status of a command line that is run in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        common.main(METHODS[script].Config, METHODS[script].run, METHODS[script].EXPERIMENTS)
    except SystemExit as stop:
        return stop.code
    return 0


# -------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture(scope="module", params=METHODS)
def first_run(request, toy, pairs, tmp_path_factory):
    """One run as a process, with a reward model trained from the pairs: (process, its --out, its whole command).

    Of the methods in FEW and CONDITIONED it is run in this process, to save seconds; the embedded task below runs them as processes.
    """
    folder, few = tmp_path_factory.mktemp("first"), (FEW | CONDITIONED).get(request.param)
    arguments = [request.param, "--model", toy, "--data", pairs, "--out", folder / "out", *SMALL, *(few or [])]
    if not few:
        return command(*arguments, ALIGNMENT_CACHE=str(folder / "cache")), folder / "out", arguments
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(common, "CACHE", folder / "cache")
        status = main(patch, *arguments)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue()), folder / "out", arguments


first_run_as_process = pytest.mark.parametrize("first_run", ["dpo.py", "ppo.py", "remax.py"], indirect=True)
first_run_on_candidates = pytest.mark.parametrize("first_run", FEW, indirect=True)
first_dpo_run = pytest.mark.parametrize("first_run", ["dpo.py"], indirect=True)
first_on_policy_run = pytest.mark.parametrize("first_run", ["ppo.py", "remax.py"], indirect=True)


def test_run_writes_every_file(first_run):
    process, out, arguments = first_run
    assert process.returncode == 0, process.stderr
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "args.json",
                     "metrics.jsonl", "samples.txt"}
    assert not [name for name in names if name.endswith(".part")]
    assert ("attributes.json" in names) == (arguments[0] in CONDITIONED)
    own, default = {"dpo.py": ("beta", 0.1), "ppo.py": ("kl_coef", 0.05), "remax.py": ("kl_coef", 0.05),
                    "rrhf.py": ("sources", "DP"), "pro.py": ("sft_weight", 0.05), "rso.py": ("beta", 0.5),
                    "raft.py": ("ranking", "local"), "decision_transformer.py": ("bins", 10), "steerlm.py": ("share", 1.0)}[arguments[0]]
    assert json.loads((out / "args.json").read_text())[own] == default
    assert [row["step"] for row in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3, 3]
    assert len(re.findall("^  after: ", (out / "samples.txt").read_text(), re.M)) == 2


@first_dpo_run
def test_loss_starts_at_ln_2(first_run):
    check_starts_as_reference(first_run[1])


@first_on_policy_run
def test_first_samples_are_not_the_references_or_a_metric_is_nan(first_run):
    _, out, arguments = first_run
    rows = check_samples_from_reference(out, 3)
    names = {"ppo.py": {"loss/policy", "loss/value", "val/explained_variance", "policy/clipfrac", "policy/approxkl"},
             "remax.py": {"loss", "objective/greedy_scores"}}[arguments[0]]
    assert all(row.keys() >= names | {"objective/scores", "objective/kl", "grad_norm", "eos_rate"} for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert len({row["objective/scores"] for row in rows}) == 3, "each step scores samples of its own"


@first_run_on_candidates
def test_step_on_candidates_lacks_a_metric_or_the_sft_policy_is_not_the_start(first_run):
    """The toy policy is nearly uniform: a token costs ln V nats, and the samples have nearly all of the 8 tokens."""
    _, out, arguments = first_run
    script, rows = arguments[0], check_trains(out)
    assert all(row["grad_norm"] > 0 for row in rows)
    first, token = rows[0], math.log(len(characters()))
    if script == "rso.py":
        assert first["loss"] == pytest.approx(LN2, abs=1e-4) and first["rewards/accuracies"] == 0.5
        assert rows[-1]["rewards/margins"] != 0
    elif script == "raft.py":
        assert 6 * token < first["loss"] < 8.5 * token and first["round/best"] > first["round/mean"]
    else:
        weight = 1 if script == "rrhf.py" else 0.05 * (3 - 1) ** 2                                     # Eq. 5 of both
        assert first["loss"] == pytest.approx(first["loss/rank"] + weight * first["loss/sft"], rel=1e-4)
        if script == "pro.py":
            assert [-first["scores/best"], -first["scores/worst"]] == pytest.approx([token] * 2, rel=0.05)
        else:
            assert first["rewards/best"] > 0, "the best of four, by a reward whose mean is 0"
        evaluated = [row for row in lines_of(out / "metrics.jsonl") if "eval/kl" in row]
        assert [0 <= row["eval/score_accuracy"] <= 1 for row in evaluated] == [True, True]
        assert evaluated[0]["eval/nll"] == pytest.approx(token, rel=0.05)


@pytest.mark.parametrize("first_run", CONDITIONED, indirect=True)
def test_conditioned_run_asks_nothing_or_starts_elsewhere_or_does_not_steer_after_reload(first_run, here):
    _, out, arguments = first_run
    script = arguments[0]
    check_trains(out)
    name = {"decision_transformer.py": "reward", "steerlm.py": "score"}[script]
    for level in (0, 1):
        status, screen = here("--model", arguments[2], "--data", arguments[4], "--max_length", 64, "--max_new_tokens", 8,
                              "--eval_samples", 3, "--policy", out, "--prompt", "say it 1:", "--steer", f"{name}={level}", script=script)
        lines = screen.out.split("\n  ")
        assert status is None or status == 0, screen.err
        assert lines[0].startswith(f"say it 1:<{name}:") and len(lines) == 4
    status, screen = here("--model", arguments[2], "--data", arguments[4], "--max_length", 64, "--max_new_tokens", 8,
                          "--policy", out, "--prompt", "say it 1:", "--steer", f"{name}=99", script=script)
    check_refused(status, screen.err, "--steer", f"levels of {name}")
    status, screen = here("--model", arguments[2], "--data", arguments[4], "--max_length", 64, "--max_new_tokens", 8,
                          "--policy", arguments[2], "--prompt", "say it 1:", script=script)
    check_refused(status, screen.err, "attributes.json", script)


def test_saved_policy_loads_generates_and_was_trained(first_run, toy):
    _, out, _ = first_run
    after, before = check_generates(out).state_dict(), AutoModelForCausalLM.from_pretrained(toy).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.isfinite(w).all() for w in after.values())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == len(before), "every weight of so small a model gets a gradient"


def test_screen_shows_table_and_samples(first_run):
    process, _, arguments = first_run
    assert re.search(r"^ +before +after$", process.stdout, re.M)
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in process.stdout.splitlines() if line.strip()}
    for name in ("kl", "length", "eos_rate", "proxy"):
        assert len(rows[name]) == 4, name                              # two means, two standard errors
    if arguments[0] == "dpo.py":
        assert rows["loss"][0] == "0.693" and rows["loss"][1] != "0.693"
    elif arguments[0] not in CONDITIONED:                                # these train on the data's own answers
        assert re.search(r"^\d+ tokens/s generated, \d+% of the training time$", process.stdout, re.M)
    if arguments[0] in ("rrhf.py", "raft.py"):
        assert len(rows["to_best"]) == 1, "the policy beside its candidates, after training only"
    assert rows["kl"][0] == "0.000"
    assert "  before: " in process.stdout and "  after:  " in process.stdout


@first_run_as_process
def test_second_run_into_the_same_out_is_refused_and_loses_nothing(first_run):
    _, out, arguments = first_run
    before = fingerprints(out)
    process = command(*arguments)
    check_refused(process.returncode, process.stderr, "holds another run", "--resume", "another --out")
    assert fingerprints(out) == before


@pytest.mark.parametrize("script, steps, flags", [
    ("ppo.py", 5, ["--kl_target", 0.001, "--kl_horizon", 20]),           # so that the KL coefficient is worth keeping
    ("remax.py", 5, []), ("pro.py", 5, FEW["pro.py"]), ("rso.py", 5, FEW["rso.py"]),
    ("rrhf.py", 6, [*FEW["rrhf.py"], "--rounds", 2, "--epochs", 0.5]),   # cut in the first round, which has three steps
    ("raft.py", 6, [*FEW["raft.py"], "--rounds", 2, "--epochs", 0.5, "--pool", "all", "--restart", True, "--kl_coef", 0.1]),
    ("decision_transformer.py", 8, ["--reward_noise", "response"]),
    ("steerlm.py", 6, [*CONDITIONED["steerlm.py"], "--rounds", 1, "--bootstrap_epochs", 0.3])],      # cut in the round
    ids=lambda value: value if isinstance(value, str) else "")
def test_resumed_run_differs_from_a_straight_one(here, toy, pairs, tmp_path, monkeypatch, script, steps, flags):
    """Each with a cache of its own: the run that is cut trains its reward model, and finds it there when it goes on."""
    base = ["--model", toy, "--data", pairs, *SMALL, "--epochs", 1, "--save_every", 2, "--eval_every", 1, *flags]
    log = common.log

    def kill(run, step, metrics):
        log(run, step, metrics)
        if step == 3:                                                    # two steps past the checkpoint
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "CACHE", tmp_path / "cache of straight")
    assert here(*base, "--out", tmp_path / "straight", script=script)[0] == 0
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache of cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "log", kill)
        here(*base, "--out", tmp_path / "cut", script=script)
    assert lines_of(tmp_path / "cut" / "metrics.jsonl")[-1]["step"] == 4
    status, screen = here(*base, "--out", tmp_path / "cut", "--resume", script=script)
    assert status == 0, screen.err
    straight, resumed = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("straight", "cut"))
    assert resumed == straight and straight[-1]["step"] == steps
    assert script != "ppo.py" or len({row["objective/kl_coef"] for row in straight if "objective/kl" in row}) == 5
    assert script != "raft.py" or len({row["round/mean"] for row in straight if "round/mean" in row}) == 2
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("script, flags", [("ppo.py", ["--minibatch_size", 2]), ("remax.py", []),
                                           ("ppo.py", ["--batch_size", 64, "--minibatch_size", 16]),
                                           ("rrhf.py", [*FEW["rrhf.py"], "--rounds", 2]),
                                           ("raft.py", [*FEW["raft.py"], "--rounds", 2, "--schedule", "linear"]),
                                           ("rso.py", [*FEW["rso.py"], "--schedule", "cosine"])],
                         ids=["ppo", "remax", "ppo, batch larger than the data", "rrhf", "raft", "rso"])
def test_learning_rate_does_not_fall_to_0(here, toy, pairs, tmp_path, monkeypatch, script, flags):
    """36 prompts: for PPO the last batch has fewer minibatches than a full one; of rounds, only the last ends at 0."""
    runs, plain = [], common.finish
    monkeypatch.setattr(common, "finish", lambda run: runs.append(run) or plain(run))
    status, screen = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, "--epochs", 1, *flags,
                          script=script)
    assert status == 0, screen.err
    assert runs[0].schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def hh_rows():
    return [{"chosen": f"\n\nHuman: hi {i}\n\nAssistant: yes {i}", "rejected": f"\n\nHuman: hi {i}\n\nAssistant: no {i}"}
            for i in range(20)]


def ranked_rows():
    return [{"prompt": f"say {i}:", "responses": [f" yes {i}", f" hm {i}", f" no {i}"], "scores": [2, 1, 0],
             "systems": ["strong", "medium", "weak"]} for i in range(20)]


def chat_rows():
    return [{"prompt": [{"role": "user", "content": f"hi {i}"}], "chosen": [{"role": "assistant", "content": f"yes {i}"}],
             "rejected": [{"role": "assistant", "content": f"no {i}"}]} for i in range(20)]


def chat_toy(folder):
    tokenizer = characters()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
    return save_toy(folder, tokenizer)


@pytest.mark.parametrize("rows, name, flags, prompt", [
    (hh_rows(), "hh.jsonl", [], r"\n\nHuman: hi \d+\n\nAssistant:\n"),
    (ranked_rows(), "ranked.jsonl", ["--pairs", "strong>weak"], r"say \d+:\n"),
    (ranked_rows(), "curriculum.jsonl", ["--pairs", "strong>weak", "--hard_pairs", "strong>medium"], r"say \d+:\n"),
    (chat_rows(), "chat.jsonl", [], r"<user>hi \d+<a>\n"),
    (pair_rows(20), "zipped.jsonl.gz", [], r"say it \d+:\n"),
], ids=["HH", "systems", "curriculum", "chat", "gzip"])
def test_every_form_of_data_trains(here, tmp_path, rows, name, flags, prompt):
    model, out = chat_toy(tmp_path / "model"), tmp_path / "out"
    status, screen = here("--model", model, "--data", write_rows(tmp_path / name, rows), "--out", out, "--reward", "none",
                          *SMALL, *flags)
    assert status == 0, screen.err
    check_starts_as_reference(out)
    assert re.match(prompt, (out / "samples.txt").read_text())


@pytest.mark.parametrize("rows, prompt", [(hh_rows(), r"\n\nHuman: hi \d+\n\nAssistant:\n"), (ranked_rows(), r"say \d+:\n"),
                                          (chat_rows(), r"<user>hi \d+<a>\n")], ids=["HH", "ranking", "chat"])
@pytest.mark.parametrize("script, flags", [("rrhf.py", ["--sources", "P"]), ("pro.py", ["--sources", "P"]),
                                           ("rso.py", ["--source", "direct"])], ids=["rrhf", "pro", "rso"])
def test_data_of_its_own_needs_a_reward_or_does_not_train(here, tmp_path, script, flags, rows, prompt):
    """Scored answers and pairs speak for themselves: no reward model, and nothing is sampled but for evaluation."""
    model, out = chat_toy(tmp_path / "model"), tmp_path / "out"
    status, screen = here("--model", model, "--data", write_rows(tmp_path / "rows.jsonl", rows), "--out", out, "--reward", "none",
                          *SMALL, "--batch_size", 3, *flags, script=script)
    assert status == 0, screen.err
    check_trains(out, lines_of(out / "metrics.jsonl")[-1]["step"])
    assert re.match(prompt, (out / "samples.txt").read_text()) and "tokens/s generated" not in screen.out
    assert not [line for line in screen.err.splitlines() if "--reward" in line]


@pytest.mark.parametrize("script", ["rrhf.py", "pro.py"])
def test_systems_or_scores_of_rankings_are_ignored(here, toy, tmp_path, script):
    """What is imitated is the best by score, of the named writers: " yes i" costs a token more than " hm i" or " no i"."""
    upside_down = [row | {"scores": row["scores"][::-1]} for row in ranked_rows()]
    data, loss = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((ranked_rows(), upside_down))], {}
    for i, systems in ((0, ""), (1, ""), (0, "medium,weak"), (0, "weak,strong"), (0, "weak,nobody")):
        out = tmp_path / f"{i} {systems}"
        status, screen = here("--model", toy, "--data", data[i], "--out", out, "--reward", "none", *SMALL, "--sources", "P",
                              "--systems", systems, script=script)
        assert status == 0, screen.err
        assert ("have one response only" in screen.err) == (systems == "weak,nobody")
        loss[i, systems] = lines_of(out / "metrics.jsonl")[1]["loss/sft"]
    token = pytest.approx(math.log(len(characters())), rel=0.1)
    assert [loss[0, ""] - loss[key] for key in ((1, ""), (0, "medium,weak"), (0, "weak,nobody"))] == [token] * 3
    assert loss[0, "weak,strong"] == pytest.approx(loss[0, ""], rel=1e-5)
    status, screen = here("--model", toy, "--data", data[0], "--out", tmp_path / "out", "--reward", "none", *SMALL,
                          "--sources", "P", "--systems", "nobody", script=script)
    check_refused(status, screen.err, "no answers of its own by nobody", "medium, strong, weak")


def test_systems_are_taken_as_named(here, toy, tmp_path):
    """--pairs "weak>strong" against the scores: the pairs come from the names."""
    data, first = write_rows(tmp_path / "r.jsonl", ranked_rows()), {}
    for kind in ("strong>weak", "weak>strong"):
        out = tmp_path / kind.replace(">", "-")
        assert here("--model", toy, "--data", data, "--out", out, "--reward", "none", *SMALL, "--pairs", kind)[0] == 0
        first[kind] = lines_of(out / "metrics.jsonl")[1]
    assert first["strong>weak"]["logps/chosen"] == pytest.approx(first["weak>strong"]["logps/rejected"], abs=1e-3)
    longer = first["strong>weak"]["logps/rejected"] - first["strong>weak"]["logps/chosen"]
    assert longer == pytest.approx(math.log(len(characters())), rel=0.1)         # "yes" has a character more than "no"


# --------------------------------------------------------------------------------------------------------- bad input

def check_refused(status, stderr, *parts):
    """Status 2 and one line that says what is wrong."""
    assert status == 2, stderr
    assert stderr.startswith("error: ") and len(stderr.splitlines()) == 1, stderr
    assert not [part for part in parts if part not in stderr], stderr


def check_does_not_block(out):
    assert not out.exists() or not any(out.iterdir()), f"left {[p.name for p in out.iterdir()]} in --out"


@pytest.mark.parametrize("flags, parts", [
    (["--data", "/nowhere/pairs.jsonl"], ["no such file", "/nowhere/pairs.jsonl"]),
    (["--model", "nobody/no-such-model"], ["nobody/no-such-model", "local directory"]),
], ids=["missing data file", "unknown hub model"])
def test_process_refuses_in_one_line(run_script, toy, pairs, tmp_path, flags, parts):
    process = run_script("dpo.py", "--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, *flags)
    check_refused(process.returncode, process.stderr, *parts)
    assert process.stdout == ""
    check_does_not_block(tmp_path / "out")


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
    status, screen = here("--model", toy, "--data", data, "--out", out, "--reward", "none", *SMALL)
    check_refused(status, screen.err, *parts)
    check_does_not_block(out)


def test_no_row_left_after_skipping_is_refused(here, toy, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", pair_rows(3, chosen=""))
    status, screen = here("--model", toy, "--data", data, "--out", tmp_path / "out", "--skip_bad_rows", *SMALL)
    assert status == 2
    assert screen.err.splitlines() == ["left out 3 of 3 rows: 3 empty response", "error: bad.jsonl: no usable row"]


@pytest.mark.parametrize("flags, parts", [
    (["--beta", 0], ["--beta", "above 0"]),
    (["--beta", -0.1], ["--beta", "above 0", "-0.1"]),
    (["--data", "."], ["is a directory", ".jsonl"]),
    (["--pairs", "strong>weak"], ["--pairs", "names no systems"]),
], ids=["beta 0", "beta negative", "directory as data", "systems that the data lacks"])
def test_bad_settings_are_refused(here, toy, pairs, tmp_path, flags, parts):
    status, screen = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", "--reward", "none", *SMALL, *flags)
    check_refused(status, screen.err, *parts)
    check_does_not_block(tmp_path / "out")


def test_unknown_flag_is_refused_before_anything_is_loaded(here, tmp_path):
    status, screen = here("--betta", 0.1, "--out", tmp_path / "out")
    assert status == 2 and "--betta" in screen.err and "Traceback" not in screen.err
    check_does_not_block(tmp_path / "out")


def test_out_and_resume_that_make_no_sense_are_refused(here, toy, pairs, tmp_path):
    base = ["--model", toy, "--data", pairs, "--reward", "none", *SMALL]
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("mine")
    other.mkdir()
    (other / "args.json").write_text("{}")
    for flags, parts in [(["--out", file], ["is a file", "directory"]),
                         (["--out", other], ["holds another run", "--resume"]),
                         (["--resume"], ["--resume needs --out"]),
                         (["--resume", "--out", tmp_path / "new"], ["nothing to resume"]),
                         (["--resume", "--out", other], ["nothing to resume"])]:
        status, screen = here(*base, *flags)
        check_refused(status, screen.err, *parts)
    assert file.read_text() == "mine" and [p.name for p in other.iterdir()] == ["args.json"]
    check_does_not_block(tmp_path / "new")


def test_reward_model_of_several_labels_needs_one_of_them(here, toy, pairs, tmp_path):
    labels = ["helpful", "harmless", "funny"]
    reward, out = tmp_path / "reward", tmp_path / "out"
    save_toy(reward, characters(), LlamaForSequenceClassification, id2label=dict(enumerate(labels)),
             label2id={name: i for i, name in enumerate(labels)})
    base = ["--model", toy, "--data", pairs, "--out", out, "--reward", reward, *SMALL]
    for flags in ([], ["--reward_label", "sad"]):
        status, screen = here(*base, *flags)
        check_refused(status, screen.err, "--reward_label", "helpful, harmless, funny")
        check_does_not_block(out)
    status, screen = here(*base, "--reward_label", "funny")
    assert status == 0, screen.err

    prompts, responses = zip(*re.findall(r"(say it \d+:)\n  before: (.*)\n", (out / "samples.txt").read_text()))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward), characters()
    scores = []
    for prompt, response in zip(prompts, responses):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        scores.append(model.score(hidden)[2].item())
    assert lines_of(out / "metrics.jsonl")[0]["eval/proxy"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)


@pytest.fixture(scope="session")
def reversed_toy(tmp_path_factory):
    """As the toy, but with the vocabulary the other way round."""
    return save_toy(tmp_path_factory.mktemp("reversed") / "model", characters(alphabet=LETTERS[::-1]))


@pytest.fixture(scope="session")
def prompts_only(tmp_path_factory):
    rows = [{"prompt": f"say it {i}:"} for i in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


def save_reward(folder, tokenizer=None, **settings):
    """A reward model with a wide enough head that texts get scores of their own."""
    return save_toy(folder, tokenizer or characters(), LlamaForSequenceClassification, num_labels=1,
                    initializer_range=0.3, **settings)


BOTH = ["ppo.py", "remax.py"]


@pytest.mark.parametrize("script, flags, parts", [
    *[(script, ["--kl_coef", -0.1], ["--kl_coef", "must not be negative", "-0.1"]) for script in BOTH],
    *[(script, ["--reward", "gold"], ["--reward gold", "only the embedded task"]) for script in BOTH],
    *[(script, ["--reward", "none"], ["no reward", "--reward"]) for script in BOTH],
    *[(script, ["--schedule", "constnat"], ["--schedule", "constnat"]) for script in BOTH],
    ("ppo.py", ["--minibatch_size", 3], ["--batch_size 8", "--minibatch_size 3"]),
    ("ppo.py", ["--minibatch_size", 16], ["--batch_size 8", "--minibatch_size 16"]),
    ("ppo.py", ["--kl_target", 0], ["--kl_target", "above 0"]),
    ("ppo.py", ["--ppo_epochs", 0], ["--ppo_epochs", "above 0"]),
    ("remax.py", ["--reward_clip", 0], ["--reward_clip", "above 0"]),
    ("remax.py", ["--variance_prompts", 1], ["--variance_prompts", "at least 2"])],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("--") else None)
def test_bad_settings_of_on_policy_methods_are_refused(here, toy, pairs, tmp_path, script, flags, parts):
    status, screen = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, *flags, script=script)
    if flags[0] == "--schedule":                                       # argparse's own words, after its usage
        assert status == 2 and all(part in screen.err.splitlines()[-1] for part in parts)
    else:
        check_refused(status, screen.err, *parts)
    check_does_not_block(tmp_path / "out")


@pytest.mark.parametrize("script, flags, parts", [
    *[(script, ["--reward", "gold"], ["--reward gold", "only the embedded task"]) for script in FEW],
    *[(script, ["--reward", "none"], ["no reward to maximise", "--reward"]) for script in FEW],
    *[(script, ["--label_noise", 0.5], ["--label_noise must be in [0, 0.5)"]) for script in FEW],
    ("rrhf.py", ["--reward_noise", "word"], ["--reward_noise", "word"]), ("rso.py", ["--loss", "dpo"], ["--loss", "dpo"]),
    ("rrhf.py", ["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
    ("rrhf.py", ["--rounds", 0], ["--rounds", "above 0"]),
    ("rrhf.py", ["--length_penalty", -1], ["--length_penalty", "not be negative"]),
    ("pro.py", ["--sources", "D", "--candidates", 1], ["--candidates must be at least 2 with --sources D"]),
    ("pro.py", ["--terms", -1], ["--terms", "not be negative"]),
    ("pro.py", ["--sft_weight", -1], ["--sft_weight", "not be negative"]),
    ("rso.py", ["--candidates", 3, "--num_samples", 4], ["--candidates must be at least --num_samples 4, not 3"]),
    ("rso.py", ["--num_samples", 1], ["--num_samples", "at least 2"]),
    ("rso.py", ["--beta", -0.1], ["--beta", "not be negative"]), ("rso.py", ["--gamma", 0], ["--gamma", "above 0"]),
    ("raft.py", ["--candidates", 0], ["--candidates", "above 0"]), ("raft.py", ["--share", 1.5], ["--share", "[0, 1]"]),
    ("raft.py", ["--share", 0.5], ["--share is for --ranking global"]),
    ("raft.py", ["--kl_coef", -1], ["--kl_coef", "not be negative"]),
    ("raft.py", ["--rare", "say"], ["--rare say", "every train prompt"]),
    ("raft.py", ["--refresh", True], ["--refresh needs annotators"])],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("--") else None)
def test_bad_settings_of_methods_on_candidates_are_refused(here, toy, pairs, tmp_path, script, flags, parts):
    status, screen = here("--model", toy, "--data", pairs, "--out", tmp_path / "out", *SMALL, *flags, script=script)
    if flags[0] in ("--reward_noise", "--loss"):                       # argparse's own words, after its usage
        assert status == 2 and all(part in screen.err.splitlines()[-1] for part in parts)
    else:
        check_refused(status, screen.err, *parts)
    check_does_not_block(tmp_path / "out")


def test_value_model_that_reads_other_tokens_is_refused(here, toy, reversed_toy, pairs, tmp_path):
    base = ["--model", toy, "--data", pairs, *SMALL, "--value_model"]
    status, screen = here(*base, reversed_toy, "--out", tmp_path / "out", script="ppo.py")
    check_refused(status, screen.err, "value model", str(reversed_toy), "another tokenizer")
    check_does_not_block(tmp_path / "out")
    status, screen = here(*base, save_toy(tmp_path / "same", characters()), "--out", tmp_path / "out", script="ppo.py")
    assert status == 0, screen.err                                     # the same tokens under another name are welcome


@pytest.mark.parametrize("script", ["ppo.py", "remax.py", "rso.py", "raft.py"])
def test_prompts_without_a_reward_are_refused(here, toy, prompts_only, tmp_path, script):
    status, screen = here("--model", toy, "--data", prompts_only, "--out", tmp_path / "out", *SMALL, script=script)
    warning, error = screen.err.splitlines()
    assert warning.startswith("warning: no pairs to train a reward model from")
    check_refused(status, error, "no reward to maximise", "--reward")
    check_does_not_block(tmp_path / "out")


@on_policy
def test_prompts_with_a_reward_do_not_train(here, toy, prompts_only, tmp_path, script):
    reward, out = save_reward(tmp_path / "reward"), tmp_path / "out"
    status, screen = here("--model", toy, "--data", prompts_only, "--reward", reward, "--out", out, *SMALL,
                          script=script)
    assert status == 0, screen.err
    check_samples_from_reference(out, 3)
    check_generates(out)
    assert re.search(r"^proxy +-?\d", screen.out, re.M) and "no pairs" not in screen.err


@on_candidates
def test_prompts_with_a_reward_do_not_make_candidates(here, toy, prompts_only, tmp_path, script):
    base = ["--model", toy, "--data", prompts_only, "--reward", save_reward(tmp_path / "reward"), *SMALL]
    status, screen = here(*base, "--out", tmp_path / "out", *sampled(script), script=script)
    assert status == 0, screen.err
    check_trains(tmp_path / "out")
    flag, value, said = ("--source", "direct", "no pairs to train on") if script == "rso.py" else (
        "--sources", "P", "the data has no answers of its own")
    if script != "raft.py":                                            # answers of its own it has not
        status, screen = here(*base, "--out", tmp_path / "own", *FEW[script], flag, value, script=script)
        check_refused(status, screen.err, said)
        check_does_not_block(tmp_path / "own")


@pytest.mark.parametrize("scale", [None, {"mean": 0.5, "std": 2.0}], ids=["before any step", "at the first step"])
@on_policy
def test_reward_of_nan_is_trained_on_or_its_prompt_is_not_named(here, toy, pairs, tmp_path, script, scale):
    """A model with a scale of its own is first asked when the run has begun."""
    def spoil(model):
        model.score.weight.fill_(math.nan)

    reward = save_reward(tmp_path / "reward", spoil=spoil, **({"reward_scale": scale} if scale else {}))
    status, screen = here("--model", toy, "--data", pairs, "--reward", reward, "--out", tmp_path / "out", *SMALL,
                          script=script)
    lines = [line for line in screen.err.splitlines() if not line.startswith("warning: ")]
    check_refused(status, "\n".join(lines), f"step {1 if scale else 0}", "the reward is nan", "'say it ")
    if not scale:
        check_does_not_block(tmp_path / "out")


@on_candidates
def test_score_of_nan_ranks_candidates(here, toy, pairs, tmp_path, script):
    """The model has a scale of its own, so it is first asked for the candidates: before any step of training."""
    def spoil(model):
        model.score.weight.fill_(math.nan)

    reward = save_reward(tmp_path / "reward", spoil=spoil, reward_scale={"mean": 0.5, "std": 2.0})
    status, screen = here("--model", toy, "--data", pairs, "--reward", reward, "--out", tmp_path / "out", *SMALL, *FEW[script],
                          script=script)
    lines = [line for line in screen.err.splitlines() if not line.startswith("warning: ")]
    check_refused(status, "\n".join(lines), "step 0", "the reward is nan", "'say it ")


@pytest.mark.parametrize("cause", ["weights", "training"])
@pytest.mark.parametrize("script", ["ppo.py", "remax.py", *FEW])
def test_policy_of_nan_ends_in_a_traceback(here, toy, pairs, tmp_path, script, cause):
    """Sampling from it would raise deep inside; the run must say first what is wrong, as it does for DPO below."""
    model = save_toy(tmp_path / "model", characters(), spoil=spoil_everything) if cause == "weights" else toy
    flags = ["--reward", save_reward(tmp_path / "reward"), "--lr", 1e-3 if cause == "weights" else 1e10]
    status, screen = here("--model", model, "--data", pairs, "--out", tmp_path / "out", *SMALL, *FEW.get(script, []), *flags,
                          script=script)
    last = screen.err.splitlines()[-1]
    assert status == 2 and last.startswith("error: "), last
    assert re.search(r"step \d", last) and re.search(r"say it \d+:", last), last


@on_policy
def test_reward_model_with_another_tokenizer_reads_the_policys_ids(here, toy, pairs, tmp_path, monkeypatch, script):
    """It must read text: the scores of a step are those that the model alone gives to the step's texts."""
    tokenizer, out = characters(alphabet=LETTERS[::-1]), tmp_path / "out"
    reward = save_reward(tmp_path / "reward", tokenizer, reward_scale={"mean": 0.5, "std": 2.0})
    model, rollouts, plain = AutoModelForSequenceClassification.from_pretrained(reward), [], common.rollout

    def spy(run, prompts, greedy=False):
        batch, responses, ended = plain(run, prompts, greedy)
        rollouts.append(list(zip(prompts, responses)))
        return batch, responses, ended

    def alone(prompt, response):
        ids = tokenizer(prompt + response).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            return (model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - 0.5) / 2

    monkeypatch.setattr(common, "rollout", spy)
    status, screen = here("--model", toy, "--data", pairs, "--reward", reward, "--out", out, *SMALL, script=script)
    assert status == 0, screen.err
    names = ["objective/scores"] if script == "ppo.py" else ["objective/scores", "objective/greedy_scores"]
    logged = [row[name] for row in check_samples_from_reference(out, 3) for name in names]
    want = [[alone(*row) for row in rows] for rows in rollouts]
    assert logged == pytest.approx([sum(scores) / len(scores) for scores in want], abs=1e-4)
    assert max(want[0]) - min(want[0]) > 0.1, "else any reading would do"


def test_candidates_scores_are_of_other_texts_or_tokens(here, toy, pairs, tmp_path, monkeypatch):
    """A reward model that reads other tokens than the policy: it must read text, and each prompt's best be its own."""
    tokenizer, out, plain, rollouts = characters(alphabet=LETTERS[::-1]), tmp_path / "out", stages.rollout, []
    reward = save_reward(tmp_path / "reward", tokenizer, reward_scale={"mean": 0.5, "std": 2.0})
    model = AutoModelForSequenceClassification.from_pretrained(reward)

    def spy(run, prompts):
        rollouts.append((prompts, *plain(run, prompts)))
        return rollouts[-1][1:]

    monkeypatch.setattr(stages, "rollout", spy)
    status, screen = here("--model", toy, "--data", pairs, "--reward", reward, "--out", out, *SMALL, "--candidates", 2,
                          "--rounds", 2, script="raft.py")
    assert status == 0, screen.err
    for row, (prompts, _, texts, _) in zip(check_trains(out, 6)[::3], rollouts, strict=True):
        ids = [tokenizer(prompt + text).input_ids + [tokenizer.eos_token_id] for prompt, text in zip(prompts, texts)]
        with torch.no_grad():
            scores = torch.cat([model.score(model.model(torch.tensor([each])).last_hidden_state[0, -1]) for each in ids])
        scores = (scores.view(-1, 2) - 0.5) / 2
        assert prompts[::2] == prompts[1::2] and len(set(prompts)) == len(scores)
        assert row["round/mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
        assert row["round/best"] == pytest.approx(scores.amax(1).mean().item(), abs=1e-4)


@pytest.mark.parametrize("script", ["ppo.py", "remax.py", *FEW])
def test_noise_in_the_reward_stops_the_run_or_changes_nothing(here, toy, pairs, tmp_path, script):
    """One draw a prompt turns no candidates of a prompt round, so what only ranks them does not see it."""
    reward, norms = save_reward(tmp_path / "reward"), {}
    for noise in ("none", "prompt", "response"):
        status, screen = here("--model", toy, "--data", pairs, "--reward", reward, "--out", tmp_path / noise, *SMALL,
                              "--epochs", 0.25, "--reward_noise", noise, *FEW.get(script, []), script=script)
        assert status == 0, screen.err
        norms[noise] = [row["grad_norm"] for row in lines_of(tmp_path / noise / "metrics.jsonl") if "grad_norm" in row]
    assert norms["response"] != norms["none"]
    if script in ("rrhf.py", "rso.py", "raft.py"):
        assert norms["prompt"] == norms["none"]
    if script == "ppo.py":
        assert norms["prompt"] != norms["none"]


# ------------------------------------------------------------------------------------- awkward models and long prompts

@pytest.mark.parametrize("bos, pad", [("<bos>", None), (None, "<pad>"), ("<bos>", "<eos>"), (None, None)],
                         ids=["no PAD", "no BOS", "PAD is EOS", "neither PAD nor BOS"])
def test_tokenizers_without_pad_or_bos_run(here, pairs, tmp_path, bos, pad):
    model, out = save_toy(tmp_path / "model", characters(bos, pad)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--out", out, *SMALL)
    assert status == 0, screen.err
    check_starts_as_reference(out)
    assert all(math.isfinite(v) for row in lines_of(out / "metrics.jsonl") for v in row.values())
    check_generates(out)


@pytest.mark.parametrize("bos, pad", [("<bos>", "<eos>"), (None, None)], ids=["PAD is EOS", "neither PAD nor BOS"])
@on_policy
def test_tokenizers_without_pad_or_bos_sample_and_train(here, pairs, tmp_path, script, bos, pad):
    model, out = save_toy(tmp_path / "model", characters(bos, pad)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--out", out, *SMALL, script=script)
    assert status == 0, screen.err
    check_samples_from_reference(out, 3)
    check_generates(out)


@pytest.mark.parametrize("bos, pad", [("<bos>", "<eos>"), (None, None)], ids=["PAD is EOS", "neither PAD nor BOS"])
@on_candidates
def test_tokenizers_without_pad_or_bos_rank_candidates(here, pairs, tmp_path, script, bos, pad):
    model, out = save_toy(tmp_path / "model", characters(bos, pad)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--out", out, *SMALL, *FEW[script], script=script)
    assert status == 0, screen.err
    check_trains(out)
    check_generates(out)


def set_eos_logit(sign):
    """Every hidden state gets a large first entry, and the head reads it for EOS alone: a logit of about -60 or 60."""
    def spoil(model):
        model.model.embed_tokens.weight[:, 0] = 10
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[model.config.eos_token_id, 0] = sign * 10
    return spoil


@pytest.mark.parametrize("sign, rate, said", [(-1, 0, "0 of 8 responses end with EOS, 0 are empty"),
                                              (1, 1, "8 of 8 responses end with EOS, 8 are empty")],
                         ids=["never stops", "stops at once"])
@on_policy
def test_policy_that_never_stops_or_says_nothing_breaks_the_run(here, pairs, tmp_path, script, sign, rate, said):
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(sign)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--reward", save_reward(tmp_path / "reward"), "--out", out,
                          *SMALL, script=script)
    assert status == 0, screen.err
    warnings = [line for line in screen.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "step 1" in warnings[0] and said in warnings[0], warnings
    assert all(row["eos_rate"] == rate for row in check_samples_from_reference(out, 3))
    check_generates(out)


@on_candidates
def test_policy_that_never_stops_breaks_candidates_or_is_taught_to_stop(here, pairs, tmp_path, monkeypatch, script):
    """Each sample is cut off, so EOS (60 nats away) must not be among what is trained: losses stay those of letters."""
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(-1)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--reward", save_reward(tmp_path / "reward"), "--out", out, *SMALL,
                          *sampled(script), script=script)
    assert status == 0, screen.err
    warnings = [line for line in screen.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "step 1: 0 of" in warnings[0] and "responses end with EOS, 0 are empty" in warnings[0], warnings
    first, whole = check_trains(out)[0], 8 * math.log(len(characters()) - 1)
    name = {"raft.py": "loss", "rso.py": "logps/chosen"}.get(script, "loss/sft")
    assert abs(first[name]) == pytest.approx(whole, rel=0.1)
    check_generates(out)


@on_candidates
def test_policy_that_says_nothing_breaks_candidates(here, pairs, tmp_path, script):
    """Every sample is empty, so a prompt has one candidate: nothing to rank, and for RSO no pair."""
    model, out = save_toy(tmp_path / "model", characters(), spoil=set_eos_logit(1)), tmp_path / "out"
    status, screen = here("--model", model, "--data", pairs, "--reward", save_reward(tmp_path / "reward"), "--out", out, *SMALL,
                          *sampled(script), script=script)
    said = [line for line in screen.err.splitlines() if line.startswith("warning: ")]
    assert "are empty (said once)" in said[0] and len(said) == {"raft.py": 1, "rso.py": 3}.get(script, 2)
    assert script == "raft.py" or "of 35 rankings, 35 have one response only" in said[1]
    if script == "rso.py":
        check_refused(status, screen.err.splitlines()[-1], "no pairs to train on")
    else:
        assert status == 0, screen.err
        assert all(math.isfinite(value) for row in lines_of(out / "metrics.jsonl") for value in row.values())


def test_prompt_longer_than_the_context_is_counted_and_keeps_its_answer(here, toy, tmp_path):
    """A nearly uniform model gives each of the answer's 7 tokens ln V nats: fewer would show as a smaller sum."""
    rows = [{"prompt": f"{'long ' * 30}{i:02}:", "chosen": f"yes {i:02}", "rejected": f"no  {i:02}"} for i in range(20)]
    rows += [row | {"prompt": f"{i}"} for i, row in enumerate(rows[:5])]
    out = tmp_path / "out"
    status, screen = here("--model", toy, "--data", write_rows(tmp_path / "long.jsonl", rows), "--out", out,
                          "--reward", "none", *SMALL, "--max_length", 32)
    assert status == 0, screen.err
    warnings = [line for line in screen.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "20 of 25 prompts" in warnings[0] and "--max_length" in warnings[0]
    check_starts_as_reference(out)
    whole = 7 * math.log(len(characters()))
    for row in lines_of(out / "metrics.jsonl")[:2]:
        for name in ("logps/chosen", "logps/rejected"):
            assert -row.get(name, row.get(f"eval/{name}")) == pytest.approx(whole, rel=0.05)


def spoil_everything(model):
    model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan


def spoil_letter_q(model):
    model.model.embed_tokens.weight[characters().convert_tokens_to_ids("q")] = math.nan


@pytest.mark.parametrize("spoil, flags", [(spoil_everything, []), (spoil_letter_q, ["--max_new_tokens", 1])],
                         ids=["in every forward pass", "in some answers only"])
def test_nan_in_the_weights_stops_the_run_naming_step_and_example(here, tmp_path, spoil, flags):
    """An exception that common.main lets through, which would be a traceback on the screen, fails this test by itself."""
    model = save_toy(tmp_path / "model", characters(), spoil=spoil)
    data = write_rows(tmp_path / "pairs.jsonl", pair_rows(chosen=" quiet"))
    status, screen = here("--model", model, "--data", data, "--out", tmp_path / "out", "--reward", "none", *SMALL, *flags)
    assert status not in (0, None)
    last = screen.err.splitlines()[-1]
    assert last.startswith("error: ") and re.search(r"step \d", last) and re.search(r"say it \d+:", last), last


# ------------------------------------------------------------------------------------------------ a real chat model

def test_smollm2_answers_a_chat_and_its_logps_are_the_plain_ones(smollm2):
    settings = common.Config(model=str(smollm2), data="x", device="cpu", max_length=64, max_new_tokens=12)
    model, tokenizer = common.load_policy(settings), common.load_tokenizer(smollm2, settings)
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
    rows = [{"chosen": f"\n\nHuman: Name {what}.\n\nAssistant: {good}", "rejected": f"\n\nHuman: Name {what}.\n\nAssistant: {bad}"}
            for what, good, bad in [("a fruit", "Apple.", "Car."), ("a colour", "Red.", "Two."), ("a city", "Rome.", "Soup."),
                                    ("a bird", "Owl.", "Tea."), ("a tree", "Oak.", "Sock."), ("a number", "Six.", "Hat.")]]
    out = tmp_path / "out"
    process = command("dpo.py", "--model", smollm2, "--data", write_rows(tmp_path / "hh.jsonl", rows), "--out", out,
                      "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 2, "--eval_samples", 1,
                      "--reward", "none", "--epochs", 1, "--batch_size", 3, "--save_every", 0)
    assert process.returncode == 0, process.stderr
    check_starts_as_reference(out)
    assert [row["step"] for row in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 2]
    check_generates(out)


@on_policy
def test_smollm2_trains_on_its_own_samples_and_loads_again(smollm2, tmp_path, script):
    """The reward model is tiny and reads letters: one of SmolLM2's size would say no more about the methods."""
    rows = [{"prompt": f"\n\nHuman: Name a {what}.\n\nAssistant:"} for what in ("fruit", "bird", "city", "tree", "hat")]
    reward, out = save_reward(tmp_path / "reward"), tmp_path / "out"
    process = command(script, "--model", smollm2, "--data", write_rows(tmp_path / "prompts.jsonl", rows), "--out", out,
                      "--reward", reward, "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 1,
                      "--eval_samples", 1, "--epochs", 0.5, "--batch_size", 2, "--save_every", 0,
                      *(["--ppo_epochs", 1] if script == "ppo.py" else []))
    assert process.returncode == 0, process.stderr
    check_samples_from_reference(out, 1)
    check_generates(out)


@pytest.mark.parametrize("script, flags", [("pro.py", ["--sources", "P"]), ("raft.py", FEW["raft.py"]),
                                           ("steerlm.py", ["--rounds", 0, "--predictor_epochs", 0.2, "--attributes", "score", "--epochs", 0.15])],
                         ids=["pro", "raft", "steerlm"])
def test_smollm2_ranks_candidates_and_loads_again(smollm2, tmp_path, script, flags):
    """PRO and SteerLM on ranked answers of the data, RAFT on SmolLM2's own samples by a tiny reward model."""
    rows = [{"prompt": f"\n\nHuman: Name a {what}.\n\nAssistant:", "responses": [" Well.", " No.", " Car."], "scores": [2, 1, 0]}
            for what in ("fruit", "bird", "city", "tree", "hat")]
    reward, out = save_reward(tmp_path / "reward"), tmp_path / "out"
    process = command(script, "--model", smollm2, "--data", write_rows(tmp_path / "ranked.jsonl", rows), "--out", out,
                      "--reward", reward, "--max_length", 64, "--max_new_tokens", 8, "--eval_prompts", 1, "--eval_samples", 1,
                      "--epochs", 0.5, "--batch_size", 2, "--save_every", 0, *flags)
    assert process.returncode == 0, process.stderr
    check_trains(out, 1)
    check_generates(out)


# ------------------------------------------------------------------------------- the embedded task: slow at first use

@pytest.fixture(scope="module")
def built():
    """`python common.py`, and the directory of seed 0's models that it built or found."""
    process = command("common.py")
    assert process.returncode == 0, process.stderr
    return process, build.home(common.Config())


def test_common_prints_the_vital_figures(built):
    process, folder = built
    for name, value in json.loads((folder / "vitals.json").read_text()).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(str(value))}$", process.stdout, re.M), name
    assert str(folder) in process.stdout


def test_dpo_on_the_embedded_task_shows_gold_proxy_kl_fluency(built, tmp_path):
    process = command("dpo.py", "--epochs", 0.05, "--eval_prompts", 16, "--eval_samples", 2, "--out", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    check_starts_as_reference(tmp_path / "out")
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in process.stdout.splitlines() if line.strip()}
    for name in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(rows[name]) == 4, name
    assert rows["kl"][0] == "0.000"
    assert float(rows["fluency"][0]) > 0.5, "the start must be the SFT policy, not a random model"


@pytest.mark.parametrize("script, reward", [("ppo.py", "proxy"), ("remax.py", "gold")])
def test_on_policy_method_on_the_embedded_task_starts_off_the_sft_policy(built, tmp_path, script, reward):
    """One rollout of 128 prompts; on the SFT policy the rewards have mean 0 and deviation 1."""
    process = command(script, "--epochs", 0.25, "--eval_prompts", 8, "--eval_samples", 2, "--out", tmp_path / "out",
                      *(["--reward", "gold"] if reward == "gold" else []))
    assert process.returncode == 0, process.stderr
    first, = check_samples_from_reference(tmp_path / "out", 1)
    assert abs(first["objective/scores"]) < 0.4 and first["eos_rate"] > 0.9
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in process.stdout.splitlines() if line.strip()}
    for name in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(rows[name]) == 4, name
    assert rows["kl"][0] == "0.000" and float(rows["fluency"][0]) > 0.5
    assert re.search(r"^\d+ tokens/s generated, \d+% of the training time$", process.stdout, re.M)


@pytest.mark.parametrize("script, steps, flags", [
    ("rrhf.py", 2, ["--epochs", 0.25, "--sources", "D", "--eval_pairs", 32]), ("rso.py", 2, ["--epochs", 0.125]),
    ("pro.py", 2, ["--epochs", 0.25, "--eval_pairs", 32, "--label_noise", 0]),
    ("raft.py", 2, ["--rounds", 2, "--prompts", 32, "--epochs", 1, "--candidates", 4, "--refresh", True, "--rare", "villain"])],
    ids=["rrhf", "rso", "pro", "raft"])
def test_method_on_candidates_on_the_embedded_task_starts_off_the_sft_policy(built, tmp_path, script, steps, flags):
    """The candidates are the pool of the SFT policy; only a trained policy samples its own."""
    process = command(script, "--eval_prompts", 8, "--eval_samples", 2, "--out", tmp_path / "out", *flags)
    assert process.returncode == 0 and not process.stderr.strip(), process.stderr
    check_trains(tmp_path / "out", steps)
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in process.stdout.splitlines() if line.strip()}
    for name in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(rows[name]) == 4, name
    assert all(len(rows[name]) == 2 for name in ("win_rate", "win_rate_proxy", "win_rate_judge"))
    assert rows["kl"][0] == "0.000" and float(rows["fluency"][0]) > 0.5
    assert ("tokens/s generated" in process.stdout) == (script == "raft.py")
    assert script != "raft.py" or len(rows["rare_gold"]) == 2


@pytest.mark.parametrize("script, steps, name, flags", [
    ("decision_transformer.py", 3, "reward", ["--epochs", 0.02]),
    ("steerlm.py", 4, "sentiment", ["--epochs", 0.01, "--bootstrap_epochs", 0.05, "--predictor_epochs", 0.02])],
    ids=["decision_transformer", "steerlm"])
def test_conditioned_method_on_the_embedded_task_starts_off_the_sft_policy(built, tmp_path, script, steps, name, flags):
    process = command(script, "--eval_prompts", 8, "--eval_samples", 2, "--out", tmp_path / "out", *flags)
    assert process.returncode == 0 and not process.stderr.strip(), process.stderr
    check_trains(tmp_path / "out", steps)
    rows = {line.split()[0]: re.findall(r"-?\d+\.\d{3}", line) for line in process.stdout.splitlines() if line.strip()}
    for metric in ("gold", "proxy", "judge", "kl", "fluency"):
        assert len(rows[metric]) == 4, metric
    assert rows["kl"][0] == "0.000" and float(rows["fluency"][0]) > 0.5, "before training it is asked in plain words"
    question = "review this french western and mention the songs:"
    process = command(script, "--policy", tmp_path / "out", "--prompt", question, "--steer", f"{name}=9")
    lines = process.stdout.split("\n  ")
    assert process.returncode == 0 and lines[0].startswith(question) and f"<{name}:9>" in lines[0] and len(lines) == 5


def test_killed_build_goes_on_with_the_missing_judge(built, tmp_path):
    """As if killed before the judge: it is made now, and nothing before it is made again.

    (Its weights equal the old ones only under the same number of threads, so they are not compared.)"""
    _, whole = built
    half = tmp_path / whole.relative_to(common.CACHE)
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("judge", "vitals.json"))
    shutil.copytree(whole / "judge", half / "judge.part")                 # an attempt that was not renamed
    (half / "judge.part" / "model.safetensors").write_bytes(b"half")
    kept = {name: (half / name).stat().st_mtime_ns for name in ("sft/model.safetensors", "samples.json", "proxy/model.safetensors")}
    process = command("common.py", ALIGNMENT_CACHE=str(tmp_path))
    assert process.returncode == 0, process.stderr
    assert {name: (half / name).stat().st_mtime_ns for name in kept} == kept
    AutoModelForSequenceClassification.from_pretrained(half / "judge")
    old, new = (json.loads((path / "vitals.json").read_text()) for path in (whole, half))
    assert new.pop("judge accuracy") > 0.6 and new.pop("seconds") and new.items() <= old.items()


# -------------------------------------------------------------------------------------------------- committed results

needs_results = pytest.mark.skipif(not (ROOT / "results" / "dpo.json").exists(), reason="results/dpo.json is not there yet")


@needs_results
@pytest.mark.parametrize("method", [*METHODS.values()], ids=lambda method: method.__name__)
def test_report_of_the_committed_results(tmp_path, method):
    """Run on a copy: the figure must not be drawn anew into the repository."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / f"{method.__name__}.json", tmp_path / "results")
    process = command(ROOT / "compare.py", method.__name__, "--report", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    on_one_line = " ".join(process.stdout.split())
    for title, experiment in method.EXPERIMENTS.items():
        assert f"{title}: {experiment['question']}" in on_one_line
        for arm in experiment["arms"]:
            start = re.escape(re.split("[ -]", arm)[0])         # a long name is broken at a space or a hyphen
            assert re.search(rf"^{start}.* ±\d", process.stdout, re.M), f"{arm} has no figures"
    assert re.search("reproduced|inconclusive", process.stdout) and "not run" not in process.stdout


@needs_results
def test_readme_holds_what_the_committed_results_say(monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if compare.BEGIN not in text:
        pytest.skip("README has no results block yet")
    monkeypatch.chdir(ROOT)
    assert text.split(compare.BEGIN)[1].split(compare.END)[0].strip() == compare.readme_block().strip()
