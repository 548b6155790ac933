"""What the comparison's runs say: tables, the matrix of who beats whom, whether it holds, the figure."""
import importlib.util
import textwrap
from pathlib import Path
from statistics import fmean

from experiments.comparison import (ARMS, DEFAULT, FAMILIES, LABELS, MAIN, SECOND_SEEDS, SEEDS, SITUATIONS,
                                    UNRANKED, UNTRAINED)
from referee import figures
from referee.comparison import BUDGET, NAME, QUARTER, cost, experiments, start_of, tuned
from referee.ranking import duels, ranks, ranks_left
from referee.replication import holds, larger_rows, larger_text, shared
from referee.statistics import mean_of, plus_minus, t_interval
from referee.store import results_path, shown
from referee.tables import (COSTS, COSTS_ARE, arm_rows, collect, markdown_table, provenance, stored,
                            text_table)
from referee.tuning import COLUMNS as TUNED_COLUMNS
from referee.tuning import RULES as TUNING_RULES
from referee.tuning import FLUENCY_LOST, START, whole

METRIC = "eval/gold"
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/judge": "judge", "eval/win_rate": "win rate",
           "eval/kl": "KL, nats", "eval/fluency": "fluency", "eval/distinct_2": "distinct-2",
           "eval/length": "length, tokens"}
RULES = ("± is half a 95% t-interval over seeds. The rank is that of the mean gold; in brackets, the "
         "ranks in 95% of draws of the seeds, each arm for itself. distinct-2: different word pairs of all "
         "samples over all of their word pairs; best of 16 has fewer texts, so more. Time is in units of "
         "ppo.py with its defaults on the same seed. KL and win rate are against the SFT policy; the KL of "
         "best of n is an upper bound, and what starts from another arm has none. The papers' own recipes "
         "take about four times the budget, so they have no rank; nor has PPO with its defaults, whose "
         "settings were chosen earlier.")
OF_START = "eval/kl", "eval/win_rate", "eval/win_rate_proxy", "eval/win_rate_judge"    # against its start


def with_start(run, start):
    """A run with the cost of the run that it starts from, and without what was measured against that."""
    if not start or "diverged" in run:
        return run
    tokens = {k: run[k] + start[k] for k in COSTS if k.startswith("tokens")}
    return run | tokens | {"cpu_seconds": cost(run, start)} | dict.fromkeys(OF_START)


def with_starts(arms):
    """{arm: {seed: run}} without the arms that others start from, whose costs are added to those others'.
    "share" is the cost of a run in units of the run of BUDGET."""
    found, units = {}, arms.get(BUDGET, {})
    for name, runs in arms.items():
        starts = arms.get(start_of(name), {})
        if not name.endswith(": start"):
            own = {seed: with_start(run, starts.get(seed)) for seed, run in runs.items()}
            shares = {seed: {"share": run["cpu_seconds"] / cost(units[seed])} for seed, run in own.items()
                      if seed in units and "cpu_seconds" in run}
            own = {seed: run | shares.get(seed, {}) for seed, run in own.items()}
            found[DEFAULT if name == BUDGET else LABELS.get(name, name)] = own
    return found


def gathered(results_dir="results", given={}):
    """(view of the file, {title: {arm: {seed: run}}}); UserError where nothing is stored."""
    results, planned = stored(NAME, results_dir, given, "--jobs 2"), experiments(results_dir, given)
    collected = collect(NAME, results, planned)
    view = shown(NAME, results, planned) | {"wanted": len(SEEDS)}
    return view, {title: with_starts(arms) for title, arms in collected.items()}


def of_seeds(arms, seeds):
    """The arms with these seeds only."""
    return {name: {seed: run for seed, run in runs.items() if seed in seeds} for name, runs in arms.items()}


def ranked(arms):
    """{arm: {seed: gold}} of the arms that have a rank: within the budget, with all seeds of the others."""
    found = {name: {seed: run[METRIC] for seed, run in runs.items()} for name, runs in whole(arms).items()
             if runs and name not in UNRANKED}
    most = max(map(len, found.values()), default=0)
    return {name: values for name, values in found.items() if len(values) == most}


def places(arms):
    """{arm: its rank and the interval of that, in words}, where two seeds or more are there."""
    values = ranked(arms)
    found = ranks(values) if len(values) > 1 and min(map(len, values.values())) > 1 else {}
    return {name: "{:.0f} ({:.0f} to {:.0f})".format(*place) for name, place in found.items()}


def main_rows(arms, quarter={}):
    """A row for each arm, the best first: number, rank, metrics, gold after a quarter of the work."""
    place = places(arms)
    gold = {name: mean_of(runs, METRIC) for name, runs in arms.items() if runs}
    best_first = sorted(gold, key=lambda name: (name in UNRANKED, -gold[name]))
    header, *body = arm_rows({name: arms[name] for name in best_first},
                             COLUMNS | {"cpu_seconds": "CPU s", "share": "time"})
    less = {"eval/gold": "gold, a quarter of the work", "cpu_seconds": "CPU s of that"} if quarter else {}
    rows = [["", header[0], "rank", *header[1:], *less.values()]]
    for i, (name, *cells) in enumerate(body, 1):
        found = [[run[metric] for run in quarter.get(name, {}).values() if metric in run] for metric in less]
        cells += [plus_minus(*t_interval(row)) if row else "-" for row in found]
        rows.append([str(i), name, place.get(name, "-"), *cells])
    return rows


def less_fluent(arms):
    """A sentence: the arms whose mean fluency is below the limit that the tuning had; "" where none is."""
    limit = mean_of(arms["SFT"], "eval/fluency") - FLUENCY_LOST if arms.get("SFT") else 0.0
    found = [f"{name} (on {sum(run['eval/fluency'] < limit for run in runs.values())} of {len(runs)} seeds)"
             for name, runs in whole(arms).items() if runs and mean_of(runs, "eval/fluency") < limit]
    return found and f" Mean fluency below SFT's less {FLUENCY_LOST}: {', '.join(found)}." or ""


def short_rows(collected):
    """A row for each of the main arms, the best first: rank, gold in each situation, KL, fluency, time."""
    situations = {title: of_seeds(collected[title], SEEDS) for title in SITUATIONS}
    clean, place = situations["clean"], places(situations["clean"])
    gold = {name: mean_of(clean[name], METRIC) for name in MAIN if clean.get(name)}
    found = {name: {seed: run | {title: arms[name][seed].get(METRIC) for title, arms in situations.items()
                                 if seed in arms.get(name, {})} for seed, run in clean[name].items()}
             for name in sorted(gold, key=lambda name: (name in UNRANKED, -gold[name]))}
    body = arm_rows(found, {title: f"gold, {title}" for title in SITUATIONS} | {
        "eval/kl": "KL, nats", "eval/fluency": "fluency", "share": "time"})
    place["arm"] = "rank"
    return [[name, place.get(name, "-"), *cells] for name, *cells in body]


def matrix_rows(arms):
    """Who beats whom: > or < where the arm of the row has more or less gold, after Holm's correction."""
    values = ranked(arms)
    best_first = sorted(values, key=lambda name: -fmean(values[name].values()))
    found = duels({name: values[name] for name in best_first})
    left = ranks_left(found)
    rows = [["", *(str(i) for i in range(1, len(best_first) + 1)), "ranks"]]
    for i, name in enumerate(best_first, 1):
        marks = [{">": "<", "<": ">", "=": "·"}[found[other, name].verdict] for other in best_first[:i - 1]]
        marks += ["", *(found[name, other].verdict.replace("=", "·") for other in best_first[i:])]
        rows.append([f"{i} {name}", *marks, "{} to {}".format(*left[name])])
    return rows


def parts(results_dir="results", given={}):
    """[(heading, rows of a table or None, text)]: everything that is known, in order."""
    view, collected = gathered(results_dir, given)
    clean = collected["clean"]
    seeds = view["seeds"] if given else SEEDS
    view = view | {"seeds": [seed for seed in view["seeds"] if seed in seeds]}
    about = [["arm", "what it learns from"]] + [[LABELS.get(k, k), arm["about"]] for k, arm in ARMS.items()]
    found = [("arms", about, "Beside them: three that train nothing.")]
    for title, (question, _) in SITUATIONS.items():
        arms = of_seeds(collected[title], seeds)
        if any(arms.values()):
            quarter = of_seeds(collected[QUARTER], seeds) if title == "clean" else {}
            found.append((title, main_rows(arms, quarter if any(quarter.values()) else {}),
                          question + less_fluent(arms)))
    first = of_seeds(clean, seeds)
    found.append(("costs", arm_rows({name: runs for name, runs in first.items() if runs}, COSTS), COSTS_ARE))
    if places(first):
        found.append(("who beats whom", matrix_rows(first),
                      "Gold, paired within seeds, with Holm's correction over all pairs (5%). The arm of the "
                      "row has more (>) or less (<) than that of the column; · where neither is shown. The "
                      "last column: the ranks that these verdicts leave, for all arms at once."))
    larger = results_path(NAME, {"layers": 3}, results_dir)
    if not given:
        again = ranked(of_seeds(clean, SECOND_SEEDS))
        found.append(("does it hold?", None, holds(ranked(first), again, "Other seeds")))
    if not given and larger.exists():
        sides = ranked(first), ranked(gathered(results_dir, {"layers": 3})[1]["clean"])
        if shared(*sides):
            found.append(("a larger model", larger_rows(*sides, ("one layer", "three layers")),
                          larger_text(*sides, "Three layers, 1.1 million weights")))
    return found + [("", None, f"{RULES} {provenance(view)}")]


def tuning_parts(results_dir="results", given={}):
    """[(title, rows, what is chosen)] of what was tried on the validation seeds."""
    _, collected, chosen = tuned(results_dir, given)
    budget = arm_rows(collected[BUDGET], TUNED_COLUMNS, "setting")
    found = [(f"{BUDGET}: ppo.py with its defaults", budget, "")]
    for title, (_, why) in chosen.items():
        starts = collected[title].get(START, {})
        arms = {name: {seed: run | {"cpu_seconds": cost(run, starts.get(seed))} for seed, run in runs.items()}
                for name, runs in collected[title].items() if name != START}
        found.append((title, arm_rows(arms, TUNED_COLUMNS, "setting"), why))
    return found + [("", None, TUNING_RULES)]


def report(results_dir="results", given={}):
    """Print everything and draw the figure."""
    for heading, rows, text in parts(results_dir, given):
        print(f"\n{heading}\n" * bool(heading) + "\n".join(
            ([text_table(rows, 150)] if rows else []) + [textwrap.fill(text, 110)]))
    if not given:
        print("figure:", draw(results_dir) or 'none: pip install -e ".[plot]"')


def report_tuning(results_dir="results", given={}):
    """Print what was tried on the validation seeds."""
    for title, rows, why in tuning_parts(results_dir, given):
        print("\n".join(["", title, *([text_table(rows)] if rows else []), textwrap.fill(why, 110)]))


def by_cost(arms, quarter):
    """{arm: {seed: run}} whose trace goes from the SFT policy over a quarter of the time to all of it."""
    found = {}
    for name, runs in arms.items():
        for seed, run in runs.items() if name not in UNTRAINED else ():
            points = arms["SFT"].get(seed), quarter.get(name, {}).get(seed), run
            trace = [{"step": i, METRIC: point[METRIC], "cpu_seconds": point["cpu_seconds"] * (i > 0)}
                     for i, point in enumerate(points) if point and METRIC in point]
            found.setdefault(name, {})[seed] = {"trace": trace}
    return found


def draw(results_dir="results"):
    """Gold against KL, and gold against the seconds of training; returns the path."""
    if not importlib.util.find_spec("matplotlib"):
        return None
    view, collected = gathered(results_dir)
    arms, quarter = (of_seeds(collected[title], SEEDS) for title in ("clean", QUARTER))
    path = results_path(NAME, {}, results_dir).with_suffix(".png")
    figures.draw_rows([
        ("gold against KL", [dict(kind="points", x="eval/kl", y=[METRIC], best_of_n=True, families=FAMILIES)],
         {name: runs for name, runs in arms.items() if runs and name != DEFAULT}),
        ("gold against the CPU seconds of training: none, a quarter, all",
         [dict(x="cpu_seconds", y=[METRIC], ends=1, families=FAMILIES, over="CPU seconds of training")],
         {name: runs for name, runs in by_cost(arms, quarter).items() if name not in UNRANKED})],
        {seed: curve for seed, curve in view["best_of_n"].items() if int(seed) in SEEDS}, path)
    return path


def block(results_dir="results"):
    """The same in Markdown, for docs/comparison.md."""
    if not results_path(NAME, {}, results_dir).exists():
        return f"Not run yet: `python -m referee {NAME}`."
    found = []
    for heading, rows, text in parts(results_dir):
        found += [f"### {heading[0].upper()}{heading[1:]}"] if heading else []
        found += [markdown_table(rows), text] if rows else [text]
    return "\n\n".join(found)


def tuning_block(results_dir="results"):
    if not results_path(NAME, {}, Path(results_dir) / "tuning").exists():
        return f"Not tuned yet: `python -m referee {NAME} --tune`."
    return "\n\n".join(part for title, rows, why in tuning_parts(results_dir) for part in (
        f"**{title}**" if title else "", markdown_table(rows) if rows else "", why) if part)
