"""remax.py: returns, loss, the gradient's variance, and training.

Letters are the bug classes that a test would catch.
"""
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import common
import harness
import remax
import tasks
from common import UserError
from conftest import Counting, cases, close, killed_after, parameters, sgd, tensor
from harness import loading
from remax import gradient_variance, remax_loss, remax_returns
from tasks import Pair, Task


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(expected, tolerance=1e-9):
    return pytest.approx(expected, rel=tolerance, abs=tolerance)


# ------------------------------------------------------------------------------------------- returns and loss

ZERO, KL, ONES = tensor([0.0]), tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3)


@pytest.mark.parametrize("reward, kl_coef, gamma, expected", [
    (0.0, 1.0, 1.0, [-6.0, -5.0, -3.0]), (0.0, 0.1, 1.0, [-0.6, -0.5, -0.3]),
    (2.0, 0.0, 1.0, [2.0, 2.0, 2.0]),
    (2.0, 0.1, 1.0, [1.4, 1.5, 1.7]), (2.0, 0.0, 0.5, [0.5, 1.0, 2.0]), (0.0, 1.0, 0.5, [-2.75, -3.5, -3.0]),
    (2.0, 1.0, 0.5, [-2.25, -2.5, -1.0]), (2.0, 1.0, 0.0, [-1.0, -2.0, -1.0])])
def test_W_M_returns_are_not_those_by_hand(reward, kl_coef, gamma, expected):
    ref = -rand(1, 3).abs()
    close(remax_returns(ZERO + reward + 7, ZERO + 7, ref + KL, ref, ONES, kl_coef, gamma), [expected])
    padded = [F.pad(x, (2, 1)) for x in (ref + KL, ref, ONES)]                  # a prompt before, a pad after
    close(remax_returns(ZERO + reward, ZERO, *padded, kl_coef, gamma), [[0, 0, *expected, 0]])
    close(remax_returns(rewards=ZERO + 2, baseline_rewards=ZERO, logps=ref + KL, ref_logps=ref, mask=ONES,
                        kl_coef=0.1),
          [[1.4, 1.5, 1.7]])


def plain_returns(advantage, ratios, kl_coef, gamma):
    """The returns of one response, from its log-ratios."""
    n = len(ratios)
    return [gamma ** (n - 1 - t) * advantage - kl_coef
            * sum(gamma ** (s - t) * ratios[s] for s in range(t, n))
            for t in range(n)]


def ragged():
    """Rewards, baselines, logps, ref_logps and mask of four rows.

    Two tokens after a prompt, a full row, none, one.
    """
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    return [rand(4, seed=1), rand(4, seed=2), -rand(4, 4, seed=3).abs(), -rand(4, 4, seed=4).abs(), mask]


def test_W_Y_P_loss_or_gradient_differ_from_the_sums_written_out():
    rewards, baselines, logps, ref_logps, mask = given = ragged()
    before = [x.clone() for x in given]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        row = mask[i].bool()
        expected[i, row] = tensor(plain_returns(rewards[i] - baselines[i], (logps - ref_logps)[i, row], 0.3,
                                                0.9))
    for kind in (torch.int64, torch.bool, torch.float64):
        returns = remax_returns(*given[:4], mask.to(kind), 0.3, 0.9)
        close(returns, expected)
        assert (returns[mask == 0] == 0).all()
        trained = logps.clone().requires_grad_()
        loss = remax_loss(trained, returns, mask.to(kind))
        loss.backward()
        close(loss.detach(), -(expected * logps).sum() / 4)
        close(trained.grad, -expected / 4)
    assert all(map(torch.equal, given, before))
    alone = [remax_returns(*(x[i:i + 1] for x in given), 0.3, 0.9) for i in range(4)]
    assert torch.equal(torch.cat(alone), remax_returns(*given, 0.3, 0.9))
    assert remax_loss(logps[2:3], alone[2], mask[2:3]) == 0


@pytest.mark.parametrize("junk", [1e9, math.inf, math.nan])
def test_Y_pads_enter_returns_loss_or_gradient(junk):
    rewards, baselines, logps, ref_logps, mask = ragged()
    clean = remax_returns(rewards, baselines, logps, ref_logps, mask, 0.3, 0.9)
    dirty, ref = (torch.where(mask.bool(), x, junk) for x in (logps, ref_logps))
    returns = remax_returns(rewards, baselines, dirty.requires_grad_(), ref, mask, 0.3, 0.9)
    assert torch.equal(returns, clean)
    loss = remax_loss(dirty, returns, mask)
    loss.backward()
    close(loss.detach(), remax_loss(logps, clean, mask))
    close(dirty.grad, -clean / 4)


def test_returns_carry_gradient():
    for i in range(4):
        given = ragged()
        given[i].requires_grad_()
        assert not remax_returns(*given, 0.3).requires_grad


def test_returns_or_loss_differ_from_numbers_of_the_official_code():
    """remax-00, second row (liziniu/ReMax 536ba49); KL rewards are summed from the end, as in the paper."""
    old, ref = tensor([[-1.637805, -1.029117, -3.857535]]), tensor([[-2.134728, -0.680365, -4.356645]])
    returns = remax_returns(ZERO - 0.4, ZERO - 0.1, old, ref, ONES, 0.1)
    close(returns, [[-0.3 - 0.0496923 + 0.0348752 - 0.049911, -0.3 + 0.0348752 - 0.049911, -0.3 - 0.049911]])
    returns = remax_returns(ZERO - 0.4, ZERO - 0.1, old, ref, ONES, 0.0)
    close(remax_loss(tensor([[-1.507185, -1.071234, -3.785201]]), returns, ONES), -1.909086)


def test_returns_or_loss_differ_from_a_fixture():
    """The official code discounts the last token too, gives a token its own KL only, averages over tokens."""
    for case in cases("remax"):
        given, expected = case["inputs"], case["expected"]
        start, gamma, kl_coef = given["prompt_len"] - 1, given["gamma"], given["kl_ctl"]
        rewards, baselines, old, ref = (tensor(given[name]) for name in (
            "rewards", "baseline_rewards", "logprobs_old", "ref_logprobs"))
        clipped, own_kl, official, new = (tensor(expected[name]) for name in (
            "advantage_clipped", "kl_reward", "returns", "token_logprobs"))
        mask = F.pad(torch.tensor(expected["action_mask"]), (start, 0))
        discounted = remax_returns(clipped, 0 * clipped, old, ref, mask, 0.0, gamma)[:, start:]
        close(gamma * discounted, official - own_kl)
        to_go = remax_returns(baselines, baselines, old, ref, mask, kl_coef)[:, start:]
        close(to_go, own_kl.flip(1).cumsum(1).flip(1) * mask[:, start:])
        returns = remax_returns(rewards, baselines, old, ref, mask, 0.0)[:, start:]
        close(returns[:, 0], expected["paper"]["advantage"])
        close(remax_loss(new, returns, mask[:, start:]), expected["paper"]["loss_sequence_mean"])


# -------------------------------------------------------------------------------------------- the expectation

PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
# EOS = 0, at most three
RESPONSES = [p + (0,) for p in PREFIXES] + [p + (y,) for p in PREFIXES[3:] for y in (1, 2)]
TOKENS = torch.tensor([(*y, 0, 0)[:3] for y in RESPONSES])
STATES = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(3)] for y in RESPONSES])
MASK = torch.tensor([[int(t < len(y)) for t in range(3)] for y in RESPONSES])


def all_logps(logits):
    """Token log-probs [15, 3] of every response under a policy with a row of logits [7, 3] per prefix."""
    return logits.log_softmax(1)[STATES, TOKENS] * MASK


@pytest.mark.parametrize("kl_coef", [0.0, 0.3, 2.0])
def test_W_H_estimator_is_biased_or_would_be_right_without_kl_to_go(kl_coef):
    logits, ref, rewards = rand(7, 3,
                                seed=5).requires_grad_(), all_logps(rand(7, 3,
                                                                         seed=6)), 2 * rand(15, seed=7) + 1
    logps = all_logps(logits)
    p = logps.sum(1).exp()
    close(p.sum().detach(), 1.0)
    objective = (p * (rewards - kl_coef * (logps - ref).sum(1))).sum()
    exact, = torch.autograd.grad(objective, logits, retain_graph=True)

    def expected(baseline, returns_of=remax_returns):
        losses = []
        for i in range(15):
            row = logps[i:i + 1], ref[i:i + 1], MASK[i:i + 1]
            losses.append(remax_loss(row[0], returns_of(rewards[i:i + 1], baseline.view(1), *row, kl_coef),
                                     row[2]))
        return -torch.autograd.grad((p.detach() * torch.stack(losses)).sum(), logits, retain_graph=True)[0]

    def own_kl_only(rewards, baselines, logps, ref_logps, mask, kl_coef):
        return (rewards - baselines - kl_coef * (logps - ref_logps).detach()) * mask

    greedy, best = (), logits.argmax(1).tolist()
    while greedy in PREFIXES:
        greedy += (best[PREFIXES.index(greedy)],)
    greedy_reward = rewards[RESPONSES.index(greedy)]
    for baseline in (greedy_reward, ZERO, ZERO - 3, ZERO + 50):
        close(expected(baseline), exact)
    assert exact.abs().max() > 0.1
    assert torch.allclose(expected(greedy_reward, own_kl_only), exact, atol=1e-3) == (kl_coef == 0)


def second_moment(p, r1, r2, baseline):
    """Of the gradient with respect to the logit difference of two arms."""
    logit, total, one = tensor(p).logit().requires_grad_(), 0.0, torch.ones(1, 1)
    for probability, reward, logp in ((p, r1, F.logsigmoid(logit)), (1 - p, r2, F.logsigmoid(-logit))):
        returns = remax_returns(ZERO + reward, ZERO + baseline, logp.view(1, 1), logp.view(1, 1), one, 0.05)
        total += probability * torch.autograd.grad(remax_loss(logp.view(1, 1), returns, one),
                                                   logit)[0].item() ** 2
    return total


def test_W_bandit_differs_from_its_formula():
    for p, r1, r2 in itertools.product((0.1, 0.4, 0.6, 0.9), (1.0, 3.0, -2.0), (0.5, 0.1, -1.0)):
        baseline = r1 if p > 0.5 else r2
        gain = second_moment(p, r1, r2, baseline) - second_moment(p, r1, r2, 0.0)
        assert gain == near(p * (1 - p) * baseline * (baseline - 2 * ((1 - p) * r1 + p * r2)))
    assert second_moment(0.9, 1.0, 0.1, 1.0) / second_moment(0.9, 1.0, 0.1,
                                                             0.0) == pytest.approx(6.7, abs=0.05)
    for p in (0.51, 0.7, 0.9, 0.99):                # the greedy arm is the better one, and half as good helps
        assert second_moment(p, 1.0, 0.5, 1.0) < second_moment(p, 1.0, 0.5, 0.0)


# ----------------------------------------------------------------------------------- variance of the gradient

def estimates(gradients, rewards, greedy_rewards):
    """{estimator: [M, P]}, each written out. gradients [M, 2, P], rewards [M, 2], greedy_rewards [M]."""
    table = {}
    for (a, b), (ga, gb), greedy in zip(rewards, gradients, greedy_rewards):
        row = {"REINFORCE, 1 sample": a * ga, "ReMax": (a - greedy) * ga, "REINFORCE": (a * ga + b * gb) / 2,
               "REINFORCE +2": ((a + 2) * ga + (b + 2) * gb) / 2,
               "REINFORCE -2": ((a - 2) * ga + (b - 2) * gb) / 2,
               "batch mean": ((a - rewards.mean()) * ga + (b - rewards.mean()) * gb) / 2,
               "leave-one-out": ((a - b) * ga + (b - a) * gb) / 2}
        for name, estimate in row.items():
            table.setdefault(name, []).append(estimate)
    return {name: torch.stack(rows) for name, rows in table.items()}


def test_variance_is_not_the_trace_of_the_covariance():
    for m, size in ((2, 1), (7, 5), (40, 3)):
        gradients, rewards, greedy = rand(m, 2, size, seed=m), rand(m, 2, seed=1) + 1, rand(m, seed=2)
        expected = {name: rows.var(0, correction=1).sum().item()
                    for name, rows in estimates(gradients, rewards, greedy).items()}
        assert gradient_variance(iter(gradients), rewards, greedy) == near(expected)
        assert gradient_variance(iter(gradients.float()), rewards.float(),
                                 greedy.float()) == near(expected, 1e-4)
    same = gradient_variance(rand(1, 2, 4).expand(6, 2, 4), tensor([[1.0, 2.0]]).expand(6, 2),
                             tensor([0.5] * 6))
    assert all(abs(value) < 1e-9 for value in same.values())


def test_variance_changes_with_a_constant_added_to_every_reward():
    gradients, rewards, greedy = rand(9, 2, 4), rand(9, 2, seed=1), rand(9, seed=2)
    plain, up, down, far = (gradient_variance(gradients, rewards + c, greedy + c) for c in (0, 2, -2, 30))
    for name in ("ReMax", "batch mean", "leave-one-out"):
        assert up[name] == near(plain[name]) and far[name] == near(plain[name])
    assert up["REINFORCE"] == near(plain["REINFORCE +2"]) and down["REINFORCE"] == near(plain["REINFORCE -2"])
    assert far["REINFORCE"] > 100 * plain["REINFORCE"]


def test_W_estimators_have_different_expectations():
    """Exactly, over all outcomes of M = 2 prompts with two samples each.

    The batch mean holds the sample's own reward: that takes 1 / (2 M) off the gradient. The others are
    unbiased.
    """
    logits, rewards, greedy = rand(3, seed=3).requires_grad_(), tensor([1.0, -0.5, 2.0]), tensor([2.0, 1.0])
    p = logits.softmax(0)
    exact, = torch.autograd.grad((p * rewards).sum(), logits)
    p = p.detach()
    scores, means = torch.eye(3, dtype=torch.float64) - p, {}                   # grad log pi of each response
    for outcome in itertools.product(range(3), repeat=4):
        drawn = torch.tensor(outcome).view(2, 2)
        for name, rows in estimates(scores[drawn], rewards[drawn], greedy).items():
            means[name] = means.get(name, 0) + p[drawn].prod() * rows.mean(0)
    for name, mean in means.items():
        close(mean, exact * (3 / 4 if name == "batch mean" else 1))


@pytest.mark.parametrize("name, value", [
    ("kl_coef", -0.1), ("kl_coef", math.nan), ("gamma", 1.5), ("gamma", -0.1), ("gamma", math.nan),
    ("reward_clip", 0.0), ("reward_clip", -5.0), ("reward_clip", math.nan), ("variance_prompts", 1),
    ("variance_prompts", -2)])
def test_bad_option_passes_or_its_flag_is_not_named(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        remax.Config(**{name: value})


# --------------------------------------------------------------------------------------------------- training

PROMPTS = ["ab", "h", "cdefg", "gg", "b", "efe", "abc"]
TASK = Task("toy", {"train": PROMPTS, "test": ["d", "ee"]},
            gold=lambda _, text, end: 10 + 3.0 * text.count("a") - len(text))


def gold(prompts, texts):
    return tensor([TASK.gold(*row, True) for row in zip(prompts, texts)])


def settings(toy, **kwargs):
    return remax.Config(**{**dict(
        model=str(toy), data="toy.jsonl", reward="gold", max_length=64, max_new_tokens=5, lr=1e-2,
        batch_size=4,
        epochs=1.0, eval_prompts=2, eval_samples=1, save_every=0, device="cpu", quiet=True), **kwargs})


def toy_run(toy, out, **kwargs):
    config = settings(toy, **kwargs)
    out.mkdir()
    run = harness.Run(config, out, TASK, harness.load_tokenizer(config), harness.load_policy(config).double(),
                      {})
    run.load_reference = lambda: loading.load_reference(config).double()
    return run


def train(run, reward):
    """remax.train with that reward as it is, not brought to mean 0 and deviation 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "reward_to_maximise", lambda run: reward)
        remax.train(run)


def plan(config):
    steps = harness.shuffled_batches(len(PROMPTS), config.epochs, config.batch_size, config.seed)
    return [[PROMPTS[i] for i in rows] for rows in steps]


def trained(toy, out, reward=gold, **kwargs):
    """A finished Run in float64, and the rows of metrics.jsonl that training logged."""
    run = toy_run(toy, out, **kwargs)
    train(run, reward)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return run, [row for row in map(json.loads, lines) if "loss" in row]


def plain_logps(model, batch, row, temperature):
    """log p of the tokens of one response, without padding, masks or chunks."""
    ids, n = batch.input_ids[row][batch.attention_mask[row].bool()], int(batch.response_mask[row].sum())
    logps = (model(ids[None]).logits[0] / temperature).log_softmax(-1)
    return logps[:-1].gather(1, ids[1:, None])[-n:, 0]


@pytest.fixture
def generated(monkeypatch):
    """Every Batch that generate returned, in evaluations and rollouts."""
    calls, plain = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *args,
                        **kwargs: calls.append(plain(*args, **kwargs)) or calls[-1])
    return calls


@pytest.mark.parametrize("options",
                         [dict(), dict(gamma=0.5, kl_coef=1.0, temperature=0.7), dict(reward_clip=1.5)])
def test_W_I_O_AH_step_or_metrics_differ_from_the_papers_formula(toy, tmp_path, monkeypatch, generated,
                                                                 options):
    monkeypatch.setattr(common, "adamw", sgd)
    results = [trained(toy, tmp_path / str(n), epochs=2.0, token_budget=n, max_grad_norm=1e9, **options)
               for n in (1, 25, 100000)]
    (run, rows), config = results[-1], results[-1][0].config
    policy, reference = harness.load_policy(config).double(), loading.load_reference(config).double()
    optimizer, _ = sgd(policy, None, None)
    counted, advantages, expected, calls = 0, [], [], generated[-1 - 2 * len(rows):-1]
    for prompts, batch, greedy in zip(plan(config), calls[::2], calls[1::2], strict=True):
        scores, baselines = (gold(prompts, common.decode(run.tokenizer, drawn)) for drawn in (batch, greedy))
        loss, kl = 0.0, 0.0
        for i, advantage in enumerate((scores - baselines).tolist()):
            advantages.append(advantage)
            logps, ref = (plain_logps(model, batch, i, config.temperature) for model in (policy, reference))
            ratios, bound = (logps - ref).detach(), config.reward_clip or math.inf
            returns = plain_returns(max(-bound, min(bound, advantage)), ratios, config.kl_coef, config.gamma)
            loss = loss - sum(r * logp for r, logp in zip(returns, logps)) / len(prompts)
            kl += ratios.sum().item() / len(prompts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counted += int(batch.lengths.sum() + greedy.lengths.sum())
        ended = [batch.input_ids[i, batch.attention_mask[i].bool()][-1].item() == 0
                 for i in range(len(batch))]
        expected.append({"objective/scores": scores.mean().item(),
                         "objective/greedy_scores": baselines.mean().item(),
                         "objective/kl": kl, "loss": loss.item(), "eos_rate": sum(ended) / len(ended)})
    assert len(rows) == 4 and rows[0]["objective/kl"] == 0 and abs(kl) > 1e-3
    assert {abs(a) > 1.5 for a in advantages} == {True, False}
    for other, metrics in results:                # O: parts of one row, of a few, of all; a ragged last batch
        close(parameters(other.policy), parameters(policy))
        assert all({name: row[name] for name in want} == near(want, 1e-6) for row,
                   want in zip(metrics, expected))
        assert other.counts["tokens_generated"] == counted
        assert other.counts["tokens_trained"] == run.counts["tokens_trained"]
        assert other.counts["tokens_scored_reference"] == sum(int(b.attention_mask.sum()) for b in calls[::2])
        assert other.counts["tokens_scored_value"] == 0


@pytest.mark.parametrize("bound", [1e-3, 1e9])
def test_gradient_is_not_clipped_or_the_clipped_norm_is_logged(toy, tmp_path, monkeypatch, bound):
    monkeypatch.setattr(common, "adamw", sgd)
    run, [row] = trained(toy, tmp_path / "run", batch_size=7, max_grad_norm=bound)
    moved = (parameters(run.policy) - parameters(harness.load_policy(run.config))).norm().item()
    assert row["grad_norm"] > 0.1 and moved == near(0.01 * min(bound, row["grad_norm"]), 1e-6)


def test_rewards_of_greedy_responses_cost_nothing_or_those_of_evaluations_something(toy, tmp_path, generated):
    reward = Counting(gold)
    run, rows = trained(toy, tmp_path / "run", reward, variance_prompts=3, eval_every=1)
    asked = [prompt for step in plan(run.config) for prompt in step * 2]
    # an evaluation generates thrice, a step twice
    texts = [text for i in range(len(rows)) for batch in generated[3 + 5 * i:5 + 5 * i]
             for text in common.decode(run.tokenizer, batch)]
    read = sum(len(prompt) + len(text) + 1 for prompt, text in zip(asked, texts, strict=True))
    assert run.counts["tokens_scored_reward"] == read < reward.tokens


def argmax_text(run, prompt):
    ids, n = run.tokenizer(prompt).input_ids, 0
    while n < run.config.max_new_tokens and (n == 0 or ids[-1] != 0):
        with torch.no_grad():
            ids, n = ids + [run.policy(torch.tensor([ids])).logits[0, -1].argmax().item()], n + 1
    return run.tokenizer.decode(ids[-n:], skip_special_tokens=True)


def test_W_baseline_is_sampled_or_of_old_weights(toy, tmp_path):
    run, calls = toy_run(toy, tmp_path / "run", lr=3e-2, temperature=1.5, batch_size=7, epochs=5.0), []

    def reward(prompts, responses):
        calls.append((responses, [argmax_text(run, prompt) for prompt in prompts]))
        return gold(prompts, responses)

    train(run, reward)
    assert len(calls) == 10
    for (sampled, best), (greedy, again) in zip(calls[::2], calls[1::2]):
        assert greedy == best == again != sampled
    assert calls[0][1] != calls[-1][1]                      # new weights, new baseline


def test_W_gradient_is_not_0_where_the_sample_is_the_greedy_response(toy, tmp_path, monkeypatch, generated):
    monkeypatch.setattr(common, "adamw", sgd)
    run, rows = trained(toy, tmp_path / "run", temperature=1e-4, kl_coef=0.0, max_grad_norm=1e9)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(generated[1:-1:2], generated[2:-1:2]))
    assert torch.equal(parameters(run.policy), parameters(harness.load_policy(run.config)).double())
    assert all(row["loss"] == 0 for row in rows)


def test_easy_reward_is_not_learned(toy, tmp_path):
    _, rows = trained(toy, tmp_path / "run", lambda prompts,
                      texts: tensor([float(text[:1] == "a") for text in texts]),
                      epochs=120.0, batch_size=28, lr=2e-2)
    scores = [row["objective/scores"] for row in rows]
    assert scores[0] < 0.4 and sum(scores[-3:]) / 3 > 0.9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [2, 3], ids=["of the sample", "of the greedy response"])
def test_AD_reward_that_is_not_finite_is_trained_on(toy, tmp_path, value, call):
    calls = []

    def reward(prompts, responses):
        calls.append(prompts)
        scores = gold(prompts, responses)
        scores[1] = value if len(calls) == call + 1 else scores[1]                       # in the second step
        return scores

    with pytest.raises(UserError, match=f"step 2: the reward is {value}") as error:
        trained(toy, tmp_path / "run", reward, reward_clip=1.0)
    assert repr(calls[-1][1]) in str(error.value)
    assert json.loads((tmp_path / "run"
                       / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"] == 1


# ------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def whole(toy, tmp_path, monkeypatch):
    """A function that makes a whole run in tmp_path / name: (result, metrics.jsonl, weights)."""
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "cache")

    def run(name, task=TASK, **kwargs):
        monkeypatch.setattr(loading, "load_task", lambda config: task)
        config = settings(toy, out=str(tmp_path / name), **{**dict(batch_size=2), **kwargs})
        result = harness.launch(remax.train, config)
        return (result, (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8"),
                parameters(LlamaForCausalLM.from_pretrained(tmp_path / name)))

    return run


def test_AF_resumed_run_differs_from_a_straight_one(whole):
    options = dict(save_every=2, eval_every=1, variance_prompts=2)
    straight, metrics, weights = whole("straight", **options)
    with killed_after(2):                                                      # one step past the checkpoint
        whole("killed", **options)
    torch.manual_seed(999)
    resumed = whole("killed", resume=True, **options)
    assert resumed[1] == metrics and '"step": 4' in metrics and torch.equal(resumed[2], weights)
    assert resumed[0]["tokens_generated"] == straight["tokens_generated"] > 0


def test_AE_runs_are_not_reproducible_or_ignore_the_seed(toy, whole):
    first, again, other = whole("a"), whole("b"), whole("c", seed=1)
    assert first[1] == again[1] != other[1] and torch.equal(first[2], again[2])
    assert not torch.equal(first[2], parameters(harness.load_policy(settings(toy))))
    kl = [row["objective/kl"] for row in map(json.loads, first[1].splitlines()) if "loss" in row]
    assert kl[0] == 0 and 0 not in kl[1:]                   # the reference stays where it was


def test_AE_run_that_trains_its_reward_model_differs_from_one_that_finds_it_in_the_cache(whole):
    task = replace(TASK, pairs={"train": [Pair(p, "a", "bb") for p in PROMPTS]})
    first, again = (whole(name, task, reward="", reward_lr=1e-3) for name in "ab")
    assert first[1] == again[1]


def test_AE_evaluating_or_measuring_changes_training_or_counts_as_training(whole):
    plain, seen = whole("plain"), whole("evaluated", eval_every=1)
    measured = whole("measured", eval_every=1, variance_prompts=3)
    for result, metrics, weights in (seen, measured):
        rows = [row for row in metrics.splitlines() if "loss" in row]
        assert rows == [row for row in plain[1].splitlines()
                        if "loss" in row] and torch.equal(weights, plain[2])
        assert result["tokens_generated"] == plain[0]["tokens_generated"]
    assert measured[1].count('"eval/variance/ReMax"') == measured[1].count('"eval/kl"') == 5


# ------------------------------------------------------------------------------------------ measured variance

def test_measured_variance_differs_from_one_gradient_at_a_time(toy, tmp_path, generated):
    run = toy_run(toy, tmp_path / "run", variance_prompts=4, temperature=0.8)
    state, before = torch.get_rng_state(), parameters(run.policy).clone()
    measured = remax.measured_variance(run, gold)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(parameters(run.policy), before)
    assert all(p.grad is None for p in run.policy.parameters())
    texts, best = (common.decode(run.tokenizer, batch) for batch in generated)
    assert best == [argmax_text(run, prompt) for prompt in PROMPTS[:4]] and texts[::2] != texts[1::2]
    gradients, logps = [], [plain_logps(run.policy, generated[0], row, 0.8).sum() for row in range(8)]
    for logp in logps:
        run.policy.zero_grad()
        logp.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.policy.parameters()]))
    given = torch.stack(gradients).view(4, 2, -1), gold([None] * 8, texts).view(4, 2), gold([None] * 4, best)
    variances = {name: rows.var(0).sum().item() for name, rows in estimates(*given).items()}
    ratios = {f"ReMax / {name}": variances["ReMax"] / variances[name]
              for name in variances if name != "ReMax"}
    expected = {f"eval/variance/{name}": value for name, value in (variances | ratios).items()}
    assert measured == near(expected | {"eval/entropy": -sum(logps).item() / 8})
    torch.manual_seed(5)
    assert remax.measured_variance(run, gold) == measured
    assert remax.measured_variance(toy_run(toy, tmp_path / "none"), gold) == {}


def test_measuring_crashes_where_all_rewards_are_equal(toy, tmp_path):
    run = toy_run(toy, tmp_path / "run", variance_prompts=4)
    measured = remax.measured_variance(run, lambda prompts, texts: torch.ones(len(texts)))
    assert measured["eval/variance/ReMax"] == measured["eval/variance/leave-one-out"] == 0
    assert measured["eval/variance/REINFORCE"] > 0


def test_variance_with_an_adapter_is_a_traceback(toy, tmp_path):
    pytest.importorskip("peft")
    run, rows = trained(toy, tmp_path / "run", gold, variance_prompts=3, eval_every=1, lora_rank=2)
    assert run.trace[0]["eval/variance/ReMax"] > 0
