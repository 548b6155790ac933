"""What a task is: the data a method trains on and the yardsticks it is measured by.

`tasks/reviews.py` makes one out of nothing, with a gold reward; `tasks/preferences.py` reads one from a file.
"""
import contextlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import UserDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

from filelock import FileLock, Timeout                # comes with huggingface_hub

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("ALIGNMENT_CACHE", ROOT / "cache"))


# Scripts without spaces between words: Chinese characters, kana, Thai, Lao, Khmer.
WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\u0e00-\u0eff\u1780-\u17ff]"
                  r"|[^\s\u3400-\u9fff\uf900-\ufaff\u3040-\u30ff\u0e00-\u0eff\u1780-\u17ff]+")


def words(text):
    """What stands between white space; in scripts without it, single characters."""
    return WORD.findall(text)


def write_text(path, text):
    """Write under another name, then rename: a killed run leaves the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="surrogateescape",    # names of files need not be UTF-8
                    newline="\n")                                         # Windows would write \r\n
    with open(part, "rb+") as file:
        os.fsync(file.fileno())                                          # else a power cut may leave it empty
    put(part, path)


def put(part, path):
    """part.replace(path). Windows refuses while a virus scanner reads one of them: try for some seconds."""
    for wait in (0.1, 0.3, 1, 3):
        try:
            return part.replace(path)
        except PermissionError:
            time.sleep(wait)
    return part.replace(path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def saving(path):
    """What torch and safetensors raise where a disk is full becomes an OSError with the path."""
    from safetensors import SafetensorError                # here: the workshop's kit imports this file alone
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0][:100]}): is the disk full?"
                      ) from None


def save_model(model, tokenizer, path):
    """save_pretrained of both, under a temporary name first."""
    part = path.with_name(path.name + ".part")
    with saving(part):
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(path, ignore_errors=True)
    put(part, path)


def in_one_line(function):
    """Run a command line of this folder: what a user can cause is one line, with status 2 (Ctrl-C: 130)."""
    from common import CONTROL, UserError
    try:
        function()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        print(f"error: {str(error) or 'the memory is full'}".translate(CONTROL), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def copy_directory(source, target):
    """Copy under another name, then rename: a copy that is cut off leaves what was there, never half."""
    part, old = (target.with_name(target.name + end) for end in (".part", ".old"))
    for left in (part, old):                                          # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        shutil.copytree(source, part)
        if target.exists():
            put(target, old)
        put(part, target)
    finally:
        if old.exists() and not target.exists():
            put(old, target)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)


def lock(path):
    """`with lock(path):` keeps other processes out that do the same. The file <path>.lock stays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


@contextlib.contextmanager
def lock_or_say(path, text):
    """The same, with a line on the screen where another process has it."""
    held = lock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(text, file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str

    @property
    def responses(self):
        return [self.chosen, self.rejected]

    @property
    def ended(self):
        return ()                                                    # as in Ranking: both


class Ranking(NamedTuple):
    """Several responses to one prompt. Higher scores are better; `systems` names the writers where known.

    `ended` says which responses end by themselves, empty: all. A sample that was cut off must not be taught
    to end there.
    """
    prompt: str
    responses: Sequence[str]
    scores: Sequence[float]
    systems: Sequence[str] = ()
    ended: Sequence[bool] = ()


class Demonstration(NamedTuple):
    prompt: str
    response: str
    attributes: dict[str, int] = {}


class Late(UserDict):
    """A dict in which a value may be a function: it is called where its key is used first."""

    def __getitem__(self, key):
        if callable(self.data[key]):
            self.data[key] = self.data[key]()
        return self.data[key]


@dataclass
class Task:
    """Every dict but `pool` maps a split ("train", "test") to rows; no prompt stands in both splits.

    `pool` maps train prompts to samples of the initial policy, where they are at hand: Rankings without
    scores. pairs["off_policy"]: train pairs of a writer that no policy learned from. `ratings`: responses,
    good and bad, with levels of attributes that people gave them.

    `annotate(prompt, a, b, rng) -> bool` (does an annotator prefer a to b?), `opinion(prompt, response) ->
    float` (somebody's score of it), `gold(prompt, response, stopped) -> float`, `fluent(response) -> bool`
    and `attributes(prompt, response) -> {name: level}` exist only where text can be judged exactly; elsewhere
    they are None.
    """
    name: str
    prompts: dict[str, list[str]]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    rankings: dict[str, list[Ranking]] = field(default_factory=dict)
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    ratings: dict[str, list[Demonstration]] = field(default_factory=dict)
    pool: dict[str, Ranking] = field(default_factory=dict)
    files: tuple = field(default=(), compare=False)                    # what was read, also of the hub
    chat: bool = False                      # are the prompts conversations in a chat template (chat.Prompt)?
    annotate: Callable[[str, str, str, random.Random], bool] | None = None
    opinion: Callable[[str, str], float] | None = None
    gold: Callable[[str, str, bool], float] | None = None
    fluent: Callable[[str], bool] | None = None
    attributes: Callable[[str, str], dict[str, int]] | None = None
