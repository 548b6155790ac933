"""What is wrong with a checkpoint is said in one line, before anything is trained."""
import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification,
                          BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification,
                          RobertaConfig, RobertaForSequenceClassification)

import common
import harness
from common import UserError
from conftest import save_toy, settings, started
from harness import loading
from harness.checkpoints import check_checkpoint, check_model, check_words
from tasks import build

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def config_of(path, **changes):
    """Change config.json of a checkpoint."""
    file = path / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(found), encoding="utf-8")
    return path


def shortened(file, content):
    file.write_bytes(content(file.read_bytes()))


@pytest.mark.parametrize("content, message", [
    (lambda old: POINTER, r"model.safetensors is a git-lfs pointer of 131 bytes.*git lfs pull"),
    (lambda old: old[:len(old) // 2], r"model.safetensors is cut off: \d+ of \d+ bytes; download it again"),
    (lambda old: old[:20], "model.safetensors is cut off: 20 bytes; download it again"),
    (lambda old: b"", "model.safetensors is cut off: 0 bytes; download it again"),
    (lambda old: (9).to_bytes(8, "little") + b"not json!" + old, "is no safetensors file"),
    (lambda old: (2).to_bytes(8, "little") + b"[]" + old, "is no safetensors file")])
def test_file_of_weights_is_not_whole(content, message, tmp_path):
    save_toy(tmp_path)
    check_checkpoint(tmp_path)
    shortened(tmp_path / "model.safetensors", content)
    with pytest.raises(UserError, match=message):
        check_checkpoint(tmp_path)
    with pytest.raises(UserError, match=message):
        check_checkpoint(tmp_path, policy=False)


def test_shard_is_missing(tmp_path):
    save_toy(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="lacks 1 of its 2 files of weights: model-00002.safetensors"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": null}', "\x00"])
def test_index_of_weights_is_damaged(text, tmp_path):
    save_toy(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="cannot load a model from"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("changes", [dict(num_hidden_layers="2"), dict(dtype="nope"), dict(hidden_size=[16])])
def test_wrong_value_in_the_config_is_a_traceback(changes, tmp_path, toy):
    with pytest.raises(UserError) as error:
        started(toy, tmp_path / "run", model=str(config_of(save_toy(tmp_path / "model"), **changes)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_file_of_the_wrong_shape_is_a_traceback(name, text, tmp_path, toy):
    """A file that transformers does without may be anything."""
    (save_toy(tmp_path / "model") / name).write_text(text, encoding="utf-8")
    try:
        started(toy, tmp_path / "run", model=str(tmp_path / "model"))
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name, changes, message", [
    ("tokenizer.json", {"version": "9"}, "cannot load a tokenizer from .*Unknown tokenizer version"),
    ("tokenizer_config.json", {"model_max_length": "64"}, "cannot load a tokenizer from"),
    ("config.json", {"output_attentions": True}, "cannot load a config that can be saved from"),
    ("config.json", {"dtype": "int8"}, "config.json has the dtype .*int8: write float32 there"),
    ("config.json", {"pad_token_id": 100}, "cannot load a model from"),
    ("generation_config.json", {"eos_token_id": [[1]]}, r"has the eos_token_id \[\[1\]\]: write token ids"),
    ("generation_config.json", {"eos_token_id": 1.5}, r"has the eos_token_id \[1.5\]: write token ids")])
def test_value_that_fails_late_is_found_late_or_a_traceback(name, changes, message, tmp_path, toy):
    file = save_toy(tmp_path / "model") / name
    found = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        started(toy, tmp_path / "run", model=str(tmp_path / "model"))


@pytest.mark.parametrize("scale", [[1], None, {"mean": "a", "std": 1.0}, {"mean": 0.0}])
def test_scale_of_a_reward_model_is_damaged(scale, tmp_path):
    path = save_toy(tmp_path, LlamaForSequenceClassification, num_labels=1)
    with pytest.raises(UserError, match="cannot load a reward model from"):
        common.load_reward_model(config_of(path, reward_scale=scale), 64, "cpu")


def test_policy_that_does_not_know_the_words_of_the_task(toy):
    check_words(build.tiny_tokenizer(160), "sft")
    with pytest.raises(UserError, match=r"does not know \d+ words of the film reviews: give --data"):
        check_words(common.load_tokenizer(toy, 64), toy)


def test_model_without_tokenizer_answers_to_nothing(tmp_path, toy):
    for file in save_toy(tmp_path / "policy").glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="policy has no tokenizer|cannot load a tokenizer from"):
        started(toy, tmp_path / "run", model=str(tmp_path / "policy"))
    torch.manual_seed(0)
    reward = tmp_path / "reward"
    BertForSequenceClassification(BertConfig(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=96, num_labels=1)).save_pretrained(reward)
    with pytest.raises(UserError, match="reward has no tokenizer|cannot load a tokenizer from"):
        started(toy, tmp_path / "other", reward=str(reward))


def test_pad_of_a_reward_model_has_no_embedding(tmp_path, toy):
    path = save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    tokenizer = common.load_tokenizer(path, 64)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    scores = started(toy, tmp_path / "run", reward=str(path)).rewards["proxy"](["ab", "c"], ["a", "bcdef"])
    assert scores.isfinite().all() and scores[0] != scores[1]
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match=r"has '\[END\]' as a token that the model has no embedding of"):
        started(toy, tmp_path / "other", reward=str(path))


def test_reward_model_of_other_weights_is_taken_from_the_cache(tmp_path):
    path = save_toy(tmp_path)
    config = harness.Config(model=str(path), data="pairs.jsonl", device="cpu")
    first = harness.trained_path(config, [])
    assert first == harness.trained_path(config, [])
    model = common.load_policy(path, "cpu")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(path)
    assert harness.trained_path(config, []) != first


@pytest.mark.parametrize("changes, message", [
    (dict(quantization_config="awq"), r"quantised checkpoint \(awq\)"),
    (dict(quantization_config={"quant_method": "gptq"}), r"quantised checkpoint \(gptq\).*full-precision"),
    (dict(model_type="mine", auto_map={"AutoConfig": "mine.A"}), "needs Python code of its own"),
    (dict(model_type="t5", is_encoder_decoder=True), r"is an encoder-decoder \(t5\)")])
def test_kind_of_checkpoint_that_no_method_can_use(changes, message, tmp_path):
    config_of(save_toy(tmp_path), **changes)
    with pytest.raises(UserError, match=message):
        check_checkpoint(tmp_path)


def test_family_with_code_of_its_own_that_transformers_knows_is_refused(tmp_path):
    check_checkpoint(config_of(save_toy(tmp_path), auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"}))


def test_directory_without_config_or_with_broken_config_is_a_traceback(tmp_path):
    for text in (None, "{", "[]"):
        if text:
            (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="cannot load a model from"):
            check_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "unheard_of"])
def test_code_that_a_checkpoint_brings_is_run(tmp_path, kind):
    """A family that transformers knows is loaded as such; another is refused in one line."""
    save_toy(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": classes}),
                                          encoding="utf-8")
    if kind == "llama":
        common.load_policy(tmp_path, "cpu")
    else:
        with pytest.raises(UserError, match="^cannot load a model from [^\n]+$"):
            common.load_policy(tmp_path, "cpu")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_missing_become_random(tmp_path):
    from safetensors.torch import load_file, save_file
    save_toy(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: weight for name, weight in weights.items() if name != lost},
              tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights, which would be random: ..{lost}"):
        common.load_policy(tmp_path, "cpu")


def test_weights_that_nothing_reads_are_not_said(tmp_path, toy, capsys):
    from safetensors.torch import load_file, save_file
    save_toy(tmp_path)
    file, more = tmp_path / "model.safetensors", {"model.norm.bias": torch.zeros(16)}
    save_file(load_file(file) | more, file, {"format": "pt"})
    common.load_policy(tmp_path, "cpu")
    assert f"{tmp_path} has weights that are not used: ['model.norm.bias']" in capsys.readouterr().err
    common.load(AutoModelForSequenceClassification, tmp_path, "cpu", num_labels=1)      # another head
    common.load_policy(toy, "cpu")
    assert "not used" not in capsys.readouterr().err


def test_language_model_is_taken_for_a_reward_model(tmp_path, toy):
    with pytest.raises(UserError, match="lacks 1 weights, which would be random: ..score.weight"):
        common.load_reward_model(toy, 64, "cpu")
    save_toy(tmp_path, LlamaForSequenceClassification, num_labels=1)
    assert common.load_reward_model(tmp_path, 64, "cpu").model.score.weight.any()


def test_tied_weights_are_missing(tmp_path):
    save_toy(tmp_path, tie_word_embeddings=True)
    assert common.load_policy(tmp_path, "cpu").lm_head.weight.any()


def test_tokenizer_of_another_model(tmp_path, toy):
    policy, tokenizer = harness.load_policy(settings(toy)), harness.load_tokenizer(settings(toy))
    check_model(policy, tokenizer, "a", toy)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(UserError, match="has PAD as token 9, the model only 9 embeddings"):
        check_model(policy, tokenizer, "ab", toy)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="no embedding of, as in 'a<pad>'"):
        loading.check_vocabulary(tokenizer, ["ab", "a<pad>"], [[1, 2], [1, 9]], 9)


def test_unknown_words_are_trained_on_in_silence(toy, capsys):
    tokenizer = harness.load_tokenizer(settings(toy))
    tokenizer.unk_token = "a"
    loading.check_vocabulary(tokenizer, ["bb"], [[2] * 199 + [1]], 9)
    assert not capsys.readouterr().err
    loading.check_vocabulary(tokenizer, ["bb"], [[2] * 3 + [1]], 9)
    assert "25% of the words of the prompts are unknown to the model" in capsys.readouterr().err
    with pytest.raises(UserError, match="60% of the words .* give --model"):
        loading.check_vocabulary(tokenizer, ["bb"], [[2] * 2 + [1] * 3], 9)


class IgnoresTheMask(torch.nn.Module):
    """A policy that takes padding for words, or sees what comes later."""

    def __init__(self, model, **changes):
        super().__init__()
        self.model, self.changes = model, changes
        self.compute_dtype, self.head_is_all, self.device = torch.float32, False, model.device

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_model_that_ignores_the_mask_is_trained(toy):
    policy, tokenizer = harness.load_policy(settings(toy)), harness.load_tokenizer(settings(toy))
    for prompt in ("a", "abcdefgh" * 5):
        check_model(policy, tokenizer, prompt, toy)
    with pytest.raises(UserError, match=r"\(IgnoresTheMask\) ignores the attention mask: log-probs"):
        check_model(IgnoresTheMask(policy), tokenizer, "abc", "x")


def test_model_that_sees_later_tokens_is_trained(toy):
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, intermediate_size=16,
                                      num_attention_heads=2, initializer_range=1.0)).eval()
    bert.compute_dtype = torch.float32
    with pytest.raises(UserError, match=r"\(BertLMHeadModel\) sees later tokens: it is no causal language"):
        check_model(bert, harness.load_tokenizer(settings(toy)), "abc", "x")


def test_probe_changes_what_the_policy_computes_in(toy):
    policy = common.load_policy(toy, "cpu", "bfloat16")
    check_model(policy, harness.load_tokenizer(settings(toy)), "abc", toy)
    assert policy.compute_dtype == torch.bfloat16


def test_checks_are_made_after_the_data_is_read_or_not_at_all(toy, tmp_path):
    save_toy(tmp_path / "model")
    shortened(tmp_path / "model" / "model.safetensors", lambda old: POINTER)
    (tmp_path / "model" / "pairs.jsonl").write_text("broken", encoding="utf-8")
    with pytest.raises(UserError, match="git-lfs pointer"):
        started(tmp_path / "model", tmp_path / "run")
    with pytest.raises(UserError, match="no such file: missing.jsonl"):
        started(toy, tmp_path / "run", data="missing.jsonl", model="tiny")             # before it is built
    assert not (tmp_path / "run").exists()


def test_reward_model_is_trained_on_more_tokens_than_it_has_positions(tmp_path, toy, no_traces):
    """GPT-2 learns its positions: beyond the last there is no embedding."""
    path = save_toy(tmp_path / "model")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(path)
    rows = [{"prompt": "cd" * (i + 3), "chosen": "a" * 40, "rejected": "b" * 40} for i in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = started(toy, tmp_path / "run", model=str(path), data=str(data), reward="", reward_lr=0.01,
                  max_new_tokens=4)
    assert run.rewards["proxy"](["cd"], ["a" * 60]).isfinite().all()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><title>404</title>", pickle.dumps({"a": print})],
                         ids=["empty", "page", "pickle of something else"])
def test_file_of_weights_that_is_none_is_a_traceback(toy, tmp_path, content):
    path = tmp_path / "model"
    shutil.copytree(toy, path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(content)
    for load in (common.load_policy, lambda path: common.load_reward_model(path, 64)):
        with pytest.raises(UserError, match="cannot load a model from"):
            load(path)


def test_commit_of_a_hub_model_is_not_known(monkeypatch, tmp_path):
    """A hub id has no files of its own here: what is in the cache tells which commit was loaded."""
    folder = tmp_path / "snapshots" / ("0123456789" * 4)
    known = {"org/model": str(folder / "config.json")}
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda name, file: known.get(name))
    assert loading.commit_of("org/model") == "0123456789" * 4
    assert loading.commit_of("org/other") is None is loading.commit_of(tmp_path)
    monkeypatch.undo()
    assert loading.commit_of("my_rewards:letters*0.5") is None                       # no name of the hub
    assert loading.commit_of("no/such/folder") is None


def test_positions_of_roberta_are_those_behind_pad(capsys):
    """Its positions begin at PAD's id plus one, so a text has that many fewer."""
    config = RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                           intermediate_size=8, max_position_embeddings=34, pad_token_id=1, num_labels=1)
    model = RobertaForSequenceClassification(config).eval()
    tokenizer = SimpleNamespace(model_max_length=64)
    loading.fit_positions(model, tokenizer, "x")
    assert tokenizer.model_max_length == 32 and "x has 32 positions" in capsys.readouterr().err
    model(torch.full((1, 32), 5), attention_mask=torch.ones(1, 32))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 33), 5), attention_mask=torch.ones(1, 33))
