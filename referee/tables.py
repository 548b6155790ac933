"""Tables from stored runs: every claim of a paper next to what was measured, and every arm."""
import importlib.util
import itertools
import textwrap
from statistics import fmean

from harness import Config, UserError
from referee import figures
from referee.arms import experiments_of, load
from referee.statistics import MOST_SEEDS, plus_minus, t_interval, value, verdict
from referee.store import planned, results_path, shown

COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL, nats", "eval/fluency": "fluency",
           "eval/length": "length, tokens", "eval/win_rate": "win rate", "cpu_seconds": "CPU s"}
COSTS = {"cpu_seconds": "CPU s", "tokens_generated": "tokens generated", "tokens_trained": "tokens trained",
         "tokens_scored_reference": "tokens scored by the reference",
         "tokens_scored_reward": "tokens scored by rewards", "tokens_scored_value": "tokens scored by values",
         "state_mb": "MB trained"}
COSTS_ARE = "Costs of a run: CPU seconds on one thread and tokens of training, evaluation excluded."
RULES = ("± is half a 95% t-interval over seeds. Claims are judged on differences paired within a seed: "
         "reproduced if every interval lies in the claimed range; not reproduced if one lies wholly out of "
         "it (at level 1 - 0.05/k for k comparisons); else inconclusive. Of several comparisons the weakest "
         "is shown: its mean lies least far inside the claimed range, in half-widths of its interval. So "
         "many seeds would settle a claim with 80% power, if mean and deviation stay as they are. Arm tables "
         "are not paired, so their intervals are wider. KL is to the policy that the arm started from.")


def stored(method_name, results_dir="results", given={}, flag="--seeds 10"):
    """What the file of these flags holds; python -m referee METHOD with this flag makes it."""
    path = results_path(method_name, given, results_dir)
    results = load(path)
    if not results:
        flags = "".join(f" --{k} {v}" for k, v in given.items())
        raise UserError(f"{path} does not exist yet: python -m referee {method_name} {flag}{flags} makes it")
    return checked(results, path)


def checked(results, path):
    """The results of a file. UserError where parts of them are missing."""
    lost = {"runs", "config", "defaults", "best_of_n"} - results.keys() or {
        f"{name} of a run" for run in results["runs"] for name in {"key", "seed", "trace"} - run.keys()}
    if lost:
        raise UserError(f"{path} lacks {', '.join(sorted(lost))}: restore or delete it")
    return results


def collect(method_name, results, experiments=None):
    """{experiment: {arm: {seed: run}}} of the runs that are shown."""
    by_key = {}
    for run in shown(method_name, results, experiments)["runs"]:
        by_key.setdefault(run["key"], {})[run["seed"]] = run
    return {title: {name: by_key.get(arm.key, {}) for name, arm in arms.items()}
            for title, arms in planned(method_name, results, experiments).items()}


def seeds_in_words(n):
    return f"over {MOST_SEEDS}" if n > MOST_SEEDS else f"about {n}"


def measured(word, comparisons, seeds):
    """What was measured, in a cell: the weakest comparison of a claim, and how many seeds would settle it."""
    if word in ("not run", "not measured"):
        return "; ".join(c.text for c in comparisons if c.status == word)
    weakest = min(comparisons, key=lambda c: c.strength)
    text = f"{weakest.text}: {plus_minus(weakest.mean, weakest.half, '+')}"
    if len(comparisons) > 1:
        text += f" (weakest of {len(comparisons)})"
    if weakest.n != seeds or seeds == 1:
        text += f" ({weakest.n} seed{'s' * (weakest.n > 1)})"
    needed = [c.settles for c in comparisons if c.status == "open" and c.settles]
    return text + (f"; {seeds_in_words(max(needed))} seeds would settle it"
                   if word == "inconclusive" and needed else "")


def claim_rows(method_name, results, collected):
    rows = [["claim", "paper", "measured", "verdict"]]
    for title, experiment in experiments_of(method_name).items():
        for claim in experiment["claims"]:
            word, comparisons = verdict(claim, collected[title])
            found = measured(word, comparisons, len(results["seeds"]))
            rows.append([claim["claim"], origin(claim), found, word])
    return rows


def origin(claim):
    """What the paper has, and where: "82.2 over 78.1% (Table 1)", "plot only: Figure 3", or "ours"."""
    paper, source = claim["paper"], claim["source"]
    if paper == "-":
        return source
    return f"{paper} {source}" if paper.endswith((":", " in", " from")) else f"{paper} ({source})"


def lost_in_words(runs):
    """How many of the runs {seed: run} have diverged; "" for none. A table's means are of the others."""
    lost = sum("diverged" in run for run in runs.values())
    return f" ({lost} of {len(runs)} seeds diverged)" if lost else ""


def arm_rows(arms, columns=COLUMNS, first="arm"):
    """One row an arm; only the columns that some arm has."""
    cells = {name: {m: [v for run in runs.values() if (v := value(run, m)) is not None] for m in columns}
             for name, runs in arms.items()}
    sizes = {m: max(abs(fmean(row[m])) for row in cells.values() if row[m])
             for m in columns if any(row[m] for row in cells.values())}
    return [[first] + [columns[m] for m in sizes]] + [
        [name + lost_in_words(arms[name])]
        + [plus_minus(*t_interval(row[m]), size=size) if row[m] else "-" for m, size in sizes.items()]
        for name, row in cells.items()]


def cost_rows(collected):
    """What a run of each arm costs; no rows where the runs are from before the CPU's time was counted."""
    arms = {}
    for title, of_title in collected.items():
        for name, runs in of_title.items():
            if runs and runs not in arms.values():                       # experiments share identical arms
                arms[f"{name} ({title})" if name in arms else name] = runs
    rows = arm_rows(arms, COSTS)
    return rows if COSTS["cpu_seconds"] in rows[0] else []


def text_table(rows, width=110):
    """Aligned plain text; the widest columns wrap until it fits."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in zip(*rows)]
    while sum(widths) + 2 * (len(widths) - 1) > width and widths != words:             # no word is broken
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


def provenance(view):
    """Seeds, flags, machine and software of the runs that are shown, in a sentence."""
    flags = ", ".join(f"{k}={v}" for k, v in view["config"].items())
    machines = [f"{m['device']}; " + ", ".join(f"{name} {version}" for name, version in m["software"].items())
                for m in view["machines"]]
    done, wanted = view["seeds"], view.get("wanted", Config.seeds)
    fewer = f" ({len(done)} of the {wanted} that were set beforehand)" * (
        not flags and bool(done) and {*done} < {*range(wanted)})
    return (f"Seeds {', '.join(map(str, done)) or 'none'}{fewer}." + (f" Flags: {flags}." if flags else "")
            + "".join(f" {machine}." for machine in machines))


def said_of_file(path, view):
    """Which file a report shows, how many of its runs, and how many it holds besides."""
    why = ", ".join(f"{n} of {reason}" for reason, n in view["kept"].items() if n)
    return (f"{path}: {len(view['runs'])} stored runs shown, {sum(view['kept'].values())} kept but not shown"
            + (f" ({why})" if why else ""))


def report(method_name, results_dir="results", given={}):
    """Print the tables and draw the figure; returns what the JSON holds."""
    results, path = stored(method_name, results_dir, given), results_path(method_name, given, results_dir)
    view, collected = shown(method_name, results), collect(method_name, results)
    print(textwrap.fill(said_of_file(path, view), 110))
    print("\n" + text_table(claim_rows(method_name, view, collected)) + "\n\n" + textwrap.fill(RULES, 110))
    for title, experiment in experiments_of(method_name).items():
        print(f"\n{title}: {experiment['question']}\n"
              + text_table(arm_rows(collected[title], experiment.get("columns", COLUMNS))))
    if costs := cost_rows(collected):
        print(f"\n{COSTS_ARE}\n" + text_table(costs))
    print("\n" + textwrap.fill(provenance(view), 110))
    if importlib.util.find_spec("matplotlib"):
        figures.draw(method_name, view, collected, path.with_suffix(".png"))
        print(f"{path}, {path.with_suffix('.png')}")
    else:
        print('no figure: pip install -e ".[plot]"')
    return results
