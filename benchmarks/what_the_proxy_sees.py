"""What annotators' labels show of gold's parts, and what a reward model of this size learns from them.

    python benchmarks/what_the_proxy_sees.py --seed 100          # about two minutes

A column for each part of gold: sentiment, topic (the aspect asked for is mentioned), grammar (the text
parses), repeats. The first row is a logistic regression of the labels on the exact parts: what the labels
know. The others are linear regressions of scores on the parts: what gold, the proxy, and reward models that
are trained in other ways weigh, in standard deviations of the score. A quarter of these samples are damaged,
so that grammar varies.
"""
import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

import common
import harness
from harness.stages import Recipe, train_reward_model
from tasks import Pair, build, reviews

PARTS = "sentiment", "topic", "grammar", "repeats"
MADE = 8000                                           # pairs that need no people


def parts(prompt, text):
    clauses, asked = reviews.parse(text), reviews.parse_prompt(prompt).aspect
    aspects = [clause.aspect for clause in clauses or [] if clause.aspect]
    return [reviews._sentiment(clauses) if clauses else 0.0, float(asked in aspects),
            float(clauses is not None), float(len(aspects) - len(set(aspects)))]


def print_row(name, weights, errors=None):
    cells = [f"{w:.2f}" + (f" ±{e:.2f}" if errors is not None else "") for w, e in
             zip(weights.tolist(), (errors if errors is not None else weights).tolist())]
    print(f"{name:52}" + "".join(f"{cell:>13}" for cell in cells))


def label_weights(pairs):
    """Weights of the parts in a logistic regression of the labels, and their standard errors."""
    rows = [[a - b for a, b in zip(parts(p.prompt, p.chosen), parts(p.prompt, p.rejected))] for p in pairs]
    differences, weights = torch.tensor(rows).double(), torch.zeros(len(PARTS), dtype=torch.float64)

    def loss(w):
        return F.softplus(-(differences @ w)).sum()

    for _ in range(20):                                # Newton's method
        hessian = torch.autograd.functional.hessian(loss, weights)
        weights = weights - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(loss, weights))
    return weights, torch.linalg.inv(hessian).diagonal().sqrt()


def score_weights(scores, rows):
    """Weights of the parts in a linear regression of the scores, in their standard deviations."""
    table = torch.tensor([parts(*row) for row in rows]).double()
    table = torch.cat([table, torch.ones(len(table), 1)], 1)
    scores = (scores.double() - scores.mean()) / scores.std()
    return torch.linalg.lstsq(table, scores[:, None]).solution[:-1, 0]


def made_pairs(seed):
    """A demonstration against the same one damaged, or against one that was written for another prompt."""
    rng, prompts, pairs = random.Random(seed), reviews.make_prompts("train", 3000, seed), []
    while len(pairs) < MADE:
        prompt = rng.choice(prompts)
        good = reviews.write("crowd", prompt, rng)
        bad = (reviews._slip(good, rng) if rng.random() < 0.5 else
               reviews.write("crowd", rng.choice(prompts), rng))
        if good != bad:
            pairs.append(Pair(prompt, good, bad))
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=100)
    seed = parser.parse_args().seed
    path = build.models(harness.Config(seed=seed))
    rows = build.read(path / "samples.json")
    tokenizer = common.load_tokenizer(path / "sft", build.LIMITS["max_length"])
    labelled = build.annotated(rows["shown"], "proxy", seed)
    prompts, texts = build.texts(rows["test"])
    rng = random.Random(seed)
    texts = [reviews._slip(text, rng) if i % 4 == 0 else text for i, text in enumerate(texts)]
    samples = [*zip(prompts, texts)]

    print(f"{'':52}" + "".join(f"{part:>13}" for part in PARTS))
    print_row(f"labels of {len(labelled)} pairs, logit", *label_weights(labelled))
    gold = torch.tensor([reviews.gold(*sample) for sample in samples])
    proxy = common.load_reward_model(path / "proxy", build.LIMITS["max_length"])
    print_row("gold, standard deviations", score_weights(gold, samples))
    print_row("proxy", score_weights(proxy(prompts, texts), samples))
    for name, stages in ((f"reward model of {MADE} made pairs", [made_pairs(seed)]),
                         ("  the same, then the labels", [made_pairs(seed), labelled]),
                         ("  both at once", [made_pairs(seed) + labelled * 2])):
        torch.manual_seed(seed)
        model = common.load(AutoModelForSequenceClassification, path / "sft", num_labels=1)
        for pairs in stages:
            epochs = 1 if len(pairs) == MADE else 2
            recipe = Recipe(lr=3e-3, batch_size=32, epochs=epochs, token_budget=2048, seed=seed)
            train_reward_model(model, tokenizer, pairs, recipe)
        print_row(name, score_weights(common.RewardModel(model, tokenizer)(prompts, texts), samples))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
