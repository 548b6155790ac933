"""A prompt read once for its K answers: time and memory of a forward and backward pass, against plain rows.

    python benchmarks/prompts.py            # a random model of SmolLM2-135M's form; CPU, a quarter of an hour

Two prompts, K answers to each, of 48 to 80 tokens. Times: both ways in turn, in one process of one thread,
REPEATS times; the median of the ratios. Memory: peak beyond weights and gradients, each way in a process of
its own. The log-probs of both ways are compared.
"""
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPTS, ANSWERS, REPEATS = (32, 256), (2, 4, 8), 3
ROOT = Path(__file__).resolve().parents[1]


def prepare(length, k):
    """(one(way) -> log-probs, after a forward and backward pass; megabytes at the peak so far)."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import common
    from harness import prompts_once
    prompts_once.SHORTEST, prompts_once.FEWER = 1, 10.0                          # also where it does not pay
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)).eval()
    model.compute_dtype = torch.float32
    share = prompts_once.share_prompts(model).share
    batch = common.pack([(prompt, torch.randint(0, 49_152, (int(n),)).tolist())
                         for prompt in torch.randint(0, 49_152, (2, length)).tolist()
                         for n in torch.linspace(48, 80, k)], 0)

    def one(way, rows=batch):
        model.share = share if way == "once" else lambda rows: None
        logps = common.sequence_logps(model, rows)
        logps.sum().backward()
        return logps.detach()

    one("plain", batch[:1])                                            # gradients exist, libraries are loaded
    return one, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(length, k, way):
    """One line of JSON: of "plain" or "once" the memory; of "both" times, ratios, difference of log-probs."""
    one, before = prepare(length, k)
    if way != "both":
        one(way)
        return print(json.dumps({"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}))
    turns = []
    for _ in range(REPEATS):
        turn = {}
        for name in ("plain", "once"):
            wall, cpu = time.time(), time.process_time()
            turn[name] = one(name), time.time() - wall, time.process_time() - cpu
        turns.append(turn)
    ratios = [[turn["once"][i] / turn["plain"][i] for turn in turns] for i in (1, 2)]
    off = max(float((turn["once"][0] - turn["plain"][0]).abs().max()) for turn in turns)
    print(json.dumps({"seconds": statistics.median(turn["plain"][1] for turn in turns), "off": off,
                      "wall": statistics.median(ratios[0]), "cpu": statistics.median(ratios[1])}))


def main():
    print("| prompt | K | s, plain | s, of plain | CPU s, of plain | MB, plain | MB, of plain |")
    print("| --- " * 7 + "|")
    for length in PROMPTS:
        for k in ANSWERS:
            row = {}
            for way in ("both", "plain", "once"):
                process = subprocess.run([sys.executable, __file__, str(length), str(k), way],
                                         stdout=subprocess.PIPE, encoding="utf-8", check=True)
                row[way] = json.loads(process.stdout.splitlines()[-1])
            both, plain, once = row["both"], row["plain"]["mb"], row["once"]["mb"]
            assert both["off"] < 1e-2, row                                    # nats, of sums over 80 tokens
            print(f"| {length} | {k} | {both['seconds']:.1f} | {both['wall']:.2f} | {both['cpu']:.2f} | "
                  f"{plain:,.0f} | {once / plain:.2f} |", flush=True)


if __name__ == "__main__":
    measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]) if len(sys.argv) > 1 else main()
