"""harness/: SFT and reward model, rewards, samples of the policy, candidates; the labels of tasks/build.py.

Letters are the bug classes that a test would catch. Models are random, over eight letters.
"""
import functools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

import common
import harness
import harness.loading
import harness.rewards
import harness.samples
import ppo
import tasks
from conftest import PAIRS, count_a, pair_task, parameters, save_toy, settings, sgd, slow, started, toy_run
from harness import Config, Demonstration, Pair, Ranking, Recipe, UserError, shuffled_batches
from harness.rewards import NoisyReward, People, TrueReward, load_rewards
from harness.stages import fit
from tasks import Task, build, reviews
from tasks.chat import Prompt

pytestmark = pytest.mark.usefixtures("no_traces")
GOOD, BAD = Pair("ab", "cd", "h"), Pair("c", "hgh", "")
MIXED = Ranking("d", ["a", "bb"], [1.0, 2.0], ["A", "B"], [True, False])


# ------------------------------------------------------------------------------------------ SFT, reward model

def recipe(**kwargs):
    return Recipe(**{**dict(lr=1e-2, batch_size=6, schedule="constant_with_warmup", warmup=0.0), **kwargs})


def test_epochs_skip_or_repeat_rows():
    steps = shuffled_batches(10, 2.0, 4, 0)
    order = sum(steps, [])
    assert [len(s) for s in steps] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert sum(shuffled_batches(10, 1.5, 4, 0), []) == order[:15]
    assert [len(s) for s in shuffled_batches(10, 1.0, 4, 0)] == [4, 4, 2]
    assert shuffled_batches(10, 0.0, 4, 0) == []
    plan = shuffled_batches(8, 1.5, 3, 0)
    assert sorted(sum(plan, [])[:8]) == list(range(8)) and [len(s) for s in plan] == [3] * 4


def test_epochs_ignore_the_seed_or_are_not_reproducible():
    first, again, other = (shuffled_batches(50, 1.0, 64, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_sft_does_not_learn_the_responses(toy):
    config = settings(toy)
    model, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    rows = [Demonstration("ab", "cde"), Demonstration("h", "gg")]
    batch = common.encode(tokenizer, [d.prompt for d in rows], [d.response for d in rows])
    before = -common.sequence_logps(model, batch).mean().item()
    harness.train_sft(model, tokenizer, rows, recipe(epochs=40.0, batch_size=2))
    after = -common.sequence_logps(model, batch).mean().item()
    assert before > 4 and after < 0.3


def reward_accuracy(model, tokenizer, pairs):
    reward = common.RewardModel(model, tokenizer)
    prompts, chosen, rejected = zip(*pairs)
    return (reward(prompts, chosen) > reward(prompts, rejected)).float().mean().item()


def test_reward_model_learns_the_labels_backwards(toy):
    tokenizer = harness.load_tokenizer(settings(toy))
    model = common.load(AutoModelForSequenceClassification, toy, "cpu", num_labels=1)
    harness.train_reward_model(model, tokenizer, PAIRS[:-6], recipe(epochs=6.0))
    assert reward_accuracy(model, tokenizer, PAIRS[-6:]) == 1
    swapped = [p._replace(chosen=p.rejected, rejected=p.chosen) for p in PAIRS[-6:]]
    assert reward_accuracy(model, tokenizer, swapped) == 0


def test_O_token_budget_changes_the_gradient_of_fit(toy, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    calls, results, config = [], [], settings(toy)
    rows = [Demonstration(p, r) for p, r in
            (("a", "bcdefg"), ("abcd", "h"), ("ef", "gh"), ("c", "cc"), ("hhh", "abc"))]

    def spy(model, batch, part):
        calls.append(len(batch))
        answers = [rows[i].response for i in part]
        assert common.decode(tokenizer, batch) == answers, "part does not say which rows the batch holds"
        return -common.sequence_logps(model, batch)

    for budget in (1, 16, 100000):
        model, tokenizer = harness.load_policy(config).double(), harness.load_tokenizer(config)
        start = parameters(model).clone()
        calls.clear()
        fit(model, tokenizer, [(d.prompt, [d.response]) for d in rows], spy,
            recipe(token_budget=budget, batch_size=3, max_grad_norm=1e9), "")
        results.append(parameters(model))
        assert sum(calls) == 5 and (budget != 1 or calls == [1] * 5) and (budget != 100000 or calls == [3, 2])
    assert (results[0] - start).abs().max() > 1e-3
    assert all((r - results[0]).abs().max() < 1e-6 for r in results)


def test_tokens_of_a_stage_count_padding_or_not_every_pass(toy):
    config, rows = settings(toy), [Demonstration("a", "bc"), Demonstration("abcd", "h")]
    model, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    counts = {"tokens_trained": 100}
    harness.train_sft(model, tokenizer, rows, recipe(epochs=3.0), counts)
    assert counts == {"tokens_trained": 100 + 3 * (1 + 2 + 1 + 4 + 1 + 1)}                          # with EOS
    score = common.load(AutoModelForSequenceClassification, toy, num_labels=1)
    counts = {"tokens_trained": 0}
    harness.train_reward_model(score, tokenizer, [Pair("a", "bc", "d")], recipe(epochs=2.0), counts)
    assert counts == {"tokens_trained": 2 * (4 + 3)}
    harness.train_sft(model, tokenizer, rows, recipe())                          # nobody counts: no matter


def test_O_fit_adds_the_losses_of_a_batch_up(toy, monkeypatch):
    """One step of 0.01 times the gradient of the mean loss, worked out apart."""
    monkeypatch.setattr(common, "adamw", sgd)
    config, rows = settings(toy), [("a", ["bc"]), ("abcd", ["h"]), ("ef", ["gh"])]
    model, tokenizer = harness.load_policy(config).double(), harness.load_tokenizer(config)
    start = parameters(model).clone()
    batch = common.encode(tokenizer, [p for p, _ in rows], [r for _, (r,) in rows])
    (-common.sequence_logps(model, batch).mean()).backward()
    want = start - 0.01 * torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    fit(model, tokenizer, rows, lambda model, batch, _: -common.sequence_logps(model, batch),
        recipe(batch_size=3, max_grad_norm=1e9), "")
    assert (want - start).abs().max() > 1e-3
    torch.testing.assert_close(parameters(model), want, rtol=1e-9, atol=1e-9)


def test_O_fit_clips_each_tensor_or_keeps_gradients_or_the_learning_rate(toy, monkeypatch):
    """Two steps on the same batch; of the second, the schedule says that it is half as long."""
    def halving(model, lr, steps, schedule, warmup):
        assert (lr, steps, schedule, warmup) == (0.5, 2, "linear", 0.25)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)

    monkeypatch.setattr(common, "adamw", halving)
    config = settings(toy)
    model, tokenizer = harness.load_policy(config).double(), harness.load_tokenizer(config)
    weights, seen = [*model.parameters()], [parameters(model)]
    ones = torch.linspace(1, 2, len(seen[0]), dtype=torch.float64)              # the gradient at every step

    def losses_of(model, batch, part):
        seen.append(parameters(model))
        return (torch.cat([weight.flatten() for weight in weights]) @ ones)[None]

    how = recipe(lr=0.5, batch_size=1, epochs=2.0, schedule="linear", warmup=0.25, max_grad_norm=3.0)
    fit(model, tokenizer, [("ab", ["c"])], losses_of, how, "")
    seen.append(parameters(model))
    for length, before, after in zip((0.5, 0.25), seen[1:-1], seen[2:], strict=True):
        torch.testing.assert_close(after - before, -length * 3 * ones / ones.norm(), rtol=1e-5, atol=1e-9)
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_AD_loss_that_is_not_finite_passes(value):
    harness.check_finite(torch.tensor([1.0, 2.0]), 7, ["good", "fine"])
    with pytest.raises(UserError) as error:
        harness.check_finite(torch.tensor([1.0, value]), 7, ["good", "culprit"], "reward")
    assert "step 7" in str(error.value) and "'culprit'" in str(error.value) and "reward" in str(error.value)
    assert "good" not in str(error.value)


def test_AD_fit_steps_on_a_loss_that_is_not_finite(toy):
    config = settings(toy)
    model, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    before = parameters(model).clone()
    with pytest.raises(UserError, match="step 1: loss is nan for the prompt 'ab'"):
        fit(model, tokenizer, [("ab", ["c"])],
            lambda model, batch, _: common.sequence_logps(model, batch) * math.nan, recipe(), "")
    assert torch.equal(parameters(model), before)


# ------------------------------------------------------------------------------ which reward models a run has

def test_reward_none_is_not_none_or_missing_pairs_crash(toy, capsys):
    assert load_rewards(settings(toy), pair_task()) == {}
    assert load_rewards(settings(toy, reward=""), Task("toy", {"train": [], "test": []})) == {}
    assert "no pairs to train a reward model" in capsys.readouterr().err


def test_family_without_reward_models_is_not_named(toy, monkeypatch, capsys):
    monkeypatch.setattr(harness.rewards, "without_scorer", lambda config: "odd")
    assert load_rewards(settings(toy, reward=""), pair_task()) == {}
    assert "no class for reward models of the family odd" in capsys.readouterr().err


def test_cached_reward_model_is_trained_again_or_is_not_trained(toy, monkeypatch):
    config = settings(toy, reward="", reward_lr=1e-2)
    prompts, chosen, rejected = zip(*PAIRS[-6:])
    first = load_rewards(config, pair_task())["proxy"]
    assert (first(prompts, chosen) > first(prompts, rejected)).all()

    recipes = []

    def again(model, tokenizer, pairs, recipe):
        recipes.append(recipe)
        raise AssertionError("trained again")

    monkeypatch.setattr(harness.rewards, "train_reward_model", again)
    second = load_rewards(replace(config, lr=0.1), pair_task())["proxy"]
    assert torch.equal(second(prompts, chosen), first(prompts, chosen))
    for other in (dict(seed=1), dict(reward_lr=1e-3)):
        with pytest.raises(AssertionError, match="trained again"):
            load_rewards(replace(config, **other), pair_task())
    with pytest.raises(AssertionError, match="trained again"):
        load_rewards(config, replace(pair_task(), pairs={"train": PAIRS[:5]}))
    path = harness.rewards.trained_path
    assert len({path(config, [Pair("a", *texts)]) for texts in (("b", "c"), ("b", "d"), ("e", "c"))}) == 3
    assert [(recipe.seed, recipe.lr) for recipe in recipes] == [(1, 1e-2), (0, 1e-3), (0, 1e-2)]


def test_named_reward_model_sends_the_judges_home(toy):
    path = harness.rewards.trained_path(settings(toy, reward="", reward_lr=1e-2), pair_task().pairs["train"])
    load_rewards(settings(toy, reward="", reward_lr=1e-2), pair_task())
    config, people = settings(toy, reward=str(path)), replace(pair_task(), opinion=lambda prompt, text: 3.0)
    assert [*load_rewards(config, pair_task())] == ["proxy"]
    assert load_rewards(config, people)["judge"](["a"], ["b"]).tolist() == [3.0]


@pytest.mark.parametrize("option", [dict(warmup=0.9), dict(max_grad_norm=0.01)])
def test_cached_reward_model_depends_on_which_run_came_first(toy, tmp_path, monkeypatch, option):
    """Both are options of the method (DPO clips at 10, others at 1), and neither is in the cache's key."""
    config = settings(toy, reward="", reward_lr=1e-2)
    prompts, texts, _ = zip(*PAIRS[-6:])
    alone = load_rewards(replace(config, **option), pair_task())["proxy"](prompts, texts)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "other")
    load_rewards(config, pair_task())
    after_another = load_rewards(replace(config, **option), pair_task())["proxy"](prompts, texts)
    torch.testing.assert_close(after_another, alone)


@pytest.mark.parametrize("own", [dict(), dict(batch_size=12, minibatch_size=6),
                                 dict(batch_size=64, minibatch_size=64)])
def test_cached_reward_model_is_trained_with_the_batches_of_the_method(toy, tmp_path, monkeypatch, own):
    """It has settings of its own; a method's checks (is the minibatch a divisor?) are not for them."""
    prompts, texts, _ = zip(*PAIRS[-6:])
    alone = load_rewards(settings(toy, reward="", reward_lr=1e-2), pair_task())["proxy"](prompts, texts)
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "other")
    config = settings(toy, ppo.Config, **{**dict(reward="", reward_lr=1e-2, batch_size=128), **own})
    torch.testing.assert_close(load_rewards(config, pair_task())["proxy"](prompts, texts), alone)


def test_given_reward_model_is_not_used_or_not_scaled(toy, tmp_path):
    path = save_toy(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    prompts, texts, _ = zip(*PAIRS[:4])
    raw = load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"reward_scale": {"mean": 2.0, "std": 4.0}}),
                                      encoding="utf-8")
    scaled = load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    assert raw.std() > 0.01
    torch.testing.assert_close(scaled, (raw - 2) / 4)


# ------------------------------------------------------------------------------------ what a method maximises

MANY = [x + y + z for x in "cdefgh" for y in "cdefgh" for z in "cdefgh"]                   # 216 prompts


@pytest.fixture
def gold(monkeypatch):
    """Gives the toy's task a true reward, gold(f), and many train prompts."""
    def give(f):
        task = replace(pair_task(f), prompts=pair_task().prompts | {"train": MANY})
        monkeypatch.setattr(harness.loading, "load_task", lambda config: task)

    return give


@pytest.fixture
def sampled(monkeypatch):
    """What reward_to_maximise asked for and got: (prompts, n, temperature, max_new_tokens, texts)."""
    calls, plain = [], common.generate

    def spy(model, tokenizer, prompts, n=1, temperature=1.0, greedy=False, max_new_tokens=40):
        batch = plain(model, tokenizer, prompts, n, temperature, greedy, max_new_tokens)
        calls.append((list(prompts), n, temperature, max_new_tokens, common.decode(tokenizer, batch)))
        return batch

    monkeypatch.setattr(common, "generate", spy)
    return calls


def check_normalised(reward, run, calls, raw):
    """Mean 0 and deviation 1 over 4 samples of each of the first 128 training prompts."""
    (prompts, n, temperature, most, texts), = calls
    assert (prompts, n, temperature, most) == (MANY[:128], 4, 0.8, 5)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = raw(prompts, texts)
    assert scores.std() > 0.01
    assert (reward.mean, reward.std) == pytest.approx((scores.mean().item(), scores.std().item()))
    got = reward(prompts, texts)
    assert got.shape == (512,) and got.mean().abs() < 1e-5 and got.std().item() == pytest.approx(1)
    torch.testing.assert_close(got, (scores - scores.mean()) / scores.std())


@pytest.mark.parametrize("batch_size", [6, 300])
def test_gold_is_not_maximised_or_not_on_the_common_scale(toy, tmp_path, gold, sampled, batch_size):
    gold(lambda prompt, response, ended: 3 * count_a(prompt, response, ended) + (prompt < "d") + 10 * ended)
    run = started(toy, tmp_path, reward="gold", temperature=0.8, batch_size=batch_size)
    assert set(run.rewards) == {"proxy"}                    # still measured, though not maximised
    proxy = run.rewards["proxy"].mean, run.rewards["proxy"].std
    reward = harness.reward_to_maximise(run)
    assert (run.rewards["proxy"].mean, run.rewards["proxy"].std) == proxy
    check_normalised(reward, run, sampled, lambda prompts, texts: torch.tensor(
        [3.0 * text.count("a") + (prompt < "d") + 10 for prompt, text in zip(prompts, texts)]))


@pytest.mark.parametrize("pairs", [{}, {"train": PAIRS[:-6]}])
def test_gold_is_taken_for_a_directory_or_for_the_proxy_where_there_is_none(toy, pairs):
    task = replace(pair_task(), pairs=pairs)
    with pytest.raises(UserError, match="--reward gold: only the embedded task has a true reward"):
        load_rewards(settings(toy, reward="gold"), task)


@pytest.mark.parametrize("reward", ["none", ""])
def test_method_without_a_reward_runs_on_nothing(toy, tmp_path, monkeypatch, reward):
    monkeypatch.setattr(harness.loading, "load_task", lambda config: replace(pair_task(), pairs={}))
    run = started(toy, tmp_path, reward=reward)
    with pytest.raises(UserError, match="no reward to maximise: give --reward, or data with pairs"):
        harness.reward_to_maximise(run)


def reward_model(path, **scale):
    save_toy(path, LlamaForSequenceClassification, num_labels=1)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | ({"reward_scale": scale} if scale else {})),
                                      encoding="utf-8")
    return str(path)


def test_scale_of_a_reward_model_is_measured_anew(toy, tmp_path, sampled):
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward", mean=2.0, std=4.0))
    reward = harness.reward_to_maximise(run)
    assert reward is run.rewards["proxy"] and (reward.mean, reward.std) == (2, 4) and not sampled


def test_scale_that_was_set_is_measured_again(toy, tmp_path, sampled):
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward"))
    harness.rewards.set_scale(run.rewards["proxy"], 3.0, 2.0)
    reward = harness.reward_to_maximise(run)
    assert reward is run.rewards["proxy"] and (reward.mean, reward.std) == (3, 2) and not sampled


def test_reward_model_without_a_scale_is_left_raw(toy, tmp_path, gold, sampled):
    gold(None)
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward"), temperature=0.8)
    unscaled = common.load_reward_model(tmp_path / "reward", 64, "cpu")
    reward = harness.reward_to_maximise(run)
    assert reward is run.rewards["proxy"]                   # so evaluation shows it on the same scale
    check_normalised(reward, run, sampled, unscaled)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.1, -1.7])
def test_constant_reward_is_divided_by_nothing(toy, tmp_path, gold, value):
    """0.3 has no exact float32: the deviation of 512 of them can come out as 1e-8 instead of 0."""
    gold(lambda prompt, response, ended: value)
    with pytest.raises(UserError,
                       match=f"the reward is {value:.3g} for each of the policy's 512 first samples"):
        harness.reward_to_maximise(started(toy, tmp_path, reward="gold"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_AD_reward_that_is_not_finite_becomes_the_scale(toy, tmp_path, gold, value):
    culprit = MANY[100]
    gold(lambda prompt, response, ended: value if prompt == culprit else count_a(prompt, response, ended))
    with pytest.raises(UserError, match=f"the reward is {value} for the prompt '{culprit}'"):
        harness.reward_to_maximise(started(toy, tmp_path, reward="gold"))


def test_AE_scale_of_the_reward_depends_on_whether_its_model_was_cached(toy, tmp_path):
    """Training it draws random numbers, loading it draws none; the scale must be the same in every run."""
    scales = []
    for name in ("trained", "cached"):
        reward = harness.reward_to_maximise(started(toy, tmp_path / name, reward="", reward_lr=1e-2))
        scales.append((reward.mean, reward.std))
    assert scales[0] == scales[1]


def test_judge_is_a_model_or_is_asked_for_another_texts_opinion():
    asked = []
    judge = People(lambda *row: asked.append(row) or len(row[0]) - len(row[1]) / 8)
    scores = judge(["a", "abc"], ["bc", "d"])
    assert scores.tolist() == [0.75, 2.875] and scores.dtype == torch.float32
    assert asked == [("a", "bc"), ("abc", "d")]


def test_judge_of_the_embedded_task_is_no_person_or_another_one_under_each_label_noise(toy, monkeypatch):
    monkeypatch.setattr(build, "proxy", lambda config: "the proxy")
    embeddings = SimpleNamespace(num_embeddings=9)
    decoder = SimpleNamespace(model=SimpleNamespace(score="a head", get_input_embeddings=lambda: embeddings),
                              tokenizer=harness.load_tokenizer(settings(toy)))
    monkeypatch.setattr(common, "load_reward_model", lambda path, *args: {"the proxy": decoder}[path])
    monkeypatch.setattr(harness.rewards, "check_checkpoint", lambda path, policy: None)
    task = Task("reviews", {}, opinion=functools.partial(reviews.opinion, seed=3), gold=reviews.gold)
    prompts = reviews.make_prompts("test", 5, 0)
    texts = [reviews.write("crowd", prompt, random.Random(0)) for prompt in prompts]
    want = [reviews.opinion(prompt, text, 3) for prompt, text in zip(prompts, texts)]
    for options in ({}, dict(label_noise=0.3, proxy_pairs="off_policy"), dict(reward="gold")):
        rewards = load_rewards(Config(**options), task)
        assert list(rewards) == ["proxy", "judge"] and rewards["proxy"] is decoder
        assert rewards["judge"](prompts, texts).tolist() == pytest.approx(want, abs=1e-6)
    monkeypatch.setattr(common, "load_reward_model", lambda path, *args: {"some/model": decoder}[path])
    assert list(load_rewards(Config(reward="some/model"), task)) == ["proxy", "judge"]


def zeros(prompts, responses):
    return torch.zeros(len(prompts))


def test_noise_of_a_prompt_differs_between_its_responses_or_from_call_to_call():
    prompts, texts = [f"{i // 2}" for i in range(4000)], [f"{i}" for i in range(4000)]
    shift, each = (NoisyReward(zeros, kind, 0)(prompts, texts) for kind in ("prompt", "response"))
    assert torch.equal(shift[::2], shift[1::2]) and (each[::2] != each[1::2]).all()
    for noise in (shift[::2], each):
        assert abs(noise.mean()) < 0.08 and noise.std().item() == pytest.approx(1, abs=0.06)
    for kind, noise in (("prompt", shift), ("response", each)):
        again = NoisyReward(zeros, kind, 0)(prompts[::-1], texts[::-1])           # batched in another way
        assert torch.equal(again.flip(0), noise)
        assert (NoisyReward(zeros, kind, 1)(prompts, texts) != noise).all()


def test_shift_of_a_prompt_turns_two_scores_round():
    scores = torch.linspace(0.5, 1, 4000)[:2].repeat(300) + torch.tensor([0, 6e-8]).repeat(300)
    got = NoisyReward(lambda p, r: scores, "prompt", 0)([f"{i // 2}" for i in range(600)], ["x"] * 600)
    assert (got[1::2] > got[::2]).all()
    torch.testing.assert_close(got[1::2] - got[::2], (scores[1::2].double() - scores[::2]), rtol=0,
                               atol=1e-12)


@pytest.mark.parametrize("kind", ["prompt", "response"])
def test_noise_is_measured_into_the_scale_or_left_out(toy, kind):
    def gold(prompt, text, ended):
        return 7.0 * text.count("a") + (prompt == "c")

    task = Task("toy", {"train": ["ab", "c", "def"], "test": ["g"]}, gold=gold)
    plain, noisy = (harness.reward_to_maximise(toy_run(toy, task, reward="gold", reward_noise=name, seed=5))
                    for name in ("none", kind))
    assert isinstance(plain, TrueReward) and isinstance(noisy, NoisyReward)
    assert (noisy.reward.mean, noisy.reward.std) == (plain.mean, plain.std) and plain.std > 1
    rows = ["c", "c", "ab"], ["aa", "b", "a"]
    torch.testing.assert_close(noisy(*rows), plain(*rows).double() + NoisyReward(zeros, kind, 5)(*rows))


@pytest.mark.parametrize("sources, gold, reward, own", [
    ("P", None, "", True), ("P", None, "none", True), ("P", None, "some/model", False),
    ("P", "gold", "", False), ("D", None, "", False), ("DP", None, "none", False)])
def test_data_scores_itself_where_a_reward_is_named_or_scores_are_gold(toy, monkeypatch, sources, gold,
                                                                       reward, own):
    monkeypatch.setattr(harness.samples, "reward_to_maximise", lambda run: "the reward")
    run = toy_run(toy, Task("toy", {"train": ["a"], "test": ["b"]}, gold=gold), reward=reward)
    assert harness.candidate_reward(run, sources) == (None if own else "the reward")


# --------------------------------------------------------------------------------------------------- rollouts

def test_rollout_miscounts_tokens_or_seconds(toy, tmp_path, monkeypatch, clock):
    run = started(toy, tmp_path)
    slow(monkeypatch, clock, common, "generate", 3)
    slow(monkeypatch, clock, common, "decode", 100)                 # not generating any more
    prompts, tokens = [p.prompt for p in PAIRS[:20]] + ["abcdefgh"] * 20, 0
    for greedy in (False, True):
        batch, texts, ended = harness.rollout(run, prompts, greedy)
        lengths = torch.tensor([len(text) for text in texts]) + ended
        assert torch.equal(batch.lengths, lengths)          # EOS is generated too
        assert greedy or 0 < ended.sum() < 40, "both kinds are needed, or nothing is tested"
        assert (lengths <= 5).all() and (lengths[~ended] == 5).all()
        inside = batch.attention_mask - batch.response_mask
        asked = [run.tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch.input_ids, inside)]
        assert asked == prompts
        tokens += int(lengths.sum())
    assert run.counts["tokens_generated"] == tokens and run.counts["seconds_generating"] == 6
    assert run.counts["tokens_of_pool"] == 0
    run.count_time()
    assert run.counts["seconds_training"] == 206            # of which six were generating
    assert all(type(value) in (int, float) for value in run.counts.values())      # or state.pt would not load


def test_rollout_ignores_the_temperature_or_greedy(toy, tmp_path):
    texts = {}
    for temperature in (1.0, 1e-4):
        run = started(toy, tmp_path, temperature=temperature)
        for greedy in (False, True):
            torch.manual_seed(0)
            texts[temperature, greedy] = harness.rollout(run, ["abc", "h", "cd"] * 4, greedy)[1]
    assert texts[1.0, True] == texts[1e-4, True] == texts[1e-4, False] != texts[1.0, False]
    assert texts[1.0, True] == texts[1.0, True][:3] * 4


def cut_off(tokenizer, texts):
    """A batch of these answers to "a"; a text that ends with "-" did not reach EOS."""
    return common.pack([([1], tokenizer(text.rstrip("-")).input_ids + [0] * (text[-1:] != "-"))
                        for text in texts], 0)


GOES_WELL, NONE_ENDS, ALL_EMPTY = ["ab", "", "cd-"], ["ab-", "cd-", "e-"], ["", "", ""]


@pytest.mark.parametrize("answers, said", [
    ([GOES_WELL] * 3, None), ([["", "a-"]], None), ([["", "a"]], None),
    ([NONE_ENDS, NONE_ENDS, ALL_EMPTY], "step 1: 0 of 3 responses end with EOS, 0 are empty"),
    ([GOES_WELL, ALL_EMPTY, NONE_ENDS], "step 2: 3 of 3 responses end with EOS, 3 are empty"),
    ([GOES_WELL, GOES_WELL, NONE_ENDS, GOES_WELL, NONE_ENDS],
     "step 3: 0 of 3 responses end with EOS, 0 are empty")],
    ids=["well", "one ends", "one is not empty", "none ends", "all empty", "later"])
def test_policy_that_never_stops_or_says_nothing_goes_unnoticed(toy, tmp_path, monkeypatch, capsys, answers,
                                                                said):
    for name in ("first", "second"):                        # once a run, not once a process
        run = started(toy, tmp_path / name)
        capsys.readouterr()
        for run.step, texts in enumerate(answers):
            monkeypatch.setattr(common, "generate", lambda *_, **__: cut_off(run.tokenizer, texts))
            _, got, ended = harness.rollout(run, ["a"] * 3)
            assert got == [text.rstrip("-") for text in texts]
            assert ended.tolist() == [not text.endswith("-") for text in texts]
        warnings = capsys.readouterr().err.splitlines()
        assert len(warnings) == (said is not None)
        assert all(line.startswith(f"warning: {said}") and "--max_new_tokens is 5" in line
                   for line in warnings)


# ------------------------------------------------------------------------------------- samples and candidates

POOL = {"ab": Ranking("ab", ["a", "bb", "ccc"], [], ended=[True, False, True]),
        "c": Ranking("c", ["dddd", "e"], [], ended=[True, True]),
        "def": Ranking("def", ["f", "g", "h"], [], ended=[True, True, False])}


def pool_run(toy, monkeypatch, **settings):
    """A run whose task has a pool; rollouts are numbered, and every third is cut off."""
    run = toy_run(toy, Task("toy", {"train": [*POOL], "test": ["g"]}, pool=POOL), **settings)

    def rollout(run, prompts):
        return None, [f"{prompt} {i}" for i, prompt in enumerate(prompts)], torch.arange(len(prompts)) % 3 > 0

    monkeypatch.setattr(harness.samples, "rollout", rollout)
    return run


def test_pool_of_the_initial_policy_is_not_used_or_not_in_part_or_its_cut_samples_end(toy, monkeypatch):
    run = pool_run(toy, monkeypatch)
    rows = harness.sample_rankings(run, ["c", "ab"], 2)
    assert rows == [Ranking("c", ["dddd", "e"], [], ended=[True, True]),
                    Ranking("ab", ["a", "bb"], [], ended=[True, False])]
    assert run.counts["tokens_generated"] == 5 + 2 + 2 + 1 + 1           # as if generated: EOS, where it came
    harness.sample_rankings(run, ["def"], 3)
    assert run.counts["tokens_generated"] == 11 + 4 + 1 and type(run.counts["tokens_generated"]) is int
    assert run.counts["tokens_of_pool"] == run.counts["tokens_generated"]             # none was sampled here
    assert run.counts["seconds_generating"] == 0


def test_samples_of_the_pool_cost_others_than_fresh_ones(toy):
    """What was generated once for every method counts for each, as if the run had sampled it itself."""
    fresh = toy_run(toy)
    rows = harness.sample_rankings(fresh, ["ab", "c"] * 4, 4)
    pool = {f"{row.prompt}{i}": row._replace(prompt=f"{row.prompt}{i}") for i, row in enumerate(rows)}
    run = toy_run(toy, Task("toy", {"train": [*pool], "test": ["g"]}, pool=pool))
    again = harness.sample_rankings(run, list(pool), 4)
    assert [row[1:] for row in again] == [row[1:] for row in rows]
    assert {ended for row in rows for ended in row.ended} == {True, False}
    assert run.counts["tokens_generated"] == fresh.counts["tokens_generated"] > 0


@pytest.mark.parametrize("settings, prompts, n", [
    (dict(step=1), ["ab", "c"], 2), (dict(temperature=0.7), ["ab", "c"], 2),
    (dict(policy="another"), ["ab", "c"], 2), ({}, ["ab", "c"], 3), ({}, ["ab", "stranger"], 2)],
    ids=["trained policy", "temperature", "another policy", "more than the pool has",
         "prompt without a pool"])
def test_pool_stands_for_samples_of_another_policy(toy, monkeypatch, settings, prompts, n):
    """The samples go to their prompts, n each, a cut-off one is known as such; `ended` holds plain bools."""
    run = pool_run(toy, monkeypatch, **({"policy": str(toy)} if "policy" in settings else settings))
    rows = harness.sample_rankings(run, prompts, n)
    places = [range(i * n, i * n + n) for i in range(len(prompts))]
    assert rows == [Ranking(prompt, [f"{prompt} {i}" for i in place], [], ended=[i % 3 > 0 for i in place])
                    for prompt, place in zip(prompts, places)]
    assert all(type(value) is bool for row in rows for value in row.ended)


def test_samples_are_not_the_policys_own_or_are_not_counted(toy):
    run = toy_run(toy, max_new_tokens=3)
    rows = harness.sample_rankings(run, ["ab", "c"] * 8, 4)
    assert [row.prompt for row in rows] == ["ab", "c"] * 8 and {len(row.responses) for row in rows} == {4}
    flat = [(text, ended) for row in rows for text, ended in zip(row.responses, row.ended)]
    assert all(len(text) == 3 for text, ended in flat if not ended)
    assert {ended for _, ended in flat} == {True, False}
    assert run.counts["tokens_generated"] == sum(len(text) + ended for text, ended in flat)


@pytest.mark.parametrize("ranking, want", [
    (Ranking("p", ["a", "b", "a", "c", "b"], [1, 2, 3, 4, 5], [*"vwxyz"], [True, False, False, True, True]),
     Ranking("p", ["a", "b", "c"], [1, 2, 4], ["v", "w", "y"], [True, False, True])),
    (Ranking("p", ["a", "a"], [], (), [False, True]), Ranking("p", ["a"], [], [], [False])),
    (Ranking("p", ["b", "a"], [0.0, 0.0]), Ranking("p", ["b", "a"], [0.0, 0.0], [], []))])
def test_equal_responses_lose_the_firsts_own_score_or_ended(ranking, want):
    assert harness.samples.distinct(ranking) == want


def letters(prompts, texts):
    return torch.tensor([text.count("a") + (100.0 if prompt == "c" else 0)
                         for prompt, text in zip(prompts, texts)])


def test_scores_go_to_other_responses_or_old_ones_stay(toy):
    rows = [Ranking("ab", ["a", "aa", "a"], [9, 9, 9], [*"xyz"], [True, False, True]),
            Ranking("c", ["b"], []), MIXED]
    run = toy_run(toy)
    assert harness.scored(run, rows, letters) == [
        rows[0]._replace(scores=[1, 2, 1]), Ranking("c", ["b"], [100]), MIXED._replace(scores=[1, 0])]
    assert run.counts["tokens_scored_reward"] == 0               # equal samples all count; it reads no tokens


def test_score_of_nan_ranks_or_another_prompt_is_named(toy):
    rows = [Ranking("ab", ["a", "a", "b"], []), Ranking("culprit", ["c", "d"], []), Ranking("e", ["f"], [])]
    with pytest.raises(UserError, match="step 3: the reward is nan for the prompt 'culprit'"):
        harness.scored(toy_run(toy, step=2), rows, lambda prompts, texts: torch.tensor(
            [math.nan if text == "d" else 1.0 for text in texts]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_AD_one_of_several_scores_that_is_not_finite_passes(toy, value):
    scores = torch.tensor([[1.0, 2.0], [3.0, value], [5.0, 6.0]])
    with pytest.raises(UserError, match=f"step 1: the reward is {value} for the prompt 'b'"):
        harness.score(toy_run(toy), lambda *texts: scores, ["a", "b", "c"], ["", "", ""])
    fine = scores.nan_to_num(7.0, 7.0, 7.0)
    assert harness.score(toy_run(toy), lambda *texts: fine, ["a", "b", "c"], ["", "", ""]) is fine


@pytest.mark.parametrize("noise", ["none", "prompt", "response"])
def test_tokens_that_the_reward_reads_are_not_counted_or_those_of_an_evaluation_are(toy, tmp_path, noise):
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward", mean=0.0, std=1.0),
                  reward_noise=noise)
    reward = harness.reward_to_maximise(run)
    assert isinstance(reward, NoisyReward) == (noise != "none") and run.counts["tokens_scored_reward"] == 0
    texts = ["ab", "c", "def"], ["d", "", "abc"]
    scores = harness.score(run, reward, *texts)
    torch.testing.assert_close(scores, reward(*texts))                   # which it counts not again
    assert run.counts["tokens_scored_reward"] == 3 + 1 + 6 + 3           # of prompts and texts, and EOS
    run.evaluate()
    assert run.counts["tokens_scored_reward"] == 13 and type(run.counts["tokens_scored_reward"]) is int
    harness.scored(run, [Ranking("ab", ["d", "d"], [])], reward)
    assert run.counts["tokens_scored_reward"] == 13 + 2 * 4
    assert run.counts["tokens_scored_reference"] == run.counts["tokens_scored_value"] == 0


def test_demonstrations_are_scored_as_cut_off_or_others_than_the_first_are_taken(toy):
    rows = [Demonstration("ab", "aca"), Demonstration("c", "d"), Demonstration("ab", "a", {"q": 3})]
    run = toy_run(toy, Task("toy", {"train": ["ab"], "test": ["g"]}, ratings={"train": rows[2:]},
                            demonstrations={"train": rows}))
    got = harness.scored_demonstrations(run, letters, 9)
    assert got == [Ranking("ab", ["a"], [1], ended=[True]), Ranking("ab", ["aca"], [2], ended=[True]),
                   Ranking("c", ["d"], [100], ended=[True])]
    assert harness.scored_demonstrations(run, letters, 1) == got[:2]
    with pytest.raises(UserError, match="the data has no demonstrations: give rows of prompt and completion"):
        harness.scored_demonstrations(toy_run(toy), letters, 9)


def ranked_task():
    rows = [Ranking("ab", ["strong a", "weak a"], [2.0, 1.0], ["strong", "weak"]),
            Ranking("c", ["weak c"], [0.0], ["weak"]),
            Ranking("def", ["x", "y", "x"], [3.0, 4.0, 5.0]), Ranking("g", ["strong g"], [7.0], ["strong"])]
    return Task("toy", {"train": ["ab", "c", "def"], "test": ["g"]}, rankings={"train": rows, "test": rows})


@pytest.mark.parametrize("systems, want", [
    ("", [("ab", ["strong a", "weak a"], [2, 1]), ("c", ["weak c"], [0]),
          ("def", ["x", "y", "x"], [3, 4, 5])]),
    ("weak", [("ab", ["weak a"], [1]), ("c", ["weak c"], [0]), ("def", ["x", "y", "x"], [3, 4, 5])]),
    ("strong,nobody", [("ab", ["strong a"], [2]), ("def", ["x", "y", "x"], [3, 4, 5])])])
def test_given_answers_are_of_other_writers_or_to_test_prompts(systems, want):
    for sources in ("P", "DP"):
        rows = harness.given_answers(ranked_task(), sources, systems)
        assert [(row.prompt, row.responses, row.scores) for row in rows] == want
        assert all(row.ended == [True] * len(row.responses) for row in rows)
    assert harness.given_answers(ranked_task(), "D", systems) == []


def test_data_without_answers_or_without_such_a_writer_trains_on_nothing():
    task = ranked_task()
    task.rankings = {"train": task.rankings["train"][:2]}
    with pytest.raises(UserError,
                       match="no answers of its own by nobody to rank .*strong, weak.*--sources D"):
        harness.given_answers(task, "P", "nobody")
    with pytest.raises(UserError, match="the data has no answers of its own to rank"):
        harness.given_answers(Task("toy", {"train": ["a"], "test": ["b"]}), "DP")


def test_candidates_are_out_of_order_or_without_the_given_ones(toy, monkeypatch, capsys):
    run = pool_run(toy, monkeypatch)
    given = [Ranking("c", ["given a", "dddd"], [5.0, 6.0], ended=[True, True]),
             Ranking("ab", ["aa"], [7.0], ended=[True])]
    assert harness.candidates(run, letters, given, 2) == [
        Ranking("c", ["dddd", "e", "given a"], [100, 100, 101], [], [True] * 3),
        Ranking("ab", ["a", "bb", "aa"], [1, 0, 2], [], [True, False, True])]
    assert capsys.readouterr().err == ""
    first = harness.candidates(run, letters, given, 0)[0]
    assert first == Ranking("c", ["given a", "dddd"], [101, 100], [], [True] * 2)
    assert harness.candidates(run, None, given, 0) == [row._replace(systems=[]) for row in given]
    run.step = 1                                         # samples anew: the first and every third are cut off
    assert [row.prompt for row in harness.candidates(run, letters, [], 2)] == run.task.prompts["train"]
    row = harness.candidates(run, letters, given, 2)[0]
    assert row.responses == ["c 0", "c 1", "given a", "dddd"] and row.ended == [False, True, True, True]


def test_rankings_without_an_order_are_not_counted_or_are_left_out(toy, monkeypatch, capsys):
    run = pool_run(toy, monkeypatch)
    texts = [("a", [1]), ("bb", [1, 2]), ("cd", [1, 1]), ("efg", [3, 3, 3]), ("hi", [1, 2]), ("jk", [4, 4])]
    given = [Ranking("ab", [*responses], scores) for responses, scores in texts]
    assert len(harness.candidates(run, None, given, 0)) == 6
    printed = capsys.readouterr()
    line, = printed.err.splitlines()
    assert "of 6 rankings, 2 have one response only and 3 have equal scores" in line and not printed.out


# ------------------------------------------------------------------------------------------------- log-probs

def plain_logp(model, prompt, text, ended=True):
    """log pi(y|x) and |y| by a forward pass over this text alone."""
    ids = ["abcdefgh".index(c) + 1 for c in prompt + text] + [0] * (ended or not text)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))), len(ids) - len(prompt)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_logps_of_rows_are_out_of_order_or_of_another_model(toy, budget):
    run, rows = toy_run(toy, token_budget=budget), [Pair("abcdef", "hhhh", "a"), GOOD, BAD, MIXED]
    other = harness.load_policy(run.config)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    for model in (None, other):
        logps, lengths = harness.response_logps(run, rows, model)
        assert not logps.requires_grad and logps.shape == lengths.shape == (4, 2)
        for i, row in enumerate(rows):
            for j, text in enumerate(row.responses):
                value, length = plain_logp(model or run.policy, row.prompt, text, row is not MIXED or j == 0)
                assert logps[i, j].item() == pytest.approx(value, abs=1e-4) and lengths[i, j] == length
    assert harness.response_logps(run, [])[0].shape == (0, 0)
    assert not any(run.counts.values())                            # unless it is said where
    harness.response_logps(run, rows, other, "tokens_scored_reference")
    read = (11 + 8) + (5 + 4) + (5 + 2) + (3 + 3)                  # prompts, texts, EOS of all four rows
    assert run.counts["tokens_scored_reference"] == read == sum(run.counts.values())


def test_nll_or_accuracy_of_held_out_pairs_is_per_sequence(toy, monkeypatch):
    """Per token: -1 above -3, -2 below -1, a tie; by whole sequences the second pair would be right."""
    logps, lengths = torch.tensor([[-2.0, -9], [-2, -3], [-4, -6]]), torch.tensor([[2.0, 3], [1, 3], [2, 3]])
    monkeypatch.setattr(harness.samples, "response_logps", lambda run, pairs: (logps, lengths))
    metrics = harness.score_metrics(None, [GOOD] * 3)
    error = math.sqrt(0.25 / 3)                                     # of 1, 0 and 0.5, a sample of three
    assert metrics == {"eval/score_accuracy": 0.5, "eval/score_accuracy_se": pytest.approx(error),
                       "eval/nll": pytest.approx(8 / 5)}
    assert harness.score_metrics(None, []) == {}


# -------------------------------------------------------------------------------- labels of the embedded task

@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_label_noise_turns_another_share_round_or_loses_the_text(share):
    pairs = [Pair(f"p{i}", f"good {i}", f"bad {i}") for i in range(4000)]
    noisy = build.with_noise(pairs, Config(label_noise=share))
    turned = [new != old for new, old in zip(noisy, pairs, strict=True)]
    assert sum(turned) / 4000 == pytest.approx(share, abs=0.03) and (share or not any(turned))
    assert all(not turn or new == Pair(old.prompt, old.rejected, old.chosen)
               for new, old, turn in zip(noisy, pairs, turned))
    assert build.with_noise(pairs, Config(label_noise=share)) == noisy
    assert not share or build.with_noise(pairs, Config(label_noise=share, seed=1)) != noisy


@pytest.fixture
def unbuilt(tmp_path, monkeypatch):
    """The embedded task without models: their directory holds samples alone.

    {what would be trained: its pairs}. Of each prompt's four samples the third was cut off.
    """
    prompt, rng, trained = reviews.make_prompts("train", 1, 0)[0], random.Random(0), {}
    texts = sorted((reviews.write("crowd", prompt, rng) for _ in range(20)),
                   key=lambda text: reviews.gold(prompt, text))
    row = {"prompt": prompt, "responses": texts[-4:], "gold": [0.0, 1.0, 0.5, 2.0],
           "ended": [True, True, False, True], "ids": [[]] * 4}
    (tmp_path / "samples.json").write_text(json.dumps(dict.fromkeys(("pool", "shown", "test"), [row] * 50)),
                                           encoding="utf-8")
    tasks.write_json(tmp_path / "rankings.json", build.ranked([prompt, prompt], 0))
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    monkeypatch.setattr(build, "rate", lambda path, pairs, pool, config: trained.update({path.name: pairs}))
    return SimpleNamespace(path=tmp_path, prompt=prompt, texts=texts, trained=trained)


def test_noisy_proxy_is_the_clean_one_or_sees_other_labels_than_the_method(unbuilt):
    clean, noisy = build.load_task(Config()), build.load_task(Config(label_noise=0.25))
    assert build.proxy(Config()) == unbuilt.path / "proxy" and not unbuilt.trained
    path = build.proxy(Config(label_noise=0.25))
    assert unbuilt.trained == {path.name: noisy.pairs["train"]} and path.parent == unbuilt.path
    others = [build.proxy(Config(**options)) for options in
              ({}, dict(label_noise=0.2), dict(proxy_pairs="off_policy"),
               dict(proxy_pairs="off_policy", label_noise=0.25))]
    assert len({path, *others}) == 5
    assert clean.pairs["train"] != noisy.pairs["train"] and clean.pairs["test"] == noisy.pairs["test"]
    prompt, texts, rng = unbuilt.prompt, unbuilt.texts, random.Random(0)
    right, noisy_right = (sum(task.annotate(prompt, texts[-1], texts[0], rng) for _ in range(2000)) / 2000
                          for task in (clean, noisy))
    assert right > 0.7 and noisy_right == pytest.approx(0.75 * right + 0.25 * (1 - right), abs=0.04)


def test_few_data_are_other_rows_or_leave_the_proxy_or_the_test_as_it_was(unbuilt, monkeypatch):
    whole, few = build.load_task(Config()), build.load_task(Config(limit=10))
    for name in ("train", "off_policy"):
        assert few.pairs[name] == whole.pairs[name][:len(whole.pairs[name]) // 5]
    assert few.prompts["train"] == whole.prompts["train"][:10]
    assert len(few.ratings["train"]) * 5 == len(whole.ratings["train"])
    for name in ("prompts", "pairs"):
        assert getattr(few, name)["test"] == getattr(whole, name)["test"]
    paths = [build.proxy(Config(**options)) for options in
             ({}, dict(limit=10), dict(limit=20), dict(limit=10, label_noise=0.1))]
    assert len({*paths}) == 4 and paths[0] == unbuilt.path / "proxy"
    assert unbuilt.trained[paths[1].name] == few.pairs["train"]
    monkeypatch.setattr(build, "RANKED", 52)                       # about a tenth as many as prompts
    few = build.load_task(Config(limit=10, seed=1))
    assert few.rankings["train"] == whole.rankings["train"][:1] and len(whole.rankings["train"]) == 2


def test_task_is_shared_between_runs_that_change_it(unbuilt):
    first, again = build.load_task(Config()), build.load_task(Config())
    assert first.pairs["train"] is again.pairs["train"]                          # made once
    first.ratings["train"] = first.prompts["train"] = []
    assert again.ratings["train"] and again.prompts["train"] and build.load_task(Config()).ratings["train"]
    assert build.load_task(Config(rating_noise=0.0)).ratings["train"] != again.ratings["train"]


@pytest.mark.parametrize("layers, low, high", [(1, 0.15e6, 0.25e6), (3, 1.0e6, 1.3e6)])
def test_larger_tiny_model_is_not_larger_or_lies_where_the_small_one_does(layers, low, high):
    model = build.tiny_model(build.tiny_tokenizer(160), layers)
    assert low < sum(weight.numel() for weight in model.parameters()) < high
    assert model.config.num_hidden_layers == layers
    homes = {build.home(Config(layers=n, seed=seed)) for n in (1, 2, 3) for seed in (0, 1)}
    assert len(homes) == 6 and build.home(Config()).name == "seed0"


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_proxy_of_another_writers_texts_learns_from_samples(unbuilt, share):
    config = Config(proxy_pairs="off_policy", label_noise=share)
    path, task = build.proxy(config), build.load_task(config)
    assert unbuilt.trained == {path.name: task.pairs["off_policy"]} and len(task.pairs["off_policy"]) == 300
    assert {p.prompt for p in task.pairs["off_policy"]} == {unbuilt.prompt}
    assert not {text for p in task.pairs["off_policy"] for text in p.responses} & {*unbuilt.texts}
    # the method's own pairs are samples as before
    assert task.pairs["train"] == build.load_task(Config(label_noise=share)).pairs["train"]


def test_gold_labels_leave_pairs_wrong_or_change_the_proxy_or_the_texts(unbuilt):
    prompt, config = unbuilt.prompt, Config(pair_labels="gold")
    people, gold = build.load_task(Config()), build.load_task(config)
    gaps = [reviews.gold(prompt, p.chosen) - reviews.gold(prompt, p.rejected) for p in gold.pairs["train"]]
    assert min(gaps) >= 0 < max(gaps)
    assert [{*p} for p in gold.pairs["train"]] == [{*p} for p in people.pairs["train"]]
    wrong = sum(a != b for a, b in zip(gold.pairs["train"], people.pairs["train"]))
    assert wrong > 0                                                # or there is nothing to put right
    assert {name: gold.pairs[name] == people.pairs[name] for name in gold.pairs} == {
        "train": False, "test": True, "off_policy": True}
    assert build.proxy(config) == unbuilt.path / "proxy" and not unbuilt.trained
    assert build.load_task(replace(config, label_noise=0.4)).pairs["train"] == gold.pairs["train"]


def test_scores_of_the_writers_are_not_gold_or_of_another_writer(unbuilt):
    rows = build.load_task(Config()).rankings["train"]
    assert len(rows) == 2 and rows[0] != rows[1] and {row.prompt for row in rows} == {unbuilt.prompt}
    for row in rows:
        assert row.systems[-2:] == ["chatty", "dry"] and {*row.systems} == {*reviews.WRITERS}
        assert row.scores == [reviews.gold(row.prompt, text) for text in row.responses]
        assert abs(row.scores[-1] - row.scores[-2]) < 0.05 and len(row.responses) == len(row.systems)
    prompts = reviews.make_prompts("train", 200, 0)
    golds = {name: [] for name in reviews.WRITERS}
    for _, _, scores, names in build.ranked(prompts, 1):
        for name, gold in zip(names, scores, strict=True):
            golds[name].append(gold)
    mean = {name: sum(values) / len(values) for name, values in golds.items()}
    assert mean["strong"] > mean["medium"] + 0.2 > mean["weak"] + 0.4
    assert build.ranked(prompts[:3], 1) == build.ranked(prompts[:3], 1) != build.ranked(prompts[:3], 2)


def test_people_see_samples_that_were_cut_off(unbuilt):
    task, cut = build.load_task(Config()), unbuilt.texts[-2]
    for split in ("train", "test"):
        shown = {text for p in task.pairs[split] for text in p.responses}
        assert shown == {*unbuilt.texts[-4:]} - {cut} and 0 < len(task.pairs[split]) < 100
        assert {row.response for row in task.ratings[split]} == shown and len(task.ratings[split]) == 150
    row = task.pool[unbuilt.prompt]
    assert row == Ranking(unbuilt.prompt, unbuilt.texts[-4:], [], ended=[True, True, False, True])


def test_samples_of_the_policy_are_all_taken_for_complete(toy):
    config = settings(toy)
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    prompts = [*"abcdefgh"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reviews, "gold", lambda prompt, text, ended: float(ended) + len(text) / 100)
        patch.setattr(build, "LIMITS", {"max_new_tokens": 5})
        rows = build.sample(policy, tokenizer, prompts, 6)
    assert [row["prompt"] for row in rows] == prompts and {len(row["ended"]) for row in rows} == {6}
    ends = [(text, ended) for row in rows for text, ended in zip(row["responses"], row["ended"])]
    assert all(len(text) == 5 for text, ended in ends if not ended) and {e for _, e in ends} == {True, False}
    assert [g for row in rows for g in row["gold"]] == [float(e) + len(text) / 100 for text, e in ends]


def test_judge_of_the_task_is_another_person_for_the_same_text_or_the_same_under_two_seeds(unbuilt):
    row, text = unbuilt.prompt, unbuilt.texts[0]
    first, again, other = (build.load_task(Config(seed=seed)).opinion(row, text) for seed in (0, 0, 1))
    assert first == again == reviews.opinion(row, text, 0) != other


@pytest.mark.parametrize("noise", ["prompt", "response"])
def test_noise_is_left_out_where_the_data_scores_itself(toy, monkeypatch, noise):
    monkeypatch.setattr(harness.samples, "reward_to_maximise", lambda run: "the reward")
    run = toy_run(toy, Task("toy", {"train": ["a"], "test": ["b"]}), reward_noise=noise)
    assert harness.candidate_reward(run, "P") == "the reward"


def test_limit_or_columns_do_not_reach_the_data(toy, tmp_path):
    rows = [{"question": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in PAIRS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings(toy, data=str(tmp_path / "rows.jsonl"), columns="prompt=question", limit=7)
    prompts = harness.load_task(config).prompts
    assert sorted(prompts["train"] + prompts["test"]) == sorted(p.prompt for p in PAIRS[:7])


def test_date_in_a_chat_template_trains_a_new_reward_model_after_midnight(toy):
    config, question = settings(toy, reward_lr=1e-3), ({"role": "user", "content": "hi"},)
    days = [[Pair(Prompt(f"{day}: hi", question), "a", "b")] for day in ("1 May", "2 May")]
    first, second = (harness.trained_path(config, pairs) for pairs in days)
    other = [Pair(Prompt("1 May: hi", ({"role": "user", "content": "ho"},)), "a", "b")]
    assert first == second != harness.trained_path(config, other)


def test_reward_model_that_read_shorter_texts_or_had_an_adapter_is_taken_from_the_cache(toy):
    paths = {harness.trained_path(settings(toy, reward_lr=1e-3, **other), PAIRS)
             for other in ({}, dict(max_length=32), dict(lora_rank=4), dict(lora_rank=8))}
    assert len(paths) == 4
