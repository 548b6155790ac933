"""Tokens per second, MFU and memory of DPO steps and of sampling: SmolLM2's form and a Llama of 1B weights.

    python benchmarks/gpu.py --peak_tflops 989         # bfloat16 peak of an H100 or H200, dense; five minutes
    python benchmarks/gpu.py --models toy              # to try it, also on a CPU

The weights are random: speed does not depend on them. A step: --pairs prompts, 2 answers to each, both half
of --length tokens; forward, backward, AdamW. MFU: 6 * weights * tokens of the plain rows / seconds / peak.
Sampling: 64 answers of at most 128 tokens, to prompts of 128 tokens.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import common
import dpo
from harness.prompts_once import share_prompts

FORMS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "toy": (64, 128, 2, 4, 2, 512),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152),
    "Llama, 1B": (2048, 8192, 16, 32, 8, 128_256)}


class Words:
    """As much of a tokenizer as generate() asks for: a prompt is a text of numbers."""
    bos_token_id, eos_token_id, pad_token_id, model_max_length = None, 0, 0, 4096

    def __call__(self, texts, add_special_tokens=False):
        texts = [texts] if isinstance(texts, str) else texts
        self.input_ids = [[int(word) for word in text.split() if word.isdigit()] for text in texts]
        return self


def synchronised(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


def model_of(form, device):
    hidden, intermediate, layers, heads, key_heads, vocabulary = FORMS[form]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=True,
        max_position_embeddings=4096)).to(device).eval()
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return share_prompts(model)


def training(model, given, device):
    """(seconds of a step, tokens of its rows without padding)."""
    vocabulary, half = model.config.vocab_size, given.length // 2
    rows = [(prompt, torch.randint(1, vocabulary, (half,)).tolist())
            for prompt in torch.randint(1, vocabulary, (given.pairs, half)).tolist() for _ in range(2)]
    batch = common.pack(rows, 0)
    optimizer, schedule = common.adamw(model, 1e-6, 100)
    ref = common.in_parts(lambda part: common.sequence_logps(model, part), batch, given.token_budget, device)
    for step in range(given.steps + 1):
        began = synchronised(device) if step == 1 else 0 if not step else began       # the first one warms up
        for part in torch.arange(len(batch)).split(max(2, given.token_budget // given.length // 2 * 2)):
            logps = common.sequence_logps(model, batch[part].to(device)).view(-1, 2)
            losses, _, _ = dpo.dpo_loss(*logps.T, *ref[part].view(-1, 2).T, beta=0.1)
            (losses.sum() / given.pairs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return (synchronised(device) - began) / given.steps, int(batch.attention_mask.sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="SmolLM2-135M;Llama, 1B", help="'A;B' of " + "; ".join(FORMS))
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--token_budget", type=int, default=16384)
    parser.add_argument("--peak_tflops", type=float, default=0.0, help="of the device in bfloat16; 0: no MFU")
    given = parser.parse_args()
    device = common.pick_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}; {given.pairs} pairs of {given.length} tokens a step\n")
    print("| model | weights, M | s a step | tokens/s | MFU | peak GB | sampled tokens/s |")
    print("| --- " * 7 + "|")
    for form in given.models.split(";"):
        model = model_of(form, device)
        weights = sum(weight.numel() for weight in model.parameters())
        seconds, tokens = training(model, given, device)
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "-"
        use = f"{6 * weights * tokens / seconds / given.peak_tflops / 1e12:.2f}" if given.peak_tflops else "-"
        prompts = [" ".join(map(str, ids)) for ids in torch.randint(1, 500, (64, 128)).tolist()]
        began = synchronised(device)
        sampled = common.generate(model, Words(), prompts, max_new_tokens=128)
        speed = int(sampled.lengths.sum()) / (synchronised(device) - began)
        print(f"| {form} | {weights / 1e6:.0f} | {seconds:.2f} | {tokens / seconds:,.0f} | {use} | {peak} | "
              f"{speed:,.0f} |", flush=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
