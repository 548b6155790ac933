"""Real models and data: what is cut, what is saved, which files are read, encoders as reward models."""
import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import common
from common import UserError
from conftest import save_toy, settings, started
from harness import loading
from harness.rewards import EncoderReward
from harness.run import as_it_came, save_policy
from tasks import Demonstration, Pair, Ranking, Task, preferences, words

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def letters_task(*responses):
    rankings = [Ranking("ab", list(pair), [1.0, 0.0]) for pair in responses]
    pairs = [Pair("ab", *pair) for pair in responses]
    return Task("t", {"train": ["ab"], "test": ["c"]}, {"train": pairs, "test": []},
                {"train": rankings, "test": []}, {"train": [Demonstration("c", responses[0][0])], "test": []})


def test_answers_are_cut_or_become_equal_in_silence(toy, capsys):
    tokenizer = common.load_tokenizer(toy, 8)
    task = letters_task(("abcdefa", "abcdefb"), ("h", "abcdefc"), ("a", "b"))
    loading.fit_task(tokenizer, task)
    error = capsys.readouterr().err
    assert "4 of 7 answers do not fit into 8 tokens" in error and "1 of 3 pairs are equal after that" in error
    assert [pair.chosen for pair in task.pairs["train"]] == ["h", "a"]
    assert [row.responses for row in task.rankings["train"]] == [["h", "abcdefc"], ["a", "b"]]
    whole = letters_task(("abcdefa", "abcdefb"))
    loading.fit_task(common.load_tokenizer(toy, 160), whole)
    assert len(whole.pairs["train"]) == 1 and not capsys.readouterr().err


def test_a_model_with_fewer_positions_is_read_beyond_them(toy, capsys):
    tokenizer, model = common.load_tokenizer(toy, 60), SimpleNamespace(config=SimpleNamespace())
    loading.fit_positions(model, tokenizer, "x")
    model.config.max_position_embeddings = 60
    loading.fit_positions(model, tokenizer, "x")
    assert tokenizer.model_max_length == 60 and not capsys.readouterr().err
    model.config.max_position_embeddings = 50
    loading.fit_positions(model, tokenizer, "x")
    assert tokenizer.model_max_length == 50 and "x has 50 positions" in capsys.readouterr().err


def test_saved_tokenizer_differs_from_the_one_that_came(toy, tmp_path):
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "came")
    tokenizer = common.load_tokenizer(toy, 32)
    tokenizer.eos_token = "a"
    as_it_came(tokenizer).save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "came").iterdir():
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    assert tokenizer.model_max_length == 32 and tokenizer.eos_token == "a"


def test_saved_weights_have_another_type_than_those_that_came(toy, tmp_path):
    common.load_policy(toy, "cpu").to(torch.bfloat16).save_pretrained(tmp_path)
    assert loading.saved_dtype(settings(toy)) == torch.float32
    assert loading.saved_dtype(settings(toy, policy=str(tmp_path))) == torch.bfloat16


@pytest.mark.parametrize("text, expected", [
    ("a b-c,  d", ["a", "b-c,", "d"]), ("", []),
    ("\u8bf7\u5199\u4e00\u53e5", list("\u8bf7\u5199\u4e00\u53e5")),
    ("tea\u8336 ok", ["tea", "\u8336", "ok"])])
def test_words_where_there_are_no_spaces(text, expected):
    assert words(text) == expected


# ---- files

def test_tables_and_arrays_are_read_as_lines_are(tmp_path):
    rows = [PAIR | {"prompt": f"prompt {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    plain = preferences.load(str(tmp_path / "rows.jsonl"))
    assert preferences.load(str(tmp_path / "rows.json")) == plain
    datasets = pytest.importorskip("datasets")
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(PAIR))
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").rename(tmp_path / "rows")                       # known by its first bytes
    for name in ("rows.csv", "rows"):
        assert preferences.load(str(tmp_path / name)) == plain


@pytest.mark.parametrize("name", ["pairs[1].csv", "a*.csv"])
def test_name_of_a_table_is_taken_for_a_pattern(name, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    for file in (name, "pairs1.csv", "ab.csv"):
        lines = [f"{file} {i},yes,no" for i in range(6)]
        (tmp_path / file).write_text("\n".join(["prompt,chosen,rejected", *lines]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    prompts = preferences.load(name).prompts
    assert {*prompts["train"], *prompts["test"]} == {f"{name} {i}" for i in range(6)}


def test_ultrafeedback_in_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")

    def turns(i, answer):
        return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]

    rows = [{"prompt": f"q{i}", "prompt_id": str(i), "chosen": turns(i, "good"), "rejected": turns(i, "bad"),
             "messages": turns(i, "good"), "score_chosen": 8.0, "score_rejected": 3.0} for i in range(4)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)
    task = preferences.load(str(tmp_path / "train.parquet"), tokenizer)
    assert task.chat and len(task.prompts["train"] + task.prompts["test"]) == 4
    pair = task.pairs["train"][0]
    assert (pair.chosen, pair.rejected) == ("good", "bad") and pair.prompt.messages[0]["role"] == "user"


def test_broken_parquet_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match="^rows.parquet cannot be read as parquet: "):
        preferences.load(str(tmp_path / "rows.parquet"))


# ---- encoders as reward models

@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT whose tokenizer has no EOS: [CLS] prompt [SEP] response [SEP]."""
    known = ["[PAD]", "[CLS]", "[SEP]", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, "[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]",
                                        sep_token="[SEP]", model_max_length=16,
                                        model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(known), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, num_labels=1, initializer_range=1.0))
    path = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_encoder_is_refused_or_reads_something_else_than_two_texts(encoder):
    reward = EncoderReward(**vars(common.load_reward_model(encoder, 512, "cpu")))
    prompts, responses = ["a", "abc", "ab" * 30, "ab" * 30], ["b", "dd", "c" * 4, "d" * 4]
    scores = reward(prompts, responses)

    def alone(*ids):
        first = ids.index(2) + 1
        kinds = torch.tensor([[0] * first + [1] * (len(ids) - first)])
        return reward.model(input_ids=torch.tensor([ids]), token_type_ids=kinds).logits.item()

    assert scores[0].item() == pytest.approx(alone(1, 3, 2, 4, 2), abs=1e-5)
    assert scores[1].item() == pytest.approx(alone(1, 3, 4, 5, 2, 6, 6, 2), abs=1e-5)
    left = 4, 3, 4, 3, 4, 3, 4, 3, 4                                    # of 60 tokens, what fits
    assert scores[2].item() == pytest.approx(alone(1, *left, 2, 5, 5, 5, 5, 2), abs=1e-5)
    assert scores[2] != scores[3]                                      # the response is never cut away
    assert math.isfinite(reward(["a"], ["b" * 100]).item())
    assert reward.tokens == 5 + 8 + 16 + 16 + reward.tokenizer.model_max_length // 2 + 4


def test_encoder_reads_more_rows_at_once_than_the_budget_allows(encoder):
    reward, rows = EncoderReward(**vars(common.load_reward_model(encoder, 512, "cpu"))), []
    reward.model.register_forward_pre_hook(
        lambda model, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    for budget, expected in ((1, [1] * 5), (32, [2, 2, 1]), (10 ** 6, [5])):        # a row: 16 tokens at most
        rows.clear()
        reward.budget = budget
        reward(["a"] * 5, ["b"] * 5)
        assert rows == expected


# ---- checkpoints that cannot be loaded

def test_checkpoint_that_cannot_be_read_is_one_line(toy, tmp_path, monkeypatch):
    common.load_policy(toy, "cpu").save_pretrained(tmp_path / "whole")
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
    for content in (pointer, weights[:len(weights) // 2], b""):
        (tmp_path / "whole" / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="^cannot load a model from "):
            common.load_policy(tmp_path / "whole", "cpu")


def test_code_in_a_checkpoint_is_run_or_asked_for(toy, tmp_path, monkeypatch):
    common.load_policy(toy, "cpu").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.A", "AutoModelForCausalLM": "mine.B"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model" / "mine.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="^cannot load a model from "):
        common.load_policy(tmp_path / "model", "cpu")


def test_policy_is_saved_in_another_type_than_it_came(tmp_path, toy):
    path = save_toy(tmp_path / "half")
    common.load_policy(path, "cpu").bfloat16().save_pretrained(path)
    for model, dtype in ((path, torch.bfloat16), (toy, torch.float32)):
        run = started(toy, tmp_path / f"run {dtype}", model=str(model))
        save_policy(run.policy, tmp_path / f"{dtype}", 0)
        assert loading.saved_dtype(settings(toy, policy=str(tmp_path / f"{dtype}"))) == dtype
