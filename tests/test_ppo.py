"""ppo.py: rewards, advantages, losses and training. Letters are the bug classes that a test would catch.

Models are random, over three letters and EOS = PAD = 0; nearly all run in float64, so that tolerances
can be tight.
"""
import contextlib
import copy
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import harness
import ppo
from common import UserError, pack
from conftest import Counting, cases, close, killed_after, parameters, tensor
from harness import loading
from ppo import (adapted_kl_coef, gae, kl_penalised_rewards, masked_mean, masked_whiten, policy_loss,
                 value_loss)
from tasks import Task


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(loss, x, *rest):
    """(loss, d loss / dx) of policy_loss or value_loss."""
    x = x.detach().clone().requires_grad_()
    value = loss(x, *rest)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), torch.autograd.grad(value, x)[0]


def ragged(seed=0):
    """A mask with one run of ones in each row, the fourth row empty; three random tensors of its shape."""
    mask = torch.zeros(5, 8, dtype=torch.long)
    for row, start, length in zip(mask, (2, 0, 4, 0, 1), (5, 1, 3, 0, 7)):
        row[start:start + length] = 1
    return mask, *rand(3, 5, 8, seed=seed)


# -------------------------------------------------------------------------------- against other people's code

def fixtures(name):
    return [(case["inputs"], case["expected"]) for case in cases(name)]


def test_X_M_Y_estimators_differ_from_numbers_of_other_code():
    advantages, _ = gae(tensor([[0, 0, 0, 0, 0, 2], [0, 0, 0, -1, 9, 9]]),
                        torch.zeros(2, 6, dtype=torch.float64),
                        torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]), 0.9, 0.8)                        # gae-08
    close(advantages, [[0.3869835264, 0.53747712, 0.746496, 1.0368, 1.44, 2],
                       [-0.373248, -0.5184, -0.72, -1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0]])                                                        # kl_rewards-06
    rewards = kl_penalised_rewards(tensor([-1.193885]), tensor([[-4.596865, -1.730436, -3.31346, -3.079119]]),
                                   tensor([[36.267559, 22.300004, 16.740832, -83.67679]]), mask, 0.1)
    close(rewards, [[4.0864424, 2.403044, 0.8115442, 0]])
    whitened = masked_whiten(tensor([[-1, 0, 1, 1, 0, 0, -2, -1, 1]]) * 1e-6, torch.tensor([[1] * 8 + [0]]))
    close(whitened[0, :2], [-0.007499648462217308, 0.0024998828207391023])                  # masked_whiten-07


def test_X_gae_differs_from_a_fixture():
    for given, expected in fixtures("gae"):
        mask = wide = torch.tensor(given["response_mask"])
        if given["kind"] == "padded":             # TRL has the score, and a value, one position after the end
            wide = (torch.arange(mask.shape[1]) <= torch.tensor(given["sequence_lengths"])[:, None]
                    + 1).long()
        advantages, returns = gae(tensor(given["rewards"]), tensor(given["values"]), wide, given["gamma"],
                                  given["lam"])
        close(advantages, expected["advantages_raw"])
        close(returns, expected["returns"])
        if given["kind"] == "padded":
            close(masked_whiten(advantages, mask) * mask, expected["advantages_whitened_biased"])


def test_M_kl_rewards_differ_from_a_fixture():
    k1 = [case for case in fixtures("kl_rewards")
          if case[0].get("kl_penalty", "kl") == "kl" and case[0].get("kl_estimator", "k1") == "k1"]
    assert len(k1) == 4
    for given, expected in k1:
        mask = torch.tensor(given["response_mask"])
        scores, logps, ref = (tensor(given[key]) for key in ("scores", "logprobs", "ref_logprobs"))
        if "score_position" in expected:                    # one after the end, where there is room
            logps = torch.where(mask.bool(), logps, ref)
            mask = (torch.arange(mask.shape[1]) <= torch.tensor(expected["score_position"])[:, None]).long()
        rewards = kl_penalised_rewards(scores, logps, ref, mask, given["kl_coef"])
        close(rewards, expected.get("rewards_masked", expected["rewards"]))


def test_Y_mean_or_whitening_differs_from_a_fixture():
    for given, expected in fixtures("masked_whiten"):
        x, mask = tensor(given["values"]), torch.tensor(given["mask"])
        close(masked_mean(x, mask), expected["masked_mean"])
        close(masked_whiten(x, mask), expected["biased_shift"])
        close(masked_whiten(x, mask, shift_mean=False), expected["biased_noshift"])


@pytest.mark.parametrize("name, loss, clip, inputs, outputs", [
    ("ppo_policy_loss", policy_loss, "cliprange", ("new_logprobs", "old_logprobs", "advantages"),
     ("pg_loss", "grad_new_logprobs")),
    ("ppo_value_loss", value_loss, "cliprange_value", ("vpreds", "old_values", "returns"),
     ("vf_loss", "grad_vpreds"))])
def test_loss_or_gradient_differs_from_a_fixture(name, loss, clip, inputs, outputs):
    for given, expected in fixtures(name):
        args = *(tensor(given[key]) for key in inputs), torch.tensor(given["mask"]), given[clip]
        for got, key in zip(gradient(loss, *args), outputs):
            close(got, expected[key])
        if "clipfrac_masked" in expected:
            close(loss(*args)[1], expected["clipfrac_masked"])


# --------------------------------------------------------------------------------------------- pure functions

@pytest.mark.parametrize("advantage, ratio, loss, slope, held", [
    (1, 1.5, -1.2, 0, 1), (1, 1.1, -1.1, -1.1, 0), (1, 0.5, -0.5, -0.5, 0),   # a good token: no more than 1.2
    (-1, 0.5, 0.8, 0, 1), (-1, 0.9, 0.9, 0.9, 0), (-1, 1.5, 1.5, 1.5, 0)])       # a bad one: no less than 0.8
def test_policy_clip_holds_the_wrong_side(advantage, ratio, loss, slope, held):
    args = tensor([[math.log(ratio) - 2]]), tensor([[-2.0]]), tensor([[advantage]]), torch.ones(1, 1), 0.2
    for got, expected in zip((*gradient(policy_loss, *args), policy_loss(*args)[1]), (loss, [[slope]], held)):
        close(got.detach(), expected)


@pytest.mark.parametrize("moved, target, loss, slope", [
    (0.5, 1, 0.32, 0), (-0.5, -1, 0.32, 0), (0.5, -1, 1.125, 1.5), (-0.5, 1, 1.125, -1.5),
    (0.1, 1, 0.405, -0.9)])
def test_Z_value_clip_holds_the_wrong_side(moved, target, loss, slope):
    args = tensor([[3 + moved]]), tensor([[3.0]]), tensor([[3.0 + target]]), torch.ones(1, 1), 0.2
    for got, expected in zip(gradient(value_loss, *args), (loss, [[slope]])):
        close(got, expected)


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, for one response, as lists."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.0, 0.9), (1.0, 1.0)])
def test_X_gae_differs_from_its_definition(gamma, lam):
    mask, rewards, values, _ = ragged(seed=1)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(mask.bool()):
        close(advantages[i, row],
              gae_by_definition(rewards[i, row].tolist(), values[i, row].tolist(), gamma, lam))
        if gamma == lam == 1:
            close(advantages[i, row], rewards[i, row].flip(0).cumsum(0).flip(0) - values[i, row])
    close(returns, (advantages + values) * mask)
    assert (advantages[mask == 0] == 0).all()


def test_M_rewards_do_not_sum_to_score_less_penalty():
    mask, logps, ref_logps, _ = ragged()
    scores = rand(5, seed=3)
    rewards = kl_penalised_rewards(scores, logps, ref_logps, mask, 0.3)
    close(rewards.sum(1), torch.where(mask.any(1), scores - 0.3 * ((logps - ref_logps) * mask).sum(1), 0))


def test_M_score_is_not_at_the_last_token_of_its_response():
    mask, logps, ref_logps, _ = ragged()
    scores = rand(5, seed=3)
    rewards = kl_penalised_rewards(scores, logps, ref_logps, mask, 0.3)
    for i, last in ((0, 6), (1, 0), (2, 6), (4, 7)):
        close(rewards[i, last], scores[i] - 0.3 * (logps - ref_logps)[i, last])


SCORES = torch.arange(5.0)
PURE = {"mean": lambda m, a, b, c: masked_mean(a, m), "whiten": lambda m, a, b,
        c: masked_whiten(a, m)[m.bool()],
        "rewards": lambda m, a, b, c: kl_penalised_rewards(SCORES, a, b, m, 0.1),
        "gae": lambda m, a, b, c: torch.cat(gae(a, b, m, 0.9, 0.8), 1),
        "policy": lambda m, a, b, c: torch.stack(policy_loss(a, b, c, m, 0.2)),
        "value": lambda m, a, b, c: value_loss(a, b, c, m, 0.2)}


@pytest.mark.parametrize("name", PURE)
def test_Y_P_what_stands_outside_the_mask_matters_or_inputs_are_changed(name):
    mask, *rows = given = ragged()
    before = [x.clone() for x in given]
    clean = PURE[name](*given)
    assert all(map(torch.equal, given, before))
    close(PURE[name](mask.bool(), *rows), clean)
    for junk in (1e9, math.inf, math.nan):
        dirty = [torch.where(mask.bool(), x, junk) for x in rows]
        close(PURE[name](mask, *dirty), clean)
        if name == "policy" or name == "value" and junk == 1e9:
            loss = policy_loss if name == "policy" else value_loss
            close(gradient(loss, *dirty, mask, 0.2)[1], gradient(loss, *rows, mask, 0.2)[1] * mask)


def test_Y_empty_mask_one_token_or_no_variance_gives_nan():
    mask, a, b, c = ragged()
    none, one = torch.zeros_like(mask), F.one_hot(torch.tensor([3] * 5),
                                                  8) * F.one_hot(torch.tensor(2), 5)[:, None]
    for name in ("mean", "rewards", "gae", "policy", "value"):
        assert (PURE[name](none, a, b, c) == 0).all()
    for loss in (policy_loss, value_loss):
        assert (gradient(loss, a, b, c, none, 0.2)[1] == 0).all()
    assert masked_whiten(a, none).isfinite().all() and one.sum() == one[2, 3] == 1
    assert masked_whiten(a, one)[2, 3] == 0 and masked_whiten(a, one, shift_mean=False)[2, 3] == a[2, 3]
    assert (masked_whiten(torch.full_like(a, 2.5), mask) == 0).all()


def test_kl_coef_adapts_the_wrong_way_or_without_a_cut():
    for kl, factor in ((6, 1), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60, 1.02), (4.8, 0.98), (-6, 0.98)):
        assert adapted_kl_coef(0.5, kl, 6.0, 100, 1000) == pytest.approx(0.5 * factor)


def test_H_penalty_is_not_the_exact_kl_or_drives_the_policy_away():
    theta, ref = rand(2, 5).log_softmax(1)
    policy, ones = theta.requires_grad_().log_softmax(0), torch.ones(5, 1)       # five responses of one token

    def kl(p, q):
        return (p.exp() * (p - q)).sum().item()

    rewards = kl_penalised_rewards(torch.zeros(5), policy.detach()[:, None], ref[:, None], ones, 1.0)
    assert -(policy.exp() @ rewards).item() == pytest.approx(kl(policy, ref), rel=1e-9)
    assert abs(kl(policy, ref) - kl(ref, policy)) > 0.01
    weighted = gae(rewards, 0 * rewards, ones, 1, 1)[0] * policy.detach().exp()[:, None]
    policy_loss(policy[:, None], policy.detach()[:, None], weighted, ones, 0.2)[0].backward()
    assert kl((theta - 0.1 * theta.grad).log_softmax(0), ref) < kl(policy, ref) - 1e-3


# ---------------------------------------------------------------------------------------------- the toy model

def save(path, letters="abc", hidden=16):
    """A directory with a random Llama whose distributions are far from uniform."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<eos>", *letters])},
                                      unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                            model_max_length=64).save_pretrained(path)
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(vocab_size=4, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=2, max_position_embeddings=96, initializer_range=0.3,
                                 eos_token_id=0, pad_token_id=0, bos_token_id=None)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save(tmp_path_factory.mktemp("toy"))


PROMPTS = ["a", "bc", "cab", "b", "ca", "abcab", "cc"]


def settings(toy, **kwargs):
    return ppo.Config(**{**dict(model=str(toy), data="toy.jsonl", reward="gold", max_length=64,
                                max_new_tokens=6,
                                batch_size=4, minibatch_size=2, ppo_epochs=2, epochs=1.0, lr=1e-2,
                                eval_prompts=2,
                                eval_samples=2, save_every=0, device="cpu", quiet=True), **kwargs})


def perturbed(model):
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.1 * rand(*parameter.shape, seed=i)
    return model


def prepared(toy, out, **kwargs):
    """(Run, reference, value model) in float64; the policy is off its reference, the values are off 0."""
    config = settings(toy, **kwargs)
    out.mkdir(exist_ok=True)
    tokenizer, policy = harness.load_tokenizer(config), perturbed(harness.load_policy(config).double())
    value_model = perturbed(common.load_value_model(toy, tokenizer, "cpu").double())
    run = harness.Run(config, out, Task("toy", {"train": PROMPTS, "test": ["ab", "c"]}), tokenizer, policy,
                      {},
                      {"kl_coef": config.kl_coef}, trained=torch.nn.ModuleList([policy, value_model]))
    torch.manual_seed(0)
    return run, loading.load_reference(config).double(), value_model


def count_a(prompts, responses):
    return torch.tensor([float(text.count("a")) for text in responses])


def train(run, plan, reward, reference, value_model):
    """ppo.train with the prompts of the plan's steps, and with this reward and these models."""
    prompts, rows = sum(map(list, plan), []), iter(range(sum(map(len, plan))))
    steps = [[next(rows) for _ in step] for step in plan]
    run.task.prompts["train"] = prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "shuffled_batches", lambda *args: steps)
        patch.setattr(harness, "reward_to_maximise", lambda run: reward)
        patch.setattr(common, "load_value_model", lambda *args: value_model)
        patch.setattr(run, "load_reference", lambda: reference)
        ppo.train(run)


def trained(toy, out, plan=(PROMPTS[:4], PROMPTS[4:]), reward=count_a, **kwargs):
    """A finished Run, and the rows of metrics.jsonl that training logged."""
    run, reference, value_model = prepared(toy, out, **kwargs)
    train(run, plan, reward, reference, value_model)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return run, [row for row in rows if "loss/policy" in row]


def sgd(model, lr, steps, schedule="linear", warmup=0.0):
    """Stands in for common.adamw: Adam's first steps hide a gradient's scale, and clipping does too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


UNCLIPPED = {"max_grad_norm": 1e9}
NO_STEP = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)                   # optimizer or schedule


def spy(monkeypatch, module, name, note):
    """Call note(result, *arguments) after each call of module.name."""
    plain = getattr(module, name)

    def call(*args, **kwargs):
        result = plain(*args, **kwargs)
        note(result, *args)
        return result

    monkeypatch.setattr(module, name, call)


def plain_logps(model, prompt, response, temperature):
    """The oracle: one row without padding or mask, softmax of logits / temperature."""
    with torch.no_grad():
        logps = (model(torch.tensor([prompt + response])).logits[0] / temperature).log_softmax(-1)
    return [logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]


# ---------------------------------------------------------------------------------------- rollout and rewards

@pytest.mark.parametrize("temperature, whiten", [(1.0, False), (0.7, False), (0.7, True)])
def test_M_D_I_rollout_differs_from_a_loop_over_rows(toy, tmp_path, monkeypatch, temperature, whiten):
    # the second has no EOS
    rows, totals, given = [([1], [1, 2, 0]), ([2, 3], [1, 2, 3, 1])], (2.0, 3.0 - 0.25), []
    batch = pack(rows, 0)
    monkeypatch.setattr(harness, "rollout", lambda run,
                        _: (batch, ["", ""], common.finished(run.tokenizer, batch)))
    spy(monkeypatch, ppo, "gae", lambda _, *args: given.append(args[0]))
    run, reference, value_model = prepared(toy, tmp_path, temperature=temperature, kl_coef=0.3, gamma=0.9,
                                           missing_eos_penalty=0.25, whiten_rewards=whiten, token_budget=7)
    old = ppo.collect(run, ["a", "bc"], lambda *_: torch.tensor([2.0, 3.0]), reference, value_model)
    assert old.scores.tolist() == [2, 3] and old.ended.tolist() == [True, False]
    rewards, values, logps = [], [], []
    for (prompt, response), total in zip(rows, totals):
        logps += plain_logps(run.policy, prompt, response, temperature)
        ratios = [p - q for p,
                  q in zip(logps[-len(response):], plain_logps(reference, prompt, response, temperature))]
        rewards += [-0.3 * ratio for ratio in ratios[:-1]] + [total - 0.3 * ratios[-1]]
        with torch.no_grad():
            states = value_model.base_model(torch.tensor([prompt + response])).last_hidden_state
            values += value_model.score(states)[0, len(prompt) - 1:-1, 0].tolist()
    rewards, values, mask = tensor(rewards), tensor(values), old.mask.bool()
    if whiten:
        rewards = (rewards - rewards.mean()) / rewards.std(correction=0) + rewards.mean()
    assert mask.sum(1).tolist() == [3, 4] and values.std() > 0.05
    close(old.logps[mask], logps)
    close(given[0][mask], rewards, 1e-6)
    close(old.values[mask].double(), values, 1e-6)
    advantages = tensor([a for part in ([0, 1, 2], [3, 4, 5, 6])
                         for a in gae_by_definition(rewards[part].tolist(), values[part].tolist(), 0.9,
                                                    0.95)])
    close(old.returns[mask], advantages + values, 1e-6)
    close(old.advantages[mask], (advantages - advantages.mean()) / advantages.std(correction=0), 1e-6)


def test_I_samples_are_drawn_at_another_temperature_than_scored(toy, tmp_path):
    run, reference, value_model = prepared(toy, tmp_path, temperature=0.02)
    old = ppo.collect(run, PROMPTS, count_a, reference, value_model)
    for ids, seen, answer, logps in zip(*old.batch.tensors(), old.logps):
        expected = plain_logps(run.policy, ids[seen > answer].tolist(), ids[answer.bool()].tolist(), 0.02)
        close(logps[answer[1:].bool()], expected, 1e-4)
    assert masked_mean(-old.logps, old.mask) < 0.1          # nearly greedy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_expected_gradient_is_not_that_of_reward_less_kl(toy, tmp_path, temperature):
    """Over all that three sampling steps can give: 13 responses with EOS and 27 that are cut."""
    run, reference, _ = prepared(toy, tmp_path)
    words = [[list(word) for word in itertools.product((1, 2, 3), repeat=n)] for n in range(4)]
    batch = pack([([1, 2], word) for word in [word + [0] for n in range(3) for word in words[n]] + words[3]],
                 0)
    mask, scores, weights = batch.response_mask[:, 1:], rand(40), list(run.policy.parameters())
    logps, ref_logps = (common.token_logps(model, batch, temperature) for model in (run.policy, reference))
    probabilities, old = logps.sum(1).exp(), logps.detach()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    objective = (probabilities * (scores - 0.3 * (logps - ref_logps).sum(1))).sum()
    exact = torch.autograd.grad(objective, weights, retain_graph=True)
    rewards = kl_penalised_rewards(scores, old, ref_logps, mask, 0.3)
    advantages = gae(rewards, 0 * rewards, mask, 1.0, 1.0)[0] * probabilities.detach()[:, None]
    loss = policy_loss(logps, old, advantages, mask, 0.2)[0] * mask.sum()            # the sum over tokens
    for expected, got in zip(exact, torch.autograd.grad(loss, weights)):
        close(-got, expected, 1e-5)                         # the norms inside a Llama are float32
    assert max(grad.abs().max() for grad in exact) > 0.01


# ---------------------------------------------------------------------------------------------------- updates

def test_one_update_differs_from_a_plain_policy_gradient_step(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    kept = []
    spy(monkeypatch, ppo, "collect", lambda old, run, *_: kept.extend((old, copy.deepcopy(run.trained))))
    run, _ = trained(toy, tmp_path, [PROMPTS], ppo_epochs=1, batch_size=7, minibatch_size=7, temperature=0.7,
                     vf_coef=0.3, **UNCLIPPED)
    old, networks = kept
    where, start = old.mask.bool(), parameters(networks).clone()
    assert len(set(where.sum(1).tolist())) > 2
    gains = (old.advantages * common.token_logps(networks[0], old.batch, 0.7))[where]
    errors = (common.token_values(networks[1], old.batch) - old.returns)[where]
    (-gains.mean() + 0.3 * 0.5 * (errors ** 2).mean()).backward()
    optimizer, _ = sgd(networks, None, None)
    optimizer.step()
    assert (parameters(networks) - start).abs().max() > 1e-3
    close(parameters(run.trained), parameters(networks), 1e-6)


def test_O_AH_token_budget_or_padding_changes_what_is_learned_or_logged(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    sizes, used, results, rollout = [], [], [], harness.rollout
    spy(monkeypatch, ppo, "policy_loss", lambda _, new_logps, *__: sizes.append(len(new_logps)))
    spy(monkeypatch, ppo, "update", lambda _, run, old, rows, *__: used.append(rows.tolist()))

    def wide(run, prompts):
        batch, *rest = rollout(run, prompts)
        return common.Batch(*(F.pad(x, (3, 5)) for x in batch.tensors())), *rest

    for budget, padding, parts in ((100000, False, [3] * 4 + [1, 1]), (1, False, [1] * 14),
                                   (16, False, None), (100000, True, [3] * 4 + [1, 1])):
        sizes.clear(), used.clear()
        monkeypatch.setattr(harness, "rollout", wide if padding else rollout)
        run, rows = trained(toy, tmp_path / f"{budget} {padding}", [PROMPTS[:6], PROMPTS[6:]],
                            token_budget=budget,
                            batch_size=6, minibatch_size=3, kl_coef=0.3, clip=0.01, **UNCLIPPED)
        # Six prompts, then a ragged one. With a budget in between, only long rows are split.
        assert len(rows) == 2 and (sizes == parts or not parts and sum(sizes) == 14 and 6 < len(sizes) < 14)
        assert [sorted(used[i] + used[i + 1])
                for i in (0, 2)] == [list(range(6))] * 2 and used[:2] != used[2:4]
        results.append((parameters(run.trained), rows))
    weights, rows = results[0]
    assert (weights - parameters(prepared(toy, tmp_path)[0].trained)).abs().max() > 1e-3
    assert all(abs(rows[0][name]) > 1e-6 for name in ("policy/clipfrac", "policy/approxkl", "objective/kl"))
    for other, other_rows in results[1:]:
        close(other, weights, 1e-6)
        assert all(row == pytest.approx(expected, abs=1e-5, rel=1e-5) for row,
                   expected in zip(other_rows, rows))


@pytest.mark.parametrize("lr", [1e-30, 1e-2])
def test_G_ratio_is_not_1_before_the_first_update_or_without_one(toy, tmp_path, monkeypatch, lr):
    off, seen, rates = [], [], []
    spy(monkeypatch, ppo, "policy_loss", lambda _, new, old, *__: off.append((new - old).abs().max().item()))
    def note(metrics, run, old, rows, networks, optimizer, schedule):
        seen.append(metrics)
        rates.extend(schedule.get_last_lr())

    spy(monkeypatch, ppo, "update", note)
    trained(toy, tmp_path, [PROMPTS[:4], PROMPTS[:2]], lr=lr, token_budget=1, temperature=0.7)
    assert len(seen) == 6 and len(off) == 12        # passes over two minibatches, then over one; of two parts
    for i, metrics in enumerate(seen):
        furthest, approxkl = max(off[2 * i:2 * i + 2]), metrics["policy/approxkl"]
        if lr == 1e-30 or i in (0, 4):
            assert furthest < 1e-5 and approxkl < 1e-8 and metrics["policy/clipfrac"] == 0
            assert metrics["val/ratio"].item() == pytest.approx(1, abs=1e-5)
        else:
            assert furthest > 1e-3 and approxkl > 1e-5
    assert rates == pytest.approx([lr * (1 - i / 6) for i in range(1, 7)])           # 0 with the last update


@pytest.mark.parametrize("fault", ["dropout", "temperature"])
def test_G_policy_that_scores_otherwise_than_before_goes_unnoticed(toy, tmp_path, monkeypatch, fault):
    run, *models = prepared(toy, tmp_path)
    before, plain = parameters(run.trained).clone(), common.token_logps
    if fault == "dropout":
        run.policy.train()
        for layer in run.policy.model.layers:
            layer.self_attn.attention_dropout = 0.5
    else:
        monkeypatch.setattr(common, "token_logps", lambda model, batch, temperature: plain(
            model, batch, temperature * (1.1 if torch.is_grad_enabled() else 1)))
    with pytest.raises(AssertionError, match="ratio is not 1"):
        train(run, [PROMPTS[:4]], count_a, *models)
    assert torch.equal(parameters(run.trained), before)


def test_Z_policy_and_value_loss_reach_into_each_others_network(toy, tmp_path, monkeypatch):
    run, reference, value_model = prepared(toy, tmp_path, **UNCLIPPED)
    storages = [{p.data_ptr() for p in model.parameters()} for model in (run.policy, reference, value_model)]
    assert len(set.union(*storages)) == sum(map(len, storages))
    norms = []

    def note():
        norms.append([sum(p.grad.norm().item() for p in network.parameters()) for network in run.trained])

    optimizer = SimpleNamespace(step=note, zero_grad=run.trained.zero_grad)
    old = ppo.collect(run, PROMPTS, count_a, reference, value_model)
    for change in (dict(), dict(advantages=0 * old.advantages), dict(returns=old.values)):
        ppo.update(run, SimpleNamespace(**(vars(old) | change)), torch.arange(7), run.trained, optimizer,
                   NO_STEP,
                   first=True)
    both, only_value, only_policy = norms
    assert (only_value == pytest.approx([0, both[1]]) and only_policy == pytest.approx([both[0], 0])
            and min(both) > 0.01)


@pytest.mark.parametrize("bound", [1e-3, 1e9])
def test_gradients_of_both_networks_are_not_clipped_together_or_the_clipped_norm_is_logged(
        toy, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(common, "adamw", sgd)
    kept = []
    spy(monkeypatch, ppo, "collect", lambda old, run, *_: kept.append(parameters(run.trained)))
    run, [row] = trained(toy, tmp_path, [PROMPTS], ppo_epochs=1, batch_size=7, minibatch_size=7,
                         max_grad_norm=bound)
    moved = (parameters(run.trained) - kept[0]).norm().item()
    assert row["grad_norm"] > 0.01 and moved == pytest.approx(0.05 * min(bound, row["grad_norm"]), rel=1e-3)


def test_Z_values_are_not_0_at_the_start_or_token_ids_are_misread(toy, tmp_path):
    run, *_ = prepared(toy, tmp_path)
    value_model = common.load_value_model(toy, run.tokenizer, "cpu")
    assert (common.token_values(value_model, pack([([1], [1, 2, 0]), ([2, 3], [1])], 0)) == 0).all()
    assert torch.equal(value_model.base_model.embed_tokens.weight,
                       harness.load_policy(run.config).model.embed_tokens.weight)
    common.load_value_model(save(tmp_path / "same", hidden=8), run.tokenizer, "cpu")
    with pytest.raises(UserError, match="value model .*other has another tokenizer") as error:
        common.load_value_model(save(tmp_path / "other", "bca"), run.tokenizer, "cpu")
    assert "\n" not in str(error.value)


def test_logged_numbers_differ_from_their_definitions(toy, tmp_path, monkeypatch):
    kept, seen = [], []
    spy(monkeypatch, ppo, "collect", lambda old, *_: kept.append((old, copy.deepcopy(old))))
    spy(monkeypatch, ppo, "update", lambda metrics, *_: seen.append(metrics))
    run, [row] = trained(toy, tmp_path, [PROMPTS], temperature=0.7, lr=3e-2, clip=0.3, value_clip=0.1)
    [(old, untouched)] = kept
    assert all(torch.equal(value, getattr(untouched, name)) for name,
               value in vars(old).items() if name != "batch")
    where = old.mask.bool()
    errors, returns, logps = (x[where] for x in (old.returns - old.values, old.returns, old.logps))
    expected = {"objective/scores": old.scores.mean(),
                "objective/kl": (logps - old.ref_logps[where]).sum() / 7,
                "objective/kl_coef": 0.05, "objective/entropy": -logps.mean(),
                "eos_rate": old.ended.float().mean(),
                "val/explained_variance": 1 - errors.var() / returns.var()}
    expected |= {name: sum(metrics[name] for metrics in seen) / 8 for name in seen[0]}
    assert row == pytest.approx({"step": 1} | {name: float(value) for name, value in expected.items()},
                                rel=1e-5)

    rows = torch.tensor([5, 0, 3])
    batch, mask, gains = old.batch[rows], old.mask[rows], old.advantages[rows]
    with torch.no_grad():
        logps, values = common.token_logps(run.policy, batch, 0.7), common.token_values(run.trained[1], batch)
    ratios = (logps - old.logps[rows]).exp()
    held = (gains > 0) & (ratios > 1.3) | (gains < 0) & (ratios < 0.7)
    expected = {"policy/clipfrac": masked_mean(held.double(), mask), "val/ratio": masked_mean(ratios, mask),
                "policy/approxkl": 0.5 * masked_mean(ratios.log() ** 2, mask),
                "loss/policy": policy_loss(logps, old.logps[rows], gains, mask, 0.3)[0],
                "loss/value": value_loss(values, old.values[rows], old.returns[rows], mask, 0.1)}
    run.config.token_budget = 1
    metrics = ppo.update(run, old, rows, run.trained, NO_STEP, NO_STEP, first=False)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5) and abs(value) > 0.01


def test_costs_are_not_what_reward_reference_and_value_model_read(toy, tmp_path, monkeypatch):
    batches, reward = [], Counting(count_a)
    spy(monkeypatch, harness, "rollout", lambda found, *_: batches.append(found))
    run, _ = trained(toy, tmp_path, [PROMPTS[:4]] * 3, reward, token_budget=20)       # twice over each sample
    read = sum(int(batch.attention_mask.sum()) for batch, *_ in batches)
    texts = sum(len(text) + 1 for _, texts, _ in batches for text in texts) + 3 * sum(map(len, PROMPTS[:4]))
    assert len(batches) == 3 and texts > read               # the reward reads a cut text with an EOS
    assert run.counts["tokens_scored_reference"] == run.counts["tokens_scored_value"] == read
    assert run.counts["tokens_scored_reward"] == reward.tokens == texts
    assert run.counts["tokens_trained"] == 2 * read


def test_kl_coef_does_not_adapt_from_step_to_step(toy, tmp_path, monkeypatch):
    used = []
    spy(monkeypatch, ppo, "kl_penalised_rewards", lambda _, *args: used.append(args[-1]))
    _, rows = trained(toy, tmp_path, [PROMPTS[:4]] * 3, kl_target=0.3, kl_horizon=20)
    assert used == [row["objective/kl_coef"] for row in rows] and used[0] == 0.05 and len(set(used)) == 3
    for row, after in zip(rows, used[1:]):
        assert after == pytest.approx(adapted_kl_coef(row["objective/kl_coef"], row["objective/kl"], 0.3, 4,
                                                      20))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_AD_reward_that_is_not_finite_moves_the_weights(toy, tmp_path, value):
    run, *models = prepared(toy, tmp_path)
    kept = []

    def reward(prompts, responses):
        kept.append(parameters(run.trained).clone())
        return torch.tensor([0.5, 1.0, value if len(kept) == 2 else 1.5, 2.0])

    with pytest.raises(UserError, match=f"step 2: the reward is {value} for the prompt 'cab'"):
        train(run, [PROMPTS[:4]] * 3, reward, *models)
    assert not torch.equal(kept[0], kept[1]) and torch.equal(parameters(run.trained), kept[1])


def test_AD_run_that_diverges_is_not_told_so(toy, tmp_path):
    with pytest.raises(UserError, match="step 1: the policy's log-prob is"):
        trained(toy, tmp_path, lr=1e30)


def test_easy_reward_is_not_learned_or_a_huge_penalty_does_not_hold(toy, tmp_path):
    runs = [trained(toy, tmp_path / str(kl_coef), [PROMPTS * 4] * 6, batch_size=28, minibatch_size=14,
                    kl_coef=kl_coef)[1] for kl_coef in (0.0, 100.0)]
    scores, kl = ([[row[f"objective/{name}"] for row in rows] for rows in runs] for name in ("scores", "kl"))
    assert scores[0][-1] > scores[0][0] + 1.5
    assert kl[0][-1] > 2 * kl[0][0] and kl[1][-1] < kl[1][0]                    # driven back to the reference


# ---------------------------------------------------------------------------------------- options, whole runs

@pytest.mark.parametrize("flag, wrong", [
    ("--minibatch_size 4", dict(batch_size=10, minibatch_size=4)),
    ("--kl_target", dict(kl_target=6, kl_coef=0)),
    ("--minibatch_size 8", dict(batch_size=4, minibatch_size=8)),
    *[(f"--{name}", {name: value}) for name, value in (
("minibatch_size", 0), ("ppo_epochs", 0), ("kl_coef", -0.1), ("kl_coef", math.nan), ("kl_target", 0),
("lr", 0),
("kl_target", -6), ("kl_horizon", 0), ("clip", 0), ("value_clip", -1), ("gamma", 1.5), ("lam", -0.1))]])
def test_bad_option_passes_or_its_flag_is_not_named(flag, wrong):
    with pytest.raises(UserError, match=flag):
        ppo.Config(**wrong)


@pytest.fixture
def whole(toy, tmp_path, monkeypatch):
    """Runs everything: whole(name, ...) -> (metrics.jsonl, all trained weights)."""
    data = Task("toy", {"train": PROMPTS, "test": ["ab", "c"]},
                gold=lambda prompt, response, ended: float(response.count("a")))
    kept = []
    monkeypatch.setattr(loading, "load_task", lambda config: data)
    spy(monkeypatch, ppo, "train", lambda _, run: kept.append(parameters(run.trained)))

    def run(name, **kwargs):
        harness.launch(ppo.train,
                       settings(toy, **{**dict(out=str(tmp_path / name), epochs=1.0, lr=3e-3), **kwargs}))
        return (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8"), kept.pop()

    return run


def test_value_model_starts_from_something_else_than_the_policy_or_value_model(
        toy, tmp_path, monkeypatch, whole):
    paths = []
    spy(monkeypatch, common, "load_value_model", lambda _, path, *__: paths.append(path))
    other = save(tmp_path / "values", hidden=8)
    whole("policy"), whole("other", value_model=str(other))
    assert [str(path) for path in paths] == [str(toy), str(other)]


def test_AF_resumed_run_differs_from_a_straight_one(tmp_path, whole):
    options = dict(epochs=3.0, save_every=3, eval_every=2, kl_target=0.1, kl_horizon=30)
    straight, weights = whole("straight", **options)
    with killed_after(4):                         # two steps past the checkpoint, with an evaluation between
        whole("killed", **options)
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["step"] == 3 and state["state"]["kl_coef"] != 0.05
    torch.manual_seed(999)
    resumed, resumed_weights = whole("killed", resume=True, **options)
    assert resumed == straight and json.loads(straight.splitlines()[-1])["step"] == 6
    assert torch.equal(resumed_weights, weights)


def test_AE_run_is_not_reproducible_or_heeds_evaluations_or_not_its_seed(whole):
    (first, weights), (again, _), (other, _) = whole("a"), whole("b"), whole("c", seed=1)
    assert first == again != other
    watched, watched_weights = whole("d", eval_every=1)
    steps, watched_steps = ([line for line in text.splitlines() if "loss/" in line]
                            for text in (first, watched))
    assert steps == watched_steps and len(watched.splitlines()) == len(first.splitlines()) + 1
    assert torch.equal(weights, watched_weights)
    before, after = (json.loads(line)["objective/kl"] for line in steps)     # a reference that moves along: 0
    assert abs(before) < 1e-5 and abs(after) > 1e-3


def test_default_minibatch_is_not_half_of_a_rollout():
    for batch_size, minibatch_size in ((128, 64), (10, 5), (9, 9), (15, 15), (2, 1), (1, 1)):
        assert ppo.Config(batch_size=batch_size).minibatch_size == minibatch_size
    assert ppo.Config(batch_size=12, minibatch_size=4).minibatch_size == 4


def test_single_token_that_bfloat16_moves_stops_the_run(toy, tmp_path):
    run, reference, value_model = prepared(toy, tmp_path)
    old = ppo.collect(run, PROMPTS, count_a, reference, value_model)
    row, column = old.mask.nonzero()[0]
    old.logps[row, column] += 0.3
    for dtype in (torch.bfloat16, torch.float32):
        run.policy.compute_dtype = dtype
        with contextlib.nullcontext() if dtype == torch.bfloat16 else pytest.raises(AssertionError):
            ppo.update(run, old, torch.arange(7), run.trained, NO_STEP, NO_STEP, first=True)


def test_lambda_of_gae_is_not_the_option(toy, tmp_path, monkeypatch):
    seen = []
    spy(monkeypatch, ppo, "gae", lambda _, *args: seen.append(args[3:]))
    run, *models = prepared(toy, tmp_path, gamma=0.9, lam=0.5)
    ppo.collect(run, PROMPTS, count_a, *models)
    assert seen == [(0.9, 0.5)]
