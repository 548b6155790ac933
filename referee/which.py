"""What the comparison says, as tables: which method when, and what surprised us.

experiments/which.py holds the sentences and what they rest on; the numbers come from results/comparison.json.
"""
import math

from experiments.comparison import SECOND_SEEDS, SEEDS
from experiments.which import SURPRISES, WHICH
from referee import side_by_side
from referee.statistics import compare_arms, plus_minus
from referee.store import results_path
from referee.survey import CHINESE
from referee.tables import markdown_table

HEADER = ("you have", "use", "what we measured"), ("你有什么", "用什么", "实测")
METRICS = {"eval/gold": ("gold", "gold"), "eval/kl": ("KL", "KL"),
           "state_mb": ("MB trained", "训练状态（MB）"), "cpu_seconds": ("CPU s", "CPU 时间（秒）")}
SITUATIONS = {"clean": ("", ""), "noisy labels": (", noisy labels", "，标注噪声大"),
              "little data": (", little data", "，数据少")}
NOT_RUN = "not run yet", "尚未运行"
AGAIN = " (other seeds: {})", "（另一组种子：{}）"


def arms_of(results_dir="results"):
    """Of the first seeds, and of the second: {situation: {arm: {seed: run}}}; {} where nothing is stored."""
    if not results_path(side_by_side.NAME, {}, results_dir).exists():
        return {}, {}
    collected = side_by_side.gathered(results_dir)[1]
    return tuple({title: side_by_side.of_seeds(runs, seeds) for title, runs in collected.items()}
                 for seeds in (SEEDS, SECOND_SEEDS))


def compare(collected, situation, metric, arm, op, other, margin=0.0):
    """The Comparison of two arms in a situation of arms_of; "=" needs a margin.

    "?" holds where 0 lies in the interval: neither arm is shown to have more.
    """
    arms = collected.get(situation, {})
    if op != "?":
        return compare_arms(arms, metric, arm, op, other, margin)
    found = compare_arms(arms, metric, arm, ">", other)
    return found._replace(status="holds" if found.n and abs(found.mean) < found.half else "excluded")


def number(collected, zh, *part):
    """What was measured on the first seeds and, where two of them or more are run, on the second."""
    first, second = (compare(arms, *part) for arms in collected)
    if math.isnan(first.mean):                                       # not run, or not measured
        return NOT_RUN[zh]
    again = AGAIN[zh].format(plus_minus(second.mean, second.half, "+"))
    known = second.n > 1 and not math.isnan(second.mean)
    return plus_minus(first.mean, first.half, "+") + again * known


def rows(zh, results_dir="results"):
    """Which method when, in English or (zh) in Chinese; the first row is the header."""
    collected, found = arms_of(results_dir), [[*HEADER[zh]]]
    named = (lambda arm: CHINESE.get(arm, arm)) if zh else str
    for *texts, arm, evidence in WHICH:
        cells = {}
        for situation, metric, op, other in evidence:
            mean = number(collected, zh, situation, metric, arm, op, other)
            cells.setdefault(METRICS[metric][zh] + SITUATIONS[situation][zh], []).append(
                f"与“{named(other)}”相比 {mean}" if zh else f"{mean} against {other}")
        colon, comma, semicolon, stop = "：，；。" if zh else (": ", ", ", "; ", ". ")
        found.append([texts[zh], texts[2 + zh], named(arm) + stop + semicolon.join(
            what + colon + comma.join(numbers) for what, numbers in cells.items())])
    return found


def surprise_rows(results_dir="results"):
    """What surprised us, in English; the first row is the header."""
    collected, found = arms_of(results_dir), [["what surprised us", "what we measured", "what explains it"]]
    for text, evidence, reason in SURPRISES:
        cells = [f"{METRICS[metric][0]}{SITUATIONS[situation][0]}, {arm} against {other}: "
                 + number(collected, False, situation, metric, arm, op, other, *margin)
                 for situation, metric, arm, op, other, *margin in evidence]
        found.append([text, "; ".join(cells), reason])
    return found


def block(zh, results_dir="results"):
    """Which method when, for a page."""
    return markdown_table(rows(zh, results_dir))


def surprises(results_dir="results"):
    """What surprised us, for a page."""
    return markdown_table(surprise_rows(results_dir))
