"""The notebook docs/workshop/course.ipynb: every cell runs, every claim holds, and every claim can fail.

Builds no model. The code in the answers of the exercises runs too.
"""
import ast
import json
import math
import os
import re
import sys
import time
import warnings

import pytest
import torch

import dpo
import ppo
import pro
import raft
import remax
import rrhf
import rso
from conftest import ROOT

matplotlib = pytest.importorskip("matplotlib")

FOLDER = ROOT / "docs" / "workshop"
NOTEBOOK = json.loads((FOLDER / "course.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def codes_of(cell):
    """[(name, code)] of a code cell, or of the blocks in a markdown cell's answer."""
    codes = [source(cell)] if cell["cell_type"] == "code" else re.findall(r"(?ms)^```python\n(.*?)^```",
                                                                          source(cell))
    return [(f"{cell['id']}-{i}", code) for i, code in enumerate(codes)]


def sections():
    """The cells before the first heading, under "", and those of each section."""
    found, title = {"": []}, ""
    for cell in NOTEBOOK["cells"]:
        heading = re.match(r"## (\d)\. ", source(cell)) if cell["cell_type"] == "markdown" else None
        title = heading[1] if heading else title
        found.setdefault(title, []).append(cell)
    return found


SECTIONS = sections()


class Recorded(ast.NodeTransformer):
    """Writes _claim("cell, line", condition) for each assert: a claim that fails does not stop the cell."""

    def __init__(self, name):
        self.name = name

    def visit_Assert(self, node):
        call = ast.parse(f"_claim({f'{self.name}, line {node.lineno}'!r}, x)").body[0]
        call.value.args[1] = node.test
        return ast.fix_missing_locations(ast.copy_location(call, node))


def run(cells, namespace, claims=None):
    """Execute the cells' code in order. With `claims`: asserts only add to {claim: has it always held?}."""
    def claim(name, holds):
        claims[name] = bool(holds) and claims.get(name, True)

    for name, code in (named for cell in cells for named in codes_of(cell)):
        tree = ast.parse(code)
        if claims is not None:
            tree, namespace["_claim"] = Recorded(name).visit(tree), claim
        exec(compile(tree, name, "exec"), namespace)
    return namespace


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """The Agg backend, a folder of the test's own, and import paths and settings as before afterwards."""
    matplotlib.use("Agg", force=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
        yield
    sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def setup(setting, monkeypatch):
    """A namespace in which the cells before the first section were run, in the notebook's folder."""
    with monkeypatch.context() as patch:
        patch.chdir(FOLDER)
        return run(SECTIONS[""], {})


# ---------------------------------------------------------------------------------------------- the notebook

def test_notebook_is_not_valid_or_keeps_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[A-Za-z0-9_-]{1,64}", id) for id in ids)
    for cell in NOTEBOOK["cells"]:
        required = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, f"{cell['id']} keeps outputs"
            required |= {"outputs", "execution_count"}
        assert set(cell) == required and isinstance(cell["source"], list)


def test_section_lacks_a_prediction_an_exercise_or_a_claim():
    assert [*SECTIONS] == ["", *"1234567"]
    for title, cells in SECTIONS.items():
        for before, cell in zip(cells, cells[1:]):
            if title and cell["cell_type"] == "code":
                assert "**Predict.**" in source(before), f"no prediction before {cell['id']}"
                assert re.search("(?m)^ *assert ", source(cell)), f"no claim in {cell['id']}"
        exercises = [cell for cell in cells if "**Exercise.**" in source(cell)]
        assert len(exercises) == bool(title)
        for cell in exercises:
            assert re.search(r"(?s)<details><summary>Answer</summary>\n\n.*```\n\n</details>$", source(cell))
            assert "\nassert " in source(cell)


def test_line_of_code_is_too_long():
    lines = [line for cell in NOTEBOOK["cells"] for _, code in codes_of(cell) for line in code.splitlines()]
    assert len(lines) > 300 and max(map(len, lines)) <= 110


@pytest.mark.parametrize("folder", [ROOT, FOLDER, "elsewhere"])
def test_first_cell_does_not_find_the_project(folder, setting, monkeypatch, tmp_path):
    elsewhere = folder == "elsewhere"
    monkeypatch.chdir(tmp_path if elsewhere else folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    monkeypatch.delitem(sys.modules, "dpo")
    if elsewhere:
        with pytest.raises(AssertionError, match="start Jupyter in the project's folder"):
            run(SECTIONS[""], {})
    else:
        assert run(SECTIONS[""], {})["dpo"].__file__ == str(ROOT / "dpo.py")
        assert sys.path[0] == str(ROOT)


@pytest.mark.parametrize("order", ["1234567", "7654321"])
def test_notebook_fails_or_is_slow(order, setup, capsys):
    """From top to bottom; and the sections in another order, as the notebook allows it."""
    start = time.process_time()
    for title in order:
        run(SECTIONS[title], setup)
    assert time.process_time() - start < 15                           # seconds of the processor
    assert os.listdir() == []                                         # it writes no file
    assert "nan" not in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32                 # it leaves torch's settings alone


# --------------------------------------------------------------------------------------- every claim can fail

def swapped(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    return DPO_LOSS(rejected, chosen, ref_rejected, ref_chosen, beta, label_smoothing)


def without_reference(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    return DPO_LOSS(chosen, rejected, 0, 0, beta, label_smoothing)


def beta_zero(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    return DPO_LOSS(chosen, rejected, ref_chosen, ref_rejected, 0.0, label_smoothing)


def without_smoothing(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    return DPO_LOSS(chosen, rejected, ref_chosen, ref_rejected, beta)


def chosen_alone(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    return DPO_LOSS(chosen, 0 * rejected, ref_chosen, 0 * rejected, beta, label_smoothing)


def lam_zero(rewards, values, mask, gamma, lam):
    return GAE(rewards, values, mask, gamma, 0.0)


def lam_one(rewards, values, mask, gamma, lam):
    return GAE(rewards, values, mask, gamma, 1.0)


def gae_without_mask(rewards, values, mask, gamma, lam):
    return GAE(rewards, values, torch.ones_like(mask), gamma, lam)


def score_in_the_last_column(scores, logps, ref_logps, mask, kl_coef):
    rewards = -kl_coef * (logps - ref_logps) * mask
    rewards[:, -1] += scores
    return rewards


def first_ones(rewards, num_samples, beta, rng):
    return list(range(num_samples))


def largest(rewards, num_samples, beta, rng):
    return SAMPLING(rewards, num_samples, 0, rng)


def worst_of_k(rewards):
    return rewards.argmin(1)


def without_baseline(rewards, baseline_rewards, *others, **options):
    return RETURNS(rewards, 0 * baseline_rewards, *others, **options)


def rank_loss_upside_down(scores, rewards):
    return RANK_LOSS(scores, -rewards)


def rank_loss_with_gaps(scores, rewards):
    return RANK_LOSS(scores, rewards) * rewards.sum()


def rank_loss_of_squares(scores, rewards):
    return RANK_LOSS(-scores ** 2, rewards)


def rrhf_loss_upside_down(logps, lengths, rewards, *others, **options):
    return RRHF_LOSS(logps, lengths, -rewards, *others, **options)


def pro_loss_upside_down(scores, rewards, *others, **options):
    return -PRO_LOSS(scores, rewards, *others, **options)


def without_temperature(scores, rewards, temperature=True, terms=None):
    return PRO_LOSS(scores, rewards, False, terms)


def always_temperature(scores, rewards, temperature=True, terms=None):
    return PRO_LOSS(scores, rewards, True, terms)


def terms_ignored(scores, rewards, temperature=True, terms=None):
    return PRO_LOSS(scores, rewards, temperature)


def unclipped(new_logps, old_logps, advantages, mask, clip):
    return POLICY_LOSS(new_logps, old_logps, advantages, mask, 1e9)


def smaller_of_both(new_logps, old_logps, advantages, mask, clip):
    ratio = (new_logps - old_logps).exp()
    return -(torch.maximum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)).mean(), 0 * clip


def other_sign(new_logps, old_logps, advantages, mask, clip):
    return POLICY_LOSS(new_logps, old_logps, -advantages, mask, clip)


DPO_LOSS, GAE, SAMPLING, RETURNS = (dpo.dpo_loss, ppo.gae, rso.statistical_rejection_sampling,
                                    remax.remax_returns)
RANK_LOSS, RRHF_LOSS, PRO_LOSS, POLICY_LOSS = rrhf.rank_loss, rrhf.rrhf_loss, pro.pro_loss, ppo.policy_loss
BROKEN = {
    "1": [(dpo, "dpo_loss", f) for f in (swapped, without_reference, beta_zero, without_smoothing,
                                         chosen_alone)],
    "2": [*((ppo, "gae", f) for f in (lam_zero, lam_one, gae_without_mask)),
          (ppo, "kl_penalised_rewards", score_in_the_last_column)],
    "3": [(rso, "statistical_rejection_sampling", f) for f in (first_ones, largest)],
    "4": [(raft, "best_of_k", worst_of_k), (raft, "kl_best_of_n", math.log),
          (raft, "kl_best_of_n", lambda n: math.log(n) / 2)],
    "5": [(remax, "remax_returns", without_baseline),
          (remax, "remax_loss", lambda logps, returns, mask: (returns * logps).sum(1).mean())],     # sign
    "6": [*((rrhf, "rank_loss", f) for f in (rank_loss_upside_down, rank_loss_with_gaps,
                                             rank_loss_of_squares)),
          (rrhf, "rrhf_loss", rrhf_loss_upside_down),
          *((pro, "pro_loss", f) for f in (pro_loss_upside_down, without_temperature, always_temperature,
                                           terms_ignored)),
          (pro, "sft_coefficient", lambda k: 0.05 * (k - 1))],
    "7": [(ppo, "policy_loss", f) for f in (unclipped, smaller_of_both, other_sign)]}


@pytest.mark.parametrize("title", BROKEN)
def test_claim_cannot_fail(title, setup, monkeypatch):
    """Each section, after the first cells alone: all claims hold; each fails with some broken function."""
    claims = {}
    run(SECTIONS[title], {**setup}, claims)
    assert claims and all(claims.values())
    never_failed = set(claims)
    for module, name, broken in BROKEN[title]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            found = {}
            run(SECTIONS[title], {**setup}, found)
        failed = {claim for claim, holds in found.items() if not holds}
        assert failed, f"the notebook does not notice a broken {module.__name__}.{name}"
        never_failed -= failed
    assert not never_failed, f"no broken function makes these fail: {sorted(never_failed)}"


@pytest.mark.parametrize("module, name, broken, title, cell", [
    (dpo, "dpo_loss", swapped, "1", "dpo-loss-code-0"), (ppo, "gae", lam_one, "2", "gae-table-code-0"),
    (ppo, "policy_loss", unclipped, "7", "ppo-clip-code-0")])
def test_notebook_goes_on_after_a_claim_that_fails(module, name, broken, title, cell, setup, monkeypatch):
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError) as raised:
        run(SECTIONS[title], setup)
    assert raised.traceback[-1].frame.code.raw.co_filename == cell
