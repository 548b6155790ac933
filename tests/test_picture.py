"""run.png, the samples on the screen and in samples.txt, the progress bar.

Models are random, over eight letters. What is drawn is read from matplotlib's own objects.
"""
import builtins
import contextlib
import io
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import dpo
import harness
import harness.run
from conftest import ROOT, count_a, settings, started
from harness import picture
from harness.evaluation import most_changed, texts_of
from harness.rewards import TrueReward

pytestmark = pytest.mark.usefixtures("no_traces")
DPO = [{"step": 0, "eval/kl": 0.0, "eval/kl_se": 0.0, "eval/gold": 0.1, "eval/gold_se": 0.05,
        "eval/proxy": -0.1, "eval/fluency": 0.9, "eval/eos_rate": 1.0, "eval/loss": 0.69,
        "eval/rewards/margins": 0.0, "eval/rewards/accuracies": 0.5},
       *[{"step": i, "loss": 0.7 - i / 100, "rewards/chosen": i / 10, "rewards/rejected": -i / 10,
          "rewards/margins": i / 5, "rewards/accuracies": 0.6, "logps/chosen": -20.0, "grad_norm": 1.0}
         for i in range(1, 9)],
       {"step": 8, "eval/kl": 2.0, "eval/kl_se": 0.1, "eval/gold": 0.6, "eval/gold_se": 0.04,
        "eval/proxy": 0.8, "eval/fluency": 0.8, "eval/eos_rate": 0.9, "eval/loss": 0.66,
        "eval/rewards/margins": 0.2, "eval/rewards/accuracies": 0.6}]
PPO = [DPO[0], *[{"step": i, "objective/scores": i / 3, "objective/kl": float(i), "objective/kl_coef": 0.05,
                  "loss/policy": -0.1, "loss/value": 0.3, "policy/clipfrac": 0.1, "val/ratio": 1.0,
                  "eos_rate": 1.0} for i in range(1, 9)], DPO[-1]]
SAMPLES = {"before": {"prompts": ["x"] * 4, "responses": ["a"] * 4, "gold": [-1.0, 0.0, 0.0, 1.0],
                      "proxy": [0.0, 1.0, 2.0, 3.0]},
           "after": {"prompts": ["x"] * 4, "responses": ["b"] * 4, "gold": [1.0, 2.0, 2.0, 3.0],
                     "proxy": [5.0, 6.0, 7.0, 8.0]}}


def without(rows, *words):
    """The rows without the metrics that have one of these words in their names."""
    return [{k: v for k, v in row.items() if not any(word in k for word in words)} for row in rows]


def samples_without(*names):
    return {when: {k: v for k, v in found.items() if k not in names} for when, found in SAMPLES.items()}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """drawn(rows, samples): the axes of the picture that have something in them, by title."""
    import matplotlib.figure
    plain = matplotlib.figure.Figure.savefig

    def make(rows, samples=SAMPLES):
        figures = []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(matplotlib.figure.Figure, "savefig",
                          lambda figure, *args, **kw: figures.append(figure) or plain(figure, *args, **kw))
            assert picture.draw(tmp_path, samples, "dpo, seed 0") == ""
        make.figure, = figures
        return {ax.get_title(): ax for ax in make.figure.axes if ax.axison}
    return make


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ----------------------------------------------------------------------------------------------- which panels

def titles(rows):
    return [title for title, _, _ in picture.panels_of(rows)]


def test_panel_of_a_metric_is_missing_or_has_nothing_in_it():
    assert titles(DPO) == ["Reward", "KL to the initial policy", "Well-formed responses", "Loss",
                           "Reward margin of the pairs", "Rewards", "Pairs in the right order"]
    assert titles(PPO) == titles(DPO)[:4] + ["Reward margin of the pairs", "Pairs in the right order"]
    online = without(PPO, "margins", "accuracies", "eval/loss")
    assert titles(online) == titles(DPO)[:4]
    panels = {title: lines for title, _, lines in picture.panels_of(online)}
    assert panels["Loss"] == {"loss/policy": "policy", "loss/value": "value"}
    assert panels["Reward"].keys() == {"eval/gold", "eval/proxy", "objective/scores"}
    assert panels["KL to the initial policy"].keys() == {"eval/kl", "objective/kl"}
    plain = picture.panels_of(without(DPO, "gold", "proxy", "fluency"))
    assert plain[0][0] == "KL to the initial policy" and plain[1][2] == {"eval/eos_rate": "end with EOS"}


def test_method_that_nobody_knows_has_no_panel_of_its_own():
    rows = [DPO[0], {"step": 1, "loss": 1.0, "advantages/mean": 0.1, "advantages/of_best": 0.2}]
    assert picture.panels_of(rows)[-2] == ("Advantages", "", {"advantages/mean": "mean",
                                                              "advantages/of_best": "of best"})


def test_picture_has_more_than_six_panels_or_drops_the_samples(drawn):
    assert [*drawn(DPO)][4:] == ["Reward margin of the pairs", "Gold of test samples"]
    online = without(PPO, "margins", "accuracies", "eval/loss")
    assert [*drawn(online)][4:] == ["Gold of test samples", "Proxy of test samples"]
    assert [*drawn(without(online, "gold"), samples_without("gold"))][4:] == ["Proxy of test samples"]
    nothing = drawn(without(DPO, "gold", "proxy"), samples_without("gold", "proxy"))
    assert len(nothing) == 6 and [*nothing][-1] == "Pairs in the right order"


# -------------------------------------------------------------------------------------------- what is in them

def test_line_shows_other_numbers_than_were_measured(drawn):
    axes = drawn(DPO)
    (points, _, (bars,)), = axes["KL to the initial policy"].containers
    assert points.get_xydata().tolist() == [[0, 0.0], [8, 2.0]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0, 0], [1.9, 2.1]]
    mean, pale = [line for line in axes["Loss"].lines if len(line.get_xdata()) == 8]
    assert pale.get_ydata().tolist() == [row["loss"] for row in DPO[1:-1]] and pale.get_alpha() < 1
    assert list(mean.get_ydata()) == list(pale.get_ydata())                  # few steps: nothing to smooth
    assert labels(axes["Reward"]) == ["gold", "proxy"]
    assert set(labels(axes["Loss"])) == {"training", "held-out pairs"}
    assert axes["Well-formed responses"].get_ylim() == (0, 1.05)


def test_mean_of_neighbours_shifts_a_line_or_changes_a_straight_one():
    assert picture.smooth([1.0, 5.0]) == [1.0, 5.0]
    step = [0.0] * 50 + [1.0] * 50
    assert picture.smooth(step)[:48] == [0.0] * 48 and picture.smooth(step)[52:] == [1.0] * 48
    assert 0 < picture.smooth(step)[49] < 0.5 < picture.smooth(step)[50] < 1
    assert picture.smooth([2.0] * 100) == [2.0] * 100


def test_histogram_counts_other_samples_or_takes_before_for_after(drawn):
    ax = drawn(DPO)["Gold of test samples"]
    assert labels(ax) == ["before", "after"]
    assert sum(bar.get_height() for bar in ax.containers[0]) == 4
    means = {line.get_color(): line.get_xdata()[0] for line in ax.lines}
    assert means == {"0.4": 0.0, picture.COLOURS["gold"]: 2.0}
    assert ax.containers[0][0].get_x() == -1                                         # the lowest score of all


@pytest.mark.parametrize("rows, samples", [
    (DPO[:1], {"before": SAMPLES["before"]}),                                                   # --epochs 0
    (DPO, {"before": SAMPLES["before"] | {"gold": [math.nan, math.inf, 1.0, 1.0]},
           "after": SAMPLES["after"] | {"gold": [1.0] * 4}}),
    (DPO, {"before": SAMPLES["before"] | {"gold": [math.nan] * 4}, "after": SAMPLES["after"]}),
    ([row | {"loss": math.nan} for row in DPO], SAMPLES)])
def test_run_without_steps_or_with_scores_that_are_not_finite_has_no_picture(drawn, rows, samples):
    assert drawn(rows, samples)


def test_text_is_too_small_or_covers_another(drawn):
    drawn(DPO)
    figure = drawn.figure
    assert figure.get_size_inches()[0] * figure.dpi == pytest.approx(1600)
    boxes = []
    for ax in figure.axes:
        texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_legend().get_texts(),
                 *ax.get_xticklabels()]
        assert min(text.get_size() for text in texts) >= 13
        legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
        assert legend.y0 >= frame.y1 - 5                                              # above what is drawn
        boxes += [text.get_window_extent() for text in (ax.title, *ax.get_legend().get_texts())]
    assert all(0 <= box.x0 and box.x1 <= 1600 for box in boxes)
    assert len(boxes) > 12 and not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


# ---------------------------------------------------------------------------------------- a run's own picture

def dpo_run(toy, out, **kwargs):
    return harness.launch(dpo.train, settings(toy, dpo.Config, out=str(out), **kwargs))


def test_run_has_no_picture_does_not_say_where_it_is_or_draws_it_for_the_referee(toy, tmp_path, capsys):
    dpo_run(toy, tmp_path / "run", quiet=False)
    printed = capsys.readouterr().out
    path = re.search(r"^picture: (.*run\.png)$", printed, re.M)[1]
    assert (tmp_path / "run" / "run.png").samefile(path)
    assert (tmp_path / "run" / "run.png").read_bytes().startswith(b"\x89PNG")
    dpo_run(toy, tmp_path / "quiet", quiet=True)
    assert not (tmp_path / "quiet" / "run.png").exists() and "picture" not in capsys.readouterr().out
    for name in ("metrics.jsonl", "samples.txt", "model.safetensors"):
        assert len({(tmp_path / run / name).read_bytes() for run in ("run", "quiet")}) == 1


def test_run_without_matplotlib_or_room_for_the_picture_fails(toy, tmp_path, monkeypatch, capsys):
    plain = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refuse)
        assert dpo_run(toy, tmp_path / "without", quiet=False)["eval/kl"] > 0
    assert "\nno run.png: pip install matplotlib\n" in (printed := capsys.readouterr().out)
    assert re.search(r"^kl +0\.000", printed, re.M) and not (tmp_path / "without" / "run.png").exists()

    monkeypatch.setenv("MPLBACKEND", "nonsense")
    code = ("import pathlib, sys; from harness import picture; "
            "print(picture.draw(pathlib.Path(sys.argv[1]), {'before': {}}))")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, encoding="utf-8",
                          stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == 0 and "nonsense" in done.stdout
    monkeypatch.undo()

    def full_disk(*args, **kwargs):
        out = tmp_path / "full"
        assert (out / "model.safetensors").exists() and (out / "samples.txt").exists()        # all is saved
        raise OSError("no space\nleft")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    assert dpo_run(toy, tmp_path / "full", quiet=False)["eval/kl"] > 0
    assert "\nno run.png: no space left\n" in (printed := capsys.readouterr().out)
    assert re.search(r"^kl +0\.000", printed, re.M)


# ---------------------------------------------------------------------------------------------------- samples

def samples_of(change, n=1, name="gold"):
    """Before and after of prompts with n samples each; the first of each changes by so much."""
    many = range(len(change) * n)
    before = {"prompts": [f"p{i // n}" for i in many], "responses": [f" b{i}" for i in many],
              name: [float(i) for i in many]}
    after = before | {"responses": [f" a{i}" for i in many],
                      name: [i + (change[i // n] if i % n == 0 else 99.0) for i in many]}
    return before, after


@pytest.mark.parametrize("change, shown", [
    ([0.5, -1.0, 2.0, 0.0, 0.25], [("largest gain", 2), ("median change", 4), ("largest loss", 1)]),
    ([3.0, 0.5, 2.0], [("largest gain", 0), ("median change", 2), ("smallest gain", 1)]),
    ([-3.0, -1.0, -2.0], [("smallest loss", 1), ("median change", 2), ("largest loss", 0)]),
    ([-1.0, 1.0], [("largest gain", 1), ("largest loss", 0)]),
    ([2.0, 0.0], [("largest gain", 0), ("smallest gain", 1)]),
    ([0.5], [("largest gain", 0)]),
    ([0.0] * 5, [("", 0), ("", 1), ("", 2)])])
@pytest.mark.parametrize("n, name", [(1, "gold"), (4, "proxy")])
def test_sample_that_is_shown_did_not_change_most(change, shown, n, name):
    found = most_changed(*samples_of(change, n, name), n)
    assert [i for _, i in found] == [i * n for _, i in shown]
    for (label, i), (words, _) in zip(found, shown):
        number = f" in {name}, of {len(change)} prompts ({change[i // n]:+.2f}):\n" if words else ""
        assert label == words + number


def test_samples_are_ranked_by_the_proxy_where_gold_is_known_or_fail_without_scores():
    before, after = samples_of([0.0, 1.0, -1.0])
    for samples in (before, after):
        samples["proxy"] = samples["gold"][::-1]
    assert [i for _, i in most_changed(before, after, 1)] == [1, 0, 2]
    for samples in (before, after):
        del samples["gold"], samples["proxy"]
    assert most_changed(before, after, 1) == [("", 0), ("", 1), ("", 2)]
    assert texts_of(before, after)[1] == "p1\n  before:  b1\n  after:   a1\n"


def test_samples_have_the_scores_of_others_or_lose_their_order(toy, tmp_path, capsys):
    """On a run: gold is the number of letters, the proxy that of e's."""
    run = started(toy, tmp_path / "run", quiet=False, eval_samples=2)
    run.task.gold = lambda prompt, text, ended: float(len(text))
    run.rewards = {"proxy": TrueReward(lambda prompt, text, ended: float(text.count("e")))}
    run.evaluate()
    for step, _ in run.steps([0], run.policy, *common.adamw(run.policy, 1e-2, 1)):
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in run.policy.parameters():
                weight += 0.3 * torch.randn_like(weight)
        run.log(step, {"loss": 1.0})
        run.evaluate()
    run.finish()
    blocks = re.findall(r"(\w+)\n  before: (.*)\n  after:  (.*)\n  scores:  (.*)\n",
                        (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8"))
    assert [prompt for prompt, *_ in blocks] == run.samples["before"]["prompts"] and len(blocks) == 6
    for i, (_, *texts, scores) in enumerate(blocks):
        assert texts == [run.samples[when]["responses"][i] for when in ("before", "after")]
        (old, new), (old_e, new_e) = map(len, texts), (text.count("e") for text in texts)
        assert scores == f"gold {old:.2f} to {new:.2f}, proxy {old_e:.2f} to {new_e:.2f}"
    gains = [len(new) - len(old) for _, old, new, _ in blocks[::2]]
    assert any(gains)
    shown = re.findall(r"^\w+ \w+ in gold, of 3 prompts \((.*)\):\n(\w+)\n", capsys.readouterr().out, re.M)
    assert [float(change) for change, _ in shown] == sorted(gains, reverse=True)


# ------------------------------------------------------------------------------------------- the progress bar

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_is_wider_than_80_columns_or_hides_proxy_and_kl(toy, tmp_path, monkeypatch):
    run, screen = started(toy, tmp_path / "run", quiet=False, eval_every=2), Terminal()
    run.rewards = {"proxy": TrueReward(count_a)}
    monkeypatch.setattr(harness.run.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=200))
    with contextlib.redirect_stderr(screen):
        run.evaluate()
        for step, _ in run.steps(range(4), run.policy, *common.adamw(run.policy, 1e-2, 4)):
            run.log(step, {"loss": 0.69315, "rewards/margins": -0.01234, "rewards/chosen": 9e-9})
            if run.evaluation_due(step):
                with torch.no_grad():
                    run.policy.lm_head.weight *= 1.2
                run.evaluate()
    lines = [line.rstrip() for line in re.split(r"[\r\n]", screen.getvalue()) if line.strip()]
    assert 60 < max(map(len, lines)) <= 80
    first = [line for line in lines if "loss" in line and "test" not in line]
    assert first and first[-1].endswith(", loss 0.693, margins -0.0123, chosen 9e-09")
    middle, last = run.trace[1:]
    for row in (middle, last):
        words = f", loss 0.693, test proxy {row['eval/proxy']:.3g}, test kl {row['eval/kl']:.3g}"
        assert [line for line in lines if line.endswith(words)] and row["eval/kl"] > 0
    assert lines[-1].endswith(words) and lines[-1].startswith("4/4 ")


def test_title_does_not_say_which_options_were_given():
    config = dpo.Config(beta=0.3, policy="some/where/policy", seed=2, out="elsewhere", quiet=True)
    assert picture.title_of(config) == "dpo, seed 2, policy policy, beta 0.3"
    assert picture.title_of(dpo.Config()) == "dpo, seed 0"
    assert len(picture.title_of(dpo.Config(policy="long " * 40))) <= 100
