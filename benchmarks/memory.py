"""What a training step holds at its peak: predicted from the model's form, and measured; larger models too.

    python benchmarks/memory.py            # CPU, float32: five processes, three minutes

Held between steps: weights, gradients and AdamW's two moments of what is trained, 16 bytes a weight in
float32; 4 bytes for each weight of a frozen model. On top of it, in the backward pass: activations, of the
tokens of one part of a step (--token_budget), and the logits of one chunk. Measured: the process's largest
resident set in three steps, less that before the model was made. The second table is for one GPU of a
data-parallel run, in which every process has the models whole: more GPUs do not make it smaller.
"""
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "30M": (384, 1024, 8, 6, 2, 49_152), "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152),
    "1B": (2048, 8192, 16, 32, 8, 128_256), "7B": (4096, 11_008, 32, 32, 32, 32_000),
    "70B": (8192, 28_672, 80, 64, 8, 128_256)}
MEASURED = [("30M", 1024, False), ("30M", 4096, False), ("SmolLM2-135M", 1024, False),
            ("SmolLM2-135M", 2048, False), ("SmolLM2-135M", 2048, True)]         # form, tokens, checkpointing
CHUNK, FLOAT = 256, 4
# Trained and frozen models of each method, all of the policy's size: reference, reward model, value model.
MODELS = {"dpo, raft, rrhf, pro, rso, decision_transformer, steerlm": (1, 0), "remax": (1, 2), "ppo": (2, 2)}


def weights_of(form):
    """Weights of a Llama with tied embeddings."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = FORMS[form]
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads * key_heads)
    return vocabulary * hidden + layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden


def activations_of(form, tokens, checkpointing):
    """Bytes that the backward pass needs of so many tokens, in float32, and the logits of one chunk."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = FORMS[form]
    # Two norms: input, normalised, scaled. Attention: q, output twice, k and v. MLP: gate, up, silu, product.
    layer = 6 * hidden + 3 * hidden + 2 * (hidden // heads * key_heads) + 4 * intermediate
    held = layers * hidden + layer if checkpointing else layers * layer
    return FLOAT * (tokens * (held + 3 * hidden) + 3 * CHUNK * vocabulary)


def predicted(form, tokens, checkpointing):
    """Megabytes at the peak of a step, beyond Python and its libraries."""
    return (16 * weights_of(form) + activations_of(form, tokens, checkpointing)) / 1e6


def measure(form, tokens, checkpointing):
    """Three steps on one part of so many tokens; prints megabytes at the peak."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import common
    hidden, intermediate, layers, heads, key_heads, vocabulary = FORMS[form]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=True)).eval()
    model.compute_dtype = torch.float32
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids = torch.randint(0, vocabulary, (tokens // 256, 256)).tolist()
    batch = common.pack([(row[:64], row[64:]) for row in ids], 0)
    optimizer, schedule = common.adamw(model, 1e-6, 3)
    for _ in range(3):
        common.sequence_logps(model, batch).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=False)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"mb": (after - before) * 1024 / 1e6}))


def main():
    print("| model | tokens at once | checkpointing | weights | gradients | moments | activations, logits | "
          "predicted | measured | ratio |\n" + "| --- " * 10 + "|")
    for form, tokens, checkpointing in MEASURED:
        command = [sys.executable, __file__, form, str(tokens), str(int(checkpointing))]
        process = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
        found, weights = json.loads(process.stdout.splitlines()[-1])["mb"], FLOAT * weights_of(form) / 1e6
        parts = weights, weights, 2 * weights, activations_of(form, tokens, checkpointing) / 1e6
        expected = predicted(form, tokens, checkpointing)
        print(f"| {form} | {tokens} | {'yes' if checkpointing else 'no'} | "
              + " | ".join(f"{part:,.0f}" for part in (*parts, expected, found))
              + f" | {found / expected:.2f} |", flush=True)
    print("\nGB of each process, float32, without activations\n\n| method | 1B | 7B | 70B |\n"
          + "| --- " * 4 + "|")
    for methods, (trained, frozen) in MODELS.items():
        cells = [f"{(16 * trained + 4 * frozen) * weights_of(form) / 1e9:,.0f}"
                 for form in ("1B", "7B", "70B")]
        print(f"| {methods} | {' | '.join(cells)} |")


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1") if len(sys.argv) > 1 else main()
