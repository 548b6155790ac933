"""harness/: options, a run's directory, evaluation, steps, checkpoints, runs that are killed and resumed.

Letters are the bug classes that a test would catch. Models are random, over eight letters.
"""
import copy
import importlib
import json
import math
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args, get_origin

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import common
import dpo
import harness
import harness.evaluation
import harness.loading
import harness.run
import tasks
from conftest import (PAIRS, count_a, killed_after, method_names, pair_task, parameters, settings, slow,
                      started, toy_run)
from harness import Config, Pair, Ranking, UserError
from harness.evaluation import evaluate, kl_to_reference, mean_and_error, sequence_kl
from harness.rewards import TrueReward
from harness.command_line import output_directory
from harness.run import training_state_mb
from tasks import Task
from test_common import cohere, exact_kl, llama, outcome_batch

pytestmark = pytest.mark.usefixtures("no_traces")
GOOD, BAD = Pair("ab", "cd", "h"), Pair("c", "hgh", "")
MIXED = Ranking("d", ["a", "bb"], [1.0, 2.0], ["A", "B"], [True, False])


# ---------------------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("wrong, message", [
    *[({name: 0}, f"--{name} must be above 0") for name in
      ("lr", "batch_size", "token_budget", "max_new_tokens", "eval_prompts", "eval_samples", "seeds")],
    *[({name: value}, f"--{name} must be at least 1e-06") for name in ("temperature", "eval_temperature")
      for value in (0, -1.0, 1e-38)],
    *[({name: -1}, f"--{name} must not be negative") for name in
      ("epochs", "limit", "seed", "eval_every", "save_every")],
    (dict(warmup=-1), r"--warmup must be in \[0, 1\]"),
    (dict(lr=math.nan), "--lr"),
    (dict(max_new_tokens=41), "--max_new_tokens 41 is more than a quarter of --max_length 160"),
    (dict(resume=True), "--resume needs --out"),
    (dict(model="some/model"), "--model some/model needs --data")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, message):
    with pytest.raises(UserError, match=message):
        Config(**wrong)


def test_defaults_do_not_follow_the_model_or_override_what_is_given():
    tiny, real = Config(), Config(model="some/model", data="x.jsonl")
    assert (tiny.lr, tiny.max_new_tokens, tiny.max_length) == (5e-4, 40, 160)
    assert (real.lr, real.max_new_tokens, real.max_length) == (1e-6, 128, 512)
    assert (tiny.token_budget, Config(device="cpu", model="a/b", data="x.jsonl").token_budget) == (2048, 2048)
    assert Config(lr=0.5).lr == 0.5 and Config(max_new_tokens=7).max_new_tokens == 7
    assert (tiny.pair_labels, tiny.proxy_pairs, tiny.seeds) == ("annotators", "samples", 10)


def choices_of(cls):
    """(option, its choices) of a Config's own options."""
    return [(f.name, get_args(kind)) for f in fields(cls) for kind in (f.type, *get_args(f.type))
            if get_origin(kind) is Literal and (cls is Config or not hasattr(Config, f.name))]


@pytest.mark.parametrize("module", ["harness", *method_names()])
def test_option_outside_its_choices_is_taken(module):
    cls = importlib.import_module(module).Config
    for name, choices in choices_of(cls):
        with pytest.raises(UserError, match=f"--{name} must be one of .*{choices[-1]}, not nonsense"):
            cls(**{name: "nonsense"})
        assert getattr(cls(**{name: choices[0]}), name) == choices[0]


def test_choices_of_an_option_are_not_found():
    found = dict(choices_of(Config))
    assert found["reward_noise"] == ("none", "prompt", "response")
    assert found["pair_labels"] == ("annotators", "gold")
    assert found["proxy_pairs"] == ("samples", "off_policy")
    assert dict(choices_of(dpo.Config)).keys() == {"loss", "curriculum"}


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, math.nan])
def test_labels_are_more_wrong_than_right(share):
    with pytest.raises(UserError, match="--label_noise must be in"):
        Config(label_noise=share)


# ------------------------------------------------------------------------------------------------------ files

def test_killed_write_leaves_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    harness.write_json(path, {"a": "ä"})
    with pytest.raises(TypeError):
        harness.write_json(path, {"b": [1, object()]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}

    def full_disk(self, text, encoding=None, errors=None, newline=None):
        with open(self, "w", encoding=encoding, errors=errors) as file:
            file.write(text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(OSError):
        harness.write_json(path, {"c": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}


def test_run_takes_a_number_that_is_in_use(toy, tmp_path):
    config, home = settings(toy, dpo.Config), tmp_path / "root" / "runs" / "dpo"
    assert output_directory(config) == home / "001"
    for name in ("001", "007", "notes"):
        (home / name).mkdir(exist_ok=True)
    assert output_directory(config) == home / "008" and (home / "008").is_dir()      # nobody else can have it


def test_run_overwrites_another_or_resumes_nothing(toy, tmp_path):
    out = tmp_path / "out"
    config = settings(toy, dpo.Config, out=str(out))
    assert output_directory(config) == out
    out.mkdir()
    assert output_directory(config) == out                  # an empty directory is free
    with pytest.raises(UserError, match="nothing to resume in .*out"):
        output_directory(replace(config, resume=True))
    harness.write_json(out / "args.json", asdict(config))
    with pytest.raises(UserError, match="holds another run: --resume"):
        output_directory(config)
    with pytest.raises(UserError, match="is a file"):
        output_directory(replace(config, out=str(out / "args.json")))
    (out / "state.pt").touch()
    assert output_directory(replace(config, resume=True, quiet=False, device="auto")) == out
    assert output_directory(replace(config, resume=True, token_budget=999)) == out   # another device
    with pytest.raises(UserError) as error:
        output_directory(replace(config, resume=True, beta=0.7, seed=3))
    assert "--beta" in str(error.value) and "--seed" in str(error.value)
    assert "--lr" not in str(error.value) and "--resume" not in str(error.value)


# ------------------------------------------------------------------------------------------------- evaluation

def test_standard_error_counts_samples_instead_of_prompts():
    mean, error = mean_and_error(torch.tensor([[0, 2], [4, 6], [2, 4]]))             # prompts' means: 1, 5, 3
    assert mean == 3 and error == pytest.approx(2 / 3 ** 0.5)
    assert mean_and_error(torch.tensor([[1.0, 5.0]])) == (3.0, None)


def test_AE_evaluation_depends_on_the_rng_or_disturbs_it(toy):
    config = settings(toy)
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = evaluate(config, pair_task(count_a), policy, tokenizer, {})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert evaluate(config, pair_task(count_a), policy, tokenizer, {}) == first
    other = evaluate(replace(config, seed=1), pair_task(count_a), policy, tokenizer, {})
    assert other[1]["responses"] != first[1]["responses"]
    assert len(set(first[1]["responses"])) > 4
    assert first[1]["prompts"] == [p.prompt for p in PAIRS[-6:-3] for _ in range(4)]


def perturbed(policy, by=0.2):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += by * torch.randn_like(parameter)
    return policy


def test_evaluation_gives_wrong_numbers(toy):
    config = settings(toy, eval_samples=64)
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    start, samples = evaluate(config, pair_task(count_a), policy, tokenizer, {})
    assert start["eval/kl"] == 0 and "eval/win_rate" not in start
    assert start["eval/gold"] == pytest.approx(sum(r.count("a") for r in samples["responses"]) / 192)
    words = replace(pair_task(), fluent=lambda text: "a" in text)
    assert evaluate(config, words, policy, tokenizer, {})[0]["eval/fluency"] == pytest.approx(
        sum("a" in r for r in samples["responses"]) / 192)
    again, _ = evaluate(config, pair_task(count_a), policy, tokenizer, {}, samples)
    assert again["eval/win_rate"] == 0.5
    worse = {**samples, "gold": [g - 1 for g in samples["gold"]]}
    assert evaluate(config, pair_task(count_a), policy, tokenizer, {}, worse)[0]["eval/win_rate"] == 1
    changed, _ = evaluate(config, pair_task(count_a), perturbed(policy), tokenizer, {}, samples)
    assert changed["eval/kl"] > 3 * changed["eval/kl_se"] > 0 and changed["eval/win_rate"] != 0.5


def letters(prompts, texts):
    return torch.tensor([float(text.count("a")) for text in texts])


@pytest.mark.parametrize("gold, names", [
    (None, {"": "proxy", "_judge": "judge"}),
    (lambda *row: float(len(row[1])), {"": "gold", "_proxy": "proxy", "_judge": "judge"})])
def test_win_rate_is_by_another_reward_or_missing_for_the_others(toy, gold, names):
    run = toy_run(toy, Task("toy", {"train": ["ab"], "test": ["g", "hh"]}, gold=gold))
    rewards = {"proxy": letters,
               "judge": lambda prompts, texts: torch.tensor([float(text.count("b")) for text in texts])}
    args = run.config, run.task, run.policy, run.tokenizer, rewards
    start, samples = evaluate(*args)
    assert not [name for name in start if "win_rate" in name]
    shift = {"gold": [-1] * 6, "proxy": [1] * 6, "judge": [0, 0, 0, 0, 0, -1]}           # what start had more
    before = samples | {name: [a + b for a, b in zip(samples[name], shift[name])] for name in names.values()}
    metrics, _ = evaluate(*args, before)
    want = {"gold": 1.0, "proxy": 0.0, "judge": (5 * 0.5 + 1) / 6}
    assert {name for name in metrics if "win_rate" in name and not name.endswith("_se")} == {
        f"eval/win_rate{n}" for n in names}
    for suffix, name in names.items():
        assert metrics[f"eval/win_rate{suffix}"] == pytest.approx(want[name])


def next_logps(model, ids, temperature):
    """Log-probs [T, V] of what comes after each token of one row without padding."""
    with torch.no_grad():
        return (model(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature).log_softmax(-1)


def plain_kl(policy, reference, prompt, response, temperatures=(1.0, 1.0), other=None):
    """KL of the next token, summed over a response, token by token. other: the prompt of the reference."""
    other, total = prompt if other is None else other, 0.0
    p, q = (next_logps(model, [*asked, *response], t)[len(asked) - 1:-1]
            for model, asked, t in zip((policy, reference), (prompt, other), temperatures))
    for row, row_of_reference in zip(p.tolist(), q.tolist(), strict=True):
        total += sum(math.exp(a) * (a - b) for a, b in zip(row, row_of_reference))
    return total


@pytest.mark.parametrize("budget", [1, 40, 10**6])
@pytest.mark.parametrize("temperatures", [{}, dict(temperature=0.7), dict(eval_temperature=0.5),
                                          dict(temperature=0.7, eval_temperature=1.3)])
def test_kl_differs_from_a_direct_computation_or_takes_a_temperature_for_the_other(toy, temperatures, budget):
    config = settings(toy, token_budget=budget, **temperatures)
    policy, tokenizer = perturbed(harness.load_policy(config)), harness.load_tokenizer(config)
    texts, prompts = ["abc", "h", "ggggg", "", "de", "ab"], ["a", "bcd", "ef", "g", "hh", "c"]
    kl = kl_to_reference(config, policy, common.encode(tokenizer, prompts, texts, [True] * 5 + [False]))
    reference = harness.loading.load_reference(config)
    both = temperatures.get("eval_temperature", temperatures.get("temperature", 1)), temperatures.get(
        "temperature", 1)
    want = [plain_kl(policy, reference, tokenizer(prompt).input_ids,
                     tokenizer(text).input_ids + [0] * (text != "ab"), both)
            for prompt, text in zip(prompts, texts)]
    assert kl.tolist() == pytest.approx(want, abs=1e-4) and min(want) > 1e-2
    assert not kl.requires_grad and kl.dtype == torch.float32 and len({*want}) == 6
    if both[0] != both[1]:
        batch = common.encode(tokenizer, ["a"], ["b"])                  # the same weights are two policies
        assert kl_to_reference(config, harness.load_policy(config), batch) > 0


@pytest.mark.parametrize("temperature, other", [(1.0, 1.0), (0.6, 1.0), (1.0, 1.5)])
def test_h_kl_is_not_that_of_the_sequences_or_has_another_direction(tmp_path, temperature, other):         # H
    """Its mean over all that the policy can say, each as often as the policy says it, is KL(pi || pi_ref)."""
    policy, reference, batch = llama(4, seed=1), llama(4, seed=2), outcome_batch()
    reference.save_pretrained(tmp_path / "start")
    config = Config(model=str(tmp_path / "start"), data="none.jsonl", device="cpu", token_budget=64,
                    eval_temperature=temperature, temperature=other)
    p, q = (common.sequence_logps(*args).detach() for args in
            ((policy, batch, temperature), (reference, batch, other)))
    forward, backward = (p.exp() * (p - q)).sum().item(), (q.exp() * (q - p)).sum().item()
    if temperature == other == 1:
        assert forward == pytest.approx(exact_kl(policy, reference).item(), rel=1e-9)
    assert forward > 0 and abs(forward - backward) > 0.01
    kl = kl_to_reference(config, copy.deepcopy(policy).float(), batch).double()     # it is float32 throughout
    assert (p.exp() * kl).sum().item() == pytest.approx(forward, rel=1e-4)
    assert (kl > 0).all() and ((p - q) < -0.1).any()            # one sample's log-ratio is negative as well
    spread, k1_spread = ((p.exp() * (values - forward) ** 2).sum() for values in (kl, p - q))
    assert 0 < spread < k1_spread


def test_kl_is_not_0_at_the_start_or_below_it_after_a_small_step(toy):
    config = settings(toy)
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    batch = common.generate(policy, tokenizer, [p.prompt for p in PAIRS], 4, max_new_tokens=5)
    assert (kl_to_reference(config, policy, batch) == 0).all()
    for by in (1e-4, 1e-3, 1e-2):
        values = kl_to_reference(config, perturbed(policy, by), batch)
        assert values.min() > -1e-6 and values.mean() > 0               # -1e-6: rounding
        reference = harness.loading.load_reference(config)
        k1 = common.sequence_logps(policy, batch) - common.sequence_logps(reference, batch)
        assert k1.min() < -by / 10                                      # so the samples would show it


@pytest.mark.parametrize("make", [(llama, cohere), (cohere, llama), (cohere, cohere)])
def test_kl_leaves_out_what_a_model_does_to_its_logits_after_the_head(make, capsys):
    policy, reference = make[0](4, seed=1), make[1](4, seed=2)
    batch = outcome_batch()
    p = common.sequence_logps(policy, batch).exp().detach()
    kl = sequence_kl((policy, reference), (batch, batch)).double()
    assert (p * kl).sum().item() == pytest.approx(exact_kl(policy, reference).item(), rel=1e-5)
    assert "CohereForCausalLM changes its logits" in capsys.readouterr().err


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_d_kl_depends_on_the_chunk_or_the_other_rows_or_reads_the_prompts_of_the_other_model(chunk):       # D
    policy, reference = llama(12, seed=1), llama(12, seed=2)
    rows = [([3, 4], [9, 4], [5, 6, 7, 0]), ([1, 2, 0, 5, 6], [2], [2, 0]), ([7], [8, 1, 1, 1, 1, 2, 5], [1])]
    batches = [common.pack([(row[i], row[2]) for row in rows], 0) for i in (0, 1)]
    got = sequence_kl((policy, reference), batches, (0.8, 1.2), chunk)
    want, same = ([plain_kl(policy, reference, asked, response, (0.8, 1.2), of_reference)
                   for asked, other, response in rows for of_reference in [other if told else asked]]
                  for told in (True, False))
    assert got.tolist() == pytest.approx(want, rel=1e-4)
    assert all(abs(a - b) > 1e-2 for a, b in zip(same, want))


def test_AJ_reference_shares_storage_or_can_be_trained(toy):
    config = settings(toy)
    policy = harness.load_policy(config)
    for reference in (harness.loading.load_reference(config), toy_run(toy).load_reference()):
        assert torch.equal(parameters(policy), parameters(reference))
        places = [{p.data_ptr() for p in model.parameters()} for model in (policy, reference)]
        assert not places[0] & places[1]
        assert all(p.requires_grad for p in policy.parameters())
        assert not any(p.requires_grad for p in reference.parameters())


def test_reference_of_a_run_is_its_policy_or_moves_with_it(toy):
    run = toy_run(toy)
    before = parameters(run.policy)
    perturbed(run.policy)
    assert torch.equal(parameters(run.load_reference()), before) and run.load_reference() is not run.policy


@pytest.mark.parametrize("hot, cold", [("temperature", "eval_temperature"),
                                       ("eval_temperature", "temperature")])
def test_evaluation_samples_at_the_temperature_of_training_or_training_at_the_evaluations(toy, hot, cold):
    run = toy_run(toy, **{hot: 1.0, cold: 1e-4}, eval_samples=8)
    greedy = common.generate(run.policy, run.tokenizer, ["g", "hh"], 8, greedy=True, max_new_tokens=5)
    same = common.decode(run.tokenizer, greedy)
    evaluation = evaluate(run.config, run.task, run.policy, run.tokenizer, {})[1]["responses"]
    prompts = ["g"] * 8 + ["hh"] * 8
    rollout, probed = harness.rollout(run, prompts)[1], harness.probe(run, prompts)[0]
    assert (evaluation == same) == (probed == same) == (cold == "eval_temperature") != (rollout == same)


def test_temperature_of_the_evaluation_does_not_follow_that_of_training_or_may_be_0():
    assert Config().eval_temperature == 1 and Config(temperature=0.7).eval_temperature == 0.7
    assert Config(temperature=0.7, eval_temperature=0.5).eval_temperature == 0.5
    assert Config(temperature=0.7, eval_temperature=0.5).temperature == 0.7


# -------------------------------------------------------------------------- evaluations of the initial policy

def started_with(toy, out, known, **kwargs):
    run = started(toy, out, **kwargs)
    run.known = known
    return run


def test_initial_policy_is_evaluated_again_or_what_was_measured_changes(toy, tmp_path, monkeypatch):
    calls, known, lines = [], {}, {}
    slowly = harness.run.evaluate
    monkeypatch.setattr(harness.run, "evaluate", lambda *args: calls.append(args) or slowly(*args))
    for name, cache, options in (("alone", None, {}), ("first", known, {}), ("again", known, dict(lr=0.5)),
                                 ("other", known, dict(seed=1)), ("fewer", known, dict(eval_prompts=2))):
        run = started_with(toy, tmp_path / name, cache, **options)
        for _ in steps(run, range(2)):
            random_updates(run)
        lines[name] = [json.loads(line) for line in metrics_of(tmp_path / name).splitlines()]
    assert len(calls) == 5 * 2 - 1 and len(known) == 3
    assert lines["alone"] == lines["first"] and lines["again"][0] == lines["alone"][0]
    assert lines["again"][-1]["eval/kl"] != lines["alone"][-1]["eval/kl"]          # never of what was trained
    assert lines["other"][0] != lines["alone"][0] != lines["fewer"][0]
    assert harness.run.Run.known is None


def test_method_adds_its_own_numbers_to_what_is_kept_for_others(toy, tmp_path):
    known, runs = {}, []
    for name in ("a", "b"):
        runs.append(started_with(toy, tmp_path / name, known))
        runs[-1].evaluate(mine=name)
        runs[-1].amend(other=name)
    assert [(run.trace[0]["mine"], run.trace[0]["other"]) for run in runs] == [("a", "a"), ("b", "b")]
    (metrics, samples), = known.values()
    assert not {"mine", "other", "step"} & {*metrics} and runs[0].samples["before"] == samples


def test_win_rate_compares_scores_on_two_scales(toy, tmp_path):
    """One method maximises a reward that has no scale, and so gives it one; another evaluates it as it is."""
    known = {}
    for name, mean, std in (("raw", 0.0, 1.0), ("scaled", 3.0, 2.0), ("scaled again", 3.0, 2.0)):
        run = started_with(toy, tmp_path / name, known)
        run.rewards = {"proxy": TrueReward(count_a, mean, std)}
        run.evaluate()
        run.evaluate()
        before, after = run.trace
        assert after["eval/win_rate"] == 0.5 and before["eval/proxy"] == after["eval/proxy"]
    assert len(known) == 2


@pytest.mark.parametrize("options", [
    dict(temperature=0.5, eval_temperature=1.0), dict(eval_temperature=0.5), dict(max_new_tokens=3),
    dict(eval_samples=2),
    dict(policy="x"), dict(reward="x"), dict(reward_label="x"), dict(reward_lr=0.1), dict(label_noise=0.1),
    dict(proxy_pairs="off_policy"), dict(max_length=200), dict(limit=3), dict(dtype="bfloat16"), dict(seed=2),
    dict(token_budget=9)])
def test_option_that_changes_the_initial_evaluation_is_taken_for_one_of_training(options):
    needs = harness.run.what_initial_evaluation_needs
    assert needs(Config(**options), {}) != needs(Config(), {})
    training = dict(lr=0.1, epochs=3.0, batch_size=7, schedule="linear", pair_labels="gold", rating_noise=0.5,
                    reward_noise="prompt", eval_every=3, out="x", quiet=True, seeds=3)
    assert needs(Config(**training), {}) == needs(Config(), {})
    assert harness.run.OF_TRAINING < {option.name for option in fields(Config)}
    method = dpo.Config(**options)
    assert needs(method, {}) == needs(Config(**options), {})           # the method's own options do not count


# ------------------------------------------------------------------------------------------------------- runs

def dpo_settings(toy, out, **kwargs):
    return settings(toy, dpo.Config, **{**dict(out=str(out), epochs=1.0, warmup=0.5, schedule="cosine",
                                               save_every=0), **kwargs})


def dpo_run(toy, out, **kwargs):
    return harness.launch(dpo.train, dpo_settings(toy, out, **kwargs))


def saved(out):
    return parameters(LlamaForCausalLM.from_pretrained(out))


def metrics_of(out):
    return (out / "metrics.jsonl").read_text(encoding="utf-8")


def test_AF_resumed_run_differs_from_a_straight_one(toy, tmp_path):
    common_settings = dict(save_every=3, eval_every=2)
    dpo_run(toy, tmp_path / "straight", **common_settings)
    with killed_after(4):                         # two steps past the checkpoint, with an evaluation between
        dpo_run(toy, tmp_path / "killed", **common_settings)
    assert json.loads(metrics_of(tmp_path / "killed").splitlines()[-1])["step"] == 5
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["step"] == 3 and [row["step"] for row in state["trace"]] == [0, 2]
    torch.manual_seed(999)
    result = dpo_run(toy, tmp_path / "killed", resume=True, **common_settings)
    straight, resumed = metrics_of(tmp_path / "straight"), metrics_of(tmp_path / "killed")
    assert resumed == straight and max(json.loads(line)["step"] for line in straight.splitlines()) == 6
    assert torch.equal(saved(tmp_path / "straight"), saved(tmp_path / "killed"))
    assert [row["step"] for row in result["trace"]] == [0, 2, 4, 6]


def test_AE_runs_are_not_reproducible_or_ignore_the_seed(toy, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        dpo_run(toy, tmp_path / name, seed=seed)
    first, again, other = (metrics_of(tmp_path / name) for name in "abc")
    assert first == again != other


def test_AE_evaluation_on_the_way_changes_training(toy, tmp_path):
    rows = {}
    for every in (0, 1):
        dpo_run(toy, tmp_path / str(every), eval_every=every)
        lines = [json.loads(line) for line in metrics_of(tmp_path / str(every)).splitlines()]
        rows[every] = [row for row in lines if "loss" in row]
        assert len(lines) - len(rows[every]) == (7 if every else 2)
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert torch.equal(saved(tmp_path / "0"), saved(tmp_path / "1"))
    start = harness.load_policy(settings(toy))
    assert not torch.equal(saved(tmp_path / "0"), parameters(start))


def test_run_returns_or_prints_other_numbers_than_it_measured(toy, tmp_path, capsys):
    result = dpo_run(toy, tmp_path / "run", quiet=False)
    assert result["eval/kl"] == result["trace"][-1]["eval/kl"] > 0 and result["trace"][0]["eval/kl"] == 0
    assert result["tokens_trained"] > 0 and result["out"] == str(tmp_path / "run")
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("kl "))
    assert f"{result['eval/kl']:.3f} ± {result['eval/kl_se']:.3f}" in line
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("before:") == samples.count("after:") == 12
    assert json.loads((tmp_path / "run" / "args.json").read_text(encoding="utf-8"))["lr"] == 1e-2


# ------------------------------------------------------------------------------- microbatches and their means

RAGGED = [GOOD, Ranking("c", ["hgh"], [0.5]), Ranking("abcdef", ["e", "f", "gg"], [1.0, 3.0, 2.0]), BAD,
          Ranking("e", ["aaaaa"], [2.0], ended=[False])]


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_gradient_in_microbatches_is_not_that_of_the_mean_over_rows(toy, budget):
    """Against one backward pass over all rows, written out; the parts must not matter."""
    run, means, calls, tokens = toy_run(toy, token_budget=budget), harness.Means(), [], 0
    texts = [([row.prompt] * len(row.responses), row.responses, row.ended or None) for row in RAGGED]
    total = sum(i * common.sequence_logps(run.policy, common.encode(run.tokenizer, *text)).sum()
                for i, text in enumerate(texts))
    weights = list(run.policy.parameters())
    want = torch.cat([g.flatten() for g in torch.autograd.grad(total / 5, weights)])
    for rows, batch in run.microbatches(RAGGED):
        calls.append(len(rows))
        assert common.decode(run.tokenizer, batch) == [text for i in rows for text in RAGGED[i].responses]
        losses = torch.tensor(rows) * common.sequence_logps(run.policy, batch).view(len(rows), -1).sum(1)
        (losses.sum() / 5).backward()
        means.add({"loss": losses, "place": torch.tensor(rows)})
        tokens += int(batch.attention_mask.sum())
    got = torch.cat([weight.grad.flatten() for weight in weights])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    assert want.abs().max() > 1 and sum(calls) == 5 and (budget > 1 or calls == [1] * 5)
    metrics = means.result()
    assert metrics["place"] == 2 and metrics["loss"].item() == pytest.approx(total.item() / 5, rel=1e-5)
    assert not metrics["loss"].requires_grad and metrics["loss"].dtype == torch.float32
    assert tokens == (5 + 4) + 5 + (8 + 8 + 9) + (5 + 2) + 6            # prompts and EOS included, no padding


def test_mean_of_a_step_is_the_mean_of_its_microbatches():
    means = harness.Means()
    for values in ([1.0, 2.0, 3.0], [10.0]):
        means.add({"x": torch.tensor(values, dtype=torch.float64, requires_grad=True)})
    means.add({"y": torch.tensor([True, False])})
    assert {name: value.item() for name, value in means.result().items()} == {"x": 4.0, "y": 0.5}


# ------------------------------------------------------------------------------ the steps of a method, finish

def networks(run):
    """The policy and a second network, as an actor-critic method trains them."""
    torch.manual_seed(3)
    return torch.nn.ModuleList([run.policy, torch.nn.Linear(5, 2)])


def steps(run, plan, trained=None, updates=1, measure=None):
    """The frame of every method's loop; run.log is called here, so that the body may be a for loop's."""
    trained, own = trained or run.policy, measure or dict
    config = run.config
    optimizer, schedule = common.adamw(trained, config.lr, len(plan) * updates, config.schedule,
                                       config.warmup)
    run.evaluate()
    run.amend(**own())
    for step, item in run.steps(plan, trained, optimizer, schedule):
        yield step, item
        run.log(step, {})
        if run.evaluation_due(step):
            run.evaluate()
            run.amend(**own())


def random_updates(run, updates=1):
    """Optimizer steps on gradients drawn at random; returns the learning rates that they were made with."""
    rates = []
    for _ in range(updates):
        for parameter in run.trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        rates.append(run.optimizer.param_groups[0]["lr"])
        torch.nn.utils.clip_grad_norm_(run.trained.parameters(), run.config.max_grad_norm)
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
    return rates


def test_AE_random_numbers_of_a_step_depend_on_what_was_drawn_before(toy, tmp_path):
    def draws(name, drawn=0, measure=None, **kwargs):
        run, rows = started(toy, tmp_path / name, **kwargs), []
        torch.manual_seed(drawn)
        for step, item in steps(run, "abcd", measure=measure):
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
    for _ in steps(run, range(4), updates=updates):
        rates += random_updates(run, updates)
    n = 4 * updates
    assert rates == pytest.approx([1e-2 * (n - i) / n for i in range(n)])
    assert run.schedule.get_last_lr() == [0]


@pytest.mark.parametrize("every, due", [(0, [4]), (1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_evaluation_is_due_at_other_steps_or_not_at_the_end(toy, tmp_path, every, due):
    run, seen = started(toy, tmp_path, eval_every=every), []
    for step, _ in run.steps(range(5), run.policy, *common.adamw(run.policy, 1e-2, 5)):
        run.log(step, {})
        seen += [step] if run.evaluation_due(step) else []
    assert seen == due


def test_AF_second_network_or_state_is_lost_at_resume(toy, tmp_path):
    def train(run, updates=2, stop=None):
        run.state = {"kl_coef": 1.0, "other": 7.0}          # as a method sets it before its steps
        before = []
        for step, _ in steps(run, range(5), networks(run), updates):
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
    assert resumed.trained[0] is resumed.policy        # the network that samples is the one that was restored
    assert resumed.counts["tokens_trained"] == straight.counts["tokens_trained"] == 50
    assert resumed.schedule.get_last_lr() == [0]


def test_second_network_is_not_updated(toy, tmp_path):
    run = started(toy, tmp_path)
    trained = networks(run)
    before = [parameters(network) for network in trained]
    for _ in steps(run, range(2), trained):
        assert run.trained is trained
        random_updates(run)
    assert all((parameters(network) != start).all() for network, start in zip(trained, before))


def test_one_network_is_not_what_is_trained_and_saved(toy, tmp_path):
    run = started(toy, tmp_path, save_every=1)
    start = parameters(run.policy)
    for _ in steps(run, range(2)):
        assert run.trained is run.policy
        random_updates(run)
    assert not torch.equal(parameters(run.policy), start)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(value, run.policy.state_dict()[name]) for name, value in state["trained"].items())


def sampling_run(run, monkeypatch, clock, stop=None):
    """Four steps, whose time counts: two seconds for each sampling, six for the rest.

    Three seconds before the first evaluation and five after it count, too. Not so a hundred for an
    evaluation, twenty for what the method adds to it, ten for a checkpoint and one after the last step.
    """
    with monkeypatch.context() as patch:
        slow(patch, clock, harness.run, "evaluate", 100)
        slow(patch, clock, harness.Run, "checkpoint", 10)
        slow(patch, clock, common, "generate", 2)
        clock.now += 3
        run.evaluate()
        clock.now += 20
        run.amend(mine=0)
        clock.now += 5
        plan, trained = [["ab", "c", "def"]] * 4, networks(run)
        for step, prompts in run.steps(plan, trained, *common.adamw(trained, 1e-2, 4)):
            harness.rollout(run, prompts)
            random_updates(run)
            clock.now += 6
            run.log(step, {})
            if run.evaluation_due(step):
                run.evaluate()
                clock.now += 20
                run.amend(mine=step)
            if step == stop:
                break
        clock.now += 1
    return run


def test_seconds_count_evaluations_or_checkpoints_or_stand_still_or_leave_out_what_comes_before_the_steps(
        toy, tmp_path, monkeypatch, clock):
    run = sampling_run(started(toy, tmp_path / "run", eval_every=2, save_every=1), monkeypatch, clock)
    assert run.counts["seconds_training"] == 3 + 5 + 4 * 8 and run.counts["seconds_generating"] == 8
    assert [row["seconds_training"] for row in run.trace] == [3, 24, 40]
    assert run.counts["cpu_seconds"] == 80 and [row["cpu_seconds"] for row in run.trace] == [6, 48, 80]
    tokens = [row["tokens_generated"] for row in run.trace]
    assert tokens[0] == 0 < tokens[1] < tokens[2] == run.counts["tokens_generated"]
    assert "seconds" not in metrics_of(tmp_path / "run")    # resumed and straight runs would differ


def test_loading_counts_as_training_or_clock_of_the_processor_is_the_one_on_the_wall(
        toy, tmp_path, monkeypatch, clock):
    slow(monkeypatch, clock, harness.command_line, "load_rewards", 1000)
    run = started(toy, tmp_path)
    clock.now += 0.5
    run.count_time()
    assert run.counts["seconds_training"] == 0.5 and run.counts["cpu_seconds"] == 1
    monkeypatch.undo()
    wall, processor = harness.run.now()
    while harness.run.now()[1] < processor + 0.02:
        pass
    time.sleep(0.3)
    later = harness.run.now()
    assert later[0] - wall > 0.3 > 0.2 > later[1] - processor > 0.02             # sleeping is no work


def test_measurement_is_a_cost_or_what_came_before_it_is_not(toy, tmp_path, clock):
    run = started(toy, tmp_path / "run")
    clock.now += 3
    run.counts["tokens_scored_reward"] += 5
    with run.aside():
        clock.now += 10
        run.counts["tokens_scored_reward"] += 7
    clock.now += 2
    run.count_time()
    assert run.counts["seconds_training"] == 3 + 2 and run.counts["tokens_scored_reward"] == 5


def test_AF_seconds_and_tokens_start_anew_at_resume(toy, tmp_path, monkeypatch, clock):
    cut = sampling_run(started(toy, tmp_path / "run", save_every=1), monkeypatch, clock, stop=2)
    kept = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["counts"]
    assert (kept["seconds_training"], kept["cpu_seconds"]) == (3 + 5 + 2 * 8, 48)
    assert 0 < kept["tokens_generated"] < cut.counts["tokens_generated"]
    run = sampling_run(started(toy, tmp_path / "run", save_every=1, resume=True), monkeypatch, clock)
    # what comes before the steps is made again: five seconds are seen of it
    assert run.counts["seconds_training"] == 24 + 5 + 2 * 8 and run.counts["seconds_generating"] == 8
    assert run.counts["cpu_seconds"] == 2 * run.counts["seconds_training"]
    straight = sampling_run(started(toy, tmp_path / "straight"), monkeypatch, clock)
    assert run.counts["tokens_generated"] == straight.counts["tokens_generated"]


def test_finish_returns_or_prints_other_costs_than_were_counted(toy, tmp_path, monkeypatch, capsys, clock):
    run = sampling_run(started(toy, tmp_path / "run", quiet=False), monkeypatch, clock)
    tokens = run.counts["tokens_generated"]
    for name in ("tokens_generated", "tokens_of_pool"):
        run.counts[name] += 1000                                         # as if a pool had been used
    capsys.readouterr()
    result, printed = run.finish(), capsys.readouterr().out
    assert result["tokens_generated"] == tokens + 1000 > 1000 and result["seconds_per_step"] == 10
    assert result["cpu_seconds"] == 80 and result["seconds_training"] == 40
    assert result["state_mb"] == training_state_mb(run.optimizer)
    assert f"{tokens / 8:.0f} tokens/s generated, 20% of the training time" in printed.splitlines()
    assert not [name for name in result if name.startswith("eval/") and "seconds" in name]
    # the table has metrics only
    assert "tokens_generated" not in printed and "seconds_training" not in printed


def test_method_that_never_samples_reports_a_speed_of_sampling(toy, tmp_path, capsys):
    result = dpo_run(toy, tmp_path / "run", quiet=False)
    assert "tokens/s" not in capsys.readouterr().out
    assert result["tokens_generated"] == 0 and result["seconds_per_step"] > 0 and result["state_mb"] > 0


@pytest.mark.parametrize("n_steps, shares", [(0, []), (2, ["67"])])
def test_sampling_for_a_metric_counts_as_training(toy, tmp_path, monkeypatch, capsys, clock, n_steps, shares):
    """As ReMax measures its variance; also with no step at all (--epochs 0), where no share can be formed."""
    run = started(toy, tmp_path, quiet=False, epochs=float(n_steps))
    slow(monkeypatch, clock, common, "generate", 2)

    def measure():
        return {"eval/n": len(common.generate(run.policy, run.tokenizer, ["ab"] * 3))}

    for _ in steps(run, range(n_steps), measure=measure):
        harness.rollout(run, ["ab"])
        clock.now += 1
    capsys.readouterr()
    result, printed = run.finish(), capsys.readouterr().out
    assert re.findall(r"(\d+)% of the training time", printed) == shares
    assert result["eval/n"] == 3 and result["seconds_per_step"] == (3 if n_steps else 0)


@pytest.mark.parametrize("dtype, each", [(torch.float32, 16), (torch.float64, 32)])
def test_training_state_leaves_out_gradients_moments_or_a_network(toy, tmp_path, dtype, each):
    run = started(toy, tmp_path)
    run.trained = networks(run).to(dtype)
    run.optimizer, run.schedule = common.adamw(run.trained, 1e-2, 3)
    size = sum(p.numel() for p in run.policy.parameters()) + 12
    assert training_state_mb(run.optimizer) == 0                                    # no step, nothing trained
    random_updates(run)
    assert training_state_mb(run.optimizer) == pytest.approx(size * each / 1e6, rel=0.01)  # and step counters


def test_results_or_notes_are_lost_or_stand_before_all_is_saved(toy, tmp_path, capsys, monkeypatch):
    for quiet in (False, True):
        run = started(toy, tmp_path / str(quiet), quiet=quiet)
        for step, _ in steps(run, range(1)):
            run.results["own/number"] = 3.5
            run.notes.append("a table of the method's own")
        capsys.readouterr()
        result, printed = run.finish(), capsys.readouterr().out
        assert result["own/number"] == 3.5 and result["eval/kl"] == run.trace[-1]["eval/kl"]
        assert printed.splitlines()[-1:] == ([] if quiet else ["a table of the method's own"])
        assert saved(run.out).numel() and (run.out / "samples.txt").exists()

    class Note:
        def __str__(self):
            assert saved(run.out).numel() and (run.out / "samples.txt").exists()
            assert "eval/kl" in metrics_of(run.out)
            return "printed last"

    run = started(toy, tmp_path / "order", quiet=False)
    run.notes = [Note()]
    for _ in steps(run, range(1)):
        pass
    run.finish()
    assert capsys.readouterr().out.splitlines()[-1] == "printed last"


def test_amended_metrics_go_to_another_evaluation_or_change_what_was_measured(toy, tmp_path):
    run = started(toy, tmp_path)
    run.evaluate(a=1)
    before = [json.loads(line) for line in metrics_of(tmp_path).splitlines()]
    run.amend(b=2.5)
    assert [json.loads(line) for line in metrics_of(tmp_path).splitlines()] == [before[0] | {"b": 2.5}]
    assert run.trace[0]["a"] == 1 and run.trace[0]["b"] == 2.5
    for step, _ in run.steps(range(1), run.policy, *common.adamw(run.policy, 1e-2, 1)):
        run.log(step, {"loss": torch.tensor(0.5)})
        run.evaluate(a=3)
    run.amend(b=4)
    first, logged, last = [json.loads(line) for line in metrics_of(tmp_path).splitlines()]
    assert first == before[0] | {"b": 2.5} and logged == {"step": 1, "loss": 0.5}
    assert (last["step"], last["a"], last["b"]) == (1, 3, 4)
    assert (run.trace[1]["a"], run.trace[1]["b"]) == (3, 4)


# ------------------------------------------------------------------------------------------------ checkpoints

def test_AF_rows_of_a_state_become_plain_tuples_or_do_not_load(toy, tmp_path):
    pool = [MIXED, Ranking("c", ("w", "l"), (1.0, 0.0), ended=(True, False))]
    run = toy_run(toy, out=tmp_path, step=3)
    run.state = {"pool": pool, "labels": [GOOD, BAD], "rewards": [0.5, 1.0],
                 "rater": {"weight": torch.ones(2)}}
    run.checkpoint()
    again = toy_run(toy, out=tmp_path)
    again.restore()
    assert again.step == 3 and again.state["pool"] == pool and again.state["labels"] == [GOOD, BAD]
    types = [type(row) for row in again.state["pool"] + again.state["labels"]]
    assert types == [Ranking, Ranking, Pair, Pair]
    assert again.state["rewards"] == [0.5, 1.0] and torch.equal(again.state["rater"]["weight"], torch.ones(2))


@dataclass
class Stranger:
    value: int = 1


def test_checkpoint_runs_code_when_it_is_loaded(toy, tmp_path, capsys):
    run = toy_run(toy, out=tmp_path)
    run.state = {"pool": [Stranger()]}
    run.checkpoint()
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        run.restore()
    assert "state.pt cannot be read (UnpicklingError" in capsys.readouterr().err


def test_names_of_the_harness_are_other_objects_than_those_of_common_or_tasks():
    assert harness.UserError is common.UserError and harness.warn is common.warn
    for name in ("write_json", "Pair", "Ranking", "Demonstration"):
        assert getattr(harness, name) is getattr(tasks, name)


def test_gold_takes_a_cut_off_answer_for_a_whole_one_or_eos_rate_counts_the_others(toy):
    config, seen = settings(toy, eval_samples=16), []
    task = pair_task(lambda prompt, text, ended: seen.append((text, ended)) or float(ended))
    metrics, _ = evaluate(config, task, harness.load_policy(config), harness.load_tokenizer(config), {})
    assert {ended for _, ended in seen} == {True, False}
    assert all(len(text) == 5 for text, ended in seen if not ended)
    share = sum(ended for _, ended in seen) / len(seen)
    assert metrics["eval/gold"] == pytest.approx(share) and abs(share - 0.5) > 0.05
    assert metrics["eval/eos_rate"] == pytest.approx(share)


def test_distinct_2_is_not_the_share_of_different_pairs_of_neighbours(toy, monkeypatch):
    config = settings(toy, eval_prompts=1, eval_samples=3)
    monkeypatch.setattr(common, "decode", lambda tokenizer, batch: ["a b a b", "a b", "c"])
    policy, reader = harness.load_policy(config), harness.load_tokenizer(config)
    metrics, _ = evaluate(config, pair_task(), policy, reader, {})
    assert metrics["eval/distinct_2"] == 2 / 4


def test_saved_tokenizer_keeps_the_limit_of_the_run(toy, tmp_path):
    dpo_run(toy, tmp_path / "run", max_length=32)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").model_max_length == 64


def test_other_test_data_are_resumed_on(toy, tmp_path):
    found = []
    for text in ("a", "b"):
        (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
        task = replace(pair_task(), files=(tmp_path / "test.jsonl",))
        found.append(toy_run(toy, task).origin["data_fingerprint"])
    assert found[0] != found[1]
