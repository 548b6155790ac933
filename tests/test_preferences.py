"""tasks/preferences.py: every format, every bad row's message, and a split that depends on prompts alone."""
import gzip
import json
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import tasks.hub
from common import UserError
from conftest import ROOT
from harness.checkpoints import check_checkpoint
from tasks import Demonstration, Pair, Ranking
from tasks.preferences import best_of, choose_file, choose_test_prompts, load, pairs_of, use_for_test

REAL_DATA = ROOT.parent / "shared" / "data"
USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
SKIP = "; --skip_bad_rows leaves such rows out"


def write(path, rows):
    """Rows that are strings or bytes are written as they are, so that a test can write what JSON cannot."""
    rows = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
    lines = [row if isinstance(row, bytes) else row.encode() for row in rows]
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(b"\n".join(lines) + b"\n")
    return str(path)


def pair(i, chosen="good", rejected="bad"):
    return {"prompt": f"prompt {i}", "chosen": chosen, "rejected": rejected}


def rows_of(by_split):
    return sorted(row for rows in by_split.values() for row in rows)


def load_rows(tmp_path, *rows, **options):
    return load(write(tmp_path / "rows.jsonl", rows), **options)


def message(source, **options):
    with pytest.raises(UserError) as caught:
        load(source, **options)
    return str(caught.value)


@pytest.fixture
def tokenizer():
    template = ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
                "<{{ m.role }}>{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template)


# ---- formats

def test_pairs_become_rankings_and_demonstrations(tmp_path):
    task = load_rows(tmp_path, pair(1, " best ", "worst"), pair(2))
    assert task.name == "rows"
    assert rows_of(task.prompts) == ["prompt 1", "prompt 2"]
    assert rows_of(task.pairs) == [Pair("prompt 1", " best ", "worst"), Pair("prompt 2", "good", "bad")]
    assert rows_of(task.rankings) == [Ranking("prompt 1", [" best ", "worst"], [1.0, 0.0]),
                                      Ranking("prompt 2", ["good", "bad"], [1.0, 0.0])]
    assert rows_of(task.demonstrations) == [Demonstration("prompt 1", " best "),
                                            Demonstration("prompt 2", "good")]
    for rows in (task.prompts, task.pairs, task.rankings, task.demonstrations):
        assert {split: len(rows[split]) for split in rows} == {"train": 1, "test": 1}


def test_hh_transcripts_split_at_the_last_answer(tmp_path, tokenizer):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: {}\n\nAssistant:"
    rows = [{"chosen": start.format(i) + " yes", "rejected": start.format(i) + " no"} for i in "cd"]
    pairs = [Pair(start.format(i), " yes", " no") for i in "cd"]
    for options in ({}, {"chat": True, "tokenizer": tokenizer}):
        assert rows_of(load_rows(tmp_path, *rows, **options).pairs) == pairs


@pytest.mark.parametrize("names", [("responses", "scores"), ("completions", "rewards")])
def test_rankings_become_every_pair_with_a_preference(tmp_path, names):
    responses, scores, systems = ["a", "b", "c", "a"], [1, 3.5, 1, -2], ["w", "x", "y", "z"]
    rows = [{"prompt": p, names[0]: responses, names[1]: scores, "systems": systems} for p in "pq"]
    task = load_rows(tmp_path, *rows)
    assert rows_of(task.rankings) == [Ranking(p, responses, scores, systems) for p in "pq"]
    # a-c is a tie and the two a's are one text; all else is a pair, the higher score first.
    pairs = [("b", "a"), ("b", "c"), ("b", "a"), ("c", "a")]
    assert [tuple(pair[1:]) for pair in task.pairs["test"]] == pairs
    assert rows_of(task.demonstrations) == [Demonstration("p", "b"), Demonstration("q", "b")]


def test_pairs_survive_the_way_through_rankings():
    assert pairs_of(Ranking("p", ["worse", "better"], [0.0, 1.0])) == [Pair("p", "better", "worse")]
    assert pairs_of(Ranking("p", ["x", "y"], [2.0, 2.0])) == []
    assert best_of(Ranking("p", ["x", "y", "z"], [0.0, 2.0, 2.0])) == Demonstration("p", "y")


@pytest.mark.parametrize("name", ["completion", "response"])
def test_demonstrations(tmp_path, name):
    task = load_rows(tmp_path, {"prompt": "p", name: "a", "attributes": {"quality": 4}},
                     {"prompt": "q", name: "b"})
    assert rows_of(task.demonstrations) == [Demonstration("p", "a", {"quality": 4}),
                                            Demonstration("q", "b", {})]
    assert task.pairs == task.rankings == {}


def test_prompts_alone(tmp_path):
    task = load_rows(tmp_path, {"prompt": "p"}, {"prompt": "q"}, {"prompt": "p"})
    assert rows_of(task.prompts) == ["p", "q"]
    assert task.pairs == task.rankings == task.demonstrations == {}


# ---- chat

CHATS = {
    "prompt of messages": {"prompt": [USER], "chosen": "yes", "rejected": "no"},
    "all messages": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [NO]},
    "answers repeat the prompt": {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
    "text prompt, message answers": {"prompt": "p", "chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
    "transcripts": {"chosen": [USER, ASSISTANT], "rejected": [USER, NO]},
    "more keys than needed": {"chosen": [USER | {"id": 1}, ASSISTANT], "rejected": [USER | {"id": 2}, NO]},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_messages_go_through_the_chat_template(tmp_path, tokenizer, row):
    task = load_rows(tmp_path, row, {"prompt": [USER, NO, USER], "chosen": "a", "rejected": "b"},
                     tokenizer=tokenizer)
    assert rows_of(task.pairs) == [Pair("<user>p<assistant>", "yes", "no"),
                                   Pair("<user>p<assistant>no<user>p<assistant>", "a", "b")]


def test_chat_wraps_plain_prompts_only_when_asked(tmp_path, tokenizer):
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    assert rows_of(load_rows(tmp_path, *rows, tokenizer=tokenizer).prompts) == ["p", "q"]
    assert rows_of(load_rows(tmp_path, *rows, tokenizer=tokenizer, chat=True).prompts) == [
        "<user>p<assistant>", "<user>q<assistant>"]


def test_rankings_and_demonstrations_in_chat_form(tmp_path, tokenizer):
    ranked = [{"prompt": p, "responses": [[ASSISTANT], [NO]], "scores": [0, 1]} for p in "pq"]
    assert load_rows(tmp_path, *ranked, tokenizer=tokenizer).pairs["test"][0][1:] == ("no", "yes")
    shown = [{"prompt": [USER | {"content": p}], "completion": [ASSISTANT]} for p in "pq"]
    task = load_rows(tmp_path, *shown, tokenizer=tokenizer)
    assert rows_of(task.demonstrations)[0] == Demonstration("<user>p<assistant>", "yes", {})


def test_a_chat_needs_a_template(tmp_path, tokenizer):
    path = write(tmp_path / "c.jsonl", [{"prompt": [USER]}, {"prompt": [{"role": "tool", "content": "x"}]}])
    refused = ('c.jsonl line 2: the chat template refuses "prompt" (no tools); '
               '--skip_bad_rows leaves such rows out')
    assert message(path, tokenizer=tokenizer) == refused
    tokenizer.chat_template = None
    for without in (None, tokenizer):
        needed = "c.jsonl line 1: a chat needs a tokenizer with a chat template"
        assert message(path, tokenizer=without) == needed


def test_the_split_does_not_depend_on_the_template(tmp_path, tokenizer):
    path = write(tmp_path / "c.jsonl", [{"prompt": f"prompt {i}"} for i in range(200)])
    plain = load(path).prompts["test"]
    assert len(plain) > 1
    wrapped = load(path, tokenizer=tokenizer, chat=True).prompts["test"]
    tokenizer.chat_template = "Today is Monday. {{ messages[0].content }}"
    dated = load(path, tokenizer=tokenizer, chat=True).prompts["test"]
    assert wrapped == [f"<user>{prompt}<assistant>" for prompt in plain]
    assert dated == [f"Today is Monday. {prompt}" for prompt in plain]


def test_prompts_that_the_template_makes_equal_stay_in_one_split(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content | trim }}"
    rows = [{"prompt": f"{i}" + " " * spaces} for i in range(30) for spaces in range(8)]
    prompts = load_rows(tmp_path, *rows, tokenizer=tokenizer, chat=True).prompts
    assert len(rows_of(prompts)) == len(set(rows_of(prompts))) == 30
    backwards = load_rows(tmp_path, *rows[::-1], tokenizer=tokenizer, chat=True).prompts
    assert set(backwards["test"]) == set(prompts["test"])


# ---- bad rows

KNOWN = ('known: "prompt" alone or with chosen + rejected, responses + scores or completion; '
         'or chosen + rejected alone')
MALFORMED = {
    '{"prompt": "p", ': "not JSON (Expecting property name enclosed in double quotes at column 16)",
    '["p"]': "not a JSON object",
    b'{"prompt": "\xff"}': "not UTF-8 (byte 13)",
    "[" * 100_000: "not JSON that can be read (maximum recursion depth exceeded",
    '{"text": "p"}': f'missing "prompt"; {KNOWN}',
    '{"prompt": "p", "chosen": "a"}': f'missing "rejected"; {KNOWN}',
    '{"prompt": "p", "rejected": "a"}': f'missing "chosen"; {KNOWN}',
    '{"prompt": "p", "responses": ["a", "b"]}': f'missing "scores"; {KNOWN}',
    '{"prompt": "p", "rewards": [1, 2]}': f'missing "responses"; {KNOWN}',
    '{"completion": "a"}': f'missing "prompt"; {KNOWN}',
    '{"chosen": "a", "rejected": "b"}':
        r'missing "prompt", and "chosen" is no transcript with "\n\nAssistant:"',
    '{"chosen": [{"role": "assistant", "content": "a"}], '
    '"rejected": [{"role": "assistant", "content": "b"}]}':
        f'missing "prompt"; {KNOWN}',
    '{"prompt": 1}': '"prompt" is neither a string nor a list of {"role", "content"} messages',
    '{"prompt": ["p"]}': '"prompt" is neither a string nor a list of {"role", "content"} messages',
    '{"prompt": "p", "chosen": "a", "rejected": null}':
        '"rejected" is neither a string nor a list of {"role", "content"} messages',
    '{"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": null}]}':
        '"rejected" is neither a string nor a list of {"role", "content"} messages',
    '{"prompt": "p", "chosen": "a", "rejected": []}': '"rejected" does not end with an assistant message',
    '{"prompt": "p", "chosen": [{"role": "user", "content": "p"}], "rejected": "a"}':
        '"chosen" does not end with an assistant message',
    r'{"prompt": "p", "chosen": "a", "rejected": "\ud83d"}': '"rejected" has half a surrogate pair',
    '{"prompt": "p", "responses": "ab", "scores": [1, 2]}': '"responses" is not a list',
    '{"prompt": "p", "responses": ["a", "b"], "scores": 1}': '"scores" is not a list',
    '{"prompt": "p", "completions": ["a", 1], "scores": [1, 2]}':
        '"completions[1]" is neither a string nor a list of {"role", "content"} messages',
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]}': '"scores[1]" is not a number',
    '{"prompt": "p", "responses": ["a", "b"], "rewards": [true, 2]}': '"rewards[0]" is not a number',
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "systems": "xy"}': '"systems" is not a list',
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "systems": ["x", 1]}':
        '"systems[1]" is not a string',
    '{"prompt": "p", "completion": "a", "attributes": [1]}': '"attributes" is not an object',
    '{"prompt": "p", "completion": "a", "attributes": {"quality": 1.5}}':
        '"attributes" has "quality", which is neither an integer nor a share from 0.0 to 1.0',
    '{"prompt": "p", "completion": "a", "attributes": {"quality": true}}':
        '"attributes" has "quality", which is neither an integer nor a share from 0.0 to 1.0',
    '{"prompt": "p", "completion": "a", "attributes": {"the quality": 1}}':
        '"attributes" has "the quality": names are of letters, digits, - and _',
    '{"prompt": "p", "input": "q", "chosen": "a", "rejected": "b"}':
        '"input" is not used in a row that is read as a pair, and may change what it means: rename fields '
        "with --columns, or take it out of the file",
    '{"prompt": "p", "response_a": "q", "response_b": "a"}':
        '"response_a" is not used in a row that is read as a prompt, and may change what it means: rename '
        "fields with --columns, or take it out of the file",
    '{"prompt": "p", "completion": "a", "label": false}':
        '"label" is not used in a row that is read as a demonstration, and may change what it means: rename '
        "fields with --columns, or take it out of the file",
}
FAULTS = {
    '{"prompt": ""}': ("empty prompt", '"prompt" is empty'),
    '{"prompt": []}': ("empty prompt", '"prompt" is empty'),
    '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": " "}]}':
        ("empty prompt", '"prompt" is empty'),
    r'{"prompt": " \n", "chosen": "a", "rejected": "b"}': ("empty prompt", '"prompt" is empty'),
    '{"prompt": "p", "chosen": "a", "rejected": " "}': ("empty response", '"rejected" is empty'),
    '{"prompt": "p", "chosen": "", "rejected": "b"}': ("empty response", '"chosen" is empty'),
    '{"prompt": "p", "chosen": "a", "rejected": "a"}':
        ("equal responses", '"chosen" and "rejected" are equal'),
    r'{"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}':
        ("no shared prompt", '"rejected" does not share the prompt of "chosen"'),
    r'{"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant:"}':
        ("empty response", '"rejected" is empty'),
    json.dumps({"chosen": [USER, ASSISTANT], "rejected": [USER, USER, NO]}):
        ("no shared prompt", '"rejected" does not share the prompt of "chosen"'),
    json.dumps({"prompt": "other", "chosen": [USER, ASSISTANT], "rejected": [NO]}):
        ("no shared prompt", '"chosen" does not share the prompt of "prompt"'),
    '{"prompt": "p", "completion": " "}': ("empty response", '"completion" is empty'),
    '{"prompt": "p", "response": ""}': ("empty response", '"response" is empty'),
    '{"prompt": "p", "responses": ["a", ""], "scores": [1, 2]}':
        ("empty response", '"responses[1]" is empty'),
    '{"prompt": "p", "responses": ["a"], "scores": [1]}':
        ("fewer than two responses", "a ranking needs at least two responses"),
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1]}':
        ("different lengths", '"scores" has length 1 for 2 responses'),
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "systems": ["x", "y", "z"]}':
        ("different lengths", '"systems" has length 3 for 2 responses'),
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1, NaN]}':
        ("score not finite", '"scores[1]" is not finite'),
    '{"prompt": "p", "responses": ["a", "b"], "rewards": [-Infinity, 1]}':
        ("score not finite", '"rewards[0]" is not finite'),
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1' + "0" * 400 + ", 1]}":
        ("score not finite", '"scores[0]" is not finite'),
    '{"prompt": "p", "responses": ["a", "b"], "scores": [1e31, 1]}':
        ("score too large", '"scores[0]" is beyond 1e+30'),
}


@pytest.mark.parametrize("line, problem", MALFORMED.items(), ids=range(len(MALFORMED)))
def test_a_malformed_row_is_an_error_that_can_be_left_out(tmp_path, tokenizer, line, problem, capsys):
    path = write(tmp_path / "rows.jsonl", ["", line])
    assert message(path, tokenizer=tokenizer, skip_bad_rows=True) == "rows.jsonl: no usable row"
    assert capsys.readouterr().err.startswith(f"left out 1 of 1 rows: 1 {problem}")
    text = message(path, tokenizer=tokenizer)
    if problem.endswith("exceeded"):  # Python's own words go on, and differ between versions
        text = text[:len("rows.jsonl line 2: ") + len(problem)]
    assert text == f"rows.jsonl line 2: {problem}"


@pytest.mark.parametrize("line", [
    '{"messages": []}', '{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1.0}',
    '{"prompt": "p", "completions": [{"response": "a", "overall_score": null}]}',
    '{"instruction": 5, "input": "y", "output": "z"}',
    '{"conversations": [{"from": ["x"], "value": "a"}, {"from": "gpt", "value": "b"}]}'])
def test_value_that_no_shape_has_is_a_traceback(tmp_path, tokenizer, line, capsys):
    path = write(tmp_path / "rows.jsonl", [line, pair(1), pair(2)])
    assert message(path, tokenizer=tokenizer).startswith(
        "rows.jsonl line 1: a field has a value that it cannot have (")
    load(str(path), tokenizer, skip_bad_rows=True)
    assert "left out 1 of 3 rows: 1 a field has a value" in capsys.readouterr().err


def test_what_is_left_out_reaches_the_terminal_raw(tmp_path, tokenizer, capsys):
    row = {"prompt": "p", "completion": "a", "attributes": {"\x1b]0;evil\x07": 1}}
    path = write(tmp_path / "rows.jsonl", [json.dumps(row), *(json.dumps(row | {"attributes": {"b": 1},
                                                                              "prompt": x}) for x in "qr")])
    load(str(path), tokenizer, skip_bad_rows=True)
    said = capsys.readouterr().err
    assert "left out 1 of 3" in said and "\x1b" not in said and "\\x1b" in said


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipe_loses_rows_in_silence(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is no regular file, and it is read twice"):
        load(str(tmp_path / "rows.jsonl"))


def usable_row_like(line):
    """Two prompts of the same kind as the bad row, so that the bad row is the only thing wrong."""
    row = json.loads(line)
    if "prompt" not in row:
        return [{"chosen": f"{p}\n\nAssistant: a", "rejected": f"{p}\n\nAssistant: b"} for p in "xy"]
    if "rejected" in row:
        return [pair(1), pair(2)]
    if "responses" in row:
        return [{"prompt": p, "responses": ["a", "b"], "scores": [1, 2]} for p in "xy"]
    return [{"prompt": p, "response": "a"} if "response" in row or "completion" in row else {"prompt": p}
            for p in "xy"]


@pytest.mark.parametrize("line, fault", FAULTS.items(), ids=range(len(FAULTS)))
def test_a_row_with_nothing_to_learn_is_an_error_or_left_out(tmp_path, tokenizer, capsys, line, fault):
    good = usable_row_like(line)
    path = write(tmp_path / "rows.jsonl", [good[0], "", line, good[1], line])
    assert message(path, tokenizer=tokenizer) == f"rows.jsonl line 3: {fault[1]}{SKIP}"
    task = load(path, tokenizer=tokenizer, skip_bad_rows=True)
    assert {split: len(prompts) for split, prompts in task.prompts.items()} == {"train": 1, "test": 1}
    assert capsys.readouterr().err == f"left out 2 of 4 rows: 2 {fault[0]}\n"


def test_left_out_rows_are_counted_by_reason(tmp_path, capsys):
    rows = [pair(1), pair(2, "same", "same"), pair(3, rejected=""), pair(4, chosen=" "), pair(5)]
    assert rows_of(load_rows(tmp_path, *rows, skip_bad_rows=True).prompts) == ["prompt 1", "prompt 5"]
    assert capsys.readouterr().err == "left out 3 of 5 rows: 2 empty response, 1 equal responses\n"
    load_rows(tmp_path, pair(1), pair(2), skip_bad_rows=True)
    assert capsys.readouterr().err == ""


def test_rows_of_one_file_are_of_one_kind(tmp_path):
    path = write(tmp_path / "rows.jsonl", [pair(1), pair(2), {"prompt": "p", "completion": "a"}])
    assert message(path) == ("rows.jsonl line 3: this row is a demonstration, the rows before it are pairs; "
                             "--skip_bad_rows leaves such rows out")


@pytest.mark.parametrize("rows", [[], [""], [pair(1, "a", "a")]])
def test_no_usable_row(tmp_path, rows):
    assert message(write(tmp_path / "rows.jsonl", rows), skip_bad_rows=True) == "rows.jsonl: no usable row"


def test_one_prompt_cannot_be_split(tmp_path):
    assert message(write(tmp_path / "rows.jsonl", [pair(1), pair(1)])) == (
        "rows.jsonl: all rows have the same prompt; at least two different prompts are needed, "
        "one to train on and one to test on")


# ---- files

def test_gzip_blank_lines_bom_and_line_ends_change_nothing(tmp_path):
    rows = [pair(i) for i in range(5)]
    plain = load(write(tmp_path / "rows.jsonl", rows))
    assert load(write(tmp_path / "rows.jsonl.gz", rows)) == plain
    (tmp_path / "other").mkdir()
    first = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode() + b"\r"
    assert load(write(tmp_path / "other" / "rows.jsonl", [first, " ", *rows[1:], ""])) == plain


def test_limit_stops_reading(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [pair(1), pair(9, "a", "a"), pair(2), "not JSON"])
    assert rows_of(load(path, limit=2, skip_bad_rows=True).prompts) == ["prompt 1", "prompt 2"]
    assert capsys.readouterr().err == "left out 1 of 3 rows: 1 equal responses\n"
    assert rows_of(load(path, limit=3, skip_bad_rows=True).prompts) == ["prompt 1", "prompt 2"]
    assert capsys.readouterr().err == ("left out 2 of 4 rows: 1 equal responses, 1 not JSON (Expecting value "
                                       "at column 1)\n")


def test_test_data_lose_rows_or_leak_into_training(tmp_path):
    task = load(write(tmp_path / "rows.jsonl", [pair(i) for i in range(30)]))
    other = load(write(tmp_path / "test.jsonl", [{"prompt": f"prompt {i}"} for i in (3, 40, 41)]))
    use_for_test(task, other)
    assert sorted(task.prompts["test"]) == ["prompt 3", "prompt 40", "prompt 41"] and task.pairs["test"] == []
    assert {*task.prompts["train"]} == {f"prompt {i}" for i in range(30)} - {"prompt 3"}
    assert {row.prompt for row in task.pairs["train"]} == {*task.prompts["train"]}
    with pytest.raises(UserError, match="every prompt is in the test data too"):
        use_for_test(*(load(str(tmp_path / "rows.jsonl")) for _ in range(2)))


def test_broken_gzip(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl.gz", [pair(i) for i in range(100)]))
    whole = path.read_bytes()
    for broken in (whole[:len(whole) // 2], b"plain text", whole[:21] + b"\xff" * 9 + whole[30:]):
        path.write_bytes(broken)
        assert message(str(path)).startswith("rows.jsonl.gz: cannot be read to the end (")


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files",
                        lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for source in ("rows.jsonl", "a/rows.jsonl.gz", "a/rows.json", "folder/rows", f"{tmp_path}/rows",
                   "/a/b/c", "rows"):
        assert message(source) == f"no such file: {source}"
    assert message("folder") == "folder is a directory; pass one file (.jsonl, .json, .parquet, .csv)"


# ---- split

def test_split_is_disjoint_and_about_a_tenth(tmp_path):
    task = load_rows(tmp_path, *[pair(i // 3, f"good {i}") for i in range(3000)])
    train, test = task.prompts["train"], task.prompts["test"]
    assert not set(train) & set(test) and len(train) + len(test) == 1000 and 70 <= len(test) <= 130
    for split, prompts in task.prompts.items():
        assert {row.prompt for row in task.pairs[split]} == set(prompts)
        assert len(task.pairs[split]) == 3 * len(prompts)
        numbers = [int(row.chosen.split()[1]) for row in task.pairs[split]]
        assert numbers == sorted(numbers)


def test_split_moves_with_nothing_but_the_prompt(tmp_path):
    rows = [pair(i, f"good {i}", f"bad {i}") for i in range(300)]
    task = load_rows(tmp_path, *rows)
    swapped = load_rows(tmp_path, *[pair(i, f"bad {i}", f"good {i}") for i in range(300)])
    assert swapped.prompts == task.prompts
    # AG: the labels swap with the fields, and the order of the fields in the file means nothing.
    assert swapped.pairs == {split: [Pair(p, r, c) for p, c, r in pairs]
                             for split, pairs in task.pairs.items()}
    assert load_rows(tmp_path, *[dict(reversed(row.items())) for row in rows]) == task
    backwards = load_rows(tmp_path, *rows[::-1])
    assert backwards.prompts == {split: prompts[::-1] for split, prompts in task.prompts.items()}
    half = load_rows(tmp_path, *rows[:150])
    assert set(half.prompts["test"]) == set(task.prompts["test"]) & {row["prompt"] for row in rows[:150]}


def test_the_hash_is_fixed():
    """If these change sides, so do every user's. (`printf "prompt 14" | sha256sum` begins below 199.)"""
    keys = {f"prompt {i}": f"prompt {i}" for i in range(20)}
    assert choose_test_prompts(keys) == {"prompt 14", "prompt 15", "prompt 19"}


def test_no_split_is_empty():
    test = choose_test_prompts({f"prompt {i}": f"prompt {i}" for i in range(1000)})
    below, above = sorted(test)[:5], [f"prompt {i}" for i in range(1000) if f"prompt {i}" not in test][:5]
    for prompts in (below, above):
        chosen = choose_test_prompts({prompt: prompt for prompt in prompts})
        assert len(chosen) == (4 if prompts is below else 1) and chosen < set(prompts)


# ---- hub

# whichever httpx this huggingface_hub is built on
HTTP = sys.modules[errors.HTTPError.__module__.split(".")[0]]
REFUSED = HTTP.Response(404, request=HTTP.Request("GET", "https://huggingface.co"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one data set; `hub` is its files, by name."""
    files = {}

    def download(self, repo_id, filename, *, repo_type):
        assert (repo_id, repo_type) == ("owner/name", "dataset")
        return write(tmp_path / Path(filename).name, files[filename])

    monkeypatch.setattr(tasks.hub, "answers", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files",
                        lambda self, repo_id, *, repo_type: list(files))
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", download)
    return files


def test_hub_data_set(hub):
    hub |= {"README.md": [], "test.jsonl": [pair(3), pair(4)], "data/train.jsonl.gz": [pair(1), pair(2)]}
    task = load("owner/name")
    assert task.name == "owner/name" and rows_of(task.prompts) == ["prompt 1", "prompt 2"]
    assert rows_of(load("owner/name:test.jsonl").prompts) == ["prompt 3", "prompt 4"]
    hub["data/train.jsonl.gz"] = ["{"]
    assert message("owner/name").startswith("train.jsonl.gz line 1: not JSON")


def test_choose_file():
    assert choose_file("o/n", ["a.csv", "only.jsonl"]) == "only.jsonl"
    for files in (["a.jsonl", "b.jsonl.gz"], ["x/train.jsonl", "y/train.jsonl"]):
        with pytest.raises(UserError,
                           match=f"^o/n has several files; write o/n:FILE with one of {', '.join(files)}$"):
            choose_file("o/n", files)
    assert choose_file("o/n", ["README.md", "train-0.parquet", "test-0.parquet"]) == "train-0.parquet"
    with pytest.raises(UserError, match="^o/n has no file of a known form "):
        choose_file("o/n", ["a.txt"])


@pytest.mark.parametrize("error", [
    errors.RepositoryNotFoundError("no", response=REFUSED), errors.GatedRepoError("no", response=REFUSED),
    errors.RemoteEntryNotFoundError("no", response=REFUSED), errors.HfHubHTTPError("no", response=REFUSED),
    errors.LocalEntryNotFoundError("no"), errors.OfflineModeIsEnabled("no"), errors.HFValidationError("no"),
    HTTP.ConnectError("no"), HTTP.ReadTimeout("no")], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("source, method", [("owner/name", "list_repo_files"),
                                            ("owner/name:a.jsonl", "hf_hub_download")])
def test_hub_out_of_reach(monkeypatch, error, source, method):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(tasks.hub, "answers", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, method, fail)
    assert message(source) == (f"cannot read owner/name from the hub ({type(error).__name__}); "
                               "pass a local .jsonl file instead")


@pytest.mark.parametrize("source", ["owner/name", "owner/name:a.jsonl", "owner/two--dashes"])
def test_hub_offline(monkeypatch, source):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    text = message(source)
    assert text.startswith("cannot read owner/") and text.endswith("; pass a local .jsonl file instead")


def test_hub_that_does_not_answer_is_waited_for(monkeypatch, tmp_path):
    """Unknown ids are one line at once; what the cache has is used, in offline mode."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tasks.hub.answers.cache_clear()
    asked, known = [], {}

    def model_info(self, name, timeout):
        asked.append(timeout)
        raise HTTP.ConnectError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for method in ("list_repo_files", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub.HfApi, method, lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(tasks.hub, "try_to_load_from_cache",
                        lambda name, file, repo_type: known.get((name, file, repo_type)))
    for source in ("owner/name", "owner/name:a.jsonl"):
        assert message(source).startswith("cannot load owner/name: the hub does not answer within 5 seconds.")
    with pytest.raises(UserError, match="cannot load some/model: the hub does not answer"):
        check_checkpoint("some/model")
    assert asked == [5]                                                              # once for all of them
    known["some/model", "config.json", "model"] = str(tmp_path / "config.json")
    tasks.hub.check_hub("some/model")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    tasks.hub.answers.cache_clear()


def test_hub_that_refuses_counts_as_out_of_reach(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    tasks.hub.answers.cache_clear()

    def refused(self, name, timeout):
        raise errors.HfHubHTTPError("no", response=REFUSED)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    assert tasks.hub.answers()
    tasks.hub.answers.cache_clear()


# ---- real data, where it is at hand

@pytest.mark.skipif(not (REAL_DATA / "hh_harmless.jsonl.gz").exists(), reason="no shared data")
def test_real_hh(capsys):
    path = str(REAL_DATA / "hh_harmless.jsonl.gz")
    assert message(path) == f'hh_harmless.jsonl.gz line 67: "chosen" is empty{SKIP}'
    task = load(path, skip_bad_rows=True)
    assert capsys.readouterr().err == "left out 7 of 1733 rows: 4 no shared prompt, 3 empty response\n"
    assert task.name == "hh_harmless" and len(rows_of(task.pairs)) == 1726
    for prompt, chosen, rejected in rows_of(task.pairs):
        assert prompt.startswith("\n\nHuman:") and prompt.endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in chosen + rejected


@pytest.mark.skipif(not (REAL_DATA / "alpacaeval_ranked.jsonl.gz").exists(), reason="no shared data")
def test_real_rankings():
    task = load(str(REAL_DATA / "alpacaeval_ranked.jsonl.gz"))
    rankings = rows_of(task.rankings)
    assert len(rankings) == 547 and {len(ranking.systems) for ranking in rankings} == {5}
    scores = {ranking.prompt: dict(zip(ranking.responses, ranking.scores)) for ranking in rankings
              if len(set(ranking.responses)) == 5}
    clear = [pair for pair in rows_of(task.pairs) if pair.prompt in scores]
    assert len(clear) > 4000
    assert all(scores[prompt][chosen] > scores[prompt][rejected] for prompt, chosen, rejected in clear)
    assert all(chosen != rejected for _, chosen, rejected in rows_of(task.pairs))


@pytest.mark.parametrize("array", [False, True])
def test_field_that_comes_twice_is_read_as_its_last(tmp_path, array):
    twice = '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}'
    path = tmp_path / ("rows.json" if array else "rows.jsonl")
    path.write_text(f"[{twice}]" if array else twice, encoding="utf-8")
    with pytest.raises(UserError, match="'chosen' comes twice"):
        load(str(path))


def test_half_a_surrogate_pair_in_a_role_reaches_the_template(tmp_path):
    row = {"prompt": [{"role": "\ud800", "content": "p"}], "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match='line 1: "prompt" has half a surrogate pair'):
        load(write(tmp_path / "rows.jsonl", [json.dumps(row)]))


def test_files_that_were_read_are_not_known(tmp_path, tokenizer):
    """--resume compares their contents; those of the hub too."""
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}"} for i in range(3)]) for name in "ab"]
    one, two = (load(path, tokenizer) for path in paths)
    assert [*map(str, one.files)] == paths[:1]
    use_for_test(one, two)
    assert [*map(str, one.files)] == paths
