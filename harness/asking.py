"""--prompt: what a finished run's policy answers, beside what the policy that it began from answers."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import common
from common import UserError
from harness import directory
from harness.conditioning import parse_request
from harness.loading import check_vocabulary, load_policy, load_tokenizer, more_stop_ids
from tasks import ROOT, chat
from tasks.preferences import LONE_SURROGATE

OF_RUN = "model", "data", "seed", "max_length", "max_new_tokens", "temperature"      # unless another is given


def latest_run(method, file):
    """The newest run of this method that has this file, which is written last. UserError for none."""
    runs = sorted((ROOT / "runs" / method).glob(f"*/{file}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError("there is no run to ask: train one first (the same script without --prompt), "
                        "or give its --policy")
    return runs[-1].parent


def read_dict(file):
    """The dict in a JSON file of a run; {} where there is no such file, or none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def load_attributes(path, method):
    """What the policy in this directory was conditioned on, from its attributes.json. UserError if none."""
    found = read_dict(Path(path) / "attributes.json")
    if found.get("method") != method or not isinstance(found.get("levels"), dict):
        raise UserError(f"{path} has no attributes.json of {method}.py, so it is not known which attributes "
                        f"its policy reads: give --policy the directory of a finished run of {method}.py")
    return found


def answers(config, prompt, tags, conversation, check=False):
    """eval_samples responses of config's policy to the prompt and tags. check: does it know the words?"""
    policy, tokenizer = load_policy(config), load_tokenizer(config)
    if conversation:
        chat.end_turns(tokenizer)
        prompt = chat.render(tokenizer, [{"role": "user", "content": prompt}])
    tokenizer.more_stop_ids = more_stop_ids(policy, tokenizer)
    if check:
        check_vocabulary(tokenizer, [prompt], tokenizer([prompt], add_special_tokens=False).input_ids,
                         policy.get_input_embeddings().num_embeddings)
    torch.manual_seed(config.seed)
    batch = common.generate(policy, tokenizer, [prompt + tags], config.eval_samples, config.temperature,
                            max_new_tokens=config.max_new_tokens)
    return [str(text) for text in common.decode(tokenizer, batch)]


def ask(config, method, tags_of=None):
    """Print eval_samples responses to --prompt, before training (where args.json tells it) and after.

    The run is --policy or the method's latest; its options hold (OF_RUN). Of a conditioned
    method: tags_of(attributes.json of the run, the request of --steer) -> the tags to ask with.
    """
    if LONE_SURROGATE.search(config.prompt):
        raise UserError("--prompt is not in the encoding of this terminal, which should be UTF-8")
    path = Path(config.policy or latest_run(method, "attributes.json" if tags_of else "samples.txt"))
    attributes = load_attributes(path, method) if tags_of else {}
    tags = tags_of(attributes, parse_request(config.steer, attributes["levels"])) if tags_of else ""
    of_run, now, plain = read_dict(path / "args.json"), vars(config), vars(type(config)())
    if not all(type(of_run.get(name)) in ([str] if isinstance(plain[name], str) else [int, float])
               for name in (*OF_RUN, "policy")):
        of_run = {}
    if not of_run and not tags_of:
        whole = " whole" * (path / "args.json").exists()
        raise UserError(f"{path} has no{whole} args.json: give --policy the directory of a finished run")
    usual = {name: of_run[name] for name in OF_RUN if of_run and now[name] == plain[name]}
    after = replace(config, **usual | {"policy": str(path), "lora_rank": 0})
    conversation = of_run.get("conversations", attributes.get("chat", False))
    if not config.policy:
        print(f"asking {directory.short(path)}", file=sys.stderr)
    print(config.prompt + tags)
    if of_run:
        before = replace(after, policy=of_run["policy"])
        print("before training:", *answers(before, config.prompt, "", conversation), sep="\n  ")
        print("after training:")
    for text in answers(after, config.prompt, tags, conversation, check=True):
        print(f"  {text}")
