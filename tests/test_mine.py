"""An engineer's evening: python -m referee mine, on toy models: time, parts of the data, advice, the page."""
import html.parser
import itertools
import json
import math
import random
import re
import subprocess
import sys

import pytest

import dpo
import harness
import harness.rewards
import harness.run
import raft
from conftest import PAIRS, ROOT, killed_after, pair_task, settings, toy_run
from harness import UserError
from referee import advice, budget, mine, page
from referee.__main__ import main
from referee.statistics import share_interval

TOY = ["--max_length", "64", "--max_new_tokens", "5", "--device", "cpu", "--lr", "0.01",
       "--reward_lr", "0.01", "--quiet"]


@pytest.fixture
def evening(toy, tmp_path, monkeypatch, no_traces):
    """Runs `python -m referee mine` with these words on the toy, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters_of_mine.py").write_text(
        "def a(prompts, responses):\n    return [text.count('a') - 0.1 * len(text) for text in responses]\n",
        encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mine.signal, "signal", lambda *a: None)              # pytest's stay

    def run(*words, model=toy, data=toy / "pairs.jsonl"):
        main(["mine", "--model", str(model), "--data", str(data), *TOY, *map(str, words)])
        return tmp_path / "runs" / "mine"

    return run


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- a whole evening

def test_an_evening(evening, monkeypatch, capsys):
    """One reward model and one first evaluation for all; what is trained on, and what the page has."""
    trained, evaluated = [], []
    fit, evaluate = harness.rewards.train_reward_model, harness.run.evaluate
    monkeypatch.setattr(harness.rewards, "train_reward_model", lambda *a: trained.append(1) or fit(*a))
    monkeypatch.setattr(harness.run, "evaluate",
                        lambda config, *a: evaluated.append(config.out) or evaluate(config, *a))
    out = evening("--methods", "dpo,raft", "--minutes", "60", "--options", "raft.rounds=2") / "001"
    assert len(trained) == 1
    assert [word.split("/")[-1] for word in evaluated if "trial" not in word] == ["dpo", "raft"]
    runs = {name: read(out / f"{name}.json") for name in ("dpo", "raft")}
    state = read(out / "mine.json")
    assert state["train"] == 33 and state["sized"] == {"eval_prompts": 3, "eval_samples": 4}
    assert runs["dpo"]["before"]["eval/proxy"] == runs["raft"]["before"]["eval/proxy"] == 0.0
    assert all(run["samples"]["prompts"] == state["initial"]["samples"]["prompts"] for run in runs.values())
    assert runs["raft"]["plan"]["rounds"] == 2 and runs["dpo"]["plan"]["prompts"] == 33
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"dpo", "raft"}
    assert (out / "dpo" / "model.safetensors").exists() and not (out / "trial").exists()
    assert not [*out.glob("*/*.pt")] and read(out / "raft" / "args.json")["prompts"] == 0
    text = (out / page.NAME).read_text(encoding="utf-8")
    assert all(f">{name}<" in text for name in ("your model", "dpo", "raft")) and "None is better" in text
    said = capsys.readouterr().out
    assert "dpo: 1 pass over 33 of your 33 training prompts (nothing was cut)" in said
    assert "too few to tell" in said and "None is better" in said


def test_reward_function_and_adapters(evening):
    pytest.importorskip("peft")
    words = "--methods", "dpo,rrhf", "--minutes", 60, "--reward", "letters_of_mine:a", "--lora_rank", 2
    out = evening(*words) / "001"
    state, run = read(out / "mine.json"), read(out / "rrhf.json")
    assert (out / "rrhf" / "adapter_model.safetensors").exists()
    mean, std = state["scale"]                              # the page shows the function's own values again
    numbers = advice.Evening(state, {"rrhf": run})
    texts = run["samples"]["responses"]
    assert numbers.scores["rrhf"] == pytest.approx([t.count("a") - 0.1 * len(t) for t in texts], abs=1e-5)
    assert std > 0 and run["before"]["eval/proxy"] == 0.0


def test_evening_that_was_cut_goes_on(evening, monkeypatch, tmp_path):
    words = "--methods", "dpo,raft", "--minutes", 60, "--reward", "letters_of_mine:a", "--save_every", 1
    monkeypatch.setattr(mine, "trial", lambda *a: {"prompts": 2, "fixed": 0.0, "each": 0.001, "took": 0.0})
    whole = evening(*words) / "001"
    log = raft.train

    def cut(run):
        with killed_after(2):
            log(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(raft, "train", cut)
        evening(*words)
    out = whole.parent / "002"                              # 001 was finished
    assert (out / "dpo.json").exists() and not (out / "raft.json").exists()
    first = (out / "dpo.json").stat().st_mtime_ns
    monkeypatch.setattr(mine, "trial", None)                # called again, it would fail
    monkeypatch.setattr(mine, "share", None)
    evening(*words)
    assert not (whole.parent / "003").exists() and (out / page.NAME).exists()
    assert (out / "dpo.json").stat().st_mtime_ns == first
    assert read(out / "raft.json")["samples"] == read(whole / "raft.json")["samples"]
    lines = [json.loads(line)["step"] for line in (out / "raft" / "metrics.jsonl").read_text(
        encoding="utf-8").splitlines()]
    assert lines == sorted(lines) and lines[-1] > 3


def test_method_that_diverges_ends_the_evening(evening, monkeypatch, capsys):
    words = "--methods", "dpo,raft", "--minutes", 60, "--reward", "letters_of_mine:a"
    monkeypatch.setattr(mine, "trial", lambda *a: {"prompts": 2, "fixed": 0.0, "each": 0.001, "took": 0.0})

    def train(run):
        raise harness.Diverged("step 3: loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(dpo, "train", train)
        out = evening(*words) / "001"
        report = (out / page.NAME).read_text(encoding="utf-8")
        assert "dpo is left out: step 3: loss is nan" in report
        assert "dpo is left out" in capsys.readouterr().out
        assert "<th>raft</th>" in report and "<th>dpo</th>" not in report
        assert read(out / "raft.json")["samples"]
        patch.setattr(raft, "train", train)
        with pytest.raises(UserError, match="every method has diverged .step 3: loss is nan"):
            evening(*words, "--seed", 1)


def test_home_is_another_folder_for_the_runs_than_for_the_page(evening, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    evening("--methods", "dpo", "--minutes", 60, "--reward", "letters_of_mine:a", "--out=~/evening")
    out = tmp_path / "home" / "evening"
    assert (out / page.NAME).exists() and (out / "dpo" / "samples.txt").exists()
    assert not (tmp_path / "~").exists()


def test_other_command_in_the_same_directory(evening):
    words = "--methods", "dpo", "--minutes", 60, "--reward", "letters_of_mine:a", "--out", "there"
    evening(*words)
    evening(*words)                                          # makes the page anew
    with pytest.raises(UserError, match="there was made by another command"):
        evening(*words, "--seed", 1)


def test_second_terminal_deletes_what_the_first_one_writes(evening, tmp_path, monkeypatch):
    def cut(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mine, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            evening("--methods", "dpo", "--minutes", "60")
    out = tmp_path / "runs" / "mine" / "001"
    (out / "dpo").mkdir()
    (out / "dpo" / "metrics.jsonl").write_text("", encoding="utf-8")
    code = ("import sys, pathlib; from harness import directory; "
            "lock = directory.claim(pathlib.Path(sys.argv[1])); print('has it', flush=True); input()")
    first = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        assert first.stdout.readline() == "has it\n"
        with pytest.raises(UserError, match=f"process {first.pid} is writing"):
            evening("--methods", "dpo", "--minutes", "60")
        assert (out / "dpo" / "metrics.jsonl").exists()
    finally:
        first.communicate("\n")
    evening("--methods", "dpo", "--minutes", "60")
    assert (out / page.NAME).exists() and not (out / ".lock").exists()


def test_method_trains_on_the_part_that_was_planned(evening, monkeypatch):
    """Each prompt costs 10 s: 0.8 * 126 s, less what all share and 3 s, are 9 prompts with a pair each."""
    monkeypatch.setattr(mine, "trial", lambda *a: {"prompts": 2, "fixed": 3.0, "each": 10.0, "took": 0.0})
    seen, train = [], dpo.train
    monkeypatch.setattr(dpo, "train", lambda run: seen.append(
        (len(run.task.prompts["train"]), len(run.task.pairs["train"]), len(run.task.pairs["test"]),
         run.config.batch_size)) or train(run))
    out = evening("--methods", "dpo", "--minutes", 2.1, "--reward", "letters_of_mine:a") / "001"
    plan = read(out / "dpo.json")["plan"]
    assert seen == [(plan["prompts"], plan["prompts"], 3, 1)] and 8 <= plan["prompts"] <= 9


# ---------------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("words, said", [
    (["--methods", "dpo,ipo"], "no method ipo; there are: "), (["--methods", ","], "no method named"),
    (["--reward", "none"], "leave out --reward none"), (["--seeds", "3"], "--seeds is not for mine"),
    (["--options", "raft.rounds=2", "--methods", "dpo"], "METHOD.OPTION=VALUE"),
    (["--options", "dpo.beta"], "METHOD.OPTION=VALUE"),
    (["--options", "dpo.beta=0"], "--beta must be above 0"),
    (["--options", "dpo.limit=5"], "'dpo.limit=5': --limit is the same for all methods"),
    (["--options", "raft.reward=none"], "--reward is the same for all methods"),
    (["--options", "raft.temperature=0.7"], "--temperature is the same for all methods"),
    (["--options", "dpo.lora_rank=4"], "--lora_rank is the same for all methods"),
    (["--options", "dpo.eval-samples=2"], "--eval_samples is the same for all methods"),
    (["--minutes", "0"], "--minutes must be above 0"),
    (["--minutes", "1e-5", "--reward", "letters_of_mine:a"], "is too short: an answer .* --minutes [1-9]"),
    (["--minutes", "1e-3"], "a reward model takes .* give --minutes [1-9]")])
def test_mistake_is_one_line(evening, tmp_path, words, said):
    with pytest.raises(UserError, match=said) as error:
        evening(*words)
    assert "\n" not in str(error.value)


def test_model_or_data_missing(toy):
    for words in ([], ["--data", str(toy / "pairs.jsonl")]):
        with pytest.raises(UserError, match="give --model and --data"):
            main(["mine", *words])


def test_no_room_for_the_least_run(evening, monkeypatch):
    monkeypatch.setattr(mine, "trial", lambda name, *a: {
        "prompts": 2, "fixed": 3.0, "each": 10.0 if name == "raft" else 0.1, "took": 0.0})
    with pytest.raises(UserError, match="too short for raft: .* give --minutes ([0-9]+)") as error:
        evening("--methods", "dpo,raft", "--minutes", 1, "--reward", "letters_of_mine:a")
    minutes = int(re.search(r"give --minutes (\d+)", str(error.value))[1])
    assert minutes >= 2
    evening("--methods", "dpo,raft", "--minutes", minutes, "--reward", "letters_of_mine:a",
            "--options", "raft.candidates=2")


def test_reward_that_is_no_number_is_compared_by(toy, monkeypatch):
    scores = [0.5, math.nan, 1.0]
    monkeypatch.setattr(harness, "evaluate", lambda *_: (
        {}, {"proxy": scores, "prompts": ["p", "q", "r"]}))
    run = toy_run(toy, pair_task(), rewards={"proxy": None})
    with pytest.raises(UserError, match="the reward is nan for the prompt 'q'"):
        mine.measure(settings(toy, mine.Config), run, 10.0, 2)


def test_method_that_needs_pairs(evening, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": pair.prompt}) + "\n" for pair in PAIRS), encoding="utf-8")
    with pytest.raises(UserError, match="^nothing to compare by: give --reward"):
        evening("--methods", "dpo", data=file)
    with pytest.raises(UserError, match="^dpo: the data has no preference pairs"):
        evening("--methods", "dpo", "--reward", "letters_of_mine:a", data=file)


# ------------------------------------------------------------------------------------------- options and time

def test_only_given_options_reach_a_method():
    words = ["--warmup", "0.1", "--options", "dpo.beta=0.3 rrhf.lr=0.5", "--minutes", "7", "--lr", "0.1"]
    flags = mine.given(mine.Config, words, "mine")
    assert mine.options_of("dpo", flags) == {"warmup": 0.1, "lr": 0.1, "beta": 0.3}    # its default: given
    assert mine.options_of("rrhf", flags) == {"warmup": 0.1, "lr": 0.5}
    assert mine.given(mine.Config, [], "mine") == {}


def test_part_of_the_data():
    parts = []
    for n in (0, 5, 12):
        task = pair_task()
        budget.keep_part(task, n, seed=3)
        parts.append(set(task.prompts["train"]))
        assert len(task.prompts["train"]) == len(task.pairs["train"]) == n
        assert {pair.prompt for pair in task.pairs["train"]} == parts[-1]
        assert task.pairs["test"] == PAIRS[-6:] and task.prompts["test"] == [p.prompt for p in PAIRS[-6:]]
    assert parts[1] < parts[2]                               # another seed draws others
    other = pair_task()
    budget.keep_part(other, 12, seed=4)
    assert set(other.prompts["train"]) != parts[2]


REAL = {"model": "m", "data": "d"}
TRIED = {"prompts": 2, "fixed": 10.0, "each": 2.0}


@pytest.mark.parametrize("name, options, seconds, prompts, rounds, batch", [
    ("dpo", {}, 1000, 100, 1, 8),                            # 0.8 * 1000 - 15 = 785 s for at most 200 s
    ("dpo", {}, 150, 52, 1, 6),                              # 105 s: 52 prompts; batches of 8: too few steps
    ("dpo", {}, 39, 8, 1, 1),                                # 16.2 s: 8 prompts, the least
    ("dpo", {}, 38, 0, 1, None),                             # 15.4 s: 7
    ("dpo", {"batch_size": 4}, 150, 52, 1, 4),
    ("dpo", {"epochs": 2.0}, 30, 4, 1, 1),                   # twice over 4 prompts are 8 steps
    ("raft", {}, 2000, 100, 5, 8),
    ("raft", {}, 600, 100, 2, 8),                            # 465 s: two rounds of 200 s
    ("raft", {}, 200, 72, 1, 8),                             # 145 s: not even one over all prompts
    ("raft", {"rounds": 1}, 600, 100, 1, 8)])
def test_what_fits(name, options, seconds, prompts, rounds, batch):
    plan, least = budget.fit(name, REAL | options, TRIED, {"train": 100, "evaluation": 5.0}, seconds)
    assert (plan["prompts"], plan["rounds"]) == (prompts, rounds)
    assert batch is None or plan["batch_size"] == batch
    assert prompts == 0 or plan["seconds"] == 15 + 2 * prompts * rounds <= 0.8 * seconds
    enough, _ = budget.fit(name, REAL | options, TRIED, {"train": 100, "evaluation": 5.0}, least + 0.01)
    assert enough["prompts"] > 0


def test_what_a_method_does_not_need_goes_to_the_others():
    options, state = {"dpo": REAL, "raft": REAL, "rrhf": REAL}, {"train": 100, "evaluation": 5.0}
    tried = {"raft": TRIED, "dpo": {"prompts": 2, "fixed": 10.0, "each": 0.65},
             "rrhf": {"prompts": 2, "fixed": 10.0, "each": 20.0}}
    found = budget.shares(list(options), options, tried, state, 700.0)
    assert found == {"dpo": 100.0, "raft": 300.0, "rrhf": 300.0}             # dpo: (15 + 65) / 0.8
    found = budget.shares(list(options), options, tried, state, 30.0)
    assert found == {"dpo": 10.0, "raft": 10.0, "rrhf": 10.0}
    found = budget.shares(list(options), options, tried, state, 1e6)
    assert found == pytest.approx({"dpo": 100.0, "raft": 1268.75, "rrhf": 2518.75})


def test_what_was_cut_is_said():
    plan = {"epochs": 2.0, "prompts": 50, "rounds": 1, "asked": 4, "batch_size": 3, "seconds": 90.0,
            "share": 300.0}
    assert budget.say("raft", plan, 100) == (
        "raft: 2 passes over 50 of your 100 training prompts, 1 of 4 rounds (12% of the whole work), "
        "batches of 3: about 1.5 min of its 5.0 min")


def test_trial_takes_more_prompts_where_few_are_refused(monkeypatch, tmp_path):
    asked = []

    def refuse(name, options, n, state, known):
        asked.append((n, options["batch_size"], options["rounds"]))
        if n < 20:
            raise UserError("too few")
        return {"seconds_training": 6.0}, {}, {}

    monkeypatch.setattr(budget, "train", refuse)
    found = budget.trial("raft", REAL, {"train": 24}, tmp_path)
    assert asked == [(2, 2, 1), (8, 2, 1), (24, 2, 1)] and found["prompts"] == 24 and found["each"] == 0.25
    with pytest.raises(UserError, match="^raft: too few"):
        budget.trial("raft", REAL, {"train": 15}, tmp_path)


def test_trial_on_a_gpu_is_too_small_to_tell_what_a_prompt_takes(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(budget.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(budget, "train", lambda name, options, n, *rest: asked.append(
        (n, options["batch_size"])) or ({"seconds_training": 6.0}, {}, {}))
    assert [budget.trial("dpo", REAL, {"train": n}, tmp_path)["prompts"] for n in (5, 400)] == [5, 32]
    budget.trial("dpo", REAL | {"device": "cpu"}, {"train": 400}, tmp_path)
    assert asked == [(5, 5), (32, 8), (2, 2)]


# --------------------------------------------------------------------------------------- intervals and advice

def test_interval_of_a_share_covers_it():
    """Exact coverage, from all outcomes of n answers; and never a width of 0."""
    for n, p in itertools.product((5, 10, 30), (0.5, 0.7, 0.95)):
        covered = 0.0
        for yes in range(n + 1):
            mean = yes / n
            low, high = share_interval(mean, math.sqrt(mean * (1 - mean) / (n - 1)), n)
            assert 0 <= low <= mean <= high <= 1 and high - low > 0.05
            covered += (low <= p <= high) * math.comb(n, yes) * p ** yes * (1 - p) ** (n - yes)
        assert covered >= 0.95
    assert share_interval(1.0, 0.0, 1) == (0.0, 1.0)
    assert share_interval(0.917, 0.083, 3)[0] < 0.3           # three prompts: their error says little
    low, high = share_interval(0.6, 0.02, 50)                 # answers of one prompt agree: as many as 600
    assert 0.55 < low < 0.57 and 0.63 < high < 0.65
    assert share_interval(0.6, 0.02, 50, 0.99)[0] < low


def test_win_rate():
    assert advice.win_rates([1.0, 3.0, 5.0, 5.0], [2.0, 2.0, 5.0, 6.0], 2) == [0.5, 0.25]


def made(scores, k=2, kl=3.0, length=10.0, right=None, texts=None):
    """An Evening of prompts with these mean scores: {method: one for each prompt, your model's first}."""
    def run(values, kl=0.0, length=10.0):
        metrics = {"eval/kl": kl, "eval/kl_se": 0.1, "eval/length": length, "eval/length_se": 0.5,
                   "eval/eos_rate": 0.5, "eval/eos_rate_se": 0.1}
        return {"metrics": metrics, "samples": {
            "prompts": [f"prompt {i}" for i in range(len(values)) for _ in range(k)],
            "responses": texts or [f"answer {i}" for i in range(len(values)) for _ in range(k)],
            "proxy": [value + 0.01 * j for value in values for j in range(k)]}}

    (_, first), *others = scores.items()
    plan = {"prompts": 20, "rounds": 1, "asked": 5, "batch_size": 2, "epochs": 1.0, "seconds": 5.0}
    state = {"sized": {"eval_samples": k, "eval_prompts": len(first)}, "scale": [100.0, 2.0], "train": 40,
             "initial": run(first), "agreement": [1.0] * 20 if right is None else right, "pairs": 33}
    runs = {name: run(values, kl, length) | {"plan": plan, "before": {}, "seconds": 90.0}
            for name, values in others}
    return advice.Evening(state, runs)


def around(mean, n=20, seed=0):
    rng = random.Random(seed)
    return [mean + rng.gauss(0, 1) for _ in range(n)]


def test_clear_winner_is_recommended():
    evening = made({"": around(0), "dpo": around(3, seed=1), "raft": around(0.1, seed=2)})
    text = " ".join(evening.recommendation())
    assert text.startswith("Try dpo: its win rate against your model is 1.00 (")
    assert "better than raft" not in text and "too few" not in text
    assert ("On your 33 held-out pairs it prefers the better answer in a share of 1.00 (0.81 to 1.00) (mean "
            "over prompts).") in text
    assert "where the reward errs" in text and "Read the answers" in text
    verdicts = {row[0]: row[2] for row in evening.differences()[1:]}
    assert verdicts == {"dpo - your model": "higher", "raft - your model": "too few to tell",
                        "raft - dpo": "lower"}


def test_two_good_methods_are_not_told_apart():
    evening = made({"": around(0), "dpo": around(3, seed=1), "raft": around(3.1, seed=2)})
    assert "too few to tell whether it is better than" in " ".join(evening.recommendation())


def test_no_method_is_better():
    evening = made({"": around(0), "dpo": around(0.2, seed=1), "raft": around(-9, seed=2)})
    text = " ".join(evening.recommendation())
    assert text.startswith("None is better than the model you have (dpo, raft), as far as these 20 prompts")
    assert "raft is worse than your model by the reward." in text and "dpo is worse" not in text
    assert re.search(r"With about \d+ held-out prompts one could tell for dpo", text)


@pytest.mark.parametrize("changes, why", [({"kl": 25.0}, "its KL is 25 nats"),
                                          ({"length": 31.0}, "3.1 times as long"),
                                          ({"length": 4.0}, "0.4 times as long")])
def test_extreme_method_is_not_recommended(changes, why):
    text = " ".join(made({"": around(0), "dpo": around(5, seed=1)}, **changes).recommendation())
    assert "Try" not in text and why in text and text.startswith("None is better")


def test_few_prompts_recommend_a_method_or_call_one_worse():
    """Win rates of 0.75, 0.75 and 0.875 on three prompts have such an interval."""
    for rate in ((0.79, 0.55, 0.94), (0.21, 0.06, 0.45)):
        for n, decided in ((3, False), (6, True)):
            evening = made({"": around(0, n), "dpo": around(0, n, seed=1)})
            evening.rates["dpo"] = rate
            text = " ".join(evening.recommendation())
            assert ("Try dpo" in text or "is worse" in text) == decided


def test_few_prompts_tell_nothing():
    """Five prompts, all won: no sign test reaches 5%."""
    evening = made({"": [0.0] * 5, "dpo": [4.0, 4.1, 4.2, 4.0, 4.1]})
    assert "None is better" in evening.recommendation()[0]
    assert evening.differences()[1][2] == "too few to tell"
    evening = made({"": [0.0] * 20, "dpo": [4.0 + i / 100 for i in range(20)]})
    assert "Try dpo" in evening.recommendation()[0] and evening.differences()[1][2] == "higher"


@pytest.mark.parametrize("right, said", [([], "There are no held-out pairs"), ([0.5] * 20, "is doubtful too"),
                                         ([1.0, 1.0, 0.5], "is doubtful too")])
def test_doubt_about_the_judge(right, said):
    text = " ".join(made({"": around(0), "dpo": around(3)}, right=right).recommendation())
    assert said in text and "where the reward errs" not in text


def test_table():
    rows = made({"": around(0), "dpo": around(3, seed=1)}).table()
    named = dict(zip(rows[0], rows[2]))
    assert rows[1][0] == "your model" and rows[1][1] == "-" and rows[2][0] == "dpo"
    assert named["KL, nats"] == "3.00 ±0.21"                              # t(0.975, 19) = 2.093
    assert named["length, tokens"] == "10.0 ±1.0"
    assert named["training prompts"] == "20 of 40, 1 of 5 rounds" and named["minutes"] == "1.5"
    assert 103 < float(named["reward"].split()[0]) < 109                  # in the reward's own units


# --------------------------------------------------------------------------------------------------- the page

class Tags(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order."""
    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def made_page(evening):
    return page.page(evening, mine.Config(model="<b>m", data="d & e"), {"raft": "loss is <nan>"})


def test_page_is_whole_and_hides_no_text():
    bad = '</div><script>alert("x")</script> \x1b[31m & <img src=http://x.y> \u202e'
    evening = made({"": around(0), "dpo": around(3, seed=1)}, texts=[bad] * 40)
    text = made_page(evening)
    parser = Tags()
    parser.feed(text)
    assert parser.open == [] and text.isprintable() is False
    assert any(r'<script>alert("x")</script> \x1b[31m & <img' in piece for piece in parser.texts)
    assert not re.search(r"<script|<img|<link|href=|src=\"|url\(|@import|\x1b", text)
    assert "&lt;b&gt;m" in text and "<b>" not in text


def test_largest_differences_come_first():
    evening = made({"": [0.0, 0.0, 0.0], "dpo": [1.0, -5.0, 2.0], "raft": [0.0, 0.0, 3.0]})
    assert [prompt for _, prompt, _ in page.answers(evening)] == ["prompt 1", "prompt 2", "prompt 0"]
    text = made_page(evening)
    order = [text.index(f">prompt {i}<") for i in (1, 2, 0)]
    assert order == sorted(order)
    assert "dpo: 90" in text                                               # 100 + 2 * -5
