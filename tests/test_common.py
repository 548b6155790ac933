"""common.py: options, training loops, evaluation, and runs that are killed and resumed.

Letters are the bug classes that a test would catch. Models are random, over eight letters.
"""
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import common
import dpo
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
    monkeypatch.setattr(common, "ROOT", tmp_path / "root")


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

    def spy(model, batch):
        calls.append(len(batch))
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
        common.fit(model, tokenizer, [("ab", ["c"])], lambda model, batch: common.sequence_logps(model, batch) * math.nan, config, "")
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


def test_given_reward_model_is_not_used_or_not_scaled(toy, tmp_path):
    path = save(tmp_path / "reward", LlamaForSequenceClassification, num_labels=1)
    prompts, texts, _ = zip(*PAIRS[:4])
    raw = common.load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"reward_scale": {"mean": 2.0, "std": 4.0}}))
    scaled = common.load_rewards(settings(toy, reward=str(path)), pair_task())["proxy"](prompts, texts)
    assert raw.std() > 0.01
    torch.testing.assert_close(scaled, (raw - 2) / 4)


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
