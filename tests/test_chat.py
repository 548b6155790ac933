"""Chat templates: what each reader is given, and how an assistant's turn ends."""
import copy
import json
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import common
import harness
from common import Sampled, UserError
from conftest import llama_config, save_toy, settings
from harness import loading, stages
from harness.rewards import load_rewards
from tasks import Pair, Ranking, Task, chat, shapes
from tasks.chat import Prompt

WORDS = ["<unk>", "<eos>", "<end>", "user", "model", "Hi", "Yes", "No", "Be", "brief",
         "assistant", "|"]
GEMMA = ("{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
         "{% if add_generation_prompt %}assistant {% endif %}")
ASK = [{"role": "user", "content": "Hi"}]


def tokenizer(template=GEMMA, eos="<eos>"):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<unk>",
                                   chat_template=template)
    made.add_special_tokens({"additional_special_tokens": ["<end>"]})
    made.model_max_length = 64
    return made


def test_answers_end_with_another_token_than_the_template_writes(capsys):
    reader = tokenizer()
    chat.end_turns(reader)
    assert reader.eos_token == "<end>" and not capsys.readouterr().err
    batch = common.encode(reader, [chat.render(reader, ASK)], ["Yes"])
    finished = reader.apply_chat_template([*ASK, {"role": "assistant", "content": "Yes"}], tokenize=False)
    written = reader(finished, add_special_tokens=False).input_ids
    assert batch.input_ids[0].tolist() == written
    assert common.finished(reader, batch).tolist() == [True]


def test_a_template_without_an_end_of_turn_or_with_more_in_a_finished_turn_is_not_told(capsys):
    open_ended = tokenizer("{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
                           "{% if add_generation_prompt %}assistant {% endif %}")
    chat.end_turns(open_ended)
    assert open_ended.eos_token == "<eos>"
    assert "without a special token" in capsys.readouterr().err
    thinking = tokenizer("{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}| {% endif %}"
                         "{{ m.content }} <end> {% endfor %}"
                         "{% if add_generation_prompt %}assistant {% endif %}")
    chat.end_turns(thinking)
    assert thinking.eos_token == "<end>" and "may not know" in capsys.readouterr().err


def test_a_model_that_can_think_is_trained_in_a_form_that_it_does_not_know(capsys):
    silent = "think /think "                                     # how Qwen 3 writes that there is no thinking
    reader = tokenizer("{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' and loop.last %}"
                       + silent + "{% endif %}{{ m.content }} <end> {% endfor %}"
                       "{% if add_generation_prompt %}assistant {% if enable_thinking is defined and not "
                       "enable_thinking %}" + silent + "{% endif %}{% endif %}")
    chat.end_turns(reader)
    assert chat.render(reader, [chat.QUESTION]).endswith("assistant " + silent)
    assert reader.eos_token == "<end>" and not capsys.readouterr().err


def test_a_prompt_without_generation_prompt_lacks_the_header_of_the_answer(capsys):
    reader = tokenizer("{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}")
    assert chat.render(reader, ASK) == "user Hi <end> assistant "
    assert "no generation prompt" in capsys.readouterr().err
    chat.render(reader, ASK)
    chat.end_turns(reader)
    assert not capsys.readouterr().err                                                  # said once


def test_a_last_assistant_message_is_closed_or_followed_by_another_turn():
    prompt = chat.render(tokenizer(), [*ASK, {"role": "assistant", "content": "Yes"}])
    assert prompt == "user Hi <end> assistant Yes"


@pytest.mark.parametrize("template", [
    "{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ nothing.of.this }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"])
def test_template_that_fails_is_a_traceback(template):
    with pytest.raises(UserError, match="the chat template refuses"):
        chat.render(tokenizer(template), ASK)
    only_answers = GEMMA.replace("{{ m.role }}", "{% if m.role == 'assistant' %}" + template + "{% endif %}")
    assert chat.finished_turn(tokenizer(only_answers)) == ""


def test_a_reward_model_reads_the_dialect_of_the_policy():
    prompts = [chat.render(tokenizer(), [{"role": "system", "content": "Be brief"}, *ASK]), "plain"]
    other = tokenizer("{% for m in messages %}[{{ m.content }}]{% endfor %}"
                      "{% if add_generation_prompt %}>{% endif %}")
    assert chat.as_read_by(other, prompts) == ["[Be brief][Hi]>", "plain"]
    assert chat.as_read_by(tokenizer(None), prompts) == ["Be brief\nHi\n", "plain"]


def test_reward_model_whose_template_refuses_a_prompt_is_found_at_the_first_score(toy, tmp_path):
    """Its template may have no system role. That can be known before minutes of sampling."""
    path = save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    (path / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    prompts = [chat.Prompt("ab"), chat.Prompt("cd")]
    for prompt, role in zip(prompts, ("user", "system")):
        prompt.messages = ({"role": role, "content": "ab"}, {"role": "user", "content": "c"})
    task = Task("toy", {"train": prompts, "test": []}, chat=True)
    config = settings(toy, reward=str(path))
    with pytest.raises(UserError, match="the reward model .*reward: .*no system role"):
        load_rewards(config, task)
    task.prompts["train"] = prompts[:1]
    assert "proxy" in load_rewards(config, task)


def test_a_prompt_loses_its_messages_on_the_way():
    prompt = chat.render(tokenizer(), ASK)
    assert prompt + "<x:1>" == str(prompt) + "<x:1>" and (prompt + "<x:1>").messages == prompt.messages
    for again in (pickle.loads(pickle.dumps(prompt)), copy.deepcopy(prompt)):
        assert again == prompt and again.messages == prompt.messages == tuple(ASK)
    assert json.loads(json.dumps(prompt)) == prompt


def test_sampled_ids_are_tokenised_again(tmp_path):
    """"Yes No" sampled with an <unk> between is other ids than its text's."""
    reader = tokenizer()
    rows = [(common.prompt_ids(reader, ["Hi"])[0], ids) for ids in ([6, 0, 7, 1], [6, 2], [0, 6, 6])]
    batch = common.pack(rows, reader.pad_token_id)
    texts = common.decode(reader, batch)
    assert [text.ids for text in texts] == [ids for _, ids in rows] and texts[1] == "Yes"
    ended = common.finished(reader, batch).tolist()
    assert ended == [True, False, False]
    for again in (texts, pickle.loads(pickle.dumps(texts)), copy.deepcopy(texts)):
        assert torch.equal(common.encode(reader, ["Hi"] * 3, again, ended).input_ids, batch.input_ids)
        (_, part), = common.batches(reader, ["Hi"], [again], 1000, ended=[ended])
        assert torch.equal(part.input_ids, batch.input_ids)
    plain = common.encode(reader, ["Hi"] * 3, [str(text) for text in texts], ended)
    assert not torch.equal(plain.input_ids, batch.input_ids)
    state = {"rows": [Ranking(chat.render(reader, ASK), texts, [1.0, 2.0, 3.0])]}
    torch.save(state, tmp_path / "state.pt")
    with torch.serialization.safe_globals([Ranking, Prompt, Sampled]):
        row, = torch.load(tmp_path / "state.pt", weights_only=True)["rows"]
    assert [text.ids for text in row[1]] == [text.ids for text in texts]
    assert row[0].messages == tuple(ASK)


def test_a_reward_model_is_trained_on_the_policys_ids_or_on_a_cut_off_text_as_cut_off(monkeypatch):
    reader, seen = tokenizer(), []
    sample = Sampled("Yes No")
    sample.ids = [9, 9]                                             # another tokenizer's, and without EOS
    monkeypatch.setattr(stages, "fit", lambda model, tokenizer, rows, *_: seen.extend(rows))
    stages.train_reward_model(None, reader, [Pair("Hi", sample, "No")], None)
    (_, texts), = seen
    assert common.response_ids(reader, texts) == [[6, 7, 1], [7, 1]]


def test_sampling_goes_on_after_an_end_of_the_models_own():
    reader = tokenizer()
    reader.more_stop_ids = [2]
    batch = common.pack([([5], [6, 2]), ([5], [6, 1]), ([5], [6, 6])], 0)
    assert common.finished(reader, batch).tolist() == [True, True, False]
    assert common.stop_ids(reader) == [1, 2]


# ---- shapes of published rows

P = {"prompt": "p"}
TURN = {"from": "human", "value": "p"}


@pytest.mark.parametrize("row, expected", [
    ({"system": "s", "question": "p", "chosen": "a", "rejected": "b"},
     {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "chosen": "a",
      "rejected": "b"}),
    (P | {"system": "", "chosen": "a", "rejected": "b"}, P | {"chosen": "a", "rejected": "b"}),
    (P | {"response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
     P | {"chosen": "b", "rejected": "a", "safer_response_id": 0}),
    (P | {"answers": [{"answer": "a", "rank": 2.0, "model": "x"},
                      {"answer": "b", "rank": 1.0, "model": "y"}]},
     P | {"responses": ["a", "b"], "scores": [-2.0, -1.0], "systems": ["x", "y"]}),
    ({"instruction": "p", "completions": [{"response": "a", "overall_score": 8}]},
     P | {"responses": ["a"], "scores": [8]}),
    ({"conversations": [TURN], "chosen": {"from": "gpt", "value": "a"},
      "rejected": {"from": "gpt", "value": "b"}},
     {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}],
      "rejected": [{"role": "assistant", "content": "b"}]}),
    ({"conversations": [TURN, {"from": "gpt", "value": "a"}]},
     {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "a"}]}),
    ({"instruction": "p", "input": "q", "output": "a"}, {"prompt": "p\n\nq", "completion": "a"}),
    (P | {"response": "a", "helpfulness": 4, "verbosity": 0, "id": 7},
     P | {"response": "a", "attributes": {"helpfulness": 4, "verbosity": 0}, "id": 7}),
    (P | {"chosen": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"},
                     {"role": "assistant", "content": "a"}], "rejected": "-", "system": None},
     {"chosen": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"},
                 {"role": "assistant", "content": "a"}], "rejected": "-"}),
    ({"prompt": [{"role": "user",
                  "content": [{"type": "text", "text": "p"}, {"type": "text", "text": "q"}]}]},
     {"prompt": [{"role": "user", "content": "pq"}]}),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]},               # to be refused as it is
     {"prompt": [{"role": "user", "content": [{"type": "text"}]}]}),
    (P | {"responses": ["a", "b"], "scores": [1, 2]}, P | {"responses": ["a", "b"], "scores": [1, 2]})])
def test_published_rows_are_read_as_something_else(row, expected):
    assert shapes.canonical(row) == expected
    assert shapes.canonical(shapes.canonical(row)) == expected


def test_renamed_columns():
    row = {"q": "p", "a": "x", "b": "y", "prompt": "unused"}
    assert shapes.renamed(row, "prompt=q, chosen=a,rejected=b") == {"prompt": "p", "chosen": "x",
                                                                    "rejected": "y"}
    assert shapes.renamed(row, "") == row
    for wrong in ("prompt=z", "prompt", "=q"):
        with pytest.raises(UserError, match="^--columns "):
            shapes.renamed(row, wrong)


def test_reward_model_learns_on_another_end_token_than_it_scores_on(tmp_path, monkeypatch, no_traces):
    path = tmp_path / "model"
    tokenizer().save_pretrained(path)
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(vocab_size=len(WORDS))).save_pretrained(path)
    turns = [[{"role": "user", "content": f"{a} {b}"}] for a in ("Hi", "Be") for b in ("Hi", "Be", "|")]
    rows = [{"prompt": turn, "chosen": [{"role": "assistant", "content": "Yes"}],
             "rejected": [{"role": "assistant", "content": "No"}]} for turn in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    last, pooled = [], common.sequence_scores

    def scores(model, batch):
        last.append({row[mask.bool()][-1].item() for row, mask in zip(batch.input_ids, batch.attention_mask)})
        return pooled(model, batch)

    monkeypatch.setattr(common, "sequence_scores", scores)
    run = harness.start(harness.Config(
        model=str(path), data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "run"), max_length=64,
        max_new_tokens=4, reward_lr=0.01, device="cpu", quiet=True))
    training, last[:] = set.union(*last), []
    run.rewards["proxy"](run.task.prompts["train"][:2], ["Yes", "No"])
    assert training == set.union(*last) == {WORDS.index("<end>")}


def test_reward_model_reads_the_template_of_the_policy(tmp_path):
    tokenizer("{% for m in messages %}| {{ m.content }} <end> {% endfor %}"
              "{% if add_generation_prompt %}| {% endif %}").save_pretrained(tmp_path)
    config = llama_config(vocab_size=len(WORDS), num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    prompts = [chat.render(tokenizer(), ASK)]
    config = harness.Config(model="policy", data="rows.jsonl", reward=str(tmp_path), max_length=64,
                            max_new_tokens=4, device="cpu")
    reward = load_rewards(config, Task("chat", {"train": prompts, "test": prompts}, chat=True))["proxy"]
    assert prompts == ["user Hi <end> assistant "] and list(reward.render(prompts)) == ["| Hi <end> | "]


def test_ends_of_the_models_own_are_lost(toy):
    policy, reader = harness.load_policy(settings(toy)), harness.load_tokenizer(settings(toy))
    for ids, more in (([5, 0, 3], [3, 5]), (4, [4]), (0, []), (None, [])):
        policy.generation_config.eos_token_id = ids
        assert loading.more_stop_ids(policy, reader) == more
