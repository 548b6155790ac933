"""The referee: every method under one protocol, each paper's claim next to what was measured here.

    python compare.py dpo --seeds 5       # the same as: python dpo.py --reproduce --seeds 5; any flag of dpo.py works
    python compare.py dpo --report        # table and figure from results/dpo.json; runs nothing
    python compare.py --readme            # README's results block from results/*.json

Design. A method's EXPERIMENTS name arms (settings) and claims (inequalities between arms). A seed draws everything: data,
annotators, SFT policy, reward models, training order. All arms of a seed share those draws, so every comparison is the
difference of two arms within a seed, and the seeds are the sample. Seeds 0, 1, 2, ... are for reporting, and their
number is fixed before the first one runs; tuning uses seeds from 100 on, so that nothing reported was chosen by looking.

A comparison may also be made at equal KL (where the other arm's trace first reaches this arm's final KL), and between the
spreads (standard deviations over arms) of two groups of arms.

Decision. With the 95% t-interval of the paired differences, a comparison holds when the whole interval lies on the claimed
side of 0. A claim of k comparisons is
    reproduced        when all k hold. No correction: a conjunction accepted only if every part is (intersection-union test)
                      is wrong no more often than one part is.
    not reproduced    when the interval of some comparison, at level 1 - 0.05/k, has nothing on the claimed side. Any one of k
                      can sink the claim, so here Bonferroni is needed.
    inconclusive      otherwise; always so with one seed.
Either error then has probability at most 2.5% per claim. Nothing corrects for the number of claims in the whole table.
Intervals assume roughly normal differences between seeds; five seeds cannot test that.

A run is identified by its full settings and its seed, not by the code: after changing an algorithm, delete its JSON.
Everything is written below the current directory: results/, and runs/ for the policies.
"""
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks import UserError

SET_HERE = {"seed", "seeds", "out", "quiet", "reproduce", "resume"}      # fields of a Config that the referee fills in
NO_IDENTITY = SET_HERE | {"device"}                                      # fields that do not make it another experiment
SECONDS_PER_ARM, SECONDS_PER_SEED = 20, 100                        # first guess: one run; building a seed's models
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL", "eval/fluency": "fluency",
           "eval/length": "length", "eval/win_rate": "win rate", "seconds": "seconds"}
RULES = ("± is half a 95% t-interval over seeds. Claims are judged on differences paired within a seed: reproduced if every "
         "interval lies on the claimed side of 0; not reproduced if one lies wholly off it (at level 1 - 0.05/k for k "
         "comparisons); else inconclusive. Arm tables are not paired, so their intervals are wider. KL is to the policy that the arm "
         "started from.")


# ---------------------------------------------------------------------------------------------------- statistics

def t_quantile(level, df):
    """The t with P(|T| < t) = level, for a whole number df of degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        # Abramowitz and Stegun 26.7.3 (odd df) and 26.7.4 (even df), with t = sqrt(df) tan(theta).
        odd = df % 2
        term, total = math.cos(theta) if odd else 1.0, 0.0
        for i in range(df // 2):
            total += term
            term *= math.cos(theta) ** 2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
        inside = 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
        low, high = (theta, high) if inside < level else (low, theta)
    return math.sqrt(df) * math.tan(low)


def t_interval(values, level=0.95):
    """Mean and half-width of Student's t-interval. One value says nothing about its spread: infinite."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, math.inf
    return mean, t_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def value(run, metric):
    """A final metric; with ":change" less its value at the start, with ":second_half" less that half-way through the steps.
    None where it was not measured."""
    name, _, since = metric.partition(":")
    if not since:
        return run.get(name)
    trace = run["trace"]
    start = trace[:1] if since == "change" else [e for e in trace if 2 * e["step"] == trace[-1]["step"]]
    first, last = start[0].get(name) if start else None, trace[-1].get(name)
    return None if first is None or last is None else last - first


def when_reached(run, at, level, metric):
    """The metric where the run's trace first reaches the level of `at`, linear between evaluations. None if it never does."""
    for before, after in zip(run["trace"], run["trace"][1:]):
        if before[at] <= level <= after[at]:
            share = (level - before[at]) / (after[at] - before[at]) if after[at] > before[at] else 0.0
            return before[metric] + share * (after[metric] - before[metric])
    return None


def spreads(arms, groups, metric):
    """{group: {seed: {metric: standard deviation over the arms of the group}}}, for seeds that all of them have."""
    derived = {}
    for name, members in groups.items():
        seeds = set.intersection(*(set(arms.get(member, {})) for member in members))
        values = {s: [value(arms[member][s], metric) for member in members] for s in seeds}
        derived[name] = {s: {metric: None if None in v else statistics.stdev(v)} for s, v in values.items()}
    return derived


class Comparison(NamedTuple):
    text: str
    status: str                # holds, excluded, open, not run, not measured
    mean: float = math.nan     # of left - right, whichever way the claim goes; of left where right is a number
    half: float = math.inf
    n: int = 0                 # seeds
    strength: tuple = ()       # small is weak


def compare_arms(arms, metric, left, op, right, offset=0.0, k=1, at=None):
    """One inequality of a claim with k of them: left op right + offset; arms is {arm: {seed: run}}.

    With `at`, the right arm's value is taken where its trace first reaches the left arm's final `at` (equal KL, say).
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
    elif sign * mean + t_interval(paired, 1 - 0.05 / k)[1] <= 0:
        status = "excluded"
    ratio = sign * mean / half if half else math.copysign(math.inf, sign * mean)
    return Comparison(text, status, mean + offset, half, len(seeds), (ratio, sign * mean))


def verdict(claim, arms, groups={}):
    """(word, comparisons) for one claim; the rule is in this file's docstring. `groups` name arms whose spread is compared."""
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


def best_of_n(proxy, gold, n):
    """Expected gold and proxy score of the best of n by proxy, from N >= n scored samples a prompt.

    Unbiased: sorted by proxy, the i-th sample is the best of C(i-1, n-1) of the C(N, n) subsets (Nakano et al. 2021,
    appendix I). Equal proxy scores are equally likely to be chosen, so tied samples share the mean of their gold scores.

    Args: proxy, gold: [P, N].  Returns: mean gold, mean proxy, KL to the sampling policy in nats: log n - (n-1)/n,
    exact when all samples differ in score and an upper bound otherwise.
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
    curve = []
    for n in (2 ** i for i in range(len(proxy[0]).bit_length())):
        mean_gold, mean_proxy, kl = best_of_n(proxy, gold, n)
        curve.append([n, kl, mean_gold, mean_proxy])
    return curve


# ---------------------------------------------------------------------------------------------------- arms and runs

class Arm(NamedTuple):
    name: str
    method: str
    settings: dict             # keyword arguments of the method's Config
    start: Any                 # the Arm whose saved policy it starts from, or None
    key: str                   # hash of everything that makes it this experiment, the seed apart


def differences(config):
    """The settings that are not the default. One whose default is None was perhaps filled in from the others (a learning
    rate that depends on the model); another method fills it in otherwise, so it counts only if it was really given."""
    values, default = vars(config), vars(type(config)())
    chosen = {f.name: values[f.name] for f in dataclasses.fields(config)
              if f.default is not None and values[f.name] != default[f.name]}
    filled = vars(type(config)(**{k: v for k, v in chosen.items() if k not in SET_HERE}))
    return chosen | {f.name: values[f.name] for f in dataclasses.fields(config)
                     if f.default is None and values[f.name] != filled[f.name]}


def plan(method_name, given):
    """{experiment: {name: Arm}}, starters before the arms that need them; given are the user's flags."""
    import common                                                   # here: common.main imports this module
    shared = {f.name for f in dataclasses.fields(common.Config)}

    def add(name, experiment, arms):
        if name in arms:
            return arms[name]
        overrides = dict(experiment["arms"][name])
        method = overrides.pop("method", method_name)
        start = overrides.pop("start", None)
        starter = add(start, experiment, arms) if start else None
        # dpo's --beta is not rso's beta: another method gets only the flags that all scripts share.
        settings = {k: v for k, v in given.items() if method == method_name or k in shared} | overrides
        config = importlib.import_module(method).Config(**settings)
        identity = {k: v for k, v in differences(config).items() if k not in NO_IDENTITY}
        text = json.dumps([method, identity, starter and starter.key], sort_keys=True, default=str)
        arms[name] = Arm(name, method, settings, starter, hashlib.sha256(text.encode()).hexdigest()[:12])
        return arms[name]

    planned = {}
    for title, experiment in importlib.import_module(method_name).EXPERIMENTS.items():
        planned[title] = {}
        for name in experiment["arms"]:
            add(name, experiment, planned[title])
    return planned


def defaults(method_names):
    """{method: {option: default}}: stored with the runs, since a key holds only what differs from these."""
    return {name: {k: v for k, v in dataclasses.asdict(importlib.import_module(name).Config()).items() if k not in NO_IDENTITY}
            for name in sorted(method_names)}


def outdated(results):
    """Has a default changed under the stored runs? An option that is new since then is no change."""
    now = defaults(results.get("defaults", {}))
    return any(now[name].get(k, v) != v for name, then in results.get("defaults", {}).items() for k, v in then.items())


def rounded(x):
    """Six significant digits: enough to judge by, and a file whose diff can be read. Not-a-number becomes null."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(v) for v in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    return x


def load(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else {}


def reproduce(method_name, config, results_dir="results", runs_dir="runs/compare"):
    """Runs what is missing of the method's experiments for seeds 0 .. config.seeds - 1, then reports."""
    import common
    from tqdm import tqdm

    method = importlib.import_module(method_name)
    given = {k: v for k, v in differences(config).items() if k not in SET_HERE}
    unique = {}                                                     # experiments share the runs of identical arms
    for arms in plan(method_name, given).values():
        for arm in arms.values():
            unique.setdefault(arm.key, arm)

    path = Path(results_dir) / f"{method_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = load(path)
    runs = {(r["key"], r["seed"]): r for r in stored.get("runs", []) if r["key"] in unique and not outdated(stored)}
    header = {k: stored.get(k) for k in ("software", "device")}
    curves = stored.get("best_of_n", {})
    wants_curve = any(p.get("best_of_n") for e in method.EXPERIMENTS.values() for p in e.get("panels", []))

    def folder(key, seed):
        slug = re.sub(r"[^a-z0-9.]+", "-", unique[key].name.lower()).strip("-")
        return Path(runs_dir) / method_name / f"{slug}-{key}" / f"seed{seed}"

    def save():
        common.write_json(path, {
            "method": method_name, **header,
            "defaults": defaults({arm.method for arm in unique.values()}),
            "config": {k: v for k, v in given.items() if k not in NO_IDENTITY},
            "seeds": sorted({seed for _, seed in runs}),
            "runs": sorted(runs.values(), key=lambda r: (r["arm"], r["seed"], r["key"])),
            "best_of_n": dict(sorted(curves.items(), key=lambda item: int(item[0]))),
        })

    def missing(seed):
        todo = []

        def need(key):
            start = unique[key].start
            # Results are committed, policies are not: in a fresh clone a finished starter has no directory.
            if start and not ((start.key, seed) in runs and folder(start.key, seed).is_dir()):
                need(start.key)
            if key not in todo:
                todo.append(key)

        for key in unique:
            if (key, seed) not in runs:
                need(key)
        return todo

    work = {seed: missing(seed) for seed in range(config.seeds)}
    work = {seed: todo for seed, todo in work.items() if todo or (wants_curve and str(seed) not in curves)}
    total = sum(map(len, work.values()))
    known = [r["seconds"] for r in stored.get("runs", []) if r.get("seconds")]
    seconds = total * (statistics.fmean(known) if known else SECONDS_PER_ARM) + len(work) * SECONDS_PER_SEED
    dropped = len(stored.get("runs", [])) - len(runs)
    estimate = f"{total} runs to do, about {math.ceil(seconds / 60)} min" if work else "nothing to run"
    print(f"{method_name}: {estimate}; {len(runs)} stored, {dropped} of other settings dropped")

    # A starter that is trained again must not count as finished while its directory is half written.
    for seed, todo in work.items():
        for key in todo:
            runs.pop((key, seed), None)
    if work:
        packages = ("torch", "transformers", "tokenizers", "numpy")
        header = {"software": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
                  "device": f"{config.device}: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    save()
    with tqdm(total=total, disable=not total) as bar:
        for seed, todo in work.items():
            bar.set_description(f"seed {seed}: building")
            seed_config = method.Config(**given | {"seed": seed, "quiet": True})
            common.load_task(seed_config)
            if wants_curve:
                pool = common.test_pool(seed_config)
                curves[str(seed)] = rounded(best_of_n_curve(*pool)) if pool else None
            for key in todo:
                arm = unique[key]
                bar.set_description(f"seed {seed}: {arm.name}")
                settings = arm.settings | {"seed": seed, "quiet": True, "out": str(folder(key, seed))}
                if arm.start:
                    settings["policy"] = str(folder(arm.start.key, seed))
                module = importlib.import_module(arm.method)
                arm_config = module.Config(**settings)
                shutil.rmtree(arm_config.out, ignore_errors=True)           # left by a run that was killed
                result = module.run(arm_config)
                overrides = {k: v for k, v in differences(arm_config).items()
                             if k not in NO_IDENTITY and not (arm.start and k == "policy")}
                if arm.method != method_name:
                    overrides["method"] = arm.method
                if arm.start:
                    overrides["start"] = arm.start.name
                runs[key, seed] = rounded({"arm": arm.name, "seed": seed, "key": key, "config": overrides}
                                          | {k: v for k, v in result.items() if k != "out"})
                save()
                bar.update()
    save()
    return report(method_name, results_dir)


# ---------------------------------------------------------------------------------------------------- tables

def collect(method_name, results):
    """{experiment: {arm: {seed: run}}}, of the runs whose settings are still those of EXPERIMENTS."""
    by_key = {}
    for run in () if outdated(results) else results["runs"]:
        by_key.setdefault(run["key"], {})[run["seed"]] = run
    return {title: {name: by_key.get(arm.key, {}) for name, arm in arms.items()}
            for title, arms in plan(method_name, results["config"]).items()}


def plus_minus(mean, half, sign="", size=0):
    size = max(size, abs(mean), half if math.isfinite(half) else 0)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{mean:{sign}.{digits}f}" + (f" ±{half:.{digits}f}" if math.isfinite(half) else "")


def measured(word, comparisons, seeds):
    if word in ("not run", "not measured"):
        return "; ".join(c.text for c in comparisons if c.status == word)
    weakest = min(comparisons, key=lambda c: c.strength)
    text = f"{weakest.text}: {plus_minus(weakest.mean, weakest.half, '+')}"
    if len(comparisons) > 1:
        text += f" (weakest of {len(comparisons)})"
    return text if weakest.n == seeds and seeds > 1 else f"{text} ({weakest.n} seed{'s' * (weakest.n > 1)})"


def claim_rows(method_name, results, collected):
    rows = [["claim", "paper", "measured", "verdict"]]
    for title, experiment in importlib.import_module(method_name).EXPERIMENTS.items():
        for claim in experiment["claims"]:
            word, comparisons = verdict(claim, collected[title], experiment.get("spreads", {}))
            rows.append([claim["claim"], f"{claim['paper']} ({claim['source']})",
                         measured(word, comparisons, len(results["seeds"])), word])
    return rows


def arm_rows(arms, columns=COLUMNS):
    """One row an arm; only the columns that some arm has."""
    cells = {name: {m: [v for run in runs.values() if (v := value(run, m)) is not None] for m in columns}
             for name, runs in arms.items()}
    sizes = {m: max(abs(statistics.fmean(row[m])) for row in cells.values() if row[m])
             for m in columns if any(row[m] for row in cells.values())}
    return [["arm"] + [columns[m] for m in sizes]] + [
        [name] + [plus_minus(*t_interval(row[m]), size=size) if row[m] else "-" for m, size in sizes.items()]
        for name, row in cells.items()]


def text_table(rows, width=110):
    """Aligned plain text; the widest columns wrap until it fits."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > width and widths != words:                      # no word is broken
        widths[max((w, i) for i, w in enumerate(widths) if w > words[i])[1]] -= 1
    lines = []
    for i, row in enumerate(rows):
        wrapped = [textwrap.wrap(cell, w) for cell, w in zip(row, widths)]
        for line in itertools.zip_longest(*wrapped, fillvalue=""):
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())
        if i == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def markdown_table(rows):
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def provenance(results):
    software = ", ".join(f"{name} {version}" for name, version in (results["software"] or {}).items())
    flags = ", ".join(f"{k}={v}" for k, v in results["config"].items())
    return (f"Seeds {', '.join(map(str, results['seeds']))}." + (f" Flags: {flags}." if flags else "")
            + f" {results['device']}; {software}.")


def report(method_name, results_dir="results"):
    """Prints the tables, draws the figure; returns what the JSON holds."""
    path = Path(results_dir) / f"{method_name}.json"
    results = load(path)
    if not results:
        raise UserError(f"{path} does not exist yet: python compare.py {method_name} --seeds 5 makes it")
    collected = collect(method_name, results)
    print("\n" + text_table(claim_rows(method_name, results, collected)) + "\n\n" + textwrap.fill(RULES, 110))
    for title, experiment in importlib.import_module(method_name).EXPERIMENTS.items():
        print(f"\n{title}: {experiment['question']}\n"
              + text_table(arm_rows(collected[title], experiment.get("columns", COLUMNS))))
    print("\n" + textwrap.fill(provenance(results), 110))
    if importlib.util.find_spec("matplotlib"):
        draw(method_name, results, collected, path.with_suffix(".png"))
        print(f"{path}, {path.with_suffix('.png')}")
    else:
        print('no figure: pip install -e ".[plot]"')
    return results


BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def readme_block(results_dir="results"):
    """Everything between README's markers, judged afresh from the stored runs."""
    parts = [RULES]
    for path in sorted(Path(results_dir).glob("*.json")):
        results = load(path)
        name = results["method"]
        collected = collect(name, results)
        rows = claim_rows(name, results, collected)
        words = [row[3] for row in rows[1:]]
        tally = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
        parts += [f"### `{name}.py`: {tally}", markdown_table(rows)]
        for title, experiment in importlib.import_module(name).EXPERIMENTS.items():
            parts += [f"**{title}**: {experiment['question']}", 
                      markdown_table(arm_rows(collected[title], experiment.get("columns", COLUMNS)))]
        if path.with_suffix(".png").exists():
            parts.append(f"![{name}: figure]({Path(results_dir).name}/{name}.png)")
        parts.append(provenance(results))
    return "\n\n".join(parts)


def write_readme(readme="README.md", results_dir="results"):
    text = Path(readme).read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme} lacks the lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    block = readme_block(results_dir)
    Path(readme).write_text(f"{before}{BEGIN}\n{block}\n{END}{after}", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- figure

SINGLES = "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C00", "#0072B2", "#F0E442"


def colours(arms):
    """{arm: colour}. Arms that differ only in a number share a hue, light to dark; the rest take Okabe and Ito's
    colour-blind-safe set. Black is for what was not trained (SFT): its trace ends where it began."""
    import matplotlib
    number = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
    chosen = {name: "black" for name, runs in arms.items() if all(r["trace"][0] == r["trace"][-1] for r in runs.values())}
    families = {}
    for name in (name for name in arms if name not in chosen):
        families.setdefault(number.sub("#", name), []).append(name)
    ramps = itertools.cycle(("Blues", "Purples"))
    singles = itertools.cycle(SINGLES)
    for family in families.values():
        if len(family) < 3:
            chosen.update(zip(family, singles))
            continue
        family.sort(key=lambda name: float(number.search(name).group()))
        ramp = matplotlib.colormaps[next(ramps)]
        chosen.update((name, ramp(0.4 + 0.6 * i / (len(family) - 1))) for i, name in enumerate(family))
    return chosen


def draw_lines(ax, panel, arms, palette, curves):
    x = panel["x"]
    for name in arms:
        for y, style in zip(panel["y"], ("-", "--", ":", "-.")):
            points = [[(e[x], e[y]) for e in run["trace"] if e.get(x) is not None and e.get(y) is not None]
                      for run in arms[name].values()]
            length = min(map(len, points), default=0)
            if not length:
                continue
            points = np.array([p[:length] for p in points])                       # [seeds, positions, 2]
            means = points.mean(axis=0)
            halves = [t_interval(points[:, -1, i].tolist())[1] for i in (0, 1)]
            bars = [half if math.isfinite(half) else 0 for half in halves]
            untrained, colour = palette[name] == "black", palette[name]
            label = name if len(panel["y"]) == 1 else f"{name}: {y.removeprefix('eval/')}"
            ax.plot(*means.T, style, color=colour, label=None if untrained else label, linewidth=1.8)
            ax.errorbar(*means[-1], xerr=bars[0], yerr=bars[1], color=colour, linewidth=1, capsize=2, zorder=4 + untrained,
                        fmt="*" if untrained else "o", markersize=13 if untrained else 5, label=label if untrained else None)
    column = {"eval/kl": 1, "eval/gold": 2, "eval/proxy": 3}
    curves = [curve for curve in curves.values() if curve]
    if panel.get("best_of_n") and curves:
        means = np.mean(curves, axis=0)
        for y in panel["y"]:
            ax.plot(means[:, column[x]], means[:, column[y]], "--", color="grey", linewidth=1.5, zorder=1,
                    label=f"best of n, n up to {means[-1, 0]:.0f}")
    ax.set_xlabel(COLUMNS.get(x, x) + (" to the reference, nats" if x == "eval/kl" else ""))
    ax.legend(fontsize=9, framealpha=0.7)


def draw_bars(ax, panel, arms, palette):
    log = panel.get("log", False)
    thickness = 0.8 / len(panel["y"])
    for j, y in enumerate(panel["y"]):
        for i, (name, runs) in enumerate(arms.items()):
            values = [v for run in runs.values() if (v := value(run, y)) is not None]
            if values:
                mean, half = t_interval(values)
                ax.barh(i + (j - (len(panel["y"]) - 1) / 2) * thickness, mean, thickness * 0.92,
                        color=palette[name] if len(panel["y"]) == 1 else SINGLES[j], label=y.split("/")[-1] if i == 0 else None,
                        xerr=half if math.isfinite(half) else None, capsize=3)
    if log:
        ax.set_xscale("log")
    ax.set_yticks(range(len(arms)), list(arms))
    ax.invert_yaxis()
    if not log:
        ax.axvline(0, color="black", linewidth=0.8)
    if len(panel["y"]) > 1:
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)      # below: bars leave no room


def draw_curve(ax, panel, arms, palette):
    """run[panel["curve"]], a list of {x, y, ...} in the same places for every seed, means and 95% intervals; the diagonal where x and
    y have one unit."""
    for name, runs in arms.items():
        curves = [run[panel["curve"]] for run in runs.values() if run.get(panel["curve"])]
        for j, (y, style) in enumerate(zip(panel["y"], ("-", "--", ":", "-.", "-"))) if curves else ():
            rows = [row for row in zip(*curves) if all(point.get(y) is not None for point in row)]
            spread = [t_interval([point[y] for point in row]) for row in rows]
            x = [statistics.fmean(point[panel["x"]] for point in row) for row in rows]
            ax.errorbar(x, [mean for mean, _ in spread], [half if math.isfinite(half) else 0 for _, half in spread], capsize=2,
                        linestyle=style, marker="o", markersize=4, label=name if len(panel["y"]) == 1 else f"{name}: {y}",
                        color=palette[name] if len(arms) > 1 else SINGLES[j])
    ax.axline((0, 0), slope=1, color="grey", linewidth=1, linestyle="--", zorder=0)
    ax.set_xlabel("asked for")
    ax.legend(fontsize=9, framealpha=0.7)


def draw_matrix(ax, panel, arms):
    """run[panel["matrix"]], {row: {column: number}}: the mean over seeds of one arm, written into the cells."""
    matrices = [run[panel["matrix"]] for runs in arms.values() for run in runs.values() if run.get(panel["matrix"])]
    if not matrices:
        return ax.set_axis_off()
    names = list(matrices[0])
    cells = [[[m[row][column] for m in matrices if m[row][column] is not None] for column in names] for row in names]
    spread = [[t_interval(values) if values else (math.nan, math.inf) for values in line] for line in cells]
    ax.imshow([[mean for mean, _ in line] for line in spread], cmap="PuOr", vmin=-1, vmax=1)
    for i, line in enumerate(spread):
        for j, (mean, half) in enumerate(line):
            ax.text(j, i, plus_minus(mean, half, size=1), ha="center", va="center", fontsize=9, color="white" if abs(mean) > 0.7 else "black")
    ax.set_xticks(range(len(names)), names, rotation=20)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylabel("asked for one level more")
    ax.set_xlabel("levels that came")


def draw(method_name, results, collected, path):
    """One row an experiment, one column a panel, 1600 pixels wide; bars and whiskers are 95% intervals over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    experiments = {t: e for t, e in importlib.import_module(method_name).EXPERIMENTS.items() if e.get("panels")}
    if not experiments:
        return
    columns = max(len(e["panels"]) for e in experiments.values())
    width = max(5.4 * columns, 9)
    figure = Figure(figsize=(width, 4.3 * len(experiments)), dpi=1600 / width, layout="constrained")
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        rows = figure.subfigures(len(experiments), 1, squeeze=False)[:, 0]
        for row, (title, experiment) in zip(rows, experiments.items()):
            row.suptitle(f"{title}: {experiment['question']}", fontweight="bold")
            palette = colours(collected[title])
            axes = row.subplots(1, columns, squeeze=False)[0]
            for ax in axes[len(experiment["panels"]):]:
                ax.set_axis_off()
            for ax, panel in zip(axes, experiment["panels"]):
                arms = {name: collected[title][name] for name in panel.get("arms") or collected[title]}
                names = ", ".join(COLUMNS.get(y, y.removeprefix("eval/")) for y in panel.get("y", ()))
                ax.set_title(panel.get("title", ""), fontsize=11)
                if panel.get("kind") == "bars":
                    ax.set_xlabel(names if len(panel["y"]) == 1 else "")
                    draw_bars(ax, panel, arms, palette)
                elif panel.get("kind") == "curve":
                    ax.set_ylabel(names)
                    draw_curve(ax, panel, arms, dict(zip(arms, itertools.cycle(SINGLES))))     # distinct within the panel
                elif panel.get("kind") == "matrix":
                    draw_matrix(ax, panel, arms)
                else:
                    ax.set_ylabel(names)
                    draw_lines(ax, panel, arms, palette, results["best_of_n"])
        figure.savefig(path, metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------- command line

def method_names():
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if "\nEXPERIMENTS = {" in p.read_text(encoding="utf-8"))


def main(argv):
    if argv == ["--readme"]:
        return write_readme()
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    name, *flags = argv
    if name not in method_names():
        raise UserError(f"no method {name!r}; there are: {', '.join(method_names())}")
    if flags == ["--report"]:
        return report(name)
    from transformers import HfArgumentParser
    Config = importlib.import_module(name).Config
    parser = HfArgumentParser(Config, prog=f"compare.py {name}")
    reproduce(name, Config(**vars(parser.parse_args(flags))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
