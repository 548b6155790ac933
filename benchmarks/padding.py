"""How much of what a step computes is padding: pairs as they come, and the parts that a script makes of them.

    python benchmarks/padding.py --model DIR --data FILE     # reads the tokenizer alone; seconds

"As they come": as many pairs at a time as fit the budget, counted by the longest row of the step. Prompts are
padded on the left to the longest one, responses on the right. "By length": common.batches sorts the step's
pairs, and each part is padded on the right to its own longest row.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common                                      # noqa: E402
import harness                                     # noqa: E402
from tasks import preferences                      # noqa: E402

SIZES, BUDGETS = (4, 16, 64), (1024, 2048, 4096, 16384)     # pairs; padded tokens of a forward pass


def plain(tokenizer, prompts, responses, budget):
    """(tokens, padded tokens) of a step whose pairs are read in the order they come."""
    texts = [y for both in responses for y in both]
    whole = common.encode(tokenizer, [x for x in prompts for _ in range(2)], texts)
    lengths = whole.attention_mask.sum(1).view(-1, 2)
    n, padded = max(1, budget // (2 * int(lengths.max()))), 0
    for i in range(0, len(prompts), n):
        part = whole[2 * i:2 * (i + n)]
        before = (part.attention_mask - part.response_mask).sum(1).max()
        padded += len(part) * int(before + part.lengths.max())
    return int(lengths.sum()), padded


def by_length(tokenizer, prompts, responses, budget):
    """The same of the parts that a script reads."""
    parts = [batch.compact() for _, batch in common.batches(tokenizer, prompts, responses, budget)]
    tokens, padded = (part.attention_mask.sum() for part in parts), (part.input_ids.numel() for part in parts)
    return int(sum(tokens)), sum(padded)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--max_length", type=int, default=512)
    options = parser.parse_args()
    tokenizer = common.load_tokenizer(options.model, options.max_length)
    task = preferences.load(options.data, tokenizer, limit=0, chat=False, skip_bad_rows=True, columns="")
    pairs = task.pairs["train"]
    print(f"{len(pairs)} pairs, at most {options.max_length} tokens a row\n")
    print("| pairs a step | budget | padding, as they come | padding, by length | "
          "tokens computed, as a share |")
    print("| --- | --- | --- | --- | --- |")
    for size in SIZES:
        for budget in BUDGETS:
            totals = [0, 0, 0, 0]
            for indices in harness.shuffled_batches(len(pairs), 1.0, size, 0):
                step = tokenizer, [pairs[i].prompt for i in indices], [pairs[i].responses for i in indices]
                found = *plain(*step, budget), *by_length(*step, budget)
                totals = [total + n for total, n in zip(totals, found)]
            tokens, before, same, after = totals
            assert tokens == same
            print(f"| {size} | {budget:,} | {1 - tokens / before:.0%} | {1 - tokens / after:.0%} | "
                  f"{after / before:.2f} |")


if __name__ == "__main__":
    main()
