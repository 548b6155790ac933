"""Whether the ranking of the comparison holds: on other seeds, and on a larger model.

Values are {arm: {seed: gold}}, as in ranking.py. Only arms that both sides have are compared.
"""
from statistics import fmean

from referee.ranking import agreement, duels, order, rank_of, table_of
from referee.statistics import plus_minus, t_interval

FEWEST = 5                             # seeds: with fewer, to draw seeds again says next to nothing


def shared(first, second):
    """Both sides with the arms that both have; None where that is too little to compare."""
    both = [name for name in first if name in second]
    sides = [{name: values[name] for name in both} for values in (first, second)]
    if len(both) < 3 or any(len(set.intersection(*map(set, side.values()))) < 2 for side in sides):
        return None
    return [(arms, seeds, {arm: dict(zip(seeds, row.tolist())) for arm, row in zip(arms, numbers)})
            for arms, seeds, numbers in map(table_of, sides)]


def spearman(first, second, n):
    """Spearman's correlation of two orders, in words; with its range from FEWEST seeds on."""
    rho, low, high = order(first, second)
    drawn = f" (95% of resampled seeds: {low:.2f} to {high:.2f})" if n >= FEWEST else ""
    return f"Spearman's correlation of the two orders is {rho:.2f}{drawn}."


def holds(first, second, what):
    """A sentence: how many verdicts of two sets of seeds agree, and how far the order does.

    As many seeds of the one set as of the other: with fewer, fewer pairs would be decided.
    """
    if not (sides := shared(first, second)):
        return f"{what}: not run yet."
    n = min(len(seeds) for _, seeds, _ in sides)
    first, second = ({arm: {seed: row[seed] for seed in seeds[:n]} for arm, row in values.items()}
                     for _, seeds, values in sides)
    found = agreement(duels(first), duels(second))
    return (f"{what}, {n} against {n} seeds: {found.same} of {found.pairs} pairwise verdicts are the same "
            f"({found.same / found.pairs:.0%}), {found.opposite} are opposite. Of the {found.decided} pairs "
            f"that are decided at least once, {found.signs} have differences of the same sign. "
            + spearman(first, second, n))


def larger_rows(first, second, what):
    """A row for each arm, the best of the second side first: rank and gold on both sides."""
    sides = shared(first, second)
    columns = []
    for arms, _, values in sides:
        means = table_of(values)[2].mean(1)
        columns.append({arm: (f"{rank:g}", plus_minus(*t_interval([*values[arm].values()])))
                        for arm, rank in zip(arms, rank_of(means))})
    best_first = sorted(columns[1], key=lambda arm: float(columns[1][arm][0]))
    return [["arm", *(f"{word}, {name}" for word in ("rank", "gold") for name in what)],
            *([arm, *(column[arm][i] for i in (0, 1) for column in columns)] for arm in best_first)]


def reversals(first, second):
    """(how many pairs the first side decides, those of them with a difference of the other sign there)."""
    (_, _, first), (_, _, second) = shared(first, second)
    decided = {pair: duel for pair, duel in duels(first).items() if duel.verdict != "="}
    found = []
    for pair, duel in decided.items():
        better, worse = pair if duel.verdict == ">" else pair[::-1]
        gaps = [[side[better][seed] - side[worse][seed] for seed in side[better]] for side in (first, second)]
        if fmean(gaps[1]) <= 0:
            here, there = (plus_minus(*t_interval(gap), "+") for gap in gaps)
            found.append((abs(fmean(gaps[1])), f"{better} over {worse} ({here}; there {there})"))
    return len(decided), [text for _, text in sorted(found, reverse=True)]


def larger_text(first, second, what):
    """How far the order of the first side holds on the second, in words."""
    (_, seeds, one), (_, others, two) = shared(first, second)
    decided, other_way = reversals(first, second)
    turned = f" The other way: {'; '.join(other_way)}." if other_way else ""
    return (f"{what}, {len(others)} seeds, with the settings of the small model: nothing was tuned anew. Of "
            f"the {decided} pairs of these arms that {len(seeds)} seeds of the small model decide (Holm's "
            f"correction), {decided - len(other_way)} have a difference of the same sign.{turned} "
            + spearman(one, two, min(len(seeds), len(others))))
