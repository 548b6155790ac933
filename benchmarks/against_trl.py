"""dpo.py and the reward model beside TRL's trainers: the same model, pairs, batches and optimizer, in turn.

    pip install -e ".[bench]"
    python benchmarks/against_trl.py --model DIR --data FILE         # SmolLM2-135M, one thread: 12 minutes

Every way is a process of its own. One step of each is made in turn; nothing else runs then. TRL has the
reference's log-probs computed beforehand, as dpo.py does. "Checkpointing" computes activations again in the
backward pass: it is TRL's default, and ours is without. A step is: forward, backward, clipping, AdamW; data
loading and logging are left out. At every step the losses of all ways must agree to 1e-4. Peak: largest
resident set. Where TRL needs an environment of its own, --trl_python names its interpreter.
"""
import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS, LR, CLIP, SEED = 4, 1e-6, 10.0, 0                                            # pairs of a step
WAYS = {"ours": "ours", "ours, checkpointing": "ours checkpointing",
        "TRL": "trl", "TRL, checkpointing": "trl checkpointing"}


def say(**row):
    print(json.dumps(row), flush=True)


def clock():
    """Seconds on the wall, and of the processor."""
    return time.time(), time.process_time()


def wait_for_turn():
    """The clock when the parent allows the next step; ends where the parent has ended."""
    say(ready=True)
    if not sys.stdin.readline():
        sys.exit(1)
    return clock()


def report(began, ended, loss, logps=0.0):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)
    say(wall=ended[0] - began[0], cpu=ended[1] - began[1], loss=float(loss), logps=float(logps), peak=peak)


# ------------------------------------------------------------------------------------------------------- ways

def ours(kind, options, checkpointing):
    sys.path.insert(0, str(ROOT))
    import torch

    import dpo
    import harness
    from harness import stages
    torch.set_num_threads(options.threads)
    shared = dict(model=options.model, data=options.data, max_length=options.max_length, batch_size=PAIRS,
                  lr=LR, schedule="linear", warmup=0.0, epochs=1.0, reward="none", seed=SEED, device="cpu",
                  quiet=True, token_budget=options.token_budget, max_new_tokens=2, test_data=options.test,
                  gradient_checkpointing=checkpointing)
    if kind == "dpo":
        steps, log = harness.Run.steps, harness.Run.log

        def in_turn(run, *args):
            for item in steps(run, *args):
                run.turn = wait_for_turn()
                yield item

        def and_report(run, step, metrics):
            report(run.turn, clock(), metrics["loss"], metrics["logps/chosen"])
            log(run, step, metrics)

        harness.Run.steps, harness.Run.log = in_turn, and_report
        with tempfile.TemporaryDirectory() as folder:
            config = dpo.Config(**shared, max_grad_norm=CLIP, eval_prompts=1, eval_samples=1, eval_pairs=0,
                                out=folder + "/run")
            harness.launch(dpo.train, config)
        return
    config = harness.Config(**shared)
    task, tokenizer, losses = harness.load_task(config), harness.load_tokenizer(config), []

    def in_turn(plan, *_, **__):
        for step in plan:
            losses.clear()
            began = wait_for_turn()
            yield step
            report(began, clock(), sum(losses) / PAIRS)

    check, stages.progress.steps = stages.check_finite, in_turn
    stages.check_finite = lambda values, *args: losses.append(values.detach().sum()) or check(values, *args)
    recipe = harness.Recipe(LR, batch_size=PAIRS, schedule="linear", warmup=0.0, max_grad_norm=CLIP,
                            seed=SEED, token_budget=config.token_budget)
    model = with_plain_head(harness.load_scorer(config))
    harness.train_reward_model(model, tokenizer, task.pairs["train"], recipe)


def with_plain_head(model):
    """The same new head everywhere: 0.01 for each weight."""
    model.score.weight.data.fill_(0.01)
    return model


def trl(kind, options, checkpointing):
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):        # else its reward model misses the EOS
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(int(tokenizer.eos_token_id == 0))
    rows = [json.loads(line) for line in Path(options.in_order).read_text(encoding="utf-8").splitlines()]

    class InTurn(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = wait_for_turn()

        def on_step_end(self, *_, **__):
            self.ended = clock()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in (logs or {}):
                report(self.began, self.ended, logs["loss"], logs.get("logps/chosen", 0.0))

    with tempfile.TemporaryDirectory() as folder:
        shared = dict(
            output_dir=folder, per_device_train_batch_size=PAIRS, learning_rate=LR, num_train_epochs=1,
            lr_scheduler_type="linear", max_grad_norm=CLIP, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0,
            max_length=options.max_length, train_sampling_strategy="sequential", logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, bf16=False, seed=SEED, disable_tqdm=True,
            gradient_checkpointing=checkpointing)
        data, kind_of = Dataset.from_list(rows), transformers.AutoModelForCausalLM
        if kind == "dpo":
            config = DPOConfig(**shared, beta=0.1, precompute_ref_log_probs=True)
            model = kind_of.from_pretrained(options.model, dtype=torch.float32)
            trainer = DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer,
                                 callbacks=[InTurn()])
        else:
            kind_of = transformers.AutoModelForSequenceClassification
            model = kind_of.from_pretrained(options.model, dtype=torch.float32, num_labels=1)
            model.config.pad_token_id = tokenizer.pad_token_id
            trainer = RewardTrainer(with_plain_head(model), args=RewardConfig(**shared), train_dataset=data,
                                    processing_class=tokenizer, callbacks=[InTurn()])
        trainer.train()


# ----------------------------------------------------------------------------------------------------- parent

def prepare(options, folder):
    """options.data: the first pairs that fit and have the same tokens in both; in_order, test: see below."""
    sys.path.insert(0, str(ROOT))
    import harness
    config = harness.Config(model=options.model, data=options.data, reward="none", skip_bad_rows=True,
                            max_length=options.max_length, max_new_tokens=2)
    tokenizer, rows = harness.load_tokenizer(config), []

    def ids(text):
        return tokenizer(str(text), add_special_tokens=False).input_ids

    for pair in harness.load_task(config).pairs["train"]:
        joint = [ids(pair.prompt + text) for text in pair.responses]
        prompt_fits = len(ids(pair.prompt)) <= options.max_length * 3 // 4
        apart = [ids(pair.prompt) + ids(text) for text in pair.responses]
        if prompt_fits and max(map(len, joint)) < options.max_length and apart == joint:
            rows.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected})
    rows = list({row["prompt"]: row for row in rows}.values())[:PAIRS * options.steps + 2]
    if len(rows) < PAIRS * options.steps + 2:
        sys.exit(f"{len(rows)} pairs can be used: lower --steps, or raise --max_length")
    rows, test = rows[:-2], rows[-2:]

    def write(name, rows):
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        setattr(options, name, str(path))

    write("data", rows)
    write("test", test)
    config = dataclasses.replace(config, data=options.data, test_data=options.test)
    pairs = harness.load_task(config).pairs["train"]
    plan = harness.shuffled_batches(len(pairs), 1.0, PAIRS, SEED)
    write("in_order", [pairs[i]._asdict() for step in plan for i in step])


class Way:
    """One process; step() lets it make one step."""

    def __init__(self, name, kind, options):
        python = sys.executable if WAYS[name].startswith("ours") else options.trl_python
        flags = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("trl_python", "way")]
        command = [python, __file__, "--way", f"{kind} {WAYS[name]}", *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8")
        self.rows, self.name = [], name
        self.read("ready")

    def read(self, key):
        for line in self.process.stdout:
            row = json.loads(line) if line.startswith('{"') else {}
            if key in row:
                return row
        sys.exit(f"{self.name}: the process ended with status {self.process.wait()}")

    def step(self, more):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rows.append(self.read("loss"))
        if more:
            self.read("ready")


def main(options):
    data = options.data
    for kind, title in (("dpo", "DPO"), ("reward", "Reward model")):
        with tempfile.TemporaryDirectory() as folder:
            options.data = data
            prepare(options, folder)
            ways = [Way(name, kind, options) for name in WAYS]
            for step in range(options.steps):
                for way in ways:
                    way.step(more=step + 1 < options.steps)
                for name, close in (("loss", 1e-4), ("logps", 1e-2)):
                    found = [way.rows[-1][name] for way in ways]
                    assert max(found) - min(found) < close, (kind, step, name, found)
            for way in ways:
                way.process.stdin.close()
                way.process.wait()
        print(f"\n{title}: {PAIRS} pairs a step, {options.steps} steps, {options.threads} thread(s)\n")
        print("| | s a step | s, of ours | CPU s, of ours | peak MB | peak, of ours |\n" + "| --- " * 6 + "|")
        mine = ways[0].rows[1:]                                                    # the first one warms up
        for way in ways:
            own = way.rows[1:]
            ratios = [statistics.median(a[k] / b[k] for a, b in zip(own, mine))
                      for k in ("wall", "cpu")]
            seconds, peak = statistics.median(row["wall"] for row in own), own[-1]["peak"]
            print(f"| {way.name} | {seconds:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {peak:,.0f} | "
                  f"{peak / mine[-1]['peak']:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory of a causal language model")
    parser.add_argument("--data", required=True, help="pairs, as --data of dpo.py")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--token_budget", type=int, default=2048, help="ours: tokens of a forward pass")
    parser.add_argument("--trl_python", default=sys.executable)
    for name in ("in_order", "test", "way"):                                        # for the processes
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.way:
        main(given)
    else:
        kind, whose, *checkpointing = given.way.split()
        (ours if whose == "ours" else trl)(kind, given, bool(checkpointing))
