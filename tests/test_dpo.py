"""dpo.py: the loss, the curriculum's plan, training. Letters are the bug classes that a test would catch."""
import json
import math

import numpy as np
import pytest
import torch

import common
import dpo
import harness
from conftest import cases, close, parameters, sgd, tensor
from dpo import curriculum, dpo_loss, pairs_between
from harness import Pair, Ranking, UserError
from tasks import Task


# From eric-mitchell/direct-preference-optimization (f8b8c0f): dpo-03, the first row of dpo-06, and dpo-05.
LITERALS = [
    dict(logps=[[-39.3073, -45.4894], [-34.2392, -30.7974], [-37.7793, -41.5381], [-42.36, -33.2181]],
         beta=0.3, smoothing=0.5, losses=[1.5011630305569728, 1.0936850929936464], chosen=[-0.4584, -1.18539],
         rejected=[2.43624, 0.72621]),
    dict(logps=[[-1.0], [-3000.0], [-1500.0], [-10.0]], beta=0.5, smoothing=0.0, losses=[0.0], chosen=[749.5],
         rejected=[-1495.0]),
    dict(logps=[[-1.0, -2.0]] * 4, beta=0.1, smoothing=0.0, losses=[0.6931471805599453] * 2,
         chosen=[0.0, 0.0], rejected=[0.0, 0.0]),
]


def random_logps(n=3, seed=0):
    """Policy chosen, policy rejected, reference chosen, reference rejected [n], as dpo_loss takes them."""
    return list(-30 * torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                - 5)


# --------------------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("case", LITERALS)
def test_loss_or_rewards_differ_from_the_official_code(case):
    losses, chosen, rejected = dpo_loss(*map(tensor, case["logps"]), case["beta"], case["smoothing"])
    close(losses, case["losses"])
    close(chosen, case["chosen"])
    close(rejected, case["rejected"])


def test_loss_rewards_or_gradients_differ_from_a_fixture():
    sigmoid = [c for c in cases("dpo") if c["inputs"]["loss_type"] == "sigmoid"
               and not c["inputs"]["reference_free"]]
    assert sigmoid
    for case in sigmoid:
        given, expected = case["inputs"], case["expected"]
        logps = [tensor(given[f"{who}_{which}_logps"]).requires_grad_(who == "policy")
                 for who in ("policy", "reference") for which in ("chosen", "rejected")]
        losses, chosen, rejected = dpo_loss(*logps, given["beta"], given["label_smoothing"])
        losses.mean().backward()
        for name, values in (("losses", losses), ("chosen_rewards", chosen), ("rejected_rewards", rejected),
                             ("grad_policy_chosen", logps[0].grad), ("grad_policy_rejected", logps[1].grad)):
            close(values.detach(), expected[name])


def test_loss_is_not_ln_2_where_the_policy_is_the_reference():
    chosen, rejected, *_ = random_logps()
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.7)
    close(losses, [math.log(2)] * 3)
    assert all(torch.equal(r, torch.zeros(3, dtype=torch.float64)) for r in rewards)


def test_swapping_chosen_and_rejected_does_not_negate_the_margin():
    pc, pr, rc, rr = random_logps()
    _, chosen, rejected = dpo_loss(pc, pr, rc, rr, 0.3)
    _, swapped_chosen, swapped_rejected = dpo_loss(pr, pc, rr, rc, 0.3)
    assert (chosen != rejected).all()
    close(swapped_chosen - swapped_rejected, rejected - chosen)


def test_loss_differs_from_a_numpy_oracle():
    logps = random_logps(50, seed=1)
    pc, pr, rc, rr = (x.numpy() for x in logps)
    for beta, smoothing in ((0.05, 0.0), (0.5, 0.2)):
        delta = (pc - rc) - (pr - rr)
        p = 1 / (1 + np.exp(-beta * delta))
        expected = -(1 - smoothing) * np.log(p) - smoothing * np.log(1 - p)
        close(dpo_loss(*logps, beta, smoothing)[0], expected)


def test_gradient_differs_from_the_papers():
    beta, h, (pc, pr, rc, rr) = 0.2, 1e-5, random_logps()
    delta = (pc - pr) - (rc - rr)
    expected = -beta * torch.sigmoid(-beta * delta)         # times grad log pi(y_w) - grad log pi(y_l)

    def differences(dc, dr):
        above, below = (dpo_loss(pc + sign * dc, pr + sign * dr, rc, rr, beta)[0] for sign in (1, -1))
        return (above - below) / (2 * h)

    close(differences(h, 0), expected, 1e-7)
    close(differences(0, h), -expected, 1e-7)
    pc.requires_grad_(), pr.requires_grad_()
    dpo_loss(pc, pr, rc, rr, beta)[0].sum().backward()
    close(pc.grad, expected)
    close(pr.grad, -expected)


def test_label_smoothing_is_on_the_wrong_side_or_halved():
    zero = tensor([0.0])
    margin = math.log(3)                                    # sigmoid 3/4
    losses = dpo_loss(tensor([margin]), zero, zero, zero, 1.0, 0.1)[0]
    close(losses, [-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)])
    logps = random_logps()                                  # at one half the two labels are the same
    swapped = [logps[i] for i in (1, 0, 3, 2)]
    close(dpo_loss(*logps, 0.3, 0.5)[0], dpo_loss(*swapped, 0.3, 0.5)[0])
    assert not torch.allclose(dpo_loss(*logps, 0.3, 0.4)[0], dpo_loss(*swapped, 0.3, 0.4)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_overflows_at_huge_log_ratios(dtype):
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    losses = dpo_loss(chosen, zero, zero, zero, 1.0)[0]
    losses.sum().backward()
    close(losses.detach(), [0.0, 1e4])
    close(chosen.grad, [0.0, -1.0])


def test_rewards_carry_gradient_or_losses_do_not():
    logps = [x.requires_grad_() for x in random_logps()]
    losses, chosen, rejected = dpo_loss(*logps, 0.1)
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad


def test_P_inputs_are_changed_in_place():
    logps = random_logps()
    before = [x.clone() for x in logps]
    dpo_loss(*logps, 0.3, 0.1)
    assert all(map(torch.equal, logps, before))


def test_Q_a_pair_depends_on_its_batch():
    logps = random_logps()
    together = dpo_loss(*logps, 0.3)
    assert all(values.shape == (3,) for values in together)
    for i in range(3):
        for values, alone in zip(together, dpo_loss(*(x[i:i + 1] for x in logps), 0.3)):
            assert torch.equal(values[i:i + 1], alone)


def test_larger_beta_does_not_satisfy_a_right_pair_sooner():
    gap, zero = tensor([2.0]), tensor([0.0])
    losses = [dpo_loss(gap, zero, zero, zero, beta)[0].item() for beta in (0.1, 0.5, 2.0)]
    assert losses[0] > losses[1] > losses[2]
    _, chosen, _ = dpo_loss(gap, zero, zero, zero, 0.5)
    assert chosen.item() == 1.0


def tabular_optimum(beta, reward, reference):
    """Log-probs of the softmax policy that minimises dpo_loss over all pairs under Bradley-Terry labels."""
    first, second = zip(*[(i, j) for i in range(5) for j in range(5) if i != j])
    weights = torch.sigmoid(reward[list(first)] - reward[list(second)])
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        losses, _, _ = dpo_loss(policy[list(first)], policy[list(second)], reference[list(first)],
                                reference[list(second)], beta)
        loss = (weights * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def test_optimum_is_not_that_of_kl_constrained_reward_maximisation():
    reward = tensor([0.0, 1.0, -0.5, 0.3, 2.0])
    reference = tensor([0.4, 0.1, 0.2, 0.25, 0.05]).log()
    kl = {}
    for beta in (0.5, 2.0):
        policy = tabular_optimum(beta, reward, reference)
        close(policy.exp(), (reference + reward / beta).softmax(0), 1e-4)
        kl[beta] = (policy.exp() * (policy - reference)).sum().item()
    assert kl[0.5] > 2 * kl[2.0] > 0


# --------------------------------------------------------------------------------------- pairs and curriculum

def test_curriculum_does_not_run_from_0_to_1():
    values = [curriculum(i / 20) for i in range(21)]
    assert values[0] == 0 and values[-1] == 1 and values == sorted(values) and 0 < values[10] < 1
    assert curriculum(-0.5) == 0 and curriculum(1.5) == 1


def rankings(n, first=0, systems=("strong", "medium", "weak")):
    return [Ranking(f"q{i}", [f"{name}{i}" for name in systems], [0.0] * len(systems), list(systems))
            for i in range(first, first + n)]


def test_pairs_between_turns_the_order_or_invents_a_pair():
    rows = [Ranking("p", ["S", "W"], [0.0, 9.0], ["strong", "weak"]),
            Ranking("q", ["same", "same"], [1.0, 0.0], ["strong", "weak"]),
            Ranking("r", ["S", "M"], [1.0, 0.0], ["strong", "medium"]),
            Ranking("s", ["W", "S"], [0.0, 0.0], ["weak", "strong"])]
    assert pairs_between(rows, "strong>weak") == [Pair("p", "S", "W"), None, None, Pair("s", "S", "W")]
    assert pairs_between(rows, "weak>strong")[0] == Pair("p", "W", "S")


@pytest.mark.parametrize("systems", ["strong>nobody", "nobody>weak", "strong", "strong>weak>medium", ">"])
def test_unknown_systems_are_accepted_or_the_known_ones_not_listed(systems):
    with pytest.raises(UserError, match="medium, strong, weak"):
        pairs_between(rankings(2), systems)


def task(n=240):
    return Task("toy", {"train": [f"q{i}" for i in range(n)], "test": ["t900"]},
                pairs={"train": [], "test": []}, rankings={"train": rankings(n), "test": rankings(20, 900)})


def settings(**kwargs):
    return dpo.Config(**{**dict(pairs="strong>weak", hard_pairs="strong>medium", batch_size=24, epochs=4.0),
                         **kwargs})


def hard_shares(plan):
    return [sum(pair.rejected.startswith("medium") for pair in pairs) / len(pairs) for pairs in plan]


def test_AC_easy_to_hard_does_not_go_from_easy_to_hard():
    shares = hard_shares(dpo.training_plan(settings(), task()))
    assert len(shares) == 40 and shares[0] == 0 and shares[-1] == 1
    quarters = [sum(shares[i:i + 10]) / 10 for i in range(0, 40, 10)]
    assert all(b - a > 0.15 for a, b in zip(quarters, quarters[1:]))
    backwards = hard_shares(dpo.training_plan(settings(curriculum="hard_to_easy"), task()))
    assert backwards[0] == 1 and backwards[-1] == 0
    mixed = hard_shares(dpo.training_plan(settings(curriculum="mixed"), task()))
    assert all(abs(sum(half) / 20 - 0.5) < 0.1 for half in (mixed[:20], mixed[20:]))


def test_AC_plan_is_not_reproducible_or_ignores_the_seed():
    first, again, other = (dpo.training_plan(settings(seed=seed), task()) for seed in (3, 3, 4))
    assert first == again != other
    hard = [[pair.rejected.startswith("medium") for pair in sum(plan, [])] for plan in (first, other)]
    assert hard[0] != hard[1]                                        # not only the order of the prompts


def test_AC_hard_pairs_equal_to_pairs_change_the_plan():
    plain = dpo.training_plan(settings(hard_pairs=""), task())
    for order in ("easy_to_hard", "hard_to_easy", "mixed"):
        assert dpo.training_plan(settings(hard_pairs="strong>weak", curriculum=order), task()) == plain


def test_AG_test_prompts_are_trained_on_or_pairs_are_lost():
    plan = dpo.training_plan(settings(epochs=1.0), task())
    assert sorted(p.prompt for pairs in plan for p in pairs) == sorted(f"q{i}" for i in range(240))
    own = Task("toy", {"train": ["a"], "test": ["b"]},
               pairs={"train": [Pair("a", "x", "y")], "test": [Pair("b", "x", "y")]})
    assert dpo.training_plan(dpo.Config(epochs=1.0), own) == [[Pair("a", "x", "y")]]


def test_plan_of_the_datas_own_pairs_has_an_order_of_its_own():
    config = dpo.Config(batch_size=3, epochs=1.5, seed=2)
    pairs = [Pair(f"q{i}", "x", "y") for i in range(8)]
    plan = dpo.training_plan(config,
                             Task("toy", {"train": [p.prompt for p in pairs], "test": []}, {"train": pairs}))
    assert plan == [[pairs[i] for i in step] for step in harness.shuffled_batches(8, 1.5, 3, 2)]
    assert sorted(sum(plan, [])[:8]) == pairs


def test_data_without_pairs_trains_on_nothing():
    with pytest.raises(UserError, match="no preference pairs"):
        dpo.training_plan(dpo.Config(), Task("toy", {"train": ["a"], "test": ["b"]}))
    same = Task("toy", {"train": ["a"], "test": []},
                rankings={"train": [Ranking("a", ["x", "x"], [1, 0], ["strong", "weak"])]})
    with pytest.raises(UserError, match="no preference pairs"):
        dpo.training_plan(dpo.Config(pairs="strong>weak"), same)


def test_mistake_in_hard_pairs_is_blamed_on_pairs():
    with pytest.raises(UserError, match="--hard_pairs 'strong>nobody'"):
        dpo.training_plan(settings(hard_pairs="strong>nobody"), task())


@pytest.mark.parametrize("wrong, flag", [
    (dict(beta=0), "--beta"), (dict(beta=-0.1), "--beta"), (dict(beta=math.nan), "--beta"),
    (dict(label_smoothing=0.5), "--label_smoothing"), (dict(label_smoothing=-0.1), "--label_smoothing"),
    (dict(loss="ipo"), "--loss"), (dict(curriculum="random"), "--curriculum"),
    (dict(hard_pairs="a>c"), "--hard_pairs"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        dpo.Config(**wrong)


# --------------------------------------------------------------------------------------------------- training

PAIRS = [Pair("ab", "cd", "efgha"), Pair("h", "a", "b"), Pair("cdefg", "abcabc", "h"),
         Pair("gg", "hh", "aaaaaaa"), Pair("b", "cccc", "dd"), Pair("ef", "gh", "hg"), Pair("abc", "d", "ee")]


HELD_OUT = Pair("d", "abc", "cba"), Pair("ee", "f", "gg")


def made(toy, out, pairs=PAIRS, held_out=HELD_OUT, **kwargs):
    """A run on these pairs that has not been trained."""
    config = dpo.Config(**{**dict(model=str(toy), data="toy.jsonl", reward="none", max_length=64,
                                  max_new_tokens=4, lr=1e-2, warmup=0.0, batch_size=4, epochs=1.0,
                                  eval_prompts=2, eval_samples=1, save_every=0, device="cpu", quiet=True),
                           **kwargs})
    data = Task("toy", {"train": [p.prompt for p in pairs], "test": ["d", "ee"]},
                {"train": list(pairs), "test": list(held_out)})
    return harness.Run(config, out, data, harness.load_tokenizer(config), harness.load_policy(config), {})


def trained(toy, out, *args, **kwargs):
    """A trained run, and the rows of metrics.jsonl that training logged."""
    run = made(toy, out, *args, **kwargs)
    dpo.train(run)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return run, [row for row in rows if "loss" in row]


@pytest.fixture
def plain_steps(monkeypatch):
    """Options of a run whose steps are 0.01 times the gradient."""
    monkeypatch.setattr(common, "adamw", sgd)
    return dict(max_grad_norm=1e9)


def test_AJ_first_loss_is_not_ln_2_or_stays_there(toy, tmp_path):
    _, rows = trained(toy, tmp_path / "run", epochs=3.0, batch_size=7)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert all(row["loss"] < math.log(2) - 0.01 for row in rows[1:])


def test_AJ_reference_moves_with_the_policy(toy, tmp_path, monkeypatch):
    seen = {}
    plain = dpo.losses_and_metrics

    def spy(config, logps, ref_logps):
        seen.setdefault("ref", []).append(ref_logps.clone())
        return plain(config, logps, ref_logps)

    monkeypatch.setattr(dpo, "losses_and_metrics", spy)
    run, _ = trained(toy, tmp_path / "run", pairs=PAIRS[:1], held_out=PAIRS[:1], epochs=4.0, batch_size=1)
    reference = run.load_reference()
    expected = [common.sequence_logps(reference,
                                      common.encode(run.tokenizer, [PAIRS[0].prompt], [text])).item()
                for text in PAIRS[0].responses]
    assert len(seen["ref"]) == 6                            # four steps, two evaluations
    for ref in seen["ref"]:
        close(ref.double(), [expected], 1e-5)
    assert not torch.allclose(harness.response_logps(run, PAIRS[:1])[0].double(), tensor([expected]),
                              atol=0.1)


def test_AG_training_prefers_the_rejected_answer(toy, tmp_path):
    run, rows = trained(toy, tmp_path / "run", epochs=8.0, batch_size=7, held_out=PAIRS)
    before, after = run.trace[0], run.trace[-1]
    assert before["eval/rewards/margins"] == 0 and before["eval/rewards/accuracies"] == 0.5
    assert after["eval/rewards/accuracies"] == 1 and after["eval/loss"] < before["eval/loss"]
    def gap(row):
        return row["eval/logps/chosen"] - row["eval/logps/rejected"]
    assert gap(after) > gap(before) + 1
    assert after["eval/rewards/margins"] == pytest.approx(run.config.beta * (gap(after) - gap(before)),
                                                          abs=1e-4)


def test_O_batches_are_not_split_or_the_ragged_last_one_is_lost(toy, tmp_path, monkeypatch, plain_steps):
    sizes, plain = [], harness.Run.microbatches

    def spy(run, pairs):
        for rows, batch in plain(run, pairs):
            sizes.append(len(rows))
            yield rows, batch

    monkeypatch.setattr(harness.Run, "microbatches", spy)
    parts = {}
    for budget in (30, 100000):
        sizes.clear()
        _, rows = trained(toy, tmp_path / str(budget), token_budget=budget, held_out=PAIRS[:1], **plain_steps)
        parts[budget] = list(sizes)
        assert len(rows) == 2                               # four pairs, then a ragged three
    assert parts[100000] == [7, 1, 1, 4, 3, 1]          # reference of both, evaluation, two steps, evaluation
    assert len(parts[30]) > 8


def test_O_step_differs_from_a_plain_mean_over_pairs(toy, tmp_path, plain_steps):
    runs = [trained(toy, tmp_path / str(budget), token_budget=budget, **plain_steps)[0]
            for budget in (30, 100000)]
    config = runs[0].config
    policy, reference = harness.load_policy(config), runs[0].load_reference()
    optimizer, _ = sgd(policy, 0.0, 0)
    for pairs in dpo.training_plan(config, runs[0].task):
        losses = []
        for pair in pairs:
            batch = common.encode(runs[0].tokenizer, [pair.prompt] * 2, [pair.chosen, pair.rejected])
            losses += dpo_loss(*common.sequence_logps(policy, batch)[:, None],
                               *common.sequence_logps(reference, batch)[:, None], config.beta)[0]
        (sum(losses) / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in policy.parameters()])
    start = torch.cat([p.detach().flatten() for p in reference.parameters()])
    assert (expected - start).abs().max() > 1e-3
    for run in runs:
        assert (parameters(run.policy) - expected).abs().max() < 1e-6


def ref_logps_of(run, pairs):
    """log pi_ref of each pair's answers [n, 2], before training. The tests below recognise a pair by it."""
    return harness.response_logps(run, pairs)[0]


@pytest.mark.parametrize("budget", [1, 30, 10**6])
def test_O_step_is_not_on_the_mean_over_pairs_or_counts_other_tokens(toy, tmp_path, monkeypatch, plain_steps,
                                                                     budget):
    """Another loss in place of Eq. 7, against one backward pass over all pairs, written out.

    The parts must not matter.
    """
    run, calls = made(toy, tmp_path / "run", held_out=(), batch_size=7, token_budget=budget,
                      **plain_steps), []
    batches = [common.encode(run.tokenizer, [pair.prompt] * 2, pair.responses) for pair in PAIRS]
    total = sum(i * common.sequence_logps(run.policy, batch).sum() for i, batch in enumerate(batches))
    before, refs = parameters(run.policy), ref_logps_of(run, PAIRS)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total / 7, list(run.policy.parameters()))])

    def losses_and_metrics(config, logps, ref_logps):
        torch.testing.assert_close(logps, ref_logps)        # equal before the first step, pair by pair
        places = (ref_logps[:, None] - refs).abs().sum(2).argmin(1)
        calls.append(len(places))
        losses = places * logps.sum(1)
        return losses, {"loss": losses, "place": places}

    monkeypatch.setattr(dpo, "losses_and_metrics", losses_and_metrics)
    dpo.train(run)
    row, = [row for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if "loss" in (row := json.loads(line))]
    torch.testing.assert_close(parameters(run.policy), before - 0.01 * gradient, rtol=0, atol=2e-6)
    assert gradient.abs().max() > 1e-2 and sum(calls) == 7 and (budget > 1 or calls == [1] * 7)
    assert row["place"] == 3 and row["loss"] == pytest.approx(total.item() / 7, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    # prompts and EOS included, no padding
    assert run.counts["tokens_trained"] == 13 + 6 + 19 + 15 + 10 + 10 + 11
    assert run.counts["tokens_scored_reference"] == run.counts["tokens_trained"]


def test_reference_reads_pairs_again_in_each_epoch_or_held_out_ones_count(toy, tmp_path):
    run, rows = trained(toy, tmp_path / "run", epochs=3.0, eval_every=1)
    assert run.counts["tokens_trained"] == 3 * 84 and run.counts["tokens_scored_reference"] == 84
    assert run.counts["tokens_scored_reward"] == run.counts["tokens_generated"] == 0 and len(rows) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_AD_step_on_a_loss_that_is_not_finite_names_another_pair_or_step(toy, tmp_path, monkeypatch, value):
    run = made(toy, tmp_path / "run", token_budget=1)
    culprit, seen = dpo.training_plan(run.config, run.task)[1][1], []
    ref, plain, log = ref_logps_of(run, [culprit]), dpo.losses_and_metrics, run.log

    def losses_and_metrics(config, logps, ref_logps):
        losses, metrics = plain(config, logps, ref_logps)
        return losses * torch.where((ref_logps - ref).abs().sum(1) < 1e-4, value, 1.0), metrics

    def spy(step, metrics):
        log(step, metrics)
        seen.append(parameters(run.policy))

    monkeypatch.setattr(dpo, "losses_and_metrics", losses_and_metrics)
    monkeypatch.setattr(run, "log", spy)
    with pytest.raises(UserError, match=f"step 2: loss is {value} for the prompt '{culprit.prompt}'"):
        dpo.train(run)
    assert len(seen) == 1 and torch.equal(parameters(run.policy), seen[0])


def test_O_gradient_is_clipped_per_tensor_or_norm_is_taken_after(toy, tmp_path, monkeypatch):
    """Steps of half the learning rate of the one before, so that a schedule that stands still is seen too."""
    made_with, moved = [], {}

    def halving(model, lr, steps, schedule, warmup):
        made_with.append((lr, steps, schedule, warmup))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)

    monkeypatch.setattr(common, "adamw", halving)
    for limit in (1e9, 0.25):
        run, (row,) = trained(toy, tmp_path / str(limit), batch_size=7, max_grad_norm=limit,
                              schedule="linear", warmup=0.25)
        moved[limit] = parameters(run.policy) - parameters(run.load_reference())
        norm = moved[1e9].norm().item() / 0.01
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.5
        assert all(weight.grad is None for weight in run.policy.parameters())
    torch.testing.assert_close(moved[0.25], moved[1e9] * 0.25 / norm, rtol=1e-3, atol=1e-6)
    assert made_with == [(1e-2, 1, "linear", 0.25)] * 2
    run, rows = trained(toy, tmp_path / "two", pairs=PAIRS[:1], batch_size=1, epochs=2.0, max_grad_norm=1e-3)
    assert len(rows) == 2 and run.schedule.get_last_lr() == [0.0025]
    length = (parameters(run.policy) - parameters(run.load_reference())).norm().item()
    assert length == pytest.approx(1e-3 * (0.01 + 0.005), rel=1e-2)


def test_sft_learns_from_the_rejected_answer(toy, tmp_path):
    others = [pair._replace(rejected="bdfh") for pair in PAIRS]
    (a, rows), (b, _) = (trained(toy, tmp_path / str(i), pairs=pairs, loss="sft")
                         for i, pairs in enumerate((PAIRS, others)))
    assert (parameters(a.policy) - parameters(b.policy)).abs().max() < 1e-6
    assert rows[0]["loss"] == pytest.approx(-rows[0]["logps/chosen"], abs=1e-4)
    c, _ = trained(toy, tmp_path / "c", pairs=[pair._replace(chosen="bdfh") for pair in PAIRS], loss="sft")
    assert (parameters(a.policy) - parameters(c.policy)).abs().max() > 1e-3


def test_unlikelihood_is_not_the_chosen_answers_likelihood_less_alpha_times_the_rejected_ones():
    logps, ref = torch.tensor([[-2.0, -3.0], [-0.5, -4.0]], requires_grad=True), torch.zeros(2, 2)
    for alpha in (0.0, 0.1, 1.0):
        config = dpo.Config(loss="unlikelihood", alpha=alpha, beta=0.5)
        losses, metrics = dpo.losses_and_metrics(config, logps, ref)
        assert losses.tolist() == pytest.approx([2 - 3 * alpha, 0.5 - 4 * alpha])
        gradient, = torch.autograd.grad(losses.sum(), logps)
        assert gradient.tolist() == [pytest.approx([-1, alpha])] * 2
        assert metrics["loss"] is losses and metrics["rewards/margins"].tolist() == pytest.approx([0.5, 1.75])
    assert dpo.Config(loss="unlikelihood").alpha == 0.1


def test_unlikelihood_does_not_learn_away_from_the_rejected_answer(toy, tmp_path):
    def of_rejected(name, **options):
        run, rows = trained(toy, tmp_path / name, epochs=5.0, **options)
        return harness.response_logps(run, PAIRS)[0][:, 1].mean().item(), rows, parameters(run.policy)

    sft, rows, weights = of_rejected("sft", loss="sft")
    none, same_rows, same = of_rejected("none", loss="unlikelihood", alpha=0.0)
    pushed = [of_rejected(f"{alpha}", loss="unlikelihood", alpha=alpha)[0] for alpha in (0.1, 0.5)]
    assert torch.equal(weights, same) and rows == same_rows and none == sft
    assert sft > pushed[0] + 0.1 > pushed[1] + 0.2
    _, (first, *_), _ = of_rejected("other", loss="unlikelihood", alpha=0.5)
    assert first["loss"] == pytest.approx(-first["logps/chosen"] + 0.5 * first["logps/rejected"], abs=1e-4)


def test_run_without_held_out_pairs_crashes(toy, tmp_path):
    run, rows = trained(toy, tmp_path / "run", held_out=())
    assert len(rows) == 2 and "eval/loss" not in run.trace[-1] and "eval/kl" in run.trace[-1]


def test_zero_epochs_crash_or_train(toy, tmp_path):
    run, rows = trained(toy, tmp_path / "run", epochs=0.0)
    assert rows == [] and len(run.trace) == 1 and run.trace[0]["eval/kl"] == 0


def test_held_out_pairs_are_of_another_kind_than_those_that_are_trained_on():
    rows = [Ranking("ab", ["a", "b", "c"], [2.0, 1.0, 0.0], ["x", "y", "z"])] * 3
    data = Task("toy", {"train": ["ab"], "test": ["c"]}, {"test": [Pair("ab", "d", "e")] * 4}, {"test": rows})
    own, pairs = [Pair("ab", "d", "e")], [Pair("ab", "a", "c")]
    for options, want in (({}, own * 4), ({"eval_pairs": 2}, own * 2), ({"pairs": "x>z"}, pairs * 3),
                          ({"pairs": "x>z", "eval_pairs": 1}, pairs)):
        assert dpo.held_out_pairs(dpo.Config(**options), data) == want
    data.rankings = {"test": [Ranking("ab", ["a", "b"], [2.0, 1.0], ["x", "y"])] * 3}
    assert dpo.held_out_pairs(dpo.Config(pairs="x>z"), data) == []            # no row has writer z
    assert dpo.held_out_pairs(dpo.Config(pairs="x>y"), data) == [Pair("ab", "a", "b")] * 3
    data.rankings = {}
    assert dpo.held_out_pairs(dpo.Config(pairs="x>z"), data) == own * 4


def test_curriculum_of_two_steps_does_not_end_with_hard_pairs_or_one_step_divides_by_0():
    rows = [Ranking(f"p{i}", ["a", "b", "c"], [2.0, 1.0, 0.0], ["x", "y", "z"]) for i in range(8)]
    data = Task("toy", {"train": [], "test": []}, rankings={"train": rows})
    options = dict(pairs="x>z", hard_pairs="x>y", batch_size=4, epochs=1.0)
    easy, hard = dpo.training_plan(dpo.Config(**options), data)
    assert {pair.rejected for pair in easy} == {"c"} and {pair.rejected for pair in hard} == {"b"}
    (only,) = dpo.training_plan(dpo.Config(**options | {"batch_size": 8}), data)
    assert {pair.rejected for pair in only} == {"c"}


def test_label_smoothing_is_not_in_the_loss_that_is_trained_on():
    logps, ref = tensor([[-2.0, -3.0], [-0.5, -4.0]]), torch.zeros(2, 2, dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        config = dpo.Config(beta=0.5, label_smoothing=smoothing)
        losses, metrics = dpo.losses_and_metrics(config, logps, ref)
        close(losses, dpo_loss(*logps.T, *ref.T, 0.5, smoothing)[0])
        close(metrics["rewards/chosen"], [-1.0, -0.25])
        close(metrics["rewards/rejected"], [-1.5, -2.0])


def test_prompt_without_a_hard_pair_is_planned():
    rows = [*rankings(7), Ranking("q9", ["strong9", "weak9"], [0.0, 0.0], ["strong", "weak"])]
    data = Task("toy", {"train": [], "test": []}, rankings={"train": rows})
    plan = dpo.training_plan(settings(epochs=1.0, batch_size=3, curriculum="hard_to_easy"), data)
    assert sorted(pair.prompt for pairs in plan for pair in pairs) == [f"q{i}" for i in range(7)]
