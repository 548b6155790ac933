"""The command line of a script: a run is loaded and checked, trained, saved; every fault is one line."""
import contextlib
import io
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from transformers import HfArgumentParser

import common
from common import UserError, warn
from harness import adapters, conditioning, directory, loading, progress, ranks, shards
from harness.asking import ask
from harness.checkpoints import check_checkpoint, check_model, check_saves, check_words
from harness.config import Config, method_name
from harness.evaluation import check_policy
from harness.rewards import gold_of, load_rewards
from harness.run import Run, Stop
from harness.samples import given_answers
from harness.stages import Diverged
from tasks import ROOT, chat


FULL = "out of memory|not enough memory|can't allocate memory"            # what a RuntimeError says of memory


def output_directory(config):
    """--out, or the first free number under runs/<method>. UserError for a directory of another run."""
    bookkeeping = ("resume", "quiet", "prompt", "device", "out", "save_every", "seeds", "jobs", "shard",
                   "token_budget")                  # its default depends on the device; it changes no result
    settings = {k: v for k, v in asdict(config).items() if k not in bookkeeping}
    if not config.out:
        return directory.free_directory(ROOT / "runs" / method_name(config))
    if config.out.encode("utf-8", "replace").decode() != config.out:
        raise UserError(f"--out {config.out!r}: not every program can write such a name; give another")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    if config.resume:
        if not any(out.glob("*.pt")):
            if (out / "samples.txt").exists():                                          # it is written last
                raise UserError(f"the run in {out} is finished: there is nothing to resume")
            raise UserError(f"nothing to resume in {out}: it holds no state.pt (see --save_every); delete it")
        old = directory.read_args(out)
        if old.get("method", method_name(config)) != method_name(config):
            raise UserError(f"{out} is a run of {old['method']}.py, not of {method_name(config)}.py")
        changed = [k for k, v in settings.items() if old.get(k, v) != v]
        if changed:
            raise UserError(f"{out} was run with other options: give {', '.join('--' + k for k in changed)} "
                            "as before")
    elif out.exists() and any(path.name not in (".lock", ".process") for path in out.iterdir()):
        raise UserError(f"{out} holds another run: --resume goes on with one that was cut; or give another "
                        "--out")
    return out


def start(config):
    """Load everything that a run needs. Raises UserError for an output directory that holds another run."""
    ranks.start(config.device)
    progress.begin(not config.quiet and ranks.first(), f"{method_name(config)}: loading the model "
                   f"{config.policy or config.model} and the data {config.data}, seed {config.seed}")
    shards.check(config)
    torch.manual_seed(config.seed)
    out = ranks.from_first(lambda: output_directory(config))
    lock, run = directory.claim(out) if ranks.first() else None, None
    try:
        run = prepare(config, out)
    finally:
        if not run and lock:
            directory.give_back(out, lock)
    run.lock = lock
    return run


def prepare(config, out):
    """A Run with everything loaded and checked."""
    if config.policy or config.model != "tiny":
        check_checkpoint(loading.policy_path(config))
    if getattr(config, "value_model", ""):
        check_checkpoint(config.value_model, policy=False)
    task = loading.load_task(config)
    if config.gold:
        task.gold = gold_of(config.gold)
        task.gold(task.prompts["train"][0], "Yes.")             # what is wrong with it is said now, not later
    if config.data != "reviews":
        check_options(config, task)
    began = time.time()
    rewards = load_rewards(config, task)
    torch.manual_seed(config.seed)                  # adapters begin alike, was a reward model trained or not
    policy, tokenizer = loading.load_policy(config), loading.load_tokenizer(config)
    if task.chat:
        chat.end_turns(tokenizer)
    policy.saved_dtype = loading.saved_dtype(config)          # asked for now: nothing may fail after training
    check_saves(policy, loading.policy_path(config))
    policy.embeddings_came = policy.get_input_embeddings().num_embeddings
    loading.fit_positions(policy, tokenizer, loading.policy_path(config))
    if config.max_new_tokens > tokenizer.model_max_length // 4:
        raise UserError(f"--max_new_tokens {config.max_new_tokens} is more than a quarter of the "
                        f"{tokenizer.model_max_length} tokens that prompt and response share: lower it")
    tokenizer.more_stop_ids = loading.more_stop_ids(policy, tokenizer)
    if config.data != "reviews":
        loading.fit_task(tokenizer, task, policy.embeddings_came)
        check_model(policy, tokenizer, task.prompts["train"][0], loading.policy_path(config))
    elif config.policy:
        check_words(tokenizer, config.policy)
    check_policy(policy, tokenizer, task, 0)
    if config.lora_rank:
        adapters.change_frozen(policy, policy.compute_dtype)
    trained = [weight.nbytes for weight in policy.parameters() if weight.requires_grad]
    if ranks.first():                               # on another machine the directory may not exist
        directory.check_room(out, sum(trained) / 1e6)
    run = Run(config, out, task, tokenizer, policy, rewards, began=began)
    if config.resume:
        old, new = directory.read_args(out, say=str), run.origin       # output_directory has warned
        for name, what in (("build", "initial weights are"), ("data_fingerprint", "data file is"),
                           ("other_models", "base, reward or value model is")):
            if old.get(name, new[name]) != new[name]:
                raise UserError(f"the {what} not what {out} was begun with: give another --out")
        for name, what in (("commits", "the hub has another commit of a model than when this run was begun"),
                           ("processes", "another number of processes: what is sampled anew, and the scale "
                            "of a reward, will differ from those of the first part")):
            if old.get(name, new[name]) != new[name]:
                warn(what)
    torch.manual_seed(config.seed)                  # whatever was trained or loaded from the cache until here
    return run


def check_options(config, task):
    """UserError for options that do not fit the user's data: said before a reward model is trained on it."""
    if "P" in (getattr(config, "sources", None) or ""):
        given_answers(task, config.sources, config.systems)
    if hasattr(config, "attributes"):
        with contextlib.redirect_stderr(io.StringIO()):                       # its warnings come with the run
            rows = conditioning.rated_rows(task, "train", config.attributes)
        conditioning.quality_of(config, [*rows[0].attributes])
        conditioning.parse_request(config.steer, dict.fromkeys(rows[0].attributes, 9))
    if getattr(config, "refresh", False) and not task.annotate:
        raise UserError("--refresh needs annotators, which only the embedded task has")
    if hasattr(config, "check_task"):
        config.check_task(task)


def launch(train, config, known=None):
    """One run of a method: its train(run) between start and finish. Returns the final metrics.

    known: a dict that keeps the evaluations of initial policies for other runs: many arms begin with one.
    """
    Stop.cut = True
    run = start(config)
    run.known = known
    try:
        train(run)
        Stop.cut = False                                          # finish writes first, and then it prints
        return run.finish()
    except RuntimeError as error:
        ranks.check_others(error)
        raise
    finally:
        Stop.stepping, error = False, sys.exc_info()[1]
        alone = known is None                                     # an arm of the referee is not resumed
        told = alone and ranks.first() and not isinstance(error, Diverged)       # it would diverge again
        saved = any((run.out / name).exists() for name in directory.CHECKPOINTS)
        told &= not isinstance(error, UserError) or saved and run.bar is not None      # None: no step began
        if error and told and (run.out / "args.json").exists():
            print(f"the run's files are in {directory.short(run.out)}", file=sys.stderr)
            if any(run.out.glob("*.pt")):
                print("to go on:", command_that_resumes(run.out), file=sys.stderr)
            else:
                print("it had no checkpoint yet: delete them, or leave them", file=sys.stderr)
        if run.lock:
            directory.give_back(run.out, run.lock)


def command_that_resumes(out):
    """This command line, to go on with its run."""
    words = re.sub(r"\0--resume(=\w+)?(\0(True|False|true|false))?(?=\0|$)", "", "\0".join(sys.argv))
    words = words.split("\0")
    given = any(word == "--out" or word.startswith("--out=") for word in words)
    start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if ranks.count() > 1 else [
        "python"]
    return joined([*start, *words, *([] if given else ["--out", directory.short(out)]), "--resume"])


def joined(words):
    """A command line for the shell of this system; that of Windows knows no single quotes."""
    if os.name != "nt":
        return shlex.join(words)
    return " ".join(word if re.fullmatch(r"[\w+=:./\\-]+", word) else f'"{word}"' for word in words)


class Plain:
    """A stream on which control characters of texts, names and labels are shown, not obeyed."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(text.translate(common.CONTROL))

    def __getattr__(self, name):
        return getattr(self.stream, name)


def in_one_line(function):
    """Run a command line's function: what a user can cause is one line and exit status 2, not a traceback."""
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")                 # None: closed by 2>&-
    for stream in (sys.stdout, sys.stderr):                        # a terminal that cannot show every letter
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with contextlib.redirect_stdout(sys.stdout and Plain(sys.stdout)):
            function()
            if sys.stdout:                                                          # None: closed, as by >&-
                sys.stdout.flush()
    except BrokenPipeError:                                        # ... | head
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(141 if Stop.cut else 0)                           # 141: as if the system had ended it
    except (UserError, OSError) as error:
        print(f"error: {error}".translate(common.CONTROL), file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:   # OutOfMemoryError is one; those of MPS and CPU are bare
        if not (isinstance(error, MemoryError) or re.search(FULL, str(error))):
            raise
        print(f"error: the memory is full ({str(error).split('. ')[0][:200]}): give --lora_rank 16 or, "
              "with several GPUs, --shard True; --gradient_checkpointing True; a smaller --token_budget or "
              "--max_length; if it was sampling for an evaluation, a smaller --eval_samples", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + (Stop.signal or signal.SIGINT))


def hung_up(number, frame):
    """SIGHUP ends the run as SIGTERM does. The terminal is gone: nothing can be printed."""
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    Stop.handle(number, frame)


def parser_of(config_class, about=None, prog=None):
    """The parser of all options; above its error stands one line, not the list of all flags."""
    usage = "%(prog)s [--flag value ...]    (all flags: %(prog)s --help)"
    return HfArgumentParser(config_class, prog=prog, usage=usage, description=about, allow_abbrev=False)


def check_embedded(config):
    """UserError for an option of the embedded task that has no effect on the user's model or data."""
    for name in (f.name for f in fields(Config) if f.metadata["help"].startswith("embedded task:")):
        used = config.model == "tiny" if name == "layers" else config.data == "reviews"
        if not used and getattr(config, name) != getattr(type(config), name):
            raise UserError(f"--{name} is for the embedded task: it would change nothing here; leave it out")


def main(config_class, train, answer=None):
    """The command line of a script: one run, --reproduce, or for --prompt answer(config), else asking.ask.

    A UserError is printed as one line, with exit status 2.
    """
    def command():
        about = (sys.modules["__main__"].__doc__ or "").split("\n\n")[0]
        config = config_class(**vars(parser_of(config_class, about).parse_args()))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, Stop.handle)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:    # nohup has it
            signal.signal(signal.SIGHUP, hung_up)
        if config.reproduce:
            from referee.runs import check_flags, reproduce
            check_flags(config)
            reproduce(method_name(config), config)
        elif config.prompt:
            answer(config) if answer else ask(config, method_name(config))
        else:
            check_embedded(config)
            launch(train, config)

    in_one_line(command)
