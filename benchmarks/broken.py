"""What one wrong line does to the curves: the default run of seed 0, beside the same run with a planted bug.

    python benchmarks/broken.py dpo raft     # these methods; without names all of BUGS
    python benchmarks/broken.py --draw       # draws again from results/broken.json, runs nothing

Both runs are made in a copy of the project. The methods' pages show results/broken/<method>.png.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness import UserError, picture     # noqa: E402
from tasks import CACHE, write_text        # noqa: E402

FILE, FOLDER = ROOT / "results" / "broken.json", ROOT / "results" / "broken"
LOOKS = {"right": ("#0072B2", "-", "as it should be"), "broken": ("#D55E00", "--", "with the wrong line")}
LOSS, GOLD = {"loss": "Training loss, nats"}, {"eval/gold": "True reward (gold)"}


class Bug(NamedTuple):
    old: str            # stands once in <method>.py
    new: str
    what: str           # in one sentence
    every: int          # steps between evaluations
    panels: dict        # {metric: title with its unit}


BUGS = {
    "dpo": Bug('easy = hard = task.pairs.get("train", [])',
               'easy = hard = [Pair(x, no, yes) for x, yes, no in task.pairs.get("train", [])]',
               "Chosen and rejected answers are swapped when the data is read.", 16,
               LOSS | {"eval/rewards/accuracies": "Held-out pairs in order, share"} | GOLD),
    "pro": Bug("logps = common.sequence_logps(policy, batch).view(len(rows), -1).gather(1, order)",
               "logps = common.sequence_logps(policy, batch).view(len(rows), -1)",
               "The rewards are sorted, and the log-probs stay in their old order.", 3,
               {"loss/rank": "Ranking loss, nats", "scores/best": "Score of the best, nats a token"} | GOLD),
    "raft": Bug("return (rewards == rewards.amax(1, keepdim=True)).int().argmax(1)",
                "return (rewards == rewards.amin(1, keepdim=True)).int().argmax(1)",
                "The worst sample of each prompt is kept, not the best.", 16,
                LOSS | {"round/mean": "Mean reward of a round's samples"} | GOLD),
    "rrhf": Bug("best = rewards.argmax(1, keepdim=True)", "best = scores.argmax(1, keepdim=True)",
                "The SFT term imitates the response with the best score, not with the best reward.", 4,
                {"loss/sft": "SFT term, nats", "loss/rank": "Ranking loss, nats a token"} | GOLD),
    "rso": Bug("margins = margins - (sft_chosen_logps - sft_rejected_logps)",
               "margins = margins + (sft_chosen_logps - sft_rejected_logps)",
               "The reference's part of the margin has the wrong sign.", 8,
               LOSS | {"eval/kl": "KL, nats a response"} | GOLD),
    "remax": Bug("batch, responses, ended = harness.rollout(run, prompts)  ",
                 "batch, responses, ended = harness.rollout(run, prompts, greedy=True)  ",
                 "The sample is decoded greedily, too.", 4,
                 {"objective/scores": "Mean reward of samples", "grad_norm": "Norm of the gradient"} | GOLD),
    "ppo": Bug("return advantages, advantages + values",
               "return advantages, masked_whiten(advantages, mask) + values",
               "The returns are made from whitened advantages.", 4,
               {"loss/value": "Value loss", "val/explained_variance": "Explained variance"} | GOLD),
    "decision_transformer": Bug("tag(levels, s.reward)) for s in samples]",
                                "tag(levels, -s.reward)) for s in samples]",
                                "Each response is trained with the tag of minus its reward.", 158,
                                LOSS | {"eval/slope_reward": "Reward per unit asked for"} | GOLD),
    "steerlm": Bug("for row, new in zip(samples, levels) if new]",
                   "for row, new in zip(samples, levels[1:]) if new]",
                   "Each response gets the levels of the one that follows it.", 180,
                   LOSS | {"eval/slope": "Levels per level asked for"} | GOLD)}


def texts_of(method):
    """The text of the method's file as it is, and with its bug."""
    bug, text = BUGS[method], (ROOT / f"{method}.py").read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise UserError(f"{method}.py must have this text once, not {text.count(bug.old)} times: {bug.old}")
    return {"right": text, "broken": text.replace(bug.old, bug.new)}


def run(method, kind, text, project):
    """{metric: [[step, value], ...]} of one run in a copy of the project, where <method>.py is `text`."""
    (project / f"{method}.py").write_text(text, encoding="utf-8")
    flags = f"--seed 0 --quiet True --eval_every {BUGS[method].every} --out".split()
    done = subprocess.run([sys.executable, f"{method}.py", *flags, kind], cwd=project, encoding="utf-8",
                          capture_output=True, env=os.environ | {"ALIGNMENT_CACHE": str(CACHE)})
    if done.returncode:
        raise UserError(f"{method}.py: {' '.join(done.stderr.split())[-300:]}")
    rows = [json.loads(line) for line in (project / kind / "metrics.jsonl").open(encoding="utf-8")]
    return {name: [[step, float(f"{value:.5g}")] for step, value in zip(*picture.track(rows, name)[:2])]
            for name in BUGS[method].panels}


def measure(method):
    """{"right": the curves of the default run, "broken": those of the run with the bug}."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        shutil.copytree(ROOT, project, ignore=lambda _, names: {".git", "cache", "runs"} & {*names})
        return {kind: run(method, kind, text, project) for kind, text in texts_of(method).items()}


def draw(method, found):
    """results/broken/<method>.png, 1200 x 400 pixels."""
    import matplotlib.figure
    with matplotlib.rc_context(picture.STYLE | {"legend.frameon": False, "legend.handlelength": 3}):
        figure = matplotlib.figure.Figure((12, 4), 100, layout="constrained")
        for ax, (metric, title) in zip(figure.subplots(1, 3), BUGS[method].panels.items()):
            for kind, (colour, line, label) in LOOKS.items():
                steps, values = zip(*found[kind][metric])
                ax.plot(steps, picture.smooth(values) if len(steps) > 100 else values, line, color=colour,
                        linewidth=3.5, label=label, marker="o" * metric.startswith("eval/"))
            ax.set(title=title, xlabel="step")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=16)
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{method}.png", metadata={"Software": None}, pil_kwargs={"optimize": True})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", help="dpo, raft, ... (default: all)")
    parser.add_argument("--draw", action="store_true", help="run nothing, only draw again")
    options = parser.parse_args()
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    try:
        for method in options.methods or BUGS:
            if method not in BUGS or options.draw and method not in found:
                raise UserError(f"no {method} here: take one of {', '.join(found if options.draw else BUGS)}")
            if not options.draw:
                found[method] = measure(method)
                lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in BUGS if name in found]
                write_text(FILE, "{" + ",\n".join(lines) + "}\n")
            draw(method, found[method])
            print(f"results/broken/{method}.png: {BUGS[method].what}", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
