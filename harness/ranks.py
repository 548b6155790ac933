"""Several processes: `torchrun --nproc-per-node 2 dpo.py ...`. Each has the models whole (data parallel).

Every process goes through the same program with the same random numbers. Of a step's rows, and of prompts to
answer, it reads its share; then gradients and numbers are added up. A loss is a mean over the rows of the
step, so its gradient is the sum of the shares' gradients, whatever the number of processes. The first process
alone writes and prints. Rewards, and values and log-probs of rollouts, are computed by each process anew.

With --shard (shards.py) no process has a model whole, and all must make equally many passes: `filled`.
"""
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

import common
from common import UserError
from harness import progress

ENDED = "another process of this run has ended: see its message; or the connection has failed ({}). A " \
        "checkpoint goes on with --resume, with any number of processes"

NEEDED = "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"      # torchrun sets them
PATIENCE = datetime.timedelta(days=1)        # the first may train a reward model while the others wait for it


def joined():
    return dist.is_available() and dist.is_initialized()               # some builds of torch have none of it


def count():
    return dist.get_world_size() if joined() else 1


def number():
    return dist.get_rank() if joined() else 0


def first():
    return number() == 0


def start(device):
    """Join the processes that torchrun started, if it did; the others than the first print errors only."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not joined():
        lost = [name for name in NEEDED if name not in os.environ]
        if lost:
            raise UserError(f"WORLD_SIZE is set, and {', '.join(lost)} is not: start several processes with "
                            "torchrun, or unset WORLD_SIZE")
        cuda = common.pick_device(device).type == "cuda"
        if common.pick_device(device).type == "mps":
            raise UserError("several processes need GPUs of NVIDIA, or --device cpu")
        if cuda:
            place, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if place >= here:
                raise UserError(f"this machine has {here} GPUs: give torchrun --nproc-per-node {here}")
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
        if not first():
            sys.stdout, sys.stderr = (Without(stream, starts) for stream, starts in (
                (sys.stdout, ""), (sys.stderr, "warning:")))


class Without:
    """A stream without the texts that start so, and without the end of line after them."""

    def __init__(self, stream, start):
        self.stream, self.start, self.left_out = stream, start, False

    def write(self, text):
        self.left_out = text.startswith(self.start) or self.left_out and text == "\n"
        return len(text) if self.left_out else self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def fork_rng():
    """What is drawn inside changes no random number outside; of this process's GPU, and no other GPU's."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def share(n):
    """Which of n rows this process reads."""
    return range(number(), n, count())


@contextlib.contextmanager
def together():
    """UserError where another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:                          # of gloo and of NCCL
        raise ended(error) from None


def ended(error):
    return UserError(ENDED.format(" ".join(str(error).split())[:200]))


def check_others(error):
    """UserError if this RuntimeError, of a forward or backward pass, says that another process has ended."""
    if joined() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
        raise ended(error) from None


@contextlib.contextmanager
def in_turn():
    """The processes of a machine do what is within one after another."""
    mine, all_here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    for _ in range(mine):
        gathered(None)
    yield
    for _ in range(all_here - mine):
        gathered(None)


def gathered(value):
    """[value of each process], any picklable one, made by this program."""
    found = [value] * count()
    if count() > 1:
        with together():
            dist.all_gather_object(found, value)
    return found


def total(value):
    """The sum over processes of a number, or of a tensor, which stays where it is."""
    if count() == 1:
        return value
    device = value.device if torch.is_tensor(value) else "cpu"            # without rows it is a number
    return sum(v.to(device) if torch.is_tensor(v) else v for v in gathered(
        value.detach().cpu() if torch.is_tensor(value) else value))


def from_first(make):
    """make() of the first process, in all of them."""
    return gathered(make() if first() else None)[0]


class Filler:
    """A part that only keeps this process in step with others that have more: is one under way?"""
    now = False


def filled(parts, filler):
    """Yield the parts, then filler() as often as the process with most parts has more than this one."""
    parts = [*parts]
    most = max(gathered(len(parts)))
    yield from parts
    Filler.now = True
    try:
        for _ in range(most - len(parts)):
            yield filler()
    finally:
        Filler.now = False


def first_makes(make):
    """make() in the first process, then in the others, where it finds the files that the first has made.

    They wait, because save_pretrained writes nothing in them.
    """
    if first():
        made = make()
    gathered(None)
    return made if first() else make()


def add_gradients(module):
    """Add up the gradients of all processes; a process that had no row counts as 0."""
    with together():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)


def wait(model):
    """Until all processes have sampled: a model in shards takes all of them."""
    getattr(model, "wait", bool)()


def generate(model, tokenizer, prompts, n=1, *args, **kwargs):
    """common.generate, each process its share of the prompts. The random numbers of all stay the same."""
    if count() == 1:
        with progress.bar(len(prompts) * n, "sampling") as bar:
            kwargs |= {} if bar.disable else {"done": bar.update}
            return common.generate(model, tokenizer, prompts, n, *args, **kwargs)
    mine, seed, rows = share(len(prompts)), int(torch.randint(2 ** 31, ())), []
    with fork_rng():
        torch.manual_seed(seed + number())
        if mine:
            batch = common.generate(model, tokenizer, [prompts[i] for i in mine], n, *args, **kwargs)
            before = batch.attention_mask - batch.response_mask
            rows = [tuple(ids[mask.bool()].tolist() for mask in masks)
                    for ids, *masks in zip(batch.input_ids, before, batch.response_mask)]
        wait(model)
    shares = gathered(rows)
    rows = [shares[i % count()][i // count() * n + k] for i in range(len(prompts)) for k in range(n)]
    return common.pack(rows, tokenizer.pad_token_id)
