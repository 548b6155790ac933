"""Rewards: which models judge a run, and which function a method maximises."""
import contextlib
import hashlib
import json
import math
import numbers
import os
import pkgutil
import random
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import common
import tasks
from common import UserError, warn
from harness import adapters, progress, ranks, shards
from harness.checkpoints import check_checkpoint, check_tokenizer, fit_reward_tokens
from harness.loading import (fingerprint, fit_positions, frozen, load_scorer, policy_path, shared,
                             without_scorer)
from harness.stages import Recipe, check_finite, train_reward_model
from tasks import chat


MISTAKES = Exception, SystemExit, GeneratorExit     # what the user's own code may raise: all but Ctrl-C


def load_rewards(config, task):
    """{"proxy": what methods may optimise, "judge": people, never seen}, as far as the run has them.

    The proxy is --reward, or the embedded task's, or one trained here from the task's pairs and kept in the
    cache.
    """
    def load(path, label=""):
        reward = shards.load(config, lambda *place: common.load_reward_model(
            path, config.max_length, *place, label, config.token_budget))
        check_tokenizer(reward.tokenizer, path)
        fit_reward_tokens(reward.tokenizer, reward.model, path)
        if not hasattr(reward.model, "score"):
            reward = EncoderReward(**vars(reward))
        else:
            shared(config, reward.model)
            if config.data != "reviews":                             # there RAFT can train it further
                frozen(config, reward.model)
        if config.data != "reviews":
            fit_positions(reward.model, reward.tokenizer, path)
            read = reward.read
            reward.read = lambda prompts, texts: progress.over(read(prompts, texts), len(texts), "rewards")
        if task.chat:
            reward.render = lambda prompts: chat.as_read_by(reward.tokenizer, prompts)
            if reward.tokenizer.chat_template:
                chat.end_turns(reward.tokenizer)
            try:
                reward.render(sum(task.prompts.values(), []))          # a template may refuse a conversation
            except UserError as error:
                raise UserError(f"the reward model {path}: {error}") from None
        return reward

    if config.reward == "none":
        return {}
    if config.reward == "gold" and (config.gold or not task.gold):
        raise UserError("--reward gold: only the embedded task has a true reward; name a reward model or "
                        "module:function, or leave it out")
    if ":" in config.reward and not Path(config.reward).exists():
        own = UserReward(functions_of(config.reward))
        own(task.prompts["train"][:1], ["Yes."])                # what is wrong with it is said now, not later
        return {"proxy": own}
    judge = {"judge": People(task.opinion)} if task.opinion else {}
    if config.reward not in ("", "gold"):
        check_checkpoint(config.reward, policy=False)
        return {"proxy": load(config.reward, config.reward_label)} | judge
    if config.data == "reviews":
        from tasks import build
        path = ranks.first_makes(lambda: build.proxy(config))
        return {"proxy": load(path, config.reward_label)} | judge
    pairs = task.pairs.get("train")
    if not pairs:
        warn("no pairs to train a reward model from and no --reward: samples go without a proxy reward")
        return {}
    family = without_scorer(config)
    if family:
        warn(f"transformers has no class for reward models of the family {family}: samples go without a "
             "proxy reward; --reward names one of another family")
        return {}
    path = trained_path(config, pairs)
    with tasks.lock(path) if ranks.first() else contextlib.nullcontext():
        missing = ranks.from_first(lambda: not path.exists())
        if missing and (ranks.first() or config.shard):                  # in shards, all processes together
            torch.manual_seed(config.seed)
            tokenizer = common.load_tokenizer(policy_path(config), config.max_length)
            if task.chat:
                chat.end_turns(tokenizer)                                # as it will read them
            model = load_scorer(config)
            fit_positions(model, tokenizer, policy_path(config))
            recipe = Recipe(config.reward_lr, batch_size=16, schedule="linear",
                            token_budget=config.token_budget, seed=config.seed, flag="--reward_lr")
            train_reward_model(model, tokenizer, pairs, recipe)
            model = shards.whole_model(model) if config.shard else model
            if ranks.first():
                tasks.save_model(adapters.merge(model) if config.lora_rank else model, tokenizer, path)
        ranks.gathered(None)                                             # it is there now
    return {"proxy": load(path, config.reward_label)}


def trained_path(config, pairs):
    """Where the cache has, or will have, the reward model that is trained from these pairs."""
    said = [(getattr(p.prompt, "messages", ()) or p.prompt, *p[1:]) for p in pairs]   # templates add a date
    key = json.dumps([str(policy_path(config)), fingerprint(config), config.reward_lr, config.seed,
                      config.max_length, config.lora_rank, said])
    return tasks.CACHE / "rewards" / hashlib.sha256(key.encode()).hexdigest()[:16]


class EncoderReward(common.RewardModel):
    """The same of an encoder (BERT and its kind), which reads [CLS] prompt [SEP] response [SEP]."""

    def read(self, prompts, responses):
        """The prompt is cut, from the left; a response is cut only beyond half of the length."""
        length, self.tokenizer.truncation_side = self.tokenizer.model_max_length, "left"
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
        for rows in torch.tensor(order).split(max(1, self.budget // length)):
            texts = [responses[i] for i in rows]
            cut = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            texts = [text[:ends[:length // 2][-1][1]] if ends else text for text, ends in zip(texts, cut)]
            batch = self.tokenizer([prompts[i] for i in rows], texts, padding=True, return_tensors="pt",
                                   truncation="only_first").to(self.model.device)
            yield rows, int(batch.attention_mask.sum()), self.model(**batch).logits


def said(error):
    """An exception of the user's own code in one line: its type, what it says, and where it was raised."""
    own = [entry for entry in traceback.extract_tb(error.__traceback__) if entry.filename != __file__]
    where = f", {os.path.basename(own[-1].filename)} line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


@contextlib.contextmanager
def as_before():
    """The user's code may change the directory, and torch's gradients and type; then they are set back."""
    here, dtype = os.getcwd(), torch.get_default_dtype()
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            os.chdir(here)
            torch.set_default_dtype(dtype)


def functions_of(text, flag="--reward"):
    """[(function, weight, how it was named)] of --reward "module:function*0.5,other:function"."""
    found = []
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())                                 # where the user's module is
    for part in text.split(","):
        name, _, weight = part.strip().partition("*")
        try:
            with as_before():
                found.append((pkgutil.resolve_name(name), float(weight or 1), name))
        except MISTAKES as error:
            raise UserError(f"{flag} {part!r} ({said(error)}): write module:function, or "
                            "module:function*0.5, a function of two lists, prompts and responses, that "
                            f"returns a list of numbers; modules are looked for in {os.getcwd()}") from None
        if not callable(found[-1][0]):
            raise UserError(f"{flag} {name} is no function")
        if not math.isfinite(found[-1][1]):
            raise UserError(f"{flag} {part!r}: the weight {weight} is not finite")
    return found


@dataclass
class UserReward:
    """The weighted sum of functions (prompts, responses) -> numbers, called like a RewardModel.

    They get the messages of a conversation [{"role", "content"}, ...] where the data has them, else texts.
    """
    functions: list
    mean: float = 0.0
    std: float = 1.0
    flag: str = "--reward"

    def __call__(self, prompts, responses):
        """Scores [N]. UserError, with the row, where a function returns anything else than finite numbers."""
        texts, total = [*map(str, responses)], torch.zeros(len(prompts))
        for function, weight, name in self.functions:
            def made():
                asked = [[*map(dict, getattr(prompt, "messages", ()))] or str(prompt) for prompt in prompts]
                with ranks.fork_rng(), as_before():
                    try:
                        return function(asked, [*texts])
                    except MISTAKES as error:
                        raise UserError(f"{self.flag} {name} failed ({said(error)})") from None

            values = ranks.from_first(made) if self.flag == "--reward" else made()        # it may cost money
            values = values.tolist() if hasattr(values, "tolist") else values
            if not isinstance(values, (list, tuple)) or len(values) != len(texts):
                raise UserError(f"{self.flag} {name} returned {str(values)[:60]!r} for {len(texts)} "
                                "responses, not a list with a number for each")
            for row, (value, prompt) in enumerate(zip(values, prompts)):
                if not isinstance(value, numbers.Real) or not abs(value) < 1e30:        # nan is not, either
                    raise UserError(f"{self.flag} {name} returned {repr(value)[:60]} for row {row + 1} of "
                                    f"{len(texts)}: prompt {str(prompt)[:60]!r}, response "
                                    f"{texts[row][:60]!r}")
            total += weight * torch.tensor(values, dtype=torch.float32)
        if not total.isfinite().all():
            raise UserError(f"{self.flag}: the weighted sum is not finite, the weights are too large")
        return (total - self.mean) / self.std


@dataclass
class People:
    """Scores by people who read complete responses, one person each; called like a RewardModel."""
    opinion: Callable

    def __call__(self, prompts, responses):
        return torch.tensor([self.opinion(*row) for row in zip(prompts, responses)])


@dataclass
class TrueReward:
    """The task's gold reward, called like a RewardModel; it reads complete responses."""
    gold: Callable
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, prompts, responses):
        scores = torch.tensor([self.gold(*row, True) for row in zip(prompts, responses)])
        return (scores - self.mean) / self.std


def gold_of(text):
    """--gold "module:function" as the gold of a task: (prompt, response, ended) -> number."""
    if ":" not in text:
        raise UserError(f"--gold {text!r}: write module:function, see --reward")
    true = UserReward(functions_of(text, "--gold"), flag="--gold")
    return lambda prompt, response, ended=True: true([prompt], [response]).item()


@dataclass
class NoisyReward:
    """A reward plus noise of deviation 1: one draw for all responses to a prompt, or for each response."""
    reward: Callable
    kind: str                                                        # "prompt" or "response"
    seed: int

    def __call__(self, prompts, responses):
        keys = prompts if self.kind == "prompt" else zip(prompts, responses)
        noise = [random.Random(f"{self.seed} {key}").gauss(0, 1) for key in keys]
        noise = torch.tensor(noise, dtype=torch.float64)              # float64: a shift changes no order
        return self.reward(prompts, responses) + noise


def set_scale(reward, mean, std):
    """The reward is (raw score - mean) / std from now on, also for a method that maximises it."""
    reward.mean, reward.std, reward.scaled = mean, std, True


def reward_to_maximise(run):
    """The reward of `scaled_reward`, with the noise of --reward_noise."""
    reward, kind = scaled_reward(run), run.config.reward_noise
    return NoisyReward(reward, kind, run.config.seed) if kind != "none" else reward


def scaled_reward(run):
    """The function (prompts, responses) -> rewards [N] that a method optimises: the proxy, or gold.

    Either has mean 0 and deviation 1 on samples of the initial policy (Huang et al. 2023, "reward
    normalization"), so that one KL coefficient means the same for every reward and method. A reward without
    a scale gets one here, from four samples for each of the first 128 train prompts.
    """
    if run.config.reward == "gold":
        reward = TrueReward(run.task.gold)
    elif "proxy" not in run.rewards:
        raise UserError("there is no reward to maximise: give --reward, or data with pairs to train a reward "
                        "model from")
    else:
        reward = run.rewards["proxy"]
        own = getattr(getattr(reward, "model", None), "config", None)
        if hasattr(own, "reward_scale") or getattr(reward, "scaled", False):
            return reward
    config, prompts = run.config, run.task.prompts["train"][:128]
    torch.manual_seed(config.seed)                                   # whatever was trained or loaded before
    samples = ranks.generate(run.policy, run.tokenizer, prompts, 4, config.temperature,
                             max_new_tokens=config.max_new_tokens)
    prompts = [prompt for prompt in prompts for _ in range(4)]
    scores = reward(prompts, common.decode(run.tokenizer, samples))
    check_finite(scores, 0, prompts, "the reward")
    if scores.max() == scores.min():
        raise UserError(f"the reward is {scores[0]:.3g} for each of the policy's {len(scores)} first "
                        "samples: there is nothing to maximise; give another --reward, or a higher "
                        "--temperature")
    reward.mean, reward.std = scores.mean().item(), scores.std().item()
    return reward
