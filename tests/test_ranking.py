"""Ranks, all pairs, agreement of two rankings: against scipy, by hand, and by simulation."""
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from harness import UserError
from referee import ranking
from referee.ranking import Duel, agreement, duels, order, ranks


def values(seed=0, n=12, **means):
    """{arm: {seed: number}}: means plus what a seed adds to all arms, plus noise of each."""
    rng = random.Random(seed)
    shared = [rng.gauss(0, 3) for _ in range(n)]
    return {arm: {i: mean + shared[i] + rng.gauss(0, 0.1) for i in range(n)} for arm, mean in means.items()}


def test_rank_is_not_that_of_the_mean_or_has_no_interval():
    found = ranks(values(low=0.0, high=1.0, level=0.99, middle=0.5))
    assert [found[arm][0] for arm in ("low", "middle")] == [4, 3]
    assert {found["high"][0], found["level"][0]} == {1, 2}
    assert found["low"][1:] == (4, 4) and found["middle"][1:] == (3, 3)      # what seeds share is no blur
    assert found["high"][1:] == found["level"][1:] == (1, 2)
    equal = {0: 1.0, 1: 2.0}
    assert ranks({"a": equal, "b": equal, "c": {0: 5.0, 1: 5.0}})["a"] == (2.5, 2.5, 2.5)    # they share it


def test_bootstrap_draws_arms_apart_or_another_number_of_seeds():
    numbers = np.array([[1.0, 2, 4], [10, 20, 40]])
    means = ranking.bootstrap(numbers)
    assert means.shape == (2, ranking.DRAWS) and np.allclose(means[1], 10 * means[0])         # the same seeds
    possible = {round(sum(three) / 3, 9) for three in itertools.product((1, 2, 4), repeat=3)}
    assert {round(mean, 9) for mean in means[0]} == possible
    assert means[0].mean() == pytest.approx(7 / 3, abs=0.03)


def test_pairs_differ_from_scipys_paired_test_or_holms_correction_by_hand():
    given = values(a=0.0, b=0.04, c=0.1, d=0.4)
    found = duels(given)
    assert [*found] == [*itertools.combinations("abcd", 2)]
    p = {(a, b): stats.ttest_rel([*given[a].values()], [*given[b].values()]).pvalue for a, b in found}
    for pair in found:
        assert found[pair].p == pytest.approx(p[pair])
        first, second = (np.mean([*given[arm].values()]) for arm in pair)
        assert found[pair].difference == pytest.approx(first - second)
    rejected = []
    for m, pair in zip(range(6, 0, -1), sorted(p, key=p.get)):                                 # step-down
        if p[pair] > 0.05 / m:
            break
        rejected.append(pair)
    assert 1 < len(rejected) < 6                                                     # or this tests nothing
    assert {pair for pair in found if found[pair].verdict != "="} == {*rejected}
    assert all(found[pair].verdict == "<" for pair in rejected)                      # later letters have more


def test_holm_rejects_no_more_than_after_the_first_that_fails(monkeypatch):
    """p-values 0.010, 0.040, 0.030: 0.010 < 0.05/3, but 0.030 > 0.05/2, and then 0.040 < 0.05 is too late."""
    pvalues = iter([0.010, 0.040, 0.030])
    monkeypatch.setattr(ranking, "ttest_rel", lambda a, b: SimpleNamespace(pvalue=next(pvalues)))
    found = duels({"a": {0: 1.0, 1: 2.0}, "b": {0: 0.0, 1: 3.0}, "c": {0: 5.0, 1: 1.0}})
    assert [duel.verdict != "=" for duel in found.values()] == [True, False, False]


def test_equal_arms_are_a_crash_or_one_beats_the_other():
    same = {0: 1.0, 1: 2.0, 2: 3.0}
    found = duels({"a": same, "b": dict(same), "c": {i: v + 1 for i, v in same.items()}})
    assert found["a", "b"] == Duel(0.0, 1.0, "=")
    assert found["a", "c"] == Duel(-1.0, 0.25, "=")                 # by exactly as much in every seed: few
    many = {i: float(i) for i in range(12)}
    found = duels({"a": many, "b": {i: v + 1 for i, v in many.items()}})
    assert found["a", "b"] == Duel(-1.0, 2.0 ** -11, "<")


def test_wrong_verdicts_among_equal_arms_are_more_than_one_in_twenty():
    wrong = sum(any(duel.verdict != "=" for duel in duels(values(seed, 12, **dict.fromkeys("abcdef", 0.0)))
                    .values()) for seed in range(400))
    assert wrong / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    uncorrected = sum(min(duel.p for duel in duels(values(seed, 12, **dict.fromkeys("abcdef", 0.0))).values())
                      < 0.05 for seed in range(100))
    assert uncorrected > 20                                          # without it there would be many


def test_agreement_counts_pairs_of_one_alone_or_takes_open_for_opposite():
    def verdicts(**found):
        return {tuple(pair): Duel({">": 1.0, "<": -1.0, "+": 0.1, "-": -0.1}[verdict], 0.0,
                                  verdict if verdict in "<>" else "=") for pair, verdict in found.items()}

    first = verdicts(ab=">", ac="<", bc="+", bd=">", ad="-", ae="-")
    second = verdicts(ab=">", ac=">", bc=">", cd="<", ad=">", ae="+")
    assert agreement(first, second) == (2, 1, 5, 4, 2)         # ab, ac, bc, ad are decided; ab and bc agree


def test_order_differs_from_spearmans_correlation_or_has_a_wrong_interval():
    first = values(0, a=0.0, b=1.0, c=2.0, d=3.0, only=9.0)
    rho, low, high = order(first, values(1, a=0.0, b=2.0, c=1.0, d=3.0))
    assert rho == pytest.approx(0.8) == pytest.approx(low) == pytest.approx(high)            # 1 - 6*2/(4*15)
    assert order(first, values(1, a=3.0, b=2.0, c=1.0, d=0.0)) == pytest.approx((-1, -1, -1))
    rho, low, high = order(first, values(1, a=0.0, b=0.01, c=0.0, d=0.01))
    assert low < rho < high and high - low > 0.3
    with pytest.raises(UserError, match="fewer than three arms"):
        order({"a": first["a"], "b": first["b"]}, first)


def test_arms_without_common_seeds_are_ranked():
    with pytest.raises(UserError, match="at least two seeds"):
        ranks({"a": {0: 1.0, 1: 2.0}, "b": {1: 1.0, 2: 2.0}})
    shared = ranking.table_of({"a": {0: 1.0, 2: 3.0, 1: 2.0}, "b": {2: 1.0, 1: 0.0}})
    assert shared[1] == [1, 2] and shared[2].tolist() == [[2.0, 3.0], [0.0, 1.0]]


def test_ranks_left_are_not_those_of_the_verdicts_by_hand():
    def duel(verdict):
        return Duel(0.0, 0.0, verdict)

    found = {("a", "b"): duel("="), ("a", "c"): duel(">"), ("a", "d"): duel(">"), ("b", "c"): duel("="),
             ("b", "d"): duel(">"), ("c", "d"): duel("=")}
    assert ranking.ranks_left(found) == {"a": (1, 2), "b": (1, 3), "c": (2, 4), "d": (3, 4)}
    turned = {pair: duel({">": "<"}.get(one.verdict, "=")) for pair, one in found.items()}
    assert ranking.ranks_left(turned) == {"a": (3, 4), "b": (2, 4), "c": (1, 3), "d": (1, 2)}
