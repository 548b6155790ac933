"""One training run: its steps, records, evaluations, checkpoints, and what it leaves behind."""
import contextlib
import copy
import functools
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, Optional

import torch
import transformers
from tqdm import tqdm
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import common
from harness import adapters, directory, loading, picture, ranks, shards
from harness.config import Config, method_name
from harness.evaluation import before_and_after, check_policy, evaluate, most_changed, texts_of
from harness.stages import Diverged, check_finite
from tasks import Task, save_model, saving, write_json, write_text

# Options of all scripts that cannot change the evaluation of the initial policy.
OF_TRAINING = {"lr", "schedule", "warmup", "batch_size", "epochs", "max_grad_norm", "reward_noise",
               "rating_noise", "pair_labels", "eval_every", "save_every", "out", "resume", "reproduce",
               "seeds", "jobs", "quiet", "shard"}
BAR = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
PLAIN = "step", "trace", "samples", "counts", "state"           # what a checkpoint keeps beside the weights


class Stop:
    """Ctrl-C, SIGTERM, SIGHUP: a step that is under way is ended first, so that it can be saved."""
    stepping, signal, cut = False, 0, False                     # cut: there is a run, and it has not ended

    @classmethod
    def handle(cls, number, frame):
        if not cls.stepping or cls.signal:                      # a second Ctrl-C does not wait
            cls.signal = number
            raise KeyboardInterrupt
        cls.signal = number
        print("\nstopping after this step", file=sys.stderr)


def now():
    """Wall clock and CPU time of this process (of all its threads), in seconds."""
    return time.time(), time.process_time()


@dataclass
class Run:
    """One training run: what it works with and what it has recorded."""
    config: Config
    out: Path
    task: Task
    tokenizer: transformers.PreTrainedTokenizerBase
    policy: torch.nn.Module
    rewards: dict[str, common.RewardModel]
    state: dict = field(default_factory=dict)       # a method's own plain values, which --resume must restore
    ask: Callable[[str], str] = str                   # what a trained policy is asked in place of a prompt
    draw: Optional[Callable] = None                   # how a trained policy answers: see evaluation.best_of
    results: dict = field(default_factory=dict)       # a method's own numbers beside the final metrics
    notes: list[str] = field(default_factory=list)    # a method's own text for the screen, after all is saved
    trained: Optional[torch.nn.Module] = None         # with optimizer and schedule: what run.steps registered
    optimizer: Optional[torch.optim.Optimizer] = None
    schedule: Optional[object] = None
    bar: Optional[tqdm] = None
    logged: dict[str, float] = field(default_factory=dict)     # what the bar shows
    step: int = 0                                     # steps done
    n_steps: int = 0
    known: Optional[dict] = None                      # evaluations of initial policies, for runs of one seed
    trace: list[dict] = field(default_factory=list)   # evaluations: before, on the way, after
    samples: dict[str, dict] = field(default_factory=dict)     # "before" and "after"
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(
        ("tokens_generated", "tokens_of_pool", "tokens_trained", "tokens_scored_reference",
         "tokens_scored_reward", "tokens_scored_value", "seconds_generating", "seconds_training",
         "cpu_seconds"), 0))
    warned: bool = False
    lock: Optional[object] = None                     # on the directory
    began: float = field(default_factory=time.time)
    clock: tuple = field(default_factory=now)         # what training took until then is counted

    @functools.cached_property
    def origin(self):
        """What --resume compares: fingerprints of the initial weights, of other models and of the data."""
        named = (vars(self.config).get(name) for name in ("policy", "reward", "value_model"))
        others = loading.weights_path(self.config), *named
        return {"build": loading.fingerprint(self.config),
                "other_models": [path and loading.fingerprint_of(path) for path in others],
                "commits": [path and loading.commit_of(path) for path in (self.config.model, *others)],
                "processes": ranks.count(),
                "data_fingerprint": directory.fingerprint_of_data(*self.task.files)}

    @property
    def resumes(self):
        """Is there a checkpoint to go on from?"""
        return self.config.resume and any((self.out / name).exists() for name in directory.CHECKPOINTS)

    @property
    def quiet(self):
        return self.config.quiet or not ranks.first()

    # ----------------------------------------------------------------------------- what a method's loop calls

    def steps(self, plan, trained, optimizer, schedule):
        """Yield (step, plan[step]), steps counted from 0, with a progress bar.

        Every step starts from random numbers of its own, drawn from the seed. Every --save_every steps, or
        every two minutes, a checkpoint is written: trained (a module), optimizer, schedule, run.state. With
        --resume they are restored first, and the run goes on exactly as if it had not been cut. Ctrl-C ends
        the run after the step, with a checkpoint.
        """
        self.trained, self.optimizer, self.schedule, self.n_steps = trained, optimizer, schedule, len(plan)
        if not plan and self.config.epochs:
            raise common.UserError("there is nothing to train on: --epochs "
                                   f"{self.config.epochs:g} gives no step")
        if self.resumes:
            self.restore()
            if not self.quiet:
                print(f"going on after step {self.step} of {len(plan)}", file=sys.stderr)
        self.count_time()
        self.begin()
        saved, wait = time.time(), directory.SAVE_SECONDS
        with tqdm(total=len(plan), initial=self.step, disable=self.quiet or None, bar_format=BAR,
                  ncols=min(80, shutil.get_terminal_size().columns)) as self.bar:
            first, began = self.step, time.time()
            for step in range(first, len(plan)):
                torch.manual_seed(random.Random(f"{self.config.seed} {step}").getrandbits(62))
                self.clock, Stop.stepping = now(), True         # evaluations and checkpoints do not count
                yield step, plan[step]
                Stop.stepping = False
                self.bar.update()
                minutes = (time.time() - began) / 60 * (len(plan) - step - 1) if step == first else 0
                if minutes > 2 and not self.quiet:
                    print(f"{len(plan)} steps, about {minutes:.0f} min", file=sys.stderr)
                every = self.config.save_every
                due = (step + 1) % every == 0 if every else time.time() - saved > wait
                if self.config.shard:                           # a checkpoint takes all processes
                    due, Stop.signal = map(max, zip(*ranks.gathered((due, Stop.signal))))
                if due or Stop.signal:
                    saved = time.time()
                    self.checkpoint()
                    wait = max(wait, 20 * (time.time() - saved))        # at most a twentieth of the time
                    saved = time.time()
                    if self.bar.disable and not (self.quiet or every or Stop.signal):       # no terminal
                        each = (saved - began) / 60 / (step + 1 - first)
                        left = f"about {each * (len(plan) - step - 1):.0f} min left"
                        print(f"step {step + 1} of {len(plan)}, {left}", file=sys.stderr)
                if Stop.signal:
                    raise KeyboardInterrupt

    def microbatches(self, rows):
        """Yield (indices [n], Batch [n*k, T]) of rows that have a prompt and k responses.

        Parts fit --token_budget; rows of like length come together; the k responses of a row keep their
        order. Of several processes (torchrun), each has a share; after the last part gradients are added up.
        With --shard, one that has fewer parts than another gets fillers: the first row, with no
        response token, so that its log-probs are 0 and have no gradient.
        """
        mine, before = ranks.share(len(rows)), dict(self.counts)
        own = self.batches([rows[i] for i in mine])
        for part, batch in self.filled(own, lambda: next(self.batches(rows[:1]))):
            yield ([0], silent(batch)) if ranks.Filler.now else ([mine[i] for i in part], batch)
        self.add_up(before)

    def batches(self, rows):
        return common.batches(
            self.tokenizer, [row.prompt for row in rows], [row.responses for row in rows],
            self.config.token_budget, self.policy.device, [row.ended for row in rows])

    def parts(self, batch):
        """Yield the rows [n] of each part of a Batch that fits --token_budget, shared like microbatches.

        With --shard, one that has fewer parts than another gets the first row again: what a part adds to loss
        and metrics is to be multiplied with run.weight, which is then 0.
        """
        mine, before = torch.tensor(ranks.share(len(batch))), dict(self.counts)
        parts = [mine[part] for part in batch[mine].split(self.config.token_budget)] if len(mine) else []
        yield from self.filled(parts, lambda: torch.tensor([0]))
        self.add_up(before)

    def filled(self, parts, filler):
        """The parts; with --shard then filler() as often as another process has more parts than this one."""
        for part in ranks.filled(parts, filler) if self.config.shard else parts:
            counts = dict(self.counts)
            yield part
            self.counts = counts if ranks.Filler.now else self.counts

    @property
    def weight(self):
        """1, or 0 during a filler, see parts."""
        return float(not ranks.Filler.now)

    def add_up(self, before):
        """After a pass over a step's rows: gradients, and what was counted since, of all processes."""
        if ranks.count() > 1:
            if self.trained is not None and torch.is_grad_enabled() and not self.config.shard:
                ranks.add_gradients(self.trained)
            for name in self.counts:
                if name.startswith("tokens"):
                    self.counts[name] = before[name] + ranks.total(self.counts[name] - before[name])

    def total(self, value):
        """The sum over processes of what a pass over microbatches or parts has added up."""
        return ranks.total(value)

    def log(self, step, metrics):
        """One line of metrics.jsonl, and the progress bar's. Ends the step: the clock of the step stops."""
        metrics = {name: float(shards.number(value)) for name, value in metrics.items()}
        if math.isinf(metrics.get("grad_norm", 0.0)):                 # clipping makes 0 of all gradients then
            raise Diverged(f"step {step + 1}: grad_norm is inf; lower --lr, or correct the model or the data")
        self.count_time()
        self.step = step + 1
        self.write({"step": self.step, **metrics})
        self.logged = metrics
        self.show()

    def show(self):
        """On the progress bar: what was logged last; after an evaluation on the way its proxy and KL, too."""
        last = self.trace[-1] if self.trace and self.trace[-1]["step"] else {}
        tested = {f"test {name}": last[f"eval/{name}"] for name in ("proxy", "kl") if f"eval/{name}" in last}
        own = list(self.logged.items())[:1 if tested else 3]
        self.bar.set_postfix_str(", ".join(f"{name.split('/')[-1]} {value:.3g}"
                                           for name, value in [*own, *tested.items()]))

    def count_time(self):
        """Add the time since the clock was set to the time of training, and set the clock anew."""
        then, self.clock = self.clock, now()
        for name, since, until in zip(("seconds_training", "cpu_seconds"), then, self.clock):
            self.counts[name] += until - since

    @contextlib.contextmanager
    def aside(self):
        """What is done within is measurement: neither its time nor its tokens are a cost of training."""
        self.count_time()
        counts = dict(self.counts)
        yield
        self.counts, self.clock = counts, now()

    def evaluation_due(self, step):
        """After every --eval_every steps, and after the last one."""
        n = self.config.eval_every
        return step + 1 == self.n_steps or bool(n) and (step + 1) % n == 0

    def evaluate(self, **own):
        """Sample the test prompts, score them, record that in metrics.jsonl; `own`: the method's own metrics.

        The first evaluation is the one before training. A run that is resumed has it already, and goes on.
        """
        if self.resumes and self.trained is None:
            return
        if not self.trace:
            self.count_time()                                        # of what was made before training
            self.begin()
        check_policy(self.policy, self.tokenizer, self.task, self.step)
        first = not self.trace and self.known is not None
        key = what_initial_evaluation_needs(self.config, self.rewards) if first else None
        metrics, samples = (self.known or {}).get(key) or evaluate(
            self.config, self.task, self.policy, self.tokenizer, self.rewards, self.samples.get("before"),
            *((self.ask, self.draw) if self.trace else ()))
        for name in self.rewards:
            check_finite(torch.tensor(samples[name]), self.step, samples["prompts"], "the reward")
        if key:
            self.known[key] = metrics, samples
        self.samples["after" if self.trace else "before"] = samples
        metrics = {"step": self.step, **metrics, **own}
        self.write(metrics)
        self.trace.append(metrics | {"tokens_generated": self.counts["tokens_generated"],
                                     "seconds_training": round(self.counts["seconds_training"], 2),
                                     "cpu_seconds": round(self.counts["cpu_seconds"], 2)})
        if self.bar is not None:
            self.show()
        self.clock = now()

    def amend(self, **own):
        """Add metrics to the evaluation just made, where they need its samples (run.samples)."""
        self.clock = now()                                          # making `own` was part of the evaluation
        if not own or self.resumes and self.trained is None:
            return
        self.trace[-1] |= own
        if ranks.first():
            file = self.out / "metrics.jsonl"
            *lines, last = file.read_text(encoding="utf-8").splitlines(True)
            write_text(file, "".join(lines) + json.dumps(json.loads(last) | own) + "\n")

    def load_reference(self):
        """The initial policy, frozen: a model of its own; with --lora_rank the policy without its adapter."""
        return loading.load_reference(self.config, self.policy)

    def load_value_model(self, path=""):
        """A common.ValueModel that starts from the path or the initial policy (of an adapter, its base)."""
        path = path or loading.weights_path(self.config)
        model = shards.load(self.config, lambda *place: common.load_value_model(path, self.tokenizer, *place))
        positions = getattr(model.base_model.config, "max_position_embeddings", None) or math.inf
        if positions < self.tokenizer.model_max_length:
            raise common.UserError(f"the value model {path} has {positions} positions: lower --max_length")
        if self.config.lora_rank:
            adapters.add(model.base_model, self.config.lora_rank)
        loading.lightened(self.config, model.base_model)
        if self.config.lora_rank:
            adapters.change_frozen(model, model.compute_dtype)
        return model

    # ------------------------------------------------------------------------------------ directory and files

    def begin(self):
        """Make the directory and args.json; drop lines of metrics.jsonl from beyond the current step."""
        own = {"method": method_name(self.config), "conversations": self.task.chat} | self.origin
        file = self.out / "metrics.jsonl"
        if ranks.first():
            write_json(self.out / "args.json", asdict(self.config) | own)
            write_text(file, "".join(directory.rows_until(file, self.step if self.trace else -1)))

    def save_json(self, name, value):
        """A file of a method's own in the run's directory."""
        if ranks.first():
            write_json(self.out / name, value)

    def save_reward_model(self, reward):
        """A reward model that the method has trained on, for --reward <out>/reward_model.

        Without a scale: its scores have moved. It gets a new one where it is maximised.
        """
        if ranks.first():
            reward.model.config.__dict__.pop("reward_scale", None)
            save_model(reward.model, reward.tokenizer, self.out / "reward_model")

    def write(self, row):
        if not ranks.first():
            return
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row) + "\n")

    def checkpoint(self):
        """state.pt: everything that --resume needs, tensors and plain values only."""
        if not ranks.first() and not self.config.shard:            # all processes have the same weights
            return
        state = {name: getattr(self, name).state_dict() for name in ("trained", "optimizer", "schedule")}
        weights = self.trained.named_parameters(remove_duplicate=False)
        for frozen in [name for name, weight in weights if not weight.requires_grad]:      # beside adapters
            del state["trained"][frozen]
        state = shards.whole(state)
        if ranks.first():
            own = {"method": method_name(self.config)} | {name: getattr(self, name) for name in PLAIN}
            directory.save_state(self.out, state | own)

    def restore(self):
        with ranks.in_turn() if self.config.shard else contextlib.nullcontext():       # whole in memory: once
            state, own = directory.load_state(self.out), method_name(self.config)
            if state.get("method", own) != own:
                raise common.UserError(f"the checkpoint in {self.out} is of {state['method']}.py, not of "
                                       f"{own}.py: give another --out")
            shards.cut(state, self.trained, self.optimizer)
        self.trained.load_state_dict(state["trained"], strict=not self.config.lora_rank)
        for name in ("optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for name in PLAIN:
            setattr(self, name, state[name])

    def finish(self):
        """Save the policy, samples.txt and run.png, print before and after; returns the final metrics."""
        before, after = self.samples["before"], self.samples.get("after", self.samples["before"])
        texts = texts_of(before, after)
        state_mb = training_state_mb(self.optimizer)                  # before the policy is cast to be saved
        policy = shards.whole_model(self.policy) if self.config.shard else self.policy
        if ranks.first():
            save_policy(policy, self.out, self.config.lora_rank)
            (self.out / directory.CHECKPOINTS[1]).unlink(missing_ok=True)
            as_it_came(self.tokenizer).save_pretrained(self.out)
            (self.out / "samples.txt").write_text("\n".join(texts), encoding="utf-8")
        seconds = time.time() - self.began
        counts = self.counts | {"state_mb": state_mb,
                                "seconds_per_step": self.counts["seconds_training"] / max(self.step, 1)}
        if not self.quiet:
            fault = picture.draw(self.out, self.samples, picture.title_of(self.config))
            shown = [label + texts[i] for label, i in most_changed(before, after, self.config.eval_samples)]
            print(before_and_after(self.trace[0], self.trace[-1]), "", *shown, sep="\n")
            pairs = len(self.task.pairs.get("test", []))
            if 0 < pairs < 30:
                print(f"{pairs} held-out pairs are too few to tell: accuracies move by {1 / pairs:.2f}")
            where = directory.short(self.out)
            print(f"{seconds:.0f} s; the policy, metrics.jsonl and samples.txt are in {where}")
            print(f"no {picture.FILE}: {fault}" if fault else f"picture: {os.path.join(where, picture.FILE)}")
            if counts["seconds_generating"]:
                sampled = counts["tokens_generated"] - counts["tokens_of_pool"]
                print(f"{sampled / counts['seconds_generating']:.0f} tokens/s generated, "
                      f"{counts['seconds_generating'] / counts['seconds_training']:.0%} of the training time")
            for note in self.notes:
                print(note)
        final = {k: v for k, v in self.trace[-1].items() if k.startswith("eval/")}
        final |= {"build": self.origin["build"],
                  "finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        return final | counts | {"seconds": seconds, "trace": self.trace, "out": str(self.out)} | self.results


def save_policy(policy, out, lora_rank):
    """save_pretrained, in the type that it came in; the adapter alone, if no token was added to the model."""
    if lora_rank and policy.embeddings_came == policy.get_input_embeddings().num_embeddings:
        with saving(out):
            return adapters.save(policy, out)
    policy = adapters.merge(policy) if lora_rank else policy
    with saving(out):
        policy.to(getattr(policy, "saved_dtype", torch.float32)).save_pretrained(out)


def as_it_came(tokenizer):
    """A copy without what this run set for itself: length, end of turn, PAD. Tokens that were added stay."""
    own, came = copy.deepcopy(tokenizer), tokenizer.init_kwargs
    own.model_max_length = came.get("model_max_length", VERY_LARGE_INTEGER)
    own.eos_token, own.pad_token = came.get("eos_token"), came.get("pad_token")
    return own


def silent(batch):
    """The rows of a batch without response tokens, for a filler; `lengths` are 1, to be divided by."""
    batch = Silent(*batch.tensors())
    batch.response_mask = torch.zeros_like(batch.response_mask)
    return batch


class Silent(common.Batch):
    @property
    def lengths(self):
        return torch.ones_like(self.input_ids[:, 0])


class Means:
    """Means over a step of values [n] that come in microbatches."""

    def __init__(self):
        self.values = {}

    def add(self, values):
        if ranks.Filler.now:
            return
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().float())

    def result(self):
        if ranks.count() == 1:
            return {name: torch.cat(values).mean() for name, values in self.values.items()}
        own = {name: (float(torch.cat(values).sum()), sum(map(len, values)))
               for name, values in self.values.items()}
        shares = [share for share in ranks.gathered(own) if share]
        return {name: sum(share[name][0] for share in shares) / sum(share[name][1] for share in shares)
                for name in shares[0]}


def training_state_mb(optimizer):
    """Megabytes (1e6) of what is trained: weights, their gradients and the optimizer's moments."""
    if not optimizer.state:                                             # no step was made: nothing is trained
        return 0.0
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(tensor.nbytes for tensor in (*weights, *weights, *moments)) / 1e6


def what_initial_evaluation_needs(config, rewards):
    """As a text, the options that can change the evaluation of the initial policy, and the rewards' scales.

    A method that maximises a reward without a scale gives it one; others leave it as it is.
    """
    names = sorted({option.name for option in fields(Config)} - OF_TRAINING)
    scales = [(name, getattr(model, "mean", 0), getattr(model, "std", 1)) for name, model in rewards.items()]
    return json.dumps([(name, getattr(config, name)) for name in names] + scales)
