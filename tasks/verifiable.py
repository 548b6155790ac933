"""Real prompts with instructions whose fulfilment a function can check: a true reward for real text.

    name three rivers in europe
    Answer in at most 12 words. End your answer with a question.

The prompts are those of a data file. Each gets one or two instructions. `gold` is the share that the answer
fulfils, so nobody's taste is in it. Every second test prompt has wordings that no train prompt has: a policy
that has learned to follow instructions, and not only their wordings, follows these too.

    python -m tasks.verifiable --prompts FILE --model DIR --out FOLDER       # samples of the model, judged

writes, from samples of the model, pairs.jsonl (chosen and rejected by annotators who err), rated.jsonl
(levels of obedience and length) and test.jsonl (prompts). `--reward tasks.verifiable:reward` is gold itself.
"""
import argparse
import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import common
from tasks import chat, in_one_line, preferences, write_text

NOUNS = ("river winter music garden window friend morning street story water mountain letter kitchen summer "
         "market bridge ocean forest picture evening").split()
OPENERS = "Well Perhaps First Today Sure Honestly Often Yes".split()
COMMON = [("the", "and"), ("you", "is"), ("it", "to"), ("of", "are"), ("a", "that")]
LEAST_WORDS = 3                                       # a shorter answer fulfils nothing: it is no answer
HONEST, TEMPERATURE = 0.9, 0.25                       # annotators: labels that are not flipped, Bradley-Terry


class Kind(NamedTuple):
    """A kind of instruction. Wordings have the values in {}."""
    wordings: tuple[str, ...]                         # the last one is in no train prompt
    values: tuple[tuple, ...]                         # what may stand in the braces, one after the other
    fulfilled: Callable[[str, list[str], tuple], bool]         # (answer, its words, values)


def words_of(text):
    return re.findall(r"[\w'’-]+", text)


KINDS = {
    "length": Kind(("Answer in at most {} words.", "Do not write more than {} words.",
                    "Keep your answer within {} words."),
                   tuple((str(n),) for n in range(8, 21, 2)), lambda text, words, v: len(words) <= int(v[0])),
    "question": Kind(("End your answer with a question.", "Close with a question.",
                      "The last character of your answer must be a question mark."), ((),),
                     lambda text, words, v: text.rstrip().endswith("?")),
    "mention": Kind(('Use the word "{}" in your answer.', 'Mention the word "{}".',
                     'Your answer must contain the word "{}".'), tuple((noun,) for noun in NOUNS),
                    lambda text, words, v: v[0] in map(str.lower, words)),
    "avoid": Kind(('Do not use the words "{}" and "{}".', 'Write without the words "{}" and "{}".',
                   'The words "{}" and "{}" are forbidden.'), tuple(COMMON),
                  lambda text, words, v: not {*v} & {*map(str.lower, words)}),
    "start": Kind(('Begin your answer with the word "{}".', 'Start with "{}".',
                   'The first word of your answer must be "{}".'), tuple((word,) for word in OPENERS),
                  lambda text, words, v: [word.lower() for word in words[:1]] == [v[0].lower()]),
    "lower case": Kind(("Write everything in lower case.", "Write in lower case only.",
                        "Use no capital letters."), ((),), lambda text, words, v: text == text.lower()),
}
PATTERNS = [(kind, re.compile(re.escape(wording).replace(r"\{\}", r"([\w'-]+)")))
            for kind, entry in KINDS.items() for wording in entry.wordings]


def compose(prompt, rng, hidden=False):
    """The prompt with one or two instructions of different kinds below it; hidden: in the last wording."""
    kinds = rng.sample(sorted(KINDS), rng.choice((1, 2)))
    lines = []
    for kind in kinds:
        *known, unseen = KINDS[kind].wordings
        lines.append((unseen if hidden else rng.choice(known)).format(*rng.choice(KINDS[kind].values)))
    return f"{prompt}\n{' '.join(lines)}"


def instructions(prompt):
    """[(kind, values)] of the instructions that stand in the prompt's last line."""
    last = prompt.strip().splitlines()[-1] if prompt.strip() else ""
    found = [(match.start(), kind, match.groups()) for kind, pattern in PATTERNS
             for match in pattern.finditer(last)]
    return [(kind, values) for _, kind, values in sorted(found)]


def unseen_wordings(prompt):
    """Of each instruction of the prompt: is it in the wording that no train prompt has?"""
    last = prompt.strip().splitlines()[-1:]
    return [KINDS[kind].wordings[-1].format(*values) in last[0] for kind, values in instructions(prompt)]


def gold(prompt, response):
    """The share of the prompt's instructions that the response fulfils; 0 below LEAST_WORDS words.

    prompt: as compose made it. UserError for one without instructions.
    """
    asked, words = instructions(prompt), words_of(response)
    if not asked:
        raise common.UserError(f"no instruction that can be checked in {prompt!r}")
    if len(words) < LEAST_WORDS:
        return 0.0
    return sum(KINDS[kind].fulfilled(response, words, values) for kind, values in asked) / len(asked)


def reward(prompts, responses):
    """gold of each response, in the form of --reward module:function; prompts are texts or conversations."""
    asked = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
    return [gold(prompt, response) for prompt, response in zip(asked, responses, strict=True)]


def prefers_first(a, b, rng):
    """Does an annotator prefer the answer of gold a to that of gold b? Wrong now and then."""
    return (rng.random() < 1 / (1 + math.exp((b - a) / TEMPERATURE))) == (rng.random() < HONEST)


def levels(prompt, response, rng):
    """People's ratings, 0 to 9: obedience, at times a level off; length in steps of three words."""
    obedience = round(9 * gold(prompt, response)) + rng.choice((-1, 0, 0, 1))
    return {"obedience": min(max(obedience, 0), 9), "length": min(len(words_of(response)) // 3, 9)}


def split(prompts, n_test, seed):
    """(train, test) prompts with instructions. Every second test prompt has the hidden wordings."""
    rng = random.Random(f"verifiable {seed}")
    prompts = rng.sample(list(dict.fromkeys(prompts)), len(set(prompts)))
    test = [compose(prompt, rng, hidden=bool(i % 2)) for i, prompt in enumerate(prompts[:n_test])]
    return [compose(prompt, rng) for prompt in prompts[n_test:]], test


def judged(prompts, answers, seed):
    """(pairs, rated), rows of the different answers [N][<=k] to the prompts [N].

    Each two answers to a prompt are compared (Ouyang et al. 2022, 3.5); those of equal gold make no pair.
    """
    rng, pairs, rated = random.Random(f"annotators {seed}"), [], []
    for prompt, texts in zip(prompts, answers):
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        rated += [{"prompt": prompt, "completion": text, "attributes": levels(prompt, text, rng)}
                  for text in texts]
        for a, b in itertools.combinations(texts, 2):
            if gold(prompt, a) != gold(prompt, b):
                better, worse = (a, b) if prefers_first(gold(prompt, a), gold(prompt, b), rng) else (b, a)
                pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return pairs, rated


def sampled(model, prompts, n, max_new_tokens, seed):
    """n complete answers of a chat model to each prompt [N][<=n]; those that were cut off are left out."""
    torch.manual_seed(seed)
    policy, tokenizer = common.load_policy(model), common.load_tokenizer(model, 512)
    asked = prompts
    ends = policy.generation_config.eos_token_id
    tokenizer.more_stop_ids = [ends] if isinstance(ends, int) else list(ends or [])
    if tokenizer.chat_template:
        chat.end_turns(tokenizer)
        asked = [chat.render(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    batch = common.generate(policy, tokenizer, asked, n, max_new_tokens=max_new_tokens)
    found = [*zip(common.decode(tokenizer, batch), common.finished(tokenizer, batch).tolist())]
    return [[str(text).strip() for text, complete in found[i:i + n] if complete]
            for i in range(0, len(found), n)]


def question_of(prompt):
    """What the user said last: of a conversation, of a transcript "Human: ... Assistant:", or all of it."""
    messages = getattr(prompt, "messages", ())
    text = messages[-1]["content"] if messages else re.split(r"(?:^|\n\n)Human:", str(prompt))[-1]
    return " ".join(text.removesuffix("Assistant:").split())


def write_files(given):
    """Make the three files in given.out and say what they hold."""
    for name, least in (("train", 1), ("test", 1), ("samples", 2), ("max_new_tokens", 1), ("seed", 0)):
        if not least <= getattr(given, name) < 2 ** 62:
            raise common.UserError(f"--{name} must be at least {least}, and below 2 ** 62")
    (out := Path(given.out)).mkdir(parents=True, exist_ok=True)                  # before minutes of sampling
    taken = [name for name in ("pairs", "rated", "test") if (out / f"{name}.jsonl").exists()]
    if taken:
        raise common.UserError(f"{out / taken[0]}.jsonl exists: nothing is written over; give another --out")
    task = preferences.load(given.prompts, common.load_tokenizer(given.model, 512), skip_bad_rows=True)
    short = [question for prompts in task.prompts.values() for question in map(question_of, prompts)
             if 0 < len(words_of(question)) <= given.longest]
    train, test = split(short, given.test, given.seed)
    if len(train) < given.train:
        raise common.UserError(f"{given.prompts} has {len(train)} short prompts to train on, not "
                               f"{given.train}: lower --train or --test, or raise --longest")
    train = train[:given.train]
    answers = sampled(given.model, train, given.samples, given.max_new_tokens, given.seed)
    pairs, rated = judged(train, answers, given.seed)
    for name, rows in (("pairs", pairs), ("rated", rated), ("test", [{"prompt": prompt} for prompt in test])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(out / f"{name}.jsonl", "".join(lines))
    right = statistics.fmean(gold(row["prompt"], row["completion"]) for row in rated) if rated else math.nan
    print(f"{len(train)} train prompts: {len(rated)} rated answers with gold {right:.3f}, {len(pairs)} "
          f"pairs; {len(test)} test prompts; in {out}")


def verifiable_rows(folder):
    """{name: rows} of the three files in the folder; of test.jsonl only the prompts in unseen wordings.

    UserError for a folder with other files, or whose train prompts have wordings of test prompts.
    """
    rows = {}
    for name in ("pairs", "rated", "test"):
        path = Path(folder) / f"{name}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")   # an answer may hold other line ends
            rows[name] = [json.loads(line) for line in lines if line.strip()]
            unseen = [unseen_wordings(row["prompt"]) for row in rows[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise common.UserError(f"{path} is missing or damaged: python -m tasks.verifiable --prompts FILE "
                                   f"--model DIR --out {folder} makes it") from None
        if name == "test":
            rows[name] = [row for row, found in zip(rows[name], unseen) if found and all(found)]
        elif any(map(any, unseen)):
            raise common.UserError(f"{path} has wordings of instructions that only test prompts may have")
    if not rows["test"] or len({row["prompt"] for row in rows["pairs"]}) < 2:
        raise common.UserError(f"{folder} needs two train prompts with pairs, and a test prompt in unseen "
                               "wordings")
    return rows


def rows_of_seed(rows, seed, n):
    """What a seed draws of verifiable_rows: pairs and ratings of n of the prompts with a pair, or of all.

    "others" are pairs of the other prompts, if there are at least two; "test" is the same for every seed.
    """
    prompts = sorted({row["prompt"] for row in rows["pairs"]})
    chosen = {*random.Random(f"prompts {seed}").sample(prompts, min(n, len(prompts)))}
    found = {name: [row for row in rows[name] if row["prompt"] in chosen] for name in ("pairs", "rated")}
    others = [row for row in rows["pairs"] if row["prompt"] not in chosen] if len(prompts) > n + 1 else []
    return found | {"test": rows["test"], "others": others}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tasks.verifiable", description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", required=True, help="a data file or hub data set: its prompts are taken")
    parser.add_argument("--model", required=True, help="whose answers are judged: a directory or a hub id")
    parser.add_argument("--out", required=True, help="a folder for the three files")
    parser.add_argument("--train", type=int, default=512, help="train prompts")
    parser.add_argument("--test", type=int, default=128, help="test prompts")
    parser.add_argument("--samples", type=int, default=4, help="answers to each train prompt")
    parser.add_argument("--longest", type=int, default=20, help="prompts of more words are left out")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    in_one_line(lambda: write_files(given))


if __name__ == "__main__":
    main()
