"""Memory and time of PPO against ReMax, each in a process of its own.

    python benchmarks/online.py                              # the embedded task, on this machine, two minutes
    python benchmarks/online.py --model DIR --data FILE ...  # flags go to both scripts

Trained: weights, gradients and optimizer state of what is trained, in MB (1e6). Peak: the process's largest
resident set, or on CUDA the largest allocation. A step is one batch of prompts; its time leaves evaluation
out. PPO makes 4 epochs of each rollout, as Ziegler et al. do, or 1, as InstructGPT does; ReMax samples twice
and trains once.
"""
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {"PPO, 4 epochs": ("ppo", ["--ppo_epochs", "4"]), "PPO, 1 epoch": ("ppo", ["--ppo_epochs", "1"]),
        "ReMax": ("remax", [])}


def measure(method, out, flags):
    """One run in this process; prints what it took as one line of JSON."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import HfArgumentParser

    import harness
    module = importlib.import_module(method)
    parser = HfArgumentParser(module.Config)
    few = ["--epochs", "1", "--eval_prompts", "8", "--save_every", "0", "--quiet", "--out", out]
    config = module.Config(**vars(parser.parse_args(few + flags)))
    result = harness.launch(module.train, config)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else kilobytes * 1024 / 1e6
    print(json.dumps({"trained": result["state_mb"], "peak": peak, "seconds": result["seconds_per_step"],
                      "generating": result["seconds_generating"] / result["seconds_training"],
                      "speed": result["tokens_generated"] / result["seconds_generating"]}))


def main(flags):
    rows = {}
    for name, (method, settings) in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--measure", method, folder + "/run", *settings, *flags]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
        if process.returncode:
            sys.exit(process.returncode)
        rows[name] = json.loads(process.stdout.splitlines()[-1])
    least = rows["ReMax"]
    print("| method | MB trained | over ReMax | MB peak | over ReMax | s a step | over ReMax | generating "
          "| tokens/s generated |")
    print("| --- " * 9 + "|")
    for name, row in rows.items():
        cells = [f"{row[key]:,.{digits}f} | {row[key] / least[key]:.2f}"
                 for key, digits in (("trained", 1), ("peak", 0), ("seconds", 2))]
        print(f"| {name} | {' | '.join(cells)} | {row['generating']:.0%} | {row['speed']:,.0f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(sys.argv[1:])
