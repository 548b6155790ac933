"""Who beats whom: ranks with intervals, all pairs with a correction, agreement of two rankings.

Values are {arm: {seed: number}}. All arms of a seed share its draws, so seeds are the sample: a bootstrap
draws whole seeds, with all their arms, and a pair of arms is compared within each seed.
"""
import itertools
import math
from typing import NamedTuple

import numpy as np

from harness import UserError

try:
    from scipy.stats import rankdata, spearmanr, ttest_rel
except ImportError:
    raise UserError('the referee needs scipy: pip install -e ".[plot]"') from None

DRAWS, LEVEL = 10000, 0.05


class Duel(NamedTuple):
    """One pair of arms: mean paired difference, its p-value (paired t-test), and the verdict after Holm."""
    difference: float
    p: float
    verdict: str               # ">", "<", or "=" where neither is shown to be better


def table_of(values):
    """(arms, seeds that all arms have, numbers [arms, seeds]); UserError for arms that share no two seeds."""
    seeds = sorted(set.intersection(*map(set, values.values()))) if values else []
    if len(seeds) < 2:
        raise UserError("a ranking needs at least two seeds that all arms have")
    return list(values), seeds, np.array([[values[arm][seed] for seed in seeds] for arm in values])


def rank_of(means):
    """Ranks along the first axis, 1 for the largest; equal means share the mean rank."""
    return rankdata(-means, axis=0)


def bootstrap(numbers, draws=DRAWS, seed=0):
    """Means [arms, draws] of numbers [arms, seeds] over seeds that are drawn with replacement."""
    n = numbers.shape[1]
    drawn = np.random.default_rng(seed).integers(n, size=(draws, n))
    return numbers[:, drawn].mean(2)


def ranks(values):
    """{arm: (rank, low, high)}: the rank of its mean, and the 95% percentile interval over draws of seeds."""
    arms, _, numbers = table_of(values)
    low, high = np.quantile(rank_of(bootstrap(numbers)), (0.025, 0.975), axis=1)
    rows = zip(rank_of(numbers.mean(1)).tolist(), low.tolist(), high.tolist())
    return dict(zip(arms, rows))


def duels(values):
    """{(a, b): Duel} of all pairs of arms, a before b. Holm's correction at LEVEL over all of them.

    Holm (1979): the p-values from the smallest on are compared with LEVEL/m, LEVEL/(m-1), ...; the first that
    is larger ends it. So the chance of even one wrong verdict among all pairs is at most LEVEL.
    """
    arms, _, numbers = table_of(values)
    pairs = list(itertools.combinations(range(len(arms)), 2))
    found = {}
    for i, j in pairs:
        difference = numbers[i] - numbers[j]
        if np.ptp(difference) == 0:                              # the same in every seed: no test is defined
            p = 1.0 if difference[0] == 0 else 2.0 ** (1 - len(difference))               # the sign test's
        else:
            p = float(ttest_rel(numbers[i], numbers[j]).pvalue)
        found[i, j] = float(difference.mean()), p
    shown, m = set(), len(pairs)
    for k, pair in enumerate(sorted(pairs, key=lambda pair: found[pair][1])):
        if found[pair][1] > LEVEL / (m - k):
            break
        shown.add(pair)
    return {(arms[i], arms[j]): Duel(mean, p, (">" if mean > 0 else "<") if (i, j) in shown else "=")
            for (i, j), (mean, p) in found.items()}


def ranks_left(found):
    """{arm: (best, worst)}: the ranks that the verdicts of `duels` leave, for all arms at once.

    An arm stands below those that are shown to have more, and above those that are shown to have less. So all
    ranges hold together with a chance of at least 1 - LEVEL. `ranks` looks at each arm for itself.
    """
    arms = list(dict.fromkeys(arm for pair in found for arm in pair))
    more = dict.fromkeys(arms, 0)
    less = dict.fromkeys(arms, 0)
    for (one, other), duel in found.items():
        if duel.verdict != "=":
            better, worse = (one, other) if duel.verdict == ">" else (other, one)
            more[worse] += 1
            less[better] += 1
    return {arm: (1 + more[arm], len(arms) - less[arm]) for arm in arms}


class Agreement(NamedTuple):
    same: int                  # pairs with the same verdict in both
    opposite: int              # pairs that are decided both times, the other way the second time
    pairs: int
    decided: int               # pairs that are decided at least once
    signs: int                 # of these: the mean differences have the same sign in both


def agreement(first, second):
    """How far the verdicts of `duels` are the same in both; of the pairs that both have.

    "=" twice is the same verdict, though both may only lack seeds. So the signs of decided pairs count too.
    """
    both = [(first[pair], second[pair]) for pair in first if pair in second]
    decided = [(a, b) for a, b in both if {a.verdict, b.verdict} != {"="}]
    return Agreement(sum(a.verdict == b.verdict for a, b in both),
                     sum({a.verdict, b.verdict} == {"<", ">"} for a, b in both), len(both), len(decided),
                     sum((a.difference > 0) == (b.difference > 0) for a, b in decided))


def order(first, second):
    """Spearman's correlation of the arms' means in two sets of values, and its range over resampled seeds.

    The arms are those that both have. Each set draws its own seeds; the range holds 95% of the draws. A draw
    adds noise to both orders, so the range lies a little too low.
    """
    arms = [arm for arm in first if arm in second]
    if len(arms) < 3:
        raise UserError("the order of fewer than three arms says nothing")
    numbers = [table_of({arm: values[arm] for arm in arms})[2] for values in (first, second)]
    drawn = [rank_of(bootstrap(n, seed=i)) for i, n in enumerate(numbers)]
    centred = [d - d.mean(0) for d in drawn]
    norms = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    found = (centred[0] * centred[1]).sum(0) / np.where(norms, norms, math.inf)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(spearmanr(*(n.mean(1) for n in numbers)).statistic), float(low), float(high)
