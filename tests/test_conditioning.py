"""harness/conditioning.py, and what conditioned methods need of the rest: ratings, curves, matrices."""
import json
import math
import os
import random
import statistics
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
import decision_transformer
import harness
import harness.command_line
import steerlm
from common import UserError
from conftest import close, parameters
from harness import asking, conditioning, evaluation, loading
from referee import figures, statistics as referee_statistics
from tasks import Demonstration, Ranking, Task, build, preferences, reviews, write_json

TRAIN, TEST = ["ab", "hb", "cde"], ["d", "ee", "fgh"]


def settings(toy, **kwargs):
    return harness.Config(**dict(model=str(toy), data="toy.jsonl", max_length=64, max_new_tokens=4,
                                 temperature=0.7,
                                eval_samples=2, eval_prompts=3, save_every=0, device="cpu", quiet=True)
                          | kwargs)


def begun(toy, tmp_path, task=None, rewards=None, **kwargs):
    config = settings(toy, out=str(tmp_path / "run"), **kwargs)
    torch.manual_seed(0)
    return harness.Run(config, tmp_path / "run", task or Task("toy", {"train": TRAIN, "test": TEST}),
                       harness.load_tokenizer(config), harness.load_policy(config), rewards or {})


@pytest.fixture(scope="module")
def tied(toy, tmp_path_factory):
    """Like toy, with one matrix for input and output."""
    path = tmp_path_factory.mktemp("tied")
    harness.load_tokenizer(settings(toy)).save_pretrained(path)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                 num_attention_heads=2,
                                 max_position_embeddings=96, initializer_range=0.3, eos_token_id=0,
                                 pad_token_id=0,
                                 bos_token_id=None, tie_word_embeddings=True)).save_pretrained(path)
    return path


@pytest.fixture(params=["untied", "tied"])
def either(request, toy, tied):
    return {"untied": toy, "tied": tied}[request.param]


def weights(run):
    """Copies of the input embeddings and of the head."""
    return (run.policy.get_input_embeddings().weight.detach().clone(),
            run.policy.get_output_embeddings().weight.detach().clone())


def letters(text):
    return ["abcdefgh".index(c) + 1 for c in text]


# ------------------------------------------------------------------------------------------------------- tags

WORDS = {"<x:0>": ["ab", "a"], "<x:1>": ["c"], "<x:2>": ["dd", "hc", "a"]}


def starts(old, words):
    """The start of each tag, token by token: the end of prompts, and the shift towards its own words."""
    end = (old[2] + old[2] + old[5]) / 3                            # b, b, e
    every = [i for texts in words.values() for text in texts for i in letters(text)]
    shifts = {}
    for tag, texts in words.items():
        own = [i for text in texts for i in letters(text)]
        usual = sum(old[i] for i in every) / len(every)
        shifts[tag] = sum(old[i] for i in own) / len(own) - usual if own else 0 * end
    scale = sum(row.norm() for row in old) / len(old) / max(shift.norm() for shift in shifts.values())
    return {tag: end + shift * scale for tag, shift in shifts.items()}


def row_of(run, tag):
    return run.policy.get_input_embeddings().weight.detach()[run.tokenizer.convert_tokens_to_ids(tag)]


def test_tag_starts_elsewhere_than_at_the_end_of_prompts_shifted_to_its_words(either, tmp_path):
    run = begun(either, tmp_path)
    old = weights(run)[0]
    harness.add_tags(run, {"x": WORDS, "y": {"<y:0>": ["a"], "<y:1>": ["ha"]}})
    expected = starts(old, WORDS) | starts(old, {"<y:0>": ["a"], "<y:1>": ["ha"]})
    assert len(expected) == 5 and len(run.tokenizer) == len(weights(run)[0]) == 14
    assert torch.equal(weights(run)[0][:9], old)
    for tag, start in expected.items():
        close(row_of(run, tag), start, 1e-5)
    end = (old[2] + old[2] + old[5]) / 3
    for name, n in (("x", 3), ("y", 2)):                            # each attribute has the same say
        sizes = [(row_of(run, f"<{name}:{i}>") - end).norm().item() for i in range(n)]
        assert max(sizes) == pytest.approx(old.norm(dim=1).mean().item(), rel=1e-5) and min(sizes) > 0.01
    assert (row_of(run, "<x:0>") - row_of(run, "<x:1>")).norm() > 0.1


def test_tag_that_no_response_carries_starts_off_the_end_of_prompts_or_all_such_tags_start_alike(
        toy, tmp_path):
    run = begun(toy, tmp_path)
    old = weights(run)[0]
    end = (old[2] + old[2] + old[5]) / 3
    harness.add_tags(run, {"x": WORDS | {"<x:3>": []}, "y": {f"<y:{i}>": [] for i in range(4)}})
    close(row_of(run, "<x:3>"), end, 1e-6)
    for tag, start in starts(old, WORDS | {"<x:3>": []}).items():
        close(row_of(run, tag), start, 1e-5)
    noise = torch.stack([row_of(run, f"<y:{i}>") - end for i in range(4)])
    assert torch.pdist(noise).min() > 0.1
    assert noise.norm(dim=1).max().item() == pytest.approx(old.norm(dim=1).mean().item(), rel=1e-5)


def test_starts_of_tags_depend_on_the_random_state(toy, tmp_path):
    found = []
    for seed in (1, 2):
        run = begun(toy, tmp_path)
        torch.manual_seed(seed)
        harness.add_tags(run, {"y": {"<y:0>": [], "<y:1>": []}})
        found.append(weights(run))
    assert all(map(torch.equal, *found))


def test_known_tag_changes_or_comes_twice(either, tmp_path):
    run = begun(either, tmp_path)
    harness.add_tags(run, {"x": WORDS})
    with torch.no_grad():
        run.policy.get_input_embeddings().weight[9:] += 0.5                             # trained meanwhile
    before, ids = weights(run), run.tokenizer.get_vocab()
    harness.add_tags(run, {"x": WORDS})
    assert all(map(torch.equal, weights(run), before)) and run.tokenizer.get_vocab() == ids
    harness.add_tags(run, {"x": {"<x:new>": ["a"]} | WORDS, "y": {"<y:0>": ["b"], "<y:1>": ["h"]}})
    for now, then in zip(weights(run), before):
        assert len(now) == len(run.tokenizer) == 15 and torch.equal(now[:12], then)
    assert {tag: i for tag, i in run.tokenizer.get_vocab().items() if i < 12} == ids
    close(row_of(run, "<y:0>"), starts(before[0], {"<y:0>": ["b"], "<y:1>": ["h"]})["<y:0>"], 1e-5)


def test_tag_is_several_tokens_or_another_one_after_reloading(either, tmp_path):
    run = begun(either, tmp_path)
    harness.add_tags(run, {"x": WORDS})
    prompts = ["ab<x:2>", "h<x:0><x:1>", "<x:1>"]
    batch = common.encode(run.tokenizer, prompts, ["cd", "e", "<x:0>a"])
    expected = [[1, 2, 11, 3, 4, 0], [8, 9, 10, 5, 0], [10, 9, 1, 0]]
    assert [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask)] == expected
    assert batch.response_mask.sum(1).tolist() == [3, 2, 3]                # the tag of a prompt is in no loss
    out = tmp_path / "saved"
    run.policy.save_pretrained(out)
    run.tokenizer.save_pretrained(out)
    config = replace(run.config, policy=str(out))
    policy, tokenizer = harness.load_policy(config), harness.load_tokenizer(config)
    again = common.encode(tokenizer, prompts, ["cd", "e", "<x:0>a"])
    assert len(tokenizer) == 12 and torch.equal(again.input_ids, batch.input_ids)
    assert torch.equal(common.sequence_logps(policy, batch), common.sequence_logps(run.policy, batch))
    other = SimpleNamespace(policy=policy, tokenizer=tokenizer, task=run.task)
    harness.add_tags(other, {"x": WORDS})                            # and a second method finds them known
    assert len(tokenizer) == 12 and all(map(torch.equal, weights(other), weights(run)))


# ------------------------------------------------------------------------------------------------- vocabulary

def test_new_rows_of_an_untied_head_are_no_average_or_old_logits_move(toy, tmp_path):
    run = begun(toy, tmp_path)
    (embeddings, head), ids = weights(run), torch.tensor([[1, 5, 3]])
    before, rows = run.policy(input_ids=ids).logits, torch.randn(4, 16)
    evaluation.extend_vocabulary(run.policy, rows)
    now = weights(run)
    assert [len(matrix) for matrix in now] == [13, 13] and run.policy.config.vocab_size == 13
    assert torch.equal(now[0], torch.cat([embeddings, rows])) and torch.equal(now[1][:9], head)
    close(now[1][9:], (sum(head) / 9).expand(4, 16), 1e-6)
    logits = run.policy(input_ids=ids).logits
    close(logits[..., :9], before, 1e-5)
    close(logits[..., 9:], before.mean(-1, keepdim=True).expand(1, 3, 4), 1e-5)


def test_tied_embeddings_come_apart_or_their_rows_are_lost(tied, tmp_path):
    run = begun(tied, tmp_path)
    old, rows = weights(run)[0], torch.randn(2, 16)
    evaluation.extend_vocabulary(run.policy, rows)
    assert run.policy.get_input_embeddings().weight is run.policy.get_output_embeddings().weight
    assert torch.equal(weights(run)[0], torch.cat([old, rows]))
    common.sequence_logps(run.policy, common.encode(run.tokenizer, ["ab"], ["c"])).sum().backward()
    assert run.policy.get_input_embeddings().weight.grad.shape == (11, 16)           # and they can be trained


# ---------------------------------------------------------------------------------------------- other prompts

def sampled(run, prompts, n=2):
    torch.manual_seed(3)
    batch = common.generate(run.policy, run.tokenizer, prompts, n, max_new_tokens=4)
    ended = common.finished(run.tokenizer, batch)
    assert ended.any() and not ended.all() and len(set(batch.lengths.tolist())) > 1
    return batch


def answers(batch):
    return [row[mask.bool()].tolist() for row, mask in zip(batch.input_ids, batch.response_mask)]


def questions(batch):
    where = (batch.attention_mask - batch.response_mask).bool()
    return [row[mask].tolist() for row, mask in zip(batch.input_ids, where)]


def test_responses_to_other_prompts_are_other_tokens_or_their_masks_differ(toy, tmp_path):
    run = begun(toy, tmp_path)
    harness.add_tags(run, {"x": WORDS})
    prompts = ["a", "abcdefgh", "hh", "c<x:1>", "g"]
    batch, others = sampled(run, prompts), [p for p in ["hgfe", "b", "", "aa", "cab"] for _ in range(2)]
    others[4:6] = ["e<x:0>", "fff"]
    other = evaluation.with_prompts(run.tokenizer, batch, others)
    # no EOS where it was cut off
    assert answers(other) == answers(batch) and torch.equal(other.lengths, batch.lengths)
    assert questions(other) == [run.tokenizer(p).input_ids for p in others] != questions(batch)
    assert torch.equal(common.finished(run.tokenizer, other), common.finished(run.tokenizer, batch))
    same = evaluation.with_prompts(run.tokenizer, batch, [p for p in prompts for _ in range(2)])
    assert all(map(torch.equal, same.tensors(), batch.tensors()))
    odd = common.pack([([1], [9, 1, 11, 0])], 0)
    # special tokens are kept
    assert answers(evaluation.with_prompts(run.tokenizer, odd, ["ba"])) == [[9, 1, 11, 0]]
    for wrong in (others[:-1], others + ["a"]):
        with pytest.raises(ValueError):
            evaluation.with_prompts(run.tokenizer, batch, wrong)


def logps(model, prompt, response, temperature, more=()):
    """Log-probs [response, V] of every token at each place of the response, of one row without padding.

    more: how further tokens are read, each as likely as an average.
    """
    with torch.no_grad():
        embeddings = torch.cat([model.get_input_embeddings().weight, *(row[None] for row in more)])
        logits = model(inputs_embeds=embeddings[prompt + response][None]).logits[0].double()
    logits = torch.cat([logits] + [logits.mean(-1, keepdim=True)] * len(more), -1) / temperature
    return logits.log_softmax(-1)[len(prompt) - 1:-1]


def kl(p, q):
    """KL of two rows of distributions over tokens, summed over the places."""
    assert p.shape == q.shape
    return (p.exp() * (p - q)).sum().item()


def changed(policy):
    """The policy, trained a little as far as the reference can tell."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return policy


@pytest.fixture
def watched(monkeypatch):
    """What common.generate was asked, and what it gave: [(prompts, batch)]."""
    calls, generate = [], common.generate

    def note(model, tokenizer, prompts, *args, **kwargs):
        batch = generate(model, tokenizer, prompts, *args, **kwargs)
        calls.append((list(prompts), batch))
        return batch

    monkeypatch.setattr(common, "generate", note)
    return calls


def spying(seen):
    """A task and a reward model that note which prompts they see."""
    def gold(prompt, response, ended):
        seen["gold"].append(prompt)
        return float(len(prompt))

    def proxy(prompts, responses):
        seen["proxy"] += prompts
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    return Task("toy", {"train": TRAIN, "test": TEST}, gold=gold), {"proxy": proxy}


@pytest.mark.parametrize("tags", [0, 3])
def test_kl_of_an_asked_policy_differs_from_enumeration_or_rewards_see_the_tag(tags, toy, tmp_path, watched):
    seen = {"gold": [], "proxy": []}
    run = begun(toy, tmp_path, *spying(seen))
    if tags:
        harness.add_tags(run, {"x": WORDS})
    changed(run.policy)
    end = "<x:1>" if tags else "hg"
    metrics, samples = evaluation.evaluate(run.config, run.task, run.policy, run.tokenizer, run.rewards,
                                           ask=lambda text: text + end)
    (asked, batch), = watched
    plain = [prompt for prompt in TEST for _ in range(2)]
    assert asked == [prompt + end for prompt in TEST]
    assert seen["gold"] == seen["proxy"] == samples["prompts"] == plain
    assert metrics["eval/gold"] == metrics["eval/proxy"] == pytest.approx(2)
    assert samples["responses"] == common.decode(run.tokenizer, batch)
    assert metrics["eval/length"] == batch.lengths.float().mean()
    reference, more, want = loading.load_reference(run.config), weights(run)[0][9:], []
    for i, (prompt, response) in enumerate(zip(plain, answers(batch))):
        tag = [10] if tags else [8, 7]
        assert questions(batch)[i] == letters(prompt) + tag
        want.append(kl(logps(run.policy, letters(prompt) + tag, response, 0.7),
                       logps(reference, letters(prompt), response, 0.7, more)))
    assert metrics["eval/kl"] == pytest.approx(statistics.fmean(want), abs=1e-5)
    each = evaluation.kl_to_reference(run.config, run.policy, batch,
                                      evaluation.with_prompts(run.tokenizer, batch, plain))
    assert each.tolist() == pytest.approx(want, abs=1e-5) and min(want) > 0.1
    wrong = evaluation.kl_to_reference(run.config, run.policy, batch)   # the reference must not see the tag
    assert (wrong - each).abs().max() > 1e-3


def test_evaluation_without_ask_is_another_one(toy, tmp_path, watched, monkeypatch):
    seen = {"gold": [], "proxy": []}
    run = begun(toy, tmp_path, *spying(seen))
    changed(run.policy)
    first = evaluation.evaluate(run.config, run.task, run.policy, run.tokenizer, run.rewards)
    monkeypatch.setattr(evaluation, "with_prompts", lambda *args: pytest.fail("the prompts are the same"))
    assert first == evaluation.evaluate(run.config, run.task, run.policy, run.tokenizer, run.rewards, None,
                                        str)
    assert first == evaluation.evaluate(run.config, run.task, run.policy, run.tokenizer, run.rewards,
                                        ask=lambda prompt: prompt)
    asked, batch = watched[0]
    assert asked == TEST and seen["gold"][:6] == [prompt for prompt in TEST for _ in range(2)]
    reference = loading.load_reference(run.config)
    want = [kl(logps(run.policy, p, y, 0.7), logps(reference, p, y, 0.7))
            for p, y in zip(questions(batch), answers(batch))]
    assert first[0]["eval/kl"] == pytest.approx(statistics.fmean(want), abs=1e-5) and min(want) > 1e-3


def test_reference_with_fewer_tokens_reads_tags_as_the_policy_does_not(either, tmp_path):
    run = begun(either, tmp_path)
    harness.add_tags(run, {"x": WORDS})
    batch = common.encode(run.tokenizer, ["ab<x:0>", "h<x:2>"], ["cd<x:1>a", "e"])
    # as yet the two are one
    close(evaluation.kl_to_reference(run.config, run.policy, batch), [0.0, 0.0], 1e-5)


# ---------------------------------------------------------------------------------- before and after training

def ask(prompt):
    return prompt + "hh"


def test_policy_is_asked_before_training_or_no_longer_afterwards(toy, tmp_path, watched):
    run = begun(toy, tmp_path)
    run.ask = ask
    for _ in range(3):
        run.evaluate()
    assert [asked for asked, _ in watched] == [TEST] + [[prompt + "hh" for prompt in TEST]] * 2
    before, after = run.samples["before"], run.samples["after"]
    assert before["prompts"] == after["prompts"] == [p for p in TEST for _ in range(2)]
    assert run.samples["before"]["responses"] == common.decode(run.tokenizer, watched[0][1])
    assert run.samples["after"]["responses"] == common.decode(run.tokenizer, watched[1][1])
    assert run.trace[0]["eval/kl"] == pytest.approx(0, abs=1e-6)


def looped(run, kill=None):
    """The steps of a loop that changes the policy without a gradient, and evaluates as dpo.py does."""
    optimizer, schedule = common.adamw(run.policy, run.config.lr, 2)
    for step, row in run.steps(["first", "second"], run.policy, optimizer, schedule):
        if step == kill:
            raise KeyboardInterrupt
        changed(run.policy)
        run.log(step, {"loss": 0.0})
        if run.evaluation_due(step):
            run.evaluate(**{"eval/mine": 1.0})
        yield step, row


def trained(run, tags, ask=str):
    """Two steps; before them an evaluation, and then tags where `tags` says so.

    Returns the steps at which there was an evaluation with numbers of the method's own.
    """
    run.evaluate()
    if tags:
        harness.add_tags(run, {"x": WORDS})
    run.ask = ask
    assert [*looped(run)] == [(0, "first"), (1, "second")]
    return [entry["step"] for entry in run.trace if "eval/mine" in entry]


def evaluations(run):
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" not in row]


def test_before_is_recorded_twice_or_after_the_model_was_changed(toy, tmp_path, watched):
    seen = {"gold": [], "proxy": []}
    run = begun(toy, tmp_path, *spying(seen), eval_every=1)
    assert trained(run, True, ask=lambda prompt: prompt + "<x:0>") == [1, 2]
    assert [entry["step"] for entry in run.trace] == [0, 1, 2] and len(watched) == 3
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[0]["eval/kl"] == pytest.approx(0, abs=1e-6)
    assert [row.get("eval/mine") for row in rows] == [None, 1.0, 1.0]
    assert [row.get("eval/win_rate") for row in rows] == [None, 0.5, 0.5]
    assert [asked for asked, _ in watched] == [TEST] + [[prompt + "<x:0>" for prompt in TEST]] * 2
    assert int(watched[0][1].input_ids.max()) < 9


def test_steps_record_before_by_themselves_or_tags_change_what_was_recorded(toy, tmp_path, watched, clock):
    run = begun(toy, tmp_path)
    assert trained(run, False) == [2] and [entry["step"]
                                           for entry in run.trace] == [0, 2] and len(watched) == 2
    other = begun(toy, tmp_path / "other")
    assert trained(other, True, ask=lambda prompt: prompt + "<x:0>") == [2] and len(watched) == 4
    assert run.trace[0] == other.trace[0] and evaluations(run)[0] == evaluations(other)[0]
    none = begun(toy, tmp_path / "none")
    # who does not ask for it gets no evaluation before
    assert [*looped(none)] == [(0, "first"), (1, "second")]
    assert [entry["step"] for entry in none.trace] == [2] and len(watched) == 5


def test_a_resumed_run_records_before_anew(toy, tmp_path, watched):
    straight = begun(toy, tmp_path / "straight")
    trained(straight, True, ask)
    run = begun(toy, tmp_path, save_every=1)
    run.evaluate()
    harness.add_tags(run, {"x": WORDS})
    run.ask = ask
    with pytest.raises(KeyboardInterrupt):
        [*looped(run, kill=1)]
    before, again = (run.out / "metrics.jsonl").read_text(encoding="utf-8"), begun(toy, tmp_path, resume=True)
    watched.clear()
    again.evaluate()
    again.amend(**{"eval/mine": 1.0})
    assert not again.trace and not watched and (run.out
                                                / "metrics.jsonl").read_text(encoding="utf-8") == before
    harness.add_tags(again, {"x": WORDS})
    again.ask = ask
    for step, row in looped(again):
        assert (step, row) == (1, "second") and again.trace[:1] == run.trace and len(run.trace) == 1
    assert [asked for asked, _ in watched] == [[prompt + "hh" for prompt in TEST]]
    assert torch.equal(parameters(again.policy),
                       parameters(straight.policy)) and again.samples == straight.samples
    assert [entry["step"] for entry in again.trace] == [0, 2] and evaluations(again) == evaluations(straight)


# ----------------------------------------------------------------------------------------------- probe, curve

def test_probe_draws_new_numbers_or_moves_the_runs(toy, tmp_path):
    run, prompts = begun(toy, tmp_path), TRAIN * 4
    counts, found = dict(run.counts), []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        found.append(harness.probe(run, prompts))
        assert torch.equal(torch.get_rng_state(), before)
    (texts, ended), again = found
    assert texts == again[0] and torch.equal(ended, again[1]) and len(texts) == 12 and 0 < ended.sum() < 12
    assert run.counts == counts == dict.fromkeys(counts, 0)
    torch.manual_seed(run.config.seed)
    batch = common.generate(run.policy, run.tokenizer, prompts, 1, 0.7, max_new_tokens=4)
    assert texts == common.decode(run.tokenizer, batch) and torch.equal(ended,
                                                                        common.finished(run.tokenizer, batch))
    run.config = replace(run.config, seed=1)
    assert harness.probe(run, prompts)[0] != texts
    changed(run.policy)
    assert harness.probe(run, prompts)[0] != found[0][0]


def test_curve_mixes_rows_or_miscounts_words(monkeypatch):
    said = {"p": ["one", "two words", ""], "q": ["a  b\tc"]}
    ended = {"p": [False, True, False], "q": [True]}
    monkeypatch.setattr(conditioning, "probe", lambda run,
                        prompts: (said[prompts[0]], torch.tensor(ended[prompts[0]])))
    seen = []

    def measure(texts, ended):
        seen.append((texts, ended))
        return {"sum": sum(map(len, texts))}

    rows = conditioning.curve(None, [(7, ["p", "p", "p"]), (2.5, ["q"])], measure)
    assert rows == [{"asked": 7, "words": 1.0, "sum": 12}, {"asked": 2.5, "words": 3.0, "sum": 6}]
    assert seen == [(said[name], ended[name]) for name in "pq"] and type(seen[0][1][0]) is bool


def test_slope_is_not_that_of_least_squares():
    rows = [{"asked": 0, "came": 1.0}, {"asked": 1, "came": 2}, {"asked": 3, "came": 2.0}]
    assert conditioning.slope(rows, "came") == pytest.approx(2 / 7, abs=1e-12)           # 12/9 over 42/9
    assert conditioning.slope(rows[::-1], "came") == pytest.approx(2 / 7, abs=1e-12)
    assert conditioning.slope([{"asked": x, "m": 5 - 0.3 * x} for x in (0, 3, 6, 9)],
                              "m") == pytest.approx(-0.3, abs=1e-12)
    assert conditioning.slope([{"asked": x + 1e6, "m": 1e3 * x} for x in (1.0, 2.0, 4.0)],
                              "m") == pytest.approx(1e3, rel=1e-9)
    assert conditioning.slope([{"asked": 1, "m": 4}, {"asked": 2, "m": 4}], "m") == 0


def test_table_is_not_aligned_or_rounds_whole_numbers():
    assert harness.table([["", "gold"], ["x", 1005.0], [3, -0.126]], 9) == "\n".join([
        "              gold", "        x  1005.00", "        3    -0.13"])
    assert harness.table([[math.nan, 12]]) == "         nan          12"


# ------------------------------------------------------------------------------------------ requests and runs

KNOWN = {"sentiment": 9, "verbosity": 9, "reward": 4}


def test_request_is_misread():
    assert harness.parse_request("", KNOWN) == {}
    assert harness.parse_request("sentiment=9,verbosity=0", KNOWN) == {"sentiment": 9, "verbosity": 0}
    assert harness.parse_request(" verbosity = 3 ,reward=4,", KNOWN) == {"verbosity": 3, "reward": 4}
    assert list(harness.parse_request("verbosity=1,sentiment=2", KNOWN)) == ["verbosity", "sentiment"]


@pytest.mark.parametrize("text, message", [
    ("reward", "NAME=LEVEL"), ("reward=", "NAME=LEVEL"), ("reward=-1", "NAME=LEVEL"),
    ("reward=1.5", "NAME=LEVEL"),
    ("reward=high", "NAME=LEVEL"), ("reward:3", "NAME=LEVEL"), ("reward=1=2", "NAME=LEVEL"),
    ("reward=²", "NAME=LEVEL"),
    (" ", "NAME=LEVEL"), ("humour=1", "no attribute 'humour', it knows reward, sentiment, verbosity"),
    ("=1", "no attribute ''"),
    ("Reward=1", "no attribute 'Reward'"), ("reward=5", "of reward go from 0 to 4"),
    ("sentiment=10", "go from 0 to 9"),
    ("reward=1,sentiment=2,reward=1", "names reward twice")])
def test_bad_request_passes_or_is_not_explained(text, message):
    with pytest.raises(UserError, match=message) as caught:
        harness.parse_request(text, KNOWN)
    assert f"--steer {text!r}" in str(caught.value)


def test_attributes_of_another_method_are_taken_or_none_is_a_traceback(tmp_path):
    for folder in (tmp_path, str(tmp_path / "absent")):
        with pytest.raises(UserError, match="no attributes.json of steerlm.py"):
            asking.load_attributes(folder, "steerlm")
    found = {"method": "steerlm", "asked": {"x": 3}, "levels": {"x": 9}}
    write_json(tmp_path / "attributes.json", found)
    assert asking.load_attributes(str(tmp_path), "steerlm") == found
    with pytest.raises(UserError, match="run of decision_transformer.py"):
        asking.load_attributes(tmp_path, "decision_transformer")


def test_last_run_is_one_of_another_script_or_unfinished_or_older(tmp_path, monkeypatch):
    for module in (asking, harness.command_line):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    config = steerlm.Config(quiet=True)

    def finished(method, name, age):
        file = tmp_path / "runs" / method / name / "attributes.json"
        write_json(file, {})
        os.utime(file, (1e9 - age, 1e9 - age))
        return file.parent

    with pytest.raises(UserError, match="there is no run to ask"):
        asking.latest_run("steerlm", "attributes.json")
    (tmp_path / "runs" / "steerlm" / "010").mkdir(parents=True)
    other = finished("decision_transformer", "001", 0)
    with pytest.raises(UserError, match="there is no run to ask"):
        asking.latest_run("steerlm", "attributes.json")
    for name, age in (("002", 50), ("009", 70), ("001", 30), ("named", 90)):
        finished("steerlm", name, age)
    assert asking.latest_run("steerlm", "attributes.json") == tmp_path / "runs" / "steerlm" / "001"
    assert asking.latest_run(
        harness.command_line.method_name(decision_transformer.Config(quiet=True)), "attributes.json") == other
    assert harness.command_line.output_directory(config) == tmp_path / "runs" / "steerlm" / "011"


@pytest.fixture
def asked_for(toy, tmp_path, monkeypatch, capsys):
    """A function that completes --prompt bc with a saved policy.

    It returns (prompts, ids, n) of what was generated, and what was printed.
    """
    run, calls, generate = begun(toy, tmp_path), [], common.generate
    harness.add_tags(run, {"x": WORDS})
    run.tokenizer.chat_template = ("{% for m in messages %}{{ 'h' if m.role == 'user' else 'e' }}"
                                   "{{ m.content }}{% endfor %}"
                                   "{% if add_generation_prompt %}g{% endif %}")

    def note(model, tokenizer, prompts, n, *args, **kwargs):
        batch = generate(model, tokenizer, prompts, n, *args, **kwargs)
        calls.append((prompts, questions(batch)[0], n))
        return batch

    def complete(saved, tags_of, folder="001", **kwargs):
        out = tmp_path / "runs" / "steerlm" / folder
        run.policy.save_pretrained(out)
        run.tokenizer.save_pretrained(out)
        write_json(out / "attributes.json", saved)
        options = dict(model=str(toy), data="x", max_length=64, max_new_tokens=4, temperature=0.7,
                       eval_samples=5, device="cpu")
        asking.ask(steerlm.Config(**options | {"prompt": "bc"} | kwargs), "steerlm", tags_of)
        return calls.pop(), capsys.readouterr().out

    complete.run, complete.generate = run, generate
    monkeypatch.setattr(asking, "ROOT", tmp_path)
    monkeypatch.setattr(common, "generate", note)
    return complete


@pytest.mark.parametrize("chat, turn", [(False, "bc"), (True, "hbcg")])
def test_question_goes_without_its_tag_or_not_through_the_template(chat, turn, asked_for):
    saved, printed = {"method": "steerlm", "chat": chat, "levels": {"x": 9}}, []
    for state, seed in ((1, 0), (2, 0), (1, 9)):
        torch.manual_seed(state)
        asked, text = asked_for(saved, lambda saved, request: "<x:2>", seed=seed)
        assert asked == ([turn + "<x:2>"], [*letters(turn), 11], 5)
        printed.append(text)
    torch.manual_seed(0)
    batch = asked_for.generate(asked_for.run.policy, asked_for.run.tokenizer, [turn + "<x:2>"], 5, 0.7,
                               max_new_tokens=4)
    texts = common.decode(asked_for.run.tokenizer, batch)
    assert printed[0] == printed[1] == "\n  ".join(["bc<x:2>", *texts]) + "\n" != printed[2]


def test_request_of_the_command_line_is_lost_or_not_checked_against_what_the_policy_knows(asked_for, toy):
    saved, seen = {"method": "steerlm", "chat": False, "levels": {"x": 2}, "asked": "<x:1>"}, []

    def tags_of(saved, request):
        seen.append((saved, request))
        return f"<x:{request.get('x', 1)}>"

    assert asked_for(saved, tags_of)[0][0] == ["bc<x:1>"] and asked_for(saved, tags_of,
                                                                        steer="x=2")[0][0] == ["bc<x:2>"]
    assert seen == [(saved, {}), (saved, {"x": 2})]
    for wrong, message in (("x=3", "from 0 to 2"), ("y=1", "it knows x")):
        with pytest.raises(UserError, match=message):
            asked_for(saved, tags_of, steer=wrong)
    with pytest.raises(UserError, match="no attributes.json of steerlm.py"):
        asked_for(saved, tags_of, policy=str(toy))           # never the last run in place of the given policy


# ----------------------------------------------------------------------------------------------------- raters

NAMES = reviews.ATTRIBUTES


def levels(rng):
    return {name: rng.randint(0, 9) for name in NAMES}


def test_noiseless_raters_miss_the_truth():
    rng = random.Random(0)
    raters = reviews.make_raters(NAMES, 0.0, rng)
    assert len(raters) == 20 and all(set(rater) == set(NAMES) and not any(rater.values()) for rater in raters)
    for _ in range(50):
        truth = levels(rng)
        assert reviews.rate(truth, raters, 0.0, rng) == truth


def test_ratings_leave_the_scale_or_their_error_does_not_grow_with_the_noise():
    errors = []
    for noise in (0.0, 0.5, 1.0, 2.0, 4.0, 30.0):
        rng = random.Random(1)
        raters, rows = reviews.make_raters(NAMES, noise, rng), [levels(rng) for _ in range(400)]
        given = [reviews.rate(row, raters, noise, rng) for row in rows]
        assert all(type(level) is int and 0 <= level <= 9 for row in given for level in row.values())
        assert all(set(row) == set(NAMES) for row in given)
        errors.append(statistics.fmean(abs(a[name] - b[name]) for a, b in zip(given, rows) for name in NAMES))
    assert errors == sorted(errors) and errors[0] == 0 and all(b > 1.2 * a for a,
                                                               b in zip(errors, errors[1:]))
    assert {level for row in given for level in row.values()} >= {0, 9}             # both ends can be reached


def test_habit_changes_from_text_to_text_or_between_the_attributes_of_one_text():
    rng = random.Random(2)
    for habit, expected in ((2.6, [3, 7, 9]), (-1.4, [0, 3, 7]), (0.4, [0, 4, 8])):
        for _ in range(5):
            given = [reviews.rate({"a": level, "b": level}, [{"a": habit, "b": 0.0}], 0.0, rng)
                     for level in (0, 4, 8)]
            assert [row["a"] for row in given] == expected and [row["b"] for row in given] == [0, 4, 8]
    raters = [{"a": 3.0, "b": -3.0}, {"a": -3.0, "b": 3.0}]        # whoever is mild about a is strict about b
    pairs = [tuple(reviews.rate({"a": 5, "b": 5}, raters, 0.0, rng).values()) for _ in range(200)]
    assert set(pairs) == {(8, 2), (2, 8)} and 60 < pairs.count((8, 2)) < 140


def test_habits_or_noise_have_another_deviation():
    rng = random.Random(3)
    habits = [habit for rater in reviews.make_raters(NAMES, 3.0, rng, 2000) for habit in rater.values()]
    assert len(set(habits)) == 10000 and statistics.fmean(habits) == pytest.approx(0, abs=0.06)
    assert statistics.stdev(habits) == pytest.approx(1.5, rel=0.03)                     # 4 standard errors
    given = [reviews.rate({"a": 5}, [{"a": 0.0}], 1.0, rng)["a"] for _ in range(10000)]
    assert statistics.fmean(given) == pytest.approx(5, abs=0.04)
    assert statistics.stdev(given) == pytest.approx(math.sqrt(1 + 1 / 12), rel=0.03)    # and that of rounding


def rows_of(split, n=6):
    rng = random.Random(4)
    return [{"prompt": prompt, "ended": [rng.random() < 0.8 for _ in range(build.RATED + 3)],
             "responses": [reviews.write("off_policy", prompt, rng) for _ in range(build.RATED + 3)]}
            for prompt in reviews.make_prompts(split, n, 0)]


def rating_config(**kwargs):
    return SimpleNamespace(**{"seed": 0, "rating_noise": 2.0} | kwargs)


def test_rated_samples_are_others_or_more_or_cut_off_or_change_between_calls():
    rows = rows_of("train")
    exact = build.rated(rows, "train", rating_config(rating_noise=0.0))
    ends = [ended for row in rows for ended in row["ended"][:8]]
    assert build.RATED == 8 and 0 < ends.count(False) < 20
    assert [d[:2] for d in exact] == [(row["prompt"], text) for row in rows
                                      for text, ended in zip(row["responses"][:8], row["ended"]) if ended]
    assert all(d.attributes == reviews.attributes(d.prompt, d.response) for d in exact)
    noisy = build.rated(rows, "train", rating_config())
    assert noisy == build.rated(rows, "train",
                                rating_config()) != build.rated(rows, "train", rating_config(seed=1))
    assert [d[:2] for d in noisy] == [d[:2] for d in exact]
    assert sum(a.attributes != b.attributes for a, b in zip(noisy, exact)) > 5 * len(exact) / 6
    assert noisy != build.rated(rows, "test", rating_config())      # the same people, not the same slips


def test_test_prompts_are_rated_by_other_people(monkeypatch):
    people, rate = [], reviews.rate

    def note(levels, raters, noise, rng):
        people.append((raters, noise))
        return rate(levels, raters, noise, rng)

    monkeypatch.setattr(reviews, "rate", note)
    for split, seed in (("train", 0), ("test", 0), ("train", 1)):
        rows = [row | {"ended": [True] * len(row["ended"])} for row in rows_of(split, 1)]
        build.rated(rows, split, rating_config(seed=seed))
    first, test, other = people[0], people[8], people[16]
    assert len(people) == 24 and people == [first] * 8 + [test] * 8 + [other] * 8
    assert first == test != other and first[1] == 2.0 and len(first[0]) == 20
    assert all(set(rater) == set(NAMES) for rater in first[0])


def test_rated_demonstrations_are_others_than_sft_saw_or_their_number_is_another(tmp_path, monkeypatch):
    rng, prompts = random.Random(5), reviews.make_prompts("train", 10, 0)
    seen = [(prompt, reviews.write("crowd", prompt, rng)) for prompt in rng.choices(prompts, k=60)]
    write_json(tmp_path / "demonstrations.json", seen)
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    task = Task("reviews", {}, ratings={"train": [Demonstration("p", "a sample", {"humor": 3})], "test": []})
    config = harness.Config()
    rated, plain = loading.demonstrations(config, task, 40, 15)
    assert [row[:2] for row in rated + plain] == seen[:40] and len(rated) == 15
    assert all(set(row.attributes) == set(NAMES) for row in rated)
    assert not any(row.attributes for row in plain)
    truth = [reviews.attributes(*pair) for pair in seen[:15]]
    assert sum(row.attributes != levels for row, levels in zip(rated, truth)) > 10
    exact, _ = loading.demonstrations(replace(config, rating_noise=0.0), task, 15, 15)
    assert [row.attributes for row in exact] == truth
    assert loading.demonstrations(config, task, 40, 15)[0] == rated
    assert loading.demonstrations(replace(config, seed=1), task, 40, 15)[0] != rated
    assert loading.demonstrations(config, task, 10, 15) == (rated[:10], [])         # no more than there are
    assert loading.demonstrations(config, task, 40) == ([], [Demonstration(*pair) for pair in seen[:40]])
    assert loading.demonstrations(config, task, 0, 15) == (task.ratings["train"], [])


def test_demonstrations_of_a_file_come_twice_or_without_its_ratings(toy):
    rated = [Demonstration("p", "a", {"q": 1}), Demonstration("p", "b", {"q": 2})]
    rows = [Demonstration("p", "a", {"q": 1}), Demonstration("p", "c"), Demonstration("o", "a"),
            Demonstration("p", "b", {"q": 2}), Demonstration("o", "d")]
    task = Task("file", {}, ratings={"train": rated}, demonstrations={"train": rows})
    config = settings(toy)
    assert loading.demonstrations(config, task, 9, 1) == (rated, [rows[1], rows[2], rows[4]])
    assert loading.demonstrations(config, task, 2) == (rated, [rows[1], rows[2]])
    assert loading.demonstrations(config, task, 0) == (rated, [])
    assert loading.demonstrations(config, Task("file", {}), 3) == ([], [])


def test_model_before_sft_is_the_policy(toy, tied, tmp_path, monkeypatch):
    config = settings(toy, policy=str(tied))
    assert torch.equal(parameters(loading.load_base(config)), parameters(harness.load_policy(settings(toy))))
    assert not loading.load_base(config).config.tie_word_embeddings
    monkeypatch.setattr(build, "models", lambda config: tmp_path)
    harness.load_policy(config).save_pretrained(tmp_path / "base")
    base = loading.load_base(harness.Config(device="cpu", policy=str(toy)))
    assert torch.equal(parameters(base), parameters(harness.load_policy(config)))
    assert all(weight.requires_grad for weight in base.parameters())


# --------------------------------------------------------------------------------------------- levels by rank

def spread_over(counts, name, rng):
    """Levels in a random order, each as often as counts say."""
    levels = [level for level, n in enumerate(counts) for _ in range(n)]
    return [{name: level} for level in rng.sample(levels, len(levels))]


@pytest.mark.parametrize("counts", [
    [1, 2, 3, 4, 5, 5, 4, 3, 2, 1], [10] * 10, [30, 0, 0, 5, 0, 0, 1, 0, 0, 4],
    [0, 0, 20, 3, 7, 0, 9, 0, 0, 0], [0, 0, 0, 0, 0, 25, 0, 0, 0, 0]])
def test_levels_by_rank_come_more_often_than_in_the_ratings_or_fall_where_scores_rise(counts):
    rng = random.Random(sum(counts))
    ratings, scores = spread_over(counts, "x", rng), [rng.gauss(0, 0.1) + 0.5 for _ in range(sum(counts))]
    to_levels = harness.levels_by_rank(torch.tensor(scores)[:, None], ratings, 9)
    found = [row["x"] for row in to_levels(torch.tensor(scores)[:, None])]
    assert [found.count(level) for level in range(10)] == counts
    assert [level for _, level in sorted(zip(scores, found))] == sorted(found)
    others = torch.linspace(-9, 9, 500)[:, None]                             # scores of other responses
    levels = [row["x"] for row in to_levels(others)]
    assert levels == sorted(levels) and {type(level) for level in levels} == {int}
    given = [level for level in range(10) if counts[level]]
    assert levels[0] == given[0] and levels[-1] == given[-1]                      # both ends can be reached


def test_levels_by_rank_are_of_another_attribute_or_depend_on_the_scale_of_the_scores():
    rng = random.Random(0)
    a, b = spread_over([20, 10, 10], "a", rng), spread_over([5, 0, 15, 0, 20], "b", rng)
    ratings = [row | other for row, other in zip(b, a)]
    scores = torch.tensor([[rng.gauss(0, 1), rng.gauss(5, 3)] for _ in ratings])           # of a, then of b
    to_levels = harness.levels_by_rank(scores, ratings, 4)
    found = to_levels(scores)
    for name, column, counts in (("a", 0, [20, 10, 10, 0, 0]), ("b", 1, [5, 0, 15, 0, 20])):
        assert [sum(row[name] == level for row in found) for level in range(5)] == counts
        ranked = [found[i][name] for i in scores[:, column].argsort()]
        assert ranked == sorted(ranked)
    assert all(list(row) == ["a", "b"] for row in found)
    assert harness.levels_by_rank(scores.exp(), ratings, 4)(scores.exp()) == found
    assert to_levels(scores[3:5]) == found[3:5] and to_levels(scores[:0]) == []


# ------------------------------------------------------------------------------------------- ratings of files

def test_levels_are_no_shares_of_smaller_values_or_ties_come_apart():
    words = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    ten = preferences.rated([Ranking("p", ["w " * n for n in words[:4]], [0.5, -3.0, 9.0, 2.0]),
                             Ranking("q", ["w " * n for n in words[4:]], [7.0, 1.0, 2.5, 100.0, -9.0, 4.0])])
    assert [row.prompt for row in ten] == ["p"] * 4 + ["q"] * 6 and ten[1].response == "w w "
    assert [row.attributes["length"] for row in ten] == [*range(10)]
    assert [row.attributes["score"] for row in ten] == [2, 1, 8, 4, 7, 3, 5, 9, 0, 6]
    tied = preferences.rated([Ranking("p", ["a", "b c", "d", "e", "f", "g"], [1, 2, 1, 2, 2, 7])])
    assert [row.attributes["score"] for row in tied] == [0, 3, 0, 3, 3, 8]       # 0, 2 and 5 of 6 are smaller
    assert [row.attributes["length"] for row in tied] == [0, 8, 0, 0, 0, 0]
    many = preferences.rated([Ranking("p", [str(i) for i in range(37)], [float(i) for i in range(37)])])
    assert [row.attributes["score"] for row in many] == [10 * i // 37 for i in range(37)]
    assert all(type(level) is int for row in (*ten, *tied, *many) for level in row.attributes.values())
    assert preferences.rated([]) == []


def load(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return preferences.load(str(tmp_path / "rows.jsonl"))


def test_ratings_of_a_file_land_in_the_wrong_split_or_among_the_unrated(tmp_path):
    rows = [{"prompt": f"p{i // 3}", "completion": f"r{i}"} | ({"attributes": {"q": i % 5}} if i % 4 else {})
            for i in range(60)]
    task = load(tmp_path, rows)
    assert set(task.ratings) == {"train", "test"} and all(task.ratings.values())
    assert task.demonstrations != task.ratings
    for split, found in task.ratings.items():
        known = set(task.prompts[split])
        assert found == [Demonstration(row["prompt"], row["completion"], row["attributes"]) for row in rows
                         if "attributes" in row and row["prompt"] in known]
    assert sum(map(len, task.ratings.values())) == 45
    assert load(tmp_path,
                [{"prompt": p, "completion": "r"} for p in "pq"]).ratings == {"train": [], "test": []}
    assert load(tmp_path, [{"prompt": p} for p in "pq"]).ratings == {}


def test_scores_of_test_prompts_move_the_levels_of_train_prompts(tmp_path):
    rows = [{"prompt": f"p{i}", "responses": ["a", "b c"], "scores": [i, -i - 0.5]} for i in range(30)]
    task = load(tmp_path, rows)
    assert task.ratings == {split: preferences.rated(task.rankings[split]) for split in ("train", "test")}
    assert len(task.ratings["train"]) == 2 * len(task.prompts["train"]) and len(task.prompts["train"]) < 30
    pairs = load(tmp_path, [{"prompt": p, "chosen": "good one", "rejected": "bad"} for p in "pqr"])
    assert {(row.response, *row.attributes.values())
            for row in pairs.ratings["train"]} == {("good one", 5, 5), ("bad", 0, 0)}


# ---------------------------------------------------------------------------------------------------- figures

def axes():
    figure = pytest.importorskip("matplotlib.figure")
    return figure.Figure().subplots()


def bars_of(ax):
    """{label: [(x, y, lower, upper)]} of the error bars."""
    found = {}
    for container in ax.containers:
        line, _, (bars,) = container.lines
        ends = [(low[1], high[1]) for low, high in bars.get_segments()]
        found[container.get_label()] = [(x, y, *end) for x, y, end in zip(*line.get_data(), ends)]
    return found


def steered(*values):
    """A run for each of the values: {"followed": rows that ask for 0 and 3}."""
    return {seed: {"followed": [{"asked": 0, "a": value, "b": 1.0}, {"asked": 3, "a": value + 2, "b": None}]}
            for seed, value in enumerate(values)}


PANEL = dict(kind="curve", curve="followed", x="asked", y=["a"])


def test_curve_is_no_mean_over_seeds_or_its_interval_is_another():
    ax = axes()
    figures.draw_curve(ax, PANEL, {"first": steered(1.0, 2.0, 3.0), "one": steered(5.0)},
                       {"first": "red", "one": "blue"})
    half, found = referee_statistics.t_interval([1.0, 2.0, 3.0])[1], bars_of(ax)
    assert half > 2 and list(found) == ["first", "one"]
    assert found["first"] == [pytest.approx(row)
                              for row in ((0, 2, 2 - half, 2 + half), (3, 4, 4 - half, 4 + half))]
    assert found["one"] == [(0, 5, 5, 5), (3, 7, 7, 7)]             # one seed has no interval
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first", "one"]
    assert [container.lines[0].get_color() for container in ax.containers] == ["red", "blue"]


def test_curve_without_data_crashes_or_draws_what_was_not_measured():
    runs = steered(1.0, 2.0)
    runs[7] = {"seconds": 1.0}                       # of an arm without conditioning, or before it was stored
    runs[8] = {"followed": []}
    ax = axes()
    figures.draw_curve(ax, PANEL | {"y": ["a", "b", "c"]}, {"arm": runs, "not run": {}},
                       {"arm": "red", "not run": "black"})
    assert {name: [(x, y) for x, y, *_ in rows] for name, rows in bars_of(ax).items() if rows} == {
        "arm: a": [(0, 1.5), (3, 3.5)], "arm: b": [(0, 1.0)]}


@pytest.mark.filterwarnings("ignore:No artists with labels")
@pytest.mark.parametrize("stored", ["all", "no curve", "no run"])
def test_figure_with_curves_is_not_drawn_or_crashes_where_runs_are_missing(stored, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread
    method, called = types.ModuleType("conditioned"), []
    method.EXPERIMENTS = {"steering": dict(question="What follows?", arms={"steered": {}, "plain": {}},
                                           claims=[], panels=[
PANEL | dict(arms=["steered"], title="what came"), PANEL | dict(y=["a", "b"])])}
    monkeypatch.setitem(sys.modules, "experiments.conditioned", method)
    for name in ("draw_curve", "draw_grid", "draw_lines"):
        def note(*args, draw=getattr(figures, name), name=name):
            called.append((name, list(args[2])))
            draw(*args)

        monkeypatch.setattr(figures, name, note)
    trace = {"trace": [{"step": 0}, {"step": 1}]}
    runs = {seed: run | trace for seed, run in steered(1.0, 2.0).items()}
    found = {"all": {"steered": runs, "plain": {0: trace}}, "no curve": {"steered": {0: trace}, "plain": {}},
             "no run": {"steered": {}, "plain": {}}}[stored]
    figures.draw("conditioned", {"best_of_n": {}}, {"steering": found}, tmp_path / "figure.png")
    assert called == [("draw_curve", ["steered"]), ("draw_curve", ["steered", "plain"])]
    image = imread(tmp_path / "figure.png")[..., :3]
    assert image.shape[1] == pytest.approx(1600, abs=2)
    last = image[:, image.shape[1] // 2:].reshape(-1, 3)
    strong = (last.max(1) - last.min(1) > 0.3).mean()               # colour in the last panel
    assert strong > 0.005 if stored == "all" else strong == 0


def test_what_measures_the_labels_is_a_cost(toy, tmp_path):
    run, row = begun(toy, tmp_path), SimpleNamespace(prompt="a", responses=["b"], levels={"x": 1})

    def predict(prompts, responses):
        run.counts["tokens_scored_reward"] += 9
        return [{"x": 3}]

    assert harness.label_errors(run, [], [], [row], predict, None) == {"eval/predictor_error": 2}
    assert run.counts["tokens_scored_reward"] == 0
