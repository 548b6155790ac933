"""What reversed labels do to the proxy, and to DPO, which learns from people's pairs without a reward model.

    python benchmarks/noisy_labels.py --seeds 0,1,2      # about a minute a seed, once its models are built

What two scores of SFT samples weigh, as in what_the_proxy_sees.py: the proxy, and DPO's implicit reward
beta * (log pi - log pi_ref) with the comparison's settings. People's labels are as they are, or a quarter of
them is reversed.
"""
import argparse
import functools
import sys
import tempfile
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import common
import dpo
import harness
from benchmarks.what_the_proxy_sees import PARTS, score_weights
from referee.comparison import tuned
from tasks import build

PROMPTS = 256


def scores_of(seed, noise):
    """{name: scores [N]} of the samples, and [(prompt, text)] of them."""
    settings, _ = tuned()[2]["DPO"]
    config = dpo.Config(seed=seed, label_noise=noise, quiet=True, eval_prompts=2, eval_samples=1, **settings)
    path, proxy = build.models(config), build.proxy(config)
    prompts, texts = build.texts(build.read(path / "samples.json")["test"][:PROMPTS])
    reference, tokenizer = common.load_policy(path / "sft"), harness.load_tokenizer(config)
    with tempfile.TemporaryDirectory() as folder:
        config.out = str(Path(folder) / "run")
        harness.launch(dpo.train, config)
        policy = common.load_policy(config.out)
    batch = common.encode(tokenizer, prompts, texts)
    ours, theirs = (
        common.in_parts(functools.partial(common.sequence_logps, model), batch, 2048, model.device)
        for model in (policy, reference))
    reward = common.load_reward_model(proxy, build.LIMITS["max_length"])
    scores = {"proxy": reward(prompts, texts), "DPO": config.beta * (ours - theirs).cpu()}
    return scores, [*zip(prompts, texts)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0,1,2")
    found = {}
    for seed in map(int, parser.parse_args().seeds.split(",")):
        for noise, label in ((0.0, "as they are"), (0.25, "a quarter reversed")):
            scores, samples = scores_of(seed, noise)
            for name, own in scores.items():
                row = score_weights(own, samples).tolist()
                found.setdefault(f"{name}, {label}", []).append(row)
                print(f"seed {seed}: {name}, {label}:", *(f"{value:.3f}" for value in row), flush=True)
    print(f"\n{'':28}" + "".join(f"{word:>13}" for word in PARTS))
    for name, rows in found.items():
        print(f"{name:28}" + "".join(f"{fmean(values):13.3f}" for values in zip(*rows)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
