"""--shard: what each process keeps, and that passes, gradients and samples are those of whole models.

One run of two processes (torchrun, gloo) writes what it found; the tests read it. What the methods learn with
--shard is in test_ranks.py.
"""
import json
import os
import subprocess
import sys

import pytest
from transformers import LlamaForSequenceClassification

import harness
from common import UserError
from conftest import PAIRS, ROOT, save_toy, settings
import remax

WORKER = '''
import copy, json, pathlib, sys
sys.path[:0] = {paths!r}
import torch
import common, harness
from conftest import PAIRS, settings
from harness import loading, ranks, shards

home, found = pathlib.Path(sys.argv[1]), {{}}
torch.set_num_threads(1)
ranks.start("cpu")


def far(model, whole, passed, of_gradients):
    """The largest distance of two passes' values and (x of_gradients) gradients; how full they are."""
    values, gradients = [], []
    for one in (model, whole):
        values.append(passed(one))
        values[-1].square().sum().backward()
        gradients.append([shards.number(weight.grad) for weight in one.parameters()])
    gaps = [float((a - of_gradients * b).abs().max()) for a, b in zip(*gradients, strict=True)]
    return {{"value": float((values[0] - values[1]).detach().abs().max()), "gradient": max(gaps),
             "size": min(float(b.abs().max()) for b in gradients[1]),
             "largest": max(float(b.abs().max()) for b in gradients[1])}}


def kept(model):
    weights = [*model.parameters()]
    own = sum(weight.to_local().numel() for weight in weights)
    return own / sum(weight.numel() for weight in weights)


def batch_of(tokenizer, n):
    """Other rows and more of them in the second process: what a pass gathers must not depend on them."""
    rows = PAIRS[:n + 3 * ranks.number()]
    return common.encode(tokenizer, [row.prompt for row in rows], [row.chosen for row in rows])


policies = {{}}
for name, more in (("untied", {{}}), ("tied", {{"dtype": "bfloat16"}}), ("tied", {{}}),
                   ("untied", {{"gradient_checkpointing": True, "dtype": "float32"}})):
    config = settings(home / name, shard=True, **more)
    policy, whole = harness.load_policy(config), common.load_policy(home / name, "cpu", config.dtype)
    tokenizer = harness.load_tokenizer(config)
    batch = batch_of(tokenizer, 4)
    for chunk in (None, 2):
        # the same rows in both processes: the sum of two equal gradients
        found[f"{{name}} {{chunk}} {{len(more)}}"] = far(
            policy, whole, lambda one: common.token_logps(one, batch[:2], chunk=chunk), ranks.count())
        for one in (policy, whole):
            one.zero_grad()
        common.token_logps(policy, batch, chunk=chunk).sum().backward()                # more chunks in one
        policy.zero_grad()
    found[f"kept {{name}} {{len(more)}}"] = kept(policy)
    policies[name] = policy, whole, tokenizer

config = settings(home / "untied", shard=True)
tokenizer = harness.load_tokenizer(config)
batch = batch_of(tokenizer, 4)[:3]
for name, load, plain, passed, of in (
        ("value", lambda: shards.load(config, lambda *place: common.load_value_model(
            home / "untied", tokenizer, *place)),
         lambda: common.load_value_model(home / "untied", tokenizer, "cpu"),
         lambda one: common.token_values(one, batch), 2),
        ("scorer", lambda: harness.load_scorer(settings(home / "scores", shard=True)),
         lambda: harness.load_scorer(settings(home / "scores")),
         lambda one: common.sequence_scores(one, batch), 1)):
    model, whole = load(), plain()
    for one in (model, whole):                                          # a head that is 0 hides gradients
        with torch.no_grad():
            one.score.weight.copy_(shards.like(torch.linspace(-1, 1, 16)[None], one.score.weight))
    found[name], found["kept " + name] = far(model, whole, passed, of), kept(model)

# samples: one process has more prompts than the other, or all; calls of generate differ in number, too
for name, n, budget in (("untied", 3, None), ("tied", 5, 30), ("untied", 1, 20)):
    texts = []
    for model in policies[name][:2]:
        torch.manual_seed(n)
        batch = ranks.generate(model, policies[name][2], [row.prompt for row in PAIRS[:n]], 2,
                               max_new_tokens=30, budget=budget)
        texts.append(batch.input_ids.tolist())
    found[f"samples {{name}} {{n}}"] = texts

# fillers: of three rows, a part each, one process has two parts and the other one
run = harness.start(settings(home / "untied", shard=True, out=str(home / "run"), token_budget=8))
whole, seen = common.load_policy(home / "untied", "cpu"), harness.Means()
rows = PAIRS[:3]
before = harness.samples.response_logps(run, rows, counted="tokens_scored_reference")
for part, batch in run.microbatches(rows):
    logps = common.sequence_logps(run.policy, batch)
    (logps / batch.lengths).sum().backward()
    seen.add({{"logp": logps}})
    run.counts["tokens_trained"] += int(batch.attention_mask.sum())
parts = [common.encode(run.tokenizer, [row.prompt] * 2, row.responses) for row in rows]
logps = torch.stack([common.sequence_logps(whole, part) for part in parts])                          # [3, 2]
(logps / torch.stack([part.lengths for part in parts])).sum().backward()
gaps = [float((shards.number(a.grad) - b.grad).abs().max())
        for a, b in zip(run.policy.parameters(), whole.parameters(), strict=True)]
found["fillers"] = {{"gradient": max(gaps),
                     "size": min(float(weight.grad.abs().max()) for weight in whole.parameters()),
                     "logp": float(seen.result()["logp"] - logps.detach().mean()),
                     "counts": [run.counts[name] for name in ("tokens_trained", "tokens_scored_reference")]}}
found["logps"] = float((before[0] - logps.detach()).abs().max())
found["lengths"] = [values.tolist() for values in (before[1], torch.stack([part.lengths for part in parts]))]
found["tokens"] = sum(int(part.attention_mask.sum()) for part in parts)
found["parts"] = [(rows.tolist(), run.weight) for rows in run.parts(batch_of(run.tokenizer, 3)[:3])]
try:
    copy.deepcopy(run.policy)
except common.UserError as error:
    found["copy"] = str(error)
try:
    harness.add_tags(run, {{"a": {{"<new>": []}}}})
except common.UserError as error:
    found["tags"] = str(error)

# a reward model that is trained from pairs
rewards = []
for shard in (True, False):
    reward = harness.rewards.load_rewards(settings(
        home / "untied", reward="", shard=shard, reward_lr=1e-3 + 1e-12 * shard), run.task)["proxy"]
    rewards.append(reward([r.prompt for r in PAIRS], [r.chosen for r in PAIRS]).tolist())
found["rewards"] = rewards
(home / f"found{{ranks.number()}}.json").write_text(json.dumps(found), encoding="utf-8")
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes wrote."""
    home = tmp_path_factory.mktemp("shards")
    for name in ("untied", "tied"):
        save_toy(home / name, tie_word_embeddings=name == "tied")
    save_toy(home / "scores", LlamaForSequenceClassification, num_labels=1)
    for name in ("untied", "tied", "scores"):
        (home / name / "pairs.jsonl").write_text(
            "".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS), encoding="utf-8")
    worker = home / "worker.py"
    worker.write_text(WORKER.format(paths=[str(ROOT), str(ROOT / "tests")]), encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           "2", str(worker), str(home)], capture_output=True, text=True, encoding="utf-8",
                          timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1",
                                                         "ALIGNMENT_CACHE": str(home / "cache")})
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr.lower(), done.stderr
    return [json.loads((home / f"found{n}.json").read_text(encoding="utf-8")) for n in range(2)]


PASSES = [f"{name} {chunk} {options}" for chunk in (None, 2)
          for name, options in (("untied", 0), ("tied", 0), ("tied", 1), ("untied", 2))]


@pytest.mark.parametrize("name", [*PASSES, "value", "scorer"])
def test_passes_in_shards_are_other_than_of_whole_models(found, name):
    """Log-probs (the head at once and in chunks), values, scores; the gradient is the sum over processes.

    "tied 1" is in bfloat16, where chunks add up with other roundings; "untied 2" computes activations again
    going back. Of a scorer, whose rows every process reads, the gradient is the mean.
    """
    for process in found:
        gaps = process[name]
        near = 1e-5 * gaps["size"] if name != "tied 2 1" else 1e-2 * gaps["largest"]
        assert gaps["value"] < 1e-5 and gaps["gradient"] < near and gaps["size"] > 0.1, gaps


@pytest.mark.parametrize("name", ["untied 0", "tied 0", "untied 2", "value"])
def test_process_keeps_more_than_its_part(found, name):
    parts = [process[f"kept {name}"] for process in found]
    assert sum(parts) == pytest.approx(1) and max(parts) < 0.55


@pytest.mark.parametrize("name", ["samples untied 3", "samples tied 5", "samples untied 1"])
def test_samples_in_shards_are_other_than_of_whole_models(found, name):
    for process in found:
        in_shards, whole = process[name]
        assert in_shards == whole and len({tuple(row) for row in whole}) > 1
    assert found[0][name] == found[1][name]


def test_filler_changes_gradient_means_or_counts(found):
    """A process without a part left takes part in the other's, and adds nothing."""
    for process in found:
        filler = process["fillers"]
        assert filler["gradient"] < 1e-5 and filler["size"] > 0.1 and abs(filler["logp"]) < 1e-5
        assert filler["counts"] == [process["tokens"]] * 2
        assert process["logps"] < 1e-5 and process["lengths"][0] == process["lengths"][1]
    parts = [sorted(process["parts"]) for process in found]
    assert parts == [[[[0], 1.0], [[2], 1.0]], [[[0], 0.0], [[1], 1.0]]]


def test_reward_model_trained_in_shards_is_another(found):
    for process in found:
        in_shards, whole = process["rewards"]
        assert in_shards == pytest.approx(whole, abs=1e-4) and max(whole) - min(whole) > 0.1


def test_what_shards_cannot_do_is_not_said(found, toy, tmp_path):
    for process in found:
        assert "cannot be copied" in process["copy"] and "no new tokens" in process["tags"]
    with pytest.raises(UserError, match="torchrun"):
        harness.start(settings(toy, shard=True, out=str(tmp_path / "run")))
    for more in ({"lora_rank": 4}, {"prompt": "a"}, {"reproduce": True}):
        with pytest.raises(UserError, match="leave"):
            settings(toy, shard=True, **more)
    with pytest.raises(UserError, match="--variance_prompts"):
        settings(toy, remax.Config, shard=True, variance_prompts=4)
    assert not (tmp_path / "run").exists()
