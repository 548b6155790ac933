"""decision_transformer.py: weights, levels, tags, objectives, asking. Letters are bug classes."""
import itertools
import json
import math
import random
import re
import statistics
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import decision_transformer as dt
import harness
from common import UserError
from conftest import Counting, cases, close, killed_after, parameters, rand, sgd, tensor
from decision_transformer import Sample, assign_bins, effective_share, reward_bins, rwr_weights, tag
from harness import asking, conditioning
from harness.conditioning import spearman
from tasks import Demonstration, Ranking, Task, write_json


# ----------------------------------------------------------------------------------------- weights of a batch

def test_weights_of_rwr_or_their_loss_differ_from_a_fixture():
    found = [case for case in cases("rwr") if case["inputs"]["kind"] == "rwr"]
    assert len(found) > 1
    for case in found:
        given, expected = case["inputs"], case["expected"]
        nll, rewards = -tensor(given["sequence_logp_sum"]), tensor(given["rewards"])
        weights = rwr_weights(rewards, given["beta"])
        close(weights, expected["weights_softmax"])
        close((weights * nll).sum(), expected["loss_softmax_sum"])
        config = SimpleNamespace(objective="rwr", beta=given["beta"], epochs=1, batch_size=len(nll), seed=0)
        samples = [Sample(str(i), ["a"], [True], reward) for i, reward in enumerate(given["rewards"])]
        (rows,) = dt.plan_of(config, samples, None)
        assert statistics.fmean(row.weight * nll[int(row.prompt)].item() for row in rows) == pytest.approx(
            expected["loss_softmax_sum"], rel=1e-5)        # what the loop makes of it: the mean over the rows


def test_weights_of_rwr_do_not_sum_to_one_or_feel_a_shift_or_overflow_or_beta_is_upside_down():
    rewards = 4 * rand(6) - 2
    for beta in (0.05, 1.0, 30.0):
        weights = rwr_weights(rewards, beta)
        close(weights.sum(), 1.0)
        close(rwr_weights(rewards + 17.0, beta), weights)
        close((weights[1:] / weights[0]).log(), (rewards[1:] - rewards[0]) / beta, 1e-7)
    best = torch.nn.functional.one_hot(rewards.argmax(), 6).double()
    close(rwr_weights(rewards, 1e-4), best)
    close(rwr_weights(rewards, 1e6), [1 / 6] * 6, 1e-5)
    close(rwr_weights(tensor([1e3, -1e3, 1e3]), 0.1), [0.5, 0, 0.5])
    assert rwr_weights(torch.tensor([-1e3, -1e3]), 0.1).tolist() == [0.5, 0.5]


def test_effective_share_differs_from_hand_values():
    close(effective_share(tensor([3, 3, 3, 3, 3])), 1.0)
    close(effective_share(tensor([0, 7, 0, 0])), 1 / 4)
    close(effective_share(tensor([1, 1, 0, 0])), 1 / 2)
    close(effective_share(tensor([3, 1])), 16 / 20)
    close(effective_share(tensor([2])), 1.0)


# ----------------------------------------------------------------------------------------------------- levels

def counts_of(rewards, edges):
    counts = Counter(assign_bins(rewards, edges).tolist())
    assert sorted(counts) == list(range(len(edges) + 1))            # none is empty
    return [counts[level] for level in sorted(counts)]


def test_bins_of_distinct_rewards_hold_unequal_numbers():
    for n, bins in itertools.product((10, 20, 23, 25, 37, 1000), (2, 3, 10)):
        rewards = (rand(n, seed=n) - 0.5) ** 3                      # far from evenly spread
        edges = reward_bins(rewards, bins)
        assert edges.shape == (bins - 1,) and edges.tolist() == sorted(edges.tolist())
        assert set(counts_of(rewards, edges)) <= {n // bins, -(-n // bins)}
    assert reward_bins([4, 1, 2, 8], 4).tolist() == [1.5, 3,
                                                     6] and reward_bins([4, 1, 8], 10).tolist() == [2.5, 6]


def test_ties_leave_a_bin_empty_or_are_split_or_an_edge_is_not_the_nearest_that_ties_allow():
    rng = random.Random(0)
    for _ in range(300):
        rewards, n = [rng.choice([0, 0, 0, 1, 2, 3, 7])
                      for _ in range(rng.randint(2, 30))], rng.randint(2, 12)
        values = sorted(set(rewards))
        if len(values) < 2:
            continue
        edges = reward_bins(rewards, n).tolist()
        assert 1 <= len(edges) <= n - 1 and edges == sorted(set(edges))
        assert set(edges) <= {(a + b) / 2 for a, b in zip(values, values[1:])}
        counts_of(rewards, tensor(edges))
        below = {(a + b) / 2: Fraction(sum(r <= a for r in rewards), len(rewards)) for a,
                 b in zip(values, values[1:])}
        nearest = [min(abs(share - Fraction(i, n)) for share in below.values()) for i in range(1, n)]
        for i, distance in enumerate(nearest, 1):
            assert min(abs(below[edge] - Fraction(i, n)) for edge in edges) == distance
        assert all(any(abs(below[edge] - Fraction(i, n)) == nearest[i - 1] for i in range(1, n))
                   for edge in edges)
    for rewards in ([0, 1, 1, 1], [0, 0, 0, 1]):
        assert reward_bins(rewards, 10).tolist() == [0.5]
    for equal in ([3, 3, 3], [0.1]):
        with pytest.raises(UserError, match="rewards are (3|0.1): .* nothing to ask for"):
            reward_bins(equal, 10)


def test_rewards_beyond_the_edges_or_on_one_or_the_mean_of_a_level_are_in_the_wrong_bin():
    edges = tensor([-1, 0.5, 2])
    assert assign_bins([-1e9, -1.01, -0.99, 0.49, 0.51, 1.99, 2.01, 1e9, math.inf],
                       edges).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    rng = random.Random(1)
    for _ in range(100):
        rewards = [rng.choice([rng.gauss(0, 1), -1.0, 0.25]) for _ in range(40)]
        levels = dt.levels_of(SimpleNamespace(bins=rng.randint(2, 12), control="tokens"), samples_of(rewards))
        groups = [[r for r in rewards if sum(r > edge for edge in levels["edges"]) == i]
                  for i in range(len(levels["means"]))]
        assert levels["means"] == pytest.approx([statistics.fmean(group) for group in groups])
        assert assign_bins(levels["means"],
                           tensor(levels["edges"])).tolist() == list(range(len(levels["means"])))
        assert levels["control"] == "tokens" and json.loads(json.dumps(levels)) == levels


def attributes_of(out):
    """attributes.json of a run."""
    return json.loads((out / "attributes.json").read_text(encoding="utf-8"))


def samples_of(rewards):
    return [Sample(f"p{i}", ["a"], [True], reward) for i, reward in enumerate(rewards)]


# -------------------------------------------------------------------------------------------- offline samples

PROMPTS = ["ab", "h", "cdefg", "gg", "b", "ef", "abc", "hd"]


def letters(prompts, responses):
    """A reward model without a model: every letter counts, earlier ones more."""
    return torch.tensor([sum((ord(c) - ord("a")) * 10 ** -i for i, c in enumerate(text))
                         for text in responses])


def number_of_a(prompts, responses):
    return torch.tensor([float(text.count("a")) for text in responses])


# have a scale of their own
letters.model = number_of_a.model = SimpleNamespace(config=SimpleNamespace(reward_scale={}))


def settings(toy, **kwargs):
    return dt.Config(**{**dict(model=str(toy), data="toy.jsonl", max_length=64, max_new_tokens=4, lr=1e-2,
                               batch_size=4,
                               epochs=1.0, candidates=3, sources="D", control="tokens", bins=4,
                               validation=0.25, eval_prompts=2,
                               eval_samples=1, save_every=0, device="cpu", quiet=True), **kwargs})


def task(**kwargs):
    return Task("toy", {"train": PROMPTS, "test": ["d", "ee"]}, **kwargs)


def begun(toy, out, data=None, reward=letters, **kwargs):
    config = settings(toy, **kwargs)
    out.mkdir()
    torch.manual_seed(config.seed)
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    return harness.Run(config, out, data or task(), tokenizer, policy, {"proxy": reward})


def own(scores, **kwargs):
    """A run with answers and scores of the data alone: {prompt: scores}."""
    rows = [Ranking(p, ["abcdefgh"[i] for i in range(len(row))], row, (), [True] * len(row)) for p,
            row in scores.items()]
    config = SimpleNamespace(**{**dict(sources="P", systems="", validation=0.25, seed=0, candidates=0, bins=4,
                                       control="tokens", share=0.5, beta=0.1, objective="dt", resume=False),
                                **kwargs})
    return SimpleNamespace(config=config, task=Task("own", {"train": list(scores), "test": []},
                                                    rankings={"train": rows}), step=0)


def drawn(seed, prompts=16, k=6):
    rng = random.Random(seed)
    return {f"p{i}": [rng.gauss(3, 2) for _ in range(k)] for i in range(prompts)}


def test_rewards_are_not_normalised_over_what_is_trained_on_or_differ_from_a_fixture():
    rewards = [sample.reward for sample in dt.offline_samples(own(drawn(0)), None)[0]]
    assert (statistics.fmean(rewards), statistics.pstdev(rewards)) == pytest.approx((0, 1), abs=1e-12)
    found = [case for case in cases("rwr") if case["inputs"]["kind"] == "reward_normalization"]
    for case in found:
        scores, expected = case["inputs"]["rewards"], case["expected"]["normalized"]
        samples, _ = dt.offline_samples(own({"p": scores}, validation=0.0), None)
        unbiased = math.sqrt(len(scores) / (len(scores) - 1))  # OpenRLHF divides by the deviation of a sample
        assert [sample.reward for sample in samples] == pytest.approx([unbiased * r for r in expected],
                                                                      abs=1e-9)
    assert found


def test_rewards_are_compared_within_a_prompt():
    scores = drawn(1)
    shifted = {prompt: [score + 5 * i for score in row] for i, (prompt, row) in enumerate(scores.items())}
    before, after = (dt.offline_samples(own(rows), None)[0] for rows in (scores, shifted))
    assert [s.prompt for s in before] == [s.prompt for s in after]
    for samples, rows in ((before, scores), (after, shifted)):
        raw = tensor([rows[s.prompt]["abcdefgh".index(s.responses[0])] for s in samples])
        close(tensor([s.reward for s in samples]), (raw - raw.mean()) / raw.std(correction=0))
    means = [statistics.fmean(s.reward for s in after if s.prompt == prompt)
             for prompt in {s.prompt for s in after}]
    assert len(means) == 12 and max(means) - min(means) > 1


def test_validation_prompts_are_trained_on_or_have_the_wrong_share_or_are_the_same_under_two_seeds():
    scores, sets = drawn(2, prompts=40), []
    for seed, share in ((0, 0.25), (1, 0.25), (0, 0.1), (0, 0.0)):
        samples, apart = dt.offline_samples(own(scores, seed=seed, validation=share), None)
        trained = {sample.prompt for sample in samples}
        assert len(apart) == len(set(apart)) == 40 * share and trained == set(scores) - set(apart)
        assert Counter(sample.prompt for sample in samples) == dict.fromkeys(trained, 6)
        assert all(sample.responses[0] in "abcdef" and sample.ended == [True] and sample.weight == 1.0
                   for sample in samples)
        sets.append(set(apart))
    assert sets[0] != sets[1] and sets[0] == set(dt.offline_samples(own(dict(reversed(scores.items()))),
                                                                    None)[1])


def test_rewards_of_validation_prompts_move_the_edges_or_the_normalisation():
    scores, rng = drawn(3), random.Random(0)
    run = own(scores)
    samples, apart = dt.offline_samples(run, None)
    levels = dt.levels_of(run.config, samples)
    assert apart and len(levels["edges"]) == 3
    other = own({p: [1e3 * rng.random() for _ in row] if p in apart else row for p, row in scores.items()})
    assert dt.offline_samples(other, None) == (samples, apart)
    assert dt.levels_of(other.config, dt.offline_samples(other, None)[0]) == levels
    seen = own({p: row if p in apart else [3 * r for r in row[:3]] + row[3:] for p, row in scores.items()})
    assert dt.levels_of(seen.config, dt.offline_samples(seen, None)[0]) != levels


@pytest.mark.parametrize("objective", ["dt", "filter", "rwr", "sft"])
def test_equal_rewards_pass(objective):
    run = own({"p": [2.0, 2.0], "q": [2.0] * 3}, objective=objective, validation=0.0)
    with pytest.raises(UserError, match="nothing to ask for"):
        dt.offline_samples(run, None)


def test_sources_mix_up_texts_scores_and_ends(toy, tmp_path, monkeypatch):
    given = {p: Ranking(p, ["hhh", "a"], [9.0, -9.0], ["w", "v"], [True, True]) for p in PROMPTS[:6]}
    data, sampled = task(rankings={"train": list(given.values())}), []
    sample = harness.sample_rankings

    def sample_and_note(run, prompts, n):
        sampled.append(sample(run, prompts, n))
        return sampled[-1]

    monkeypatch.setattr(harness.samples, "sample_rankings", sample_and_note)
    for sources, wanted in (("D", PROMPTS), ("DP", PROMPTS[:6]), ("P", PROMPTS[:6])):
        run = begun(toy, tmp_path / sources, data, sources=sources, validation=0.0, candidates=4)
        samples, _ = dt.offline_samples(run, letters)
        found = {(s.prompt, s.responses[0], s.ended[0]) for s in samples}
        expected = {(p, text, True) for p in wanted
                    for text in given[p].responses} if "P" in sources else set()
        if "D" in sources:
            texts = {(row.prompt, text): ended for row in sampled.pop()
                     for text, ended in reversed([*zip(row.responses, row.ended)])}
            expected |= {(*key, ended) for key,
                         ended in texts.items() if (key[0], key[1], True) not in expected}
            assert set(texts.values()) == {True, False}
        assert not sampled and {(p, text) for p, text, _ in found} == {(p, text) for p, text, _ in expected}
        assert sources == "DP" or found == expected
        raw = letters(None, [s.responses[0] for s in samples]).double()
        close(tensor([s.reward for s in samples]), (raw - raw.mean()) / raw.std(correction=0), 1e-9)


DEMONSTRATIONS = [Demonstration(prompt, text) for text in ("abc", "hd", "g", "bbbb") for prompt in PROMPTS]


def test_demonstrations_are_scored_by_another_reward_or_others_than_the_first_are_taken(toy, tmp_path):
    data = task(demonstrations={"train": DEMONSTRATIONS, "test": DEMONSTRATIONS[:1]})
    reward = Counting(letters)
    run = begun(toy, tmp_path / "run", data, sources="S", demonstrations=20, validation=0.25)
    samples, apart = dt.offline_samples(run, reward)
    assert len(apart) == 2 and len(samples) == 20 - sum(row.prompt in apart for row in DEMONSTRATIONS[:20])
    assert [(s.prompt, *s.responses) for s in samples] == [row[:2] for row in DEMONSTRATIONS[:20]
                                                           if row.prompt not in apart]
    assert all(s.ended == [True] and s.weight == 1 for s in samples)
    raw = letters(None, [s.responses[0] for s in samples]).double()
    close(tensor([s.reward for s in samples]), (raw - raw.mean()) / raw.std(correction=0), 1e-9)
    assert run.counts["tokens_generated"] == 0               # nobody sampled, all of them were scored
    read = sum(len(row.prompt) + len(row.response) + 1 for row in DEMONSTRATIONS[:20])
    assert run.counts["tokens_scored_reward"] == reward.tokens == read
    more = begun(toy, tmp_path / "more", data, sources="S", demonstrations=99, validation=0.0)
    assert len(dt.offline_samples(more, reward)[0]) == 32                        # no more than there are
    with pytest.raises(UserError, match="the data has no demonstrations"):
        dt.offline_samples(begun(toy, tmp_path / "none", sources="S"), reward)


# ------------------------------------------------------------------------------------------------------- tags

def levels(control="tokens", edges=(-0.5, 0.75), means=(-1.2, 0.0, 1.44)):
    return {"edges": list(edges), "means": list(means), "control": control}


def test_tag_has_two_spellings_or_the_wrong_level():
    assert [tag(levels(), r) for r in (-7, -0.51, -0.49, 0.0, -0.0, 0.74, 0.76, 9.9)] == [
        "<reward:0>", "<reward:0>", *["<reward:1>"] * 4, "<reward:2>", "<reward:2>"]
    assert [tag(levels("text"), r) for r in (-1.26, 0.0, -0.0, -0.04, 0.04, 0.96, 12, -10.0)] == [
        "<reward:-1.3>", *["<reward:0.0>"] * 4, "<reward:1.0>", "<reward:12.0>", "<reward:-10.0>"]


def tied(toy, path):
    """The toy with one matrix for input and output."""
    AutoTokenizer.from_pretrained(toy).save_pretrained(path)
    torch.manual_seed(1)
    settings = LlamaConfig.from_pretrained(toy)
    settings.tie_word_embeddings = True
    LlamaForCausalLM(settings).save_pretrained(path)
    return path


def logits(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, attention_mask=batch.attention_mask,
                     position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0)).logits.double()


@pytest.mark.parametrize("tie", [False, True])
def test_tags_change_plain_text_or_are_lost_on_disk_or_learned_twice(tie, toy, tmp_path):
    run = begun(tied(toy, tmp_path / "tied") if tie else toy, tmp_path / "run", validation=0.0)
    samples, _ = dt.offline_samples(run, letters)
    known, tags = dt.levels_of(run.config, samples), [f"<reward:{level}>" for level in range(4)]
    batch = common.encode(run.tokenizer, PROMPTS, ["abc", "d", "", "efgh", "ha", "b", "cc", "gfe"])
    before, logps = logits(run.policy, batch), common.token_logps(run.policy, batch).detach()
    dt.learn_tags(run, known, samples)
    after, again = logits(run.policy, batch), common.token_logps(run.policy, batch).detach()
    close(after[..., :9], before, 1e-5)
    assert after.shape[-1] == 9 + 4 == len(run.tokenizer)
    news = after[:, :-1].softmax(-1)[..., 9:].sum(-1)               # what the new tokens take away
    assert 0 < news.min()
    close(again.double(), (logps.double() + (1 - news).log()) * batch.response_mask[:, 1:], 1e-4)
    if not tie:
        # no likelier than an average token
        close(after[..., 9:], before.mean(-1, keepdim=True).expand(-1, -1, 4), 1e-4)
    assert run.tokenizer(tags, add_special_tokens=False).input_ids == [[9], [10], [11], [12]]
    rows = run.policy.get_input_embeddings().weight[9:]
    assert rows.isfinite().all() and len({tuple(row.tolist()) for row in rows}) == 4

    asked = common.encode(run.tokenizer, ["ab" + tag for tag in tags], ["cd", "h", "a", "fff"])
    assert [row[mask.bool()].tolist()[-1] for row,
            mask in zip(asked.input_ids, asked.attention_mask - asked.response_mask)] == [
9, 10, 11, 12]
    values = common.sequence_logps(run.policy, asked).detach()
    assert len({round(value, 4) for value in values.tolist()}) == 4
    weights = parameters(run.policy)
    dt.learn_tags(run, known, samples)
    assert len(run.tokenizer) == 13 and torch.equal(parameters(run.policy), weights)
    run.policy.save_pretrained(tmp_path / "saved")
    run.tokenizer.save_pretrained(tmp_path / "saved")
    config = replace(run.config, policy=str(tmp_path / "saved"))
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    assert tokenizer(tags, add_special_tokens=False).input_ids == [[9], [10], [11], [12]]
    reread = common.encode(tokenizer, ["ab" + tag for tag in tags], ["cd", "h", "a", "fff"])
    assert torch.equal(reread.input_ids, asked.input_ids)
    close(common.sequence_logps(policy, reread).detach(), values, 1e-6)


def test_tags_are_named_after_other_levels_responses(toy, tmp_path, monkeypatch):
    run, seen = begun(toy, tmp_path / "run"), []
    monkeypatch.setattr(harness, "add_tags", lambda run, attributes: seen.append(attributes))
    samples = [Sample("p", [text], [True], reward) for text,
               reward in zip("abcdef", (-2.0, -1.0, 0.0, 0.1, 1.5, -0.6))]
    dt.learn_tags(run, levels(), samples)
    assert seen == [{"reward": {"<reward:0>": ["a", "b", "f"], "<reward:1>": ["c", "d"],
                                "<reward:2>": ["e"]}}]


def test_text_tags_have_unknown_characters_or_a_tokenizer_that_knows_them_is_changed(toy, tmp_path):
    for known, grown in ((["."], 13), (list("<reward:>-.0123456789"), 0)):
        words = {token: i for i, token in enumerate(dict.fromkeys(["<eos>", "<unk>", *"abcdefgh", *known]))}
        core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        run = begun(toy, tmp_path / str(grown), control="text")
        run.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                                                unk_token="<unk>")
        size = len(run.tokenizer)
        run.policy.resize_token_embeddings(size)
        dt.learn_tags(run, levels("text"), samples_of([-1.2, 0.0, 1.44]))
        assert len(run.tokenizer) == size + grown == run.policy.get_input_embeddings().num_embeddings
        spelled = {}
        for tenths in range(-129, 130):
            text = tag(levels("text"), tenths / 10)
            ids = run.tokenizer("ab" + text, add_special_tokens=False).input_ids
            assert run.tokenizer.unk_token_id not in ids
            spelled[tuple(ids)] = text
        assert len(spelled) == 259                                  # every value reads differently


# ----------------------------------------------------------------------------------------- plans and training

def test_plans_lose_the_best_or_tag_or_weigh_what_is_not_conditioned(toy):
    rng = random.Random(0)
    samples = [Sample(f"p{i}", ["a"], [True], rng.gauss(0, 1)) for i in range(18)]
    config, known = settings(toy, epochs=2.0, share=0.3), levels()

    def rows(objective, **kwargs):
        plan = dt.plan_of(replace(config, objective=objective, **kwargs), samples, known)
        assert [len(step) for step in plan[:-1]] == [4] * (len(plan) - 1)
        return plan, sorted(sum(plan, []))

    assert rows("sft")[1] == sorted(samples * 2)
    best = sorted(samples, key=lambda sample: sample.reward)[-5:]   # round(0.3 * 18)
    assert rows("filter")[1] == sorted(best * 2)
    assert rows("filter", share=1e-9)[1] == [best[-1]] * 2 and rows("filter",
                                                                    share=1.0)[1] == sorted(samples * 2)
    tagged = [s._replace(prompt=f"{s.prompt}<reward:{(s.reward > -0.5) + (s.reward > 0.75)}>")
              for s in samples]
    assert rows("dt")[1] == sorted(tagged * 2) and len({s.prompt[-3:] for s in tagged}) == 3
    plan, flat = rows("rwr", beta=0.7)
    assert sorted(row._replace(weight=1.0) for row in flat) == sorted(samples * 2)
    for step in plan:
        powers = [math.exp(row.reward / 0.7) for row in step]
        assert [row.weight for row in step] == pytest.approx([len(step) * p / sum(powers) for p in powers],
                                                             rel=1e-5)
        assert statistics.fmean(row.weight for row in step) == pytest.approx(1, abs=1e-6)


def stepped(run, monkeypatch, samples, known):
    """The rows that dt.train has log-probs of, step by step, when these are the samples and levels."""
    seen, microbatches = [], run.microbatches
    with monkeypatch.context() as patch:
        patch.setattr(dt, "offline_samples", lambda run, reward: (samples, []))
        patch.setattr(dt, "levels_of", lambda config, samples: known)
        # once a step
        patch.setattr(run, "microbatches", lambda rows: microbatches(seen.append(rows) or rows))
        dt.train(run)
    return seen


MIXED = [Sample("ab", ["cd"], [True], -1.5), Sample("ab", ["ha"], [False], 0.1),
         Sample("h", ["b"], [True], 1.3),
         Sample("cdefg", ["aaa"], [True], 0.3), Sample("gg", [""], [True], -0.7),
         Sample("b", ["hhhh"], [False], 0.9)]


@pytest.mark.parametrize("budget", [24, 100000])
@pytest.mark.parametrize("objective", ["dt", "filter", "rwr", "sft"])
def test_L_one_step_is_not_the_weighted_gradient_by_hand(objective, budget, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    run = begun(toy, tmp_path / "run", objective=objective, batch_size=6, share=0.5, beta=0.8,
                token_budget=budget,
                max_grad_norm=1e9)
    known, plain = levels(), begun(toy, tmp_path / "plain")
    (rows,) = stepped(run, monkeypatch, MIXED, known)
    assert len(rows) == (3 if objective == "filter" else 6)
    chosen, ends = MIXED, [""] * 6
    if objective == "filter":
        chosen = [MIXED[i] for i in (2, 5, 3)]
    weights = [1 / len(chosen)] * len(chosen)
    if objective == "rwr":
        powers = [math.exp(sample.reward / 0.8) for sample in MIXED]
        weights = [power / sum(powers) for power in powers]
    if objective == "dt":
        dt.learn_tags(plain, known, MIXED)
        ends = ["<reward:0>", "<reward:1>", "<reward:2>", "<reward:1>", "<reward:0>", "<reward:2>"]
    initial, loss = parameters(plain.policy), 0
    for sample, end, weight in zip(chosen, ends, weights):
        before = run.tokenizer(sample.prompt + end).input_ids
        # EOS unless it was cut off
        after = run.tokenizer(sample.responses[0]).input_ids + [0] * sample.ended[0]
        scores = plain.policy(torch.tensor([before + after])).logits[0].log_softmax(-1)
        loss -= weight * sum(scores[len(before) + i - 1, token] for i, token in enumerate(after))
    loss.backward()
    optimizer, _ = sgd(plain.policy, None, None)
    optimizer.step()
    assert (parameters(plain.policy) - initial).abs().max() > 1e-3
    assert (parameters(run.policy) - parameters(plain.policy)).abs().max() < 2e-6
    line = json.loads((run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("bound", [1e-2, 1e9])
def test_gradient_is_not_clipped_or_the_clipped_norm_is_logged(bound, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    run = begun(toy, tmp_path / "run", objective="sft", batch_size=6, max_grad_norm=bound)
    initial = parameters(run.policy)
    assert len(stepped(run, monkeypatch, MIXED, levels())) == 1
    line = json.loads((run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1])
    moved = (parameters(run.policy) - initial).norm().item()
    assert line["grad_norm"] > 0.1 and moved == pytest.approx(0.01 * min(bound, line["grad_norm"]), rel=1e-2)


def test_tag_is_in_the_loss_or_not_in_the_input(toy, tmp_path):
    run = begun(toy, tmp_path / "run")
    dt.learn_tags(run, levels(), MIXED)
    texts, ends = [row.responses[0] for row in MIXED], [row.ended[0] for row in MIXED]
    batch = common.encode(run.tokenizer, [row.prompt + tag(levels(), row.reward) for row in MIXED], texts,
                          ends)
    assert batch.lengths.tolist() == [3, 2, 2, 4, 1, 4]             # letters, and EOS where the text ended
    for row, ids, mask in zip(MIXED, batch.input_ids, batch.response_mask.bool()):
        assert ids[mask].tolist() == run.tokenizer(row.responses[0]).input_ids + [0] * row.ended[0]
        assert (ids >= 9).sum() == 1 and (ids[~mask] >= 9).sum() == 1
    other = common.encode(run.tokenizer, [row.prompt for row in MIXED], texts, ends)
    told, plain = (common.sequence_logps(run.policy, b) for b in (batch, other))
    assert (told - plain).abs().min() > 1e-4                        # it is read
    told.sum().backward()
    head = run.policy.get_output_embeddings().weight.grad
    everything = logits(run.policy, batch)[:, :-1].softmax(-1) * batch.response_mask[:, 1:, None]
    hidden = run.policy.model(batch.input_ids, attention_mask=batch.attention_mask,
                              position_ids=(batch.attention_mask.cumsum(1) - 1).clamp(min=0))[0][:, :-1]
    # never a target: pushed down alone
    expected = -torch.einsum("btv,btd->vd", everything[..., 9:], hidden.double())
    close(head[9:].double(), expected, 1e-4)
    assert run.policy.get_input_embeddings().weight.grad[9:].abs().max() > 0


# ------------------------------------------------------------------------------------------------ what to ask

def test_rank_correlation_differs_from_hand_values():
    assert spearman([1.0, 2.0, 10.0,
                     11.0]) == pytest.approx(1) and spearman([3.0, 0.0, -2.0]) == pytest.approx(-1)
    assert spearman([1.0, 3.0, 2.0]) == pytest.approx(0.5) and spearman([10.0, 30.0, 20.0,
                                                                         40.0]) == pytest.approx(0.8)
    assert spearman([3.0, 1.0, 4.0, 2.0]) == pytest.approx(0.0)
    rng = random.Random(0)
    for n in (2, 5, 10):
        values = [rng.gauss(0, 1) for _ in range(n)]
        ranks = [sorted(values).index(value) for value in values]
        expected = 1 - 6 * sum((i - rank) ** 2 for i, rank in enumerate(ranks)) / (n * (n * n - 1))
        assert spearman(values) == spearman([value ** 3 for value in values]) == pytest.approx(expected)
    assert spearman([2.0, 2.0, 2.0]) == 0
    assert spearman([1.0, 1.0, 2.0, 0.0]) == pytest.approx(-0.3162, abs=1e-4)        # ranks 2.5, 2.5, 4, 1


@pytest.mark.parametrize("control", ["tokens", "text"])
def test_calibration_asks_for_something_else_than_its_rows_say(control, toy, tmp_path, monkeypatch):
    run, asked, judged = begun(toy, tmp_path / "run", control=control), [], []
    known = levels(control)

    def probe(run, prompts):
        asked.append(prompts)
        return [f"{'ab' * len(asked)} c", "d"], torch.tensor([True, False])

    def gold(prompt, text, ended):
        judged.append((prompt, text, ended))
        return len(text) + ended

    monkeypatch.setattr(conditioning, "probe", probe)
    run.task.gold = gold
    rows = dt.calibration(run, known, [-1.2, 0.0, 1.44, 3.0], ["d", "ee"], letters)
    tags = ["<reward:0>", "<reward:1>", "<reward:2>", "<reward:2>"]
    if control == "text":
        tags = ["<reward:-1.2>", "<reward:0.0>", "<reward:1.4>", "<reward:3.0>"]
    assert asked == [["d" + end, "ee" + end] for end in tags]
    assert [row["asked"] for row in rows] == [-1.2, 0.0, 1.44,
                                              3.0] and {row["words"] for row in rows} == {1.5}
    assert [row["gold"] for row in rows] == [(2 * i + 2 + 1 + 1) / 2 for i in (1, 2, 3, 4)]
    assert judged[:2] == [("d", "ab c", True), ("ee", "d", False)]  # the reward never sees a tag
    for i, row in enumerate(rows, 1):
        assert row["reward"] == pytest.approx(letters(None, ["ab" * i + " c", "d"]).mean().item())
    run.task.gold = None
    assert set(dt.calibration(run, known, [0.0], ["d", "ee"], None)[0]) == {"asked", "words"}

    run.trace, run.state, asked[:] = [{}], {"level": 1}, []
    run.task.gold = lambda prompt, text, ended: float(len(asked)) ** 2
    metrics = dt.calibration_metrics(run, known, letters)
    beyond = ["<reward:1.9>", "<reward:2.4>", "<reward:3.4>", "<reward:4.4>"] if control == "text" else []
    assert asked == [["d" + end, "ee" + end] for end in tags[:3] + beyond]
    close(tensor(metrics["eval/slope_gold"]), sum(x * y for x, y in zip((-1.28, -0.08, 1.36), (1, 4, 9))) / (
        1.28 ** 2 + 0.08 ** 2 + 1.36 ** 2), 1e-9)                   # of the levels alone
    assert metrics["eval/spearman_gold"] == pytest.approx(1) and metrics["eval/level"] == 1
    assert metrics.get("eval/gold_beyond") == (49 - 9 if beyond else None)
    assert run.state["calibration"][0]["asked"] == -1.2 and len(run.state["calibration"]) == 3 + len(beyond)


def rank_correlation(pairs):
    """Spearman's, equal values sharing the mean of their ranks; 0 where one side never varies."""
    def ranks(values):
        return tensor([sum(other < value for other in values) + sum(other == value for other in values) / 2
                       for value in values])

    a, b = (ranks(side) - len(pairs) / 2 for side in zip(*pairs))
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-12)).item()


@pytest.mark.parametrize("control", ["tokens", "text"])
def test_AB_what_is_asked_for_does_not_come(control, whole):
    rng, prompts = random.Random(0), ["".join(p) for p in itertools.product("bcdefgh", repeat=2)]
    rng.shuffle(prompts)

    def text():
        return "".join(rng.sample("a" * (n := rng.randint(0, 4)) + "".join(rng.choices("bcdefgh", k=4 - n)),
                                  4))

    pool = {prompt: Ranking(prompt, [text() for _ in range(8)], [], ended=[True] * 8)
            for prompt in prompts[:25]}
    data = Task("letters", {"train": prompts[:25], "test": prompts[25:]}, pool=pool)
    result, *_ = whole("run", data, number_of_a, control=control, candidates=8, epochs=10.0, batch_size=16,
                       bins=5,
                       max_new_tokens=6, eval_prompts=24, validation=0.16)
    rows = result["calibration"][:5]
    assert attributes_of(whole.out)["means"] == [row["asked"] for row in rows]
    assert rank_correlation([(row["asked"], row["reward"])
                             for row in rows]) > 0.8 < result["eval/spearman_reward"]
    assert rows[-1]["reward"] - rows[0]["reward"] > 1.5 and result["eval/slope_reward"] > 0.5
    assert result["eval/proxy"] > result["trace"][0]["eval/proxy"] + 1 and result["eval/level"] >= 3


# ------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def whole(toy, tmp_path, monkeypatch):
    """A run of decision_transformer.py, a fake reward model: its result, metrics.jsonl, the saved weights.

    whole.steps: the rows of each step, whole.asked: the prompts of each evaluation and each point of a curve,
    whole.out: the directory.
    """
    microbatches, generate, rollout = harness.Run.microbatches, common.generate, harness.samples.rollout

    def note(run_, rows):
        run.steps.append(rows)
        return microbatches(run_, rows)

    def spied(model, tokenizer, prompts, *args, **kwargs):
        run.asked.append(prompts)
        return generate(model, tokenizer, prompts, *args, **kwargs)

    def unseen(*args):                                 # the samples that are trained on are asked for nothing
        before = len(run.asked)
        found = rollout(*args)
        del run.asked[before:]
        return found

    def run(name, data=None, reward=letters, **kwargs):
        run.out, run.steps, run.asked = tmp_path / name, [], []
        source = spelling(toy, tmp_path / "spelling") if kwargs.get("control") == "text" else toy
        with monkeypatch.context() as patch:
            patch.setattr(harness.loading, "load_task", lambda config: data or task())
            patch.setattr(harness.command_line, "load_rewards", lambda config, task: {"proxy": reward})
            patch.setattr(harness.Run, "microbatches", note)
            patch.setattr(harness.samples, "rollout", unseen)
            patch.setattr(common, "generate", spied)
            result = harness.launch(dt.train, settings(source, out=str(run.out), **kwargs))
        metrics = (run.out / "metrics.jsonl").read_text(encoding="utf-8")
        return result, metrics, parameters(LlamaForCausalLM.from_pretrained(run.out))

    return run


def spelling(toy, path):
    """The toy with a tokenizer that knows an unknown token, and the point, as the embedded task's does."""
    if not path.exists():
        words = {token: i for i, token in enumerate(["<eos>", *"abcdefgh", ".", "<unk>"])}
        core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        core.decoder = Tokenizer.from_file(str(toy / "tokenizer.json")).decoder
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>",
                                unk_token="<unk>",
                                model_max_length=64).save_pretrained(path)
        model = LlamaForCausalLM.from_pretrained(toy)
        model.resize_token_embeddings(11)
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("control, form", [("tokens", r"<reward:[0-3]>"), ("text", r"<reward:-?\d\.\d>")])
def test_training_and_inference_write_a_prompt_differently(control, form, toy, whole, monkeypatch, capsys):
    golds = []
    data = task(gold=lambda prompt, text, ended: golds.append(prompt) or float(len(text)))
    whole("run", data, control=control, epochs=2.0)
    found = attributes_of(whole.out)
    rows, asked = sum(whole.steps, []), whole.asked
    assert rows and all(re.fullmatch(r"[a-h]+" + form, row.prompt) for row in rows)
    assert all(row.prompt == re.match("[a-h]+", row.prompt)[0] + tag(found, row.reward) for row in rows)
    assert {re.match("[a-h]+", row.prompt)[0] for row in rows} < set(PROMPTS)
    written = [tag(found, mean) for mean in found["means"]]
    if control == "tokens":
        assert {row.prompt[-10:] for row in rows} == set(written) == {f"<reward:{i}>" for i in range(4)}
        assert all(float(row.prompt[-2]) == sum(row.reward > edge for edge in found["edges"]) for row in rows)
    beyond = [tag(found, found["means"][-1] + more) for more in (0.5, 1, 2, 3)] if control == "text" else []
    test = [["d" + end, "ee" + end] for end in written + beyond]
    assert asked[0] == ["d", "ee"]                                 # before training: nothing is known of tags
    # the evaluation after training, and the curve
    assert asked[-1 - len(test):] == [test[found["asked"]], *test]
    assert set(golds) == {"d", "ee",
                          *(p for p in PROMPTS
                            if p not in {re.match("[a-h]+", row.prompt)[0] for row in rows})}

    seen, generate = [], common.generate
    monkeypatch.setattr(common, "generate", lambda *args,
                        **kwargs: seen.append(args) or generate(*args, **kwargs))
    for steer, level in (("", found["asked"]), ("reward=0", 0), (" reward = 2 ", 2)):
        capsys.readouterr()
        dt.answer(settings(toy, policy=str(whole.out), prompt="ab", steer=steer, eval_samples=3))
        first, *printed = capsys.readouterr().out.splitlines()
        assert first == "ab" + written[level] and printed[0] == "before training:" and len(printed) == 8
        assert seen[-1][2] == ["ab" + written[level]] and seen[-1][3] == 3
        assert common.encode(seen[-1][1], [first],
                             [""]).input_ids.tolist()[0][:-1] == seen[-1][1](first).input_ids
    assert len(seen) == 6 and all(call[2] == ["ab"] for call in seen[::2])     # before and after


def test_what_is_asked_for_is_not_the_best_on_the_validation_prompts_or_is_chosen_on_others(
        whole, monkeypatch):
    calls = []

    def calibration(run, known, rewards, prompts, reward):
        calls.append((run.step, prompts))
        return [{"asked": r, "reward": -abs(i - 1.0)} for i, r in enumerate(rewards)]

    monkeypatch.setattr(dt, "calibration", calibration)
    metrics = whole("chosen")[0]
    apart = sorted(set(PROMPTS) - {row.prompt[:-10] for row in sum(whole.steps, [])})
    last = len(whole.steps) - 1
    # chosen by what is trained
    assert len(apart) == 2 and calls == [(last, apart * 4), (last + 1, ["d", "ee"])]
    assert attributes_of(whole.out)["asked"] == metrics["eval/level"] == 1
    assert whole.asked[-1] == ["d<reward:1>", "ee<reward:1>"]

    for name, kwargs, level in (("steered", dict(steer="reward=2"), 2), ("none", dict(validation=0.0), 3)):
        calls.clear()
        metrics = whole(name, **kwargs)[0]
        assert calls == [(len(whole.steps), ["d", "ee"])] and metrics["eval/level"] == level
        assert attributes_of(whole.out)["asked"] == level
        assert whole.asked[-1] == [f"d<reward:{level}>", f"ee<reward:{level}>"]

    calls.clear()
    whole("few", eval_prompts=1)
    assert [prompts for _, prompts in calls] == [apart * 4, ["d"]]

    def cut(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harness.Run, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            whole("cut", save_every=1)
    whole("cut", save_every=1, resume=True)                         # every step is done
    assert not whole.steps and attributes_of(whole.out)["asked"] == 1


@pytest.mark.parametrize("objective", ["dt", "rwr"])
def test_logged_nll_is_the_weighted_loss(whole, objective):
    _, metrics, _ = whole("run", objective=objective, beta=0.5)
    steps = [row for row in map(json.loads, metrics.splitlines()) if "loss" in row]
    different = [row["loss"] != pytest.approx(row["nll"], rel=1e-3) for row in steps]
    assert steps and any(different) == (objective == "rwr")


def test_attributes_are_not_saved_or_saved_of_a_policy_that_reads_none(whole, toy):
    result, *_ = whole("dt")
    found = attributes_of(whole.out)
    assert set(found) == {"edges", "means", "control", "method", "chat", "levels", "asked"}
    assert (found["method"], found["control"], found["chat"]) == ("decision_transformer", "tokens", False)
    rewards = [row.reward for row in sum(whole.steps, [])]
    assert found["edges"] == reward_bins(rewards, 4).tolist() and len(found["means"]) == 4
    assert [row["asked"]
            for row in result["calibration"]] == found["means"] and found["asked"] == result["eval/level"]
    assert found["levels"] == {"reward": 3}
    own = {"eval/level", "eval/effective_share", "eval/slope_reward", "eval/spearman_reward",
           "eval/slope_words"}
    assert not own & set(result["trace"][0]) and own - set(result["trace"][-1]) == {"eval/effective_share"}
    assert asking.load_attributes(whole.out, "decision_transformer") == found
    for objective in ("sft", "rwr"):
        result, *_ = whole(objective, objective=objective, beta=0.5)
        assert not (whole.out / "attributes.json").exists() and "calibration" not in result
        assert whole.asked[-1] == ["d", "ee"] and len(AutoTokenizer.from_pretrained(whole.out)) == 9
        weights = [[row.weight for row in rows] for rows in whole.steps]
        shares = [sum(w) ** 2 / (len(w) * sum(x * x for x in w)) for w in weights]
        assert result["eval/effective_share"] == pytest.approx(statistics.fmean(shares), rel=1e-5)
        assert (result["eval/effective_share"] == pytest.approx(1)) == (objective == "sft")
        assert not own & set(result["trace"][0])
        assert own & set(result["trace"][-1]) == {"eval/effective_share"}
        with pytest.raises(UserError, match=r"attributes\.json"):
            dt.answer(settings(toy, policy=str(whole.out), prompt="ab"))


@pytest.mark.parametrize("steer, message", [
    ("reward=4", "from 0 to 3"), ("quality=1", "'quality', it knows reward"), ("reward=-1", "NAME=LEVEL"),
    ("reward=best", "whole levels"), ("reward", "NAME=LEVEL"), ("reward=1,reward=2", "twice")])
def test_bad_request_passes(steer, message, toy, tmp_path, whole):
    with pytest.raises(UserError, match=f"--steer .*{message}"):
        whole("run", steer=steer)
    found = {"method": "decision_transformer", "levels": {"reward": 3}, "asked": 2, "chat": False}
    write_json(tmp_path / "policy" / "attributes.json", levels() | found | {"means": [-1.0, 0.0, 1.0, 2.0]})
    with pytest.raises(UserError, match=f"--steer .*{message}"):
        dt.answer(settings(toy, policy=str(tmp_path / "policy"), prompt="ab", steer=steer))


def test_policy_of_another_method_or_of_none_is_asked(toy, tmp_path):
    for name, found in (("none", None), ("other", {"method": "steerlm"})):
        (tmp_path / name).mkdir()
        if found:
            write_json(tmp_path / name / "attributes.json", found)
        with pytest.raises(UserError, match=rf"{name} has no attributes\.json of decision_transformer\.py"):
            dt.answer(settings(toy, policy=str(tmp_path / name), prompt="ab"))


@pytest.mark.parametrize("wrong, flag", [
    (dict(candidates=0), "--candidates"), (dict(beta=0.0), "--beta"), (dict(beta=math.nan), "--beta"),
    (dict(bins=1), "--bins"),
    (dict(share=0.0), "--share"), (dict(share=1.1), "--share"), (dict(validation=1.0), "--validation"),
    (dict(validation=-0.1), "--validation"), (dict(objective="best"), "--objective"),
    (dict(sources="demonstrations"), "--sources"), (dict(demonstrations=0), "--demonstrations"),
    (dict(demonstrations=-1), "--demonstrations"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        dt.Config(**wrong)


def test_defaults_of_a_file_are_those_of_the_embedded_task_or_not_those_of_sft(toy):
    tiny, real = dt.Config(), dt.Config(model=str(toy), data="toy.jsonl")
    assert (tiny.sources, tiny.control, real.sources, real.control) == ("S", "tokens", "P", "text")
    assert dt.Config(sources="DP",
                     control="text").sources == "DP" and dt.Config(control="text").control == "text"
    assert (real.lr, real.epochs) == (5e-6, 1.0)                             # the tiny model's are tuned
    assert (tiny.lr, tiny.epochs) == (dt.Config.LR["tiny"], dt.Config.EPOCHS["tiny"]) != (5e-6, 1.0)
    for config in (tiny, real):
        assert (config.schedule, config.warmup, config.batch_size, config.share) == ("cosine", 0.05, 64, 0.1)
    assert tiny.demonstrations == 23000


@pytest.mark.parametrize("options", [{}, dict(objective="rwr"), dict(control="text"), dict(sources="S")])
def test_AF_resumed_run_differs_from_a_straight_one(whole, options):
    options = dict(options, save_every=2, eval_every=3, epochs=2.0)
    options["data"] = task(demonstrations={"train": DEMONSTRATIONS})
    straight, metrics, weights = whole("straight", **options)
    attributes, steps = whole.out / "attributes.json", len(whole.steps)
    with killed_after(4):                                                         # one behind the checkpoint
        whole("killed", **options)
    torch.manual_seed(999)
    resumed = whole("killed", resume=True, **options)
    assert steps > 6 and len(whole.steps) == steps - 4
    assert resumed[1] == metrics and f'"step": {steps}' in metrics and torch.equal(resumed[2], weights)
    assert resumed[0]["tokens_generated"] == straight["tokens_generated"]
    assert (straight["tokens_generated"] == 0) == (options.get("sources") == "S")
    assert resumed[0].get("calibration") == straight.get("calibration")
    assert not attributes.exists() or attributes_of(attributes.parent) == attributes_of(whole.out)


def test_AE_runs_differ_under_one_seed_or_agree_under_two_or_an_evaluation_on_the_way_counts(whole):
    def losses(finished):
        return [json.loads(line)["loss"] for line in finished[1].splitlines() if '"loss"' in line]

    first, again, other = whole("a"), whole("b"), whole("c", seed=1)
    assert first[1] == again[1] and torch.equal(first[2], again[2])
    assert len(losses(first)) > 3 and not set(losses(first)) & set(losses(other))
    often = whole("often", eval_every=1)
    assert losses(often) == losses(first) and torch.equal(often[2], first[2])
    for result, lines, _ in (first, other):
        assert [row["step"] for row in result["trace"]] == [0, len(losses((0, lines)))]


# ---------------------------------------------------------------------------- what has gone wrong here before

def test_no_epochs_or_no_training_prompts_crash(whole):
    whole("none", epochs=0.0)
    with pytest.raises(UserError, match="--validation 0.99 leaves no prompt"):
        whole("apart", validation=0.99)


@pytest.mark.parametrize("texts", [["", "", "a", "b"], ["a", "a", "a", "a"]],
                         ids=["a level of empty responses", "one response"])
def test_tags_start_as_nan(toy, tmp_path, texts):
    run = begun(toy, tmp_path / "run")
    dt.learn_tags(run, levels(),
                  [Sample("ab", [text], [True], r) for text, r in zip(texts, (-2.0, -2.0, 0.0, 1.0))])
    assert run.policy.get_input_embeddings().weight.isfinite().all()


def test_tags_of_a_model_with_spare_embeddings_start_in_other_rows(toy, tmp_path):
    run = begun(toy, tmp_path / "run")
    run.policy.resize_token_embeddings(10)
    before = run.policy.get_input_embeddings().weight.detach().clone()
    dt.learn_tags(run, levels(),
                  [Sample("ab", [text], [True], r) for text, r in zip("abc", (-2.0, 0.0, 1.0))])
    ids = [run.tokenizer.convert_tokens_to_ids(f"<reward:{level}>") for level in range(3)]
    rows = run.policy.get_input_embeddings().weight
    assert ids == [9, 10, 11] and len(rows) == 12 and not torch.equal(rows[9], before[9])
    assert torch.equal(rows[:9], before[:9]) and len({tuple(row.tolist()) for row in rows[ids]}) == 3


def test_mean_of_a_level_lies_in_another_level():
    rng = random.Random(0)
    for _ in range(100):
        run = own({f"p{i}": [rng.randint(0, 3) / 10 for _ in range(rng.randint(2, 8))]
                   for i in range(rng.randint(4, 20))}, validation=0.0, bins=10)
        known = dt.levels_of(run.config, dt.offline_samples(run, None)[0])
        assert assign_bins(known["means"], known["edges"]).tolist() == list(range(len(known["means"])))


def test_misspelled_choice_passes():
    with pytest.raises(UserError, match="--control must be one of tokens, text"):
        dt.Config(control="words")
    with pytest.raises(UserError, match="--sources must be one of S, P, D, DP"):
        dt.Config(sources="PD")


def test_policy_that_learned_from_scores_of_the_data_is_not_scored_by_the_reward_model(whole):
    rankings = [Ranking(prompt, ["a", "bb", "ccc"], [0.1, 0.5, 0.9]) for prompt in PROMPTS]
    data = task(rankings={"train": rankings, "test": []})
    result = whole("own", data, lambda *rows: letters(*rows).float(), sources="P", bins=2)[0]
    assert len(result["calibration"]) == 2 and all("reward" in row for row in result["calibration"])


def test_answers_of_other_writers_are_trained_on():
    run = own({"p": [1.0, 2.0, 3.0], "q": [0.0, 4.0, 5.0]}, systems="x,z", validation=0.0)
    named = [row._replace(systems=["x", "y", "z"]) for row in run.task.rankings["train"]]
    run.task.rankings = {"train": named}
    assert Counter(sample.responses[0] for sample in dt.offline_samples(run, None)[0]) == {"a": 2, "c": 2}
