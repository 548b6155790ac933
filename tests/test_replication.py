"""Does the ranking hold? Counted by hand on made-up numbers."""
import random
import re

import pytest

from referee import replication


def values(n, **means):
    """{arm: {seed: gold}}: a mean, plus what a seed adds to all arms, plus a little of each arm's own."""
    rng = random.Random(0)
    return {arm: {seed: mean + seed / 3 + rng.gauss(0, 0.02) for seed in range(n)}
            for arm, mean in means.items()}


def test_verdicts_of_other_seeds_are_counted_wrong():
    first = values(6, a=3.0, b=2.0, c=1.0, d=1.0)
    text = replication.holds(first, values(8, a=3.0, b=2.0, c=1.0, d=1.0), "Other seeds")
    assert text.startswith("Other seeds, 6 against 6 seeds: 6 of 6 pairwise verdicts are the same (100%), 0 "
                           "are opposite. Of the 5 pairs that are decided at least once, 5 have")
    backwards = replication.holds(first, values(6, a=1.0, b=2.0, c=3.0, d=3.0), "x")
    assert "5 are opposite. Of the 5 pairs that are decided at least once, 0 have" in backwards
    assert "of the two orders is -1.00 (95% of " in replication.holds(
        values(6, a=3.0, b=2.0, c=1.0), values(6, a=1.0, b=2.0, c=3.0), "x")


@pytest.mark.parametrize("second", [{}, values(1, a=1.0, b=2.0, c=3.0), values(6, a=1.0, b=2.0)])
def test_too_few_seeds_or_arms_are_compared(second):
    first = values(6, a=3.0, b=2.0, c=1.0)
    assert replication.shared(first, second) is None
    assert replication.holds(first, second, "x") == "x: not run yet."


@pytest.mark.parametrize("n, shown", [(2, False), (4, False), (5, True)])
def test_range_of_the_order_is_given_for_a_few_seeds(n, shown):
    first, second = values(12, a=3.0, b=2.0, c=1.0), values(n, a=3.0, b=2.0, c=1.0)
    assert ("resampled" in replication.larger_text(first, second, "x")) == shown
    assert ("resampled" in replication.holds(first, second, "x")) == shown


def test_pair_that_turns_round_on_the_larger_model_is_not_named():
    first = values(12, a=3.0, b=2.0, c=1.0, d=1.0, alone=9.0)
    second = values(3, c=1.0, d=0.5, a=1.5, b=2.0)
    text = replication.larger_text(first, second, "Three layers")
    assert text.startswith("Three layers, 3 seeds, with the settings of the small model: nothing was tuned ")
    assert "Of the 5 pairs of these arms that 12 seeds of the small model decide" in text  # c, d: level
    there = re.search(r"4 have a difference of the same sign\. The other way: a over b \(\+([\d.]+) ±[\d.]+; "
                      r"there -([\d.]+) ±[\d.]+\)\. Spearman", text)
    assert [*map(float, there.groups())] == [pytest.approx(1.0, abs=0.03), pytest.approx(0.5, abs=0.05)]
    straight = replication.larger_text(first, values(3, a=3.0, b=2.0, c=1.0, d=1.0), "x")
    assert "5 have a difference of the same sign. Spearman's" in straight


def test_row_of_the_larger_model_has_the_other_sides_gold():
    rows = replication.larger_rows(values(6, a=3.0, b=2.0, c=1.0), values(2, b=5.0, a=4.0, c=3.0),
                                   ("small", "large"))
    assert rows[0] == ["arm", "rank, small", "rank, large", "gold, small", "gold, large"]
    assert [row[:3] for row in rows[1:]] == [["b", "2", "1"], ["a", "1", "2"], ["c", "3", "3"]]
    gold = [[float(cell.split()[0]) for cell in row[3:]] for row in rows[1:]]
    assert gold == [[pytest.approx(mean + 5 / 6, abs=0.05), pytest.approx(other + 1 / 6, abs=0.05)]
                    for mean, other in ((2.0, 5.0), (3.0, 4.0), (1.0, 3.0))]
