"""LoRA: what is trained, what the reference is, what is saved and resumed; a policy from a saved adapter."""
import dataclasses
import importlib
import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

pytest.importorskip("peft")

import common
import harness
from common import UserError
from conftest import (PAIRS, killed_after, llama_config, method_names, parameters, save_gpt2, save_toy,
                      settings, started)
from harness import adapters, loading
from harness.run import save_policy


def batch_of(tokenizer):
    return common.encode(tokenizer, ["ab", "c"], ["de", "fgh"])


def logps(model, batch):
    with torch.no_grad():
        return common.token_logps(model, batch)


def moved(policy, scale=0.3):
    """Change the adapter that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += scale * torch.randn_like(weight)
    return policy


def test_training_starts_elsewhere_or_trains_more_than_the_adapter(toy):
    plain, policy = harness.load_policy(settings(toy)), harness.load_policy(settings(toy, lora_rank=4))
    batch = batch_of(harness.load_tokenizer(settings(toy)))
    assert torch.equal(logps(plain, batch), logps(policy, batch))
    names = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    layers = policy.model.layers[0].self_attn.q_proj
    assert layers.lora_A["default"].weight.shape == (4, 16) and layers.scaling["default"] == 2
    optimizer, _ = common.adamw(policy, 1e-3, 10)
    assert len(optimizer.param_groups[0]["params"]) == len(names)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_weights_are_cast_at_every_token_or_change_numbers(family, toy, tmp_path, monkeypatch):
    path, found = save_toy(tmp_path / "toy"), {}
    if family == "gpt2":                                                     # its layers are of another class
        save_gpt2(path)
    wanted = dict(model=str(path), lora_rank=4, dtype="bfloat16")
    batch = batch_of(harness.load_tokenizer(settings(path)))
    for kind in ("as stored", "as computed"):
        with monkeypatch.context() as patch:
            if kind == "as stored":
                patch.setattr(adapters, "change_frozen", lambda model, dtype: None)
            run = started(toy, tmp_path / kind, **wanted)
        policy = moved(run.policy)
        common.sequence_logps(policy, batch).sum().backward()
        found[kind] = [logps(policy, batch), logps(run.load_reference(), batch),
                       *(weight.grad for weight in policy.parameters() if weight.requires_grad)]
    assert len(found["as stored"]) > 4 and all(map(torch.equal, *found.values()))
    layers = [module.base_layer for module in policy.modules() if hasattr(module, "base_layer")]
    beside = {id(weight) for layer in layers for weight in layer.parameters()}
    assert layers and {weight.dtype for layer in layers for weight in layer.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in policy.parameters() if id(w) not in beside} == {torch.float32}

    saved = tmp_path / "saved"
    adapters.save(policy, saved)
    again = adapters.load(saved, 4, "cpu", "bfloat16")
    assert torch.equal(logps(again, batch), found["as computed"][0])
    assert {weight.dtype for weight in adapters.merge(policy).parameters()} == {torch.float32}
    whole = adapters.load(saved, 0, "cpu", "float32")
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}
    original = AutoModelForCausalLM.from_pretrained(path).state_dict()
    kept = harness.load_policy(settings(path, lora_rank=4)).state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in original.items() if name in kept)
    assert all(torch.equal(kept[name.replace(".weight", ".base_layer.weight")], weight)
               for name, weight in original.items() if name.replace(".weight", ".base_layer.weight") in kept)


def test_reference_is_a_copy_or_moves_with_the_policy(toy, tmp_path):
    run = started(toy, tmp_path / "run", lora_rank=4)
    batch = batch_of(run.tokenizer)
    before, reference = logps(run.policy, batch), run.load_reference()
    moved(run.policy)
    after = logps(run.policy, batch)
    assert (after - before).abs().max() > 0.05
    assert torch.equal(logps(reference, batch), before) and torch.equal(logps(run.policy, batch), after)
    trained = [weight.requires_grad for weight in run.policy.parameters()]
    logps(reference, batch)
    assert [weight.requires_grad for weight in run.policy.parameters()] == trained
    assert {id(weight) for weight in reference.parameters()} == {id(w) for w in run.policy.parameters()}


def test_gradients_change_where_the_reference_is_read_in_between(toy, tmp_path):
    run = started(toy, tmp_path / "run", lora_rank=4)
    batch, reference = batch_of(run.tokenizer), run.load_reference()
    moved(run.policy)

    def gradients(between):
        run.policy.zero_grad()
        loss = -common.sequence_logps(run.policy, batch).sum()
        between()
        loss.backward()
        return [weight.grad.clone() for weight in run.policy.parameters() if weight.grad is not None]

    plain = gradients(lambda: None)
    read = gradients(lambda: logps(reference, batch))
    assert len(plain) == len(read) > 0 and all(map(torch.equal, plain, read))


def test_saved_adapter_is_another_policy_or_a_whole_model(toy, tmp_path):
    run = started(toy, tmp_path / "run", lora_rank=4)
    moved(run.policy)
    batch = batch_of(run.tokenizer)
    want, before = logps(run.policy, batch), logps(run.load_reference(), batch)
    harness.run.save_policy(run.policy, tmp_path / "saved", 4)
    run.tokenizer.save_pretrained(tmp_path / "saved")
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} < files and "model.safetensors" not in files
    named = json.loads((tmp_path / "saved" / "adapter_config.json").read_text(encoding="utf-8"))
    assert named["base_model_name_or_path"] == str(toy)
    config = settings(toy, policy=str(tmp_path / "saved"))
    merged = harness.load_policy(config)
    torch.testing.assert_close(logps(merged, batch), want)
    assert all(weight.requires_grad for weight in merged.parameters())
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(logps(loading.load_reference(config), batch), want)
    merged.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logps(common.load_policy(tmp_path / "whole", "cpu"), batch), want)
    # trained on: the reference is what it began from, not the base model
    again = dataclasses.replace(config, lora_rank=4)
    policy = harness.load_policy(again)
    reference = loading.load_reference(again, policy)
    moved(policy)
    torch.testing.assert_close(logps(reference, batch), want)
    assert (want - before).abs().max() > 0.05 and (logps(policy, batch) - want).abs().max() > 0.05
    assert all(weight.requires_grad == ("lora_" in name and ".default." in name)
               for name, weight in policy.named_parameters())
    with pytest.raises(UserError, match="adapter of rank 4: give --lora_rank 4"):
        harness.load_policy(dataclasses.replace(config, lora_rank=8))


def test_adapter_is_taken_for_a_reward_model(toy, tmp_path):
    adapters.save(harness.load_policy(settings(toy, lora_rank=4)), tmp_path)
    with pytest.raises(UserError, match="is an adapter, not a whole model: merge it first"):
        started(toy, tmp_path / "run", reward=str(tmp_path))


@pytest.mark.parametrize("method, dtype", [(name, "float32") for name in method_names()]
                         + [("dpo", "bfloat16"), ("ppo", "bfloat16")])
def test_method_trains_more_than_its_adapter_or_nothing(method, dtype, toy, tmp_path, monkeypatch):
    module = importlib.import_module(method)
    rows = [{"prompt": pair.prompt, "responses": [pair.chosen, pair.rejected, "ab"],
             "scores": [0.9, 0.1, 0.5]} for pair in PAIRS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    if method in ("decision_transformer", "steerlm"):                # the toy has no letters for tags
        monkeypatch.setattr(harness, "add_tags", lambda run, tags: None)
        monkeypatch.setattr(module, "tag" if hasattr(module, "tag") else "format_attributes",
                            lambda *args: "hg")
        if method == "steerlm":
            monkeypatch.setattr(harness, "steering", lambda *args: {"matrix": {}})
            monkeypatch.setattr(harness, "steering_metrics", lambda matrix: {})
            monkeypatch.setattr(harness, "report_steering", lambda *args: None)
    extra = {"labels": "human"} if method == "steerlm" else {}
    save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    config = settings(toy, module.Config, data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"),
                      lora_rank=2, reward=str(tmp_path / "reward"), epochs=1.0, dtype=dtype, **extra)
    base = harness.load_policy(settings(toy))
    runs, plain = [], harness.command_line.start
    monkeypatch.setattr(harness.command_line, "start", lambda config: runs.append(plain(config)) or runs[0])
    result = harness.launch(module.train, config)
    policy = runs[0].policy
    after = dict(policy.named_parameters())
    for name, weight in base.named_parameters():
        kept = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(weight.to(kept.dtype), kept)
    adapter = [weight for name, weight in after.items() if "lora_B" in name]
    assert adapter and all(weight.any() for weight in adapter)
    assert result["eval/kl"] > 0 and result["state_mb"] < 0.2
    batch = batch_of(runs[0].tokenizer)
    saved = harness.load_policy(settings(toy, policy=str(tmp_path / "out")))
    near = {} if dtype == "float32" else dict(rtol=0.05, atol=0.05)                 # saved is read in float32
    torch.testing.assert_close(logps(saved, batch), logps(policy, batch), **near)


def test_resumed_adapter_differs_from_a_straight_one_or_its_checkpoint_holds_the_base(toy, tmp_path):
    import ppo
    reward = save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    options = dict(reward=str(reward), lora_rank=2, epochs=1.0, save_every=2)

    def config(name, **more):
        return settings(toy, ppo.Config, out=str(tmp_path / name), **options, **more)

    harness.launch(ppo.train, config("straight"))
    with killed_after(2):
        harness.launch(ppo.train, config("cut"))
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert all("lora_" in name or name.startswith("1.score") for name in state["trained"])
    harness.launch(ppo.train, config("cut", resume=True))
    for name in ("adapter_model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_reward_model_of_the_pairs_keeps_an_adapter_or_a_random_head(toy, tmp_path, no_traces):
    run = started(toy, tmp_path / "run", reward="", lora_rank=2, limit=24)
    model = run.rewards["proxy"].model
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert not any("lora" in name for name, _ in model.named_parameters())
    base = harness.load_policy(settings(toy))
    assert not torch.equal(parameters(model.model), parameters(base.model))        # merged into the weights
    assert model.score.weight.any()


def test_learning_rate_of_an_adapter_is_that_of_all_weights(toy):
    import dpo
    assert dpo.Config(lora_rank=8).lr == 10 * dpo.Config().lr == 5e-3
    assert dpo.Config(lora_rank=8, lr=1e-4).lr == 1e-4
    assert (dpo.Config().reward_lr, dpo.Config(lora_rank=8).reward_lr) == (1e-5, 1e-4)


def test_peft_that_is_missing_is_a_traceback(toy, monkeypatch):
    import builtins
    plain = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(UserError, match="pip install peft"):
        harness.load_policy(settings(toy, lora_rank=2))


@pytest.mark.parametrize("content, message", [
    ("{", "cannot load an adapter from"), ("[]", "names no base model"), ("{}", "names no base model"),
    ('{"base_model_name_or_path": "BASE", "peft_type": "PREFIX_TUNING"}', "an adapter, but not LoRA"),
    ('{"base_model_name_or_path": 5, "r": 4}', "names no base model"),
    ('{"base_model_name_or_path": "ADAPTER", "r": 4}', "is an adapter itself: merge that first"),
    ('{"base_model_name_or_path": "/no/such/model", "r": 4}', "there is no directory /no/such/model")])
def test_adapter_that_cannot_be_used_is_a_traceback(content, message, toy, tmp_path):
    adapters.save(harness.load_policy(settings(toy, lora_rank=4)), tmp_path / "adapter")
    harness.load_tokenizer(settings(toy)).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    content = content.replace("BASE", str(toy)).replace("ADAPTER", str(config.parent))
    config.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        started(toy, tmp_path / "run", policy=str(tmp_path / "adapter"))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("renamed", [lambda name: name[1:], lambda name: name.replace("layers.1", "layers.9")
                                     ], ids=["all", "some"])
def test_weights_of_an_adapter_are_other_ones(rank, renamed, toy, tmp_path):
    """peft only warns, and the base model would be trained."""
    adapters.save(harness.load_policy(settings(toy, lora_rank=4)), tmp_path)
    assert harness.load_policy(settings(toy, policy=str(tmp_path), lora_rank=rank))
    file = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({renamed(k): v for k, v in safetensors.torch.load_file(file).items()}, file)
    with pytest.raises(UserError, match="weights are not those of its adapter_config.json"):
        harness.load_policy(settings(toy, policy=str(tmp_path), lora_rank=rank))


def test_weights_of_an_adapter_are_cut(toy, tmp_path):
    adapters.save(harness.load_policy(settings(toy, lora_rank=4)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is cut off"):
        started(toy, tmp_path / "run", policy=str(tmp_path / "adapter"))


def test_adapter_depends_on_whether_a_reward_model_was_trained_before(toy, tmp_path, no_traces):
    first, second = (started(toy, tmp_path / name, lora_rank=4, reward="", reward_lr=0.01) for name in "ab")
    assert torch.equal(parameters(first.policy), parameters(second.policy))       # trained; from the cache


def test_tags_in_spare_rows_are_lost_with_an_adapter(tmp_path, toy):
    """The model has more embeddings than its tokenizer has tokens: no row is added."""
    path = save_toy(tmp_path / "model")
    wide = LlamaForCausalLM(llama_config(vocab_size=40))
    wide.save_pretrained(path)
    run = started(toy, tmp_path / "run", model=str(path), lora_rank=2)
    harness.add_tags(run, {"x": {"<x:0>": ["a"], "<x:1>": ["b"]}})
    assert run.policy.get_input_embeddings().num_embeddings == 40
    run.evaluate()
    run.begin()
    run.optimizer = None
    save_policy(run.policy, tmp_path / "saved", 2)
    rows = [model.get_input_embeddings().weight[9:11].detach()
            for model in (run.policy, harness.load_policy(settings(toy, model=str(tmp_path / "saved"))))]
    assert torch.equal(*rows) and rows[0].norm() > 0


def test_linear_layer_has_no_adapter(toy):
    policy = harness.load_policy(settings(toy, lora_rank=2))
    plain = harness.load_policy(settings(toy))
    linear = {name for name, part in plain.model.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear == {name for name, part in policy.model.named_modules() if hasattr(part, "lora_A")}


def test_reference_moves_with_the_policy_where_logits_are_changed_after_the_head(toy, tmp_path):
    run = started(toy, tmp_path / "run", lora_rank=4)
    run.policy.head_is_all = False                                     # as of a family with soft caps
    batch, reference = batch_of(run.tokenizer), run.load_reference()
    before = logps(run.policy, batch)
    moved(run.policy)
    assert torch.equal(logps(reference, batch), before) and not torch.equal(logps(run.policy, batch), before)
