"""The arithmetic of a verdict: intervals, comparisons of two arms, claims, best of n.

A seed draws everything: data, annotators, SFT policy, reward models, training order. All arms of a seed share
these draws. So every comparison is the difference of two arms within a seed, and the seeds are the sample.
A comparison may also be made at equal KL: the other arm's value is taken where its trace first reaches this
arm's final KL.
("a", "=", "b", 0.1) claims that the two differ by less than the margin 0.1. It holds when the whole interval
lies between -0.1 and 0.1, that is, when two one-sided t-tests each reject a difference of 0.1 or more.

Decision. Take the 95% t-interval of the paired differences. A comparison holds when the whole interval lies
in the claimed range. A claim of k comparisons is
    reproduced        when all k hold. No correction is needed. A conjunction that is accepted only if every
                      part is (intersection-union test) is wrong no more often than one part is.
    not reproduced    when the interval of some comparison, at level 1 - 0.05/k, has nothing in the claimed
                      range. Any one of k can reject the claim, so here Bonferroni's correction is needed.
    inconclusive      otherwise; always so with one seed.
Either error has a probability of at most 2.5% per claim (rejection of a true "=": 5%). Nothing corrects for
the number of claims. Intervals assume roughly normal differences between seeds; ten seeds cannot test that.
"""
import math
from statistics import fmean, stdev
from typing import NamedTuple, Optional

import numpy as np

from harness import UserError
from raft import kl_best_of_n

try:
    from scipy.stats import beta, nct, norm, t as student_t
except ImportError:
    raise UserError('the referee needs scipy: pip install -e ".[plot]"') from None

POWER, MOST_SEEDS = 0.8, 1000


def t_interval(values, level=0.95):
    """Mean and half-width of Student's t-interval. One value says nothing about its spread: infinite."""
    n = len(values)
    if n == 1:
        return fmean(values), math.inf
    quantile = float(student_t.ppf((1 + level) / 2, n - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(n)


def mean_interval(error, n, level=0.95):
    """Half-width of Student's t-interval of a mean of n values, from its standard error (None of one)."""
    return float(student_t.ppf((1 + level) / 2, n - 1)) * error if n > 1 else math.inf


def share_interval(mean, error, n, level=0.95):
    """(low, high) of a mean of n values in [0, 1], such as a win rate: never a width of 0, never beyond.

    The exact binomial interval (Clopper and Pearson 1934) for the number of yes-or-no answers that would have
    the same standard error, made smaller for few values (Korn and Graubard 1998).
    """
    if n < 2:
        return 0.0, 1.0
    size = mean * (1 - mean) / error ** 2 if error else n
    size *= (norm.ppf((1 + level) / 2) / student_t.ppf((1 + level) / 2, n - 1)) ** 2
    yes, no = mean * size, (1 - mean) * size
    low = beta.ppf((1 - level) / 2, yes, no + 1) if yes else 0.0
    high = beta.ppf((1 + level) / 2, yes + 1, no) if no else 1.0
    return float(low), float(high)


def seeds_needed(distance, deviation, level=0.05):
    """The fewest seeds whose t-test shows, with a probability of 80%, on which side of a boundary a mean is.

    The smallest n with P(T > t[1 - level/2; n-1]) >= 0.8, where T is noncentral t with n-1 degrees of freedom
    and noncentrality sqrt(n) distance/deviation (Cohen 1988, chapter 2). MOST_SEEDS + 1: all larger numbers.
    """
    size = min(abs(distance) / deviation, 100.0) if deviation else 100.0
    normal = (norm.ppf(1 - level / 2) + norm.ppf(POWER)) ** 2               # n size^2 for a known deviation
    for n in range(2, MOST_SEEDS + 1):
        if n * size ** 2 >= normal and nct.sf(student_t.ppf(1 - level / 2, n - 1), n - 1,
                                              math.sqrt(n) * size) >= POWER:
            return n
    return MOST_SEEDS + 1


def plus_minus(mean, half, sign="", size=0):
    """Mean and half-width as text; larger numbers have fewer decimals. `size`: the largest of its column."""
    size = max(size, abs(mean), half if math.isfinite(half) else 0)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{mean:{sign},.{digits}f}" + (f" ±{half:,.{digits}f}" if math.isfinite(half) else "")


# ----------------------------------------------------------------------------------------- values of one run

def value(run, metric):
    """A final metric of a run, or None where it was not measured.

    With ":change" less its value at the start; with ":second_half" less that of the last evaluation up to
    half of the steps, if one was made on the way.
    """
    name, _, since = metric.partition(":")
    if not since:
        return run.get(name)
    trace = run["trace"] or [{}]                                                    # it has diverged
    start = trace[:1] if since == "change" else [
        e for e in trace[1:] if 2 * e["step"] <= trace[-1]["step"]][-1:]
    first, last = start[0].get(name) if start else None, trace[-1].get(name)
    return None if first is None or last is None else last - first


def mean_of(runs, metric):
    """The mean of a metric over the runs {seed: run} that have it; minus infinity where none has."""
    found = [run[metric] for run in runs.values() if run.get(metric) is not None]
    return fmean(found) if found else -math.inf


def when_reached(run, at, level, metric):
    """The metric where the run's trace first reaches the level of `at`; None if it never does.

    Linear between evaluations.
    """
    trace = [e for e in run["trace"] if level is not None and None not in (e.get(at), e.get(metric))]
    for before, after in zip(trace, trace[1:]):
        if before[at] <= level <= after[at]:
            share = (level - before[at]) / (after[at] - before[at]) if after[at] > before[at] else 0.0
            return before[metric] + share * (after[metric] - before[metric])
    return None


# --------------------------------------------------------------------------------------- comparisons, claims

class Comparison(NamedTuple):
    text: str
    status: str                # holds, excluded, open, not run, not measured
    mean: float = math.nan     # of left - right, whichever way the claim goes; of left if right is a number
    half: float = math.inf
    n: int = 0                 # seeds
    strength: tuple = ()       # small is weak
    settles: Optional[int] = None                 # how many seeds would settle it, while it is open


def compare_arms(arms, metric, left, op, right, offset=0.0, k=1, at=None):
    """One comparison of a claim with k of them; arms is {arm: {seed: run}}, `right` an arm or a number.

    left > right + offset; left < right + offset; or for "=": |left - right| < offset, which is the margin.
    With `at` (KL, say), the right arm's value is taken where its trace first reaches the left's final `at`.
    """
    number, equal = not isinstance(right, str), op == "="
    if op not in ("<", ">", "=") or equal and offset <= 0:
        raise UserError(f'"{left} {op} {right}": the operator is <, > or =, and = needs a margin above 0')
    boundary = (right if number else 0.0) + (0.0 if equal else offset)
    against = f" (against {boundary:g})" if boundary else ""
    within = f" (within {offset:g}" + (f" of {right:g})" if number else ")")
    text = (left if number else f"{left} - {right}") + (within if equal else against)
    seeds = sorted(set(arms.get(left, {})) & set(arms.get(left if number else right, {})))
    if not seeds:
        return Comparison(text, "not run")

    def other(seed):
        if number:
            return 0.0
        if at:
            return when_reached(arms[right][seed], at, arms[left][seed].get(at), metric)
        return value(arms[right][seed], metric)

    pairs = [(value(arms[left][s], metric), other(s)) for s in seeds]
    # Leaving out only the seeds without a number would flatter an arm that sometimes diverges.
    if any(v is None for pair in pairs for v in pair):
        return Comparison(text, "not measured", n=len(seeds))
    paired = [a - b - boundary for a, b in pairs]
    mean, half = t_interval(paired)
    same = half == 0 and 2.0 ** -len(paired) > 0.025 / k          # too few equal values, by the sign test
    inside = offset - abs(mean) if equal else mean if op == ">" else -mean      # how far in the claimed range
    status, settles = "open", None
    if same:
        settles = math.ceil(math.log2(k / 0.025))
    elif inside - half > 0:
        status = "holds"
    elif inside + t_interval(paired, 1 - 0.05 / k)[1] <= 0:                                     # Bonferroni
        status = "excluded"
    elif len(seeds) > 1:
        settles = seeds_needed(inside, stdev(paired), 0.05 if inside > 0 else 0.05 / k)
    ratio = inside / half if half else math.copysign(math.inf, inside or -1.0)
    return Comparison(text, status, mean + boundary, half, len(seeds), (ratio, inside), settles)


def verdict(claim, arms):
    """(word, comparisons) of one claim, by the rule above."""
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
    return float(np.mean(best_gold)), float(np.mean(np.sort(proxy) @ weights)), kl_best_of_n(n)


def best_of_n_curve(proxy, gold):
    """Rows [n, KL, gold, proxy] for n = 1, 2, 4, ... up to the number of samples."""
    found = [(2 ** i, *best_of_n(proxy, gold, 2 ** i)) for i in range(len(proxy[0]).bit_length())]
    return [[n, kl, mean_gold, mean_proxy] for n, mean_gold, mean_proxy, kl in found]
