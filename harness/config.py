"""Options of every script. A method's Config adds its own and may change these defaults."""
import functools
import inspect
import math
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal, Optional, get_args, get_origin

from common import UserError, pick_device

SET_HERE = {"seed", "seeds", "jobs", "out", "quiet", "reproduce", "resume"}      # of one run, not of a method
LARGEST = {int: 2 ** 62, float: 1e30}                       # what 64 and 32 bits can hold, with some room


class Help(str):
    """What --help says, with the interval of a number (the parser takes no other metadata of a field)."""
    interval = ""


def option(default, text, interval=""):
    """A field of a Config: its default, what --help says about it, and what a number of it may be.

    interval: as in mathematics, "[0, 1)" or "(0, inf)". Every number has one: this one, or that of the field
    of this name in harness.Config.
    """
    text = Help(text)
    text.interval = interval
    return field(default=default, metadata={"help": text})


@functools.cache
def ends(interval):
    """("(", 0.0, inf, ")") of "(0, inf)"."""
    opening, low, high, closing = re.fullmatch(r"([(\[])(\S+), (\S+)([)\]])", interval).groups()
    return opening, float(low), float(high), closing


def outside(value, interval):
    """What the number must be, if it is not in the interval: "be above 0"; else ""."""
    opening, low, high, closing = ends(interval)
    if not math.isfinite(value):
        return f"be in {interval}" if high < math.inf else "be a finite number"
    if low > value or low == value and opening == "(":
        if high < math.inf:
            return f"be in {interval}"
        return "not be negative" if interval == "[0, inf)" else \
            f"be {'at least' if opening == '[' else 'above'} {low:g}"
    if high < value or high == value and closing == ")":
        return f"be in {interval}"
    largest = LARGEST[int if isinstance(value, int) else float]
    return f"be at most {largest:g}" if value > largest else ""


def is_number(kind):
    """Is this the type of a number, or Optional of one?"""
    return bool({int, float} & {kind, *get_args(kind)})


def interval_of(number):
    """The interval of a field of a method's Config, if need be from the field of this name in Config."""
    shared = {f.name: f for f in fields(Config)}.get(number.name, number)
    own, theirs = (getattr(f.metadata.get("help"), "interval", "") for f in (number, shared))
    return own or theirs


@functools.cache
def limits(cls):
    """[(name, choices, interval)] of a Config's options that are choices or numbers; one of both is None."""
    found = []
    for f in fields(cls):
        literal = next((kind for kind in (f.type, *get_args(f.type)) if get_origin(kind) is Literal), None)
        if literal:                                                  # or Optional of one
            found.append((f.name, get_args(literal), None))
        elif is_number(f.type):
            found.append((f.name, None, interval_of(f) or "(-inf, inf)"))
    return found


def method_name(config):
    """The method whose Config this is: the name of its file."""
    return Path(inspect.getfile(type(config))).stem


def differences(config, then={}):
    """The settings that are not the default, where `then` are defaults of another day that count instead.

    An option whose default is None was perhaps filled in from the others (a learning rate that depends on the
    model). Another method fills it in otherwise, so it counts only if it was really given.
    """
    values, now = vars(config), vars(type(config)()) | {"device": type(config).device}       # as it was given
    plain = {f.name for f in fields(config) if f.default is not None}
    not_here = {"device"} if values["device"] in ("cuda", "mps") else set()                  # on this machine
    filled = vars(type(config)(**{k: values[k] for k in plain - SET_HERE - not_here}))
    usual = {k: then.get(k, now[k]) if k in plain or filled[k] == now[k] else filled[k] for k in now}
    return {k: v for k, v in values.items() if v != usual[k]}


@dataclass
class Config:
    """The options that all scripts share. Raises UserError for a value that makes no sense."""
    LR: ClassVar = {"tiny": 5e-4, "real": 1e-6}                # what lr is when it is not given
    MAX_NEW_TOKENS: ClassVar = {"tiny": 40, "real": 128}
    MAX_LENGTH: ClassVar = {"tiny": 160, "real": 512}
    EPOCHS: ClassVar = {"tiny": 1.0, "real": 1.0}

    model: str = option("tiny", "'tiny' (built here, no download) or any causal LM: a directory or a hub id")
    policy: str = option("", "start from this saved policy, which is then the reference too")
    lora_rank: int = option(
        0, "train LoRA adapters of this rank, by default with ten times the lr (0: all weights)", "[0, inf)")
    prompt: Optional[str] = option(
        None, "no training: what --policy, or the last run, answers to this, before and after")
    data: str = option("reviews", "'reviews' (built in), a .jsonl or .jsonl.gz file, or a hub data set id")
    test_data: str = option(
        "", "file or hub id: all its rows are the test split, all other rows of --data are trained on")
    gold: str = option("", "'module:function': the true reward, measured in evaluations, never trained on")
    reward: str = option(
        "", "a model (directory, hub id), 'module:function', 'gold' or 'none'; default: trained on pairs")
    reward_label: str = option("", "which label of a reward model with several labels is the reward")
    reward_lr: Optional[float] = option(
        None, "learning rate of a reward model trained from the pairs of --data (1e-5; with LoRA 1e-4)",
        "(0, inf)")
    columns: str = option("", "'prompt=question,chosen=answer_a': other names of the data's fields")
    limit: int = option(
        0, "read only the first LIMIT rows of the data file, or prompts of the embedded task (0: all)",
        "[0, inf)")
    skip_bad_rows: bool = option(False, "leave out (and count) empty, equal or mismatched rows, do not stop")
    chat: bool = option(False, "wrap plain-text prompts as a user turn of the tokenizer's chat template")
    max_length: Optional[int] = option(
        None, "tokens of prompt and response, 3/4 for the prompt (default: tiny 160, else 512)", "(0, inf)")
    max_new_tokens: Optional[int] = option(
        None, "tokens sampled at most per response (tiny 40, else 128)", "(0, inf)")
    temperature: float = option(1.0, "sampling temperature of methods that sample", "[1e-6, inf)")
    lr: Optional[float] = option(None, "peak learning rate; the default depends on the model", "(0, inf)")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option(
        "constant_with_warmup", "how the learning rate goes on after the warm-up")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises linearly", "[0, 1]")
    batch_size: int = option(64, "prompts per optimizer step", "(0, inf)")
    epochs: Optional[float] = option(
        None, "passes over the training rows; the default depends on the model", "[0, inf)")
    shard: bool = option(
        False, "with torchrun: each process keeps a part of the weights (FSDP); see docs/scale.md")
    token_budget: Optional[int] = option(
        None, "padded tokens per forward pass; a step is split to fit, same effect (16384; tiny or CPU 2048)",
        "(0, inf)")
    gradient_checkpointing: bool = option(
        False, "keep one activation a layer, compute the others again going back: less memory, slower")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", "(0, inf)")
    eval_prompts: int = option(128, "test prompts sampled for evaluation", "(0, inf)")
    eval_samples: int = option(4, "samples per test prompt", "(0, inf)")
    eval_temperature: Optional[float] = option(
        None, "sampling temperature of the evaluation (default: --temperature)", "[1e-6, inf)")
    eval_every: int = option(0, "evaluate every so many steps (0: only before and after)", "[0, inf)")
    save_every: int = option(
        0, "write a checkpoint for --resume every so many steps (0: every two minutes)", "[0, inf)")
    reward_noise: Literal["none", "prompt", "response"] = option(
        "none", "noise of deviation 1 on the reward that is maximised: one draw per prompt, or per response")
    label_noise: float = option(
        0.0, "embedded task: share of the labels of pairs and proxy that are flipped", "[0, 0.5)")
    pair_labels: Literal["annotators", "gold"] = option(
        "annotators", "embedded task: who labels the pairs that are trained on; the proxy's are annotators'")
    proxy_pairs: Literal["samples", "off_policy"] = option(
        "samples", "embedded task: the proxy learns from pairs of SFT samples, or of another writer's texts")
    layers: int = option(
        1, "embedded task: layers of the tiny model; with several it is wider too (3: a million weights)",
        "[1, inf)")
    rating_noise: float = option(
        2.0, "embedded task: standard deviation of the raters' errors, in levels", "[0, inf)")
    seed: int = option(
        0, "draws everything: annotators, SFT policy, reward models, order, samples", "[0, inf)")
    device: Literal["auto", "cpu", "cuda", "mps"] = option(
        "auto", "auto takes CUDA, then MPS, then the CPU; for the tiny model CUDA, else the CPU, never MPS")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 on CUDA, else float32")
    out: str = option("", "where the run is written (default: the first free runs/<method>/<number>)")
    resume: bool = option(False, "go on with the run in --out")
    reproduce: bool = option(False, "run the paper's experiments: experiments/<method>.py")
    seeds: int = option(10, "how many seeds --reproduce runs", "(0, inf)")
    jobs: int = option(1, "in how many processes --reproduce runs them", "(0, inf)")
    quiet: bool = option(False, "no tables and no samples on the screen, and no run.png")

    def __post_init__(self):
        for name, choices, interval in limits(type(self)):          # the command line checks choices itself
            value = getattr(self, name)
            if value is None:
                continue
            must = outside(value, interval) if interval else f"be one of {', '.join(choices)}"
            if must if interval else value not in choices:
                raise UserError(f"--{name} must {must}, not {value}")
        self.out = os.path.expanduser(self.out)                  # of --out=~/run a shell leaves the ~
        kind = "tiny" if self.model == "tiny" else "real"
        if kind == "tiny" and self.device == "auto" and pick_device("auto").type == "mps":
            self.device = "cpu"                                  # the tiny model was not tried on MPS
        if self.token_budget is None:                            # small: less padding, see common.batches
            self.token_budget = 2048 if kind == "tiny" or pick_device(self.device).type == "cpu" else 16384
        for name in ("lr", "epochs", "max_new_tokens", "max_length"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, name.upper())[kind])
                if name == "lr" and self.lora_rank:
                    self.lr *= 10                                # see docs/real_models.md
        if self.reward_lr is None:
            self.reward_lr = 1e-4 if self.lora_rank else 1e-5
        if self.eval_temperature is None:
            self.eval_temperature = self.temperature
        if self.max_new_tokens > self.max_length // 4:
            raise UserError(f"--max_new_tokens {self.max_new_tokens} is more than a quarter of --max_length "
                            f"{self.max_length}; prompts may take the other three: raise --max_length")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: write what to ask, or leave it out to train")
        if self.resume and not self.out:
            raise UserError("--resume needs --out: the directory of the run to go on with")
        if self.shard and self.lora_rank:
            raise UserError("--shard is for training all weights: leave out --lora_rank, or --shard")
        if self.shard and (self.prompt or self.reproduce):
            raise UserError("--shard is for training one run: leave it out with --prompt and --reproduce")
        if self.data == "reviews" and (self.test_data or self.gold):
            raise UserError("--test_data and --gold are for --data; the built-in task has its own")
        if self.model != "tiny" and self.data == "reviews":
            raise UserError(f"--model {self.model} needs --data: a .jsonl file or a hub data set id")

    def check(self, good, must, *names):
        """UserError for the first of the named options that is given and not good."""
        for name in names:
            if getattr(self, name) is not None and not good(getattr(self, name)):
                raise UserError(f"--{name} must {must}, not {getattr(self, name)}")
