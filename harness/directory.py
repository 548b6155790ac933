"""A run's directory: which is free, who writes it, its checkpoints, and what a crash leaves of them."""
import contextlib
import hashlib
import itertools
import json
import os
import pickle
import shutil
import time
import zipfile
import zlib
from pathlib import Path

import filelock
import torch

import tasks
from common import Sampled, UserError, warn
from harness import ranks
from tasks import Pair, Ranking
from tasks.chat import Prompt

SAVE_SECONDS = 120                         # without --save_every, a checkpoint is written so often
SLOW_SECONDS = 20                          # what took longer to make is kept for --resume
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, NotImplementedError,
              pickle.UnpicklingError, zipfile.BadZipFile, zlib.error)
CHECKPOINTS = "state.pt", "state-before.pt"
MINE = set()                               # directories that this process has claimed


def short(path):
    """The path from the current directory on; whole where there is none (another drive on Windows)."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def free_directory(home):
    """Make home/001, or the first number after the highest. Two runs never get the same."""
    home.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in home.glob("*") if path.name.isdigit()]
    for number in itertools.count(max(taken, default=0) + 1):
        try:
            (home / f"{number:03d}").mkdir()
            return home / f"{number:03d}"
        except FileExistsError:                                    # another run was faster
            pass


def claim(out):
    """A lock on the directory, which is made; UserError where a living process has it.

    The lock is the operating system's: it ends with the process, however that ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock, owner = filelock.FileLock(out / ".lock"), out / ".process"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if out.resolve() not in MINE:                    # two containers may have processes of one number
            pid = owner.read_text(encoding="utf-8") if owner.exists() else ""
            raise UserError(f"process {pid or '?'} is writing {out}: wait, or give another --out") from None
    MINE.add(out.resolve())
    owner.write_text(str(os.getpid()), encoding="utf-8")
    return lock


def give_back(out, lock):
    """End the claim. A directory in which nothing was written goes too."""
    MINE.discard(out.resolve())
    for name in (".process", ".lock"):
        with contextlib.suppress(PermissionError):       # Windows keeps an open file until release()
            (out / name).unlink(missing_ok=True)
    lock.release()
    if not any(out.iterdir()):
        with contextlib.suppress(OSError):                                # a link, a mount, the current one
            out.rmdir()


@contextlib.contextmanager
def claimed(out):
    """`with claimed(out):` from claim to give_back."""
    lock = claim(out)
    try:
        yield
    finally:
        give_back(out, lock)


def check_room(out, megabytes):
    """UserError where the disk has less room than the weights; a warning where checkpoints may not fit.

    A checkpoint has the weights and two moments of each. At a time there are up to three: see save_state.
    """
    free, most = shutil.disk_usage(out).free / 1e6, 10 * megabytes
    if free < megabytes:
        raise UserError(f"{free:,.0f} MB are free where {out} lies; the weights take {megabytes:,.0f} MB")
    if free < most:
        warn(f"{free:,.0f} MB are free where {out} lies; weights and checkpoints take up to {most:,.0f} MB")


def fingerprint_of_data(*paths):
    """12 hex digits of data files; "" where none is a file (the embedded task, hub ids)."""
    digest, files = hashlib.sha256(), [path for path in paths if Path(path).is_file()]
    for path in files:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2 ** 20), b""):
                digest.update(block)
    return digest.hexdigest()[:12] if files else ""


def read_args(out, say=warn):
    """args.json of a run that is resumed; {} where it cannot be read, which say(text) tells."""
    try:
        found = json.loads((out / "args.json").read_text(encoding="utf-8", errors="surrogateescape"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError) as error:
        say(f"{out / 'args.json'} cannot be read ({error}): other options are not noticed")
        return {}


def rows_until(file, step):
    """Whole lines of metrics.jsonl up to this step; lines that a crash has torn are left out."""
    kept = []
    for line in file.read_bytes().splitlines(True) if file.exists() else []:
        try:
            row = json.loads(line)
            if line.endswith(b"\n") and row["step"] <= step:
                kept.append(line.decode("utf-8"))
        except (ValueError, TypeError, KeyError):
            pass
    return kept


def save_state(out, state):
    """Write state.pt; the one before stays as state-before.pt."""
    part, last, before = out / "state.pt.part", *(out / name for name in CHECKPOINTS)
    with tasks.saving(part), open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if last.exists():
        tasks.put(last, before)
    tasks.put(part, last)


def load_plain(file):
    """A file of torch.save: tensors, plain values and rows of tasks; nothing that runs code.

    Raises one of UNREADABLE, also for a byte that is not what was written: torch.load does not look at the
    checksums. A record with attributes (torch.save gives none) may be a folder to it, of which it reads none.
    """
    with zipfile.ZipFile(file) as parts:
        damaged = parts.testzip() or next((p.filename for p in parts.infolist() if p.external_attr), None)
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")
    with torch.serialization.safe_globals([Pair, Ranking, Prompt, Sampled]):
        return torch.load(file, weights_only=True, map_location="cpu")


def load_state(out):
    """The newest checkpoint that can be read. UserError where none can."""
    for name in CHECKPOINTS:
        if (out / name).exists():
            try:
                state = load_plain(out / name)
                state["step"], state["trained"], state["optimizer"], state["schedule"]
                if name != CHECKPOINTS[0]:
                    warn(f"going on from {name}, step {state['step']}")
                return state
            except UNREADABLE as error:
                reason = " ".join(str(error).split())[:100]
                warn(f"{out / name} cannot be read ({type(error).__name__}: {reason})")
    raise UserError(f"no checkpoint in {out} can be read: delete the directory, or give another --out")


def kept(run, name, make):
    """make(), kept in the run's directory with what it cost if it was slow; --resume reads it from there."""
    if run.config.resume and (run.out / f"{name}.pt").exists():
        try:
            value, counts = load_plain(run.out / f"{name}.pt")
            run.counts |= counts
            return value
        except UNREADABLE:
            warn(f"{run.out / name}.pt cannot be read: made anew")
    began, value = time.time(), make()
    if time.time() - began > SLOW_SECONDS and ranks.first():
        if not run.resumes:                           # else its files are there, with the steps to go on from
            run.begin()
        with tasks.saving(run.out / f"{name}.part"):
            torch.save((value, run.counts), run.out / f"{name}.part")
        tasks.put(run.out / f"{name}.part", run.out / f"{name}.pt")
    return value

