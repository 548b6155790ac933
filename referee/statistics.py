"""The arithmetic of a verdict: intervals, comparisons of two arms, claims, best of n.

A seed draws everything: data, annotators, SFT policy, reward models, training order. All arms of a seed share
these draws. So every comparison is the difference of two arms within a seed, and the seeds are the sample.
A comparison may also be made at equal KL (the other arm's value is taken where its trace first reaches this
arm's final KL), and between the spreads (standard deviations over arms) of two groups of arms.

Decision. Take the 95% t-interval of the paired differences. A comparison holds when the whole interval lies
on the claimed side of 0. A claim of k comparisons is
    reproduced        when all k hold. No correction is needed. A conjunction that is accepted only if every
                      part is (intersection-union test) is wrong no more often than one part is.
    not reproduced    when the interval of some comparison, at level 1 - 0.05/k, has nothing on the claimed
                      side. Any one of k can reject the claim, so here Bonferroni's correction is needed.
    inconclusive      otherwise; always so with one seed.
Either error then has a probability of at most 2.5% per claim. Nothing corrects for the number of claims in
the whole table. Intervals assume that differences between seeds are roughly normal; five seeds cannot test
that.
"""
import math
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from harness import UserError

try:
    from scipy.stats import t as student_t
except ImportError:
    raise UserError('the referee needs scipy: pip install -e ".[plot]"') from None


def t_interval(values, level=0.95):
    """Mean and half-width of Student's t-interval. One value says nothing about its spread: infinite."""
    n = len(values)
    if n == 1:
        return fmean(values), math.inf
    quantile = float(student_t.ppf((1 + level) / 2, n - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(n)


def plus_minus(mean, half, sign="", size=0):
    """Mean and half-width as text; larger numbers have fewer decimals. `size`: the largest of its column."""
    size = max(size, abs(mean), half if math.isfinite(half) else 0)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{mean:{sign}.{digits}f}" + (f" ±{half:.{digits}f}" if math.isfinite(half) else "")


# ----------------------------------------------------------------------------------------- values of one run

def value(run, metric):
    """A final metric of a run, or None where it was not measured.

    With ":change" less its value at the start; with ":second_half" less that half-way through the steps.
    """
    name, _, since = metric.partition(":")
    if not since:
        return run.get(name)
    trace = run["trace"]
    start = trace[:1] if since == "change" else [e for e in trace if 2 * e["step"] == trace[-1]["step"]]
    first, last = start[0].get(name) if start else None, trace[-1].get(name)
    return None if first is None or last is None else last - first


def when_reached(run, at, level, metric):
    """The metric where the run's trace first reaches the level of `at`; None if it never does.

    Linear between evaluations.
    """
    for before, after in zip(run["trace"], run["trace"][1:]):
        if before[at] <= level <= after[at]:
            share = (level - before[at]) / (after[at] - before[at]) if after[at] > before[at] else 0.0
            return before[metric] + share * (after[metric] - before[metric])
    return None


def spreads(arms, groups, metric):
    """{group: {seed: {metric: standard deviation over the arms of the group}}}, for seeds that all have."""
    derived = {}
    for name, members in groups.items():
        seeds = set.intersection(*(set(arms.get(member, {})) for member in members))
        values = {s: [value(arms[member][s], metric) for member in members] for s in seeds}
        derived[name] = {s: {metric: None if None in v else stdev(v)} for s, v in values.items()}
    return derived


# --------------------------------------------------------------------------------------- comparisons, claims

class Comparison(NamedTuple):
    text: str
    status: str                # holds, excluded, open, not run, not measured
    mean: float = math.nan     # of left - right, whichever way the claim goes; of left if right is a number
    half: float = math.inf
    n: int = 0                 # seeds
    strength: tuple = ()       # small is weak


def compare_arms(arms, metric, left, op, right, offset=0.0, k=1, at=None):
    """One inequality of a claim with k of them: left op right + offset; arms is {arm: {seed: run}}.

    `right` is an arm or a number. With `at`, the right arm's value is taken where its trace first reaches the
    left arm's final `at` (equal KL, say).
    """
    number = not isinstance(right, str)
    offset = right if number else offset
    text = (left if number else f"{left} - {right}") + (f" (against {offset:g})" if offset else "")
    seeds = sorted(set(arms.get(left, {})) & set(arms.get(left if number else right, {})))
    if not seeds:
        return Comparison(text, "not run")

    def other(seed):
        if number:
            return 0.0
        if at:
            return when_reached(arms[right][seed], at, arms[left][seed][at], metric)
        return value(arms[right][seed], metric)

    pairs = [(value(arms[left][s], metric), other(s)) for s in seeds]
    # Leaving out only the seeds without a number would flatter an arm that sometimes diverges.
    if any(v is None for pair in pairs for v in pair):
        return Comparison(text, "not measured", n=len(seeds))
    paired = [a - b - offset for a, b in pairs]
    mean, half = t_interval(paired)
    sign = {">": 1, "<": -1}[op]
    status = "open"
    if sign * mean - half > 0:
        status = "holds"
    elif sign * mean + t_interval(paired, 1 - 0.05 / k)[1] <= 0:                                # Bonferroni
        status = "excluded"
    ratio = sign * mean / half if half else math.copysign(math.inf, sign * mean)
    return Comparison(text, status, mean + offset, half, len(seeds), (ratio, sign * mean))


def verdict(claim, arms, groups={}):
    """(word, comparisons) of one claim, by the rule above. `groups` names arms whose spread is compared."""
    arms = arms | spreads(arms, groups, claim["metric"])
    comparisons = [compare_arms(arms, claim["metric"], *part, k=len(claim["holds"]), at=claim.get("at"))
                   for part in claim["holds"]]
    statuses = {c.status for c in comparisons}
    for word in ("not run", "not measured"):
        if word in statuses:
            return word, comparisons
    if "excluded" in statuses:
        return "not reproduced", comparisons
    return "reproduced" if statuses == {"holds"} else "inconclusive", comparisons


# ------------------------------------------------------------------------------------------------- best of n

def best_of_n(proxy, gold, n):
    """Expected gold and proxy score of the best of n by proxy, from N >= n scored samples of each prompt.

    Unbiased: sorted by proxy, the i-th sample is the best of C(i-1, n-1) of the C(N, n) subsets (Nakano et
    al. 2021, appendix I). Equal proxy scores are equally likely to be chosen, so tied samples share the mean
    of their gold scores.

    Args: proxy, gold: [P, N].
    Returns: mean gold, mean proxy, KL to the sampling policy in nats: log n - (n-1)/n, exact when all samples
        differ in score and an upper bound otherwise.
    """
    proxy, gold = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    size = proxy.shape[1]
    weights = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    best_gold = []
    for row_proxy, row_gold in zip(proxy, gold):
        _, group = np.unique(row_proxy, return_inverse=True)
        shared = np.bincount(group, row_gold) / np.bincount(group)
        best_gold.append(weights @ shared[np.sort(group)])
    return float(np.mean(best_gold)), float(np.mean(np.sort(proxy) @ weights)), math.log(n) - (n - 1) / n


def best_of_n_curve(proxy, gold):
    """Rows [n, KL, gold, proxy] for n = 1, 2, 4, ... up to the number of samples."""
    curve = []
    for n in (2 ** i for i in range(len(proxy[0]).bit_length())):
        mean_gold, mean_proxy, kl = best_of_n(proxy, gold, n)
        curve.append([n, kl, mean_gold, mean_proxy])
    return curve
