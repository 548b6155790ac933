"""raft.py: best of K, selection, rounds, and training. Letters are the bug classes a test would catch."""
import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import common
import harness
import raft
from common import UserError
from conftest import cases, close, killed_after, parameters, sgd, tensor
from harness import loading
from harness.rewards import NoisyReward
from raft import best_of_k, kl_best_of_n, select
from tasks import Pair, Ranking, Task


# -------------------------------------------------------------------------------------------------- best of K

def test_V_best_of_k_is_not_the_first_maximum():
    assert best_of_k(tensor([[1, 3, 3], [2, 2, 2], [-5, -7, -4]])).tolist() == [1, 0, 2]
    assert best_of_k(torch.tensor([[3], [1]])).tolist() == [0, 0]
    for wrong in (tensor([1, 2]), tensor([[[1, 2]]]), tensor(1)):
        with pytest.raises(ValueError, match=r"\[B, K\]"):
            best_of_k(wrong)


def test_V_selection_differs_from_a_fixture():
    selections = [case for case in cases("bon") if case["inputs"]["kind"] == "select"]
    assert selections
    for case in selections:
        rewards, expected = tensor(case["inputs"]["rewards"]), case["expected"]
        assert best_of_k(rewards).tolist() == expected["best_index"]
        rows = select([Ranking("p", [*map(str, range(len(row)))], row.tolist(), (), [True] * len(row))
                       for row in rewards])
        assert [row.responses for row in rows] == [[str(i)] for i in expected["best_index"]]
        assert [row.scores for row in rows] == [[best] for best in expected["best_reward"]]
        assert [kl_best_of_n(rewards.shape[1])] * len(rows) == pytest.approx(expected["kl_bound"], abs=1e-9)


def law_of_best(base, rewards, n):
    """Exact distribution of what best_of_k picks from n samples of a policy on an enumerated space."""
    tuples, law = list(itertools.product(range(len(base)), repeat=n)), [0.0] * len(base)
    for row, i in zip(tuples, best_of_k(tensor([[rewards[i] for i in row] for row in tuples])).tolist()):
        law[row[i]] += math.prod(base[j] for j in row)
    return law, sum(p * math.log(p / q) for p, q in zip(law, base) if p)


def test_V_kl_of_best_of_n_differs_from_a_fixture():
    assert {case["inputs"]["kind"] for case in cases("bon")} >= {"kl", "finite", "subset_max"}
    for case in cases("bon"):
        given, expected = case["inputs"], case["expected"]
        if given["kind"] == "kl":
            assert [kl_best_of_n(n) for n in given["n"]] == pytest.approx(expected["kl_bound"], abs=1e-9)
        if given["kind"] == "finite":
            law, kl = law_of_best(given["base_probs"], given["rewards"], given["n"])
            assert law == pytest.approx(expected["bon_probs"],
                                        abs=1e-9) and kl == pytest.approx(expected["kl_exact"], abs=1e-9)
            assert sum(map(float.__mul__, law,
                           given["rewards"])) == pytest.approx(expected["expected_reward"], abs=1e-9)
            assert kl <= expected["kl_bound"] + 1e-12 and abs(kl_best_of_n(given["n"])
                                                              - expected["kl_bound"]) < 1e-9
        if given["kind"] == "subset_max":
            for n, best in zip(given["n"], expected["expected_max"], strict=True):
                subsets = tensor(list(itertools.combinations(given["rewards"], n)))
                close(subsets.gather(1, best_of_k(subsets)[:, None]).mean(), best)


def test_V_kl_of_best_of_n_is_above_the_bound_or_the_bound_is_loose():
    base, rewards = [0.4, 0.3, 0.2, 0.1], [1.0, 0.0, 3.0, 1.0]
    assert [kl_best_of_n(n)
            for n in (1, 2, 4)] == pytest.approx([0, math.log(2) - 1 / 2, math.log(4) - 3 / 4], abs=1e-12)
    for n in (2, 3, 5):
        law, kl = law_of_best(base, rewards, n)
        assert law[2] == pytest.approx(1 - 0.8 ** n) and law[1] == pytest.approx(0.3 ** n)
        assert law[0] / law[3] == pytest.approx(4)                  # equals share by their probability
        assert 0 < kl < kl_best_of_n(n)
    kl = law_of_best([1 / 60] * 60, list(range(60)), 2)[1]          # hardly a tie
    assert 0.97 * kl_best_of_n(2) < kl < kl_best_of_n(2)


# -------------------------------------------------------------------------------------------------- selection

def ranking(prompt, scores, ended=None):
    n = len(scores)
    return Ranking(prompt, [f"{prompt}{i}" for i in range(n)], scores, ["w"] * n, ended or [True] * n)


def chosen(rows):
    return [row.responses[0] for row in rows]


def test_V_local_and_global_rankings_by_hand_differ():
    rows = [ranking("a", [0.0, 2.0, 2.0], [True, False, True]), ranking("b", [9.0, 7.0, 8.0]),
            ranking("c", [-1.0, -2.0, -3.0])]
    assert chosen(select(rows)) == ["a1", "b0", "c0"]          # of equals the first, each prompt from its own
    assert select(rows)[0] == Ranking("a", ["a1"], [2.0], (), [False])
    assert chosen(select(rows, "global")) == ["b0", "b2", "b1"]     # as many as prompts
    assert chosen(select(rows, "global", 4 / 9)) == ["b0", "b2", "b1", "a1"]
    assert chosen(select(rows, "global", 1.0)) == ["b0", "b2", "b1", "a1", "a2", "a0", "c0", "c1", "c2"]
    assert chosen(select(rows, "global", 1e-9)) == ["b0"]
    ties = [ranking("a", [1.0, 1.0]), ranking("b", [1.0, 1.0])]
    assert chosen(select(ties, "global")) == ["a0",
                                              "a1"] and chosen(select(ties, "global",
                                                                      0.75)) == ["a0", "a1", "b0"]


def letters(prompts, responses):
    """A reward model without a model: every letter counts, earlier ones more."""
    return torch.tensor([sum((ord(c) - ord("a")) * 10 ** -i for i, c in enumerate(text))
                         for text in responses])


letters.model = SimpleNamespace(config=SimpleNamespace(reward_scale={}))              # has a scale of its own


def test_V_noise_of_a_prompt_changes_a_local_ranking_or_noise_of_a_response_none(toy, tmp_path):
    rng, run = random.Random(0), begun(toy, tmp_path / "run")
    rows = [Ranking(f"p{i}", ["".join(rng.choices("abcdefgh", k=rng.randint(1, 4))) for _ in range(8)], (),
                    (), [True] * 8)
            for i in range(50)]

    def picks(reward, *ways):
        return chosen(select(harness.scored(run, rows, reward), *ways))

    def noisy(kind, seed=0):
        return NoisyReward(letters, kind, seed)

    def faint(prompts, responses):
        return 1e-6 * letters(prompts, responses)               # float32 would round it away beside the noise

    for seed in range(5):
        for reward in (letters, faint):
            assert picks(NoisyReward(reward, "prompt", seed)) == picks(letters)
    assert picks(noisy("prompt"), "global") != picks(letters, "global")
    assert picks(noisy("response")) == picks(noisy("response")) != picks(letters)
    assert picks(noisy("response")) != picks(noisy("response", 1))
    assert picks(noisy("prompt"), "global") == picks(noisy("prompt"),
                                                     "global") != picks(noisy("prompt", 1), "global")


@pytest.mark.parametrize("wrong, flag", [
    (dict(candidates=0), "--candidates"), (dict(rounds=0), "--rounds"), (dict(prompts=-1), "--prompts"),
    (dict(kl_coef=-0.1), "--kl_coef"), (dict(kl_coef=math.nan), "--kl_coef"),
    (dict(share=1.5, ranking="global"), "--share"),
    (dict(share=math.nan, ranking="global"), "--share"), (dict(share=0.5), "--share is for --ranking global"),
    (dict(ranking="top"), "--ranking"), (dict(pool="first"), "--pool"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        raft.Config(**wrong)


# ------------------------------------------------------------------------------------------------- the rounds

PROMPTS = ["ab", "h", "cdefg", "gg", "b", "ef", "abc", "hd"]


def settings(toy, **kwargs):
    return raft.Config(**{**dict(model=str(toy), data="toy.jsonl", max_length=64, max_new_tokens=4, lr=1e-2,
                                 batch_size=4,
                                 epochs=1.0, candidates=3, rounds=2, prompts=6, eval_prompts=2,
                                 eval_samples=1, save_every=0,
                                 device="cpu", quiet=True), **kwargs})


def task(**kwargs):
    return Task("toy", {"train": PROMPTS, "test": ["d", "ee"]}, **kwargs)


def begun(toy, out, reward=letters, **kwargs):
    config = settings(toy, **kwargs)
    out.mkdir()
    torch.manual_seed(config.seed)
    return harness.Run(config, out, task(), harness.load_tokenizer(config), harness.load_policy(config),
                       {"proxy": reward})


def negative(prompts, responses):
    return -letters(prompts, responses)


negative.model = letters.model


def watched(toy, out, monkeypatch, reward=letters, **kwargs):
    """A finished Run, and a list of events: kind, the weights and the optimizer's moments then, and rows."""
    run, events = begun(toy, out, reward, **kwargs), []
    sample, microbatches = harness.sample_rankings, run.microbatches

    def note(kind, rows):
        events.append(SimpleNamespace(kind=kind, weights=parameters(run.policy),
                                      moments=dict(run.optimizer.state), rows=rows))
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(harness, "sample_rankings", lambda *args: note("sample", sample(*args)))
        patch.setattr(run, "microbatches", lambda rows: microbatches(note("step", rows)))       # once a step
        raft.train(run)
    return run, events


def weights_of(model, tokenizer, rows):
    """One plain step of maximum likelihood: responses with EOS, unless they were cut off; mean over rows."""
    nll = [-common.sequence_logps(model, common.encode(tokenizer, [row.prompt], row.responses, row.ended))
           for row in rows]
    (torch.cat(nll).sum() / len(rows)).backward()
    optimizer, _ = sgd(model, None, None)
    optimizer.step()
    optimizer.zero_grad()
    return parameters(model)


@pytest.mark.parametrize("budget", [30, 100000])
def test_O_L_rounds_differ_from_a_plain_loop(budget, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    run, events = watched(toy, tmp_path / "run", monkeypatch, token_budget=budget, max_grad_norm=1e9)
    assert [event.kind for event in events] == ["sample", "step", "step"] * 2         # 6 of a round, in fours
    plain = harness.load_policy(run.config)
    weights, seen = parameters(plain), set()
    for event in events:
        assert (event.weights - weights).abs().max() < 2e-6    # round 2 samples from what round 1 has trained
        if event.kind == "sample":
            assert len(event.rows) == 6 and all(len(row.responses) == 3 for row in event.rows)
            best = []
            for row in event.rows:
                i = max(range(3), key=lambda i: letters([], [row.responses[i]]).item())
                best.append((row.prompt, row.responses[i], row.ended[i]))
        else:
            assert len(event.rows) == 4
            assert {(row.prompt, *row.responses, *row.ended) for row in event.rows} <= set(best)
            seen |= {row.ended[0] for row in event.rows}
            weights = weights_of(plain, run.tokenizer, event.rows)
    assert seen == {True, False}                                 # texts that end, and texts that were cut off
    assert (parameters(run.policy) - weights).abs().max() < 2e-6
    assert (weights - parameters(loading.load_reference(run.config))).abs().max() > 1e-3


def test_V_one_candidate_is_not_sft_on_plain_samples(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    one = dict(candidates=1, rounds=1, batch_size=6, max_grad_norm=1e9)
    run, (sampled, step) = watched(toy, tmp_path / "a", monkeypatch, **one)
    assert sorted(row.prompt for row in sampled.rows) == sorted(row.prompt for row in step.rows)
    expected = weights_of(harness.load_policy(run.config), run.tokenizer, sampled.rows)
    assert (parameters(run.policy) - expected).abs().max() < 2e-6
    other, _ = watched(toy, tmp_path / "b", monkeypatch, reward=negative, **one)
    assert torch.equal(parameters(other.policy), parameters(run.policy))


@pytest.mark.parametrize("bound", [1e-2, 1e9])
def test_gradient_is_not_clipped_or_the_clipped_norm_is_logged(bound, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    run, _ = watched(toy, tmp_path / "run", monkeypatch, rounds=1, batch_size=6, max_grad_norm=bound)
    row, = (row for row in map(json.loads,
                               (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
            if "loss" in row)
    moved = (parameters(run.policy) - parameters(loading.load_reference(run.config))).norm().item()
    assert row["grad_norm"] > 0.1 and moved == pytest.approx(0.01 * min(bound, row["grad_norm"]), rel=1e-2)


def collected(run, rankings, monkeypatch, **kwargs):
    """What collect keeps of the rankings."""
    run.config, run.state = replace(run.config, **kwargs), {"pool": []}
    monkeypatch.setattr(harness, "sample_rankings", lambda *args: rankings)
    raft.collect(run, letters, loading.load_reference(run.config), 0)
    return run.state["pool"]


def test_V_kl_in_the_ranking_is_not_reward_less_kl_coef_times_the_log_ratio(toy, tmp_path, monkeypatch):
    run = begun(toy, tmp_path / "run")
    rng, reference = random.Random(0), loading.load_reference(run.config)
    texts, ends = ["a", "bc", "dda", "ef", "gha", "h", "hb", "cc"], [True, False]
    rankings = [Ranking(p, rng.sample(texts, 5), (), (), rng.choices(ends, k=5)) for p in PROMPTS]
    for p in run.policy.parameters():
        p.data += 0.1 * torch.randn_like(p)
    scores = []
    for row in rankings:
        batch = common.encode(run.tokenizer, [row.prompt] * 5, row.responses, row.ended)
        ratios = common.sequence_logps(run.policy, batch) - common.sequence_logps(reference, batch)
        scores.append((letters(None, row.responses) - 2.0 * ratios).tolist())
    by_hand = [row.responses[penalised.index(max(penalised))] for row, penalised in zip(rankings, scores)]
    kept, rewards = collected(run, rankings, monkeypatch, kl_coef=2.0), run.state["rewards"]
    assert chosen(kept) == by_hand
    read = sum(len(row.prompt) + len(text) + end
               for row in rankings for text, end in zip(row.responses, row.ended))
    assert run.counts["tokens_scored_reference"] == read            # not the policy's own pass
    assert [row.scores[0] for row in kept] == pytest.approx([max(penalised) for penalised in scores],
                                                            abs=1e-4)
    assert chosen(collected(run, rankings, monkeypatch,
                            kl_coef=0.0)) != by_hand and run.state["rewards"] == rewards
    everything = [(value, text) for row, penalised in zip(rankings, scores) for value,
                  text in zip(penalised, row.responses)]
    kept = collected(run, rankings, monkeypatch, kl_coef=2.0, ranking="global")
    assert chosen(kept) == [text for _, text in sorted(everything, reverse=True)[:len(PROMPTS)]]


def test_round_mean_or_best_or_what_is_recovered_of_them_are_wrong(toy, tmp_path, monkeypatch):
    run = begun(toy, tmp_path / "run")
    assert raft.against_best(run, letters) == {}
    collected(run, [ranking("a", ())._replace(responses=["b", "d", "d"], ended=[True] * 3, systems=()),
                    ranking("b", ())._replace(responses=["a", "h", "b"], ended=[True] * 3, systems=())],
              monkeypatch)
    mean, best = run.state["rewards"]
    assert (mean, best) == pytest.approx(((7 / 3 + 8 / 3) / 2,
                                          (3 + 7) / 2))                 # "d" came twice, and counts twice
    run.samples["after"] = {"proxy": [3.0, 5.0]}
    measured = raft.against_best(run, letters)
    assert (measured["eval/recovered"] == pytest.approx((4 - mean) / (best - mean))
            and measured["eval/to_best"] == 4 - best)
    assert raft.against_best(run, NoisyReward(letters, "prompt", 0)) == {}


def test_restart_samples_the_initial_policy_or_keeps_the_optimizers_moments(toy, tmp_path, monkeypatch):
    for restart in (True, False):
        run, events = watched(toy, tmp_path / str(restart), monkeypatch, restart=restart, rounds=3)
        initial = parameters(loading.load_reference(run.config))
        rounds = [events[i:i + 3] for i in (0, 3, 6)]               # sample, two steps
        assert [event.kind for event in events] == ["sample", "step", "step"] * 3
        for (sampled, first, second), before in zip(rounds[1:], rounds):
            assert (sampled.weights
                    - initial).abs().max() > 1e-3 and not torch.equal(sampled.weights, before[2].weights)
            assert torch.equal(first.weights, initial if restart else sampled.weights)
            assert (bool(first.moments) != restart and second.moments
                    and not torch.equal(second.weights, initial))


def test_pool_of_all_rounds_forgets_or_takes_more_steps(toy, tmp_path, monkeypatch):
    steps = {}
    for pool in ("last", "all"):
        run, events = watched(toy, tmp_path / pool, monkeypatch, pool=pool, rounds=3, epochs=4.0)
        trained, kept = [], []
        for event in events:
            if event.kind == "sample":
                kept.append({(row.prompt, text) for row in event.rows for text in row.responses})
                trained.append(set())
            else:
                trained[-1] |= {(row.prompt, *row.responses) for row in event.rows}
        old = trained[2] - kept[2]
        assert bool(old) == (pool == "all") and old <= kept[0] | kept[1]
        assert len(run.state["pool"]) == {"last": 6, "all": 18}[pool]
        steps[pool] = [(event.kind, len(event.rows)) for event in events]
    assert steps["all"] == steps["last"] == ([("sample", 6)] + [("step", 4)] * 6) * 3


@pytest.mark.parametrize("options, steps", [
    ({}, 2), ({"ranking": "global", "share": 0.5}, 3), ({"ranking": "global", "share": 0.01}, 1),
    ({"rare": "b", "rounds": 2, "prompts": 0, "batch_size": 3}, 3)])
def test_steps_of_a_round_are_those_of_another_share_or_of_another_round(
        toy, tmp_path, monkeypatch, options, steps):
    """6 prompts (all 8 without --prompts) with 4 candidates each; a share is of all candidates."""
    run, _ = watched(toy, tmp_path / "run", monkeypatch, **{"candidates": 4, "rounds": 1} | options)
    assert run.n_steps == steps * run.config.rounds
    if "share" in options:
        assert len(run.state["pool"]) == max(1, round(options["share"] * 24))


def test_rare_prompts_come_again_or_rounds_share_their_prompts(toy):
    config, data = settings(toy, rare="b", prompts=0), task()
    assert sorted(raft.prompts_of_round(config, data, 0)) == sorted(PROMPTS)
    assert sorted(raft.prompts_of_round(config, data, 1)) == sorted(p for p in PROMPTS if "b" not in p)
    config = settings(toy, prompts=4)
    drawn = [raft.prompts_of_round(config, data, turn) for turn in (0, 0, 1, 2)]
    assert all(len(set(prompts)) == 4 and set(prompts) <= set(PROMPTS) for prompts in drawn)
    assert drawn[0] == drawn[1] and len({frozenset(prompts) for prompts in drawn}) > 1
    assert raft.prompts_of_round(replace(config, seed=1), data, 0) != drawn[0]


def test_rare_skill_is_measured_on_other_prompts_or_changes_the_random_numbers(toy, tmp_path):
    run, seen = begun(toy, tmp_path / "run", rare="e"), []
    assert raft.rare_skill(run) == {}
    run.task.gold = lambda prompt, text, ended: seen.append((prompt, text, ended)) or float(ended)
    before = torch.get_rng_state()
    assert raft.rare_skill(run) == {"eval/rare_gold": sum(ended for *_, ended in seen)
                                    / 16} == raft.rare_skill(run)
    assert torch.equal(before,
                       torch.get_rng_state()) and len(seen) == 32 and {prompt for prompt,
                                                                       *_ in seen} == {"ee"}
    run.config.rare = "h"
    assert raft.rare_skill(run) == {}                               # no test prompt has it


# -------------------------------------------------------------------------------- whole runs: refresh, resume

@pytest.fixture
def whole(toy, tmp_path, monkeypatch):
    """A whole run with annotators and a reward model, kept as whole.proxy.

    It gives its result, metrics.jsonl and the saved weights.
    """
    def run(name, data=None, proxy=None, **kwargs):
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_pretrained(toy, num_labels=1)
        model.config.reward_scale = {"mean": 0.0, "std": 1.0}
        data = data or task(annotate=lambda prompt, a, b, rng: (a, rng.random()) < (b, rng.random()),
                            pairs={"train": [Pair("ab", "c", "d"), Pair("h", "e", "f")]})
        config = settings(toy, out=str(tmp_path / name), **kwargs)
        run.proxy = proxy or common.RewardModel(model.eval(), harness.load_tokenizer(config))
        with monkeypatch.context() as patch:
            patch.setattr(loading, "load_task", lambda config: data)
            patch.setattr(harness.command_line, "load_rewards", lambda config, task: {"proxy": run.proxy})
            result = harness.launch(raft.train, config)
        out = tmp_path / name
        return (result, (out / "metrics.jsonl").read_text(encoding="utf-8"),
                parameters(LlamaForCausalLM.from_pretrained(out)))

    return run


def test_refresh_trains_the_evaluations_proxy_or_on_old_samples_or_the_wrong_way(whole, monkeypatch):
    asked, seen, sampled, rater = [], [], [], []
    sample, fit, collect = harness.sample_rankings, harness.train_reward_model, raft.collect

    def annotate(prompt, a, b, rng):
        asked.append((prompt, a, b))
        return a < b                                                # the earlier in the alphabet

    def sample_and_note(run, prompts, n):
        sampled.append((n, parameters(run.policy), sample(run, prompts, n)))
        return sampled[-1][2]

    def fit_and_note(model, tokenizer, pairs, recipe, counts):
        seen.append(pairs)
        score = common.RewardModel(model, tokenizer)
        prompts, better, worse = zip(*pairs)
        margins = []
        for _ in range(2):
            margins.append((score(prompts, better) - score(prompts, worse)).mean())
            fit(model, tokenizer, pairs, recipe)
        assert margins[1] > margins[0]

    def note_rater(run, reward, *rest):
        rater.append((reward.model, parameters(reward.model), run))
        collect(run, reward, *rest)

    monkeypatch.setattr(harness, "sample_rankings", sample_and_note)
    monkeypatch.setattr(harness, "train_reward_model", fit_and_note)
    monkeypatch.setattr(raft, "collect", note_rater)
    old = [Pair("ab", "c", "d"), Pair("h", "e", "f")]
    result, *_ = whole("run", task(annotate=annotate, pairs={"train": old}), refresh=True, prompts=8)
    model, before, run = rater[0]
    assert torch.equal(parameters(whole.proxy.model), before) and not torch.equal(parameters(model), before)
    assert [n for n, *_ in sampled] == [2, 3, 2, 3] and not torch.equal(sampled[0][1], sampled[2][1])
    new = [[(row.prompt, *row.responses) for row in sampled[i][2] if row.responses[0] != row.responses[1]]
           for i in (0, 2)]
    assert asked == new[0] + new[1] and len(new[0]) > 2
    labelled = [[Pair(p, min(a, b), max(a, b)) for p, a, b in rows] for rows in new]
    assert seen[0] == labelled[0] + seen[0][len(new[0]):] and sorted(seen[0][len(new[0]):]) == sorted(old)
    assert seen[1][:len(new[1])] == labelled[1] and set(seen[1][len(new[1]):]) <= {*old, *labelled[0]}
    assert run.state["labels"] == old + labelled[0] + labelled[1]
    assert result["new_labels"] == len(labelled[0] + labelled[1])


def test_evaluation_is_compared_with_another_rounds_rewards_or_with_older_samples(whole):
    data = task(gold=lambda prompt, text, ended: float(len(text)))
    result, metrics, _ = whole("run", data, eval_every=1, rare="e", rounds=3)
    rows = [json.loads(line) for line in metrics.splitlines()]
    steps, (before, *evaluations) = ([row for row in rows if ("loss" in row) == kind]
                                     for kind in (True, False))
    assert "eval/to_best" not in before and len(evaluations) == len(steps) == 6
    assert len({row["eval/round_best"] for row in evaluations}) == 3
    for step, row in zip(steps, evaluations):
        assert row["step"] == step["step"] and list(row)[-5:] == [
            "eval/round_mean", "eval/round_best", "eval/to_best", "eval/recovered", "eval/rare_gold"]
        assert (row["eval/round_mean"], row["eval/round_best"]) == (step["round/mean"], step["round/best"])
        assert row["eval/to_best"] == pytest.approx(row["eval/proxy"] - row["eval/round_best"])
    for row, kept in zip([before, *evaluations], result["trace"], strict=True):
        assert row == {name: kept[name] for name in row} and row["eval/rare_gold"] > 0


def test_saved_reward_model_is_not_that_of_the_last_round(whole, tmp_path):
    straight = whole("straight", refresh=True, rounds=3, save_every=5)
    with killed_after(5):                                   # after the last round's labels, and a checkpoint
        whole("killed", refresh=True, rounds=3, save_every=5)
    assert whole("killed", refresh=True, rounds=3, save_every=5, resume=True)[1] == straight[1]
    found = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "reward_model")
             for name in ("straight", "killed")]
    assert torch.equal(*map(parameters, found)) and not torch.equal(parameters(found[0]),
                                                                   parameters(whole.proxy.model))
    assert not hasattr(found[0].config, "reward_scale") and hasattr(whole.proxy.model.config, "reward_scale")
    assert AutoTokenizer.from_pretrained(tmp_path / "straight" / "reward_model").eos_token
    whole("plain")
    assert not (tmp_path / "plain" / "reward_model").exists()


def test_refresh_without_annotators_or_with_noise_passes(whole):
    with pytest.raises(UserError, match="--refresh needs annotators"):
        whole("none", task(), refresh=True)
    with pytest.raises(UserError, match="--refresh needs annotators"):
        whole("noise", refresh=True, reward_noise="prompt")
    with pytest.raises(UserError, match="--refresh needs annotators"):
        whole("letters", proxy=letters, refresh=True)


@pytest.mark.parametrize("options", [{}, dict(refresh=True, restart=True, pool="all")])
def test_AF_resumed_run_differs_from_a_straight_one(whole, options):
    options = dict(options, rounds=3, save_every=3, eval_every=4)
    straight, metrics, weights = whole("straight", **options)
    with killed_after(4):                             # in round 3; the checkpoint is in the midst of round 2
        whole("killed", **options)
    torch.manual_seed(999)
    resumed = whole("killed", resume=True, **options)
    assert resumed[1] == metrics and '"step": 6' in metrics and torch.equal(resumed[2], weights)
    assert resumed[0]["tokens_generated"] == straight["tokens_generated"] > 0


def test_AE_runs_differ_under_one_seed_or_agree_under_two_or_prompt_noise_counts(whole):
    def losses(finished):
        return [json.loads(line)["loss"] for line in finished[1].splitlines() if '"loss"' in line]

    first, again, other = whole("a"), whole("b"), whole("c", seed=1)
    assert first[1] == again[1] and torch.equal(first[2], again[2])
    assert len(losses(first)) == 4 and not set(losses(first)) & set(losses(other))
    # to a local ranking as little as an evaluation
    noisy = whole("noisy", eval_every=1, reward_noise="prompt")
    assert losses(noisy) == losses(first) and torch.equal(noisy[2], first[2])
    gain = first[0]["eval/proxy"] - first[0]["trace"][0]["eval/proxy"]
    assert first[0]["gain_per_sqrt_log_k"] == pytest.approx(gain / math.sqrt(math.log(3)))
    assert "gain_per_sqrt_log_k" not in whole("one", candidates=1)[0]


def test_older_labels_outnumber_the_new_ones(toy, tmp_path, monkeypatch):
    run, seen = begun(toy, tmp_path / "run", refresh=True), []
    older = [Pair("ab", "c" * i, "d") for i in range(1, 9)]
    run.task.annotate, run.state = (lambda prompt, a, b, rng: True), {"labels": older}
    monkeypatch.setattr(harness, "sample_rankings", lambda run, prompts, n: [Ranking("h", ["a", "b"], [])])
    monkeypatch.setattr(harness, "train_reward_model", lambda model, tokenizer, pairs, recipe, counts:
                        seen.append((pairs, recipe.lr, recipe.batch_size, recipe.schedule)))
    raft.refresh(run, SimpleNamespace(model=run.policy, tokenizer=None), PROMPTS, 0)
    (pairs, *recipe), = seen
    assert pairs[0] == Pair("h", "a", "b") and len(pairs) == 2 and pairs[1] in older
    assert recipe == [1e-3, 32, "cosine"] and run.state["labels"] == [*older, pairs[0]]
