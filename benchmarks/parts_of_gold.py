"""Which parts of gold a method raises: sentiment, topic, grammar, repeats.

    python benchmarks/parts_of_gold.py --seeds 0,1,2     # three minutes a seed, once its models are built

Arms of the comparison, with its settings, on 256 test prompts with 8 samples each. A column is what that
part adds to gold on average (tasks/reviews.py: gold). A text that the grammar does not parse gets -1 in
"grammar" and nothing else. The columns add up to gold, but for what the genres of prompt and text add, and
for texts that were cut off.
"""
import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import harness
from benchmarks.what_the_proxy_sees import parts
from experiments.comparison import ARMS, RECIPES, UNTRAINED
from harness import directory
from referee.comparison import tuned

SHOWN = (*UNTRAINED, "DPO", "curriculum", "RWR", "RRHF", "RAFT", "PPO, one pass", "SteerLM, its recipe")
COLUMNS = "sentiment", "topic", "grammar", "repeats", "gold"


def added(prompt, text, gold):
    """What each part adds to the gold of a response, and gold."""
    sentiment, topic, grammar, repeats = parts(prompt, text)
    return sentiment, 0.5 * topic, grammar - 1, -0.3 * min(repeats, 2), gold


def samples_of(name, settings, seed, folder):
    """The samples of an arm after training: {"prompts", "responses", "gold"}."""
    method = importlib.import_module(settings["method"])
    options = {k: v for k, v in settings.items() if k != "method"}
    config = method.Config(seed=seed, quiet=True, out=str(folder / name), eval_prompts=256,
                           **{"eval_samples": 8} | options)
    run = harness.start(config)
    method.train(run)
    directory.give_back(run.out, run.lock)
    return run.samples.get("after", run.samples["before"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    seeds = [int(seed) for seed in parser.parse_args().seeds.split(",")]
    chosen = {name: settings for name, (settings, _) in tuned()[2].items() if name in ARMS}
    arms = UNTRAINED | RECIPES | {name: ARMS[name]["arm"] | chosen[name] for name in chosen}
    print(f"{'arm':24}" + "".join(f"{part:>11}" for part in COLUMNS), flush=True)
    for name in SHOWN:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in seeds:
                found = samples_of(f"{name} {seed}", arms[name], seed, Path(folder))
                rows += map(added, found["prompts"], found["responses"], found["gold"])
        print(f"{name:24}" + "".join(f"{fmean(values):11.3f}" for values in zip(*rows)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
