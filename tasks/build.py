"""The embedded task's models, one set per seed: base model, SFT policy, annotated pairs, proxy.

    demonstrations by the crowd writer -> SFT policy (from an untrained base) -> its samples -> annotators'
    labels -> proxy

Everything lies in cache/reviews/<hash>/seed<k>, where the hash covers the code that made it. Each part is
written under a temporary name and then renamed, so a build that is killed goes on with the next part that is
missing.
"""
import argparse
import copy
import functools
import hashlib
import inspect
import json
import random
import time
from dataclasses import replace

import tokenizers
import torch
from transformers import (AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

import common
import tasks
from common import UserError
from harness.stages import Recipe, fit, reward_model_losses, shuffled_batches, train_reward_model, train_sft
from tasks import (Demonstration, Late, Pair, Ranking, Task, in_one_line, lock, lock_or_say, reviews,
                   write_json)

DEMONSTRATIONS = 46000        # reviews by the crowd writer, seen once each
POOL = 512, 16               # train prompts, SFT samples of each: what RRHF, RSO, RAFT, best-of-n choose from
PAIRS = 6                     # annotated pairs per pool prompt, of samples outside the pool
TEST = 512, 4                 # test prompts, SFT samples of each for annotated pairs and ratings
BEST_OF = 128, 64             # test prompts, SFT samples of each for best-of-n curves
RANKED = 2048                 # train prompts answered by every writer
RATED = 8                     # samples of each prompt that people rate, at most
LAST = {}                     # the task that was loaded last
LIMITS = {"max_length": 160, "max_new_tokens": 40}      # tokens, whatever the user's options are
TOKEN_BUDGET = 2048           # small: rows of similar length share a batch, which saves a third of padding


def tiny_tokenizer(max_length):
    """One token per word, its leading space included, so that decoding is joining."""
    words = ["<pad>", "<eos>", "<unk>", *reviews.VOCABULARY]
    ids = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(reviews.TOKEN_PATTERN), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>",
                                   unk_token="<unk>", model_max_length=max_length)


def tiny_model(tokenizer, layers=1):
    """A Llama of 0.2 million parameters: one layer, of a width that a laptop trains in a minute.

    With three layers, half as wide again, it has 1.1 million.
    """
    width = 128 if layers == 1 else 192
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def home(config):
    size = f"-{config.layers}layers" if config.layers != 1 else ""
    return tasks.CACHE / "reviews" / code_hash() / f"seed{config.seed}{size}"


@functools.cache
def code_hash():
    """A hash of the code that makes the models. When the code changes, they are built in a new directory."""
    makers = (reviews, tiny_tokenizer, tiny_model, models, rate, sample, ranked, annotated, fit,
              shuffled_batches, train_sft, reward_model_losses, train_reward_model, common.adamw,
              common.encode, common.prompt_ids, common.pack, common.batches, common.token_logps,
              common.sequence_logps, common.response_states, common.read, common.pick_logps,
              common.sequence_scores, common.generate, common.head_is_all, common.Batch)
    code = "".join(map(inspect.getsource, makers)) + repr((common.FEW_LOGITS, common.ROOM))
    code += repr((DEMONSTRATIONS, POOL, PAIRS, TEST, BEST_OF, RANKED, LIMITS, TOKEN_BUDGET))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def models(config):
    """Build what is missing of this seed's models (up to two minutes); returns their directory."""
    torch.set_num_threads(1)             # sums in another order would be other models, and other runs of them
    path = home(config)
    if (path / "vitals.json").exists():
        return path
    with lock_or_say(path, "waiting for another process that builds the embedded task's models"):
        if (path / "vitals.json").exists():                              # another process has built them
            return path
        print(f"building the embedded task's models for seed {config.seed} (once, up to two minutes)",
              flush=True)
        began, rng = time.time(), random.Random(config.seed)
        torch.manual_seed(config.seed)
        prompts = reviews.make_prompts("train", 3000, config.seed)

        if not (path / "sft").exists():
            tokenizer = tiny_tokenizer(LIMITS["max_length"])
            written = [Demonstration(prompt, reviews.write("crowd", prompt, rng))
                       for prompt in rng.choices(prompts, k=DEMONSTRATIONS)]
            write_json(path / "demonstrations.json", [row[:2] for row in written])
            model = tiny_model(tokenizer, config.layers).to(common.pick_device(config.device))
            tasks.save_model(model, tokenizer, path / "base")
            recipe = Recipe(lr=8e-3, batch_size=64, warmup=0.05, token_budget=TOKEN_BUDGET, seed=config.seed)
            tasks.save_model(train_sft(model, tokenizer, written, recipe), tokenizer, path / "sft")
        print(f"  SFT policy {time.time() - began:.0f} s")

        if not (path / "samples.json").exists():
            torch.manual_seed(config.seed)
            policy, tokenizer = load_sft(path, config)
            test_prompts = reviews.make_prompts("test", TEST[0], config.seed)
            rows = {"pool": sample(policy, tokenizer, prompts[:POOL[0]], POOL[1]),
                    "shown": sample(policy, tokenizer, prompts[:POOL[0]], 2 * PAIRS),
                    "test": sample(policy, tokenizer, test_prompts, TEST[1])}
            write_json(path / "rankings.json", ranked(prompts[:RANKED], config.seed))
            write_json(path / "samples.json", rows)
        print(f"  samples {time.time() - began:.0f} s")
        rows = read(path / "samples.json")

        rate(path / "proxy", annotated(rows["shown"], "proxy", config.seed), rows["pool"], config)
        print(f"  proxy {time.time() - began:.0f} s")
        write_json(path / "vitals.json",
                   {**vitals(path, rows, config), "seconds": round(time.time() - began)})
    return path


def rate(path, pairs, pool, config):
    """Train a reward model that starts as the SFT policy beside `path`, and save it to `path`.

    Its scores of the pool have mean 0 and standard deviation 1.
    """
    if path.exists():
        return
    torch.manual_seed(config.seed)
    tokenizer = common.load_tokenizer(path.parent / "sft", LIMITS["max_length"])
    model = common.load(AutoModelForSequenceClassification, path.parent / "sft", config.device, "float32",
                        num_labels=1)
    recipe = Recipe(lr=3e-3, batch_size=32, epochs=4, token_budget=TOKEN_BUDGET, seed=config.seed)
    train_reward_model(model, tokenizer, pairs, recipe)
    scores = common.RewardModel(model, tokenizer)(*texts(pool))
    model.config.reward_scale = {"mean": scores.mean().item(), "std": scores.std().item()}
    tasks.save_model(model, tokenizer, path)


def ranked(prompts, seed):
    """Rankings [prompt, responses, scores, writers]: each prompt answered by every writer."""
    rng, rankings = random.Random(f"writers {seed}"), []
    writers = [name for name in reviews.WRITERS if name not in ("chatty", "dry")]
    for prompt in prompts:
        responses = [reviews.write(name, prompt, rng) for name in writers]
        responses += reviews.style_pair(prompt, rng)
        scores = [reviews.gold(prompt, response) for response in responses]
        rankings.append(Ranking(prompt, responses, scores, writers + ["chatty", "dry"])[:4])
    return rankings


def load_sft(path, config):
    """The SFT policy in this seed's directory, and its tokenizer. What is kept is made in float32 alone."""
    return (common.load_policy(path / "sft", config.device, "float32"),
            common.load_tokenizer(path / "sft", LIMITS["max_length"]))


def read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete {path.parent}, and it is built anew") from None


def samples(path, config):
    """The SFT samples: {"pool", "shown", "test"}; of train prompts the first --limit (0: all)."""
    rows = read(path / "samples.json")
    return rows | {name: rows[name][:config.limit or None] for name in ("pool", "shown")}


def sample(policy, tokenizer, prompts, n):
    """[{prompt, responses [n], ids [n], ended [n], gold [n]}] of SFT samples, n for each prompt."""
    batch = common.generate(policy, tokenizer, prompts, n, max_new_tokens=LIMITS["max_new_tokens"])
    responses, ended = common.decode(tokenizer, batch), common.finished(tokenizer, batch).tolist()
    rows = []
    for i, prompt in enumerate(prompts):
        own = slice(i * n, i * n + n)
        rows.append({"prompt": prompt, "responses": responses[own], "ended": ended[own],
                     "ids": [response.ids for response in responses[own]],
                     "gold": [reviews.gold(prompt, r, e) for r, e in zip(responses[own], ended[own])]})
    return rows


def texts(rows):
    """The prompts and the responses of scored rows, as two flat lists of equal length."""
    return ([row["prompt"] for row in rows for _ in row["responses"]],
            [response for row in rows for response in row["responses"]])


def annotated(rows, name, seed):
    """Pairs of samples, drawn at random and labelled by annotators, who see no sample that was cut off.

    Two equal texts make no pair.

    Every name and seed gives other pairs and other annotators.
    """
    rng, pairs = random.Random(f"{name} {seed}"), []
    for row in rows:
        samples = rng.sample([*zip(row["responses"], row["gold"], row["ended"])], len(row["responses"]))
        for (a, gold_a, a_ended), (b, gold_b, b_ended) in zip(samples[::2], samples[1::2]):
            if a != b and a_ended and b_ended:
                prefers_a = reviews.annotate(gold_a, gold_b, rng)
                pairs.append(Pair(row["prompt"], *((a, b) if prefers_a else (b, a))))
    return pairs


def load_task(config):
    """The reviews task of this seed: annotated pairs of SFT samples, and rankings of known writers.

    The scores of the rankings are gold. Their systems are the writers; the last two, chatty and dry, differ
    only in style. The last task is kept for the next run of this process.
    """
    options = "seed", "limit", "label_noise", "pair_labels", "rating_noise"
    path = models(config)
    key = path, *(getattr(config, name) for name in options)
    if key not in LAST:
        LAST.clear()
        LAST[key] = make_task(config, path)
    task = LAST[key]
    own = {name: copy.copy(value) for name, value in vars(task).items() if isinstance(value, (dict, Late))}
    return replace(task, **own)


def make_task(config, path):
    """What load_task returns, from the models in `path`."""
    rows, rankings = samples(path, config), [Ranking(*row) for row in read(path / "rankings.json")]
    rankings = rankings[:len(rows["pool"]) * RANKED // POOL[0]]

    def annotate(prompt, a, b, rng):
        prefers_a = reviews.annotate(reviews.gold(prompt, a), reviews.gold(prompt, b), rng)
        return prefers_a != (rng.random() < config.label_noise)

    @functools.cache                                                    # few runs use these: made if they do
    def off_policy():
        rng, pairs = random.Random(f"off policy {config.seed}"), []
        for row in rows["pool"]:
            for _ in range(PAIRS):
                a, b = (reviews.write("off_policy", row["prompt"], rng) for _ in range(2))
                prefers_a = annotate(row["prompt"], a, b, rng)
                pairs.append(Pair(row["prompt"], *((a, b) if prefers_a else (b, a))))
        return pairs

    @functools.cache
    def ratings(name, split):
        return rated(rows[name], split, config)

    pairs = with_noise(annotated(rows["shown"], "proxy", config.seed), config)
    if config.pair_labels == "gold":
        pairs = [Pair(p.prompt, *sorted(p.responses, key=lambda text: -reviews.gold(p.prompt, text)))
                 for p in pairs]
    return Task("reviews", prompts={"train": [row["prompt"] for row in rows["pool"]],
                                    "test": [row["prompt"] for row in rows["test"]]},
                pairs=Late(train=pairs, test=annotated(rows["test"], "test", config.seed),
                           off_policy=off_policy),
                rankings={"train": rankings, "test": []},
                pool={row["prompt"]: Ranking(row["prompt"], sampled(row), [], ended=row["ended"])
                      for row in rows["pool"]},
                ratings=Late(train=functools.partial(ratings, "pool", "train"),
                             test=functools.partial(ratings, "test", "test")),
                annotate=annotate, opinion=functools.partial(reviews.opinion, seed=config.seed),
                gold=reviews.gold, fluent=reviews.fluent, attributes=reviews.attributes)


def sampled(row):
    """The responses of a row of samples.json with the token ids that were sampled."""
    responses = [*map(common.Sampled, row["responses"])]
    for response, ids in zip(responses, row["ids"], strict=True):
        response.ids = ids
    return responses


def rated(rows, split, config):
    """Complete samples, RATED of a prompt at most, rated by people."""
    return rate_all([Demonstration(row["prompt"], text) for row in rows for text, ended in
                     [*zip(row["responses"], row["ended"])][:RATED] if ended], split, config)


def rate_all(demonstrations, name, config):
    """The demonstrations, each rated by one of twenty people, who err by --rating_noise levels."""
    rng, noise = random.Random(f"ratings {name} {config.seed}"), config.rating_noise
    raters = reviews.make_raters(reviews.ATTRIBUTES, noise, random.Random(f"raters {config.seed}"))
    return [Demonstration(prompt, text, reviews.rate(reviews.attributes(prompt, text), raters, noise, rng))
            for prompt, text, _ in demonstrations]


def demonstrations(config, n, rated=0):
    """The first n of what the SFT policy was trained on; the first `rated` of them with people's ratings."""
    rows = [Demonstration(*row) for row in read(models(config) / "demonstrations.json")[:n]]
    return rate_all(rows[:rated], "demonstrations", config) + rows[rated:]


def with_noise(pairs, config):
    """The pairs with a share --label_noise of the labels flipped, beside those that annotators get wrong."""
    rng = random.Random(f"label noise {config.seed}")
    return [Pair(p.prompt, p.rejected, p.chosen) if rng.random() < config.label_noise else p for p in pairs]


def proxy(config):
    """The directory of the reward model that methods may use.

    With label noise, --limit, or --proxy_pairs off_policy, it is trained on the pairs that this makes, and is
    kept in the cache too.
    """
    path, kind, few = models(config), config.proxy_pairs, f"-{config.limit}" * bool(config.limit)
    if not config.label_noise and kind == "samples" and not few:
        return path / "proxy"
    rows, other = samples(path, config), path / f"proxy-{kind}-{config.label_noise:g}{few}"
    pairs = (with_noise(annotated(rows["shown"], "proxy", config.seed), config) if kind == "samples" else
             load_task(config).pairs[kind])
    with lock(other):
        rate(other, pairs, rows["pool"], config)
    return other


def score_pool(path, rows, config):
    """(proxy, gold), both [prompts, n]."""
    reward = common.load_reward_model(path / "proxy", LIMITS["max_length"], config.device, "float32")
    scores = reward(*texts(rows))
    return scores.view(len(rows), -1), torch.tensor([row["gold"] for row in rows])


def test_pool(config):
    """(proxy, gold) of SFT samples of the first test prompts, both of shape BEST_OF, for best-of-n curves.

    The samples are kept in the cache.
    """
    path = models(config)
    with lock(path / "test_pool.json"):
        if not (path / "test_pool.json").exists():
            torch.manual_seed(config.seed + 1)
            policy, tokenizer = load_sft(path, config)
            rows = sample(policy, tokenizer, load_task(config).prompts["test"][:BEST_OF[0]], BEST_OF[1])
            write_json(path / "test_pool.json", rows)
    return score_pool(path, read(path / "test_pool.json"), config)


def vitals(path, rows, config):
    """The figures that tell whether a build is good."""
    def accuracy(scores, gold):
        better, truth = scores[:, ::2] > scores[:, 1::2], gold[:, ::2] - gold[:, 1::2]
        return round((better == (truth > 0))[truth != 0].float().mean().item(), 3)

    opinions = torch.tensor([reviews.opinion(*both, config.seed) for both in zip(*texts(rows["test"]))])
    test_scores, test_gold = score_pool(path, rows["test"], config)
    gold_of = {(row["prompt"], r): g for row in rows["shown"] for r, g in zip(row["responses"], row["gold"])}
    pairs = annotated(rows["shown"], "proxy", config.seed)
    gaps = [gold_of[p.prompt, p.chosen] - gold_of[p.prompt, p.rejected] for p in pairs]
    gaps = [gap for gap in gaps if gap]
    scores, gold = score_pool(path, rows["pool"], config)
    best = gold.gather(1, scores.argmax(1, keepdim=True))
    fluent = [reviews.fluent(r) for r in texts(rows["pool"])[1]]
    return {"SFT fluency": round(sum(fluent) / len(fluent), 3), "SFT gold": round(gold.mean().item(), 3),
            "annotator agreement with gold": round(sum(gap > 0 for gap in gaps) / len(gaps), 3),
            "proxy accuracy": accuracy(test_scores, test_gold),
            "judge accuracy": accuracy(opinions.view_as(test_gold), test_gold),
            "best-of-16 gold, by proxy": round(best.mean().item(), 3),
            "best-of-16 gold, by gold": round(gold.max(1).values.mean().item(), 3), "pairs": len(pairs)}


def report(config):
    """What `python -m tasks.build` prints."""
    path = models(config)
    for name, value in read(path / "vitals.json").items():
        print(f"{name:32}{value:>8}")
    print(f"{'directory':32}{path}")


def options(words=None):
    """The options of `python -m tasks.build`; auto never is MPS, on which the tiny model was not tried."""
    parser = argparse.ArgumentParser(prog="python -m tasks.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="auto: CUDA, else the CPU")
    found = parser.parse_args(words)
    for name, least in (("seed", 0), ("layers", 1)):
        if not least <= getattr(found, name) < 2 ** 62:
            parser.error(f"--{name} must be at least {least}, and below 2 ** 62")
    if found.device == "auto" and common.pick_device("auto").type == "mps":
        found.device = "cpu"
    return found


if __name__ == "__main__":
    given = options()
    in_one_line(lambda: report(given))
