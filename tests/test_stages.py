"""stages.py and what it needs of lm.py, common.py and tasks: rows with any number of responses, cut-off responses, rewards with
noise, candidates, labels turned round. Models are random, over eight letters.
"""
import json
import math
import pickle
import random
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import pytest
import torch

import common
import dpo
import pro
import raft
import rrhf
import rso
import stages
from common import Config
from conftest import parameters, sgd
from tasks import Pair, Ranking, Task, UserError, build, reviews

GOOD, BAD, MIXED = Pair("ab", "cd", "h"), Pair("c", "hgh", ""), Ranking("d", ["a", "bb"], [1.0, 2.0], ["A", "B"], [True, False])


def started(toy, task=None, step=0, rewards=(), out=None, **settings):
    """A run over the toy policy that has made `step` steps."""
    config = Config(**{**dict(model=str(toy), data="none", max_length=64, max_new_tokens=5, lr=1e-2, warmup=0.0, batch_size=4,
                              eval_prompts=2, eval_samples=3, device="cpu", quiet=True), **settings})
    run = common.Run(config, out, task or Task("toy", {"train": ["ab", "c", "def"], "test": ["g", "hh"]}),
                     common.load_tokenizer(toy, config), common.load_policy(config), dict(rewards), step=step)
    run.trained = run.policy
    run.optimizer, run.schedule = common.optimizer_and_schedule(run.policy, config, 10)
    return run


# ------------------------------------------------------------------------------------- batches of any number of responses

def ragged(seed, n=17):
    """Prompts with one to four responses each, some of them cut off, some empty."""
    rng = random.Random(seed)
    texts = [["".join(rng.choices("abcdefgh", k=rng.randrange(9))) for _ in range(rng.randrange(1, 5))] for _ in range(n)]
    return [f"{'abcdefgh'[i % 8]}{'h' * (i % 5)}" for i in range(n)], texts, [[rng.random() < 0.5 for _ in row] for row in texts]


@pytest.mark.parametrize("budget", [1, 40, 150, 10**6])
def test_ragged_responses_are_lost_or_parted_or_exceed_the_budget(toy, budget):
    tokenizer = common.load_tokenizer(toy, Config(max_length=160))
    prompts, texts, ended = ragged(budget)
    seen, shapes = [], []
    for part, batch in common.batches(tokenizer, prompts, texts, budget, ended=ended):
        k, = {len(texts[i]) for i in part}                                 # one number of responses a batch
        assert len(batch) == len(part) * k and batch.lengths.view(len(part), -1).shape == (len(part), k)
        assert len(part) == 1 or batch.input_ids.numel() <= budget
        assert common.decode(tokenizer, batch) == [text for i in part for text in texts[i]]
        assert common.finished(tokenizer, batch).tolist() == [e or not t for i in part for t, e in zip(texts[i], ended[i])]
        lead = batch.attention_mask - batch.response_mask
        assert [tokenizer.decode(row[mask.bool()]) for row, mask in zip(batch.input_ids, lead)] == [
            prompts[i] for i in part for _ in range(k)]
        seen += part
        shapes.append(k)
    assert sorted(seen) == list(range(len(prompts)))
    assert len(shapes) == len(prompts) if budget == 1 else budget < 10**6 or shapes == [1, 2, 3, 4]


def test_cut_off_response_is_taught_to_end_or_empty_one_has_no_token(toy):
    tokenizer = common.load_tokenizer(toy, Config(max_length=160))
    texts, ended = ["ab", "ab", "", "", "ab<eos>"], [True, False, True, False, False]
    batch = common.encode(tokenizer, ["c"] * 5, texts, ended)
    assert batch.lengths.tolist() == [3, 2, 1, 1, 3]
    assert common.finished(tokenizer, batch).tolist() == [True, False, True, True, True]
    assert common.encode(tokenizer, ["c"] * 5, texts).lengths.tolist() == [3, 3, 1, 1, 3]
    with pytest.raises(ValueError):
        common.encode(tokenizer, ["c", "c"], ["a", "b"], [True])


def test_plan_loses_rows_or_has_an_order_of_its_own():
    config, rows = Config(batch_size=3, epochs=1.5), [*"abcdefgh"]
    plan = common.plan_of(rows, config)
    assert plan == [[rows[i] for i in step] for step in common.epochs(8, config)] and sorted(sum(plan, [])[:8]) == rows


# -------------------------------------------------------------------------------------------- log-probs, a step over rows

def plain_logp(model, prompt, text, ended=True):
    """log pi(y|x) and |y| by a forward pass over this text alone."""
    ids = ["abcdefgh".index(c) + 1 for c in prompt + text] + [0] * (ended or not text)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))), len(ids) - len(prompt)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_logps_of_rows_are_out_of_order_or_of_another_model(toy, budget):
    run, rows = started(toy, token_budget=budget), [Pair("abcdef", "hhhh", "a"), GOOD, BAD, MIXED]
    other = common.load_policy(run.config)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    for model in (None, other):
        logps, lengths = common.response_logps(run, rows, model)
        assert not logps.requires_grad and logps.shape == lengths.shape == (4, 2)
        for i, row in enumerate(rows):
            for j, text in enumerate(row.responses):
                value, length = plain_logp(model or run.policy, row.prompt, text, row is not MIXED or j == 0)
                assert logps[i, j].item() == pytest.approx(value, abs=1e-4) and lengths[i, j] == length
    assert common.response_logps(run, [])[0].shape == (0, 0)


RAGGED = [GOOD, Ranking("c", ["hgh"], [0.5]), Ranking("abcdef", ["e", "f", "gg"], [1.0, 3.0, 2.0]), BAD,
          Ranking("e", ["aaaaa"], [2.0], ended=[False])]


def test_step_is_not_on_the_mean_over_rows_or_counts_other_tokens(toy, monkeypatch):
    """Against one backward pass over all rows, written out; the parts must not matter."""
    monkeypatch.setattr(stages, "optimizer_step", sgd)
    run = started(toy)
    texts = [([row.prompt] * len(row.responses), row.responses, row.ended or None) for row in RAGGED]
    total = sum(i * common.sequence_logps(run.policy, common.encode(run.tokenizer, *text)).sum() for i, text in enumerate(texts))
    before = parameters(run.policy)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total / 5, list(run.policy.parameters()))])
    for budget in (1, 30, 10**6):
        run, calls = started(toy, token_budget=budget), []

        def losses_of(rows, batch):
            calls.append(len(rows))
            assert common.decode(run.tokenizer, batch) == [text for row in rows for text in row.responses]
            places = torch.tensor([float(RAGGED.index(row)) for row in rows])
            return places * common.sequence_logps(run.policy, batch).view(len(rows), -1).sum(1), {"place": places}

        metrics = common.minimise(run, 0, RAGGED, losses_of)
        torch.testing.assert_close(parameters(run.policy), before - 0.01 * gradient, rtol=0, atol=2e-6)
        assert gradient.abs().max() > 1e-2 and sum(calls) == 5 and (budget > 1 or calls == [1] * 5)
        assert metrics["place"] == 2 and metrics["loss"].item() == pytest.approx(total.item() / 5, rel=1e-5)
        assert metrics["grad_norm"] == 0                                   # what optimizer_step returned
        assert run.counts["tokens_trained"] == (5 + 4) + 5 + (8 + 8 + 9) + (5 + 2) + 6     # prompts and EOS included, no padding


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_step_on_a_loss_that_is_not_finite_names_another_row_or_step(toy, value):
    run = started(toy, token_budget=1)
    before = parameters(run.policy).clone()

    def losses_of(rows, batch):
        losses = common.sequence_logps(run.policy, batch).view(len(rows), -1).sum(1)
        return losses * torch.tensor([value if row is BAD else 1.0 for row in rows]), {}

    with pytest.raises(UserError, match=f"step 8: loss is -?{value} for the prompt 'c'"):
        common.minimise(run, 7, [GOOD, MIXED, BAD], losses_of)
    assert torch.equal(parameters(run.policy), before)


def test_nll_or_accuracy_of_held_out_pairs_is_per_sequence(toy, monkeypatch):
    """A token: -1 over -3, -2 under -1, and a tie; by whole sequences the second pair would be wrong as well."""
    logps, lengths = torch.tensor([[-2.0, -9], [-2, -3], [-4, -6]]), torch.tensor([[2.0, 3], [1, 3], [2, 3]])
    monkeypatch.setattr(stages, "response_logps", lambda run, pairs: (logps, lengths))
    metrics = common.score_metrics(None, [GOOD] * 3)
    assert metrics == {"eval/score_accuracy": 0.5, "eval/nll": pytest.approx(8 / 5)}
    assert common.score_metrics(None, []) == {}


# ------------------------------------------------------------------------------------------------------------- rewards

def zeros(prompts, responses):
    return torch.zeros(len(prompts))


def test_noise_of_a_prompt_differs_between_its_responses_or_from_call_to_call():
    prompts, texts = [f"{i // 2}" for i in range(4000)], [f"{i}" for i in range(4000)]
    shift, each = (stages.NoisyReward(zeros, kind, 0)(prompts, texts) for kind in ("prompt", "response"))
    assert torch.equal(shift[::2], shift[1::2]) and (each[::2] != each[1::2]).all()
    for noise in (shift[::2], each):
        assert abs(noise.mean()) < 0.08 and noise.std().item() == pytest.approx(1, abs=0.06)
    for kind, noise in (("prompt", shift), ("response", each)):
        again = stages.NoisyReward(zeros, kind, 0)(prompts[::-1], texts[::-1])           # batched in another way
        assert torch.equal(again.flip(0), noise)
        assert (stages.NoisyReward(zeros, kind, 1)(prompts, texts) != noise).all()


def test_shift_of_a_prompt_turns_two_scores_round():
    scores = torch.linspace(0.5, 1, 4000)[:2].repeat(300) + torch.tensor([0, 6e-8]).repeat(300)
    got = stages.NoisyReward(lambda p, r: scores, "prompt", 0)([f"{i // 2}" for i in range(600)], ["x"] * 600)
    assert (got[1::2] > got[::2]).all()
    torch.testing.assert_close(got[1::2] - got[::2], (scores[1::2].double() - scores[::2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["prompt", "response"])
def test_noise_is_measured_into_the_scale_or_left_out(toy, kind):
    def gold(prompt, text, ended):
        return 7.0 * text.count("a") + (prompt == "c")

    task = Task("toy", {"train": ["ab", "c", "def"], "test": ["g"]}, gold=gold)
    plain, noisy = (common.reward_to_maximise(started(toy, task, reward="gold", reward_noise=name, seed=5))
                    for name in ("none", kind))
    assert isinstance(plain, stages.TrueReward) and isinstance(noisy, stages.NoisyReward)
    assert (noisy.reward.mean, noisy.reward.std) == (plain.mean, plain.std) and plain.std > 1
    rows = ["c", "c", "ab"], ["aa", "b", "a"]
    torch.testing.assert_close(noisy(*rows), plain(*rows).double() + stages.NoisyReward(zeros, kind, 5)(*rows))


@pytest.mark.parametrize("sources, gold, reward, own", [
    ("P", None, "", True), ("P", None, "none", True), ("P", None, "some/model", False), ("P", "gold", "", False),
    ("D", None, "", False), ("DP", None, "none", False)])
def test_data_scores_itself_where_a_reward_is_named_or_scores_are_gold(toy, monkeypatch, sources, gold, reward, own):
    monkeypatch.setattr(stages, "reward_to_maximise", lambda run: "the reward")
    run = started(toy, Task("toy", {"train": ["a"], "test": ["b"]}, gold=gold), reward=reward)
    assert common.candidate_reward(run, sources) == (None if own else "the reward")


# ------------------------------------------------------------------------------------------------- samples and candidates

POOL = {"ab": ["pool 0", "pool 1", "pool 2"], "c": ["pool 3", "pool 4"], "def": ["pool 5", "pool 6", "pool 7"]}


def pool_run(toy, monkeypatch, **settings):
    """A run whose task has a pool; rollouts are numbered, and every third is cut off."""
    run = started(toy, Task("toy", {"train": [*POOL], "test": ["g"]}, pool=POOL), **settings)

    def rollout(run, prompts):
        return None, [f"{prompt} {i}" for i, prompt in enumerate(prompts)], torch.arange(len(prompts)) % 3 > 0

    monkeypatch.setattr(stages, "rollout", rollout)
    return run


def test_pool_of_the_initial_policy_is_not_used_or_not_in_part(toy, monkeypatch):
    rows = common.sample_rankings(pool_run(toy, monkeypatch), ["c", "ab"], 2)
    assert rows == [Ranking("c", POOL["c"], [], ended=[True] * 2), Ranking("ab", POOL["ab"][:2], [], ended=[True] * 2)]


@pytest.mark.parametrize("settings, prompts, n", [
    (dict(step=1), ["ab", "c"], 2), (dict(temperature=0.7), ["ab", "c"], 2), (dict(policy="another"), ["ab", "c"], 2),
    ({}, ["ab", "c"], 3), ({}, ["ab", "stranger"], 2)],
    ids=["trained policy", "temperature", "another policy", "more than the pool has", "prompt without a pool"])
def test_pool_stands_for_samples_of_another_policy(toy, monkeypatch, settings, prompts, n):
    """The samples go to their prompts, n each, and a cut-off one is known as such; state.pt holds plain bools only."""
    run = pool_run(toy, monkeypatch, **({"policy": str(toy)} if "policy" in settings else settings))
    rows, places = common.sample_rankings(run, prompts, n), [range(i * n, i * n + n) for i in range(len(prompts))]
    assert rows == [Ranking(prompt, [f"{prompt} {i}" for i in place], [], ended=[i % 3 > 0 for i in place])
                    for prompt, place in zip(prompts, places)]
    assert all(type(value) is bool for row in rows for value in row.ended)


def test_samples_are_not_the_policys_own_or_are_not_counted(toy):
    run = started(toy, max_new_tokens=3)
    rows = common.sample_rankings(run, ["ab", "c"] * 8, 4)
    assert [row.prompt for row in rows] == ["ab", "c"] * 8 and {len(row.responses) for row in rows} == {4}
    flat = [(text, ended) for row in rows for text, ended in zip(row.responses, row.ended)]
    assert all(len(text) == 3 for text, ended in flat if not ended) and {ended for _, ended in flat} == {True, False}
    assert run.counts["tokens_generated"] == sum(len(text) + ended for text, ended in flat)


@pytest.mark.parametrize("ranking, want", [
    (Ranking("p", ["a", "b", "a", "c", "b"], [1, 2, 3, 4, 5], [*"vwxyz"], [True, False, False, True, True]),
     Ranking("p", ["a", "b", "c"], [1, 2, 4], ["v", "w", "y"], [True, False, True])),
    (Ranking("p", ["a", "a"], [], (), [False, True]), Ranking("p", ["a"], [], [], [False])),
    (Ranking("p", ["b", "a"], [0.0, 0.0]), Ranking("p", ["b", "a"], [0.0, 0.0], [], []))])
def test_equal_responses_lose_the_firsts_own_score_or_ended(ranking, want):
    assert stages.distinct(ranking) == want


def letters(prompts, texts):
    return torch.tensor([text.count("a") + (100.0 if prompt == "c" else 0) for prompt, text in zip(prompts, texts)])


def test_scores_go_to_other_responses_or_old_ones_stay():
    rows = [Ranking("ab", ["a", "aa", "a"], [9, 9, 9], [*"xyz"], [True, False, True]), Ranking("c", ["b"], []), MIXED]
    assert common.scored(rows, letters) == [rows[0]._replace(scores=[1, 2, 1]), Ranking("c", ["b"], [100]),
                                            MIXED._replace(scores=[1, 0])]                     # equal samples all count


def test_score_of_nan_ranks_or_another_prompt_is_named():
    rows = [Ranking("ab", ["a", "a", "b"], []), Ranking("culprit", ["c", "d"], []), Ranking("e", ["f"], [])]
    with pytest.raises(UserError, match="step 3: the reward is nan for the prompt 'culprit'"):
        common.scored(rows, lambda prompts, texts: torch.tensor([math.nan if text == "d" else 1.0 for text in texts]), 3)


def ranked_task():
    rows = [Ranking("ab", ["strong a", "weak a"], [2.0, 1.0], ["strong", "weak"]), Ranking("c", ["weak c"], [0.0], ["weak"]),
            Ranking("def", ["x", "y", "x"], [3.0, 4.0, 5.0]), Ranking("g", ["strong g"], [7.0], ["strong"])]
    return Task("toy", {"train": ["ab", "c", "def"], "test": ["g"]}, rankings={"train": rows, "test": rows})


@pytest.mark.parametrize("systems, want", [
    ("", [("ab", ["strong a", "weak a"], [2, 1]), ("c", ["weak c"], [0]), ("def", ["x", "y", "x"], [3, 4, 5])]),
    ("weak", [("ab", ["weak a"], [1]), ("c", ["weak c"], [0]), ("def", ["x", "y", "x"], [3, 4, 5])]),
    ("strong,nobody", [("ab", ["strong a"], [2]), ("def", ["x", "y", "x"], [3, 4, 5])])])
def test_given_answers_are_of_other_writers_or_to_test_prompts(systems, want):
    for sources in ("P", "DP"):
        rows = common.given_answers(ranked_task(), sources, systems)
        assert [(row.prompt, row.responses, row.scores) for row in rows] == want
        assert all(row.ended == [True] * len(row.responses) for row in rows)
    assert common.given_answers(ranked_task(), "D", systems) == []


def test_data_without_answers_or_without_such_a_writer_trains_on_nothing():
    task = ranked_task()
    task.rankings = {"train": task.rankings["train"][:2]}
    with pytest.raises(UserError, match="no answers of its own by nobody to rank .*strong, weak.*--sources D"):
        common.given_answers(task, "P", "nobody")
    with pytest.raises(UserError, match="the data has no answers of its own to rank"):
        common.given_answers(Task("toy", {"train": ["a"], "test": ["b"]}), "DP")


def test_candidates_are_out_of_order_or_without_the_given_ones(toy, monkeypatch, capsys):
    run = pool_run(toy, monkeypatch)
    given = [Ranking("c", ["given a", "pool 3"], [5.0, 6.0], ended=[True, True]), Ranking("ab", ["aa"], [7.0], ended=[True])]
    assert common.candidates(run, letters, given, 2) == [
        Ranking("c", ["pool 3", "pool 4", "given a"], [100, 100, 101], [], [True] * 3),
        Ranking("ab", ["pool 0", "pool 1", "aa"], [0, 0, 2], [], [True] * 3)]
    assert capsys.readouterr().err == ""
    assert common.candidates(run, letters, given, 0)[0] == Ranking("c", ["given a", "pool 3"], [101, 100], [], [True] * 2)
    assert common.candidates(run, None, given, 0) == [row._replace(systems=[]) for row in given]
    run.step = 1                                                          # samples anew: the first and every third are cut off
    assert [row.prompt for row in common.candidates(run, letters, [], 2)] == run.task.prompts["train"]
    row = common.candidates(run, letters, given, 2)[0]
    assert row.responses == ["c 0", "c 1", "given a", "pool 3"] and row.ended == [False, True, True, True]


def test_rankings_without_an_order_are_not_counted_or_are_left_out(toy, monkeypatch, capsys):
    run = pool_run(toy, monkeypatch)
    texts = [("a", [1]), ("bb", [1, 2]), ("cd", [1, 1]), ("efg", [3, 3, 3]), ("hi", [1, 2]), ("jk", [4, 4])]
    given = [Ranking("ab", [*responses], scores) for responses, scores in texts]
    assert len(common.candidates(run, None, given, 0)) == 6
    printed = capsys.readouterr()
    line, = printed.err.splitlines()
    assert "of 6 rankings, 2 have one response only and 3 have equal scores" in line and not printed.out


# ---------------------------------------------------------------------------------- options, labels, checkpoints, evaluation

CHOICES = [(cls, f.name, get_args(f.type)) for cls in (Config, dpo.Config, pro.Config, raft.Config, rrhf.Config, rso.Config)
           for f in fields(cls) if get_origin(f.type) is Literal and (cls is Config or not hasattr(Config, f.name))]


@pytest.mark.parametrize("cls, name, choices", CHOICES, ids=[f"{cls.__module__} {name}" for cls, name, _ in CHOICES])
def test_option_outside_its_choices_is_taken(cls, name, choices):
    with pytest.raises(UserError, match=f"--{name} must be one of .*{choices[-1]}, not nonsense"):
        cls(**{name: "nonsense"})
    assert getattr(cls(**{name: choices[0]}), name) == choices[0]


@pytest.mark.parametrize("share", [-0.1, 0.5, 1.0, math.nan])
def test_labels_are_more_wrong_than_right(share):
    with pytest.raises(UserError, match="--label_noise must be in"):
        Config(label_noise=share)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_label_noise_turns_another_share_round_or_loses_the_text(share):
    pairs = [Pair(f"p{i}", f"good {i}", f"bad {i}") for i in range(4000)]
    noisy = build.with_noise(pairs, Config(label_noise=share))
    turned = [new != old for new, old in zip(noisy, pairs, strict=True)]
    assert sum(turned) / 4000 == pytest.approx(share, abs=0.03) and (share or not any(turned))
    assert all(not turn or new == Pair(old.prompt, old.rejected, old.chosen) for new, old, turn in zip(noisy, pairs, turned))
    assert build.with_noise(pairs, Config(label_noise=share)) == noisy
    assert not share or build.with_noise(pairs, Config(label_noise=share, seed=1)) != noisy


def test_noisy_proxy_is_the_clean_one_or_sees_other_labels_than_the_method(tmp_path, monkeypatch):
    """Without models: their directory holds samples alone, and what would be trained is caught."""
    prompt, rng, trained = reviews.make_prompts("train", 1, 0)[0], random.Random(0), {}
    texts = sorted((reviews.write("crowd", prompt, rng) for _ in range(20)), key=lambda text: reviews.gold(prompt, text))
    row = {"prompt": prompt, "responses": texts[-4:], "gold": [0.0, 1.0, 0.5, 2.0]}
    (tmp_path / "samples.json").write_text(json.dumps(dict.fromkeys(("pool", "shown", "test"), [row] * 50)))
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    monkeypatch.setattr(build, "RANKED", 2)
    monkeypatch.setattr(build, "rate", lambda path, pairs, pool, config: trained.update({path.name: pairs}))
    clean, noisy = build.load_task(Config()), build.load_task(Config(label_noise=0.25))
    assert build.reward_models(Config()) == {"proxy": tmp_path / "proxy", "judge": tmp_path / "judge"} and not trained
    paths = build.reward_models(Config(label_noise=0.25))
    assert paths["judge"] == tmp_path / "judge" and trained == {paths["proxy"].name: noisy.pairs["train"]}
    assert paths["proxy"] not in (tmp_path / "proxy", *build.reward_models(Config(label_noise=0.2)).values())
    assert clean.pairs["train"] != noisy.pairs["train"] and clean.pairs["test"] == noisy.pairs["test"]
    right, noisy_right = (sum(task.annotate(prompt, texts[-1], texts[0], rng) for _ in range(2000)) / 2000
                          for task in (clean, noisy))
    assert right > 0.7 and noisy_right == pytest.approx(0.75 * right + 0.25 * (1 - right), abs=0.04)


def test_AF_rows_of_a_state_become_plain_tuples_or_do_not_load(toy, tmp_path):
    pool = [MIXED, Ranking("c", ("w", "l"), (1.0, 0.0), ended=(True, False))]
    run = started(toy, out=tmp_path, step=3)
    run.state = {"pool": pool, "labels": [GOOD, BAD], "rewards": [0.5, 1.0], "rater": {"weight": torch.ones(2)}}
    common.checkpoint_run(run)
    again = started(toy, out=tmp_path)
    common.restore(again)
    assert again.step == 3 and again.state["pool"] == pool and again.state["labels"] == [GOOD, BAD]
    assert [type(row) for row in again.state["pool"] + again.state["labels"]] == [Ranking, Ranking, Pair, Pair]
    assert again.state["rewards"] == [0.5, 1.0] and torch.equal(again.state["rater"]["weight"], torch.ones(2))


@dataclass
class Stranger:
    value: int = 1


def test_checkpoint_runs_code_when_it_is_loaded(toy, tmp_path):
    run = started(toy, out=tmp_path)
    run.state = {"pool": [Stranger()]}
    common.checkpoint_run(run)
    with pytest.raises(pickle.UnpicklingError, match="Stranger"):
        common.restore(run)


@pytest.mark.parametrize("gold, names", [(None, {"": "proxy", "_judge": "judge"}),
                                         (lambda *row: float(len(row[1])), {"": "gold", "_proxy": "proxy", "_judge": "judge"})])
def test_win_rate_is_by_another_reward_or_missing_for_the_others(toy, gold, names):
    run = started(toy, Task("toy", {"train": ["ab"], "test": ["g", "hh"]}, gold=gold))
    rewards = {"proxy": letters, "judge": lambda prompts, texts: torch.tensor([float(text.count("b")) for text in texts])}
    args = run.config, run.task, run.policy, run.tokenizer, rewards
    start, samples = common.evaluate(*args)
    assert not [name for name in start if "win_rate" in name]
    shift = {"gold": [-1] * 6, "proxy": [1] * 6, "judge": [0, 0, 0, 0, 0, -1]}               # what start had more
    before = samples | {name: [a + b for a, b in zip(samples[name], shift[name])] for name in names.values()}
    metrics, _ = common.evaluate(*args, before)
    want = {"gold": 1.0, "proxy": 0.0, "judge": (5 * 0.5 + 1) / 6}
    assert {name for name in metrics if "win_rate" in name and not name.endswith("_se")} == {f"eval/win_rate{n}" for n in names}
    assert all(metrics[f"eval/win_rate{suffix}"] == pytest.approx(want[name]) for suffix, name in names.items())
