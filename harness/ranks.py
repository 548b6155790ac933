"""Several processes: `torchrun --nproc-per-node 2 dpo.py ...`. Each has the models whole (data parallel).

Every process goes through the same program with the same random numbers. Of a step's rows, and of prompts to
answer, it reads its share; then gradients and numbers are added up. A loss is a mean over the rows of the
step, so its gradient is the sum of the shares' gradients, whatever the number of processes. The first process
alone writes and prints. Rewards, and values and log-probs of rollouts, are computed by each process anew.
"""
import contextlib
import os
import sys

import torch
import torch.distributed as dist

import common
from common import UserError


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
        cuda = common.pick_device(device).type == "cuda"
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")
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


def share(n):
    """Which of n rows this process reads."""
    return range(number(), n, count())


@contextlib.contextmanager
def together():
    """UserError where another process has ended."""
    try:
        yield
    except RuntimeError:                                   # of gloo and of NCCL
        raise UserError("another process of this run has ended: see its message. A checkpoint goes on with "
                        "--resume, with any number of processes") from None


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
    return sum(v.to(value.device) if torch.is_tensor(value) else v for v in gathered(
        value.detach().cpu() if torch.is_tensor(value) else value))


def from_first(make):
    """make() of the first process, in all of them."""
    return gathered(make() if first() else None)[0]


def add_gradients(module):
    """Add up the gradients of all processes; a process that had no row counts as 0."""
    with together():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)


def generate(model, tokenizer, prompts, n=1, *args, **kwargs):
    """common.generate, each process its share of the prompts. The random numbers of all stay the same."""
    if count() == 1:
        return common.generate(model, tokenizer, prompts, n, *args, **kwargs)
    mine, seed, rows = share(len(prompts)), int(torch.randint(2 ** 31, ())), []
    with torch.random.fork_rng():
        torch.manual_seed(seed + number())
        if mine:
            batch = common.generate(model, tokenizer, [prompts[i] for i in mine], n, *args, **kwargs)
            before = batch.attention_mask - batch.response_mask
            rows = [tuple(ids[mask.bool()].tolist() for mask in masks)
                    for ids, *masks in zip(batch.input_ids, before, batch.response_mask)]
    shares = gathered(rows)
    rows = [shares[i % count()][i // count() * n + k] for i in range(len(prompts)) for k in range(n)]
    return common.pack(rows, tokenizer.pad_token_id)
