"""common.py: options, training loops, evaluation, and runs that are killed and resumed.

Letters are the bug classes that a test would catch. Models are random, over eight letters.
"""
import json
import math
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import common
import conditioning
import dpo
import lm
import ppo
import stages
from common import Config
from tasks import Demonstration, Pair, Task, UserError


def llama_config(**kwargs):
    return LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=96, initializer_range=0.3, eos_token_id=0, pad_token_id=0, bos_token_id=None,
                       **kwargs)


def toy_tokenizer():
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<eos>", *"abcdefgh"])}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", model_max_length=64)


def save(path, cls=LlamaForCausalLM, **kwargs):
    torch.manual_seed(0)
    cls(llama_config(**kwargs)).save_pretrained(path)
    toy_tokenizer().save_pretrained(path)
    return path


PAIRS = [Pair(p, "a" * (1 + i % 3) + "c", "b" * (1 + i % 4)) for i, p in enumerate(x + y for x in "cdefgh" for y in "cdefgh")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A directory with the toy policy and pairs.jsonl."""
    path = save(tmp_path_factory.mktemp("toy"))
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in PAIRS))
    return path


@pytest.fixture(autouse=True)
def no_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(conditioning, "ROOT", tmp_path / "root")


def settings(toy, cls=Config, **kwargs):
    return cls(**{**dict(model=str(toy), data=str(toy / "pairs.jsonl"), reward="none", max_length=64, max_new_tokens=5, lr=1e-2,
                         warmup=0.0, batch_size=6, eval_prompts=3, eval_samples=4, device="cpu", quiet=True), **kwargs})


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ----------------------------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("wrong, message", [
    *[({name: 0}, f"--{name} must be above 0") for name in ("lr", "batch_size", "token_budget", "temperature", "max_new_tokens",
                                                            "eval_prompts", "eval_samples", "seeds")],
    *[({name: -1}, f"--{name} must not be negative") for name in ("epochs", "limit", "seed", "eval_every", "save_every", "warmup")],
    (dict(lr=math.nan), "--lr"), (dict(max_new_tokens=41), "--max_new_tokens 41 is more than a quarter of --max_length 160"),
    (dict(resume=True), "--resume needs --out"), (dict(model="some/model"), "--model some/model needs --data")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, message):
    with pytest.raises(UserError, match=message):
        Config(**wrong)


def test_defaults_do_not_follow_the_model_or_override_what_is_given():
    tiny, real = Config(), Config(model="some/model", data="x.jsonl")
    assert (tiny.lr, tiny.max_new_tokens, tiny.max_length) == (5e-4, 40, 160)
    assert (real.lr, real.max_new_tokens, real.max_length) == (1e-6, 128, 512)
    assert Config(lr=0.5).lr == 0.5 and Config(max_new_tokens=7).max_new_tokens == 7


# ---------------------------------------------------------------------------------------------------------- training

def test_epochs_skip_or_repeat_rows():
    config = Config(batch_size=4, epochs=2.0)
    steps = common.epochs(10, config)
    order = sum(steps, [])
    assert [len(s) for s in steps] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert sum(common.epochs(10, replace(config, epochs=1.5)), []) == order[:15]
    assert [len(s) for s in common.epochs(10, replace(config, epochs=1.0))] == [4, 4, 2]
    assert common.epochs(10, replace(config, epochs=0.0)) == []


def test_epochs_ignore_the_seed_or_are_not_reproducible():
    first, again, other = (common.epochs(50, Config(seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_sft_does_not_learn_the_responses(toy):
    config = settings(toy, epochs=40.0, batch_size=2)
    model, tokenizer = common.load_policy(config), common.load_tokenizer(toy, config)
    rows = [Demonstration("ab", "cde"), Demonstration("h", "gg")]
    batch = common.encode(tokenizer, [d.prompt for d in rows], [d.response for d in rows])
    before = -common.sequence_logps(model, batch).mean().item()
    common.train_sft(model, tokenizer, rows, config)
    after = -common.sequence_logps(model, batch).mean().item()
    assert before > 4 and after < 0.3


def reward_accuracy(model, tokenizer, pairs):
    reward = common.RewardModel(model, tokenizer)
    prompts, chosen, rejected = zip(*pairs)
    return (reward(prompts, chosen) > reward(prompts, rejected)).float().mean().item()


def test_reward_model_learns_the_labels_backwards(toy):
    config = settings(toy, epochs=6.0)
    tokenizer = common.load_tokenizer(toy, config)
    model = common.load(common.AutoModelForSequenceClassification, toy, config, num_labels=1)
    common.train_reward_model(model, tokenizer, PAIRS[:-6], config)
    assert reward_accuracy(model, tokenizer, PAIRS[-6:]) == 1
    assert reward_accuracy(model, tokenizer, [p._replace(chosen=p.rejected, rejected=p.chosen) for p in PAIRS[-6:]]) == 0


def sgd(model, optimizer, schedule, config):
    """Stands in for optimizer_step: Adam's first steps hide a gradient's scale, and clipping does too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
            parameter.grad = None


def test_O_token_budget_changes_the_gradient_of_fit(toy, monkeypatch):
    monkeypatch.setattr(stages, "optimizer_step", sgd)
    calls, results = [], []
    rows = [Demonstration(p, r) for p, r in (("a", "bcdefg"), ("abcd", "h"), ("ef", "gh"), ("c", "cc"), ("hhh", "abc"))]

    def spy(model, batch, part):
        calls.append(len(batch))
        answers = [rows[i].response for i in part]
        assert common.decode(tokenizer, batch) == answers, "part does not say which rows the batch holds"
        return -common.sequence_logps(model, batch)

    for budget in (1, 16, 100000):
        config = settings(toy, token_budget=budget, batch_size=3)
        model, tokenizer = common.load_policy(config).double(), common.load_tokenizer(toy, config)
        start = parameters(model).clone()
        calls.clear()
        results.append(parameters(common.fit(model, tokenizer, [(d.prompt, [d.response]) for d in rows], spy, config, "")))
        assert sum(calls) == 5 and (budget != 1 or calls == [1] * 5) and (budget != 100000 or calls == [3, 2])
    assert (results[0] - start).abs().max() > 1e-3
    assert all((r - results[0]).abs().max() < 1e-6 for r in results)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_AD_loss_that_is_not_finite_passes(value):
    common.check_finite(torch.tensor([1.0, 2.0]), 7, ["good", "fine"])
    with pytest.raises(UserError) as error:
        common.check_finite(torch.tensor([1.0, value]), 7, ["good", "culprit"], "reward")
    assert "step 7" in str(error.value) and "'culprit'" in str(error.value) and "reward" in str(error.value)
    assert "good" not in str(error.value)


def test_AD_fit_steps_on_a_loss_that_is_not_finite(toy):
    config = settings(toy)
    model, tokenizer = common.load_policy(config), common.load_tokenizer(toy, config)
    before = parameters(model).clone()
    with pytest.raises(UserError, match="step 1: loss is nan for the prompt 'ab'"):
        common.fit(model, tokenizer, [("ab", ["c"])], lambda model, batch, _: common.sequence_logps(model, batch) * math.nan, config, "")
    assert torch.equal(parameters(model), before)


def test_O_gradient_is_clipped_per_tensor_or_norm_is_taken_after():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))])
    model[0].grad, model[1].grad = torch.tensor([30.0]), torch.tensor([40.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)
    assert common.optimizer_step(model, optimizer, schedule, Config(max_grad_norm=5.0)) == pytest.approx(50)
    assert [p.item() for p in model] == pytest.approx([-3, -4], abs=1e-4)
    assert all(p.grad is None for p in model) and schedule.get_last_lr() == [0.5]


# ---------------------------------------------------------------------------------------------------- task and files

def test_killed_write_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    common.write_json(path, {"a": "ä"})
    with pytest.raises(TypeError):
        common.write_json(path, {"b": [1, object()]})
    assert json.loads(path.read_text()) == {"a": "ä"}

    def full_disk(self, text):
        with open(self, "w") as file:
            file.write(text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(OSError):
        common.write_json(path, {"c": 1})
    assert json.loads(path.read_text()) == {"a": "ä"}


def pair_task(gold=None):
    return Task("toy", {"train": [p.prompt for p in PAIRS[:-6]], "test": [p.prompt for p in PAIRS[-6:]]},
                pairs={"train": PAIRS[:-6], "test": PAIRS[-6:]}, gold=gold)


def count_a(prompt, response, ended):
    return float(response.count("a"))


def test_reward_none_is_not_none_or_missing_pairs_crash(toy, capsys):
    assert common.load_rewards(settings(toy), pair_task()) == {}
    assert common.load_rewards(settings(toy, reward=""), Task("toy", {"train": [], "test": []})) == {}
    assert "no pairs to train a reward model" in capsys.readouterr().err


def test_cached_reward_model_is_trained_again_or_is_not_trained(toy, monkeypatch):
    config = settings(toy, reward="", reward_lr=1e-2)
    prompts, chosen, rejected = zip(*PAIRS[-6:])
    first = common.load_rewards(config, pair_task())["proxy"]
    assert (first(prompts, chosen) > first(prompts, rejected)).all()

    def again(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(common, "train_reward_model", again)
    second = common.load_rewards(replace(config, lr=0.1), pair_task())["proxy"]
    assert torch.equal(second(prompts, chosen), first(prompts, chosen))
    for other in (dict(seed=1), dict(reward_lr=1e-3)):
        with pytest.raises(AssertionError, match="trained again"):
            common.load_rewards(replace(config, **other), pair_task())
    with pytest.raises(AssertionError, match="trained again"):
        common.load_rewards(config, replace(pair_task(), pairs={"train": PAIRS[:5]}))


@pytest.mark.parametrize("option", [dict(warmup=0.9), dict(max_grad_norm=0.01)])
def test_cached_reward_model_depends_on_which_run_came_first(toy, tmp_path, monkeypatch, option):
    """Both are options of the method (DPO clips at 10, others at 1), and neither is in the cache's key."""
    config = settings(toy, reward="", reward_lr=1e-2)
    prompts, texts, _ = zip(*PAIRS[-6:])
    alone = common.load_rewards(replace(config, **option), pair_task())["proxy"](prompts, texts)
    monkeypatch.setattr(common, "CACHE", tmp_path / "other")
    common.load_rewards(config, pair_task())
    after_another = common.load_rewards(replace(config, **option), pair_task())["proxy"](prompts, texts)
    torch.testing.assert_close(after_another, alone)


@pytest.mark.parametrize("own", [dict(), dict(batch_size=12, minibatch_size=6), dict(batch_size=64, minibatch_size=64)])
def test_cached_reward_model_is_trained_with_the_batches_of_the_method(toy, tmp_path, monkeypatch, own):
    """It has settings of its own, and a method's checks (does the minibatch divide the batch?) are not about them."""
    prompts, texts, _ = zip(*PAIRS[-6:])
    alone = common.load_rewards(settings(toy, reward="", reward_lr=1e-2), pair_task())["proxy"](prompts, texts)
    monkeypatch.setattr(common, "CACHE", tmp_path / "other")
    config = settings(toy, ppo.Config, **{**dict(reward="", reward_lr=1e-2, batch_size=128), **own})
    torch.testing.assert_close(common.load_rewards(config, pair_task())["proxy"](prompts, texts), alone)


def test_given_reward_model_is_not_used_or_not_scaled(toy, tmp_path):
    path = save(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    prompts, texts, _ = zip(*PAIRS[:4])
    raw = common.load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"reward_scale": {"mean": 2.0, "std": 4.0}}))
    scaled = common.load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    assert raw.std() > 0.01
    torch.testing.assert_close(scaled, (raw - 2) / 4)


# ------------------------------------------------------------------------------------------ what a method maximises

def started(toy, out, **kwargs):
    return common.start(settings(toy, out=str(out), **kwargs))


@pytest.fixture
def gold(monkeypatch):
    """Gives the toy's task a true reward: gold(f)."""
    return lambda f: monkeypatch.setattr(common, "load_task", lambda config: pair_task(f))


@pytest.fixture
def sampled(monkeypatch):
    """What reward_to_maximise asked for and got: (prompts, n, temperature, max_new_tokens, texts) of each sampling."""
    calls, plain = [], stages.generate

    def spy(model, tokenizer, prompts, n=1, temperature=1.0, greedy=False, max_new_tokens=40):
        batch = plain(model, tokenizer, prompts, n, temperature, greedy, max_new_tokens)
        calls.append((list(prompts), n, temperature, max_new_tokens, common.decode(tokenizer, batch)))
        return batch

    monkeypatch.setattr(stages, "generate", spy)
    return calls


def check_normalised(reward, run, calls, raw):
    """Mean 0 and deviation 1 over 4 samples of each of the first batch_size training prompts."""
    (prompts, n, temperature, most, texts), = calls
    assert (prompts, n, temperature, most) == (run.task.prompts["train"][:6], 4, 0.8, 5)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = raw(prompts, texts)
    assert scores.std() > 0.01
    assert (reward.mean, reward.std) == pytest.approx((scores.mean().item(), scores.std().item()))
    got = reward(prompts, texts)
    assert got.shape == (24,) and got.mean().abs() < 1e-5 and got.std().item() == pytest.approx(1)
    torch.testing.assert_close(got, (scores - scores.mean()) / scores.std())


def test_gold_is_not_maximised_or_not_on_the_common_scale(toy, tmp_path, gold, sampled):
    gold(lambda prompt, response, ended: 3 * count_a(prompt, response, ended) + (prompt == "cc") + 10 * ended)
    run = started(toy, tmp_path, reward="gold", temperature=0.8)
    assert set(run.rewards) == {"proxy"}                    # still measured, though not maximised
    proxy = run.rewards["proxy"].mean, run.rewards["proxy"].std
    reward = common.reward_to_maximise(run)
    assert (run.rewards["proxy"].mean, run.rewards["proxy"].std) == proxy
    check_normalised(reward, run, sampled, lambda prompts, texts: torch.tensor(
        [3.0 * text.count("a") + (prompt == "cc") + 10 for prompt, text in zip(prompts, texts)]))


@pytest.mark.parametrize("pairs", [{}, {"train": PAIRS[:-6]}])
def test_gold_is_taken_for_a_directory_or_for_the_proxy_where_there_is_none(toy, pairs):
    task = replace(pair_task(), pairs=pairs)
    with pytest.raises(UserError, match="--reward gold: only the embedded task has a true reward"):
        common.load_rewards(settings(toy, reward="gold"), task)


@pytest.mark.parametrize("reward", ["none", ""])
def test_method_without_a_reward_runs_on_nothing(toy, tmp_path, monkeypatch, reward):
    monkeypatch.setattr(common, "load_task", lambda config: replace(pair_task(), pairs={}))
    run = started(toy, tmp_path, reward=reward)
    with pytest.raises(UserError, match="no reward to maximise: give --reward, or data with pairs"):
        common.reward_to_maximise(run)


def reward_model(path, **scale):
    save(path, LlamaForSequenceClassification, num_labels=1)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | ({"reward_scale": scale} if scale else {})))
    return str(path)


def test_scale_of_a_reward_model_is_measured_anew(toy, tmp_path, sampled):
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward", mean=2.0, std=4.0))
    reward = common.reward_to_maximise(run)
    assert reward is run.rewards["proxy"] and (reward.mean, reward.std) == (2, 4) and not sampled


def test_reward_model_without_a_scale_is_left_raw(toy, tmp_path, sampled):
    run = started(toy, tmp_path / "out", reward=reward_model(tmp_path / "reward"), temperature=0.8)
    unscaled = common.load_reward_model(tmp_path / "reward", run.config)
    reward = common.reward_to_maximise(run)
    assert reward is run.rewards["proxy"]                   # so evaluation shows it on the same scale
    check_normalised(reward, run, sampled, unscaled)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.1, -1.7])
def test_constant_reward_is_divided_by_nothing(toy, tmp_path, gold, value):
    """0.3 has no exact float32: the deviation of 24 of them can come out as 1e-8 instead of 0."""
    gold(lambda prompt, response, ended: value)
    with pytest.raises(UserError, match=f"the reward is {value:.3g} for each of the policy's 24 first samples"):
        common.reward_to_maximise(started(toy, tmp_path, reward="gold"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_AD_reward_that_is_not_finite_becomes_the_scale(toy, tmp_path, gold, value):
    culprit = pair_task().prompts["train"][4]
    gold(lambda prompt, response, ended: value if prompt == culprit else count_a(prompt, response, ended))
    with pytest.raises(UserError, match=f"the reward is {value} for the prompt '{culprit}'"):
        common.reward_to_maximise(started(toy, tmp_path, reward="gold"))


def test_AE_scale_of_the_reward_depends_on_whether_its_model_was_cached(toy, tmp_path):
    """Training it draws random numbers, loading it draws none; a second or a resumed run must get the same scale."""
    scales = []
    for name in ("trained", "cached"):
        reward = common.reward_to_maximise(started(toy, tmp_path / name, reward="", reward_lr=1e-2))
        scales.append((reward.mean, reward.std))
    assert scales[0] == scales[1]


# -------------------------------------------------------------------------------------------------------- evaluation

def test_standard_error_counts_samples_instead_of_prompts():
    mean, error = common.mean_and_error(torch.tensor([[0, 2], [4, 6], [2, 4]]))          # prompts' means: 1, 5, 3
    assert mean == 3 and error == pytest.approx(2 / 3 ** 0.5)
    assert common.mean_and_error(torch.tensor([[1.0, 5.0]])) == (3.0, 0.0)


def test_AE_evaluation_depends_on_the_rng_or_disturbs_it(toy):
    config = settings(toy)
    policy, tokenizer = common.load_policy(config), common.load_tokenizer(toy, config)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = common.evaluate(config, pair_task(count_a), policy, tokenizer, {})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert common.evaluate(config, pair_task(count_a), policy, tokenizer, {}) == first
    other = common.evaluate(replace(config, seed=1), pair_task(count_a), policy, tokenizer, {})
    assert other[1]["responses"] != first[1]["responses"]
    assert len(set(first[1]["responses"])) > 4 and first[1]["prompts"] == [p.prompt for p in PAIRS[-6:-3] for _ in range(4)]


def perturbed(policy, by=0.2):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn_like(parameter)
    return policy


def test_evaluation_gives_wrong_numbers(toy):
    config = settings(toy, eval_samples=64)
    policy, tokenizer = common.load_policy(config), common.load_tokenizer(toy, config)
    start, samples = common.evaluate(config, pair_task(count_a), policy, tokenizer, {})
    assert start["eval/kl"] == 0 and "eval/win_rate" not in start
    assert start["eval/gold"] == pytest.approx(sum(r.count("a") for r in samples["responses"]) / 192)
    words = replace(pair_task(), fluent=lambda text: "a" in text)
    assert common.evaluate(config, words, policy, tokenizer, {})[0]["eval/fluency"] == pytest.approx(
        sum("a" in r for r in samples["responses"]) / 192)
    again, _ = common.evaluate(config, pair_task(count_a), policy, tokenizer, {}, samples)
    assert again["eval/win_rate"] == 0.5
    worse = {**samples, "gold": [g - 1 for g in samples["gold"]]}
    assert common.evaluate(config, pair_task(count_a), policy, tokenizer, {}, worse)[0]["eval/win_rate"] == 1
    changed, _ = common.evaluate(config, pair_task(count_a), perturbed(policy), tokenizer, {}, samples)
    assert changed["eval/kl"] > 3 * changed["eval/kl_se"] > 0 and changed["eval/win_rate"] != 0.5


def test_kl_differs_from_a_direct_computation(toy):
    config = settings(toy, temperature=0.7, token_budget=40)
    policy, tokenizer = perturbed(common.load_policy(config)), common.load_tokenizer(toy, config)
    texts = ["abc", "h", "ggggg", "", "de"]
    prompts = ["a", "bcd", "ef", "g", "hh"]
    kl = common.kl_to_reference(config, policy, common.encode(tokenizer, prompts, texts))
    reference = common.load_reference(config)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        ids = tokenizer(prompt + text).input_ids + [0]
        total = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            with torch.no_grad():
                logps = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            total += sign * sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))
        assert kl[i].item() == pytest.approx(total, abs=1e-4) and abs(total) > 1e-3


def test_AJ_reference_shares_storage_or_can_be_trained(toy):
    config = settings(toy)
    policy, reference = common.load_policy(config), common.load_reference(config)
    assert torch.equal(parameters(policy), parameters(reference))
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert all(p.requires_grad for p in policy.parameters()) and not any(p.requires_grad for p in reference.parameters())


# ----------------------------------------------------------------------------------------------------------- rollouts

@pytest.fixture
def clock(monkeypatch):
    """The time, which passes only where a test says so: clock.now += seconds."""
    clock = SimpleNamespace(now=1000.0)
    for module in (common, stages):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


def slow(monkeypatch, clock, name, seconds):
    module = stages if name in ("generate", "decode") else common     # where it is called
    plain = getattr(module, name)

    def slowly(*args, **kwargs):
        clock.now += seconds
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, slowly)


def test_rollout_miscounts_tokens_or_seconds(toy, tmp_path, monkeypatch, clock):
    run = started(toy, tmp_path)
    slow(monkeypatch, clock, "generate", 3)
    slow(monkeypatch, clock, "decode", 100)                 # not generating any more
    prompts, tokens = [p.prompt for p in PAIRS[:20]] + ["abcdefgh"] * 20, 0
    for greedy in (False, True):
        batch, texts, ended = common.rollout(run, prompts, greedy)
        lengths = torch.tensor([len(text) for text in texts]) + ended
        assert torch.equal(batch.lengths, lengths)          # EOS is generated too
        assert greedy or 0 < ended.sum() < 40, "both kinds are needed, or nothing is tested"
        assert (lengths <= 5).all() and (lengths[~ended] == 5).all()
        inside = batch.attention_mask - batch.response_mask
        assert [run.tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch.input_ids, inside)] == prompts
        tokens += int(lengths.sum())
    assert run.counts["tokens_generated"] == tokens and run.counts["seconds_generating"] == 6
    assert all(type(value) in (int, float) for value in run.counts.values())      # or state.pt would not load


def test_rollout_ignores_the_temperature_or_greedy(toy, tmp_path):
    texts = {}
    for temperature in (1.0, 1e-4):
        run = started(toy, tmp_path, temperature=temperature)
        for greedy in (False, True):
            torch.manual_seed(0)
            texts[temperature, greedy] = common.rollout(run, ["abc", "h", "cd"] * 4, greedy)[1]
    assert texts[1.0, True] == texts[1e-4, True] == texts[1e-4, False] != texts[1.0, False]
    assert texts[1.0, True] == texts[1.0, True][:3] * 4


def cut_off(tokenizer, texts):
    """A batch of these answers to "a"; a text that ends with "-" did not reach EOS."""
    return lm.pack([([1], tokenizer(text.rstrip("-")).input_ids + [0] * (text[-1:] != "-")) for text in texts], 0)


GOES_WELL, NONE_ENDS, ALL_EMPTY = ["ab", "", "cd-"], ["ab-", "cd-", "e-"], ["", "", ""]


@pytest.mark.parametrize("answers, said", [
    ([GOES_WELL] * 3, None), ([["", "a-"]], None), ([["", "a"]], None),
    ([NONE_ENDS, NONE_ENDS, ALL_EMPTY], "step 1: 0 of 3 responses end with EOS, 0 are empty"),
    ([GOES_WELL, ALL_EMPTY, NONE_ENDS], "step 2: 3 of 3 responses end with EOS, 3 are empty"),
    ([GOES_WELL, GOES_WELL, NONE_ENDS, GOES_WELL, NONE_ENDS], "step 3: 0 of 3 responses end with EOS, 0 are empty")],
    ids=["well", "one ends", "one is not empty", "none ends", "all empty", "later"])
def test_policy_that_never_stops_or_says_nothing_goes_unnoticed(toy, tmp_path, monkeypatch, capsys, answers, said):
    for name in ("first", "second"):                        # once a run, not once a process
        run = started(toy, tmp_path / name)
        capsys.readouterr()
        for run.step, texts in enumerate(answers):
            monkeypatch.setattr(stages, "generate", lambda *_, **__: cut_off(run.tokenizer, texts))
            _, got, ended = common.rollout(run, ["a"] * 3)
            assert got == [text.rstrip("-") for text in texts]
            assert ended.tolist() == [not text.endswith("-") for text in texts]
        warnings = capsys.readouterr().err.splitlines()
        assert len(warnings) == (said is not None)
        assert all(line.startswith(f"warning: {said}") and "--max_new_tokens is 5" in line for line in warnings)


# -------------------------------------------------------------------------------------------------- output directory

def test_run_takes_a_number_that_is_in_use(toy, tmp_path):
    config, home = settings(toy, dpo.Config), tmp_path / "root" / "runs" / "dpo"
    assert common.output_directory(config) == home / "001"
    for name in ("001", "007", "notes"):
        (home / name).mkdir(parents=True)
    assert common.output_directory(config) == home / "008"


def test_run_overwrites_another_or_resumes_nothing(toy, tmp_path):
    out = tmp_path / "out"
    config = settings(toy, dpo.Config, out=str(out))
    assert common.output_directory(config) == out
    out.mkdir()
    assert common.output_directory(config) == out           # an empty directory is free
    with pytest.raises(UserError, match="nothing to resume in .*out"):
        common.output_directory(replace(config, resume=True))
    common.write_json(out / "args.json", asdict(config))
    with pytest.raises(UserError, match="holds another run: --resume"):
        common.output_directory(config)
    with pytest.raises(UserError, match="is a file"):
        common.output_directory(replace(config, out=str(out / "args.json")))
    (out / "state.pt").touch()
    assert common.output_directory(replace(config, resume=True, quiet=False, device="auto")) == out
    with pytest.raises(UserError) as error:
        common.output_directory(replace(config, resume=True, beta=0.7, seed=3))
    assert "--beta" in str(error.value) and "--seed" in str(error.value)
    assert "--lr" not in str(error.value) and "--resume" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------- runs

def dpo_settings(toy, out, **kwargs):
    return settings(toy, dpo.Config, **{**dict(out=str(out), epochs=1.0, warmup=0.5, schedule="cosine", save_every=0), **kwargs})


def saved(out):
    return parameters(LlamaForCausalLM.from_pretrained(out))


def test_AF_resumed_run_differs_from_a_straight_one(toy, tmp_path, monkeypatch):
    common_settings = dict(save_every=3, eval_every=2)
    dpo.run(dpo_settings(toy, tmp_path / "straight", **common_settings))
    config = dpo_settings(toy, tmp_path / "killed", **common_settings)
    log = common.log

    def kill(run, step, metrics):
        log(run, step, metrics)
        if step == 4:                                       # two steps past the checkpoint, with an evaluation between
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "log", kill)
        with pytest.raises(KeyboardInterrupt):
            dpo.run(config)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["step"] == 3 and [row["step"] for row in state["trace"]] == [0, 2]
    torch.manual_seed(999)
    result = dpo.run(replace(config, resume=True))
    straight, resumed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "killed"))
    assert resumed == straight and max(json.loads(line)["step"] for line in straight.splitlines()) == 6
    assert torch.equal(saved(tmp_path / "straight"), saved(tmp_path / "killed"))
    assert [row["step"] for row in result["trace"]] == [0, 2, 4, 6]


def test_AE_runs_are_not_reproducible_or_ignore_the_seed(toy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dpo.run(dpo_settings(toy, tmp_path / name, seed=seed))
    first, again, other = ((tmp_path / name / "metrics.jsonl").read_text() for name in "abc")
    assert first == again != other


def test_AE_evaluation_on_the_way_changes_training(toy, tmp_path):
    rows = {}
    for every in (0, 1):
        dpo.run(dpo_settings(toy, tmp_path / str(every), eval_every=every))
        lines = [json.loads(line) for line in (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()]
        rows[every] = [row for row in lines if "loss" in row]
        assert len(lines) - len(rows[every]) == (7 if every else 2)
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert torch.equal(saved(tmp_path / "0"), saved(tmp_path / "1"))
    start = common.load_policy(settings(toy))
    assert not torch.equal(saved(tmp_path / "0"), parameters(start))


def test_run_returns_or_prints_other_numbers_than_it_measured(toy, tmp_path, capsys):
    result = dpo.run(dpo_settings(toy, tmp_path / "run", quiet=False))
    assert result["eval/kl"] == result["trace"][-1]["eval/kl"] > 0 and result["trace"][0]["eval/kl"] == 0
    assert result["tokens_trained"] > 0 and result["out"] == str(tmp_path / "run")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("kl "))
    assert f"{result['eval/kl']:.3f} ± {result['eval/kl_se']:.3f}" in line
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert samples.count("before:") == samples.count("after:") == 12
    assert json.loads((tmp_path / "run" / "args.json").read_text())["lr"] == 1e-2


# ------------------------------------------------------------------------------------- the steps of a method, finish

def two_networks(run):
    """The policy and a second network, as an actor-critic method trains them."""
    torch.manual_seed(3)
    run.trained = torch.nn.ModuleList([run.policy, torch.nn.Linear(5, 2)])
    return run


def random_updates(run, updates=1):
    """Optimizer steps on gradients drawn at random; returns the learning rates that they were made with."""
    rates = []
    for _ in range(updates):
        for parameter in run.trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        rates.append(run.optimizer.param_groups[0]["lr"])
        common.optimizer_step(run.trained, run.optimizer, run.schedule, run.config)
    return rates


def test_AE_random_numbers_of_a_step_depend_on_what_was_drawn_before(toy, tmp_path):
    def draws(name, drawn=0, measure=dict, **kwargs):
        run, rows = started(toy, tmp_path / name, **kwargs), []
        torch.manual_seed(drawn)
        for step, item in common.steps(run, "abcd", measure):
            assert item == "abcd"[step]
            rows.append(torch.rand(3).tolist())
            torch.rand(drawn)                               # a step may draw as much as it likes
        return rows

    plain = draws("plain")
    assert len({tuple(row) for row in plain}) == 4          # a new draw at each step
    assert draws("drawn", 17) == plain
    assert draws("evaluated", eval_every=1, measure=lambda: {"x": torch.rand(7).sum().item()}) == plain
    other = draws("seed", seed=1)
    assert not {tuple(row) for row in other} & {tuple(row) for row in plain}


@pytest.mark.parametrize("updates", [1, 3])
def test_learning_rate_misses_0_at_the_end(toy, tmp_path, updates):
    run, rates = started(toy, tmp_path, schedule="linear"), []
    for _ in common.steps(run, range(4), updates=4 * updates):
        rates += random_updates(run, updates)
    n = 4 * updates
    assert rates == pytest.approx([1e-2 * (n - i) / n for i in range(n)])
    assert run.schedule.get_last_lr() == [0]


def test_AF_second_network_or_state_is_lost_at_resume(toy, tmp_path):
    def train(run, updates=2, stop=None):
        run.state = {"kl_coef": 1.0, "other": 7.0}          # as a method sets it before its steps
        before = []
        for step, _ in common.steps(two_networks(run), range(5), updates=5 * updates):
            before.append((parameters(run.trained), dict(run.state)))
            random_updates(run, updates)
            run.state["kl_coef"] *= 1.5
            run.counts["tokens_trained"] += 10
            if step == stop:
                break
        return before

    straight = started(toy, tmp_path / "straight", save_every=2, schedule="linear")
    want = train(straight)
    config = dict(save_every=2, schedule="linear")
    train(started(toy, tmp_path / "cut", **config), stop=3)                 # after the checkpoint of step 2
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert state["step"] == 2 and state["state"] == {"kl_coef": 2.25, "other": 7.0}
    assert state["trained"].keys() == straight.trained.state_dict().keys()   # of both networks

    resumed = started(toy, tmp_path / "cut", resume=True, **config)
    got = train(resumed)
    assert len(got) == 3
    for (weights, numbers), (weights_then, numbers_then) in zip(got, want[2:]):
        assert torch.equal(weights, weights_then) and numbers == numbers_then
    assert torch.equal(parameters(resumed.trained), parameters(straight.trained))
    assert torch.equal(parameters(resumed.policy), parameters(straight.policy))
    assert resumed.trained[0] is resumed.policy             # the network that samples is the one that was restored
    assert resumed.counts["tokens_trained"] == straight.counts["tokens_trained"] == 50
    assert resumed.schedule.get_last_lr() == [0]


def test_second_network_is_not_updated(toy, tmp_path):
    run = two_networks(started(toy, tmp_path))
    before = [parameters(network) for network in run.trained]
    for _ in common.steps(run, range(2)):
        random_updates(run)
    assert all((parameters(network) != start).all() for network, start in zip(run.trained, before))


def test_one_network_is_not_what_is_trained_and_saved(toy, tmp_path):
    run = started(toy, tmp_path, save_every=1)
    start = parameters(run.policy)
    for _ in common.steps(run, range(2)):
        assert run.trained is run.policy
        random_updates(run)
    assert not torch.equal(parameters(run.policy), start)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(value, run.policy.state_dict()[name]) for name, value in state["trained"].items())


def sampling_run(run, monkeypatch, clock, stop=None, measure=dict):
    """Two seconds for each sampling, six for the rest of a step, a hundred for each evaluation."""
    with monkeypatch.context() as patch:
        slow(patch, clock, "evaluate", 100)
        slow(patch, clock, "generate", 2)
        for step, prompts in common.steps(two_networks(run), [["ab", "c", "def"]] * 4, measure):
            common.rollout(run, prompts)
            random_updates(run)
            clock.now += 6
            if step == stop:
                break
    return run


def test_seconds_of_training_count_evaluations_or_stand_still(toy, tmp_path, monkeypatch, clock):
    run = sampling_run(started(toy, tmp_path / "run", eval_every=2), monkeypatch, clock)
    assert run.counts["seconds_training"] == 32 and run.counts["seconds_generating"] == 8
    assert [row["seconds_training"] for row in run.trace] == [0, 16, 32]
    tokens = [row["tokens_generated"] for row in run.trace]
    assert tokens[0] == 0 < tokens[1] < tokens[2] == run.counts["tokens_generated"]
    assert "seconds" not in (tmp_path / "run" / "metrics.jsonl").read_text()    # resumed and straight runs would differ


def test_AF_seconds_and_tokens_start_anew_at_resume(toy, tmp_path, monkeypatch, clock):
    cut = sampling_run(started(toy, tmp_path / "run", save_every=1), monkeypatch, clock, stop=2)
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["counts"]
    assert kept["seconds_training"] == 16 and 0 < kept["tokens_generated"] < cut.counts["tokens_generated"]
    run = sampling_run(started(toy, tmp_path / "run", save_every=1, resume=True), monkeypatch, clock)
    assert run.counts["seconds_training"] == 32 and run.counts["seconds_generating"] == 8
    straight = sampling_run(started(toy, tmp_path / "straight"), monkeypatch, clock)
    assert run.counts["tokens_generated"] == straight.counts["tokens_generated"]


def test_finish_returns_or_prints_other_costs_than_were_counted(toy, tmp_path, monkeypatch, capsys, clock):
    run = sampling_run(started(toy, tmp_path / "run", quiet=False), monkeypatch, clock)
    capsys.readouterr()
    result, printed = common.finish(run), capsys.readouterr().out
    tokens = run.counts["tokens_generated"]
    assert result["tokens_generated"] == tokens > 0 and result["seconds_per_step"] == 8
    assert result["state_mb"] == common.training_state_mb(run.optimizer)
    assert f"{tokens / 8:.0f} tokens/s generated, 25% of the training time" in printed.splitlines()
    assert not [name for name in result if name.startswith("eval/") and "seconds" in name]
    assert "tokens_generated" not in printed and "seconds_training" not in printed      # the table has metrics only


def test_method_that_never_samples_reports_a_speed_of_sampling(toy, tmp_path, capsys):
    result = dpo.run(dpo_settings(toy, tmp_path / "run", quiet=False))
    assert "tokens/s" not in capsys.readouterr().out
    assert result["tokens_generated"] == 0 and result["seconds_per_step"] > 0 and result["state_mb"] > 0


@pytest.mark.parametrize("n_steps, shares", [(0, []), (2, ["67"])])
def test_sampling_for_a_metric_counts_as_training(toy, tmp_path, monkeypatch, capsys, clock, n_steps, shares):
    """As ReMax measures its variance; also with no step at all (--epochs 0), where no share can be formed."""
    run = started(toy, tmp_path, quiet=False)
    slow(monkeypatch, clock, "generate", 2)

    def measure():
        return {"eval/n": len(common.generate(run.policy, run.tokenizer, ["ab"] * 3))}

    for _ in common.steps(run, range(n_steps), measure):
        common.rollout(run, ["ab"])
        clock.now += 1
    capsys.readouterr()
    result, printed = common.finish(run), capsys.readouterr().out
    assert re.findall(r"(\d+)% of the training time", printed) == shares
    assert result["eval/n"] == 3 and result["seconds_per_step"] == (3 if n_steps else 0)


@pytest.mark.parametrize("dtype, each", [(torch.float32, 16), (torch.float64, 32)])
def test_training_state_leaves_out_gradients_moments_or_a_network(toy, tmp_path, dtype, each):
    run = two_networks(started(toy, tmp_path))
    run.trained.to(dtype)
    run.optimizer, run.schedule = common.optimizer_and_schedule(run.trained, run.config, 3)
    size = sum(p.numel() for p in run.policy.parameters()) + 12
    assert common.training_state_mb(run.optimizer) == pytest.approx(size * each / 2e6)       # no moments yet
    random_updates(run)
    assert common.training_state_mb(run.optimizer) == pytest.approx(size * each / 1e6, rel=0.01)    # and step counters
