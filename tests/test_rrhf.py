"""rrhf.py: the loss, where candidates come from, and training.

Letters are the bug classes that a test would catch.
"""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import common
import harness
import rrhf
from conftest import cases, close, killed_after, parameters, rand, sgd, tensor
from harness import UserError
from rrhf import rank_loss, rrhf_loss
from tasks import Pair, Ranking, Task

# Eq. 1 to 5 on rrhf-03, -07 and -08 of the fixtures: log-probs, lengths, rewards, exponent; then scores,
# L_rank and L_ft.
LITERALS = [
    ([-7.134425482033438, -4.333356754951888, -8.062833297165977], [4, 2, 3], [0.7, 0.7, 0.7], 1.0,
     [-1.7836063705083596, -2.166678377475944, -2.6876110990553257], 0.0, 7.134425482033438),
    ([-305.7613714901674, -443.709978, -204.87341600000002], [4, 3, 2], [2.0, 1.0, 3.0], 1.0,
     [-76.44034287254185, -147.903326, -102.43670800000001], 25.996365127458162, 204.87341600000002),
    ([-11.042786961139672, -15.419545353860418, -7.322589685723389], [4, 4, 4], [0.2, 0.1, 0.3], 0.0,
     [-11.042786961139672, -15.419545353860418, -7.322589685723389], 0.0, 7.322589685723389),
]
# rrhf-15: p, r, L_rank and its gradient.
TIED = ([-67.19931, 0.851649, -14.293066, -33.025921, -29.578573, -79.850666], [1, 1, 0, 0, 2, 2], 338.531378,
        [-1.0, 2.0, 3.0, 2.0, -2.0, -4.0])


def ranked(scores, rewards):
    return rank_loss(tensor([scores]), tensor([rewards])).item()


# --------------------------------------------------------------------------------------------------- the loss

@pytest.mark.parametrize("logps, lengths, rewards, exponent, scores, rank, sft", LITERALS)
def test_R_loss_differs_from_the_papers_equations(logps, lengths, rewards, exponent, scores, rank, sft):
    logps, lengths, rewards = tensor([logps]), torch.tensor([lengths]), tensor([rewards])
    close(logps / lengths ** exponent, [scores])
    close(rrhf_loss(logps, lengths, rewards, exponent), [rank + sft])
    close(rrhf_loss(logps, lengths, rewards, exponent, 10.0, 0.5), [10 * rank + 0.5 * sft])
    close(rank_loss(tensor([scores]), rewards), [rank])


def check_gradient(p, rewards, rank, gradient):
    scores = tensor([p]).requires_grad_()
    losses = rank_loss(scores, tensor([rewards]))
    losses.sum().backward()
    close(losses.detach(), [rank])
    close(scores.grad, [gradient])                          # equal scores too: 0 at the hinge


def test_R_only_wrong_pairs_have_a_gradient_and_its_weight_is_1():
    check_gradient(*TIED)
    check_gradient([-1.0, -2.0, -3.0], [1.0, 3.0, 2.0], 3.0, [2.0, -1.0, -1.0])
    check_gradient([-3.0, -1.0, -2.0], [1.0, 3.0, 2.0], 0.0, [0.0, 0.0, 0.0])


def test_loss_scores_or_gradients_differ_from_a_fixture():
    found = cases("rrhf")
    assert {case["inputs"]["kind"] for case in found} == {"raw", "scores"}
    for case in found:
        given, expected = case["inputs"], case["expected"]
        if given["kind"] == "scores":
            check_gradient(given["candidate_logps"], given["scores"], expected["rank_loss"],
                           expected["grad_candidate_logps"])
            continue
        mask, paper, ids = (torch.tensor([given["response_mask"]]), expected["paper"],
                            torch.tensor(given["input_ids"]))
        logps = (common.gather_logps(tensor(given["logits"]), ids) * mask[0, :, 1:]).sum(1)[None]
        lengths, rewards = mask.sum(2), tensor([given["scores"]])
        close(logps, [expected["candidate_logp_sum"]])
        assert (lengths.tolist() == [expected["response_len"]]
                and rewards.argmax(1).item() == expected["best_index"])
        exponent = given["length_penalty"]
        close(logps / lengths ** exponent, [paper["candidate_logps"]])
        close(rank_loss(logps / lengths ** exponent, rewards), [paper["rank_loss"]])
        close(rrhf_loss(logps, lengths, rewards, exponent, 0.0), [paper["sft_loss_sum"]])
        close(rrhf_loss(logps, lengths, rewards, exponent), [paper["total_unweighted_sum"]])


def test_R_pairs_are_lost_averaged_or_turned_round():
    # RRHF issue 29: 0 for both
    assert ranked([1, 2, 3, 4], [4, 3, 2, 1]) == 10 and ranked([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert ranked([-1, -2, -3], [1, 2, 3]) == 4
    assert ranked([5, -7, 1], [2, 2, 2]) == 0 and ranked([3], [1]) == 0


def test_R_sizes_of_rewards_count_or_there_is_a_margin():
    scores, rewards = rand(4, 5), rand(4, 5, seed=1)
    assert rank_loss(scores, rewards).min() > 0
    close(rank_loss(scores, (5 * rewards).exp()), rank_loss(scores, rewards))
    assert ranked([-1.0, -1.0 - 1e-6], [9.0, 1.0]) == 0


def test_R_gradient_of_a_token_is_not_1_over_the_length_or_the_sft_term_has_the_wrong_candidate():
    # p: -1, -1.5, -3
    logps, lengths = tensor([[-4.0, -9.0, -30.0]]).requires_grad_(), torch.tensor([[4, 6, 10]])
    rrhf_loss(logps, lengths, tensor([[0.0, 2.0, 2.0]])).sum().backward()              # the first of the best
    close(logps.grad, [[2 / 4, -1 / 6 - 1, -1 / 10]])
    losses = rrhf_loss(tensor([[-4.0, -9.0]]), torch.tensor([[4, 9]]), tensor([[0.0, 1.0]]),
                       length_penalty=0.5)
    close(losses, [-2 + 3 + 9.0])


def test_R_equal_rewards_push():
    scores = rand(2, 4).requires_grad_()
    rank_loss(scores, torch.ones(2, 4)).sum().backward()
    assert not scores.grad.any()


def random_inputs(b=3, k=5):
    return -20 * rand(b, k), 1 + (9 * rand(b, k, seed=1)).long(), rand(b, k, seed=2)


def test_Q_a_prompt_depends_on_its_batch():
    inputs = random_inputs()
    together = rrhf_loss(*inputs)
    assert together.shape == (3,)
    close(torch.cat([rrhf_loss(*(x[i:i + 1] for x in inputs)) for i in range(3)]), together)


def test_Q_order_of_the_candidates_matters():
    inputs, order = random_inputs(), torch.tensor([3, 0, 4, 1, 2])
    close(rrhf_loss(*(x[:, order] for x in inputs), 0.8, 3.0), rrhf_loss(*inputs, 0.8, 3.0))


@pytest.mark.parametrize("shapes", [[(3,)] * 3, [(1, 3), (1, 3), (3,)], [(2, 3), (2, 3), (2, 1)],
                                    [(2, 3), (1, 3), (2, 3)],
                                    [(2, 3), (2, 3), (3, 2)], [(2, 3, 1)] * 3])
def test_Q_wrong_shapes_are_broadcast(shapes):
    logps, lengths, rewards = (1 + rand(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"\[B, K\]"):
        rrhf_loss(logps, lengths, rewards)
    if logps.shape != rewards.shape or logps.dim() != 2:
        with pytest.raises(ValueError, match=r"\[B, K\]"):
            rank_loss(logps, rewards)


def test_P_inputs_are_changed_in_place():
    inputs = random_inputs()
    before = [x.clone() for x in inputs]
    rrhf_loss(*inputs, 0.8)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("wrong, flag", [
    (dict(rank_weight=-1.0), "--rank_weight"), (dict(sft_weight=-0.1), "--sft_weight"),
    (dict(sft_weight=math.nan), "--sft"),
    (dict(length_penalty=-1.0), "--length_penalty"), (dict(rounds=0), "--rounds"),
    (dict(candidates=0), "--candidates"),
    (dict(candidates=1, sources="D"), "--candidates"), (dict(eval_pairs=-1), "--eval_pairs"),
    (dict(sources="PD"), "--sources"),
    (dict(schedule="none"), "--schedule"), (dict(batch_size=0), "--batch_size")])
def test_bad_option_passes_or_its_flag_is_not_named(wrong, flag):
    with pytest.raises(UserError, match=flag):
        rrhf.Config(**wrong)
    rrhf.Config(candidates=1, sources="DP"), rrhf.Config(rank_weight=0.0, sft_weight=0.0, length_penalty=0.0)
    rrhf.Config(eval_pairs=0)


def test_built_in_answers_are_those_of_other_writers_than_the_papers_or_are_looked_for_in_your_data():
    assert rrhf.Config().systems == "off_policy,weak"
    assert rrhf.Config(model="m", data="d").systems == "" == rrhf.Config(systems="").systems


# --------------------------------------------------------------------------------------------------- training

ROWS = [Ranking("ab", ["cd", "efgha", "b"], [1.0, 3.0, 2.0]), Ranking("h", ["a", "bcb"], [0.0, 1.0]),
        Ranking("cdefg", ["abcabc", "h", "hh", "de"], [4.0, 3.0, 2.0, 1.0]),
        Ranking("gg", ["hh", "aaaaaaa"], [2.0, 1.0]),
        Ranking("b", ["cccc", "dd", "e"], [-1.0, -3.0, 5.0]), Ranking("ef", ["gh", "hg"], [1.0, 2.0]),
        Ranking("abc", ["d", "ee", "fff"], [2.0, 2.0, 1.0])]
PAIRS = [Pair("d", "abc", "cb"), Pair("ee", "f", "ggg")]
TASK = Task("toy", {"train": [row.prompt for row in ROWS], "test": ["d", "ee", "ha"]}, {"test": PAIRS},
            {"train": ROWS})


def proxy(prompts, responses):
    """A reward that differs from the data's own scores."""
    return torch.tensor([sum(map(ord, text)) % 7 - len(prompt) / 10 for prompt,
                         text in zip(prompts, responses)])


proxy.model = SimpleNamespace(config=SimpleNamespace(reward_scale={}))


@pytest.fixture
def trained(toy, tmp_path, monkeypatch):
    """A function that trains with rrhf.py in tmp_path / name; returns the finished Run."""
    finish, runs = harness.Run.finish, []
    monkeypatch.setattr(harness.evaluation, "kl_to_reference",
                        lambda config, policy, batch, plain: torch.zeros(len(batch)))                   # slow
    monkeypatch.setattr(harness.command_line, "load_rewards",
                        lambda config, task: {} if config.reward == "none" else {"proxy": proxy})
    monkeypatch.setattr(harness.Run, "finish", lambda run: runs.append(run) or finish(run))

    def run(name, task=TASK, **kwargs):
        monkeypatch.setattr(harness.loading, "load_task", lambda config: task)
        harness.launch(rrhf.train, rrhf.Config(**{**dict(
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


def plain_score(model, prompt, response, ended=True):
    """Log-prob of one response without batches, masks or padding, and its tokens, EOS included."""
    prompt, response = (["<abcdefgh".index(c) for c in text] for text in (prompt, response + "<" * ended))
    logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)), len(response)


def plain_losses(model, row, exponent):
    """L_rank and L_ft of one Ranking."""
    logps, lengths = zip(*(plain_score(model, row.prompt, *answer)
                           for answer in zip(row.responses, row.ended, strict=True)))
    p, r, rank = [logp / length ** exponent for logp,
                  length in zip(logps, lengths)], row.scores, torch.tensor(0.0)
    for i in range(len(p)):
        for j in range(len(p)):
            rank = rank + max(p[i] - p[j], 0.0) * (r[i] < r[j])
    return rank, -logps[r.index(max(r))]


@pytest.mark.parametrize("options",
                         [dict(), dict(sources="DP", rank_weight=2.0, sft_weight=0.5, length_penalty=0.7),
                          dict(sources="D", max_new_tokens=3, candidates=6)])
def test_O_L_step_differs_from_a_plain_loop_or_depends_on_the_token_budget(trained, monkeypatch, options):
    monkeypatch.setattr(common, "adamw", sgd)
    runs = [trained(str(budget), token_budget=budget, max_grad_norm=1e9, **options)
            for budget in (1, 130, 100000)]
    config, rankings = runs[0].config, runs[0].state["rankings"]
    assert all(run.state["rankings"] == rankings for run in runs)
    policy = harness.load_policy(config)
    optimizer, _ = sgd(policy, config.lr, 2)
    plan = harness.shuffled_batches(len(rankings), config.epochs, config.batch_size, config.seed)
    start = parameters(policy).clone()
    assert len(plan) == 2
    # unequal K
    assert config.sources == "D" or all(len({len(rankings[i].responses) for i in rows}) > 1 for rows in plan)
    for rows, *logged in zip(plan, *map(steps_of, runs), strict=True):
        losses = [plain_losses(policy, rankings[i], config.length_penalty) for i in rows]
        rank, sft = (sum(terms) / len(rows) for terms in zip(*losses))
        loss = config.rank_weight * rank + config.sft_weight * sft
        for row in logged:
            for name, value in (("loss", loss), ("loss/rank", rank), ("loss/sft", sft)):
                assert row[name] == pytest.approx(value.item(), rel=1e-5)
            assert row["rewards/best"] == pytest.approx(sum(max(rankings[i].scores) for i in rows)
                                                        / len(rows), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (parameters(policy) - start).abs().max() > 1e-3
    for run in runs:
        assert (parameters(run.policy) - parameters(policy)).abs().max() < 1e-6
    assert runs[0].counts["tokens_trained"] == runs[2].counts["tokens_trained"] == sum(
        len(row.prompt + text) + ended for row in rankings for text, ended in zip(row.responses, row.ended))


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
    run = trained("run", max_grad_norm=0.01)
    assert settings == [(run.config.lr, 2, run.config.schedule, run.config.warmup)]
    moved = [(after - before).norm().item() for before, after in zip(seen, seen[1:])]
    assert moved == pytest.approx([0.01, 0.005], rel=1e-3)
    assert all(row["grad_norm"] > 0.1 for row in steps_of(run))               # before clipping


def test_L_sample_that_was_cut_off_counts_as_ended(trained):
    rankings = trained("run", sources="D", max_new_tokens=3, candidates=6).state["rankings"]
    ended = [(whole, len(text)) for row in rankings for text,
             whole in zip(row.responses, row.ended, strict=True)]
    assert all(whole == (length < 3) for whole, length in ended) and len(dict(ended)) == 2


def test_D_loss_of_a_prompt_depends_on_its_batch_or_padding(trained, monkeypatch):
    seen, plain = {}, harness.check_finite

    def spy(values, step, prompts, name="loss"):
        plain(values, step, prompts, name)
        seen.update(zip(prompts, values.tolist()) if name == "loss" else ())

    monkeypatch.setattr(harness, "check_finite", spy)
    monkeypatch.setattr(common, "adamw", no_step)
    longer = Ranking("abcdefghabcd", ["abcdefghabcdefgh", "h"], [1.0, 2.0])
    more = Task("toy", {"train": [*TASK.prompts["train"], longer.prompt], "test": ["d"]}, {},
                {"train": [*ROWS, longer]})
    results = []
    for i, (task, options) in enumerate([(TASK, dict(batch_size=1)), (TASK, dict(batch_size=7)),
                                         (more, dict(batch_size=8)),
                                         (TASK, dict(token_budget=90, batch_size=3))]):
        seen.clear()
        trained(str(i), task, **options)
        results.append([seen[row.prompt] for row in ROWS])
    for result in results[1:]:
        close(tensor(result), results[0], 1e-6)


def test_R_training_ranks_backwards(trained):
    run = trained("run", epochs=16.0, batch_size=7, sft_weight=0.0)
    rank = [row["loss/rank"] for row in steps_of(run)]
    assert rank[0] > 0.5 and max(rank[-5:]) < 0.2 * rank[0]


# ------------------------------------------------------------------------------------------------- candidates

def scores_of(run):
    return {row.prompt: row.scores for row in run.state["rankings"]}


def by_proxy(run):
    return {row.prompt: proxy([row.prompt] * len(row.responses), row.responses).tolist()
            for row in run.state["rankings"]}


def test_sources_give_the_wrong_candidates_or_scores(trained):
    given = {row.prompt: row.responses for row in ROWS}
    run = trained("P", reward="none")
    assert scores_of(run) == {row.prompt: row.scores for row in ROWS} != by_proxy(run)
    assert {"eval/nll", "eval/score_accuracy"} <= run.trace[-1].keys()
    assert {row.prompt: row.responses for row in run.state["rankings"]} == given
    samples = {}
    judged = replace(TASK, gold=lambda *row: 100.0)
    for name, task, options in [("P with a reward", TASK, dict(reward="some/model")),
                                ("D", TASK, dict(sources="D")),
                                ("DP", TASK, dict(sources="DP")), ("P with gold", judged, dict())]:
        run = trained(name, task, **options)
        assert scores_of(run) == by_proxy(run), name
        samples[name] = {row.prompt: row.responses for row in run.state["rankings"]}
    assert samples["P with a reward"] == samples["P with gold"] == given
    for prompt, texts in given.items():
        own = samples["D"][prompt]
        assert len(own) <= 4 and samples["DP"][prompt] == own + [text for text in texts if text not in own]
    assert sum(map(len, samples["D"].values())) > 20


@pytest.mark.parametrize("sources", ["P", "DP"])
def test_P_without_the_datas_own_answers_trains_on_something_else(trained, sources):
    with pytest.raises(UserError, match="--sources D"):
        trained("run", replace(TASK, rankings={}), sources=sources)


FLAWED = [Ranking("ab", ["cd"], [1.0]), Ranking("h", ["c", "c"], [1.0, 2.0]),
          Ranking("gg", ["a", "b"], [1.0, 1.0]),
          Ranking("b", ["a", "bb", "a"], [0.0, 1.0, 2.0])]


def test_ranking_with_nothing_to_rank_is_not_said_or_trains_to_nan(trained, capsys):
    run = trained("flawed", replace(TASK, rankings={"train": FLAWED}))
    assert ("of 4 rankings, 2 have one response only and 1 have equal scores throughout"
            in capsys.readouterr().err)
    assert run.state["rankings"][3][1:3] == (["a", "bb"], [0.0, 1.0])
    assert parameters(run.policy).isfinite().all()
    assert all(math.isfinite(value) for row in steps_of(run) for value in row.values())
    trained("sound")
    assert "rankings" not in capsys.readouterr().err


def test_candidates_of_round_2_come_from_the_pool_or_the_first_policy(trained, monkeypatch):
    sampled, rows, rollout, microbatches = [], [], harness.samples.rollout, harness.Run.microbatches
    monkeypatch.setattr(harness.samples, "rollout", lambda run, *args, **kwargs: sampled.append(
        (parameters(run.policy).clone(), len(rows))) or rollout(run, *args, **kwargs))

    def spy(run, rankings):
        if isinstance(rankings[0], Ranking):                  # not the held-out pairs of an evaluation
            rows.append(rankings)
        return microbatches(run, rankings)

    monkeypatch.setattr(harness.Run, "microbatches", spy)
    pool = {prompt: ["aceg", "bdfh", "aabb"] for prompt in TASK.prompts["train"]}
    rows_of_pool = {prompt: Ranking(prompt, texts, [], ended=[True] * 3) for prompt, texts in pool.items()}
    run = trained("run", replace(TASK, pool=rows_of_pool), sources="D", candidates=3, rounds=2, epochs=2.0)
    assert all(row.responses == pool[row.prompt] for step in rows[:4] for row in step)
    assert all(row in run.state["rankings"] and row.responses != pool[row.prompt] for step in rows[4:]
               for row in step)
    (policy, at), = sampled
    assert len(rows) == 8 and at == 4 and (policy
                                           - parameters(harness.load_policy(run.config))).abs().max() > 1e-2


def test_best_of_n_comparison_is_wrong_or_made_with_another_reward(trained):
    run = trained("D", sources="D")
    scores, after = list(by_proxy(run).values()), run.trace[-1]
    best = sum(map(max, scores)) / 7
    assert after["eval/candidates_best"] == pytest.approx(best)
    assert after["eval/candidates_mean"] == pytest.approx(sum(sum(row) / len(row) for row in scores) / 7)
    assert after["eval/to_best"] == pytest.approx(after["eval/proxy"]
                                                  - best) and "eval/to_best" not in run.trace[0]
    for name, options in (("own", dict()), ("noise", dict(sources="D", reward_noise="response"))):
        assert "eval/to_best" not in trained(name, **options).trace[-1]


# ------------------------------------------------------------------------------------------------- whole runs

def test_more_held_out_pairs_are_scored_than_eval_pairs_allows(trained, monkeypatch):
    monkeypatch.setattr(common, "adamw", no_step)
    for number in (1, 2):
        run = trained(str(number), eval_pairs=number)
        scores = [plain_score(run.policy, pair.prompt, pair.responses[0], True) for pair in PAIRS[:number]]
        want = -sum(logp.item() for logp, _ in scores) / sum(length for _, length in scores)
        assert run.trace[-1]["eval/nll"] == pytest.approx(want, abs=1e-5)
    run = trained("0", eval_pairs=0)
    assert "eval/nll" not in run.trace[-1] and "eval/score_accuracy" not in run.trace[-1]
    assert len(run.trace) == 2 and "eval/kl" in run.trace[-1]


def test_AE_runs_are_not_reproducible_or_ignore_the_seed(trained):
    runs = [trained(name, sources="DP", rounds=2, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = ((run.out / "metrics.jsonl").read_text(encoding="utf-8") for run in runs)
    assert first == again != other and torch.equal(parameters(runs[0].policy), parameters(runs[1].policy))
    assert len(runs[0].trace) == 2


def test_AF_resumed_round_takes_the_candidates_of_the_round_before(trained, tmp_path, monkeypatch):
    """Candidates that took minutes are kept in a file; killed in round 1, the run draws those of round 2."""
    monkeypatch.setattr(harness.directory, "SLOW_SECONDS", -1)
    options = dict(sources="DP", rounds=2, epochs=2.0, save_every=2)
    straight = trained("straight", **options)
    with killed_after(2):
        trained("killed", **options)
    resumed = trained("killed", resume=True, **options)
    assert torch.equal(parameters(resumed.policy), parameters(straight.policy))
    assert resumed.state["rankings"] == straight.state["rankings"]


@pytest.mark.parametrize("last", [4, 6])      # killed in round 2: with a checkpoint of round 1, or of round 2
def test_AF_resumed_run_differs_from_a_straight_one(trained, tmp_path, last):
    options = dict(sources="DP", rounds=2, epochs=2.0, save_every=3, eval_every=2)
    straight = trained("straight", **options)
    with killed_after(last):
        trained("killed", **options)
    torch.manual_seed(999)
    resumed = trained("killed", resume=True, **options)
    first, second = ((tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
                     for name in ("straight", "killed"))
    assert first == second and json.loads(first.splitlines()[-1])["step"] == 8
    assert torch.equal(parameters(resumed.policy), parameters(straight.policy))
    assert resumed.state["rankings"] == straight.state["rankings"]
