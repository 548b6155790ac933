"""`--dtype bfloat16` on a CPU that has the instructions (avx512_bf16, amx): a DPO run against float32.

    python benchmarks/bfloat16.py --model DIR --data FILE       # more flags go to both runs

Both runs begin with the same weights and pairs, one after the other, REPEATS times in turn, each in a process
of its own, one thread. The losses of every step are compared, and the held-out losses before and after.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPEATS, KINDS = 2, ("float32", "bfloat16")
FLAGS = ("--limit 24 --batch_size 4 --epochs 1 --reward none --skip_bad_rows True --device cpu --quiet True "
         "--eval_prompts 1 --eval_samples 1 --max_new_tokens 8").split()


def measure(kind, flags):
    """One run in this process; prints its rows of metrics.jsonl and CPU seconds a step."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import HfArgumentParser

    import dpo
    import harness
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS, *flags, "--dtype", kind, "--out", folder + "/run"]
        result = harness.launch(dpo.train, dpo.Config(**vars(HfArgumentParser(dpo.Config).parse_args(flags))))
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row[name] for row in rows for name in ("loss", "eval/loss") if name in row]
    print(json.dumps({"seconds": result["cpu_seconds"] / rows[-1]["step"], "losses": losses}))


def main(flags):
    if not {"--model", "--data"} <= {*flags}:
        sys.exit("give --model and --data")
    found = {kind: [] for kind in KINDS}
    for _ in range(REPEATS):
        for kind in KINDS:
            done = subprocess.run([sys.executable, __file__, "--measure", kind, *flags], encoding="utf-8",
                                  stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(done.returncode)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    plain, half = (statistics.fmean(run["seconds"] for run in found[kind]) for kind in KINDS)
    gap = max(abs(a - b) for a, b in zip(*(found[kind][0]["losses"] for kind in KINDS), strict=True))
    print(f"CPU s a step: float32 {plain:.2f}, bfloat16 {half:.2f} ({half / plain:.2f} of it)")
    print(f"largest difference of a loss: {gap:.1e}, of {len(found['float32'][0]['losses'])} losses")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
