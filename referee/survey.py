"""Tables for the readers of a survey of RLHF's substitutes.

One has each of its statements, with the verdicts of the claims that test it, in English or Chinese.
The second says in Chinese what each substitute needs, next to what was measured. The third has the main arms
of the comparison, in either language. experiments/survey.py holds the statements and needs; what was
measured comes from results/*.json alone.
"""
import math
import re
from pathlib import Path

from experiments.comparison import ARMS, LABELS, RECIPES, SECOND_SEEDS, SEEDS
from experiments.survey import COMPARED, STATEMENTS, SUBSTITUTES
from harness import UserError
from referee import side_by_side
from referee.arms import experiments_of, method_names
from referee.statistics import plus_minus, verdict
from referee.store import planned, results_path
from referee.tables import arm_rows, collect, markdown_table, measured, provenance, stored

NOT_RUN, COMPARISON_NOT_RUN, AGAIN = "not measured yet", "comparison not run yet", "other seeds"
STATEMENT_COLUMNS = "the survey says", "what we test", "measured", "verdict"
NEEDS = "reward model", "samples", "reference policy", "value model", "data"
COSTS = {"state_mb": "MB trained", "cpu_seconds": "CPU s", "eval/gold": "gold", "eval/kl": "KL, nats"}
CHINESE = {                                       # every header, every verdict, names that are no method
    "method": "方法", "reward model": "奖励模型", "samples": "采样", "reference policy": "参考策略",
    "value model": "价值模型", "data": "数据形式", "MB trained": "训练状态（MB）", "CPU s": "CPU 时间（秒）",
    "gold": "真实奖励 gold", "KL, nats": "KL（nat）",
    "the survey says": "综述的说法", "what we test": "我们检验的命题", "measured": "实测", "verdict": "结论",
    "reproduced": "复现", "not reproduced": "未复现", "inconclusive": "尚无定论",
    "not measured": "无法测量", NOT_RUN: "尚未测量", COMPARISON_NOT_RUN: "横向比较尚未运行",
    "arm": "做法", "rank": "名次", "fluency": "流畅度", "time": "时间（ppo.py 默认 = 1）",
    "gold, clean": "gold，标注正常", "gold, noisy labels": "gold，标注噪声大", "gold, little data": "gold，数据少",
    "best of 16": "16 选 1（best of 16）", "SteerLM, its recipe": "SteerLM，论文的做法",
    "SteerLM, less data": "SteerLM，预算内", "Decision Transformer, less data": "Decision Transformer，预算内",
    "filter": "择优 SFT（filter）", "RWR": "奖励加权回归（RWR）",
    "curriculum": "DPO 课程学习", "PPO, one pass": "PPO，样本只用一遍",
    "Decision Transformer, its recipe": "Decision Transformer，论文的做法",
    "SFT": "SFT", "SFT, temperature 0.5": "SFT，温度 0.5", side_by_side.NAME: "横向比较"}
PHRASES = [                                       # what tables.measured and tables.provenance write
    (r" \(against (\S+)\)", r"（与 \1 比较）"), (r" \(within (\S+) of (\S+)\)", r"（与 \2 相差 \1 以内）"),
    (r" \(within (\S+)\)", r"（相差 \1 以内）"), (r" \(weakest of (\d+)\)", r"（\1 项比较中最弱的一项）"),
    (r" \((\d+) seeds?\)", r"（\1 个种子）"),
    (r"; about (\d+) seeds would settle it", r"；约 \1 个种子可以得出结论"),
    (r"; over (\d+) seeds would settle it", r"；要 \1 个以上的种子才能得出结论"),
    (r"; other seeds: ", "；另一组种子："),
    (r"^Seeds none\.", "没有种子。"), (r"^Seeds ([\d, ]+)\.", r"种子：\1。"),
    (r"^Seeds ([\d, ]+) \((\d+) of the (\d+) that were set beforehand\)\.",
     r"种子：\1（事先定下 \3 个，已运行 \2 个）。"),
    (r": (?=[+-]?[\d,]+(\.\d+)?( ±|（|；|$))", "："),
    (r" Flags: (.*?)\.(?= |$)", r"选项：\1。"), (r" (\w+): ([^,;]+), (\d+) cores; ", r"设备 \1：\2，\3 核；"),
    (r"(?<=\d)\.$", "。")]


def chinese(path):
    """Is the file written in Chinese?"""
    return Path(path).name.endswith(".zh.md")


def in_chinese(text):
    """What the tables of the referee write below a claim, in Chinese; names of arms stay as they are."""
    for pattern, words in PHRASES:
        text = re.sub(pattern, words, text)
    return text


def claim_of(method, text):
    """(title of its experiment, the claim with this text). UserError where the method has no such claim."""
    if method == side_by_side.NAME:
        claims = [("clean", claim) for name, claim in COMPARED.items() if name == text]
    else:
        claims = [(title, claim) for title, experiment in experiments_of(method).items()
                  for claim in experiment["claims"] if claim["claim"] == text]
    if not claims:
        raise UserError(f"experiments/survey.py: {method} has no claim {text!r}")
    return claims[0]


def runs_of(method, results_dir="results"):
    """{experiment: {arm: {seed: run}}} of a method or of the comparison; {} where nothing is stored."""
    if not results_path(method, {}, results_dir).exists():
        return {}
    if method == side_by_side.NAME:
        clean = side_by_side.gathered(results_dir)[1]["clean"]
        return {"clean": side_by_side.of_seeds(clean, SEEDS),
                AGAIN: side_by_side.of_seeds(clean, SECOND_SEEDS)}
    return collect(method, stored(method, results_dir))


def judged(method, text, collected):
    """(verdict, what was measured) of a claim, both in English; the number of seeds is always said.

    A claim of the comparison was measured a second time, on other seeds; the verdict is that of the first.
    """
    title, claim = claim_of(method, text)
    word, comparisons = verdict(claim, collected.get(title, {}))
    if word == "not run":
        return COMPARISON_NOT_RUN if method == side_by_side.NAME else NOT_RUN, "-"
    found, (again, *_) = measured(word, comparisons, 0), verdict(claim, collected.get(AGAIN, {}))[1]
    known = again.n > 1 and not math.isnan(again.mean)
    return word, found + f"; other seeds: {plus_minus(again.mean, again.half, '+')}" * known


def statement_rows(path, results_dir="results"):
    """The table of statements for a page of docs/, in its language: a row for each claim that tests one."""
    zh = chinese(path)
    collected = {method: runs_of(method, results_dir)
                 for method in dict.fromkeys(test[0] for *_, tests in STATEMENTS for test in tests)}
    rows = [[CHINESE[word] if zh else word for word in STATEMENT_COLUMNS]]
    for english, in_zh, tests in STATEMENTS:
        statement = in_zh if zh else english                                    # once, in its first row
        for method, claim, claim_zh in tests:
            word, found = judged(method, claim, collected[method])
            place = f"{method}.md" + "#results" * (method == side_by_side.NAME)
            link = f"[{CHINESE.get(method, method) if zh else method}]({place})"
            rows.append([statement, f"{link}：{claim_zh}", in_chinese(found), CHINESE[word]] if zh else
                        [statement, f"{link}: {claim}", found, word])
            statement = ""
    return rows


def statements(path, results_dir="results"):
    """The block of statements and verdicts of a file."""
    return markdown_table(statement_rows(path, results_dir))


def substitute_rows(defaults, results_dir="results"):
    """What each substitute needs, and what its run cost and gave; in Chinese.

    defaults: {method, or name of what trains nothing: (arm, runs)} of docs.overview. What trains nothing is
    first, a method that the survey does not know last.
    """
    known, unsaid = {method for _, method, _, _ in SUBSTITUTES}, ["-"] * len(NEEDS)
    untrained = [name for name in defaults if name not in method_names()]
    no_cost = dict.fromkeys(("state_mb", "cpu_seconds"))                # theirs is of what some script scores
    found = {CHINESE[name]: {seed: run | no_cost for seed, run in defaults[name][1].items()}
             for name in untrained}
    about = dict.fromkeys(found, unsaid)
    others = [(name, name, None, unsaid) for name in defaults if name not in {*known, *untrained}]
    for name, method, arm, needs in [*SUBSTITUTES, *others]:
        label = f"[{name}](docs/{method}.md)"
        found[label] = runs_of_arm(method, *arm, results_dir) if arm else defaults.get(method, ("", {}))[1]
        about[label] = needs
    header, *body = arm_rows(found, COSTS, "method")
    return [[CHINESE[word] for word in (header[0], *NEEDS, *header[1:])],
            *([name, *about[name], *cells] for name, *cells in body)]


def runs_of_arm(method, title, name, results_dir="results"):
    """{seed: run} of an arm. If it starts from another arm: with that one's cost, and without a KL."""
    collected = runs_of(method, results_dir).get(title)
    if not collected:
        return {}
    start = planned(method, stored(method, results_dir))[title][name].start
    starts = collected[start.name] if start else {}
    return {seed: side_by_side.with_start(run, starts.get(seed)) for seed, run in collected[name].items()
            if not start or seed in starts}


def substitutes(defaults, others, sources, results_dir="results"):
    """The block of the substitutes, in Chinese, of what docs.overview returns."""
    parts = [markdown_table(substitute_rows(defaults, results_dir))]
    if others:
        parts.append(f"{'、'.join(others)} 的部分种子用的是另一台机器或较早版本的任务模型，与其他各行只能粗略比较。")
    where = [in_chinese(source) if len(sources) == 1 else f"{'、'.join(names)}：{in_chinese(source)}"
             for source, names in sources.items()]
    return "\n\n".join([*parts, "".join(where)])                   # one line: the page's length is limited


def compared(path, results_dir="results"):
    """The short block of the comparison for a page, in its language: a table of the main arms."""
    if not results_path(side_by_side.NAME, {}, results_dir).exists():
        return CHINESE[COMPARISON_NOT_RUN] if chinese(path) else COMPARISON_NOT_RUN
    view, collected = side_by_side.gathered(results_dir)
    rows, folder = side_by_side.short_rows(collected), "" if Path(path).parent.name == "docs" else "docs/"
    methods = {name: arm["method"] for name, arm in RECIPES.items()} | {
        LABELS.get(name, name): entry["arm"]["method"] for name, entry in ARMS.items()}
    if chinese(path):
        rows[0] = [CHINESE[word] for word in rows[0]]
        rows[1:] = [[name, re.sub(r" \((\d+) to (\d+)\)", r"（\1 至 \2）", place), *cells]
                    for name, place, *cells in rows[1:]]
    for row in rows[1:]:
        label = CHINESE.get(row[0], row[0]) if chinese(path) else row[0]
        row[0] = f"[{label}]({folder}{methods[row[0]]}.md)" if row[0] in methods else label
    text = provenance(view | {"seeds": [seed for seed in view["seeds"] if seed in SEEDS]})
    return f"{markdown_table(rows)}\n\n{in_chinese(text) if chinese(path) else text}"
