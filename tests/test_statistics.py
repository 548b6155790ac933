"""The arithmetic of a verdict: intervals, comparisons, verdicts, numbers of seeds, best of n."""
import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from conftest import cases
from harness import UserError
from referee import statistics, tables


# --------------------------------------------------------------------------------------------- statistics

def draws(n):
    rng = random.Random(n)
    return [rng.gauss(3, 2) for _ in range(n)]


@pytest.mark.parametrize("df, level, expected", [
    (1, 0.95, 12.7062), (2, 0.95, 4.3027), (3, 0.95, 3.1824), (4, 0.95, 2.7764), (5, 0.95, 2.5706),
    (9, 0.95, 2.2622), (30, 0.95, 2.0423), (120, 0.95, 1.9799), (4, 0.99, 4.6041), (10, 0.99, 3.1693)])
def test_t_interval_against_printed_tables_of_the_quantile(df, level, expected):
    values = draws(df + 1)
    assert statistics.t_interval(values, level)[1] / stats.sem(values) == pytest.approx(expected, abs=1e-4)


def test_t_interval_against_scipys_own():
    for df, level in itertools.product(range(1, 61), (0.5, 0.9, 0.95, 0.975, 0.99, 1 - 0.05 / 7)):
        values = draws(df + 1)
        mean, half = statistics.t_interval(values, level)
        low, high = stats.t.interval(level, df, loc=mean, scale=stats.sem(values))
        assert mean == pytest.approx(np.mean(values), rel=1e-9)
        assert half == pytest.approx((high - low) / 2, rel=1e-9)


def test_t_interval_by_hand():
    # Mean 2, sample variance 1, so half = 4.3027 / sqrt(3).
    assert statistics.t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / math.sqrt(3)), abs=1e-5)
    assert statistics.t_interval([1.5]) == (1.5, math.inf)


def test_t_interval_covers_the_mean_95_times_in_100():
    rng = random.Random(0)
    hits = 0
    for _ in range(4000):
        mean, half = statistics.t_interval([rng.gauss(3, 2) for _ in range(5)])
        hits += abs(mean - 3) <= half
    assert 0.94 < hits / 4000 < 0.96                                 # the normal quantile would give 0.88


def arms(**columns):
    """{arm: {seed: run}} with one metric, m."""
    return {name: {seed: {"m": v, "trace": [{"m": 0.0}, {"m": v}]} for seed, v in enumerate(values)}
            for name, values in columns.items()}


def word(arms, *holds, metric="m"):
    return statistics.verdict({"metric": metric, "holds": holds}, arms)[0]


UP, DOWN, WIDE = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [3.0, -2.0, 0.5]


@pytest.mark.parametrize("op, values, expected", [
    (">", UP, "reproduced"), (">", DOWN, "not reproduced"), (">", WIDE, "inconclusive"),
    ("<", DOWN, "reproduced"), ("<", UP, "not reproduced"), ("<", WIDE, "inconclusive"),
    (">", [1.0], "inconclusive"), ("<", [1.0], "inconclusive"),     # one seed decides nothing
    (">", [0.0] * 6, "not reproduced"), ("<", [0.0] * 6, "not reproduced"),                 # strictly
    (">", [1.0] * 6, "reproduced"), (">", [1.0] * 5, "inconclusive"), ("<", [0.0] * 5, "inconclusive"),
    (">", [None, 1.0, 1.0], "not measured")])
def test_verdict_of_one_comparison(op, values, expected):
    assert word(arms(a=values, b=[0.0] * len(values)), ("a", op, "b")) == expected
    assert word(arms(a=values), ("a", op, 0.0)) == expected


def test_boundary_is_open_when_the_interval_only_touches_zero_on_the_claimed_side(monkeypatch):
    monkeypatch.setattr(statistics, "t_interval", lambda values, level=0.95: (1.0, 1.0))        # [0, 2]
    assert word(arms(a=UP), ("a", ">", 0.0)) == "inconclusive"
    assert word(arms(a=UP), ("a", "<", 0.0)) == "not reproduced"                       # none of it is below 0


def test_conjunctions():
    table = arms(up=UP, down=DOWN, wide=WIDE, zero=[0.0] * 3)
    up, down, wide = (("up", ">", "zero"), ("down", ">", "zero"), ("wide", ">", "zero"))
    assert word(table, up, up) == "reproduced"
    assert word(table, up, wide) == "inconclusive"
    assert word(table, up, wide, down) == "not reproduced"
    assert word(table, up, ("absent", ">", "zero")) == "not run"
    weakest = tables.measured(*statistics.verdict({"metric": "m", "holds": [up, wide]}, table), 3)
    assert weakest.startswith("wide - zero: +0.50 ±") and "(weakest of 2); about " in weakest


def test_excluding_one_of_many_needs_more_evidence_than_excluding_the_only_one():
    values = [-1.5, -0.7, -1.1]                                     # -1.1 ± 0.99 at 95%, ± 2.04 at 1 - 0.05/4
    table = arms(a=values, up=UP)
    assert word(table, ("a", ">", 0.0)) == "not reproduced"
    assert word(table, ("a", ">", 0.0), *[("up", ">", 0.0)] * 3) == "inconclusive"
    # Accepting a conjunction needs no correction: the same evidence, mirrored, is enough beside three others.
    assert word(table, ("a", "<", 0.0), *[("up", ">", 0.0)] * 3) == "reproduced"


def test_false_verdicts_are_rare_when_the_claim_is_on_its_boundary(monkeypatch):
    monkeypatch.setattr(statistics, "seeds_needed", lambda *args: None)             # slow, and no verdict's
    rng, words = random.Random(1), []
    for _ in range(2000):
        table = arms(**{name: [rng.gauss(0, 1) for _ in range(5)] for name in "abc"})
        words.append(word(table, *[(name, ">", 0.0) for name in "abc"]))
    assert words.count("reproduced") / 2000 < 0.025
    assert 0.012 < words.count("not reproduced") / 2000 < 0.036      # 2.5%, and 7.5% without Bonferroni


def test_pairing_finds_a_small_difference_under_a_large_seed_effect():
    seed_effect = [0.0, 10.0, -7.0, 4.0, 25.0]
    table = arms(a=[e + 0.1 + 0.01 * i for i, e in enumerate(seed_effect)], b=seed_effect)
    assert word(table, ("a", ">", "b")) == "reproduced"
    table["b"] = {seed: table["b"][(seed + 1) % 5] for seed in range(5)}               # the pairing destroyed
    assert word(table, ("a", ">", "b")) == "inconclusive"


def test_only_common_seeds_count():
    table = arms(a=UP, b=[0.0, 0.0, 0.0])
    del table["a"][0], table["b"][2]
    comparison = statistics.verdict({"metric": "m", "holds": [("a", ">", "b")]}, table)[1][0]
    assert comparison.n == 1 and comparison.mean == pytest.approx(1.1)


def test_change_metric_is_last_minus_first_trace_entry():
    table = {"a": {s: {"m": 5.0, "trace": [{"m": 7.0 + s}, {"m": 99.0}, {"m": 5.0}]} for s in range(3)}}
    comparison = statistics.verdict({"metric": "m:change", "holds": [("a", "<", 0.0)]}, table)[1][0]
    assert comparison.mean == pytest.approx(-3.0)                    # of -2, -3, -4


def test_second_half_begins_anywhere_but_at_the_last_evaluation_up_to_half_way():
    entries = [{"step": step, "m": value} for step, value in ((0, 5.0), (4, 1.0), (6, 9.0), (8, 4.0))]
    assert statistics.value({"trace": entries}, "m:second_half") == 3.0
    late = entries[:2] + [{"step": 9, "m": 4.5}]
    assert statistics.value({"trace": late}, "m:second_half") == 3.5                 # of 4.5 steps: step 4
    assert statistics.value({"trace": entries[:1] + entries[2:]}, "m:second_half") is None    # only step 0


def test_value_where_another_metric_first_reaches_a_level():
    points = [(0.0, 0.0), (2.0, 1.0), (4.0, 5.0), (3.0, 9.0), (6.0, -3.0)]                # KL falls back once
    run = {"trace": [{"kl": kl, "gold": gold} for kl, gold in points]}
    for level, expected in ((0.0, 0.0), (1.0, 0.5), (2.0, 1.0), (3.5, 4.0), (5.0, 1.0), (6.0, -3.0)):
        assert statistics.when_reached(run, "kl", level, "gold") == pytest.approx(expected)
    assert statistics.when_reached(run, "kl", 6.1, "gold") is None
    assert statistics.when_reached({"trace": run["trace"][:1]}, "kl", 0.0, "gold") is None


def test_comparison_at_equal_kl_takes_the_other_arm_from_its_trace():
    trace = [{"kl": 0.0, "m": 0.0}, {"kl": 10.0, "m": 10.0}]
    table = {"a": {s: {"m": 3.0 + e, "kl": 2.0} for s, e in enumerate((0.0, 0.1, -0.1))},
             "b": {s: {"m": 10.0, "kl": 10.0, "trace": trace} for s in range(3)}}
    claim = {"metric": "m", "at": "kl", "holds": [("a", ">", "b")]}
    said, (comparison,) = statistics.verdict(claim, table)
    assert said == "reproduced" and comparison.mean == pytest.approx(1.0)                # 3 against 2, not 10
    assert statistics.verdict(claim | {"at": None}, table)[0] == "not reproduced"
    table["a"][1]["kl"] = 11.0
    assert statistics.verdict(claim, table)[0] == "not measured"


def test_offset_moves_the_boundary_not_the_number_shown():
    table = arms(a=[0.05, 0.06, 0.04], b=[0.0] * 3)
    assert word(table, ("a", "<", "b", 0.1), ("a", ">", "b", -0.1)) == "reproduced"         # equal within 0.1
    assert word(table, ("a", "<", "b", 0.01)) == "not reproduced"
    said, (comparison,) = statistics.verdict({"metric": "m", "holds": [("a", "<", "b", 0.1)]}, table)
    assert comparison.mean == pytest.approx(0.05) and comparison.text == "a - b (against 0.1)"


def test_number_on_the_right_and_an_offset_add_up():
    table = arms(a=[1.0, 1.1, 0.9])
    assert word(table, ("a", ">", 0.5)) == "reproduced" and word(table, ("a", ">", 2.0)) == "not reproduced"
    assert word(table, ("a", ">", 2.0, -1.5)) == "reproduced"
    said, (comparison,) = statistics.verdict({"metric": "m", "holds": [("a", ">", 2.0, -1.5)]}, table)
    assert comparison.mean == pytest.approx(1.0) and comparison.text == "a (against 0.5)"


# The half-width of [x - 0.02, x, x + 0.02] is 4.3027 * 0.02 / sqrt(3) = 0.0497.
@pytest.mark.parametrize("difference, expected", [
    (0.0, "reproduced"), (0.05, "reproduced"), (-0.05, "reproduced"), (0.051, "inconclusive"),
    (-0.051, "inconclusive"), (0.149, "inconclusive"), (0.15, "not reproduced"), (-0.15, "not reproduced"),
    (5.0, "not reproduced")])
def test_equivalence_holds_within_the_margin_and_is_excluded_beyond_it(difference, expected):
    values = [0.7 + difference + e for e in (-0.02, 0.0, 0.02)]
    assert word(arms(a=values, b=[0.7] * 3), ("a", "=", "b", 0.1)) == expected
    assert word(arms(a=[0.7] * 3, b=values), ("a", "=", "b", 0.1)) == expected
    assert word(arms(a=values), ("a", "=", 0.7, 0.1)) == expected
    two = [("a", "<", "b", 0.1), ("a", ">", "b", -0.1)]                # two one-sided tests say the same
    assert (word(arms(a=values, b=[0.7] * 3), *two) == "reproduced") == (expected == "reproduced")


def test_equivalence_is_open_where_the_interval_only_touches_the_margin_from_inside(monkeypatch):
    table = arms(a=UP)
    for mean, half, expected in ((0.0, 0.5, "open"), (0.1, 0.3, "holds"), (0.1, 0.4, "open"),
                                 (-0.1, 0.4, "open"), (1.0, 0.5, "excluded"), (-1.0, 0.5, "excluded"),
                                 (-1.0, 0.6, "open"), (0.0, math.inf, "open")):
        monkeypatch.setattr(statistics, "t_interval", lambda values, level=0.95: (mean, half))
        assert statistics.compare_arms(table, "m", "a", "=", 1.0, 0.5).status == expected, (mean, half)


def test_one_seed_shows_no_equality_and_a_diverged_run_measures_none():
    assert word(arms(a=[0.5], b=[0.5]), ("a", "=", "b", 0.1)) == "inconclusive"
    assert word(arms(a=[0.5, None], b=[0.5, 0.5]), ("a", "=", "b", 0.1)) == "not measured"
    assert word(arms(a=[0.5] * 6, b=[0.5] * 6), ("a", "=", "b", 0.1)) == "reproduced"


def test_two_equal_values_decide_a_claim(monkeypatch):
    """A metric that is 1 with probability 0.7 and else 0.2 has the mean 0.76: "> 0.8" is wrong."""
    rng, wrong = random.Random(0), 0
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "seeds_needed", lambda *args: None)               # slow, and no verdict's
        for _ in range(2000):
            values = [1.0 if rng.random() < 0.7 else 0.2 for _ in range(2)]
            wrong += word(arms(a=values), ("a", ">", 0.8)) == "reproduced"
    assert wrong == 0
    found = statistics.compare_arms(arms(a=[1.0] * 5), "m", "a", ">", 0.8)
    assert (found.status, found.settles) == ("open", 6)
    three = [("a", ">", 0.8)] * 3
    assert word(arms(a=[0.5] * 6), *three) == "inconclusive"
    assert word(arms(a=[0.5] * 7), *three) == "not reproduced"


def test_comparison_that_decided_is_not_the_weakest_that_is_shown():
    table = arms(a=[1.0] * 7, b=[1.0] * 7, c=[0.1, 0.0, 0.2, 0.1, 0.0, 0.2, 0.1])
    for op, left, right in ((">", "a", "b"), ("<", "b", "a")):
        other = ("a", ">", "c") if op == ">" else ("c", "<", "a")
        answer, comparisons = statistics.verdict({"metric": "m", "holds": [(left, op, right), other]}, table)
        assert answer == "not reproduced"
        assert min(comparisons, key=lambda c: c.strength).text == f"{left} - {right}"


def test_value_that_a_trace_lacks_is_a_traceback():
    trace = [{"m": 0.0, "kl": 0.0}, {"m": 0.5, "kl": None}, {"m": 1.0, "kl": 2.0}]
    run = {"m": 1.0, "kl": 2.0, "trace": trace}
    assert statistics.when_reached(run, "kl", 1.0, "m") == 0.5
    assert statistics.when_reached(run, "kl", None, "m") is None
    assert statistics.value({"diverged": "step 3", "trace": []}, "m:change") is None


def test_exclusion_of_an_equality_is_corrected_for_the_number_of_comparisons():
    values, up = [1.5, 0.7, 1.1], ("up", ">", 0.0)                  # 1.1 ± 0.99 at 95%, ± 2.04 at 1 - 0.05/4
    table = arms(a=values, up=UP)
    assert word(table, ("a", "=", 0.0, 0.1)) == "not reproduced"
    assert word(table, ("a", "=", 0.0, 0.1), up, up, up) == "inconclusive"


def test_what_is_said_of_an_equality():
    table = arms(a=[1.02, 1.0, 0.98], b=[0.5] * 3)
    for part, text in ((("a", "=", "b", 0.6), "a - b (within 0.6): +0.500 ±0.050"),
                       (("a", "=", 0.9, 0.2), "a (within 0.2 of 0.9): +1.00 ±0.05")):
        assert tables.measured(*statistics.verdict({"metric": "m", "holds": [part]}, table), 3) == text


def test_weakest_of_several_is_the_one_nearest_to_its_boundary():
    table = arms(a=[1.02, 1.0, 0.98])
    claim = {"metric": "m", "holds": [("a", "=", 1.0, 0.2), ("a", "=", 1.1, 0.2), ("a", ">", 0.5)]}
    assert tables.measured(*statistics.verdict(claim, table), 3).startswith("a (within 0.2 of 1.1): ")


@pytest.mark.parametrize("part", [("a", "=", "b"), ("a", "=", "b", 0.0), ("a", "=", 1.0, -0.1),
                                  ("a", ">=", "b"), ("a", "==", "b", 0.1)])
def test_equality_without_a_margin_and_an_unknown_operator_are_user_errors(part):
    with pytest.raises(UserError, match="the operator is <, > or =, and = needs a margin above 0"):
        word(arms(a=UP, b=DOWN), part)


# --------------------------------------------------------------------------------------------- how many seeds

# One-sample t-test, two-sided 5%, power 80%: Cohen's d and n as G*Power and R's power.t.test give it.
@pytest.mark.parametrize("size, n", [(0.1, 787), (0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10),
                                     (2.0, 5)])
def test_seeds_needed_against_printed_values(size, n):
    assert statistics.seeds_needed(size, 1.0) == statistics.seeds_needed(-size * 3, 3.0) == n


@pytest.mark.parametrize("distance, deviation, level", [(0.1, 0.12, 0.05), (0.3, 0.2, 0.05),
                                                        (0.1, 0.12, 0.0125)])
def test_seeds_needed_by_simulation(distance, deviation, level):
    n, rng = statistics.seeds_needed(distance, deviation, level), np.random.default_rng(0)

    def power(n):
        values = rng.normal(distance, deviation, (40000, n))
        errors = values.std(1, ddof=1) / math.sqrt(n)
        return np.mean(values.mean(1) / errors > stats.t.ppf(1 - level / 2, n - 1))

    assert power(n - 1) < 0.8 < power(n)                             # standard error 0.002


def test_seeds_needed_at_its_ends():
    over = statistics.MOST_SEEDS + 1
    assert over == 1001
    assert statistics.seeds_needed(0.0, 1.0) == statistics.seeds_needed(1e-300, 1.0) == over
    assert statistics.seeds_needed(0.0887, 1.0) == 1000 and statistics.seeds_needed(0.0884, 1.0) == over
    assert [statistics.seeds_needed(d, 1.0) for d in (100, 1e9, 1e300)] == [2, 2, 2]
    assert statistics.seeds_needed(0.1, 0.0) == 2                    # no spread at all


def settles(values, *part, k=1):
    return statistics.compare_arms(arms(a=values), "m", "a", *part, k=k).settles


def test_open_comparison_says_how_many_seeds_settle_it():
    values = [0.4, -0.2, 0.1, 0.5, -0.3]                             # mean 0.1
    spread = np.std(values, ddof=1)
    assert settles(values, ">", 0.0) == settles(values, "<", 0.0) == statistics.seeds_needed(0.1, spread)
    assert settles(values, ">", 0.0, -0.1) == statistics.seeds_needed(0.2, spread)      # from the offset
    assert settles(values, ">", 0.05) == statistics.seeds_needed(0.05, spread)
    assert settles(values, "=", 0.0, 0.25) == statistics.seeds_needed(0.15, spread)      # from the margin
    assert settles(values, "=", 0.05, 0.25) == statistics.seeds_needed(0.2, spread)
    assert settles(values, "=", 0.0, 0.02) == statistics.seeds_needed(0.08, spread)      # from outside


def test_rejection_among_k_needs_more_seeds_than_its_95_percent():
    values = [-1.5, -0.7, -1.1]                # alone it is excluded, among four not
    assert settles(values, ">", 0.0) is None
    assert settles(values, ">", 0.0, k=4) == statistics.seeds_needed(1.1, 0.4, 0.05 / 4) > 3
    assert settles(WIDE, ">", 0.0, k=4) == settles(WIDE, ">", 0.0) > 3         # on the claimed side: 95%


def test_nothing_settles_what_is_settled_or_has_one_seed():
    assert settles(UP, ">", 0.0) is settles(UP, "<", 0.0) is settles([1.0], ">", 0.0) is None
    assert settles([None, 1.0], ">", 0.0) is None


def test_claim_names_the_seeds_of_its_widest_open_comparison():
    def said(*holds, seeds=3):
        return tables.measured(*statistics.verdict({"metric": "m", "holds": holds}, table), seeds)

    table = arms(up=UP, wide=WIDE, near=[0.1, -0.1, 0.05], far=[0.1, -0.1, 0.0001], one=[1.0])
    wide, near = (statistics.compare_arms(table, "m", name, ">", 0.0).settles for name in ("wide", "near"))
    assert 3 < wide < near < 1000
    assert said(("wide", ">", 0.0)).endswith(f" ±6.21; about {wide} seeds would settle it")
    assert said(("wide", ">", 0.0), ("near", ">", 0.0), ("up", ">", 0.0)).endswith(
        f"(weakest of 3); about {near} seeds would settle it")
    assert said(("near", ">", 0.0), ("far", ">", 0.0)).endswith("; over 1000 seeds would settle it")
    assert "settle" not in said(("up", ">", 0.0)) + said(("wide", ">", 0.0), ("up", "<", 0.0))
    assert said(("one", ">", 0.0), seeds=1) == "one: +1.00 (1 seed)"
    assert said(("wide", ">", 0.0), seeds=4).endswith(f" (3 seeds); about {wide} seeds would settle it")


# --------------------------------------------------------------------------------------------- best of n

@pytest.mark.parametrize("distinct", [True, False])
def test_best_of_n_is_the_mean_over_all_subsets(distinct):
    rng = np.random.default_rng(0)
    tied, order = rng.integers(0, 3, (3, 7)).astype(float), np.tile(np.arange(7.0), (3, 1))
    proxy = rng.permuted(order, axis=1) if distinct else tied
    gold = rng.normal(size=(3, 7))
    for n in range(1, 8):
        picked = []
        for p, g in zip(proxy, gold):
            golds = []
            for subset in map(list, itertools.combinations(range(7), n)):
                golds.append(g[subset][p[subset] == p[subset].max()].mean())               # ties: a fair draw
            picked.append(np.mean(golds))
        tops = [np.mean([max(p[list(s)]) for s in itertools.combinations(range(7), n)]) for p in proxy]
        mean_gold, mean_proxy, _ = statistics.best_of_n(proxy, gold, n)
        assert mean_gold == pytest.approx(np.mean(picked), abs=1e-12)
        assert mean_proxy == pytest.approx(np.mean(tops), abs=1e-12)


def test_best_of_n_shares_ties_fairly_and_ignores_their_order():
    proxy, gold = np.zeros((1, 4)), np.array([[1.0, 2.0, 3.0, 6.0]])
    for n in (1, 2, 4):
        assert statistics.best_of_n(proxy, gold, n)[0] == pytest.approx(3.0)
    torch = pytest.importorskip("torch")
    proxy, gold = [[0.0, 1.0, 1.0, 0.5]], [[0.0, 4.0, 8.0, 1.0]]
    assert statistics.best_of_n(torch.tensor(proxy), torch.tensor(gold), 4)[0] == pytest.approx(6.0)


def test_best_of_n_kl():
    kl = {n: statistics.best_of_n(np.eye(64)[:1], np.eye(64)[:1], n)[2] for n in (1, 2, 16)}
    assert kl == pytest.approx({1: 0.0, 2: 0.1931471805599453, 16: 1.8350887222397811}, abs=1e-15)


def test_best_of_n_fixtures():
    found = cases("bon")
    subset = [c for c in found if c["inputs"]["kind"] == "subset_max"]
    kl = [c for c in found if c["inputs"]["kind"] == "kl"]
    assert subset and kl
    for case in subset:
        rewards = [case["inputs"]["rewards"]]
        for n, expected in zip(case["inputs"]["n"], case["expected"]["expected_max"]):
            found = statistics.best_of_n(rewards, rewards, n)[:2]
            assert found == pytest.approx((expected, expected), abs=1e-12)
    for case in kl:
        for n, expected in zip(case["inputs"]["n"], case["expected"]["kl_bound"]):
            if n <= 128:
                pool = [list(range(n))]
                assert statistics.best_of_n(pool, pool, n)[2] == pytest.approx(expected, abs=1e-12)
