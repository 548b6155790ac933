"""The embedded task: is its text what the grammar says, is its gold reward what the formula says?"""
import dataclasses
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from common import UserError
from conftest import ROOT
from tasks import reviews

WESTERN = "review this old western and mention the songs:"  # GENRE_OFFSET 0.1
SPLITS = ("train", "test", "validation")


def texts(writer: str, n: int, seed: int = 0, split: str = "train") -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [(prompt, reviews.write(writer, prompt, rng)) for prompt in reviews.make_prompts(split, n, seed)]


def gold_without_offset(prompt: str, response: str) -> float:
    return reviews.gold(prompt, response) - reviews.GENRE_OFFSET[reviews.parse_prompt(prompt).genre]


# ---- prompts

def test_splits_share_no_request_whatever_the_seeds():
    """A split drawn from the seed, or from the wording, would leak test requests into training."""
    requests = {split: {reviews.parse_prompt(prompt) for seed in range(4)
                        for prompt in reviews.make_prompts(split, 400, seed)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not requests[a] & requests[b]
    assert all({request.genre for request in some} == set(reviews.GENRE_OFFSET) for some in requests.values())
    assert all({request.aspect for request in some} == set(reviews.ASPECTS) for some in requests.values())


def test_split_is_the_same_in_another_process():
    """`hash()` of a string differs between processes, and a cached pool would meet other test prompts."""
    code = ("import sys, types; sys.modules['common'] = types.SimpleNamespace(UserError=ValueError);"
            "from tasks import reviews; print(reviews.make_prompts('test', 3, 0), reviews.VOCABULARY)")
    environments = [{**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)} for seed in "12"]
    seen = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True,
                           encoding="utf-8", check=True).stdout for env in environments]
    assert seen[0] == seen[1] == f"{reviews.make_prompts('test', 3, 0)} {reviews.VOCABULARY}\n"


def test_prompts_are_distinct_seeded_and_limited():
    prompts = reviews.make_prompts("train", 1000, 0)
    assert len(set(prompts)) == 1000
    assert prompts == reviews.make_prompts("train", 1000, 0) != reviews.make_prompts("train", 1000, 1)
    for bad in (("train", 10**6), ("dev", 1)):
        with pytest.raises(UserError):
            reviews.make_prompts(*bad, seed=0)


def test_parse_prompt_reads_every_wording_and_refuses_foreign_text():
    for template in reviews.TEMPLATES:
        for aspect, was in (("plot", "was"), ("songs", "were")):
            prompt = template.format(origin="silent", genre="satire", aspect=aspect, was=was)
            assert reviews.parse_prompt(prompt) == ("satire", aspect, "silent")
    for foreign in ("", "hello", WESTERN + " ", WESTERN.replace("songs", "popcorn"), WESTERN[:-1],
                    "you saw this old western. how was the songs?"):
        with pytest.raises(UserError):
            reviews.parse_prompt(foreign)


# ---- tokens

def test_texts_are_their_tokens_and_the_vocabulary_is_exact():
    """A token outside the vocabulary would become <unk>; one that never occurs would stay untrained."""
    used = Counter()
    for text in reviews.REQUESTS:
        used.update(re.findall(reviews.TOKEN_PATTERN, text))
    lengths = []
    for writer in reviews.WRITERS:
        for prompt, response in texts(writer, 1500):
            tokens = re.findall(reviews.TOKEN_PATTERN, response)
            assert "".join(tokens) == response and response[0] == " "
            assert reviews.MIN_TOKENS <= len(tokens) <= reviews.MAX_TOKENS
            used.update(tokens if writer == "crowd" else ())  # the SFT policy learns from the crowd alone
            lengths += [len(tokens)] * (writer == "crowd")
            assert set(tokens) <= set(reviews.VOCABULARY)
    assert set(used) == set(reviews.VOCABULARY)
    assert len(set(reviews.VOCABULARY)) == len(reviews.VOCABULARY) and 200 <= len(reviews.VOCABULARY) <= 350
    assert all("".join(re.findall(reviews.TOKEN_PATTERN, prompt)) == prompt for prompt in reviews.REQUESTS)
    assert 14 < statistics.mean(lengths) < 18


# ---- grammar

GRAMMATICAL = """
 the ending was bad.
 its songs were not very good in my opinion, but even the plot was brilliant.
 i really loved the songs and i did not mind the villain, yet it has weak jokes.
 the stunts bored the whole row to tears, and at least it has an utterly awful ending, so skip it.
 this western is about an invisible goose in a tax office. the plot amused us. i would watch it again.
 skip it.""".strip("\n").split("\n")
UNGRAMMATICAL = """
 the ending were bad.
 the songs was bad.
 it has a awful plot.
 it has an bad plot.
 it has bad plot.
 it has a bad songs.
 it has a utterly bad plot.
 this western is about a invisible goose in a tax office.
 the ending was bad
 the ending was bad..
 the ending was bad. the
 the ending was bad. 
  the ending was bad.
 the the ending was bad.
 the ending was very very bad.
 the ending was bad and and the plot was bad.
 the ending was very.
 the ending bad.
 the ending was good, so the plot was bad.
 skip it. the ending was bad.
 the ending was bad. this western is about an invisible goose in a tax office.
 The ending was bad.
 i did not loved the plot.
 i love the plot.
 the ending was bad. the plot was bad. the cast was bad. the score was bad. the script was bad. skip it.
the ending was bad.
 .
.
 """.strip("\n").split("\n")


@pytest.mark.parametrize("text", GRAMMATICAL)
def test_grammar_accepts(text):
    assert reviews.fluent(text)


@pytest.mark.parametrize("text", [*UNGRAMMATICAL, "", " ", GRAMMATICAL[0] + "\n",
                                  GRAMMATICAL[0] + GRAMMATICAL[0][:-1]])
def test_grammar_rejects(text):
    """Agreement, a/an, doubled and missing words, the final stop, trailing text, clauses out of place."""
    assert reviews.parse(text) is None and not reviews.fluent(text)


@pytest.mark.parametrize("name", reviews.WRITERS)
def test_grammar_accepts_all_that_writers_draft(name):
    """A clause that is written but not parsed would be scored -1, and blamed on the policy."""
    rng, seen = random.Random(0), Counter()
    for prompt in reviews.make_prompts("train", 1500, 0):
        text = reviews.draft(reviews.WRITERS[name], reviews.parse_prompt(prompt), rng)
        clauses = reviews.parse(text)
        assert clauses, text
        seen.update(clause.shape for clause in clauses)
    if name == "crowd":
        assert set(seen) == set(reviews.SHAPES)


def test_slips_break_the_grammar_at_the_writers_rate(monkeypatch):
    """A slip that left the text grammatical would be none, and the policy's fluency would start at 100%."""
    rates = {name: statistics.mean(reviews.fluent(text) for _, text in texts(name, 3000))
             for name in reviews.WRITERS}
    assert 0.99 < rates["crowd"] < 0.999 and 0.95 < rates["weak"] < rates["crowd"]
    assert all(rates[name] == 1 for name in rates if reviews.WRITERS[name].slip == 0)
    always = dataclasses.replace(reviews.WRITERS["crowd"], slip=1.0)
    monkeypatch.setitem(reviews.WRITERS, "crowd", always)
    assert statistics.mean(reviews.fluent(text) for _, text in texts("crowd", 1000)) < 0.1


# ---- gold: every value is worked out by hand from the docstring of `gold`; WESTERN adds 0.1, asks for songs

HAND = {
    # good 0.4, + 0.5 on topic, + 0.1 western
    "plain": (" the songs were good.", {}, 1.0),
    # 0.4 * 1.3 = 0.52
    "intensifier": (" the songs were very good.", {}, 0.52 + 0.6),
    # brilliant 1.0 * 1.3, capped at 1
    "cap": (" the songs were very brilliant.", {}, 1.0 + 0.6),
    # 0.52 * -0.5 = -0.26: the intensifier applies before the "not"
    "not very good": (" the songs were not very good.", {}, -0.26 + 0.6),
    # terrible -1.0 * -0.5 = 0.5
    "not terrible": (" the songs were not terrible.", {}, 0.5 + 0.6),
    # mind -0.4 * 1.3 * -0.5 = 0.26
    "denial": (" i did not really mind the songs.", {}, 0.26 + 0.6),
    # awful -1.0 weighs 0.5, charmed 0.7 * 1.3 = 0.91 weighs 1.5: (-0.5 + 1.365) / 2 = 0.4325
    "but": (" the songs were awful, but its plot charmed us deeply.", {}, 0.4325 + 0.6),
    # weights 0.5, 1.5 * 0.5 (after one "but", before another), 1.5: (0.5 * 0.4 - 0.75 * 1 + 1.5 * 1) / 2.75
    "but twice": (" i liked the songs, but i hated the plot, yet i loved the cast.", {}, 0.95 / 2.75 + 0.6),
    # and: equal weights, (0.4 - 0.4) / 2 = 0; no songs, so no 0.5
    "off topic": (" the plot was good and it has weak jokes.", {}, 0.1),
    # 0.4 on average, on topic, one mention too many
    "repeat": (" the songs were good. it has good songs.", {}, 0.4 + 0.6 - 0.3),
    # four mentions, three too many, of which two count
    "repeats": (" i liked the songs. i liked the songs. i liked the songs. i liked the songs.", {},
                0.4 + 0.6 - 0.6),
    # an opener neither adds to the sentiment nor dilutes it
    "opener": (" this western stars a lonely king on the moon. the songs were good.", {}, 1.0),
    "opener alone": (" this western stars a lonely king on the moon.", {}, 0.1),
    "wrong genre": (" this comedy stars a lonely king on the moon. the songs were good.", {}, 1.0 - 0.3),
    # (0.4 + skip it -1.0) / 2 = -0.3
    "verdict": (" the songs were good. skip it.", {}, -0.3 + 0.6),
    # -1 takes the place of sentiment and topic
    "ungrammatical": (" the songs was good.", {}, -1 + 0.1),
    "not stopped": (" the songs were good.", {"stopped": False}, 1.0 - 0.5),
    "cut short": (" the songs were", {"stopped": False}, -1 - 0.5 + 0.1),
    # three clauses: (0.4 + 0.4 + 0.4) / 3, and 3 * 0.2
    "length": (" the songs were good. i liked the plot. give it a chance.", {"length_bonus": 0.2}, 1.0 + 0.6),
    "length of nothing": (" songs", {"length_bonus": 0.2}, -1 + 0.1),
}


@pytest.mark.parametrize("case", HAND)
def test_gold_by_hand(case):
    response, options, expected = HAND[case]
    assert reviews.gold(WESTERN, response, **options) == pytest.approx(expected, abs=1e-12)


def test_gold_offset_is_of_the_genre_asked_for():
    """A wrong sign, or the genre of the response, would let a policy move the offset."""
    for genre, offset in (("comedy", 0.6), ("documentary", -0.6), ("western", 0.1)):
        prompt = f"review this old {genre} and mention the songs:"
        assert reviews.gold(prompt, " the songs were good.") == pytest.approx(0.9 + offset)
        assert reviews.gold(prompt, "") == pytest.approx(-1 + offset)
    assert sum(reviews.GENRE_OFFSET.values()) == pytest.approx(0)


def test_gold_range_holds_and_is_tight():
    low, high = reviews.GOLD_RANGE
    rng = random.Random(0)
    prompts = reviews.make_prompts("train", 1500, 0)
    for name in reviews.WRITERS:
        for prompt in prompts:
            text = reviews.write(name, prompt, rng)
            garbage = "".join(rng.choices(reviews.VOCABULARY, k=rng.randrange(12)))
            for response in (text, text[:rng.randrange(len(text))], garbage, text + text):
                assert low <= reviews.gold(prompt, response, stopped=rng.random() < 0.5) <= high
    worst = " this western stars a lonely king on the moon." + 3 * " i hated the plot." + " skip it."
    documentary, comedy = (WESTERN.replace("western", genre) for genre in ("documentary", "comedy"))
    assert reviews.gold(documentary, worst, False) == pytest.approx(low)
    assert reviews.gold(comedy, " i loved the songs.") == pytest.approx(high)


# ---- attributes

def test_attributes_by_hand():
    # Sentiment (-0.26 * 0.5 + 1 * 1.5) / 2 = 0.685 is 0.8425 of the way: 7.58. One clause in two on topic,
    # strong two in two, personal one in two: 4.5 goes up. 10 words: 9 * 5 / 27 = 1.67.
    assert reviews.attributes(WESTERN, " the songs were not very good, but i loved the plot.") == dict(
        sentiment=8, topicality=5, verbosity=2, intensity=9, personal=5)
    # The opener names the genre asked for, and is neither strong nor personal: 1 in 2, 0, 0. 14 words:
    # 9 * 9 / 27 = 3.
    opened = " this western stars a lonely king on the moon. the plot was good."
    assert reviews.attributes(WESTERN, opened) == dict(
        sentiment=6, topicality=5, verbosity=3, intensity=0, personal=0)
    assert set(reviews.attributes(WESTERN, " songs songs").values()) == {0}


def test_attributes_are_levels_and_not_collinear():
    """Two attributes that move together cannot be steered apart; one that never moves cannot be steered."""
    rows = [reviews.attributes(*text) for text in texts("crowd", 3000)]
    assert all(tuple(row) == reviews.ATTRIBUTES for row in rows)
    levels = np.array([list(row.values()) for row in rows])
    assert levels.min() == 0 and levels.max() == 9 and levels.dtype.kind == "i"
    correlations = np.corrcoef(levels.T)
    assert np.abs(correlations - np.eye(5)).max() < 0.6
    for column in levels.T:
        counts = Counter(column.tolist())
        assert sum(count >= 30 for count in counts.values()) >= 4


# ---- writers

def test_same_seed_same_text():
    assert texts("crowd", 50, seed=3) == texts("crowd", 50, seed=3)
    first, other = ([text for _, text in texts("crowd", 50, seed=seed)] for seed in (3, 4))
    assert first != other


def test_writers_are_ordered_with_gaps():
    """The curriculum needs strong > medium > weak; a crowd near the top would leave nothing to learn."""
    golds = {name: [gold_without_offset(*text) for text in texts(name, 2400)] for name in reviews.WRITERS}
    mean = {name: statistics.mean(values) for name, values in golds.items()}
    assert mean["strong"] - mean["medium"] >= 0.35 and mean["medium"] - mean["weak"] >= 0.35
    assert 0.85 < mean["strong"] < 1.25
    assert 0.2 <= mean["crowd"] <= 0.35 and statistics.stdev(golds["crowd"]) >= 0.5
    assert abs(mean["off_policy"] - mean["crowd"]) < 0.15
    assert abs(mean["chatty"] - mean["dry"]) < 0.15


def test_crowd_habits():
    parsed = [(reviews.parse_prompt(prompt), clauses) for prompt, text in texts("crowd", 3000)
              if (clauses := reviews.parse(text))]
    mentions = [[clause.aspect for clause in clauses if clause.aspect] for _, clauses in parsed]
    on_topic = statistics.mean(request.aspect in aspects for (request, _), aspects in zip(parsed, mentions))
    repeats = statistics.mean(len(aspects) > len(set(aspects)) for aspects in mentions)
    assert 0.6 < on_topic < 0.7 and 0.12 < repeats < 0.18
    valences = [[clause.valence for clause in clauses if clause.weight][:2] for _, clauses in parsed]
    first, second = zip(*(pair for pair in valences if len(pair) == 2))
    assert 0.2 < np.corrcoef(first, second)[0, 1] < 0.8  # a review has a mood, and exceptions


def test_off_policy_writer_has_other_habits():
    def shares(name: str) -> dict[str, float]:
        shapes = [clause.shape for text in texts(name, 1000) for clause in reviews.parse(text[1]) or ()]
        return {shape: shapes.count(shape) / len(shapes) for shape in reviews.SHAPES}
    off_policy, crowd = shares("off_policy"), shares("crowd")
    assert sum(abs(off_policy[shape] - crowd[shape]) for shape in crowd) / 2 > 0.3


def test_style_pairs_are_equal_in_gold_and_differ_in_style():
    """If gold differed, a preference for a style could not be told from a preference for quality."""
    rng = random.Random(0)
    differences, levels = [], {"chatty": [], "dry": []}
    for prompt in reviews.make_prompts("train", 400, 0):
        chatty, dry = reviews.style_pair(prompt, rng)
        differences.append(reviews.gold(prompt, chatty) - reviews.gold(prompt, dry))
        assert {clause.shape for clause in reviews.parse(chatty)} >= {"opener", "verdict"}
        assert {clause.shape for clause in reviews.parse(dry)} == {"copula"}
        for name, text in (("chatty", chatty), ("dry", dry)):
            levels[name].append(reviews.attributes(prompt, text))
    assert max(map(abs, differences)) < 0.05 and abs(statistics.mean(differences)) < 0.01
    for attribute in ("personal", "verbosity"):
        chatty, dry = (statistics.mean(row[attribute] for row in levels[name]) for name in ("chatty", "dry"))
        assert chatty - dry > 2


# ---- annotators

def test_annotators_agree_with_gold_72_percent_of_the_time():
    rng = random.Random(0)
    labels = []
    for prompt in reviews.make_prompts("train", 3000, 0) * 4:
        a, b = (reviews.gold(prompt, reviews.write("crowd", prompt, rng)) for _ in range(2))
        if abs(a - b) > 1e-9:
            labels.append(reviews.annotate(a, b, rng) == (a > b))
    assert statistics.mean(labels) == pytest.approx(0.72, abs=0.02)


@pytest.mark.parametrize("difference, temperature, flip, expected", [
    (0.0, 0.5, 0.0, 0.5), (0.5, 0.5, 0.0, 0.7311), (-0.5, 0.5, 0.0, 0.2689),
    (0.5, 0.5, 0.1, 0.6848),  # 0.8 * 0.7311 + 0.1
    (0.5, 1e-9, 0.0, 1.0), (-0.5, 1e-9, 0.0, 0.0), (0.5, 1e-9, 1.0, 0.0)])
def test_annotator_is_bradley_terry_and_flips(difference, temperature, flip, expected):
    rng = random.Random(0)
    labels = [reviews.annotate(0.3 + difference, 0.3, rng, temperature=temperature, flip=flip)
              for _ in range(10_000)]
    assert statistics.mean(labels) == pytest.approx(expected, abs=0.015)  # three standard errors


# ---- judges

GOOD, BETTER, BEST = " the songs were good.", " the songs were very good.", " i loved the songs."
BROKEN = " the songs was good."                                            # gold: 1.0, 1.12, 1.6 and -0.9


def test_opinion_is_not_gold_plus_noise_of_mean_0_or_the_noise_has_another_size():
    """A Gumbel distribution of scale 0.5: its deviation is 0.5 pi / sqrt(6), it leans to the right."""
    for temperature, n in ((0.5, 20_000), (2.0, 20_000)):
        noise = np.array([reviews.opinion(WESTERN, GOOD, seed, temperature) for seed in range(n)]) - 1.0
        deviation = temperature * np.pi / 6 ** 0.5
        assert abs(noise.mean()) < 4 * deviation / n ** 0.5
        assert noise.std() == pytest.approx(deviation, rel=0.03)
        assert (noise ** 3).mean() / deviation ** 3 == pytest.approx(1.14, abs=0.15)  # its skewness
    default = [reviews.opinion(WESTERN, GOOD, seed) for seed in range(5)]
    assert default == [reviews.opinion(WESTERN, GOOD, seed, 0.5) for seed in range(5)]
    crowd = texts("crowd", 3000)                                     # and so over texts, with one seed
    noise = np.array([reviews.opinion(*text, 0) - reviews.gold(*text) for text in crowd])
    assert abs(noise.mean()) < 4 * 0.64 / 3000 ** 0.5 and noise.std() == pytest.approx(0.641, rel=0.06)


@pytest.mark.parametrize("a, b", [(GOOD, BETTER), (BEST, GOOD), (BETTER, BEST), (GOOD, BROKEN)])
def test_opinions_prefer_a_text_at_another_rate_than_bradley_and_terry(a, b):
    gap = reviews.gold(WESTERN, a) - reviews.gold(WESTERN, b)
    wins = [reviews.opinion(WESTERN, a, seed) > reviews.opinion(WESTERN, b, seed) for seed in range(10_000)]
    assert statistics.mean(wins) == pytest.approx(1 / (1 + np.exp(-gap / 0.5)), abs=0.015)  # three errors
    rng = random.Random(0)                                       # as annotators who never slip would choose
    labels = [reviews.annotate(gap, 0.0, rng, flip=0.0) for _ in range(10_000)]
    assert statistics.mean(wins) == pytest.approx(statistics.mean(labels), abs=0.021)


def test_opinion_changes_from_call_to_call_or_is_the_same_for_another_text_prompt_or_seed():
    first = reviews.opinion(WESTERN, GOOD, 0)
    random.seed(5)
    state = random.getstate()
    assert first == reviews.opinion(WESTERN, GOOD, 0) and random.getstate() == state
    rows = [(WESTERN, GOOD, 1), (WESTERN, " the songs were great.", 0),
            (WESTERN.replace("songs", "plot"), GOOD, 0)]
    noise = [reviews.opinion(*row) - reviews.gold(*row[:2]) for row in rows]
    assert len({round(value, 6) for value in (first - 1.0, *noise)}) == 4
    code = f"from tasks import reviews; print(reviews.opinion({WESTERN!r}, {GOOD!r}, 0))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True,
                             text=True, encoding="utf-8", check=True).stdout
    assert float(printed) == first
