"""The figures: what stands on the axes of each kind of panel, drawn from made-up runs."""
import importlib
import itertools
import re
import sys
import types

import numpy as np
import pytest

from conftest import method_names

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from referee import figures
from referee.statistics import t_interval

GOLD, KL, NAN = "eval/gold", "eval/kl", float("nan")
SPREAD = -0.1, 0.0, 0.1                                              # over three seeds
HALF = t_interval(SPREAD)[1]
CURVES = {"0": [[1, 0.0, 0.0, 0.1], [2, 0.2, 0.5, 0.6], [4, 0.6, 0.9, 1.0]],
          "1": [[1, 0.0, 0.2, 0.3], [2, 0.4, 0.7, 0.8], [4, 0.8, 1.1, 1.2]], "2": None}


def run(gold=1.0, kl=2.0, steps=(0, 4, 6, 8), **more):
    """Gold and KL rise with the steps."""
    trace = [{"step": s, GOLD: gold * s / steps[-1], KL: kl * s / steps[-1]} for s in steps]
    return {GOLD: gold, KL: kl, "trace": trace} | more


def arm(gold, kl=2.0, spread=SPREAD, metric=None, **more):
    return {seed: run(gold + d, kl + d, **more) | ({metric: gold + d} if metric else {})
            for seed, d in enumerate(spread)}


def untrained(gold=0.1):
    return {seed: {GOLD: gold, KL: 0.0, "trace": [{"step": 0, GOLD: gold, KL: 0.0}]} for seed in range(3)}


@pytest.fixture
def kept(monkeypatch):
    """The figures that were saved."""
    found, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.fixture
def draw(monkeypatch):
    """draw(panels, arms) draws an experiment of these panels and saves nothing. Returns their axes."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: found.append(figure))

    def drawn(*panels, question="What follows?", curves={}, arms={}, **more):
        arms = arms | more
        method = types.ModuleType("made_up")
        method.EXPERIMENTS = {"one": dict(question=question, arms=dict.fromkeys(arms), claims=[],
                                          panels=list(panels))}
        monkeypatch.setitem(sys.modules, "experiments.made_up", method)
        figures.draw("made_up", {"best_of_n": curves}, {"one": arms}, "figure.png")
        return found[-1].axes

    return drawn


def bars(*y, **more):
    return dict(kind="bars", y=list(y)) | more


def texts(ax):
    """{text: its point} of all that is written into the axes."""
    return {text.get_text(): tuple(getattr(text, "xy", text.get_position())) for text in ax.texts}


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def whiskers(ax):
    """[(x0, y0), (x1, y1)] of each interval that has a width."""
    segments = [segment for bars in ax.collections for segment in bars.get_segments()]
    return [[tuple(map(float, end)) for end in segment] for segment in segments
            if len(segment) and np.ptp(segment, axis=0).max() > 1e-9]


def lines_of(ax):
    """The lines without the caps of whiskers."""
    return [line for line in ax.lines if line.get_marker() not in ("|", "_")]


def colours_of(ax):
    """The distinct colours of bars, lines and labels, without the black of axes and whiskers of bars."""
    found = [patch.get_facecolor() for patch in ax.patches]
    found += [line.get_color() for line in lines_of(ax)]
    return {to_hex(colour) for colour in found} - {"#000000"}


def boxes(ax, gid="label"):
    """Lower left and upper right corner, in pixels, of each label."""
    return {text.get_text(): Text.get_window_extent(text).get_points()
            for text in ax.texts if text.get_gid() == gid}


def overlap(a, b):
    return bool(np.all((a[0] < b[1]) & (a[1] > b[0])))


# ------------------------------------------------------------------------------------------------------- bars

def test_bars_have_another_length_interval_number_or_order(draw):
    ax, = draw(bars(GOLD), weak=arm(0.5), strong=arm(1.25), bad=arm(-0.75))
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([0.5, 1.25, -0.75])
    assert labels(ax.get_yticklabels()) == ["weak", "strong", "bad"] and ax.yaxis_inverted()
    assert [[x for x, _ in ends] for ends in whiskers(ax)] == [
        pytest.approx([mean - HALF, mean + HALF]) for mean in (0.5, 1.25, -0.75)]
    found = texts(ax)
    assert list(found) == ["0.50", "1.25", "-0.75"]
    assert [x for x, _ in found.values()] == pytest.approx([0.5 + HALF, 1.25 + HALF, 0])    # past the whisker
    assert len(colours_of(ax)) == 1 and ax.get_legend() is None and ax.get_xlabel() == "gold reward"
    heights = [patch.get_y() + patch.get_height() / 2 for patch in ax.patches]
    assert heights == pytest.approx([0, 1, 2]) == [y for _, y in found.values()]


def test_bars_of_several_metrics_share_a_colour_or_have_no_legend(draw):
    ax, = draw(bars(GOLD, KL), a=arm(0.5, kl=3.0), b=arm(1.0, kl=4.0))
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([0.5, 1.0, 3.0, 4.0])
    first, _, second, _ = shown = [to_hex(patch.get_facecolor()) for patch in ax.patches]
    assert first != second and shown == [first, first, second, second]
    legend = ax.get_legend()
    assert labels(legend.get_texts()) == ["gold reward", "KL to the initial policy"]
    assert [to_hex(handle.get_facecolor()) for handle in legend.legend_handles] == [first, second]
    places = sorted((patch.get_y(), patch.get_y() + patch.get_height()) for patch in ax.patches)
    assert all(low >= high for (_, high), (low, _) in itertools.pairwise(places))              # none overlap
    assert legend.get_window_extent().y0 >= ax.get_window_extent().y1 - 1                    # above the axes
    assert set(texts(ax)) == {"0.50", "1.00", "3.00", "4.00"} and ax.get_xlabel() == ""


def test_numbers_touch_their_bars_or_each_other_or_names_do(draw):
    arms = {f"arm {i}" + " with a name for two lines" * (i % 3 > 0): arm(i / 4, kl=i) for i in range(1, 15)}
    lines = dict(x="step", y=[GOLD], arms=list(arms)[:1])
    for ax in (*draw(bars(GOLD), arms=arms), *draw(lines, bars(GOLD, KL, GOLD), arms=arms)[1:]):
        numbers = [text.get_window_extent().get_points() for text in ax.texts]
        names = [text.get_window_extent().padded(3).get_points() for text in ax.get_yticklabels()]
        for found in (numbers, names):
            assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
        for text, number in zip(ax.texts, numbers):
            assert number[0][0] > ax.transData.transform(text.xy)[0] + 5


def test_title_lies_on_the_legend(draw):
    line = dict(kind="line", x="n", y=[GOLD], series={"s": {1: "a"}, "t": {1: "a"}})
    for panel in (bars(GOLD, KL), line):
        ax, = draw(panel | {"title": "two of them"}, a=arm(0.5))
        assert ax.title.get_text() == "two of them"
        assert ax.title.get_window_extent().y0 >= ax.get_legend().get_window_extent().y1 - 2


def test_log_axis_is_linear_or_draws_what_has_no_logarithm(draw):
    just_above_0 = arm(30.0, spread=(-12.06, 0.0, 12.06))
    ax, = draw(bars(GOLD, log=True), large=arm(1000.0), noisy=just_above_0, zero=arm(0.0), negative=arm(-5.0))
    assert ax.get_xscale() == "log"
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([1000, 30])
    assert labels(ax.get_yticklabels()) == ["large", "noisy", "zero", "negative"]
    assert 0 < whiskers(ax)[1][0][0] < 0.1 and 1 < ax.get_xlim()[0] < 30       # a whisker squashes no bars
    with rc_context(figures.STYLE):
        assert not any("^" in label for label in labels(ax.get_xticklabels()))            # small type, else


def test_names_of_the_same_bars_are_written_twice_or_those_of_others_not_at_all(draw):
    arms = dict(a=arm(0.5), b=arm(1.0))
    axes = draw(bars(GOLD), bars(KL), bars(KL, arms=["b"]), **arms)
    assert [ax.yaxis.get_tick_params()["labelleft"] for ax in axes] == [True, False, True]
    assert labels(axes[2].get_yticklabels()) == ["b"] and len(axes[2].patches) == 1
    axes = draw(dict(x="step", y=[GOLD]), bars(GOLD), **arms)
    assert all(ax.yaxis.get_tick_params().get("labelleft", True) for ax in axes)


# ------------------------------------------------------------------------------------------- lines and points

def test_line_is_no_mean_over_seeds_or_its_end_has_no_intervals(draw):
    ax, = draw(dict(x=KL, y=[GOLD]), a=arm(1.0), b=arm(2.0, kl=5.0))
    line = ax.lines[0].get_xydata()
    assert line == pytest.approx(np.array([[0, 0], [1, 0.5], [1.5, 0.75], [2, 1]]))
    ends = whiskers(ax)
    assert len(ends) == 4                                                    # of both x and y, for each arm
    assert sorted(map(sorted, ends))[:2] == [[pytest.approx((2 - HALF, 1)), pytest.approx((2 + HALF, 1))],
                                             [pytest.approx((2, 1 - HALF)), pytest.approx((2, 1 + HALF))]]
    assert texts(ax) == {"a": pytest.approx((2, 1)), "b": pytest.approx((5, 2))} and ax.get_legend() is None
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("KL to the initial policy, nats", "gold reward")
    assert [text.get_color() for text in ax.texts] == [line.get_color() for line in lines_of(ax)[::2]]
    assert len(colours_of(ax)) == 2


def test_ends_draws_other_evaluations_than_the_ends_of_rounds(draw):
    steps = (2, 3, 4, 5, 8, 9)                                              # the first is drawn in any case
    ax, = draw(dict(x="step", y=[GOLD], ends=4), a=arm(1.8, steps=steps))
    assert ax.lines[0].get_xydata() == pytest.approx(np.array([[2, 0.4], [4, 0.8], [8, 1.6]]))
    line, points = ax.lines[:2]
    assert points.get_marker() == "o" and points.get_xdata() == pytest.approx([2, 4, 8])
    assert len(whiskers(ax)) == 3
    ax, = draw(dict(x="step", y=[GOLD]), a=arm(1.8, steps=steps))
    assert ax.lines[0].get_xdata() == pytest.approx(steps) and len(whiskers(ax)) == 1


def test_evaluations_are_paired_by_position_and_not_by_step_or_a_bad_seed_hides_an_arm(draw):
    runs = {0: run(1.0, steps=(0, 4, 8)), 1: run(3.0, steps=(0, 2, 4, 8)), 2: run(9.0, steps=(0, 8))}
    for entry in runs[2]["trace"]:
        entry[GOLD] = None                                                            # this seed has nothing
    ax, = draw(dict(x="step", y=[GOLD]), a=runs)
    assert ax.lines[0].get_xydata() == pytest.approx(np.array([[0, 0], [4, 1], [8, 2]]))


def test_one_arm_and_several_metrics_are_told_apart_by_name_and_colour(draw):
    ax, = draw(dict(x="step", y=[GOLD, KL]), a=arm(1.0))
    assert list(texts(ax)) == ["gold reward", "KL to the initial policy"] and len(colours_of(ax)) == 2
    assert ax.get_ylabel() == "gold reward, KL to the initial policy"
    ax, = draw(dict(x="step", y=[GOLD, KL]), a=arm(1.0), b=arm(2.0))
    assert list(texts(ax)) == ["a, gold reward", "a, KL to the initial policy", "b, gold reward",
                               "b, KL to the initial policy"]
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines if len(line.get_xdata()) > 1}
    assert len(styles) == 4 and len(colours_of(ax)) == 2


@pytest.mark.parametrize("kind", ["lines", "points"])
def test_best_of_n_is_not_the_mean_of_the_curves_that_there_are(draw, kind):
    ax, = draw(dict(kind=kind, x=KL, y=[GOLD], best_of_n=True), curves=CURVES, a=arm(1.0))
    curve = next(line for line in ax.lines if line.get_linestyle() == "--")
    assert curve.get_xydata() == pytest.approx(np.array([[0, 0.1], [0.3, 0.6], [0.7, 1.0]]))
    assert to_hex(curve.get_color()) == "#000000"
    assert texts(ax) == {"a": pytest.approx((2, 1)), "best of 4": pytest.approx((0.7, 1.0))}
    ax, = draw(dict(kind=kind, x=KL, y=["eval/proxy"], best_of_n=True), curves=CURVES, a=arm(1.0))
    assert ax.lines[-1].get_ydata() == pytest.approx([0.2, 0.7, 1.1])
    for curves in ({}, {"0": None}):
        ax, = draw(dict(kind=kind, x=KL, y=[GOLD], best_of_n=True), curves=curves, a=arm(1.0))
        assert list(texts(ax)) == ["a"]


def test_points_have_other_places_intervals_or_names(draw):
    ax, = draw(dict(kind="points", x=KL, y=[GOLD], arms=["a", "SFT"]), a=arm(1.0, kl=3.0), b=arm(9.0),
               SFT=untrained())
    assert texts(ax) == {"a": pytest.approx((3, 1)), "SFT": pytest.approx((0, 0.1))}
    assert sorted(whiskers(ax)) == [[pytest.approx((3 - HALF, 1)), pytest.approx((3 + HALF, 1))],
                                    [pytest.approx((3, 1 - HALF)), pytest.approx((3, 1 + HALF))]]
    assert all(len(line.get_xdata()) == 1 for line in ax.lines)                              # no way to it
    assert [to_hex(text.get_color()) == "#000000" for text in ax.texts] == [False, True]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("KL to the initial policy, nats", "gold reward")


def test_labels_of_near_points_cover_each_other_or_leave_the_axes(draw):
    near = {f"method number {i}": arm(1.0 + 0.02 * i, kl=2.0 + 0.03 * (i % 3)) for i in range(8)}
    for panels in ([dict(kind="points", x=KL, y=[GOLD])], [dict(x="step", y=[GOLD])] * 2):
        for ax in draw(*panels, arms=near | {"far": arm(0.2, kl=9.0)}):
            found, frame = boxes(ax), ax.get_window_extent()
            assert set(found) == {*near, "far"}
            assert not any(overlap(a, b) for a, b in itertools.combinations(found.values(), 2))
            for low, high in found.values():
                assert np.all(low >= frame.min) and np.all(high <= frame.max)


def test_label_covers_a_line_where_there_is_room_beside_it(draw):
    around = {f"{i}": arm(1 + np.sin(i), kl=3 + np.cos(i), spread=(0.0, 0.0)) for i in range(4)}
    ax, = draw(dict(x=KL, y=[GOLD]), arms=around)
    ways = [np.linspace(a, b, 100) for line in lines_of(ax)[::2]
            for a, b in itertools.pairwise(ax.transData.transform(line.get_xydata()))]
    for low, high in boxes(ax).values():
        assert not any(np.all((way > low) & (way < high), axis=1).any() for way in ways)


def test_label_covers_its_point(draw):
    ax, = draw(dict(kind="points", x=KL, y=[GOLD]), a_long_name_of_an_arm=arm(1.0), b=arm(2.0, kl=5.0))
    for text in ax.texts:
        point = ax.transData.transform(text.xy)
        assert not overlap(Text.get_window_extent(text).get_points(), np.array([point - 4, point + 4]))
        assert np.abs(Text.get_window_extent(text).get_points() - point).min() < 50           # and is near
        way = text.arrow_patch
        assert way.get_visible() and way.get_edgecolor() == to_rgba(text.get_color())


# ----------------------------------------------------------------------------------------- grid, line, tables

GRID = dict(kind="grid", y=["eval/win_rate"], rows=["one", "two"], columns=["x", "y"], name="{row}, {column}")


def cells(**values):
    return {name.replace("_", ", "): arm(v, metric="eval/win_rate") for name, v in values.items()}


def test_grid_is_transposed_or_a_cell_is_not_mean_and_half_interval(draw):
    ax, = draw(GRID, arms=cells(one_x=0.5, one_y=0.6, two_x=0.7, two_y=0.9) | {"other": arm(5.0)})
    assert ax.images[0].get_array().tolist() == [pytest.approx([0.5, 0.6]), pytest.approx([0.7, 0.9])]
    assert texts(ax) == {f"{mean:.2f}\n±{HALF:.2f}": place for mean, place in
                         ((0.5, (0, 0)), (0.6, (1, 0)), (0.7, (0, 1)), (0.9, (1, 1)))}
    assert labels(ax.get_xticklabels()) == ["x", "y"] and labels(ax.get_yticklabels()) == ["one", "two"]
    assert ax.images[0].get_clim() == pytest.approx((0.5, 0.9)) and ax.get_title() == "win rate"
    ink = {text.get_text()[:4]: text.get_color() for text in ax.texts}
    assert ink["0.50"] == "black" and ink["0.90"] == "white"                     # on light blue, on dark blue


def test_grid_of_missing_arms_crashes_or_invents_them(draw):
    arms = cells(one_x=0.5, two_x=0.7) | {"two, x": {0: run(**{"eval/win_rate": 0.7})}, "two, y": {},
                                          "one, y": {0: run(), 1: run(**{"eval/win_rate": NAN})}}
    ax, = draw(GRID | {"title": "wins"}, arms=arms)
    shown = ax.images[0].get_array()
    assert np.isfinite(shown.filled(np.nan)).tolist() == [[True, False], [True, False]]
    assert texts(ax) == {f"0.50\n±{HALF:.2f}": (0, 0), "0.70": (0, 1)}           # one seed has no interval
    assert ax.images[0].get_clim() == pytest.approx((0.5, 0.7)) and ax.get_title() == "wins"
    assert texts(draw(GRID, other=arm(1.0))[0]) == {}


LENGTHS = dict(kind="line", x="ranking length", y=[GOLD],
               series={"equal prompts": {4: "4, prompts", 2: "2, prompts", 8: "8, prompts"},
                       "equal responses": {2: "2, responses"}})


def lengths():
    return {"2, prompts": arm(0.5), "4, prompts": arm(0.6), "8, prompts": arm(0.8), "2, responses": arm(0.3),
            "SFT": untrained(0.2)}


def test_line_over_a_number_has_other_values_ticks_or_names(draw):
    ax, = draw(LENGTHS | {"levels": {"plain SFT": "SFT"}}, arms=lengths())
    series = {container.get_label(): container.lines[0] for container in ax.containers}
    assert series["equal prompts"].get_xydata() == pytest.approx(np.array([[2, 0.5], [4, 0.6], [8, 0.8]]))
    assert series["equal responses"].get_xydata() == pytest.approx(np.array([[2, 0.3]]))
    assert series["equal prompts"].get_color() != series["equal responses"].get_color()
    assert [[y for _, y in ends] for ends in whiskers(ax)] == [
        pytest.approx([mean - HALF, mean + HALF]) for mean in (0.5, 0.6, 0.8, 0.3)]
    assert ax.get_xticks().tolist() == [2, 4, 8] and labels(ax.get_xticklabels()) == ["2", "4", "8"]
    level = next(line for line in ax.lines if line.get_label() == "plain SFT")
    assert level.get_ydata() == pytest.approx([0.2, 0.2]) and level.get_linestyle() == "--"
    assert to_hex(level.get_color()) == "#000000"
    assert set(labels(ax.get_legend().get_texts())) == {"equal prompts", "equal responses", "plain SFT"}
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("ranking length", "gold reward", "linear")


def test_line_of_several_metrics_shares_colours_or_names(draw):
    series = {"RAFT": {2: "2, prompts", 4000: "4, prompts"}}
    ax, = draw(dict(kind="line", x="K", y=[GOLD, KL], series=series, levels={"PPO": "SFT"}), arms=lengths())
    found = {container.get_label(): container.lines[0] for container in ax.containers}
    assert {name: line.get_ydata(orig=False).tolist() for name, line in found.items()} == {
        "RAFT, gold reward": pytest.approx([0.5, 0.6]),
        "RAFT, KL to the initial policy": pytest.approx([2, 2])}
    levels = {line.get_label(): line for line in ax.lines if line.get_linestyle() == "--"}
    assert [line.get_ydata()[0] for line in levels.values()] == pytest.approx([0.2, 0])
    assert list(levels) == ["PPO, gold reward", "PPO, KL to the initial policy"]
    assert [line.get_color() for line in levels.values()] == [line.get_color() for line in found.values()]
    assert len(colours_of(ax)) == 2 and labels(ax.get_xticklabels()) == ["2", "4,000"]


def test_levels_look_alike(draw):
    ax, = draw(LENGTHS | {"levels": {"plain SFT": "SFT", "two": "2, prompts"}}, arms=lengths())
    levels = [line for line in ax.lines if line.get_label() in ("plain SFT", "two")]
    assert len({line.get_linestyle() for line in levels}) == 2 and levels[1].get_linestyle() != "-"


def test_logarithmic_line_does_not_give_each_doubling_the_same_room(draw):
    ax, = draw(LENGTHS | {"log": True}, arms=lengths())
    at = [ax.transData.transform((n, 0))[0] for n in (2, 4, 8)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0]) and labels(ax.get_xticklabels()) == ["2", "4", "8"]
    assert len(ax.xaxis.get_minorticklocs()) == 0


def test_line_with_missing_arms_crashes_or_draws_them(draw):
    arms = lengths() | {"4, prompts": {}, "2, responses": {0: run(0.3)},
                        "8, prompts": {0: run() | {GOLD: None}, 1: run(0.8)}}
    del arms["SFT"]
    ax, = draw(LENGTHS | {"levels": {"plain SFT": "SFT"}}, arms=arms)
    line = {container.get_label(): container.lines[0] for container in ax.containers}["equal prompts"]
    assert line.get_ydata(orig=False) == pytest.approx([0.5, NAN, 0.8], nan_ok=True)
    assert len(whiskers(ax)) == 1 and ax.get_xticks().tolist() == [2, 4, 8]


# ------------------------------------------------------------------------------------------------- every kind

def followed(*values):
    return [{"asked": i, "a": value, "b": value} for i, value in enumerate(values)]


KINDS = {"lines": dict(x="step", y=[GOLD, KL], best_of_n=False), "ends": dict(x="step", y=[GOLD], ends=4),
         "points": dict(kind="points", x=KL, y=[GOLD], best_of_n=True), "bars": bars(GOLD),
         "bars of several": bars(GOLD, KL, "eval/fluency"), "log": bars(GOLD, log=True),
         "grid": dict(kind="grid", y=[GOLD], rows=["a", "z"], columns=["1", "2"], name="{row}{column}"),
         "line": dict(kind="line", x="n", y=[GOLD], series={"s": {1: "a1", 2: "a2"}, "t": {1: "b1"}},
                      levels={"b": "b1"}),
         "curve": dict(kind="curve", curve="followed", x="asked", y=["a", "b"])}
BAD = {"no run": {}, "one seed": {"a1": {0: run()}, "b1": {3: run(0.5)}},
       "None": {"a1": {s: run(1.0) | {GOLD: None, KL: None} for s in range(3)}, "a2": arm(1.0)},
       "nan": {"a1": {s: run(NAN, NAN) for s in range(2)} | {2: run(1.0)}, "a2": {0: run(NAN, NAN)}},
       "None in the trace": {"a1": {0: run(), 1: run() | {"trace": [{"step": 0, GOLD: None}, {"step": 8}]}}},
       "empty curve": {"a1": {0: run(followed=[]), 1: run()}}}
GOOD = {"a1": arm(1.0, followed=followed(0.1, 0.5)), "a2": arm(2.0, kl=4.0), "b1": untrained()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stored", BAD)
@pytest.mark.parametrize("kind", KINDS)
def test_missing_arms_single_seeds_or_values_that_are_no_number_crash(draw, kind, stored):
    axes = draw(KINDS[kind], arms=dict.fromkeys(("a1", "a2", "b1"), {}) | BAD[stored], curves=CURVES)
    assert len(axes) == 1
    for text in axes[0].figure.findobj(Text):
        assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text.get_text())
    if kind == "bars":
        drawn = {"no run": [], "one seed": [1.0, 0.5], "None": [1.0], "nan": [1.0]}
        assert [patch.get_width() for patch in axes[0].patches] == pytest.approx(drawn.get(stored, [1.0]))
    if kind == "points" and stored == "nan":
        assert texts(axes[0]) == {"a1": (2, 1), "best of 4": pytest.approx((0.7, 1.0))}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", KINDS)
def test_type_is_small_or_runs_out_of_the_figure_or_colours_are_many(draw, kind):
    question = "Is this a question that is so long that it has to be broken, as the figure is narrower? " * 2
    axes = draw(KINDS[kind], KINDS[kind] | {"title": "the same once more"}, arms=GOOD, curves=CURVES,
                question=question)
    figure = axes[0].get_figure(root=True)
    assert figure.get_size_inches()[0] == 12 and figure.dpi * 12 == pytest.approx(1600)
    written = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    assert len(written) > 6 and min(text.get_fontsize() for text in written) >= 13
    with rc_context(figures.STYLE):
        found = [ax.get_tightbbox() for ax in axes]
    found += [part._suptitle.get_window_extent() for part in figure.subfigs]
    for box in found:
        assert np.all(box.min > -2) and np.all(box.max < figure.bbox.max + 2)
    assert all(1 <= len(colours_of(ax)) <= 5 or ax.images for ax in axes)


def test_many_arms_have_many_colours_or_few_arms_one(draw):
    lines = dict(x=KL, y=[GOLD])
    few = {name: arm(i, kl=i) for i, name in enumerate(("PPO", "DPO", "RAFT", "RSO", "PRO"), 1)}
    assert len(colours_of(draw(lines, arms=few)[0])) == 5
    for kind in ("lines", "points", "bars"):
        ax, = draw(lines | {"kind": kind}, arms=few | {"PPO 2": arm(7.0), "SFT": untrained()})
        assert len(colours_of(ax)) == 1
    ax, = draw(bars(GOLD, KL, "m1", "m2", "m3", "m4", "m5"), arms={
        "a": {0: run(**{f"m{i}": 1.0 for i in range(1, 6)})}})
    assert len(ax.patches) == 7 and len(colours_of(ax)) == 5


def test_arms_that_differ_in_a_number_are_not_dark_to_light(draw):
    arms = {f"beta {beta}": arm(1.0, kl=beta) for beta in (0.05, 0.1, 1, 3)} | {"SFT": untrained()}
    found = figures.colours(arms)
    light = [sum(int(found[name][i:i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.6), (5, 0.1)))
             for name in arms if name != "SFT"]
    assert light == sorted(light) and len(set(light)) == 4 and found["SFT"] == "black"
    others = figures.colours({name: arm(1.0) for name in ("beta 1", "beta 2", "PPO")} | {"SFT": untrained()})
    assert list(others.values()) == [*figures.COLOURS[:3], "black"]
    assert figures.colours({"a": arm(1.0), "not run": {}}) == {"a": figures.COLOURS[0], "not run": "black"}


@pytest.mark.parametrize("metrics, unit, words", [
    ([GOLD], True, "gold reward"), (["eval/proxy"], True, "proxy reward, SFT standard deviations"),
    (["eval/proxy"], False, "proxy reward"), ([KL], True, "KL to the initial policy, nats"),
    (["eval/win_rate"], True, "win rate"), (["eval/fluency"], True, "fluency, share that parses"),
    (["step"], True, "step"), (["eval/rare_gold"], False, "rare gold"),
    (["eval/logps/chosen"], True, "chosen"), (["eval/variance/ReMax, twice"], False, "ReMax, twice"),
    (["eval/proxy", GOLD], True, "proxy reward, gold reward")])
def test_axis_is_named_otherwise_than_in_words(metrics, unit, words):
    assert figures.name_of(*metrics, unit=unit) == words


def test_long_titles_of_two_panels_cover_each_other(draw):
    long = "what comes out at the end where much is asked for: a long name of an arm"
    axes = draw(*[KINDS["curve"] | {"title": long}] * 3, arms=GOOD)
    found = [ax.title.get_window_extent().get_points() for ax in axes]
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))
    assert axes[0].title.get_text().replace("\n", " ") == long


def test_curve_stands_at_other_places_than_asked_for(draw):
    values = (0.1, 0.5, None), (0.3, NAN, NAN)
    runs = {seed: run(followed=followed(*values[seed])) for seed in (0, 1)}
    ax, = draw(KINDS["curve"], arms={"a": runs})
    found = {container.get_label(): container.lines[0].get_xydata() for container in ax.containers}
    assert found == {name: pytest.approx(np.array([[0, 0.2], [1, 0.5]])) for name in ("a", "b")}
    assert set(labels(ax.get_legend().get_texts())) == set(found) and len(colours_of(ax)) == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("asked for", "a, b")
    ax, = draw(KINDS["curve"], arms={"not known": {0: run(followed=followed(NAN, None))}})
    assert not ax.containers


def test_unknown_kind_is_drawn_as_another(draw):
    with pytest.raises(KeyError, match="pie"):
        draw(dict(kind="pie", y=[GOLD]), arms=GOOD)


# ------------------------------------------------------------------------------------------------ the figures

def test_panels_are_drawn_in_other_rows_or_with_other_arms(monkeypatch, tmp_path, kept):
    method = types.ModuleType("made_up")
    method.EXPERIMENTS = {
        "first": dict(question="One?", panels=[bars(GOLD), dict(x="step", y=[GOLD], arms=["b"])]),
        "none": dict(question="Nothing to see?"),
        "second": dict(question="Two?", panels=[bars(KL, arms=None)])}
    monkeypatch.setitem(sys.modules, "experiments.made_up", method)
    found = {"first": {"a": arm(1.0), "b": arm(2.0)}, "none": {"a": arm(3.0)},
             "second": {"c": arm(1.0, kl=4.0)}}
    figures.draw("made_up", {"best_of_n": {}}, found, tmp_path / "a.png")
    first, second = kept[0].subfigs
    assert (first.get_suptitle(), second.get_suptitle()) == ("first: One?", "second: Two?")
    assert [patch.get_width() for patch in kept[0].axes[0].patches] == pytest.approx([1, 2])
    assert list(texts(kept[0].axes[1])) == ["b"]
    assert [patch.get_width() for patch in kept[0].axes[2].patches] == pytest.approx([4])
    figures.draw("made_up", {"best_of_n": {}}, found, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()      # the same for the same
    image = imread(tmp_path / "a.png")[..., :3]
    assert image.shape[1] == pytest.approx(1600, abs=1)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    method.EXPERIMENTS = {"none": dict(question="Nothing to see?")}
    figures.draw("made_up", {"best_of_n": {}}, found, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_overview_has_no_points_or_no_bars(tmp_path, kept):
    arms = {"SFT": untrained(0.2)} | {name: arm(i / 4, kl=i) for i, name in enumerate(method_names(), 1)}
    figures.draw_overview(arms, tmp_path / "methods.png")
    points, bar = kept[0].axes
    assert set(texts(points)) == set(arms) and texts(points)["SFT"] == pytest.approx((0, 0.2))
    assert (points.get_xlabel(), points.get_ylabel()) == ("KL to the initial policy, nats", "gold reward")
    assert labels(bar.get_yticklabels()) == list(arms) and len(bar.patches) == len(arms)
    assert bar.get_xlabel() == "gold reward" and len(colours_of(points) | colours_of(bar)) == 1
    image = imread(tmp_path / "methods.png")[..., :3]
    assert image.shape[1] == pytest.approx(1600, abs=1)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10


OPTIONS = {"lines": {"x", "y", "best_of_n", "ends"}, "points": {"x", "y", "best_of_n"},
           "bars": {"y", "log"}, "grid": {"y", "rows", "columns", "name"},
           "line": {"x", "y", "series", "levels", "log"}, "curve": {"x", "y", "curve"}}


@pytest.mark.parametrize("method", method_names())
def test_panel_of_an_experiment_has_an_unknown_option_or_names_an_arm_that_is_none(method):
    for experiment in importlib.import_module(f"experiments.{method}").EXPERIMENTS.values():
        for panel in experiment.get("panels", []):
            assert set(panel) <= OPTIONS[panel.get("kind", "lines")] | {"kind", "arms", "title"}
            named = {*(panel.get("arms") or ()), *panel.get("levels", {}).values()}
            named |= {name for series in panel.get("series", {}).values() for name in series.values()}
            assert named <= set(experiment["arms"])
            if panel.get("kind") == "grid":
                cells = itertools.product(panel["rows"], panel["columns"])
                names = [panel["name"].format(row=row, column=column) for row, column in cells]
                assert len(set(names)) == len(names) and set(names) & set(experiment["arms"])


class Anything(dict):
    """A run that has every metric."""

    def get(self, name, default=None):
        return dict.get(self, name, default if name in self else 1.0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", method_names())
def test_panels_of_an_experiment_cannot_be_drawn(method, monkeypatch):
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: found.append(figure))
    experiments = importlib.import_module(f"experiments.{method}").EXPERIMENTS
    asked = [{"asked": i} | dict.fromkeys(("reward", "gold", "sentiment", "topicality", "verbosity"), i)
             for i in range(3)]

    def runs(i):
        return {seed: Anything(trace=[Anything({"step": s, KL: s / 10 * i, GOLD: i * s + seed})
                                      for s in (0, 16, 32)],
                               calibration=asked, followed=asked) for seed in range(2)}

    arms = {title: {name: runs(i) for i, name in enumerate(e["arms"], 1)} for title, e in experiments.items()}
    figures.draw(method, {"best_of_n": CURVES}, arms, "figure.png")
    assert len(found[0].axes) == sum(len(e.get("panels", [])) for e in experiments.values())
    assert all(len(colours_of(ax)) <= 5 and ax.has_data() for ax in found[0].axes)
    assert min(text.get_fontsize() for text in found[0].findobj(Text)) >= 13
