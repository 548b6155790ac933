"""Two processes (torchrun, gloo) make the run that one makes: every method's losses, weights and files.

With whole models in each process, and with --shard; what shards are is checked in test_shards.py.

What is sampled is made by a rule here, because two processes draw other random numbers than one.
"""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import common
from conftest import PAIRS, ROOT, method_names, save_toy

WORKER = '''
import collections, importlib, itertools, os, pathlib, random, signal, sys, time
sys.path[:0] = {paths!r}
import torch
import common, harness
from conftest import method_names, settings
from harness import ranks

COUNTED, PLAIN, KINDS = [], ranks.generate, ("plain", "shard")


class Numbered(str):
    number = 0                                                  # how often the prompt stands before this one


def numbered(model, tokenizer, prompts, *args, **kwargs):
    seen, marked = collections.Counter(), [*map(Numbered, prompts)]
    for prompt in marked:
        prompt.number, seen[prompt] = seen[prompt], seen[prompt] + 1
    return PLAIN(model, tokenizer, marked, *args, **kwargs)


def by_rule(model, tokenizer, prompts, n=1, temperature=1.0, greedy=False, *args, **kwargs):
    rows = []
    for prompt, ids in zip(prompts, common.prompt_ids(tokenizer, prompts)):
        for k in range(n):
            rng = random.Random(f"{{ids}} {{getattr(prompt, 'number', 0)}} {{k}} {{greedy}}")
            rows.append((ids, [rng.randrange(1, 9) for _ in range(rng.randrange(1, 5))] + [0]))
    COUNTED.append(len(prompts))
    return common.pack(rows, tokenizer.pad_token_id)


def letters(prompts, responses):
    return [text.count("a") - 0.5 * text.count("b") + 0.01 * len(text) for text in responses]


def die(run, step, metrics, log=harness.Run.log):
    """The second process is killed in its third step."""
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    log(run, step, metrics)


def slow(out, claim=harness.directory.claim):
    """The first process makes the directory later than the others need: they may be on another machine."""
    time.sleep(2 * (out.name == "dpo"))
    return claim(out)


def main(home, *words):
    """words: methods; plain, shard: without --shard, with it, or both; die: killed in the third step;
    resume=FOLDER: of a killed run."""
    names = [word for word in words if word in method_names()]
    resumed = [word[7:] for word in words if word.startswith("resume=")]
    if "die" in words:
        harness.Run.log = die
    common.generate, ranks.generate, harness.directory.claim = by_rule, numbered, slow
    torch.set_num_threads(1)
    harness.add_tags = lambda run, tags: None                               # the toy has no letters for tags
    harness.steering, harness.steering_metrics = (lambda *args: {{"matrix": {{}}}}), (lambda matrix: {{}})
    harness.report_steering = lambda *args: None
    rank, n = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    for shard, name in itertools.product([word == "shard" for word in words if word in KINDS], names):
        folder = resumed[0] if resumed else "of" + n + "shards" * shard
        module = importlib.import_module(name)
        for tag in ("tag", "format_attributes"):
            if hasattr(module, tag):
                setattr(module, tag, lambda *args: "hg")
        extra = {{"labels": "human"}} if name == "steerlm" else {{}}
        config = settings(pathlib.Path(home), module.Config, data=home + "/rows.jsonl",
                          reward="worker:letters", epochs=1.0, out=f"{{home}}/{{folder}}/{{name}}",
                          lr=1e-3, batch_size=7, token_budget=40, save_every=2, shard=shard,
                          resume=bool(resumed), **extra)
        COUNTED.clear()
        harness.launch(module.train, config)
        print("RANK", rank, name, sum(COUNTED), flush=True)
        if rank != "0":
            print("SECOND", name, sum(COUNTED), file=sys.stderr)


if __name__ == "__main__":
    from harness.command_line import in_one_line
    in_one_line(lambda: main(*sys.argv[1:]))
'''


def worker_in(home):
    """The worker, its toy policy and its data in a folder."""
    save_toy(home)
    rows = [{"prompt": pair.prompt, "responses": [pair.chosen, pair.rejected, "ab"],
             "scores": [0.9, 0.1, 0.5]} for pair in PAIRS]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    worker = home / "worker.py"
    worker.write_text(WORKER.format(paths=[str(ROOT), str(ROOT / "tests"), str(home)]), encoding="utf-8")
    return worker


def launched(worker, n, *arguments):
    """The finished worker, in n processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    return subprocess.run([sys.executable, *launcher, str(worker), str(worker.parent), *arguments],
                          capture_output=True, text=True, encoding="utf-8", timeout=600, cwd=worker.parent,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """{1: (folder of the runs, what was printed), 2: the same of two processes, "shard": in shards}."""
    home, found = tmp_path_factory.mktemp("ranks"), {}
    worker = worker_in(home)
    for n, kinds in ((1, ["plain"]), (2, ["plain", "shard"])):
        done = launched(worker, n, *kinds, *method_names())
        assert done.returncode == 0, done.stderr[-3000:]
        found[n] = home / f"of{n}", done.stdout + done.stderr
    return found | {"shard": (home / "of2shards", found[2][1])}


def rows_of(folder, method):
    lines = (folder / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("kind", [2, "shard"])
def test_two_processes_learn_something_else(both, method, kind):
    one, two = (rows_of(both[n][0], method) for n in (1, kind))
    assert len(one) == len(two) > 3
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            close = 1e-5 if "loss" in name else 1e-4
            assert b[name] == pytest.approx(value, rel=close, abs=1e-5), (a["step"], name)
    weights = [common.load_policy(both[n][0] / method, "cpu").state_dict() for n in (1, kind)]
    start = common.load_policy(both[1][0].parent, "cpu").state_dict()
    moved = 0.0
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-4, msg=name)
        moved = max(moved, float((weight - start[name]).abs().max()))
    assert moved > 1e-3


def test_second_process_writes_prints_or_samples_what_the_first_does(both):
    files = [{path.relative_to(both[n][0]).as_posix() for path in both[n][0].rglob("*")} for n in both]
    assert files[0] == files[1] == files[2]
    assert not any(".lock" in name or ".process" in name for name in files[1])
    assert "RANK 1 " not in both[2][1] + both["shard"][1]                     # its standard output is closed
    saved = [json.loads((both[n][0] / "dpo" / "config.json").read_text(encoding="utf-8")) for n in both]
    assert saved[0] == saved[1] == saved[2]
    for method in ("ppo", "remax"):
        alone, first, second = (int(re.search(pattern + f" {method} (\\d+)", both[n][1])[1])
                                for n, pattern in ((1, "RANK 0"), (2, "RANK 0"), (2, "SECOND")))
        assert alone > 0 and abs(first - alone / 2) < 0.2 * alone


@pytest.mark.parametrize("before, after", [("plain", "shard"), ("shard", "plain")])
def test_killed_process_is_a_traceback_or_leaves_nothing_to_go_on_with(tmp_path, both, before, after):
    """Killed with --shard it goes on in one process without; killed without, in two with --shard."""
    worker, folder = worker_in(tmp_path), "of2" + "shards" * (before == "shard")
    done = launched(worker, 2, "die", before, "dpo")
    ours = re.split(r"(?m)^E\d{4} ", done.stderr)[0]              # before the report of torchrun
    assert done.returncode and "Traceback" not in ours, done.stderr
    assert "error: another process of this run has ended" in ours or ours.count("stopped") == 1, done.stderr
    state = torch.load(tmp_path / folder / "dpo" / "state.pt", weights_only=True)
    assert state["step"] == 2
    done = launched(worker, 1 + (after == "shard"), after, f"resume={folder}", "dpo")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(rows_of(both[1][0], "dpo"), rows_of(tmp_path / folder, "dpo"), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
