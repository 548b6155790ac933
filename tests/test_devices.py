"""What must hold on every device: number formats, sampling, chunks, resume. CUDA is skipped if absent."""
import json

import pytest
import torch
from transformers import (AutoModel, AutoModelForSequenceClassification, BertConfig,
                          BertForSequenceClassification, LlamaForSequenceClassification)

import common
import dpo
import harness
import ppo
from common import UserError
from conftest import killed_after, pair_task, parameters, save_gpt2, save_toy, settings, started
from harness import command_line, loading, prompts_once, ranks, rewards
from harness.config import differences
from tasks import build

cuda = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))
devices = pytest.mark.parametrize("device", ["cpu", cuda])


def batch_of(run):
    return common.encode(run.tokenizer, ["abcdefgh" * 2, "c"], ["de", "fgh"]).to(run.policy.device)


@devices
def test_autocast_log_probs_are_far_from_float32_or_of_another_type(device, toy, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = started(toy, tmp_path / dtype, device=device, dtype=dtype)
        found[dtype] = common.token_logps(run.policy, batch_of(run)).cpu()
        assert found[dtype].dtype == torch.float32
        assert all(weight.dtype == torch.float32 for weight in run.policy.parameters())
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0.05, atol=0.05)
    assert not torch.equal(found["bfloat16"], found["float32"])


@devices
def test_device_changes_log_probs_values_or_scores(device, toy, tmp_path):
    ours, plain = (started(toy, tmp_path / name, device=name, dtype="float32") for name in (device, "cpu"))
    for function in (common.token_logps, common.sequence_logps):
        torch.testing.assert_close(function(ours.policy, batch_of(ours)).cpu(),
                                   function(plain.policy, batch_of(plain)), rtol=1e-3, atol=1e-3)


@devices
def test_chunks_change_log_probs_or_gradients(device, toy, tmp_path):
    run, found = started(toy, tmp_path / "run", device=device, dtype="float32"), []
    for chunk in (None, 2):
        run.policy.zero_grad()
        logps = common.token_logps(run.policy, batch_of(run), chunk=chunk)
        logps.sum().backward()
        found.append((logps.detach().cpu(), run.policy.get_input_embeddings().weight.grad.clone().cpu()))
    for plain, chunked in zip(*found):
        torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-4)


@devices
def test_samples_are_left_on_the_device_or_greedy_ones_differ_from_the_argmax(device, toy, tmp_path):
    run = started(toy, tmp_path / "run", device=device, dtype="float32")
    batch = common.generate(run.policy, run.tokenizer, ["ab", "cdefg"], greedy=True, max_new_tokens=4)
    assert batch.input_ids.device.type == "cpu"
    with torch.no_grad():
        for prompt, ids in zip(["ab", "cdefg"], common.decode(run.tokenizer, batch)):
            known = common.prompt_ids(run.tokenizer, [prompt])[0]
            for token in ids.ids:
                logits = run.policy(torch.tensor([known], device=run.policy.device)).logits[0, -1]
                assert token == int(logits.argmax())
                known = known + [token]


def lengths(prompts, responses):
    return [float(len(text)) for text in responses]


@devices
@pytest.mark.parametrize("module", [dpo, ppo], ids=lambda module: module.__name__)
def test_resumed_run_differs_from_a_straight_one(module, device, toy, tmp_path):
    """Under the device's own number format: bfloat16 on CUDA. PPO also asserts its first ratio of 1."""
    def config(out, **more):
        return settings(toy, module.Config, out=str(tmp_path / out), device=device, lr=1e-3, epochs=1.0,
                        save_every=1, reward="test_devices:lengths", **more)

    harness.launch(module.train, config("straight"))
    with killed_after(2):
        harness.launch(module.train, config("cut"))
    harness.launch(module.train, config("cut", resume=True))
    rows = [[json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text(
        encoding="utf-8").splitlines()] for out in ("straight", "cut")]
    assert len(rows[0]) == len(rows[1]) > 3
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3), (a["step"], name)
    weights = [parameters(common.load_policy(tmp_path / out, "cpu")) for out in ("straight", "cut")]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_models_fill_twice_the_memory_or_their_type_changes_a_number(family, dtype, tmp_path):
    path = save_toy(tmp_path / "toy")
    if family == "gpt2":                                                     # its layers are of another class
        save_gpt2(path)
    config = settings(path, dtype=dtype)
    batch = common.encode(harness.load_tokenizer(config), ["ab", "c"], ["de", "fgh"])
    policy, reference = harness.load_policy(config), loading.load_reference(config)
    assert torch.equal(common.token_logps(policy, batch), common.token_logps(reference, batch))
    types = {name: weight.dtype for name, weight in reference.named_parameters()}
    layers = {name for name in types if name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight"))}
    assert len(layers) == (14 if family == "llama" else 8)
    assert {types[name] for name in layers} == {getattr(torch, dtype)}
    assert {types[name] for name in types.keys() - layers} == {torch.float32}
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}


def test_reward_model_of_bfloat16_gives_other_scores(toy, tmp_path, monkeypatch):
    path = save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    config, scores = settings(toy, dtype="bfloat16", reward=str(path)), []
    for kept in (True, False):
        with monkeypatch.context() as patch:
            if kept:
                patch.setattr(rewards, "frozen", lambda config, model: model)
            found = rewards.load_rewards(config, pair_task())["proxy"]
        scores.append(found(["ab", "c"], ["de", "fgh"]))
        assert found.model.score.weight.dtype == torch.float32
    assert found.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert torch.equal(*scores) and scores[0][0] != scores[0][1]


def test_encoder_cannot_score_in_bfloat16(toy, tmp_path):
    path = save_toy(tmp_path / "reward")
    BertForSequenceClassification(BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=96, num_labels=1)).save_pretrained(path)
    reward = rewards.load_rewards(settings(toy, dtype="bfloat16", reward=str(path)), pair_task())["proxy"]
    assert isinstance(reward, rewards.EncoderReward) and reward(["ab", "c"], ["de", "fgh"]).isfinite().all()


def test_scores_and_values_have_the_steps_of_bfloat16(tmp_path):
    """A head in bfloat16 has 8 significant bits: of 400 scores around 20, few would differ."""
    path = save_toy(tmp_path, LlamaForSequenceClassification, num_labels=1)
    model = common.load(AutoModelForSequenceClassification, path, "cpu", "bfloat16")
    with torch.no_grad():
        model.score.weight.mul_(100)
    rng = torch.Generator().manual_seed(0)
    rows = [([], torch.randint(1, 9, (9,), generator=rng).tolist()) for _ in range(400)]
    scores = common.sequence_scores(model, common.pack(rows, 0))[:, 0]
    assert len({*scores.tolist()}) > 0.95 * len({tuple(row[1]) for row in rows})
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9
    value_model = common.ValueModel(common.load(AutoModel, path, "cpu", "bfloat16"))
    value_model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        value_model.score.weight.normal_()
    values = common.token_values(value_model, common.pack(rows[:20], 0))[:, 1:]
    assert (values != values.bfloat16().float()).float().mean() > 0.9


def test_size_of_training_is_that_of_the_type_that_is_saved(tmp_path, toy):
    path = save_toy(tmp_path / "half")
    common.load_policy(path, "cpu").bfloat16().save_pretrained(path)
    sizes = [harness.launch(dpo.train, settings(toy, dpo.Config, model=str(model), epochs=0.2,
                                                out=str(tmp_path / name)))["state_mb"]
             for name, model in (("float32", toy), ("bfloat16", path))]
    assert sizes[0] == sizes[1]


def test_auto_takes_mps_for_the_tiny_model_or_another_device_for_a_real_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for there, tiny, real in ((False, "cpu", "mps"), (True, "cuda", "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        for cls in (harness.Config, dpo.Config):
            assert common.pick_device(cls().device).type == tiny
            assert common.pick_device(cls(model="m", data="d").device).type == real
        assert common.pick_device(build.options([]).device).type == tiny
    assert harness.Config(device="mps").device == build.options(["--device", "mps"]).device == "mps"


@pytest.mark.parametrize("mps", [False, True])
def test_device_that_auto_stands_for_is_told_as_a_setting_of_a_real_model(mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    for device, told in (("auto", {}), ("cpu", {"device": "cpu"})):
        assert differences(harness.Config(model="m", data="d", device=device)) == {
            "model": "m", "data": "d"} | told


def test_lack_of_memory_is_another_process_that_has_ended():
    with pytest.raises(torch.OutOfMemoryError), ranks.together():
        raise torch.OutOfMemoryError("no memory")
    said = r"another process of this run has ended: .* \(Connection closed by peer\)"
    with pytest.raises(UserError, match=said), ranks.together():
        raise RuntimeError("Connection closed by peer")


def test_lack_of_memory_in_the_check_of_shared_prompts_passes_for_an_unfit_model(toy, monkeypatch):
    model = harness.load_policy(settings(toy))

    def full(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(prompts_once, "packed", full)
    with pytest.raises(torch.OutOfMemoryError):
        prompts_once.same_states(model)


def test_sum_over_processes_fails_where_one_had_no_rows(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    for own in (0.0, torch.tensor([1.0, 2.0])):
        monkeypatch.setattr(ranks, "gathered", lambda value: [0.0, torch.tensor([1.0, 2.0]), 0.0])
        assert ranks.total(own).tolist() == [1.0, 2.0]


def test_random_numbers_drawn_inside_change_those_outside():
    torch.manual_seed(0)
    want = torch.rand(2)[1]
    torch.manual_seed(0)
    torch.rand(1)
    with ranks.fork_rng():
        torch.rand(7)
    assert torch.rand(1)[0] == want


def test_command_that_resumes_is_of_one_process_where_there_were_several(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr("sys.argv", ["dpo.py", "--shard", "True", "--out", "x"])
    assert command_line.command_that_resumes("x") == (
        "torchrun --nproc-per-node 4 dpo.py --shard True --out x --resume")
