"""steerlm.py: tags, ratings, prediction model, training, bootstrapping, steering. Letters are bug classes."""
import json
import math
import os
import random
import statistics
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM

import common
import harness
import steerlm
import tasks
from common import UserError
from conftest import killed_after, parameters, sgd, tensor
from harness import asking, conditioning
from harness.conditioning import rated_rows, rating_error
from harness.evaluation import extend_vocabulary
from steerlm import Sample, best_of, format_attributes, parse_attributes, rate_anew
from tasks import Demonstration, Task

PROMPTS = ["ef", "g", "hh", "fge", "eh", "gf"]


def counts(text):
    """Attributes that can be read off the letters."""
    return {"as": min(text.count("a"), 9), "bs": min(text.count("b"), 9)}


def exact(prompts, responses):
    return [counts(text) for text in responses]


def rated(n, seed=0, prompts=PROMPTS, longest=8):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcd", k=rng.randint(1, longest))) for _ in range(n)]
    return [Demonstration(prompts[i % len(prompts)], text, counts(text)) for i, text in enumerate(texts)]


def task(train=24, attributes=None, prompts={"train": PROMPTS, "test": ["d", "ee"]}, **kwargs):
    data = {"train": rated(train) if isinstance(train, int) else train, "test": rated(6, 1, ["d", "ee"])}
    return Task("toy", prompts, **{**dict(ratings=data, attributes=attributes), **kwargs})


def settings(toy, **kwargs):
    return steerlm.Config(**{**dict(policy=str(toy), data="toy.jsonl", max_length=64, max_new_tokens=4,
                                    lr=1e-2, batch_size=4,
                                    epochs=1.0, predictor_lr=1e-2, predictor_epochs=1.0, bootstrap_epochs=1.0,
                                    rounds=1, start="policy", quality="as", eval_prompts=2, eval_samples=1,
                                    save_every=0, device="cpu", quiet=True), **kwargs})


def begun(toy, out, data=None, **kwargs):
    """A Run whose policy reads the tags of as and bs."""
    config = settings(toy, **kwargs)
    out.mkdir()
    torch.manual_seed(config.seed)
    run = harness.Run(config, out, data or task(), harness.load_tokenizer(config),
                      harness.load_policy(config), {})
    harness.add_tags(run, {name: {f"<{name}:{level}>": [] for level in range(10)} for name in ("as", "bs")})
    return run


# ----------------------------------------------------------------------------------------------- tags as text

def test_tags_do_not_round_trip_or_follow_the_order_of_the_dict():
    rng = random.Random(0)
    for _ in range(200):
        names = rng.sample(["quality", "humor", "B", "a_1", "not-toxic", "z", "ä"], rng.randint(1, 7))
        levels = {name: rng.randint(0, 9) for name in names}
        text = format_attributes(levels)
        assert parse_attributes(text) == levels
        assert format_attributes(dict(rng.sample(list(levels.items()), len(levels)))) == text
        assert text == "".join(f"<{name}:{levels[name]}>" for name in sorted(names))
    assert format_attributes({"quality": 9, "humor": 0}) == "<humor:0><quality:9>"


@pytest.mark.parametrize("wrong", [
    {"a": 10}, {"a": -1}, {"a": True}, {"a": 3.0}, {"a": "3"}, {"a": None}, {"": 3}, {"a b": 3}, {"a:": 3},
    {"a>": 3}, {"a\n": 3},
    {"fine": 3, "a": 11}])
def test_level_or_name_that_cannot_be_read_back_is_written(wrong):
    with pytest.raises(UserError, match="is no attribute"):
        format_attributes(wrong)


@pytest.mark.parametrize("wrong", [
    "", " ", "a:3", "<a:3> ", " <a:3>", "x<a:3>", "<a:3>x", "<a:3>\n", "<a:3> <b:1>", "<b:1><a:3>",
    "<a:3><a:3>", "<a:3><a:4>",
    "<a:10>", "<a:>", "<:3>", "<a:-1>", "<a:\u0663>", "<a:3", "<a:3><b:1", "<<a:3>>", "<a:3.0>"])
def test_text_that_format_attributes_never_wrote_is_read(wrong):
    with pytest.raises(UserError, match="is no row of tags"):
        parse_attributes(wrong)


# ---------------------------------------------------------------------------------------------------- ratings

def test_rows_lose_their_ratings_or_attributes_that_were_not_asked_for_stay(toy):
    rows = [Demonstration("g", "ab", {"z": 1, "as": 2, "bs": 3}),
            Demonstration("h", "b", {"as": 4, "bs": 5, "z": 0})]
    assert rated_rows(task(rows), "train", settings(toy).attributes) == rows
    some = rated_rows(task(rows), "train", settings(toy, attributes=" z, as").attributes)
    assert [row[:2] for row in some] == [("g", "ab"), ("h", "b")]
    assert [row.attributes for row in some] == [{"z": 1, "as": 2}, {"z": 0, "as": 4}]
    assert rated_rows(Task("toy", {}), "test", settings(toy).attributes) == []
    assert steerlm.Config().attributes == "sentiment,topicality,verbosity" and settings(toy).attributes == ""


def test_missing_or_constant_attribute_or_no_ratings_at_all_pass(toy, capsys):
    rows = [Demonstration("g", "a", {"as": 1, "bs": 2}), Demonstration("hgh", "b", {"as": 1, "bs": 3})]
    for split in ("train", "test"):
        both = task(ratings={"train": rows, "test": rows})
        assert [row.attributes for row in rated_rows(both, split)] == [{"bs": 2}, {"bs": 3}]
    assert capsys.readouterr().err == ("warning: as is 1 in all 2 responses: nothing to steer by, so it is "
                                       "left out\n")
    for asked in ("as,bs", "as"):
        with pytest.raises(UserError, match="as is 1 in all 2 responses"):
            rated_rows(task(rows), "train", asked)
    with pytest.raises(UserError, match="as is 1 in all 2 responses"):
        rated_rows(task([row._replace(attributes={"as": 1}) for row in rows]), "train")
    assert len(rated_rows(task(rows), "train", "bs")) == 2
    same = task(ratings={"train": rated(9), "test": rows})
    assert len(rated_rows(same, "test")) == 2                       # only what is trained on must vary
    lacking = rows + [Demonstration("hgh", "b", {"as": 3})]
    for attributes in ("", "as,bs"):
        with pytest.raises(UserError, match="'hgh' has no attribute 'bs'"):
            rated_rows(task(lacking), "train", attributes)
    with pytest.raises(UserError, match="'g' has no attribute 'cs'"):
        rated_rows(task(rows), "train", "as,cs")
    for level in (-1, 10):
        with pytest.raises(UserError, match=f"as is {level} in a response to 'f': levels go from 0 to 9"):
            rated_rows(task(rows + [Demonstration("f", "c", {"as": level, "bs": 0})]), "train")
    for ratings in ({}, {"train": [], "test": rows}):
        with pytest.raises(UserError, match="the data has no ratings"):
            rated_rows(task(ratings=ratings), "train")


def test_ratings_do_not_become_samples_that_end_or_missing_ones_pass(whole):
    data = task([Demonstration("g", "ab", {"z": 1, "as": 2, "bs": 3}),
                 Demonstration("h", "b", {"as": 4, "bs": 5, "z": 0})])
    for attributes, ends in (("", ["<as:2><bs:3><z:1>", "<as:4><bs:5><z:0>"]),
                             (" z, as", ["<as:2><z:1>", "<as:4><z:0>"])):
        data.ratings["test"] = []
        whole(f"run{attributes}", data, attributes=attributes, batch_size=2, **HUMAN)
        rows = [row for step in steps_of(whole) for row in step.rows]
        assert sorted((row.prompt, row.responses, row.ended) for row in rows) == [
            ("g" + ends[0], ["ab"], [True]), ("h" + ends[1], ["b"], [True])]
    with pytest.raises(UserError, match="'g' has no attribute 'cs'"):
        whole("missing", data, attributes="as,cs", **HUMAN)


def test_other_attributes_than_the_known_or_named_ones_stand_for_quality(toy):
    def quality(names, flag=""):
        return harness.quality_of(settings(toy, quality=flag), names.split())

    assert quality("humor quality score") == ["quality"] and quality("length score") == ["score"]
    assert quality("sentiment topicality verbosity") == ["sentiment", "topicality"]
    assert quality("humor quality", "humor") == ["humor"] and quality("a b c", "c,a") == ["c", "a"]
    for names, flag in (("humor length", ""), ("sentiment verbosity", ""), ("a b", "a,c"), ("a b", "quality"),
                        ("a", ",")):
        with pytest.raises(UserError, match="--quality must name"):
            quality(names, flag)


def test_best_samples_are_more_than_one_in_a_hundred_or_ties_are_broken():
    def best(levels, quality=("q",)):
        return best_of([Sample("g", ["a"], [True], row) for row in levels], list(quality))

    assert best([{"q": 3}, {"q": 7}, {"q": 5}]) == [{"q": 7}]
    assert best([{"q": 7, "v": i % 3} for i in range(5)]
                + [{"q": 6, "v": 9}]) == [{"q": 7, "v": i % 3} for i in range(5)]
    order = random.Random(0).sample(range(250), 250)  # the third best of 250 is what one in a hundred reaches
    assert sorted(row["q"] for row in best([{"q": q} for q in order])) == [247, 248, 249]
    assert sorted(row["q"] for row in best([{"q": min(q, 246)} for q in order])) == [246] * 4
    assert [row["q"] for row in best([{"q": q} for q in range(99)])] == [98]
    both = [{"a": 9, "b": 0, "c": 9}, {"a": 5, "b": 5, "c": 0}, {"a": 0, "b": 9, "c": 9}]
    assert best(both, "ab") == [both[1]] and best(both, "a") == [both[0]] and best(both, "bc") == [both[2]]


# --------------------------------------------------------------------------------------- the prediction model

def train_predictor(run, samples):
    """Step 1, in the form that --predictor names."""
    return {"lm": steerlm.train_writer,
            "regression": steerlm.train_regression}[run.config.predictor](run, samples)


@pytest.mark.parametrize("predictor, epochs", [("regression", 12.0), ("lm", 16.0)])
def test_prediction_model_is_no_better_than_a_constant_or_mixes_them_up_or_trains_the_policy(
        toy, tmp_path, predictor, epochs):
    rows, held_out = ([Sample(row.prompt, [row.response], [True], row.attributes) for row in rated(n, seed)]
                      for n, seed in ((192, 2), (96, 3)))
    run = begun(toy, tmp_path / "run", predictor=predictor, predictor_epochs=epochs)
    before = parameters(run.policy)
    predict = train_predictor(run, rows)
    assert torch.equal(parameters(run.policy), before)
    came = predict([row.prompt for row in held_out], [row.responses[0] for row in held_out])
    read = [(new, row.levels) for new, row in zip(came, held_out) if new]
    assert len(read) > 0.9 * len(held_out)
    for name in ("as", "bs"):
        middle = statistics.median(row.levels[name] for row in rows)
        error = statistics.fmean(abs(new[name] - levels[name]) for new, levels in read)
        assert error < 0.7 * statistics.fmean(abs(middle - levels[name]) for _, levels in read)
        assert {type(new[name]) for new, _ in read} == {int}


def test_regression_targets_are_not_levels_over_nine_or_errors_are_not_summed_over_attributes(
        toy, tmp_path, monkeypatch):
    run = begun(toy, tmp_path / "run", token_budget=40)
    tokenizer, made, bounds = harness.load_tokenizer(run.config), [], []
    samples = [Sample(row.prompt, [row.response], [True], row.attributes) for row in rated(40, 4)]

    def fresh(*args, num_labels=2):
        assert num_labels == 2
        torch.manual_seed(3)
        made.append(AutoModelForSequenceClassification.from_pretrained(toy, num_labels=2))
        return made[-1]

    def unclipped(parameters, bound):                       # clipping would hide the scale of the gradient
        bounds.append(bound)

    initial, plain = parameters(fresh()), fresh()
    steps = harness.shuffled_batches(40, 1.0, 32, run.config.seed)
    for indices in steps:
        optimizer, _ = sgd(plain, None, None)
        for row in (samples[i] for i in indices):
            ids = torch.tensor([tokenizer(row.prompt + row.responses[0]).input_ids + [0]])
            scores = plain.score(plain.base_model(input_ids=ids).last_hidden_state[0, -1])
            targets = torch.tensor([row.levels[name] / 9 for name in ("as", "bs")])
            ((scores - targets).square().sum() / len(indices)).backward()
        optimizer.step()
        optimizer.zero_grad()
    monkeypatch.setattr(common, "load", fresh)
    monkeypatch.setattr(common, "adamw", sgd)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", unclipped)
        steerlm.train_regression(run, samples)
    assert bounds == [1.0, 1.0] and (parameters(made[-1]) - parameters(plain)).abs().max() < 2e-6
    assert (parameters(plain) - initial).abs().max() > 1e-3 and (parameters(plain) - initial).norm() > 0.022
    steerlm.train_regression(run, samples[:8])              # one step, now clipped to norm 1
    assert (parameters(made[-1]) - initial).norm().item() == pytest.approx(0.01, rel=1e-2)


def test_regression_is_not_trained_as_its_options_say(toy, tmp_path, monkeypatch):
    run = begun(toy, tmp_path / "run", predictor_lr=3e-3, predictor_epochs=1.5, seed=4)
    seen, adamw, batches, rows = [], common.adamw, common.batches, rated(48)

    def note(model, lr, steps, schedule, warmup):
        seen.append((lr, steps, schedule, warmup))
        return adamw(model, lr, steps, schedule, warmup)

    def note_batch(tokenizer, prompts, responses, budget, device):
        seen.append([*zip(prompts, (text for text, in responses))])
        return batches(tokenizer, prompts, responses, budget, device)

    monkeypatch.setattr(common, "adamw", note)
    monkeypatch.setattr(common, "batches", note_batch)
    steerlm.train_regression(run,
                             [Sample(row.prompt, [row.response], [True], row.attributes) for row in rows])
    assert seen[0] == (3e-3, 3, "cosine", 0.1) and [len(step) for step in seen[1:]] == [32, 32, 8, 48]
    order = sum(harness.shuffled_batches(48, 1.5, 32, 4), [])
    assert sum(seen[1:4], []) == [rows[i][:2] for i in order]
    assert seen[4] == [row[:2] for row in rows]             # scored once more, to rank what is rated later


def test_AD_regression_steps_on_a_loss_that_is_not_finite(toy, tmp_path, monkeypatch):
    run, scores = begun(toy, tmp_path / "run"), common.sequence_scores
    samples = [Sample(row.prompt, [row.response], [True], row.attributes) for row in rated(8)]
    monkeypatch.setattr(common, "sequence_scores", lambda *args: scores(*args) * math.nan)
    with pytest.raises(UserError, match="step 1: loss is nan for the prompt .*; lower --predictor_lr"):
        steerlm.train_regression(run, samples)


SCORES = {"a": (0.3, 0.5), "b": (0.1, 0.6), "c": (0.4, 0.1), "d": (0.2, 0.9), "e": (-5.0, 9.0),
          "f": (0.31, 0.65), "g": (0.39, 0.3)}


class Fake:
    """Stands in for a regression head on two attributes; it reads a token for each text."""
    tokens = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, prompts, responses):
        self.tokens += len(responses)
        return torch.tensor([SCORES[text] for text in responses])


def test_regression_predicts_levels_that_are_no_ranks_or_of_another_attribute_or_costs_nothing(
        toy, tmp_path, monkeypatch):
    levels = [{"bs": 1, "as": 2}, {"as": 0, "bs": 1}, {"as": 9, "bs": 0}, {"bs": 5, "as": 2}]
    run = begun(toy, tmp_path / "run")
    samples = [Sample("g", [text], [True], row) for text, row in zip("abcd", levels)]
    seen, plain = [], torch.tensor

    def note(values, **kwargs):
        seen.append(values)
        return plain(values, **kwargs)

    monkeypatch.setattr(common, "RewardModel", lambda model, tokenizer, label: Fake(tokenizer))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", note)
        predict = train_predictor(run, samples)
    assert [[2 / 9, 1 / 9], [0, 1 / 9], [1, 0], [2 / 9, 5 / 9]] in seen                # as first, then bs
    assert run.counts["tokens_scored_reward"] == 0
    came = predict([*"ggggggg"], [*"abcdefg"])
    # by as: b, d, a, c have the levels 0, 2, 2, 9; by bs: c, a, b, d have 0, 1, 1, 5
    assert came[:4] == [{"as": 2, "bs": 1}, {"as": 0, "bs": 1}, {"as": 9, "bs": 0}, {"as": 2, "bs": 5}]
    assert came[4:] == [{"as": 0, "bs": 5}, {"as": 2, "bs": 1}, {"as": 9, "bs": 0}]
    assert {type(level) for levels in came for level in levels.values()} == {int}
    assert run.counts["tokens_scored_reward"] == 7
    monkeypatch.setitem(SCORES, "a", (math.nan, 0.0))
    with pytest.raises(UserError, match="the reward is nan for the prompt 'culprit'"):
        predict(["g", "culprit"], ["b", "a"])


def test_writer_is_trained_on_more_than_the_tags_after_prompt_and_response(toy, tmp_path, monkeypatch):
    run, seen, real = begun(toy, tmp_path / "run", predictor="lm"), [], common.sequence_logps

    def texts(batch, masks):
        return run.tokenizer.batch_decode([ids[mask.bool()] for ids, mask in zip(batch.input_ids, masks)])

    def note(model, batch):
        shown = batch.attention_mask * (1 - batch.response_mask)
        seen.extend(zip(texts(batch, shown), texts(batch, batch.response_mask)))
        return real(model, batch)

    monkeypatch.setattr(common, "sequence_logps", note)
    rows = rated(12)
    train_predictor(run, [Sample(row.prompt, [row.response], [True], row.attributes) for row in rows])
    assert sorted(seen) == sorted((row.prompt + row.response, format_attributes(row.attributes) + "<eos>")
                                  for row in rows)


def test_unreadable_output_of_the_writer_is_taken_for_a_rating(toy, tmp_path, monkeypatch):
    run, samples = begun(toy, tmp_path / "run",
                         predictor="lm"), [Sample("g", ["ab"], [True], {"bs": 1, "as": 2})]
    predict, asked = train_predictor(run, samples), []
    texts = ["<as:3><bs:1>", "<as:3>", "<bs:1><as:3>", "<as:3><bs:1>x", "", "<as:3><bs:1><bs:1>",
             "a<as:3><bs:1>", "<as:3><cs:1>"]

    def note(model, tokenizer, prompts, **kwargs):
        asked.append((prompts, kwargs["greedy"], kwargs["max_new_tokens"]))

    monkeypatch.setattr(common, "generate", note)
    monkeypatch.setattr(common, "decode", lambda *_: texts)
    assert predict(["g"] * 8, [*"abcdefgh"]) == [{"as": 3, "bs": 1}] + [None] * 7
    assert asked == [(["g" + letter for letter in "abcdefgh"], True, 3)]              # two tags and their EOS


def test_samples_that_cannot_be_rated_stay_with_people_s_levels_or_leave_unsaid(capsys):
    samples = [Sample("g", [text], [True], {"as": 8}) for text in "abc"]
    said = {"a": {"as": 1}, "b": None, "c": {"as": 0}}
    kept = rate_anew(lambda prompts, texts: [said[text] for text in texts], samples)
    assert kept == [Sample("g", ["a"], [True], {"as": 1}), Sample("g", ["c"], [True], {"as": 0})]
    assert "1 of 3 ratings" in capsys.readouterr().err
    varied = [{"as": 2}, {"as": 3}, {"as": 2}]
    assert [row.levels for row in rate_anew(lambda *texts: varied,
                                            samples)] == varied and not capsys.readouterr().err
    assert len(rate_anew(lambda *texts: [{"as": 2}] * 3, samples)) == 3
    assert "says as 2 of all 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="no readable rating"):
        rate_anew(lambda prompts, texts: [None] * 3, samples)


def test_rating_error_is_not_the_mean_distance_in_levels_of_those_that_were_told():
    rows = [Sample("g", ["a"], [True], {"x": 1, "y": 9}), Sample("h", ["b"], [True], {"x": 0, "y": 4}),
            Sample("f", ["c"], [True], {"x": 9, "y": 9})]
    truth = {("g", "a"): {"x": 4, "y": 7}, ("h", "b"): {"x": 0, "y": 5}, ("f", "c"): None}
    assert rating_error(rows,
                        lambda *texts: [truth[pair]
                                        for pair in zip(*texts)]) == pytest.approx((3 + 2 + 0 + 1) / 4)
    assert math.isnan(rating_error(rows, lambda *texts: [None] * 3))


# --------------------------------------------------------------------------------------------------- training

@pytest.fixture
def whole(toy, tmp_path, monkeypatch):
    """A run of steerlm.py, where `predict` stands in for the trained prediction model.

    Returns its result, metrics.jsonl, attributes.json, the saved weights; and as `run.events` what was rolled
    out and trained on, with the weights then.
    """
    rollout, microbatches = harness.rollout, harness.Run.microbatches

    def note_rollout(run_, prompts):
        _, texts, ended = rollout(run_, prompts)
        run.events.append(SimpleNamespace(kind="rollout", weights=parameters(run_.policy), prompts=prompts,
                                          texts=texts,
                                          ended=ended))
        return None, texts, ended

    def note_step(run_, rows):                                      # called once a step
        event = SimpleNamespace(kind="step", weights=parameters(run_.policy), rows=rows, batches=[], run=run_,
                                rate=run_.optimizer.param_groups[0]["lr"])
        run.events.append(event)
        for part, batch in microbatches(run_, rows):
            event.batches.append(([rows[i] for i in part], batch))
            yield part, batch

    def run(name, data=None, predict=exact, **kwargs):
        config, run.events = settings(toy, out=str(tmp_path / name), **kwargs), []
        data = data or task()
        with monkeypatch.context() as patch:
            patch.setattr(harness.loading, "load_task", lambda config: data)
            patch.setattr(harness.command_line, "load_rewards", lambda config, task: {})
            patch.setattr(harness, "rollout", note_rollout)
            patch.setattr(harness.Run, "microbatches", note_step)
            if predict:
                patch.setattr(steerlm, "train_regression", lambda run, samples: predict)
                patch.setattr(steerlm, "train_writer", lambda run, samples: predict)
            result = harness.launch(steerlm.train, config)
        out = tmp_path / name
        saved = out / "attributes.json"
        return SimpleNamespace(result=result, metrics=(out / "metrics.jsonl").read_text(encoding="utf-8"),
                               out=out,
                               saved=json.loads(saved.read_text(encoding="utf-8")) if saved.exists()
                               else None,
                               weights=parameters(LlamaForCausalLM.from_pretrained(out)))

    return run


def steps_of(whole):
    return [event for event in whole.events if event.kind == "step"]


def trained_on(whole):
    return Counter((row.prompt, *row.responses) for step in steps_of(whole) for row in step.rows)


HUMAN = dict(labels="human", rounds=0)


def test_rows_are_trained_with_other_tags_than_their_labels(whole):
    rows = task().ratings["train"]
    mild = {row.response: {"as": 9 - row.attributes["as"], "bs": 7} for row in rows}
    for name, options, label in (("human", HUMAN, lambda row: row.attributes),
                                 ("predicted", dict(rounds=0), lambda row: mild[row.response])):
        whole(name, predict=lambda prompts, texts: [mild.get(text, counts(text)) for text in texts],
              **options)
        assert trained_on(whole) == Counter((row.prompt + format_attributes(label(row)), row.response)
                                            for row in rows)
    whole("none", labels="none", rounds=0)
    assert trained_on(whole) == Counter((row.prompt, row.response) for row in rows)


UNRATED = [Demonstration("fe", "aab"), Demonstration("e", "b"), Demonstration("ff", "cd"),
           Demonstration("gg", "aaaa"), Demonstration("h", "bdb")]


def test_demonstrations_without_ratings_are_left_out_or_too_many_or_trained_without_their_labels(whole):
    rated_rows = task().ratings["train"]
    every = task(demonstrations={"train": rated_rows + UNRATED})
    guessed = {row.response: {"as": 9 - counts(row.response)["as"], "bs": 3} for row in rated_rows + UNRATED}

    def predict(prompts, texts):
        return [guessed.get(text, counts(text)) for text in texts]

    for n in (0, 3, 5, 99):
        whole(f"{n}", every, predict, rounds=0, demonstrations=n, batch_size=1)
        assert trained_on(whole) == Counter((prompt + format_attributes(guessed[text]), text)
                                            for prompt, text, _ in rated_rows + UNRATED[:n])
    whole("human", every, predict, batch_size=1, **HUMAN)               # people have rated the others only
    assert trained_on(whole) == Counter((row.prompt + format_attributes(row.attributes), row.response)
                                        for row in rated_rows)
    whole("none", every, predict, labels="none", rounds=0, batch_size=1)
    assert trained_on(whole) == Counter(row[:2] for row in rated_rows + UNRATED)
    best = sorted(rated_rows, key=lambda row: -row.attributes["as"])[:6]
    whole("best", every, predict, labels="none", rounds=0, batch_size=1, share=0.25)
    assert trained_on(whole) == Counter(row[:2] for row in best)


def test_step_3_starts_from_another_model_or_before_is_that_of_the_base(whole, toy, monkeypatch):
    def fresh(config, policy=None):
        model = harness.load_policy(settings(toy))
        torch.manual_seed(7)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        return model

    monkeypatch.setattr(harness, "load_base", fresh)
    tags = {name: {f"<{name}:{level}>": [row.response for row in task().ratings["train"]
                                         if row.attributes[name] == level] for level in range(10)}
            for name in ("as", "bs")}
    rows = {}
    for start, load in (("base", fresh), ("policy", lambda config: harness.load_policy(settings(toy)))):
        result = whole(start, start=start, **HUMAN).result
        rows[start] = [{name: value for name, value in row.items() if "seconds" not in name}
                       for row in result["trace"]]
        plain = SimpleNamespace(policy=load(None), task=task(),
                                tokenizer=harness.load_tokenizer(settings(toy)))
        harness.add_tags(plain, tags)
        assert torch.equal(steps_of(whole)[0].weights, parameters(plain.policy))
    assert rows["base"][0] == rows["policy"][0] and rows["base"][0]["eval/kl"] == 0     # of the policy, both
    assert rows["base"][1]["eval/kl"] > 0 != rows["policy"][1]["eval/kl"] != rows["base"][1]["eval/kl"]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_learning_rate_of_a_round_goes_on_with_that_of_the_one_before(whole, schedule):
    whole("run", rounds=2, schedule=schedule, warmup=0.4)
    steps, want = steps_between(whole.events), []
    for n in steps:
        optimizer, alone = common.adamw(torch.nn.Linear(1, 1), 1e-2, n, schedule, 0.4)
        for _ in range(n):
            want.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            alone.step()
    assert steps == [6, 3, 3] and [step.rate for step in steps_of(whole)] == pytest.approx(want)
    assert want[0] == want[6] == want[9] == 0 and max(want) == 1e-2


def test_loss_falls_on_tags_or_a_step_is_no_mean_over_its_rows(whole, toy, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    for name, options in (("a", dict(token_budget=40)), ("b", {})):
        finished = whole(name, max_new_tokens=2, rounds=1, max_grad_norm=1e9, **options)
        first = steps_of(whole)[0]
        plain, tokenizer = LlamaForCausalLM.from_pretrained(toy), first.run.tokenizer
        plain.resize_token_embeddings(len(tokenizer))
        torch.nn.utils.vector_to_parameters(first.weights.clone(), plain.parameters())
        ends = set()
        for step in steps_of(whole):
            assert (parameters(plain) - step.weights).abs().max() < 2e-6 and len(step.rows) == 4
            for row in step.rows:
                tags = format_attributes(counts(row.responses[0]))
                prompt = [tokenizer.get_vocab()[letter] for letter in row.prompt.removesuffix(tags)] + [
                    tokenizer.get_vocab()[tag + ">"] for tag in tags.split(">")[:-1]]
                answer = tokenizer(row.responses[0]).input_ids + [0] * (row.ended[0])
                ends.add(row.ended[0])
                logps = plain(input_ids=torch.tensor([prompt
                                                      + answer])).logits[0].log_softmax(1)[len(prompt) - 1:-1]
                (-logps.gather(1, torch.tensor(answer)[:, None]).sum() / len(step.rows)).backward()
            optimizer, _ = sgd(plain, None, None)
            optimizer.step()
            optimizer.zero_grad()
        assert (parameters(plain) - finished.weights).abs().max() < 2e-6 and ends == {True, False}
        assert (parameters(plain) - first.weights).abs().max() > 1e-3


@pytest.mark.parametrize("bound", [1e-2, 1e9])
def test_gradient_is_not_clipped_or_the_clipped_norm_is_logged(bound, whole, monkeypatch):
    monkeypatch.setattr(common, "adamw", sgd)
    finished = whole("run", task(4), max_grad_norm=bound, **HUMAN)
    (step,), (row,) = steps_of(whole), [row for row in map(json.loads, finished.metrics.splitlines())
                                        if "loss" in row]
    moved = (finished.weights - step.weights).norm().item()
    assert row["grad_norm"] > 0.1 and moved == pytest.approx(0.01 * min(bound, row["grad_norm"]), rel=1e-2)


def test_share_keeps_others_than_the_best_by_quality(whole):
    rows = task().ratings["train"]
    for name, share, n in (("as", 0.25, 6), ("as", 0.01, 1), ("bs", 0.5, 12)):
        finished = whole(f"{name} {share}", quality=name, share=share, **HUMAN)
        kept = [parse_attributes(prompt[prompt.index("<"):])[name] for prompt, _ in trained_on(whole)]
        assert sorted(kept) == sorted(row.attributes[name]
                                      for row in rows)[-n:] and sum(finished.saved["observed"].values()) == n


def test_policy_is_asked_in_other_bytes_than_it_was_trained_with(whole, monkeypatch):
    asked, generate = [], common.generate
    monkeypatch.setattr(common, "generate", lambda model, tokenizer, prompts, *rest,
                        **kwargs: asked.append(prompts) or generate(
model, tokenizer, prompts, *rest, **kwargs))
    finished = whole("run", **HUMAN)
    assert asked == [["d", "ee"], ["d" + finished.saved["asked"], "ee" + finished.saved["asked"]]]
    ask, tokenizer = steps_of(whole)[0].run.ask, steps_of(whole)[0].run.tokenizer
    levels = parse_attributes(finished.saved["asked"])
    with_them = [row for row in task().ratings["train"] if row.attributes == levels]
    assert with_them and all(trained_on(whole)[ask(row.prompt), row.response] for row in with_them)
    assert len(tokenizer(ask("ef")).input_ids) == 4
    asked.clear()
    assert whole("none", labels="none", rounds=0).saved is None and asked == [["d", "ee"]] * 2
    assert steps_of(whole)[0].run.ask("d") == "d"


def test_number_of_steps_depends_on_what_could_be_rated(whole):
    for n, kwargs, expected in ((24, dict(rounds=2), [6, 3, 3]),
                                (22, dict(epochs=1.5, rounds=1, bootstrap_epochs=0.5), [9, 2]),
                                (24, dict(epochs=0.0, rounds=1), [0, 3])):
        whole(f"{n}{kwargs}", task(n), **kwargs)
        assert steps_between(whole.events) == expected

    def gaps(prompts, texts):
        return [None if i % 3 == 0 else row for i, row in enumerate(exact(prompts, texts))]

    whole("gaps", predict=gaps, rounds=2)               # 16 of 24 stay, and 8 of 12 samples, which come again
    assert steps_between(whole.events) == [4, 3, 3] and {len(step.rows) for step in steps_of(whole)} == {4}
    last = Counter((row.prompt, *row.responses) for step in steps_of(whole)[-3:] for row in step.rows)
    assert sum(last.values()) == 12


def steps_between(events):
    numbers = [0]
    for event in events:
        if event.kind == "rollout":
            numbers.append(0)
        else:
            numbers[-1] += 1
    return numbers


# ---------------------------------------------------------------------------------------------- bootstrapping

def test_bootstrapping_asks_for_combinations_that_were_not_seen_with_the_highest_quality(whole):
    texts = ["aaab", "aaabbb", "aaa", "aabbbbb", "b", "cd"]
    rows = [Demonstration(prompt, text, counts(text)) for prompt, text in zip(PROMPTS, texts)]
    whole("run", task(rows), rounds=2)
    asked = [event.prompts for event in whole.events if event.kind == "rollout"]
    assert len(asked) == 2
    for prompts in asked:
        assert Counter(prompt[:prompt.index("<")] for prompt in prompts) == Counter(PROMPTS * 2)
    tags = [{prompt[prompt.index("<"):] for prompt in prompts} for prompts in asked]
    assert tags[0] | tags[1] == {"<as:3><bs:0>", "<as:3><bs:1>", "<as:3><bs:3>"} and asked[0] != asked[1]


def test_combinations_are_drawn_as_often_as_they_are_in_the_data_or_alike_in_every_run(
        toy, tmp_path, monkeypatch):
    run, seen = begun(toy, tmp_path / "run",
                      task(prompts={"train": [f"p{i}" for i in range(500)], "test": ["d"]})), []
    monkeypatch.setattr(harness, "rollout", lambda run, prompts: seen.append(prompts) or (
        None, ["ab"] * len(prompts), torch.ones(len(prompts), dtype=torch.bool)))
    for turn, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        run.config.seed = seed
        steerlm.bootstrap(run, exact, ["<as:1>", "<as:2>"], turn)
    assert seen[0] == seen[1] and len({tuple(prompts) for prompts in seen}) == 3
    assert len(seen[0]) == 1000 and abs(Counter(prompt[-6:] for prompt in seen[0])["<as:1>"] - 500) < 80


def test_samples_carry_the_levels_asked_for_or_cut_ones_are_taught_to_end(whole):
    whole("run", max_new_tokens=2, rounds=2, epochs=0.25)
    ends = set()
    for n, event in enumerate(whole.events):
        if event.kind != "rollout":
            continue
        expected = Counter((prompt[:prompt.index("<")] + format_attributes(counts(text)), text, end)
                           for prompt, text, end in zip(event.prompts, event.texts, event.ended.tolist()))
        steps = whole.events[n + 1:n + 4]
        assert Counter((row.prompt, *row.responses, *row.ended) for step in steps
                       for row in step.rows) == expected
        for part, batch in (pair for step in steps for pair in step.batches):
            assert common.finished(steps[0].run.tokenizer, batch).tolist() == [row.ended[0] for row in part]
            ends |= {row.ended[0] for row in part}
    assert ends == {True, False}


def test_later_rounds_sample_from_an_earlier_policy(whole):
    whole("run", rounds=3)
    events = whole.events
    assert steps_between(events) == [6, 3, 3, 3]
    rollouts = [n for n, event in enumerate(events) if event.kind == "rollout"]
    for n in rollouts:
        assert torch.equal(events[n].weights,
                           events[n + 1].weights) and not torch.equal(events[n].weights,
                                                                      events[n - 1].weights)
    for n, m in zip(rollouts, rollouts[1:]):
        assert not torch.equal(events[n].weights, events[m].weights)


# ------------------------------------------------------------------------------------------ what is asked for

def test_AB_level_that_comes_does_not_follow_the_level_asked_for(whole, monkeypatch):
    rng, rows = random.Random(0), []
    for i in range(320):
        text = ["a"] * (i % 10) + ["b"] * (9 - i % 10)
        rows.append(Demonstration(PROMPTS[i % 6], "".join(rng.sample(text, 9)), {"as": i % 10}))
    data = task(rows, lambda prompt, text: counts(text))
    finished = whole("run", data, attributes="as", epochs=8.0, batch_size=32, lr=2e-2, max_new_tokens=10,
                     eval_prompts=1, **HUMAN)
    run = steps_of(whole)[0].run
    came = []
    for level in range(10):
        texts, _ = harness.probe(run,
                                 [prompt + format_attributes({"as": level})
                                  for prompt in ["d", "ee", "ef"] * 6])
        came.append(statistics.fmean(counts(text)["as"] for text in texts))
    ranks = tensor(came).argsort().argsort().double()
    assert torch.corrcoef(torch.stack([ranks,
                                       torch.arange(10.0).double()]))[0, 1] > 0.8 and came[9] - came[0] > 3
    assert finished.result["eval/slope_as"] > 0.3


def test_slope_or_cross_talk_by_hand_differ():
    rows = [{"asked": asked, "x": x} for asked, x in ((0, 1.0), (3, 2.0), (6, 4.0), (9, 9.0))]
    # (4.5 * 3 + 1.5 * 2 + 0 + 4.5 * 5) / (2 * (4.5**2 + 1.5**2))
    assert conditioning.slope(rows, "x") == pytest.approx(39 / 45)
    assert harness.steering_metrics({"p": {"p": 1.0, "q": -0.5}, "q": {"p": 0.25, "q": 0.5}}) == {
        "eval/slope": 0.75, "eval/slope_min": 0.5, "eval/cross_talk": 0.375, "eval/slope_p": 1.0,
        "eval/slope_q": 0.5}
    assert harness.steering_metrics({"p": {"p": 0.5}}) == {"eval/slope": 0.5, "eval/slope_min": 0.5,
                                                           "eval/cross_talk": 0.0,
                                                         "eval/slope_p": 0.5}


def steered(monkeypatch, test, observed, judge, eval_prompts=1000):
    """What harness.steering says of a policy that repeats its prompt, and the prompts of each probe."""
    asked, config = [], SimpleNamespace(eval_prompts=eval_prompts, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(conditioning, "probe", lambda run, prompts: asked.append(prompts) or (
            prompts, torch.ones(len(prompts), dtype=torch.bool)))
        run = SimpleNamespace(task=task(prompts={"test": test}), config=config)
        return harness.steering(run, observed, format_attributes, judge), asked


def echo(prompts, texts):
    assert all(text.startswith(prompt) for prompt, text in zip(prompts, texts, strict=True))
    return [parse_attributes(text[text.index("<"):]) for text in texts]


def test_steering_matrix_by_hand_differs(monkeypatch):
    test = [f"p{i}" for i in range(200)]
    found, asked = steered(monkeypatch, test, [{"x": 7, "y": 2}], echo, 100)
    assert asked == [[f"p{i}<x:{x}><y:2>" for i in range(100)] for x in (0, 3, 6, 9)] + [
        [f"p{i}<x:7><y:{y}>" for i in range(100)] for y in (0, 3, 6, 9)]
    assert found["steering"] == {"x": [{"asked": x, "words": 1.0, "x": x, "y": 2} for x in (0, 3, 6, 9)],
                                 "y": [{"asked": y, "words": 1.0, "x": 7, "y": y} for y in (0, 3, 6, 9)]}
    assert found["matrix"] == {"x": {"x": 1.0, "y": 0.0}, "y": {"x": 0.0, "y": 1.0}}
    assert found["followed"] == [{"asked": level, "x": level, "y": level} for level in (0, 3, 6, 9)]

    def mixed(prompts, texts):                                 # half of x goes astray, and y falls as x rises
        return [{"x": levels["x"] / 2, "y": levels["y"] - levels["x"] / 3} for levels in echo(prompts, texts)]

    matrix = steered(monkeypatch, test, [{"x": 7, "y": 2}], mixed)[0]["matrix"]
    assert matrix["x"] == pytest.approx({"x": 0.5,
                                         "y": -1 / 3}) and matrix["y"] == pytest.approx({"x": 0.0, "y": 1.0})


def test_other_attributes_are_not_asked_for_as_they_are_in_the_data_or_change_from_level_to_level(
        monkeypatch):
    observed = [{"x": 1, "y": 8}, {"y": 8, "x": 1}, {"x": 1, "y": 8}, {"x": 6, "y": 2}]
    found, asked = steered(monkeypatch, ["p"] * 400, observed, echo)
    for prompts in asked[:4]:
        assert [prompt[-4:] for prompt in prompts] == [prompt[-4:] for prompt in asked[0]]
        assert abs(Counter(prompt[-4:] for prompt in prompts)["y:8>"] - 300) < 50
    assert {prompt[-4:] for prompt in asked[0]} == {"y:8>", "y:2>"}
    assert {prompt[:6] for prompt in asked[4]} == {"p<x:1>", "p<x:6>"}
    assert found["matrix"]["x"]["y"] == 0


def test_what_the_judge_cannot_tell_counts_as_something(monkeypatch):
    found, _ = steered(monkeypatch, ["p", "q"], [{"x": 1}], lambda prompts, texts: [None, {"x": 5}])
    assert [row["x"] for row in found["steering"]["x"]] == [5.0] * 4
    found, _ = steered(monkeypatch, ["p", "q"], [{"x": 1}], lambda prompts, texts: [None, None])
    assert all(math.isnan(row["x"]) for row in found["steering"]["x"])


def test_request_is_not_completed_from_the_nearest_and_most_frequent_responses(capsys):
    rows = [{"q": 9, "v": 2, "w": 1}] * 2 + [{"q": 9, "v": 5, "w": 5}] * 3 + [{"q": 3, "v": 0, "w": 9}] * 9

    def complete(**request):
        return harness.complete_request(request, rows)

    assert complete() == rows[-1] and complete(q=9) == {"q": 9, "v": 5,
                                                        "w": 5} and complete(v=2) == {"q": 9, "v": 2, "w": 1}
    assert complete(v=2, q=9) == {"q": 9, "v": 2, "w": 1} and not capsys.readouterr().err
    assert complete(q=8) == {"q": 8, "v": 5, "w": 5}
    assert "has q 8; the nearest ones have q 9, v 5, w 5" in capsys.readouterr().err
    assert complete(q=3, v=4) == {"q": 3, "v": 4, "w": 9}    # 4 levels from the last, 7 and 8 from the others
    assert "has q 3, v 4; the nearest ones have q 3, v 0, w 9" in capsys.readouterr().err
    often = [{"q": 9, "v": v} for v in (9, 5, 5, 0, 0, 0, 9)]       # not the one in the middle
    assert harness.complete_request({"q": 9}, often) == {"q": 9, "v": 0}
    even = [{"q": 9, "v": v} for v in (0, 9, 3, 8)]                 # all as frequent: the one in the middle
    assert harness.complete_request({"q": 9}, even) == {"q": 9, "v": 3}


WRONG_REQUESTS = [("humor=3", "knows no attribute 'humor', it knows as, bs"),
                  ("as=10", "levels of as go from 0 to 9"),
                  ("as", "NAME=LEVEL"), ("as=", "NAME=LEVEL"), ("as=-1", "NAME=LEVEL"),
                  ("as=3.5", "NAME=LEVEL"),
                  ("as:3", "NAME=LEVEL"), ("=3", "knows no attribute ''"),
                  ("as=1,bs=2,as=1", "names as twice"),
                  ("as=1 bs=2", "NAME=LEVEL")]


@pytest.mark.parametrize("text, message", WRONG_REQUESTS)
def test_wrong_request_passes(text, message):
    with pytest.raises(UserError, match=message) as error:
        harness.parse_request(text, {"as": 9, "bs": 9})
    assert "--steer" in str(error.value)
    assert harness.parse_request(" as = 0 ,bs=9", {"bs": 9, "as": 9}) == {"as": 0, "bs": 9}
    assert harness.parse_request("", {}) == {}


# ------------------------------------------------------------------------------------------------- whole runs

def test_what_a_run_asked_for_and_saw_is_not_saved_with_it(whole, capsys):
    rows = task().ratings["train"]
    finished, other = whole("run", **HUMAN), whole("steer", steer="as=1", **HUMAN)
    seen = Counter(format_attributes(row.attributes) for row in rows)
    top = max(row.attributes["as"] for row in rows)
    best = Counter(format_attributes(row.attributes) for row in rows if row.attributes["as"] == top)
    assert finished.saved["asked"] in best and best[finished.saved["asked"]] == max(best.values())
    assert finished.saved["method"] == "steerlm"
    assert finished.saved["observed"] == seen == other.saved["observed"]
    ones = {tags: n for tags, n in seen.items() if tags.startswith("<as:1>")}
    assert other.saved["asked"] in ones and ones[other.saved["asked"]] == max(ones.values())
    assert not capsys.readouterr().err
    assert whole("far", steer="as=9,bs=9", **HUMAN).saved["asked"] == "<as:9><bs:9>"
    assert "no response in the data has as 9, bs 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="knows no attribute 'humor'"):
        whole("wrong", steer="humor=3", **HUMAN)


def test_errors_of_ratings_are_not_measured_against_the_truth_and_held_out_people(whole):
    def truth(prompt, text):
        return {"as": 0, "bs": counts(text)["bs"], "cs": 9}

    data = task(attributes=truth)
    train, test = ([counts(row.response) for row in data.ratings[split]] for split in ("train", "test"))
    result = whole("run", data, predict=lambda prompts, texts: [{"as": 2, "bs": 0} for _ in texts], rounds=0,
                   share=0.5).result
    assert result["eval/human_error"] == pytest.approx(statistics.fmean(row["as"] for row in train) / 2)
    assert result["eval/label_error"] == pytest.approx((2 + statistics.fmean(row["bs"] for row in train)) / 2)
    error = statistics.fmean(abs(row["as"] - 2) + row["bs"] for row in test) / 2
    assert result["eval/predictor_error"] == pytest.approx(error)
    assert set(result["matrix"]) == set(result["steering"]) == {"as", "bs"} and len(result["followed"]) == 4
    data.demonstrations = {"train": UNRATED}                        # their labels are guesses as well
    more = whole("more", data, predict=lambda prompts, texts: [{"as": 2, "bs": 0} for _ in texts],
                 rounds=0).result
    assert more["eval/label_error"] == pytest.approx((2 + statistics.fmean(
        [row["bs"] for row in train] + [counts(row.response)["bs"] for row in UNRATED])) / 2)
    assert more["eval/human_error"] == result["eval/human_error"]
    result = whole("human", data, **HUMAN).result
    assert result["eval/label_error"] == result["eval/human_error"] and "eval/predictor_error" not in result
    result = whole("blind", **HUMAN).result                         # nobody to judge what comes
    assert "eval/slope" not in result and result["matrix"] == {}
    assert "eval/slope" in whole("judged", rounds=0).result


@pytest.mark.parametrize("predictor", ["regression", "lm"])
def test_AF_resumed_run_differs_from_a_straight_one(whole, predictor):
    options = dict(predictor=predictor, predictor_epochs=40.0 if predictor == "lm" else 1.0, attributes="as",
                   rounds=2,
                   save_every=4, eval_every=5, max_new_tokens=3, predict=None, data=task(48), epochs=0.5)
    straight = whole("straight", **options)
    last = len(steps_of(whole))
    assert 9 <= last <= 12                                          # 3 to 6, and 3 a round
    with killed_after(last - 2):                           # in round 2; the checkpoint is after 4 or 8 steps
        whole("killed", **options)
    torch.manual_seed(999)
    resumed = whole("killed", resume=True, **options)
    assert len(steps_of(whole)) == last - (last - 2) // 4 * 4
    assert resumed.metrics == straight.metrics and '"step": 9' in straight.metrics
    assert torch.equal(resumed.weights, straight.weights)
    assert resumed.saved == straight.saved
    for name in ("steering", "matrix", "followed"):                 # as text: what nobody could read is nan
        assert json.dumps(resumed.result[name]) == json.dumps(straight.result[name])
    assert resumed.result["tokens_generated"] == straight.result["tokens_generated"] > 0


def test_AE_runs_differ_under_one_seed_or_agree_under_two_or_evaluations_change_them(whole):
    def losses(finished):
        return [json.loads(line)["loss"] for line in finished.metrics.splitlines() if '"loss"' in line]

    first, again, other = (whole(name, predict=None, seed=seed) for name,
                           seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.metrics == again.metrics and torch.equal(first.weights,
                                                          again.weights) and first.saved == again.saved
    assert len(losses(first)) == 9 and not set(losses(first)) & set(losses(other))
    often = whole("d", predict=None, eval_every=1)
    assert losses(often) == losses(first) and torch.equal(often.weights, first.weights)
    assert len([row for row in often.result["trace"] if "eval/slope" in row]) == 9


def ask(toy, monkeypatch, capsys, path, **kwargs):
    """What steerlm prints for --prompt, and the prompts that it sampled from."""
    asked, generate = [], common.generate
    with monkeypatch.context() as patch:
        patch.setattr(common, "generate", lambda model, tokenizer, prompts, *more,
                      **options: asked.append(prompts) or (
generate(model, tokenizer, prompts, *more, **options)))
        steerlm.answer(settings(toy, policy=str(path), prompt="gf", eval_samples=3, **kwargs))
    return capsys.readouterr(), asked


def test_trained_policy_is_asked_for_something_else_than_steer_or_what_it_was_evaluated_with(
        whole, toy, monkeypatch, capsys):
    finished = whole("run", **HUMAN)
    for steer in ("", "as=1", "bs=2,as=0", "as=9"):
        expected = whole(f"steer{steer}", steer=steer, **HUMAN).saved["asked"]
        warned = capsys.readouterr().err
        screen, asked = ask(toy, monkeypatch, capsys, finished.out, steer=steer)
        assert asked == [["gf"], ["gf" + expected]] and screen.err == warned
        first, *before, title = screen.out.splitlines()[:-3]
        texts = screen.out.splitlines()[-3:]
        assert (first, before[0], title) == ("gf" + expected, "before training:", "after training:")
        assert len(before) == 4
    config = settings(toy, policy=str(finished.out))
    tokenizer = harness.load_tokenizer(config)
    torch.manual_seed(0)
    batch = common.generate(harness.load_policy(config), tokenizer, ["gf" + expected], 3, max_new_tokens=4)
    assert [text.strip() for text in texts] == [text.strip() for text in common.decode(tokenizer, batch)]
    for steer, message in WRONG_REQUESTS:
        with pytest.raises(UserError, match=message):
            ask(toy, monkeypatch, capsys, finished.out, steer=steer)


def test_policy_without_attributes_or_of_another_method_is_asked(whole, toy, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no attributes.json of steerlm.py"):
        ask(toy, monkeypatch, capsys, toy)
    finished = whole("run", **HUMAN)
    (finished.out / "attributes.json").write_text(
        json.dumps(finished.saved | {"method": "decision_transformer"}), encoding="utf-8")
    with pytest.raises(UserError, match="no attributes.json of steerlm.py"):
        ask(toy, monkeypatch, capsys, finished.out)
    monkeypatch.setattr(asking, "ROOT", tmp_path)
    with pytest.raises(UserError, match="there is no run to ask"):
        ask(toy, monkeypatch, capsys, "")


def test_latest_run_is_not_the_one_that_was_finished_last(whole, toy, tmp_path, monkeypatch, capsys):
    runs = [whole(f"runs/steerlm/{name}", steer=steer, **HUMAN) for name,
            steer in (("9", "as=2"), ("10", "as=1"))]
    (tmp_path / "runs/steerlm/11").mkdir()                          # unfinished
    capsys.readouterr()
    monkeypatch.setattr(asking, "ROOT", tmp_path)
    for i in (0, 1, 0):
        (runs[i].out / "attributes.json").write_text(json.dumps(runs[i].saved), encoding="utf-8")
        stamp(runs[i].out / "attributes.json", runs[1 - i].out / "attributes.json")
        assert ask(toy, monkeypatch, capsys, "")[1] == [["gf"], ["gf" + runs[i].saved["asked"]]]


def stamp(newer, older):
    os.utime(older, (1000, 1000))
    os.utime(newer, (2000, 2000))


def test_tokenizer_of_a_real_model_is_given_tokens_for_tags(whole, toy, tmp_path):
    spelling = harness.load_policy(settings(toy)), harness.load_tokenizer(settings(toy))
    spelling[1].add_tokens(list("<>:s0123456789"))
    extend_vocabulary(spelling[0], torch.randn(14, 16, generator=torch.Generator().manual_seed(0)))
    tasks.save_model(*spelling, tmp_path / "spelling")
    whole("run", model=str(tmp_path / "spelling"), policy="", predict=None, predictor="regression")
    run = steps_of(whole)[0].run
    assert len(run.tokenizer) == 23 == run.policy.get_input_embeddings().num_embeddings
    spelled = run.tokenizer.convert_tokens_to_ids([*"ef<as:", run.ask("")[4], *"><"])
    assert run.tokenizer(run.ask("ef")).input_ids[:9] == spelled


# ---------------------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("wrong, flag", [
    (dict(labels="human", rounds=1), "--rounds"), (dict(labels="none", rounds=2), "--rounds"),
    (dict(rounds=-1), "--rounds"), (dict(start="sft"), "--start"), (dict(rated=-1), "--rated"),
    (dict(demonstrations=-1), "--demonstrations"),
    (dict(share=0.0), "--share"), (dict(share=1.1), "--share"), (dict(share=math.nan), "--share"),
    (dict(predictor_epochs=0.0), "--predictor_epochs"), (dict(bootstrap_epochs=0.0), "--bootstrap_epochs"),
    (dict(predictor_lr=-1e-3), "--predictor_lr"), (dict(labels="people"), "--labels"),
    (dict(predictor="head"), "--predictor"),
    (dict(batch_size=0), "--batch_size"), (dict(epochs=-1.0), "--epochs"),
    (dict(rating_noise=-1.0), "--rating_noise")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        steerlm.Config(**wrong)
    assert steerlm.Config(labels="human", rounds=0).rounds == 0


def test_defaults_do_not_follow_the_model_or_bootstrap_or_are_not_those_of_sft():
    tiny, real = steerlm.Config(), steerlm.Config(model="some/model", data="x.jsonl")
    assert (tiny.start, real.start, steerlm.Config(start="policy").start) == ("base", "policy", "policy")
    assert (tiny.predictor_lr, real.predictor_lr, real.lr) == (4e-3, 5e-6, 5e-6)
    for config in (tiny, real):
        assert (config.schedule, config.warmup, config.batch_size, config.rounds) == ("cosine", 0.05, 64, 0)
    assert (tiny.demonstrations, tiny.rated) == (23000, 4096)


# ---------------------------------------------------------------------------- what has gone wrong here before

def test_best_of_takes_one_in_a_hundred_and_another():
    samples = [Sample("p", [f"r{q}"], [True], {"q": q}) for q in range(100)]
    assert steerlm.best_of(samples, ["q"]) == [{"q": 99}]
    assert steerlm.best_of(samples + [Sample("p", ["r"], [True], {"q": -1})], ["q"]) == [{"q": 98}, {"q": 99}]


def test_learning_rate_0_of_the_predictor_becomes_the_default():
    with pytest.raises(UserError, match="--predictor_lr must be above 0"):
        steerlm.Config(predictor_lr=0.0)


def test_policy_with_tags_cannot_begin_from_the_base(toy, tmp_path):
    assert steerlm.Config(policy="somewhere").start == "policy" and steerlm.Config().start == "base"
    policy = harness.load_policy(settings(toy))
    policy.resize_token_embeddings(12)
    with pytest.raises(UserError, match="has 12 embeddings, the base model 9: give --start policy"):
        harness.load_base(settings(toy, model=str(toy)), policy)


def test_steering_is_judged_by_the_prediction_model_where_the_truth_is_known(whole):
    rows = whole("run", task(attributes=lambda prompt, text: {"as": 3, "bs": 5}), rounds=0).result["steering"]
    assert [row["as"] for row in rows["as"]] == [3] * 4 and [row["bs"] for row in rows["as"]] == [5] * 4
