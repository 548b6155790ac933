"""Peak memory and time of log-probs, forward and backward: `token_logps` against the plain computation.

    python benchmarks/logps.py            # V = 49,152 (SmolLM2), 4,096 tokens; CPU, a process a row, 1 minute

Extra memory is the peak resident size less what the process held with model and batch loaded. Both ways give
the same gradients. Compare rows of one run only: timings differ between machines.
"""
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY, ROWS, LENGTH, WIDTH = 49_152, 8, 512, 128
ROOT = Path(__file__).resolve().parents[1]


def measure(way):
    """Run one way in this process; prints extra megabytes, seconds, and sums of values and gradients."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import common
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True)).eval()
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[:, 0] = 0                             # a prompt of one token: nearly all is response, the worst case
    batch = common.Batch(ids, torch.ones_like(ids), mask)
    common.token_logps(model, batch[:1]).sum().backward()              # gradients exist, libraries are loaded
    model.zero_grad(set_to_none=False)

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.time()
    if way == "plain":
        logits = model(ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logps = common.gather_logps(logits, ids) * mask[:, 1:]
    else:
        logps = common.token_logps(model, batch, chunk=int(way))
    logps.sum().backward()
    seconds, peak = time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"way": way, "extra_mb": (peak - before) / 1024, "seconds": seconds,
                      "logp": logps.sum().item(),
                      "gradient": sum(p.grad.norm().item() for p in model.parameters())}))


def main():
    rows = []
    for way in ("plain", "1024", "256", "64"):
        process = subprocess.run([sys.executable, __file__, way], stdout=subprocess.PIPE, encoding="utf-8",
                                 check=True)
        rows.append(json.loads(process.stdout.splitlines()[-1]))
    plain = rows[0]
    print(f"V = {VOCABULARY:,}, B*T = {ROWS * LENGTH:,}, forward and backward\n")
    print("| log-probs | extra peak memory | of plain | time, of plain |\n| --- | --- | --- | --- |")
    for row in rows:
        name = "plain `[B, T, V]`" if row is plain else f"`token_logps`, chunks of {row['way']}"
        print(f"| {name} | {row['extra_mb']:,.0f} MB | {row['extra_mb'] / plain['extra_mb']:.2f} "
              f"| {row['seconds'] / plain['seconds']:.2f} |")
        for key in ("logp", "gradient"):
            assert abs(row[key] - plain[key]) < 1e-4 * abs(plain[key]), (key, row, plain)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
