"""pro.py: the loss, and training on scored candidates. Letters are the bug classes a test would catch."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import common
import harness
import pro
from conftest import cases, close, killed_after, parameters, rand, sgd, tensor
from harness import UserError
from pro import pro_loss, sft_coefficient
from tasks import Pair, Ranking, Task

# pro-00, -03 and -07 of the fixtures: scores, rewards, and L_rank place by place.
LITERALS = [
    ([-1.0, -1.5, -2.0, -0.7], [3.0, 2.0, 1.0, -1.0],
     [2.8623500631406786, 3.1865869173417884, 2.6716446919676695]),
    ([-1.2, -0.4, -0.8], [0.5, 0.5, 0.5], [1.0986122886681098, 0.6931471805599453]),
    ([-400.0, -2.0], [0.0, 5.0], [0.0]),                   # the wrong order; official exps are all 0
]


def sigmoid_loss(gap):
    return -math.log(1 / (1 + math.exp(-gap)))


# --------------------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("scores, rewards, places", LITERALS)
def test_S_loss_or_its_terms_differ_from_the_fixtures_numbers(scores, rewards, places):
    close(pro_loss(tensor([scores]), tensor([rewards])), [sum(places)])
    for terms in range(len(places) + 3):
        close(pro_loss(tensor([scores]), tensor([rewards]), terms=terms), [sum(places[:terms])])


def test_loss_scores_or_sft_term_differ_from_a_fixture():
    found = cases("pro")
    assert {case["inputs"]["kind"] for case in found} == {"raw", "scores"}
    for case in found:
        given, expected = case["inputs"], case["expected"]
        rewards = tensor(given["rewards"])
        if given["kind"] == "raw":
            ids, mask = torch.tensor(given["input_ids"]), torch.tensor(given["response_mask"])
            logps = torch.stack([common.gather_logps(*rows)
                                 for rows in zip(tensor(given["logits"]), ids)]) * mask[:, :, 1:]
            logps, lengths, ranking = logps.sum(2), mask.sum(2), expected["response_only"]
            close(logps, ranking["sum_logps"])
            close(logps / lengths, ranking["mean_logps"])
            assert lengths.tolist() == ranking["response_len"]
            scores, paper = logps / lengths, ranking["paper_rank_loss"]
        else:
            scores, lengths = tensor(given["mean_logps"]), torch.tensor(given["response_len"])
            logps, ranking, paper = (scores * lengths, expected["stable_no_eps"],
                                     expected["paper"]["rank_loss"])
            close(pro_loss(scores, rewards, temperature=False).mean(), expected["no_temperature_rank_loss"])
        close(pro_loss(scores, rewards).mean(), ranking["rank_loss"])
        assert paper is None or paper == pytest.approx(ranking["rank_loss"], abs=1e-9)
        for k, place in enumerate(ranking["stage_losses"]):
            close((pro_loss(scores, rewards, terms=k + 1) - pro_loss(scores, rewards, terms=k)).mean(), place)
        coefficient = sft_coefficient(scores.shape[1], given["sft_weight"])
        assert coefficient == pytest.approx(expected["sft_coefficient"], abs=1e-12)
        nll = -logps[range(len(logps)), given["sft_index"]].mean()
        close(nll, expected.get("sft_nll_sum_mean", ranking.get("sft_nll_sum_mean")))


def test_sft_weight_does_not_grow_with_the_ranking():
    assert [sft_coefficient(n) for n in range(1, 6)] == pytest.approx([0, 0.05, 0.2, 0.45, 0.8])
    assert sft_coefficient(3, 2.0) == 8 and sft_coefficient(4, 0.0) == 0


def test_S_two_responses_are_not_a_logistic_loss_or_the_winner_has_no_temperature():
    scores = tensor([[-1.0, -1.7], [-2.0, -0.5]])
    for gap, temperature, factor in ((1.0, True, 1), (1.0, False, 1), (2.5, True, 2.5), (2.5, False, 1)):
        expected = -F.logsigmoid(factor * (scores[:, 0] - scores[:, 1]))
        close(pro_loss(scores, tensor([[gap, 0.0]] * 2) - 3, temperature), expected)


def test_S_temperatures_differ_from_a_calculation_by_hand():
    s, r = [-1.0, -1.1, -1.5], [2.0, 1.8, 0.2]   # gaps 0.2 and 1.8, then 1.6; the first place has the largest
    logits = [1.8 * s[0], 0.2 * s[1], 1.8 * s[2]]
    first = math.log(sum(map(math.exp, logits))) - logits[0]
    close(pro_loss(tensor([s]), tensor([r])), [first + sigmoid_loss(1.6 * (s[1] - s[2]))])
    assert math.exp(logits[1] - logits[0] - first) == pytest.approx(0.775, abs=1e-3)           # the near tie


def test_S_plain_plackett_luce_differs_from_a_calculation_by_hand():
    rewards = tensor([[9.0, 5.0, -2.0]])
    assert pro_loss(tensor([[0, -0.4, -1.2]]), rewards, False).item() == pytest.approx(1.05, abs=0.005)
    assert pro_loss(tensor([[-1.2, -0.4, 0]]), rewards, False).item() == pytest.approx(2.79, abs=0.005)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_S_ties_are_not_log_n_factorial_or_push(n):
    scores = rand(2, n).requires_grad_()
    losses = pro_loss(scores, torch.ones(2, n))
    close(losses.detach(), [math.lgamma(n + 1)] * 2)
    close(pro_loss(torch.ones(2, n, dtype=torch.float64), rand(2, n), False), [math.lgamma(n + 1)] * 2)
    if n > 1:
        losses.sum().backward()
        assert not scores.grad.any()


def test_S_order_of_tied_losers_matters():
    scores, rewards = rand(3, 5), tensor([[2.0, 1.0, 0.0, 0.0, 0.0]] * 3)
    close(pro_loss(scores[:, [0, 1, 4, 2, 3]], rewards), pro_loss(scores, rewards))
    assert not torch.allclose(pro_loss(scores[:, [1, 0, 2, 3, 4]], rewards), pro_loss(scores, rewards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [True, False])
def test_S_loss_overflows_at_huge_scores(dtype, temperature):
    scores = torch.tensor([[1e3, -1e3], [-1e3, 1e3]], dtype=dtype, requires_grad=True)
    losses = pro_loss(scores, torch.tensor([[1.0, 0.0]] * 2), temperature)
    losses.sum().backward()
    close(losses.detach(), [0.0, 2000.0])
    close(scores.grad, [[0.0, 0.0], [-1.0, 1.0]])


def test_gradient_is_not_the_softmax_minus_the_winner():
    scores, rewards = (-3 * rand(1, 3)).requires_grad_(), tensor([[1.0, 0.5, -1.0]])
    pro_loss(scores, rewards).sum().backward()
    (a, b, c), expected = scores[0].detach(), torch.zeros(3, dtype=torch.float64)
    for places, factors in (((0, 1, 2), tensor([2.0, 0.5, 2.0])), ((1, 2), tensor([1.5, 1.5]))):
        p = (tensor([a, b, c])[list(places)] * factors).softmax(0)
        p[0] -= 1
        expected[list(places)] += factors * p
    close(scores.grad, expected[None])


def test_Q_a_prompt_depends_on_its_batch_or_P_inputs_are_changed():
    inputs = -3 * rand(3, 4), 4 - rand(3, 4, seed=1).cumsum(1)
    before = [x.clone() for x in inputs]
    for temperature in (True, False):
        together = pro_loss(*inputs, temperature)
        assert together.shape == (3,)
        close(torch.cat([pro_loss(*(x[i:i + 1] for x in inputs), temperature) for i in range(3)]), together)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("shapes",
                         [[(3,), (3,)], [(2, 3), (3,)], [(2, 3), (1, 3)], [(2, 3), (2, 1)], [(2, 3, 1)] * 2])
def test_Q_wrong_shapes_are_broadcast(shapes):
    with pytest.raises(ValueError, match=r"\[B, K\]"):
        pro_loss(*(rand(*shape) for shape in shapes))


@pytest.mark.parametrize("wrong, flag", [
    (dict(sft_weight=-0.1), "--sft_weight"), (dict(sft_weight=math.nan), "--sft_weight"),
    (dict(terms=-1), "--terms"),
    (dict(candidates=0), "--candidates"), (dict(candidates=1), "--candidates"),
    (dict(eval_pairs=-1), "--eval_pairs"),
    (dict(sources="DD"), "--sources"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        pro.Config(**wrong)
    pro.Config(candidates=1, sources="DP"), pro.Config(candidates=2, sources="D")
    pro.Config(sft_weight=0.0, terms=0), pro.Config(eval_pairs=0)


# --------------------------------------------------------------------------------------------------- training

ROWS = [Ranking("ab", ["cd", "efgha", "b"], [1.0, 3.0, 2.0]), Ranking("h", ["a", "bcb"], [0.0, 0.5]),
        Ranking("cdefg", ["abcabc", "h", "hh", "de"], [1.0, 2.5, 3.0, 4.0]),
        Ranking("gg", ["hh", "aaaaaaa"], [2.0, 1.0]),
        Ranking("b", ["cccc", "dd", "e"], [-1.0, -3.0, 1.0]), Ranking("ef", ["gh", "hg"], [1.0, 2.0]),
        Ranking("abc", ["d", "ee", "fff"], [1.0, 2.0, 2.0])]
TASK = Task("toy", {"train": [row.prompt for row in ROWS], "test": ["d", "ee", "ha"]},
            {"test": [Pair("d", "abc", "cb"), Pair("ee", "f", "ggg")]}, {"train": ROWS})


def proxy(prompts, responses):
    """A reward that differs from the data's own scores."""
    return torch.tensor([sum(map(ord, text)) % 7 / 3 - len(prompt) / 8 for prompt,
                         text in zip(prompts, responses)])


proxy.model = SimpleNamespace(config=SimpleNamespace(reward_scale={}))


@pytest.fixture
def trained(toy, tmp_path, monkeypatch):
    """A function that trains with pro.py in tmp_path / name: the finished Run, and its training rankings."""
    collect, runs = harness.candidates, []

    def spy(run, *arguments):
        rankings = collect(run, *arguments)
        runs.append((run, rankings))
        return rankings

    monkeypatch.setattr(harness.evaluation, "kl_to_reference",
                        lambda config, policy, batch, plain: torch.zeros(len(batch)))                   # slow
    monkeypatch.setattr(harness.command_line, "load_rewards",
                        lambda config, task: {} if config.reward == "none" else {"proxy": proxy})
    monkeypatch.setattr(harness, "candidates", spy)

    def run(name, task=TASK, **kwargs):
        monkeypatch.setattr(harness.loading, "load_task", lambda config: task)
        harness.launch(pro.train, pro.Config(**{**dict(
            model=str(toy), data="toy.jsonl", out=str(tmp_path / name), sources="P", max_length=64,
            max_new_tokens=5, lr=1e-2,
            batch_size=4, epochs=1.0, eval_prompts=3, eval_samples=1, save_every=0, device="cpu", quiet=True),
                                                **kwargs}))
        return runs[-1]

    return run


def no_step(model, *settings):
    """Stands in for common.adamw: the weights stay as they are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def steps_of(run):
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def plain_score(model, prompt, response, ended):
    """Log-prob of one response without batches, masks or padding, and its tokens, EOS included."""
    prompt, response = (["<abcdefgh".index(c) for c in text] for text in (prompt, response + "<" * ended))
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)), len(response)


def plain_losses(model, row, config):
    """Loss, L_rank, L_SFT, and the scores of best and worst of one Ranking."""
    answers = sorted(zip(row.scores, row.responses, row.ended, strict=True), key=lambda answer: -answer[0])
    logps, lengths = zip(*(plain_score(model, row.prompt, text, ended) for _, text, ended in answers))
    s, r, rank = [logp / length for logp, length in zip(logps, lengths)], [score for score,
                                                                           *_ in answers], torch.tensor(0.0)
    for k in range(len(s) - 1)[:config.terms or None]:
        gaps = [r[k] - r[i] for i in range(k + 1, len(s))]
        factors = [max(gaps), *gaps] if config.dynamic_temperature else [1.0] * (len(gaps) + 1)
        rank = rank - torch.stack([factor * score for factor, score in zip(factors, s[k:])]).log_softmax(0)[0]
    return rank - config.sft_weight * (len(s) - 1) ** 2 * logps[0], rank, -logps[0], s[0], s[-1]


@pytest.mark.parametrize("options",
                         [dict(), dict(sources="DP", candidates=2, dynamic_temperature=False, sft_weight=0.1,
                                       terms=2),
                          dict(sources="D", max_new_tokens=3, candidates=6)])
def test_O_L_S_step_differs_from_a_plain_loop_or_depends_on_the_token_budget(trained, monkeypatch, options):
    monkeypatch.setattr(common, "adamw", sgd)
    runs = [trained(str(budget), token_budget=budget, max_grad_norm=1e9, **options)
            for budget in (1, 130, 100000)]
    config, rankings = runs[0][0].config, runs[0][1]
    assert all(others == rankings for _, others in runs)
    policy = harness.load_policy(config)
    optimizer, _ = sgd(policy, config.lr, 2)
    plan = harness.shuffled_batches(len(rankings), config.epochs, config.batch_size, config.seed)
    start = parameters(policy).clone()
    assert len(plan) == 2
    # unequal K
    assert config.sources == "D" or all(len({len(rankings[i].responses) for i in rows}) > 1 for rows in plan)
    for rows, *logged in zip(plan, *(steps_of(run) for run, _ in runs), strict=True):
        means = [sum(values) / len(rows)
                 for values in zip(*(plain_losses(policy, rankings[i], config) for i in rows))]
        for row in logged:
            for name, value in zip(("loss", "loss/rank", "loss/sft", "scores/best", "scores/worst"), means,
                                   strict=True):
                assert row[name] == pytest.approx(value.item(), rel=1e-5)
        means[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (parameters(policy) - start).abs().max() > 1e-2
    for run, _ in runs:
        assert (parameters(run.policy) - parameters(policy)).abs().max() < 1e-5
    if options.get("sources") == "D":                       # a sample that was cut off has no EOS
        ended = {(whole, len(text) < 3) for row in rankings for text,
                 whole in zip(row.responses, row.ended, strict=True)}
        assert ended == {(True, True), (False, False)}


def test_O_step_is_not_clipped_or_the_schedule_is_not_followed(trained, monkeypatch):
    settings, seen, log = [], [], harness.Run.log

    def halving(model, *given):
        settings.append(given)
        seen.append(parameters(model).clone())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)

    monkeypatch.setattr(common, "adamw", halving)
    monkeypatch.setattr(harness.Run, "log", lambda run, *row: seen.append(parameters(run.policy).clone())
                        or log(run, *row))
    run, _ = trained("run", max_grad_norm=0.01)
    assert settings == [(run.config.lr, 2, run.config.schedule, run.config.warmup)]
    moved = [(after - before).norm().item() for before, after in zip(seen, seen[1:])]
    assert moved == pytest.approx([0.01, 0.005], rel=1e-3)
    assert all(row["grad_norm"] > 0.1 for row in steps_of(run))               # before clipping


def test_D_loss_of_a_prompt_depends_on_its_batch_or_its_candidates_places(trained, monkeypatch):
    seen, steps, plain = {}, set(), harness.check_finite

    def spy(values, step, prompts, name="loss"):
        plain(values, step, prompts, name)
        steps.add(step)
        seen.update(zip(prompts, values.tolist()) if name == "loss" else ())

    monkeypatch.setattr(harness, "check_finite", spy)
    monkeypatch.setattr(common, "adamw", no_step)
    longer = Ranking("abcdefghabcd", ["abcdefghabcdefgh", "h"], [1.0, 2.0])
    more = replace(TASK, prompts={"train": [*TASK.prompts["train"], longer.prompt], "test": ["d"]},
                   rankings={"train": [*ROWS, longer]})
    turned = [Ranking(row.prompt, row.responses[1:] + row.responses[:1], row.scores[1:] + row.scores[:1])
              for row in ROWS]
    results = []
    for i, (task, options) in enumerate([(TASK, dict(batch_size=1)), (TASK, dict(batch_size=7)),
                                         (more, dict(batch_size=8)),
                                         (replace(TASK, rankings={"train": turned}),
                                          dict(token_budget=90, batch_size=3))]):
        seen.clear()
        trained(str(i), task, **options)
        results.append([seen[row.prompt] for row in ROWS])
    assert steps == {*range(1, len(ROWS) + 1)}                        # as metrics.jsonl counts them
    for result in results[1:]:
        close(tensor(result), results[0], 1e-5)


def test_S_training_ranks_backwards(trained):
    rank = [row["loss/rank"]
            for row in steps_of(trained("run", epochs=16.0, batch_size=7, sft_weight=0.0)[0])]
    assert max(rank[-3:]) < 0.6 * rank[0]


# ------------------------------------------------------------------------------------------------- whole runs

def test_sources_give_the_wrong_candidates_or_scores(trained):
    judged, samples = replace(TASK, gold=lambda *row: 100.0), {}
    for name, task, options in [
            ("P", TASK, dict(reward="none")), ("P with a reward", TASK, dict(reward="some/model")),
            ("P with gold", judged, {}),
            ("D", TASK, dict(sources="D")), ("DP", TASK, dict(sources="DP"))]:
        run, rankings = trained(name, task, **options)
        samples[name] = {row.prompt: list(row.responses) for row in rankings}
        own = [row.scores for row in rankings] == [row.scores for row in ROWS]
        assert own == (name == "P")
        assert own or all(row.scores == proxy([row.prompt] * 9, row.responses).tolist() for row in rankings)
        assert {"eval/nll", "eval/score_accuracy"} <= run.trace[-1].keys()
    assert samples["P"] == samples["P with a reward"] == samples["P with gold"] == {
        row.prompt: row.responses for row in ROWS}
    for row in ROWS:
        own = samples["D"][row.prompt]
        assert 2 <= len(own) <= 5 and samples["DP"][row.prompt] == own + [text for text in row.responses
                                                                          if text not in own]


def test_data_without_rankings_or_without_a_reward_trains_on_something_else(trained):
    for sources in ("P", "DP"):
        with pytest.raises(UserError, match="--sources D"):
            trained("run", replace(TASK, rankings={}), sources=sources)
    for options in (dict(sources="DP"), dict(sources="D"), dict(task=replace(TASK, gold=lambda *row: 1.0))):
        with pytest.raises(UserError, match="no reward"):
            trained("run", **options, reward="none")


FLAWED = [Ranking("ab", ["cd"], [1.0]), Ranking("h", ["c", "c"], [1.0, 2.0]),
          Ranking("gg", ["a", "b", "cc"], [1.0] * 3),
          Ranking("b", ["a", "bb", "a"], [0.0, 1.0, 2.0])]


def test_ranking_with_nothing_to_rank_is_not_said_or_trains_to_nan(trained, capsys):
    run, rankings = trained("flawed", replace(TASK, rankings={"train": FLAWED}))
    assert ("of 4 rankings, 2 have one response only and 1 have equal scores throughout"
            in capsys.readouterr().err)
    assert rankings[3][1:3] == (["a", "bb"], [0.0, 1.0])
    assert parameters(run.policy).isfinite().all() and (steps_of(run)[0]["loss/rank"] * 4) > math.log(6)
    assert all(math.isfinite(value) for row in steps_of(run) for value in row.values())
    run, _ = trained("single", replace(TASK, rankings={"train": FLAWED[:2]}))           # no loss, no gradient
    assert steps_of(run)[0]["loss"] == 0
    assert torch.equal(parameters(run.policy), parameters(harness.load_policy(run.config)))


def test_more_held_out_pairs_are_scored_than_eval_pairs_allows(trained, monkeypatch):
    monkeypatch.setattr(common, "adamw", no_step)
    for number in (1, 2):
        run, _ = trained(str(number), eval_pairs=number)
        pairs = TASK.pairs["test"][:number]
        scores = [plain_score(run.policy, pair.prompt, pair.responses[0], True) for pair in pairs]
        want = -sum(logp.item() for logp, _ in scores) / sum(length for _, length in scores)
        assert run.trace[-1]["eval/nll"] == pytest.approx(want, abs=1e-5)
    run, _ = trained("0", eval_pairs=0)
    assert "eval/nll" not in run.trace[-1] and "eval/score_accuracy" not in run.trace[-1]
    assert len(run.trace) == 2 and "eval/kl" in run.trace[-1]


def test_AE_runs_are_not_reproducible_or_ignore_the_seed(trained):
    runs = [trained(name, sources="DP", seed=seed)[0] for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ((run.out / "metrics.jsonl").read_text(encoding="utf-8") for run in runs)
    assert first == again != other and torch.equal(parameters(runs[0].policy), parameters(runs[1].policy))


def test_AF_resumed_run_differs_or_takes_its_candidates_from_the_trained_policy(trained):
    options = dict(sources="D", epochs=2.0, save_every=2)
    straight, rankings = trained("straight", **options)
    with killed_after(2):
        trained("killed", **options)
    torch.manual_seed(999)
    resumed, again = trained("killed", resume=True, **options)
    assert again == rankings and torch.equal(parameters(resumed.policy), parameters(straight.policy))
    first, second = ((run.out / "metrics.jsonl").read_text(encoding="utf-8") for run in (straight, resumed))
    assert first == second and len(steps_of(resumed)) == 4
