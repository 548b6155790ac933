"""rso.py: losses, rejection sampling, pairs, and training.

Letters are the bug classes that a test would catch.
"""
import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import common
import harness
import rso
from conftest import cases, close, parameters, sgd, tensor
from dpo import dpo_loss
from harness import UserError
from rso import preference_loss, ranked_pairs, statistical_rejection_sampling
from tasks import Pair, Ranking, Task

KINDS = "sigmoid_norm", "hinge_norm", "hinge"


# --------------------------------------------------------------------------------------------------- the loss

# rso_losses-08 and -09, as the DPO code and TRL print them
@pytest.mark.parametrize("logps, gamma, expected", [
    ([[-10.0, -20.0], [-20.0, -10.0], [-15.0, -15.0], [-15.0, -15.0]], 0.1,
     [[0.31326168751822286, 1.3132616875182228], [0.0, 2.0], [0.0, 2.0]]),
    ([[-1.0, -4000.0], [-5000.0, -3.0], [-2.0, -1.0], [-1.0, -2.0]], 1.0,
     [[0.0, 3998.0], [0.0, 3999.0], [0.0, 3998.0]])])
def test_loss_differs_from_other_code(logps, gamma, expected):
    for kind, losses in zip(KINDS, expected):
        close(preference_loss(kind, *map(tensor, logps), gamma), losses)


def test_loss_differs_from_a_fixture():
    for case in cases("rso_losses"):
        given, expected = case["inputs"], case["expected"]
        logps = [tensor(given[f"{who}_{which}_logps"]) for who in ("policy", "sft")
                 for which in ("chosen", "rejected")]
        for kind in KINDS:
            losses = preference_loss(kind, *logps, given["gamma"])
            close(losses, expected[kind])
            close(losses.mean(), expected[f"{kind}_mean"])
        close(preference_loss("hinge", *logps, given["gamma"]) / given["gamma"], expected["slic_margin_form"])


def random_logps(n=50, seed=0):
    """Policy chosen, rejected, SFT chosen, rejected [n]: margins on both sides of 1 / 0.2."""
    return list(-20 * torch.rand(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                - 5)


def test_sigmoid_norm_is_not_dpo_with_beta_gamma_or_another_loss_passes():
    for gamma in (0.05, 0.5, 3.0):
        close(preference_loss("sigmoid_norm", *random_logps(), gamma), dpo_loss(*random_logps(), gamma)[0],
              1e-12)
    with pytest.raises(ValueError, match="'slic'"):
        preference_loss("slic", *random_logps(), 0.1)


def test_J_loss_at_the_sft_policy_is_not_log_2_or_1_or_the_hinge_reads_the_reference():
    chosen, rejected, other, another = random_logps()
    close(preference_loss("sigmoid_norm", chosen, rejected, chosen, rejected, 0.7), [math.log(2)] * 50)
    close(preference_loss("hinge_norm", chosen, rejected, chosen, rejected, 0.7), [1.0] * 50)
    assert torch.equal(preference_loss("hinge", chosen, rejected, chosen, rejected, 0.7),
                       preference_loss("hinge", chosen, rejected, other, another, 0.7))
    assert not torch.allclose(preference_loss("hinge_norm", chosen, rejected, other, another, 0.7),
                              preference_loss("hinge", chosen, rejected, other, another, 0.7))


def test_hinge_pushes_beyond_1_over_gamma_or_stops_before():
    gamma, zero = 0.2, tensor([0.0] * 4)
    for kind in ("hinge", "hinge_norm"):
        chosen = tensor([-3.0, 4.9, 5.1, 50.0]).requires_grad_()
        losses = preference_loss(kind, chosen, zero, zero, zero, gamma)
        losses.sum().backward()
        close(losses.detach(), [1.6, 0.02, 0.0, 0.0])
        close(chosen.grad, [-gamma, -gamma, 0.0, 0.0])


def test_P_D_loss_changes_its_inputs_or_depends_on_the_batch():
    logps = random_logps()
    before = [x.clone() for x in logps]
    for kind in KINDS:
        together = preference_loss(kind, *logps, 0.2)
        assert together.shape == (50,)
        assert torch.equal(together,
                           torch.cat([preference_loss(kind, *(x[i:i + 1] for x in logps), 0.2)
                                      for i in range(50)]))
        assert torch.equal(together.flip(0), preference_loss(kind, *(x.flip(0) for x in logps), 0.2))
    assert all(map(torch.equal, logps, before))


# ----------------------------------------------------------------------------------------- rejection sampling

def sample_with(uniforms, *arguments):
    """(accepted indices, how many of the uniforms were used)."""
    left = iter(uniforms)
    return (statistical_rejection_sampling(*arguments, SimpleNamespace(random=left.__next__)),
            len(uniforms) - len(list(left)))


# rso_sampling-00, -06 and -05, traces of the printed listing
@pytest.mark.parametrize("rewards, n, beta, uniforms, accepted", [
    ([0.1, 1.2, -0.5, 0.8, 1.2], 3, 0.5,
     [0.423759, 0.947775, 0.985879, 0.714443, 0.512796, 0.667847, 0.198663, 0.040851], [1, 4, 3]),
    ([5.0, -5.0, 4.0, -4.0, 0.0], 2, 0.05,
     [0.281135, 0.241014, 0.96838, 0.487786, 0.94636, 0.620005, 0.118759], [0, 2]),
    ([0.151, -0.396, 1.786, -0.75, 0.332, 2.466], 3, 10.0, [0.49872, 0.364657, 0.216576], [0, 1, 2])])
def test_U_trace_differs_from_algorithm_1(rewards, n, beta, uniforms, accepted):
    assert sample_with(uniforms + [0.0] * 9, rewards, n, beta) == (accepted, len(uniforms))


def test_U_trace_differs_from_a_fixture():
    traces = [case for case in cases("rso_sampling") if case["inputs"]["kind"] == "trace"]
    assert traces
    for case in traces:
        given, expected = case["inputs"], case["expected"]
        result = sample_with(given["uniforms"], given["rewards"], given["num_samples"], given["beta"])
        assert result == (expected["accepted"], expected["uniforms_used"])


def p_value(counts, probabilities):
    """Of a chi-square test. What is impossible must not occur.

    Cells with less than 5 expected counts join the largest.
    """
    runs = sum(counts.values())
    assert all(probabilities.get(key, 0) > 0
               for key in counts) and sum(probabilities.values()) == pytest.approx(1)
    largest, cells = max(probabilities, key=probabilities.get), {}
    for key, p in probabilities.items():
        cell = cells.setdefault(key if runs * p >= 5 else largest, [0, 0.0])
        cell[0] += counts[key]
        cell[1] += runs * p
    if len(cells) == 1:
        return 1.0
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells.values())
    return torch.special.gammaincc(tensor((len(cells) - 1) / 2), tensor(statistic / 2)).item()


def test_U_frequencies_differ_from_the_exact_ones_of_a_fixture():
    runs = 10000
    distributions = [case for case in cases("rso_sampling") if case["inputs"]["kind"] == "distribution"]
    assert distributions
    for case in distributions:
        expected, rng = case["expected"], random.Random(case["id"])
        given = [case["inputs"][name] for name in ("rewards", "num_samples", "beta")]
        accepted = [statistical_rejection_sampling(*given, rng) for _ in range(runs)]
        assert p_value(Counter(a[0] for a in accepted),
                       dict(enumerate(expected["first_accepted_prob"]))) > 0.001, case["id"]
        for i, p in enumerate(expected["inclusion_prob"]):
            assert p_value(Counter(i in a for a in accepted),
                           {True: p, False: 1 - p}) > 0.001, (case["id"], i)
        for name in ("sets", "sequences"):                          # how picks hang together
            if expected[name]:
                key = sorted if name == "sets" else list
                exact = {tuple(row["indices"]): row["prob"] for row in expected[name]}
                assert p_value(Counter(tuple(key(a)) for a in accepted), exact) > 0.001, (case["id"], name)


SFT, REWARDS, BETA = [0.4, 0.3, 0.15, 0.1, 0.05], [0.0, 0.5, -1.0, 1.0, 0.8], 0.6
WEIGHTS = [p * math.exp(r / BETA) for p, r in zip(SFT, REWARDS)]
OPTIMUM = {i: weight / sum(WEIGHTS) for i, weight in enumerate(WEIGHTS)}                # Eq. 4


def accepted_outcomes(runs, candidates, num_samples, seed=0):
    """Outcomes of an enumerated space, in the order of acceptance.

    The candidates are of the SFT policy, new ones for each run.
    """
    rng = random.Random(seed)
    for _ in range(runs):
        pool = rng.choices(range(5), SFT, k=candidates)
        yield [pool[i] for i in statistical_rejection_sampling([REWARDS[i] for i in pool], num_samples, BETA,
                                                               rng)]


def test_U_first_of_many_candidates_is_not_a_sample_of_the_optimal_policy():
    first = Counter(outcomes[0] for outcomes in accepted_outcomes(4000, 120, 1))
    assert p_value(first, OPTIMUM) > 0.001
    assert p_value(first, dict(enumerate(SFT))) < 1e-6              # the test tells them apart


def test_U_later_picks_are_not_worse_than_the_optimal_policy():
    runs = list(accepted_outcomes(3000, 30, 20))
    optimum = sum(OPTIMUM[i] * r for i, r in enumerate(REWARDS))
    means = [sum(REWARDS[run[k]] for run in runs) / len(runs) for k in range(20)]
    assert abs(means[0] - optimum) < 0.05                           # its standard error is 0.01
    assert means[0] > means[12] + 0.1 > means[19] + 0.2
    assert sum(means) / 20 < optimum - 0.15


def test_U_beta_0_is_not_the_top_or_a_huge_beta_not_the_head():
    rng = random.Random(0)
    for _ in range(200):
        rewards = [rng.gauss(0, 1) for _ in range(12)]
        best_first = sorted(range(12), key=lambda i: -rewards[i])
        assert statistical_rejection_sampling(rewards, 5, 0, rng) == best_first[:5]
        assert statistical_rejection_sampling(rewards, 5, 1e-320, rng) == best_first[:5]
        assert statistical_rejection_sampling(rewards, 5, 1e15, rng) == list(range(5))
        assert statistical_rejection_sampling(rewards, 5, math.inf, rng) == list(range(5))
    assert sample_with([0.99] * 9, [2, 7, 1, 7, 7, 2], 4, 0) == ([1, 3, 4, 0], 7)   # ties: all, in list order
    assert sample_with([1 - 2 ** -53] * 9, [3.0] * 6, 4, 0.5) == ([0, 1, 2, 3], 4)


@pytest.mark.parametrize("rewards, n, beta", [([1.0, 2.0], 3, 0.5), ([], 1, 0.5), ([1.0, math.nan], 1, 0.5),
                                              ([math.inf, 1.0], 1, 0.5), ([1.0, 2.0], 1, -0.5),
                                              ([1.0, 2.0], 1, math.nan)])
def test_U_impossible_arguments_loop_or_pass(rewards, n, beta):
    with pytest.raises(ValueError, match="candidates|beta"):
        statistical_rejection_sampling(rewards, n, beta, random.Random(0))


def test_P_sampling_or_pairing_changes_its_lists():
    rewards, indices = tensor([0.1, 0.9, 0.4, 0.2]), [3, 1, 0, 2]
    assert statistical_rejection_sampling(rewards, 2, 0, random.Random(0)) == [1, 2]      # a tensor will do
    assert torch.equal(rewards, tensor([0.1, 0.9, 0.4, 0.2]))
    ranked_pairs(indices, rewards.tolist(), tournament=True)
    assert indices == [3, 1, 0, 2]


# -------------------------------------------------------------------------------------------------- the pairs

def test_pairs_by_hand_differ():
    rewards = [5, 1, 4, 2, 3, 0]
    assert ranked_pairs([1, 0, 2, 3], rewards) == [(0, 1), (2, 3)]
    assert ranked_pairs([1, 0, 2, 3], rewards, tournament=True) == [(0, 1), (2, 3), (0, 2)]
    assert ranked_pairs([1, 0, 4], rewards) == [(0, 1)]                           # an odd one has no opponent
    assert ranked_pairs([1, 0, 4], rewards, tournament=True) == [(0, 1), (0, 4)]         # and goes through
    assert ranked_pairs([0], rewards) == ranked_pairs([], rewards, tournament=True) == []
    assert ranked_pairs([0, 1, 2, 3], [7, 7, 7, 1]) == [(2, 3)]
    assert ranked_pairs([0, 1, 2, 3], [7, 7, 7, 1], tournament=True) == [(2, 3)]         # 7 meets 7 again


@pytest.mark.parametrize("n", range(2, 12))
def test_pairs_are_too_few_or_the_loser_wins(n):
    rng = random.Random(n)
    for _ in range(20):
        rewards, indices = rng.sample(range(100), 12), rng.sample(range(12), n)
        first, all_rounds = ranked_pairs(indices, rewards), ranked_pairs(indices, rewards, tournament=True)
        assert len(first) == n // 2 and len(all_rounds) == n - 1 and all_rounds[:n // 2] == first
        assert all(rewards[w] > rewards[l] for w, l in all_rounds)
        assert len({i for pair in first for i in pair}) == n // 2 * 2
        losers = [l for _, l in all_rounds]                                              # who has lost is out
        assert sorted(losers + [max(indices, key=rewards.__getitem__)]) == sorted(indices)


def score(prompts, responses):
    """The number of letters after a, and a little for the place of each.

    So there are no ties between texts of three letters.
    """
    return torch.tensor([sum((ord(c) - ord("a")) * 10 ** -i for i, c in enumerate(text))
                         for text in responses])


score.model = SimpleNamespace(config=SimpleNamespace(reward_scale={}))                # has a scale of its own

PROMPTS = ["ab", "h", "cdefg", "gg", "b", "ef"]
POOL = {p: ["".join(random.Random(f"{p} {i}").choices("abcdefgh", k=3 + i % 3)) for i in range(12)]
        for p in PROMPTS}


def cut(text):
    """Was this text of the pool cut off?"""
    return text[0] in "aceg"


def begun(toy, out, pool=POOL, reward=score, prompts=PROMPTS, **kwargs):
    config = rso.Config(**{**dict(model=str(toy), data="toy.jsonl", reward="none", max_length=64,
                                  max_new_tokens=4, lr=1e-2,
                                  warmup=0.0, batch_size=4, epochs=1.0, candidates=12, eval_prompts=2,
                                  eval_samples=1,
                                  save_every=0, device="cpu", quiet=True, gamma=0.1), **kwargs})
    out.mkdir()
    pool = {p: Ranking(p, texts, [], ended=[not cut(text) for text in texts])
            for p, texts in (pool or {}).items()}
    task = Task("toy", {"train": list(prompts), "test": ["d", "ee"]}, pool=pool)
    config.reward = ""
    torch.manual_seed(config.seed)
    return harness.Run(config, out, task, common.load_tokenizer(toy, config.max_length),
                       harness.load_policy(config),
                       {"proxy": reward})


def train_on(run, pairs):
    """rso.train on these pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rso, "collect_pairs", lambda run: pairs)
        rso.train(run)


def test_pairs_are_not_of_the_kept_candidates_or_the_loser_comes_first(toy, tmp_path):
    run = begun(toy, tmp_path / "run", num_samples=4, beta=0.0)
    pairs = rso.collect_pairs(run)
    assert len(pairs) == 2 * len(PROMPTS) and rso.collect_pairs(run) == pairs
    for row in pairs:
        assert row.scores == pytest.approx(score(None,
                                                 row.responses).tolist()) and row.scores[0] > row.scores[1]
        assert row.ended == tuple(not cut(text) for text in row.responses)
    assert len({row.ended for row in pairs}) > 1
    for prompt in PROMPTS:                                          # at beta 0 the top four
        texts = [text for row in pairs if row.prompt == prompt for text in row.responses]
        assert sorted(texts) == sorted(sorted(set(POOL[prompt]), key=lambda text: -score(None, [text]))[:4])
    run.config.pairs = "tournament"
    assert len(rso.collect_pairs(run)) == 3 * len(PROMPTS)
    run.config.seed = 1
    assert rso.collect_pairs(run) != pairs


def test_U_pool_is_not_shuffled_or_early_picks_meet(toy, tmp_path):
    prompts = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    texts = [c + d for c in "abcdefgh" for d in "ah"][:12]
    run = begun(toy, tmp_path / "run", {p: texts for p in prompts}, prompts=prompts, num_samples=2)
    for settings in (dict(beta=1e9), dict(source="sft")):
        for name, value in settings.items():
            setattr(run.config, name, value)
        places = Counter(texts.index(text) for row in rso.collect_pairs(run) for text in row.responses)
        assert p_value(places, dict.fromkeys(range(12), 1 / 12)) > 0.001
    run.config.source, run.config.beta, run.config.num_samples = "rso", 0.0, 4
    top = sorted(texts, key=lambda text: -score(None, [text]))[:2]
    meet = sum(set(row.responses) == set(top) for row in rso.collect_pairs(run))
    assert 10 < meet < 34                                           # one third of 64


def test_U_few_different_candidates_crash_are_doubled_or_not_reported(toy, tmp_path, capsys):
    pool = POOL | {"h": ["abc", "abd", "abc"] * 4, "gg": ["ab", "ac", "ad"] * 4}
    pairs = rso.collect_pairs(begun(toy, tmp_path / "run", pool, num_samples=4))
    assert [set(row.responses) for row in pairs if row.prompt == "h"] == [{"abc", "abd"}]
    assert len([row for row in pairs if row.prompt == "gg"]) == 1 and len(pairs) == 2 * 4 + 2
    assert capsys.readouterr().err.count("2 of 6 prompts have fewer than --num_samples 4") == 1
    rso.collect_pairs(begun(toy, tmp_path / "enough", num_samples=4))
    assert "fewer" not in capsys.readouterr().err


def test_L_a_cut_off_sample_is_taught_to_end(toy, tmp_path, monkeypatch):
    run = begun(toy, tmp_path / "run", pool=None, num_samples=8)
    seen, sample = {}, harness.samples.sample_rankings

    def spy(*arguments):
        rankings = sample(*arguments)
        for row in rankings:
            for text, end in zip(row.responses, row.ended):
                seen.setdefault((row.prompt, text), end)            # the first of equal responses stays
        return rankings

    monkeypatch.setattr(harness.samples, "sample_rankings", spy)
    pairs = rso.collect_pairs(run)
    assert set(seen.values()) == {True, False}
    assert len({row.ended for row in pairs}) > 1                    # winner and loser of both kinds
    assert all(row.ended == tuple(seen[row.prompt, text] for text in row.responses) for row in pairs)
    for row in pairs:
        _, batch = next(run.microbatches([row]))
        assert (common.finished(run.tokenizer, batch).tolist()) == list(row.ended)


def test_direct_pairs_are_sampled_relabelled_or_too_many(toy, tmp_path):
    run = begun(toy, tmp_path / "run", source="direct", num_samples=4)
    writers = [Pair(p, "a", "b" * i) for i in (1, 2, 3) for p in ("h", "gg")]
    run.task.pairs = {"train": [Pair("h", "a", "b")], "off_policy": writers}
    assert sorted(rso.collect_pairs(run)) == sorted(writers[:4])
    del run.task.pairs["off_policy"]
    assert rso.collect_pairs(run) == [Pair("h", "a", "b")]       # all of people's, whatever the reward thinks
    del run.task.pairs["train"]
    with pytest.raises(UserError, match="no pairs"):
        rso.train(run)


def test_equal_rewards_train_on_ties(toy, tmp_path):
    constant = lambda prompts, responses: torch.ones(len(prompts))                        # noqa: E731
    constant.model = score.model
    run = begun(toy, tmp_path / "run", reward=constant)
    with pytest.raises(UserError, match="all candidates of each prompt are equal"):
        rso.train(run)


@pytest.mark.parametrize("wrong, flag", [
    (dict(gamma=0), "--gamma"), (dict(gamma=math.nan), "--gamma"), (dict(beta=-0.1), "--beta"),
    (dict(beta=math.nan), "--beta"),
    (dict(num_samples=1), "--num_samples"), (dict(candidates=3), "--candidates"),
    (dict(loss="slic"), "--loss"),
    (dict(source="best"), "--source"), (dict(pairs="all"), "--pairs"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        rso.Config(**wrong)


def test_gamma_of_short_texts_is_the_papers_or_overrides_what_is_given():
    tiny, real = rso.Config(), rso.Config(model="some/model", data="x.jsonl")
    assert (real.gamma, rso.Config(gamma=0.3).gamma) == (0.05, 0.3)
    assert tiny.gamma == rso.Config.GAMMA["tiny"] > 0.05                         # tuned


# --------------------------------------------------------------------------------------------------- training

PAIRS = [Ranking("ab", ("cd", "efgha"), (1, 0), ended=(True, False)),
         Ranking("h", ("a", "b"), (1, 0), ended=(True, True)),
         Ranking("cdefg", ("abca", "h"), (1, 0), ended=(False, True)), Pair("gg", "hh", "aaaaaaa"),
         Pair("b", "cccc", "dd"),
         Pair("ef", "gh", "hg"), Pair("abc", "d", "ee")]


def logged(run):
    return [row for row in map(json.loads,
                               (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "loss" in row]


def logps_of(model, tokenizer, row):
    """log pi of both responses [2], one row at a time: no padding."""
    return torch.cat([common.sequence_logps(model, common.encode(tokenizer, [row.prompt], [text], [end]))
                      for text, end in zip(row.responses, row.ended or (True, True))])


@pytest.mark.parametrize("kind, budget",
                         [("sigmoid_norm", 30), ("sigmoid_norm", 100000), ("hinge", 30), ("hinge_norm", 30)])
def test_O_step_differs_from_a_plain_mean_over_pairs(kind, budget, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    run = begun(toy, tmp_path / "run", token_budget=budget, loss=kind, gamma=0.3, max_grad_norm=1e9)
    train_on(run, PAIRS)
    policy, reference = harness.load_policy(run.config), run.load_reference()
    optimizer, _ = sgd(policy, run.config.lr, 2)
    plan = harness.shuffled_batches(len(PAIRS), run.config.epochs, run.config.batch_size, run.config.seed)
    for rows, row in zip(plan, logged(run), strict=True):                          # four, then a ragged three
        losses = []
        for pair in [PAIRS[i] for i in rows]:
            logps, sft = logps_of(policy, run.tokenizer, pair), logps_of(reference, run.tokenizer, pair)
            margin = logps[0] - logps[1] - (0 if kind == "hinge" else sft[0] - sft[1])
            losses.append((-0.3 * margin).exp().log1p() if kind == "sigmoid_norm"
                          else (1 - 0.3 * margin).relu())
        loss = sum(losses) / len(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert (parameters(policy) - parameters(reference)).abs().max() > 1e-3
    assert (parameters(run.policy) - parameters(policy)).abs().max() < 2e-6


def test_O_step_is_not_clipped_or_the_schedule_is_not_followed(toy, tmp_path, monkeypatch):
    settings, seen, log = [], [], harness.Run.log

    def halving(model, *given):
        settings.append(given)
        seen.append(parameters(model).clone())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)

    monkeypatch.setattr(common, "adamw", halving)
    monkeypatch.setattr(harness.Run, "log", lambda run, *row: seen.append(parameters(run.policy).clone())
                        or log(run, *row))
    run = begun(toy, tmp_path / "run", max_grad_norm=0.01)
    train_on(run, PAIRS)
    assert settings == [(run.config.lr, 2, run.config.schedule, run.config.warmup)]
    moved = [(after - before).norm().item() for before, after in zip(seen, seen[1:])]
    assert moved == pytest.approx([0.01, 0.005], rel=1e-3)
    assert all(row["grad_norm"] > 0.02 for row in logged(run))               # before clipping


def test_reference_moves_with_the_policy(toy, tmp_path, monkeypatch):
    seen, plain = [], rso.preference_loss
    monkeypatch.setattr(rso, "preference_loss", lambda *args: seen.append(torch.stack(args[1:5]).detach())
                        or plain(*args))
    run = begun(toy, tmp_path / "run", epochs=3.0, batch_size=1)
    train_on(run, PAIRS[:1])
    expected = logps_of(run.load_reference(), run.tokenizer, PAIRS[0]).double()
    assert len(seen) == 3
    for logps in seen:
        close(logps[2:, 0].double(), expected, 1e-5)
    close(seen[0][:2, 0].double(), expected, 1e-5)
    assert (seen[-1][:2, 0] - expected).abs().min() > 0.1
    assert run.counts["tokens_scored_reference"] == 12 and run.counts["tokens_trained"] == 3 * 12


def test_AJ_first_step_is_not_at_the_sft_policy_or_training_prefers_the_loser(toy, tmp_path):
    for kind, start in (("sigmoid_norm", math.log(2)), ("hinge_norm", 1.0)):
        run = begun(toy, tmp_path / kind, loss=kind, batch_size=7, epochs=6.0)
        train_on(run, PAIRS)
        first, *_, last = logged(run)
        assert (first["loss"] == pytest.approx(start, abs=1e-5)
                and first["rewards/margins"] == pytest.approx(0, abs=1e-5))
        assert last["loss"] < start - 0.05 and last["rewards/accuracies"] == 1
        rise = [last[f"logps/{side}"] - first[f"logps/{side}"] for side in ("chosen", "rejected")]
        assert [last["rewards/chosen"],
                last["rewards/rejected"]] == pytest.approx([0.1 * x for x in rise], abs=1e-4)
        assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"],
                                                        abs=1e-5)


def test_AE_runs_differ_under_one_seed_or_agree_under_two(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(harness.loading, "load_task",
                        lambda config: begun(toy, tmp_path / f"task {config.out[-1]}", None).task)
    monkeypatch.setattr(harness.command_line, "load_rewards", lambda config, task: {"proxy": score})
    rows = {}
    for name, settings in dict(a={}, b={}, c=dict(eval_every=1), d=dict(seed=1)).items():
        config = begun(toy, tmp_path / f"config {name}", num_samples=4, **settings).config
        config.out = str(tmp_path / name)
        result = harness.launch(rso.train, config)
        assert result["eval/proxy"] != result["trace"][0]["eval/proxy"]
        rows[name] = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
    losses = {name: [line for line in text.splitlines() if '"loss"' in line] for name, text in rows.items()}
    assert rows["a"] == rows["b"] and losses["a"] == losses["c"] and len(losses["a"]) >= 2
    assert not set(losses["a"]) & set(losses["d"])


def test_pairs_are_drawn_alike_under_every_seed(toy, tmp_path):
    run, found = begun(toy, tmp_path / "run", num_samples=4), []
    for run.config.seed in (0, 1, 0):
        found.append(rso.collect_pairs(run))
    assert found[0] == found[2] != found[1]
