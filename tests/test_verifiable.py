"""tasks/verifiable.py: each kind of instruction by hand, reading back, splits, judged answers, the files."""
import itertools
import json
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import tasks.verifiable as verifiable
from common import UserError
from conftest import llama_config
from tasks.chat import Prompt
from tasks.verifiable import KINDS, compose, gold, instructions, judged, prefers_first, reward, split


def asks(kind, *values, wording=0):
    return "tell me something\n" + KINDS[kind].wordings[wording].format(*values)


@pytest.mark.parametrize("kind, values, good, bad", [
    ("length", ("8",), "one two three four five six seven eight.", "one two three four five six seven 8 9"),
    ("length", ("8",), "it's a well-known fact, isn't it, for you?", "it is a well known fact for any one"),
    ("question", (), "do you like it here? \n", "is it? yes it is"),
    ("mention", ("river",), "the wide River flows", "the wide rivers flow"),
    ("avoid", ("the", "and"), "there was sand here", "near The sea shore"),
    ("avoid", ("the", "and"), "there was sand here", "salt and some pepper"),
    ("start", ("Well",), "  well, I do think", "I do think well"),
    ("start", ("Well",), "Well I do think", "I do think Well"),
    ("lower case", (), "all is 1 quiet!", "All is 1 quiet")])
def test_instruction_is_judged_wrongly(kind, values, good, bad):
    for wording in range(3):
        prompt = asks(kind, *values, wording=wording)
        assert instructions(prompt) == [(kind, values)]
        assert gold(prompt, good) == 1 and gold(prompt, bad) == 0


def test_gold_is_no_share_or_pays_for_hardly_an_answer():
    prompt = "tell me\nAnswer in at most 8 words. Use the word \"river\" in your answer."
    assert [gold(prompt, text) for text in ("a river runs", "a lake is here", "river", "the", "")] == [
        1, 0.5, 0, 0, 0]
    assert gold(prompt, "a river " + "runs " * 9) == 0.5 and gold(prompt, "a lake " * 9) == 0
    with pytest.raises(UserError, match="no instruction"):
        gold("tell me", "a river runs")


def test_instructions_of_the_prompt_itself_are_read_or_their_order_is_lost():
    prompt = "Close with a question.\nWrite in lower case only. Answer in at most 12 words."
    assert instructions(prompt) == [("lower case", ()), ("length", ("12",))]
    assert instructions("") == instructions("say so") == []


def test_composed_prompts_cannot_be_read_back_or_have_wordings_of_the_other_split():
    rng = random.Random(0)
    for hidden in (False, True):
        seen = set()
        for i in range(400):
            prompt = compose(f"question {i}", rng, hidden)
            first, last = prompt.split("\n")
            found = instructions(prompt)
            assert first == f"question {i}" and 1 <= len(found) <= 2
            assert len({kind for kind, _ in found}) == len(found)
            wordings = [[w.format(*values) for w in KINDS[kind].wordings] for kind, values in found]
            allowed = [texts[2:] if hidden else texts[:2] for texts in wordings]
            assert last in {" ".join(texts) for texts in itertools.product(*allowed)}
            seen |= {kind for kind, _ in found}
        assert seen == {*KINDS}


def test_one_prompt_is_in_both_splits_or_another_split_comes_of_the_same_seed():
    prompts = [f"question {i % 50}" for i in range(100)]
    train, test = split(prompts, 10, 0)
    assert (train, test) == split(prompts, 10, 0) != split(prompts, 10, 1)
    plain = [prompt.split("\n")[0] for prompt in train + test]
    assert len(train) == 40 and len(test) == 10 and sorted(plain) == sorted({*prompts})
    unseen = [any(KINDS[kind].wordings[2].format(*values) in prompt for kind, values in instructions(prompt))
              for prompt in test]
    assert unseen == [False, True] * 5


def test_reward_differs_from_gold_or_reads_another_turn():
    prompt = asks("question")
    conversation = [{"role": "user", "content": asks("length", "8")}, {"role": "assistant", "content": "no"},
                    {"role": "user", "content": prompt}]
    assert reward([prompt, prompt, conversation], ["is it so?", "it is so", "is it so?"]) == [1, 0, 1]
    with pytest.raises(ValueError):
        reward([prompt], [])


def test_annotators_are_always_right_or_always_wrong():
    rng = random.Random(0)
    share = {gap: sum(prefers_first(gap, 0.0, rng) for _ in range(4000)) / 4000 for gap in (0, 0.5, 1, -1)}
    assert share[0] == pytest.approx(0.5, abs=0.03)
    for gap, clean in ((0.5, 0.8808), (1, 0.9820), (-1, 0.0180)):                       # 1 / (1 + e^(-4 gap))
        assert share[gap] == pytest.approx(0.9 * clean + 0.1 * (1 - clean), abs=0.03)


def test_judged_answers_lose_their_prompt_or_compare_equals():
    prompts = [asks("question"), asks("mention", "river")]
    answers = [["is it so?", "it is so", "so it is", "it was so"],
               ["a river runs", "a river runs", "", "a b c"]]
    pairs, rated = judged(prompts, answers, 0)
    assert [row["prompt"] for row in rated] == [prompts[0]] * 4 + [prompts[1]] * 2
    assert [{row["chosen"], row["rejected"]} for row in pairs] == [
        {"is it so?", "it is so"}, {"is it so?", "so it is"}, {"is it so?", "it was so"},
        {"a river runs", "a b c"}]
    many, _ = judged([prompts[0]] * 500, [["is it so?", "it is so"]] * 500, 0)
    assert sum(row["chosen"] == "is it so?" for row in many) / 500 == pytest.approx(0.886, abs=0.05)
    assert (pairs, rated) == judged(prompts, answers, 0)
    rated = judged([prompts[0]] * 300, [["is it so?", "no it is"]] * 300, 1)[1]
    levels = [row["attributes"] for row in rated]
    assert {level["obedience"] for level in levels[::2]} == {8, 9}
    assert {level["obedience"] for level in levels[1::2]} == {0, 1} and {v["length"] for v in levels} == {1}


@pytest.fixture(scope="module")
def chatter(tmp_path_factory):
    """A random model whose words are whole, with a chat template."""
    path = tmp_path_factory.mktemp("chatter")
    words = ["<eos>", "<unk>", " the", " river", " is", " wide", "?", "user:", "tell", " me"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                                        unk_token="<unk>", model_max_length=90)
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == "
                               "'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}"
                               " assistant:{% endif %}")
    tokenizer.save_pretrained(path)
    config = llama_config()
    config.vocab_size = 10
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_files_are_not_what_the_scripts_read(chatter, tmp_path, capsys):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"tell me number {i}"}) + "\n" for i in range(40)) +
                      json.dumps({"prompt": "word " * 30}) + "\n", encoding="utf-8")
    flags = ["--prompts", source, "--model", chatter, "--out", tmp_path / "out", "--train", 20, "--test", 8,
             "--samples", 6, "--max_new_tokens", 12]
    verifiable.main([*map(str, flags)])
    rows = {name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text(
        encoding="utf-8").splitlines()] for name in ("pairs", "rated", "test")}
    assert len(rows["test"]) == 8 and rows["rated"]
    assert not any("word word" in row["prompt"] for row in rows["test"] + rows["rated"])
    train = {row["prompt"] for row in rows["rated"]}
    assert len(train) <= 20 and not train & {row["prompt"] for row in rows["test"]}
    for row in rows["rated"]:
        assert {*row["attributes"]} == {"obedience", "length"} and row["completion"].strip()
        assert "<eos>" not in row["completion"] and "assistant:" not in row["completion"]
    assert all(gold(row["prompt"], row["chosen"]) != gold(row["prompt"], row["rejected"])
               for row in rows["pairs"])
    assert f"{len(rows['rated'])} rated answers" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        verifiable.main([*map(str, flags[:4]), "--out", str(tmp_path / "again"), "--train", "99", "--test",
                         "7"])
    assert "has 33 short prompts to train on, not 99" in capsys.readouterr().err


def test_question_is_not_what_the_user_said_last():
    transcript = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: name  a\nriver\n\nAssistant:"
    assert verifiable.question_of(transcript) == "name a river"
    assert verifiable.question_of("name a river") == "name a river"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
             {"role": "user", "content": "name a river"}]
    assert verifiable.question_of(Prompt("rendered", turns)) == "name a river"


def test_line_end_inside_an_answer_damages_the_files(tmp_path):
    prompts, test = split([f"say {i}" for i in range(12)], 4, seed=0)
    texts = ["is it so,\u2028for you?", "no\x85it is not that"]
    pairs, rated = judged(prompts, [texts] * len(prompts), seed=0)
    for name, rows in (("pairs", pairs), ("rated", rated), ("test", [{"prompt": prompt} for prompt in test])):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert verifiable.verifiable_rows(tmp_path)["rated"] == rated


@pytest.mark.parametrize("flag, value", [("train", 0), ("test", 0), ("samples", 1), ("max_new_tokens", -1)])
def test_number_that_makes_no_file(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        verifiable.main(["--prompts", "none", "--model", "none", "--out", str(tmp_path / "out"),
                         f"--{flag}", str(value)])
    assert stopped.value.code == 2 and f"error: --{flag} must be at least" in capsys.readouterr().err


def test_place_of_the_files_is_tried_after_the_sampling(chatter, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    monkeypatch.setattr(verifiable, "sampled", lambda *a: pytest.fail("it samples first"))
    with pytest.raises(SystemExit) as stopped:
        verifiable.main(["--prompts", "none", "--model", str(chatter), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "out" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text("mine", encoding="utf-8")          # the prompts may come from there
    with pytest.raises(SystemExit):
        verifiable.main(["--prompts", str(tmp_path / "pairs.jsonl"), "--model", str(chatter), "--out",
                         str(tmp_path)])
    assert "pairs.jsonl exists: nothing is written over" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text(encoding="utf-8") == "mine"
