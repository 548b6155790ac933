"""--reward module:function: a reward of the user's own; and --prompt, which asks a finished run."""
import dataclasses
import json
import os

import pytest
import torch

import common
import dpo
import harness
import raft
from common import UserError
from conftest import method_names, settings, started
from harness import asking, rewards
from tasks.chat import Prompt

MODULE = '''
import math

def letters(prompts, responses):
    assert all(type(text) is str for text in [*prompts, *responses])
    return [text.count("a") for text in responses]
def short(prompts, responses):
    import torch
    return -torch.tensor([float(len(text)) for text in responses])
def roles(prompts, responses):
    return [len(prompt) + (prompt[0]["role"] == "user") for prompt in prompts]
def one(prompts, responses):
    return 1.0
def few(prompts, responses):
    return [1.0] * (len(responses) - 1)
def words(prompts, responses):
    return [1.0, "good", 2.0][:len(responses)]
def infinite(prompts, responses):
    return [1.0, 2.0, math.nan][:len(responses)]
def singles(prompts, responses):
    import numpy
    return [numpy.float32(len(text)) for text in responses]
def huge(prompts, responses):
    return [10 ** 400] * len(responses)
def broken(prompts, responses):
    return [prompt["text"] for prompt in prompts]
def leaves(prompts, responses):
    raise SystemExit(0)
class RateLimit(Exception):
    pass
def limited(prompts, responses):
    raise RateLimit("try again later")
def restless(prompts, responses):
    import os, torch
    torch.manual_seed(7)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    os.chdir("/")
    return [1.0] * len(responses)
def changes(prompts, responses):
    found = [len(prompt + [{"role": "assistant", "content": ""}]) for prompt in prompts]
    for prompt in prompts:
        prompt[0]["content"] = "changed"
    return found
def hangs_up(prompts, responses):
    raise BrokenPipeError("the judge is gone")
value = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    (tmp_path / "my_rewards.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "broken_rewards.py").write_text("def f(:", encoding="utf-8")
    (tmp_path / "lost_rewards.py").write_text("from math import nothing", encoding="utf-8")
    for name, line in (("script", "import sys; sys.exit(0)"), ("keyless", "import os; os.environ['NO_KEY_']"),
                       ("unsure", "assert False, 'not here'")):
        (tmp_path / f"{name}_rewards.py").write_text(line, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rewards.sys, "path", [*rewards.sys.path])
    yield tmp_path
    rewards.sys.modules.pop("my_rewards", None)


def scores(text, prompts=("p", "q", "r"), responses=("aa", "ba", "b")):
    return rewards.UserReward(rewards.functions_of(text))(list(prompts), list(responses)).tolist()


def test_gold_of_the_user_is_not_measured_or_is_what_is_trained_on(toy, mine):
    lines = [json.dumps({"prompt": letter * 3}) + "\n" for letter in "abcdef"]
    (mine / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    options = dict(test_data=str(mine / "test.jsonl"), reward="my_rewards:short", eval_prompts=6)
    run = started(toy, mine / "run", gold="my_rewards:letters", **options)
    assert {*run.task.prompts["test"]} == {x * 3 for x in "abcdef"} and len(run.task.prompts["train"]) == 36
    run.evaluate()
    run.evaluate()
    for name in ("before", "after"):
        texts = run.samples[name]["responses"]
        assert run.samples[name]["gold"] == [text.count("a") for text in texts]
    assert "eval/gold" in run.trace[1] and run.trace[1]["eval/win_rate"] == 0.5          # by gold, all ties
    run.config = dataclasses.replace(run.config, reward="")
    assert harness.candidate_reward(run, "P") is None                  # the data's own scores rank as before
    run.config = dataclasses.replace(run.config, gold="")
    assert harness.candidate_reward(run, "P") is not None              # as for the embedded task
    seen = []
    reward = harness.reward_to_maximise(run)
    plain = run.rewards["proxy"].functions[0][0]
    run.rewards["proxy"].functions[0] = (lambda *rows: seen.append(rows) or plain(*rows), 1.0, "short")
    reward(["a"], ["aaa"])
    assert len(seen) == 1
    for text, fault in (("letters", "write module:function"), ("my_rewards:nothing", "my_rewards"),
                        ("my_rewards:value", "no function")):
        with pytest.raises(UserError, match=fault):
            started(toy, mine / "other", gold=text, **options)
    with pytest.raises(UserError, match="--test_data and --gold are for --data"):
        harness.Config(gold="my_rewards:letters")


@pytest.mark.parametrize("flag", ["gold", "reward"])
def test_mistake_of_a_function_is_found_late_or_blamed_on_another_flag(flag, toy, mine, monkeypatch):
    monkeypatch.setattr(harness.command_line.loading, "load_policy", lambda *a: pytest.fail("it loads first"))
    with pytest.raises(UserError, match=f"^--{flag} my_rewards:one returned '1.0' for 1 responses"):
        started(toy, mine / "run", **{flag: "my_rewards:one"})
    assert not (mine / "run").exists()


def test_functions_are_not_called_or_not_weighted(mine):
    assert scores("my_rewards:letters") == [2, 1, 0]
    assert scores("my_rewards:letters*0.5, my_rewards:short*2") == [1 - 4, 0.5 - 4, -2]
    assert scores("my_rewards:letters*-1") == [-2, -1, 0]
    assert scores("my_rewards:singles") == [2, 2, 1]


def test_function_gets_other_texts_than_the_data_has(mine):
    sampled, chat = common.Sampled("a"), Prompt("<user>p")
    chat.messages = [{"role": "user", "content": "p"}]
    assert scores("my_rewards:roles", [chat], ["a"]) == [2]
    assert scores("my_rewards:letters", [Prompt("p")], [sampled]) == [1]


@pytest.mark.parametrize("text, message", [
    ("my_rewards:none", "my_rewards:none'.*write module:function"),
    ("absent:f", "absent:f'.*No module named"),
    ("my_rewards:letters*much", "letters.much'.*could not convert"),
    ("my_rewards:one", "my_rewards:one returned '1.0' for 3 responses, not a list"),
    ("my_rewards:few", r"few returned '\[1.0, 1.0\]' for 3 responses, not a list"),
    ("my_rewards:words", "words returned 'good' for row 2 of 3: prompt 'q', response 'ba'"),
    ("my_rewards:infinite", "infinite returned nan for row 3 of 3: prompt 'r', response 'b'"),
    ("my_rewards:huge", "huge returned 1000000+ for row 1 of 3"),
    ("broken_rewards:f", "broken_rewards:f'.*write module:function"),
    ("lost_rewards:f", "lost_rewards:f'.*cannot import name"),
    ("script_rewards:f", "script_rewards:f' .SystemExit: 0, script_rewards.py line 1"),
    ("keyless_rewards:f", "keyless_rewards:f' .KeyError: 'NO_KEY_'"),
    ("unsure_rewards:f", "unsure_rewards:f' .AssertionError: not here"),
    ("my_rewards:broken", "my_rewards:broken failed .TypeError: string indices.*, my_rewards.py line [0-9]+"),
    ("my_rewards:leaves", "my_rewards:leaves failed .SystemExit: 0, my_rewards.py line"),
    ("my_rewards:limited", "my_rewards:limited failed .RateLimit: try again later, my_rewards.py line"),
    ("my_rewards:hangs_up", "my_rewards:hangs_up failed .BrokenPipeError: the judge is gone"),
    ("my_rewards:letters*nan", "letters.nan': the weight nan is not finite"),
    ("my_rewards:letters*inf", "the weight inf is not finite"),
    ("my_rewards:short*3e38,my_rewards:short*3e38", "the weighted sum is not finite"),
    ("my_rewards:value", "my_rewards:value is no function")])
def test_bad_function_is_a_traceback_or_its_row_is_not_named(text, message, mine):
    with pytest.raises(UserError, match=message):
        scores(text)


def test_function_changes_the_run_around_it(mine):
    """Its random numbers, the current directory, torch's settings, the messages of the data."""
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    assert scores("my_rewards:restless") == [1, 1, 1] and os.getcwd() == str(mine)
    assert torch.rand(2).tolist() == expected
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    (mine / "moving_rewards.py").write_text("import os\nos.chdir('/')\ndef f(p, r): return [0.0] * len(r)\n",
                                            encoding="utf-8")
    assert scores("moving_rewards:f") == [0, 0, 0] and os.getcwd() == str(mine)
    chat = Prompt("<user>p")
    chat.messages = ({"role": "user", "content": "p"},)                  # as tasks/chat.py makes them
    assert scores("my_rewards:changes", [chat], ["a"]) == [2] and chat.messages[0]["content"] == "p"


def test_reward_of_the_user_is_not_what_a_method_maximises(mine, toy):
    start = started(toy, mine / "run", reward="my_rewards:letters*3")
    reward = harness.reward_to_maximise(start)
    values = reward(["c"] * 3, ["", "a", "aa"])
    assert torch.allclose(values.diff(), values.diff()[0]) and values.diff()[0] > 0
    assert reward.std > 0 and start.rewards["proxy"] is reward                  # scaled as every reward
    result = harness.launch(raft.train, settings(toy, raft.Config, out=str(mine / "raft"), epochs=4.0,
                                                 reward="my_rewards:letters", lr=1e-2, candidates=4))
    first, last = result["trace"][0], result["trace"][-1]
    assert last["eval/proxy"] > first["eval/proxy"] + 0.3 and last["eval/win_rate"] > 0.5


# ---- --prompt

def finished(toy, out, **kwargs):
    harness.launch(dpo.train, settings(toy, dpo.Config, out=str(out), epochs=4.0, lr=3e-2, **kwargs))
    return out


def printed(capsys, **kwargs):
    """(what was asked, answers before, answers after) on the screen."""
    capsys.readouterr()
    asking.ask(dpo.Config(**{**dict(prompt="cd", device="cpu", eval_samples=3), **kwargs}), "dpo")
    first, *lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "before training:" and lines[4] == "after training:" and len(lines) == 8
    return first, [line.strip() for line in lines[1:4]], [line.strip() for line in lines[5:]]


def test_run_is_asked_with_other_options_than_its_own(toy, tmp_path, capsys):
    out = finished(toy, tmp_path / "run", temperature=0.7)
    asked, before, after = printed(capsys, policy=str(out))
    assert asked == "cd" and before != after

    def sampled(path):
        config = settings(toy, temperature=0.7, policy=str(path))
        policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
        torch.manual_seed(0)
        batch = common.generate(policy, tokenizer, ["cd"], 3, 0.7, max_new_tokens=5)
        return [str(text) for text in common.decode(tokenizer, batch)]

    assert before == sampled(toy) and after == sampled(out)
    assert printed(capsys, policy=str(out), seed=3)[2] != after
    assert all(len(text) <= 2 for text in printed(capsys, policy=str(out), max_new_tokens=2)[2])


def test_run_of_an_adapter_cannot_be_asked(toy, tmp_path, capsys):
    pytest.importorskip("peft")
    out = finished(toy, tmp_path / "run", lora_rank=4)
    _, before, after = printed(capsys, policy=str(out))
    assert before != after


def test_latest_run_is_another_or_an_unfinished_one(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(asking, "ROOT", tmp_path)
    with pytest.raises(UserError, match="there is no run to ask"):
        printed(capsys)
    out = finished(toy, tmp_path / "runs" / "dpo" / "001")
    (tmp_path / "runs" / "dpo" / "002").mkdir()
    assert printed(capsys) == printed(capsys, policy=str(out))
    with pytest.raises(UserError, match="no args.json: give --policy the directory of a finished run"):
        printed(capsys, policy=str(toy))


@pytest.mark.parametrize("method", method_names())
def test_script_has_no_prompt(method, toy, monkeypatch):
    asked = []
    monkeypatch.setattr(harness.command_line, "ask", lambda config, name: asked.append((config.prompt, name)))
    module = __import__(method)
    assert "prompt" in {field.name for field in dataclasses.fields(module.Config)}
    monkeypatch.setattr(rewards.sys, "argv", [f"{method}.py", "--prompt", "hello"])
    harness.main(module.Config, module.train)
    assert asked == [("hello", method)]


def test_gold_of_the_user_is_maximised(toy, mine, no_traces):
    with pytest.raises(UserError, match="--reward gold: only the embedded task"):
        started(toy, mine / "run", gold="my_rewards:letters", reward="gold")
