"""Memory and time of LoRA against training all weights, DPO and PPO, each in a process of its own.

    python benchmarks/lora.py --model DIR --data FILE

These and more flags go to all runs, after FLAGS. Trained: weights, gradients and optimizer state of what is
trained, in MB (1e6). Peak: the process's largest resident set, or on CUDA the largest allocation. Saved: the
weights in the run's directory. A step's time leaves evaluation out. PPO's reward is `brief`, below.
"""
import importlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANK = 16
FLAGS = ["--limit", "16", "--max_length", "256", "--max_new_tokens", "32", "--batch_size", "4",
         "--token_budget", "512"]
RUNS = {"DPO": ("dpo", ["--reward", "none"]), "PPO": ("ppo", ["--reward", "lora:brief"])}


def brief(prompts, responses):
    """A reward: the fewer words the better."""
    return [-len(text.split()) for text in responses]


def measure(method, out, flags):
    """One run in this process; prints what it took as one line of JSON."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import HfArgumentParser

    import harness
    module = importlib.import_module(method)
    few = ["--eval_prompts", "2", "--eval_samples", "1", "--save_every", "0", "--quiet", "--out", out]
    config = module.Config(**vars(HfArgumentParser(module.Config).parse_args(few + flags)))
    result = harness.launch(module.train, config)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else kilobytes * 1024 / 1e6
    saved = sum(file.stat().st_size for file in Path(out).glob("*.safetensors")) / 1e6
    print(json.dumps({"trained": result["state_mb"], "peak": peak, "saved": saved,
                      "seconds": result["seconds_per_step"]}))


def main(flags):
    if not {"--model", "--data"} <= {*flags}:
        sys.exit("give --model and --data")
    print("| method | weights | MB trained | MB peak | MB saved | s a step |")
    print("| --- " * 6 + "|")
    for name, (method, own) in RUNS.items():
        for kind, more in (("all", []), (f"LoRA, rank {RANK}", ["--lora_rank", str(RANK)])):
            with tempfile.TemporaryDirectory() as folder:
                own_flags = [*own, *more, *FLAGS, *flags]
                command = [sys.executable, __file__, "--measure", method, folder + "/run", *own_flags]
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
            if process.returncode:
                sys.exit(process.returncode)
            row = json.loads(process.stdout.splitlines()[-1])
            print(f"| {name} | {kind} | {row['trained']:,.0f} | {row['peak']:,.0f} | {row['saved']:,.0f} | "
                  f"{row['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        main(sys.argv[1:])
