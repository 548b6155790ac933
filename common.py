"""What the nine methods share: options, the stages before a method, evaluation, and one run from start to finish.

The language-model half (batches, log-probabilities, loading, sampling) stands in lm.py, the steps of training and the
stages before a method in stages.py, what two methods write into prompts in conditioning.py; methods see all of it here.

    python common.py        # build the embedded task's models for --seed 0 and print their vital figures, <= 2 minutes
"""
import hashlib
import inspect
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Callable, ClassVar, Literal, Optional, get_args, get_origin

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, HfArgumentParser

from conditioning import (ROOT, add_tags, complete_prompt, complete_request, curve, latest_run, load_attributes, parse_request, probe,
                          rated_rows, rating_error, runs_of, slope, spearman, steering, steering_metrics, table)
from lm import (Batch, RewardModel, batches, concat, decode, encode, extend_vocabulary, finished, gather_logps, generate, in_parts,
                kl_to_reference, load, load_policy, load_reference, load_reward_model, load_tokenizer, load_value_model,
                pick_device, policy_path, save_model, sequence_logps, sequence_scores, token_logps, token_values, warn,
                with_prompts)
from stages import (candidate_reward, candidates, check_finite, check_policy, epochs, fit, given_answers, minimise,
                    optimizer_and_schedule, optimizer_step, plan_of, response_logps, reward_model_losses, reward_to_maximise,
                    rollout, sample_rankings, score_metrics, scored, train_attribute_model, train_reward_model, train_sft)
from tasks import Demonstration, Pair, Ranking, Task, UserError

transformers.logging.set_verbosity_error()                       # no load reports for the new head of a reward model
transformers.logging.disable_progress_bar()
CACHE = Path(os.environ.get("ALIGNMENT_CACHE", ROOT / "cache"))


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Options of every script. A method's Config adds its own knobs and may change these defaults."""
    LR: ClassVar = {"tiny": 5e-4, "real": 1e-6}                # what lr is when it is not given
    MAX_NEW_TOKENS: ClassVar = {"tiny": 40, "real": 128}
    MAX_LENGTH: ClassVar = {"tiny": 160, "real": 512}
    EPOCHS: ClassVar = {"tiny": 1.0, "real": 1.0}

    model: str = option("tiny", "'tiny' (built here, nothing downloaded) or any causal LM: a directory or a hub id")
    policy: str = option("", "start from this saved policy, which is then the reference too")
    data: str = option("reviews", "'reviews' (built in), a .jsonl or .jsonl.gz file, or a hub data set id")
    reward: str = option("", "reward model, directory or hub id; default: trained from the pairs; 'gold': the true one; 'none'")
    reward_label: str = option("", "which label of a reward model with several labels is the reward")
    reward_lr: float = option(1e-5, "learning rate of a reward model that is trained from the pairs of --data")
    limit: int = option(0, "read only the first LIMIT rows of the data file (0: all)")
    skip_bad_rows: bool = option(False, "leave out (and count) empty, equal or mismatched rows instead of stopping")
    chat: bool = option(False, "wrap plain-text prompts as a user turn of the tokenizer's chat template")
    max_length: Optional[int] = option(None, "tokens of prompt and response, 3/4 for the prompt (tiny 160, else 512)")
    max_new_tokens: Optional[int] = option(None, "tokens sampled at most per response (tiny 40, else 128)")
    temperature: float = option(1.0, "sampling temperature of evaluation and of methods that sample")
    lr: Optional[float] = option(None, "peak learning rate; the default depends on the model")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = option("constant_with_warmup", "of the learning rate")
    warmup: float = option(0.1, "share of the steps over which the learning rate rises linearly")
    batch_size: int = option(64, "prompts per optimizer step")
    epochs: Optional[float] = option(None, "passes over the training rows; the default depends on the model")
    token_budget: int = option(16384, "padded tokens per forward pass; batches are split to fit, to the same effect")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    eval_prompts: int = option(128, "test prompts sampled for evaluation")
    eval_samples: int = option(4, "samples per test prompt")
    eval_every: int = option(0, "evaluate every so many steps (0: only before and after)")
    save_every: int = option(200, "write a checkpoint for --resume every so many steps (0: never)")
    reward_noise: Literal["none", "prompt", "response"] = option(
        "none", "add noise of one standard deviation to the reward that is maximised: one draw per prompt, or per response")
    label_noise: float = option(0.0, "embedded task: share of the proxy's and the pairs' labels that are turned round")
    rating_noise: float = option(2.0, "embedded task: deviation of people's ratings of attributes from the truth, in levels")
    seed: int = option(0, "draws everything: annotators, SFT policy, reward models, order, samples")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "auto takes CUDA, then MPS, then the CPU")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 autocast on CUDA, else float32")
    out: str = option("", "where the run is written (default: the first free runs/<method>/<number>)")
    resume: bool = option(False, "go on with the run in --out")
    reproduce: bool = option(False, "run the paper's experiments through compare.py")
    seeds: int = option(5, "how many seeds --reproduce runs")
    quiet: bool = option(False, "no tables and no samples on the screen")

    def __post_init__(self):
        for f in fields(self):                                      # the command line checks these itself
            for kind in (f.type, *get_args(f.type)):                 # Literal, or Optional of one
                if get_origin(kind) is Literal:
                    self.check(lambda value: value in get_args(kind), f"be one of {', '.join(get_args(kind))}", f.name)
        kind = "tiny" if self.model == "tiny" else "real"
        for name in ("lr", "epochs", "max_new_tokens", "max_length"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self, name.upper())[kind])
        self.check(lambda value: value > 0, "be above 0", "lr", "batch_size", "token_budget", "temperature",
                   "max_new_tokens", "eval_prompts", "eval_samples", "seeds")
        self.check(lambda value: 0 <= value < 0.5, "be in [0, 0.5)", "label_noise")
        self.check(lambda value: value >= 0, "not be negative", "epochs", "limit", "seed", "eval_every", "save_every", "warmup",
                   "rating_noise")
        if self.max_new_tokens > self.max_length // 4:
            raise UserError(f"--max_new_tokens {self.max_new_tokens} is more than a quarter of --max_length "
                            f"{self.max_length}; prompts may take the other three: raise --max_length")
        if self.resume and not self.out:
            raise UserError("--resume needs --out: the directory of the run to go on with")
        if self.model != "tiny" and self.data == "reviews":
            raise UserError(f"--model {self.model} needs --data: a .jsonl file or a hub data set id")

    def check(self, good, must, *names):
        """UserError for the first of the named options that is given and not good."""
        for name in names:
            if getattr(self, name) is not None and not good(getattr(self, name)):
                raise UserError(f"--{name} must {must}, not {getattr(self, name)}")


# --------------------------------------------------------------------------------------------------- task and rewards

def write_json(path, value):
    """Write under a temporary name, then rename: a killed run leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def load_task(config):
    """The data to train on and the yardsticks; the embedded task's models are built at the first use of a seed."""
    if config.data == "reviews":
        from tasks import build
        return build.load_task(config)
    from tasks import preferences
    tokenizer = load_tokenizer(policy_path(config), config)
    return preferences.load(config.data, tokenizer, config.limit, config.chat, config.skip_bad_rows)


def load_rewards(config, task):
    """{"proxy": what methods may optimise, "judge": what they never see}, as far as the run has them.

    The proxy is --reward, or the embedded task's, or one trained here from the task's pairs and kept in the cache.
    """
    if config.reward == "none":
        return {}
    if config.reward == "gold" and not task.gold:
        raise UserError("--reward gold: only the embedded task has a true reward; name a reward model, or leave it out")
    if config.reward not in ("", "gold"):
        return {"proxy": load_reward_model(config.reward, config)}
    if config.data == "reviews":
        from tasks import build
        return {name: load_reward_model(path, config) for name, path in build.reward_models(config).items()}
    pairs, start = task.pairs.get("train"), policy_path(config)
    if not pairs:
        warn("no pairs to train a reward model from and no --reward: samples go without a proxy reward")
        return {}
    settings = Config(**{f.name: getattr(config, f.name) for f in fields(Config)} | dict(      # none of the method's own
        lr=config.reward_lr, epochs=1, schedule="linear", warmup=0.1, batch_size=16, max_grad_norm=1.0))
    key = json.dumps([str(start), settings.lr, settings.seed, settings.max_length, pairs])
    path = CACHE / "rewards" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not path.exists():
        torch.manual_seed(config.seed)
        tokenizer = load_tokenizer(start, config)
        model = load(AutoModelForSequenceClassification, start, config, num_labels=1)
        save_model(train_reward_model(model, tokenizer, pairs, settings), tokenizer, path)
    return {"proxy": load_reward_model(path, config)}


# -------------------------------------------------------------------------------------------------------- evaluation

def mean_and_error(values):
    """Mean and standard error of values [P, n]: n samples of each of P prompts, which are the independent units."""
    means = values.float().mean(1)
    return means.mean().item(), (means.std() / len(means) ** 0.5).item() if len(means) > 1 else 0.0


def evaluate(config, task, policy, tokenizer, rewards, start=None, ask=str):
    """Sample the test prompts and measure; the same prompts and random numbers at every call with one config.

    Args:
        rewards: {name: RewardModel}. start: what this function returned as samples before training. ask: what the policy is
            asked in place of a prompt; the reference and the rewards see the prompt itself.
    Returns:
        metrics: {"eval/<name>": mean, "eval/<name>_se": standard error over prompts}. gold, fluency if the task has
            them; proxy, judge; kl = nats per sequence against the initial policy, the k1 estimate on the policy's own
            samples; win_rate against `start` by gold, else proxy (a tie counts half); length in tokens with EOS;
            and win_rate_<name> by the other rewards; eos_rate; distinct_2 = different word pairs over all word pairs.
        samples: {"prompts", "responses", and each reward's scores}, lists of eval_prompts * eval_samples.
    """
    n = config.eval_samples
    prompts = task.prompts["test"][:config.eval_prompts]
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        asked = [ask(prompt) for prompt in prompts]
        batch = generate(policy, tokenizer, asked, n, config.temperature, max_new_tokens=config.max_new_tokens)
    same = asked == prompts
    prompts = [prompt for prompt in prompts for _ in range(n)]
    plain = None if same else with_prompts(tokenizer, batch, prompts)
    responses, ended = decode(tokenizer, batch), finished(tokenizer, batch)
    values = {"length": batch.lengths, "eos_rate": ended, "kl": kl_to_reference(config, policy, batch, plain)}
    if task.gold:
        values["gold"] = torch.tensor([task.gold(*row) for row in zip(prompts, responses, ended.tolist())])
    if task.fluent:
        values["fluency"] = torch.tensor([task.fluent(text) for text in responses])
    values |= {name: model(prompts, responses) for name, model in rewards.items()}
    samples = {"prompts": prompts, "responses": responses}
    for name in ("gold", *rewards):
        if name in values:
            samples[name] = values[name].tolist()
            if start:
                before = torch.tensor(start[name])
                wins = (values[name] > before) + 0.5 * (values[name] == before)
                values["win_rate" if "win_rate" not in values else f"win_rate_{name}"] = wins
    metrics = {}
    for name, value in values.items():
        metrics[f"eval/{name}"], metrics[f"eval/{name}_se"] = mean_and_error(value.view(-1, n))
    words = [text.split() for text in responses]
    bigrams = [pair for text in words for pair in zip(text, text[1:])]
    metrics["eval/distinct_2"] = len(set(bigrams)) / max(len(bigrams), 1)
    return metrics, samples


# ----------------------------------------------------------------------------------------------------------- one run

@dataclass
class Run:
    """One training run: what it works with and what it has recorded."""
    config: Config
    out: Path
    task: Task
    tokenizer: transformers.PreTrainedTokenizerBase
    policy: torch.nn.Module
    rewards: dict[str, RewardModel]
    trained: Optional[torch.nn.Module] = None                  # what the optimizer updates, if that is more than the policy
    state: dict = field(default_factory=dict)                  # a method's numbers, rows and tensors that --resume must restore
    ask: Callable[[str], str] = str                            # what a trained policy is asked in place of a prompt
    optimizer: Optional[torch.optim.Optimizer] = None
    schedule: Optional[object] = None
    bar: Optional[tqdm] = None
    step: int = 0
    trace: list[dict] = field(default_factory=list)            # evaluations: before, on the way, after
    samples: dict[str, dict] = field(default_factory=dict)     # "before" and "after"
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(
        ("tokens_generated", "tokens_trained", "seconds_generating", "seconds_training"), 0))
    warned: bool = False
    began: float = field(default_factory=time.time)


def start(config):
    """Load everything a run needs; refuses an output directory that holds another run."""
    torch.manual_seed(config.seed)
    out = output_directory(config)
    task = load_task(config)
    began = time.time()
    rewards = load_rewards(config, task)
    policy, tokenizer = load_policy(config), load_tokenizer(policy_path(config), config)
    count_cut_prompts(tokenizer, task)
    run = Run(config, out, task, tokenizer, policy, rewards, began=began)
    check_policy(run)
    torch.manual_seed(config.seed)                             # whatever was trained or loaded from the cache until here
    return run


def output_directory(config):
    """--out, or the first free number under runs/<method>."""
    bookkeeping = ("resume", "quiet", "device", "out", "save_every", "seeds")
    settings = {k: v for k, v in asdict(config).items() if k not in bookkeeping}
    if not config.out:
        home = runs_of(config)
        taken = [int(d.name) for d in home.glob("*") if d.name.isdigit()]
        return home / f"{max(taken, default=0) + 1:03d}"
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a directory")
    if config.resume:
        if not (out / "state.pt").exists():
            raise UserError(f"nothing to resume in {out}: it holds no state.pt (see --save_every); delete it")
        old = json.loads((out / "args.json").read_text())
        changed = [k for k, v in settings.items() if old.get(k) != v]
        if changed:
            raise UserError(f"{out} was run with other options: give {', '.join('--' + k for k in changed)} as before")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds another run: --resume goes on with one that was cut; or give another --out")
    return out


def count_cut_prompts(tokenizer, task):
    """Say once how many prompts are longer than the context allows."""
    room = tokenizer.model_max_length
    prompts = [p for rows in task.prompts.values() for p in rows]
    long = sum(len(ids) > room * 3 // 4 for ids in tokenizer(prompts, add_special_tokens=False).input_ids)
    if long:
        warn(f"{long} of {len(prompts)} prompts are longer than {room * 3 // 4} tokens: cut from the left "
             "(--max_length sets the limit)")


def steps(run, plan, measure=dict, updates=None):
    """Yield (step, plan[step]), with a progress bar; evaluates before, on the way and after, and writes checkpoints.

    `measure()` gives a method's own metrics for each evaluation; `updates` says how many optimizer steps the plan takes, if
    not one each.
    Random numbers are drawn anew from the seed at every step, so evaluations on the way change nothing, and a resumed
    run goes on exactly where its checkpoint stands.
    """
    config = run.config
    run.trained = run.trained or run.policy
    run.optimizer, run.schedule = optimizer_and_schedule(run.trained, config, updates or len(plan))
    if config.resume:
        restore(run)
    write_json(run.out / "args.json", asdict(config))
    metrics_file = run.out / "metrics.jsonl"
    kept = metrics_file.read_text().splitlines(True) if metrics_file.exists() else []
    metrics_file.write_text("".join(line for line in kept if json.loads(line)["step"] <= run.step))
    if not run.trace:
        record(run, measure)
    with tqdm(total=len(plan), initial=run.step, disable=config.quiet or None) as run.bar:
        for step in range(run.step, len(plan)):
            torch.manual_seed(random.Random(f"{config.seed} {step}").getrandbits(62))
            began = time.time()
            yield step, plan[step]
            run.counts["seconds_training"] += time.time() - began
            run.step = step + 1
            run.bar.update()
            if config.eval_every and run.step % config.eval_every == 0 or run.step == len(plan):
                record(run, measure)
            if config.save_every and run.step % config.save_every == 0:
                checkpoint_run(run)


def begin(run):
    """Evaluate before a method changes the model for its purposes; for the others steps() does it."""
    if not run.config.resume:
        run.out.mkdir(parents=True, exist_ok=True)
        record(run, dict)


def record(run, measure):
    """Evaluate now, into the trace and metrics.jsonl."""
    check_policy(run)
    metrics, samples = evaluate(run.config, run.task, run.policy, run.tokenizer, run.rewards, run.samples.get("before"),
                                run.ask if run.trace else str)
    run.samples["after" if run.trace else "before"] = samples
    metrics = {"step": run.step, **metrics, **measure()}
    write_line(run, metrics)
    run.trace.append(metrics | {"tokens_generated": run.counts["tokens_generated"],
                                "seconds_training": round(run.counts["seconds_training"], 2)})


def log(run, step, metrics):
    """One line of metrics.jsonl, and the progress bar's; tensors become numbers."""
    metrics = {name: float(value) for name, value in metrics.items()}
    write_line(run, {"step": step + 1, **metrics})
    run.bar.set_postfix({name.split("/")[-1]: f"{value:.3g}" for name, value in list(metrics.items())[:3]})


def write_line(run, row):
    with open(run.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


PLAIN = "step", "trace", "samples", "counts", "state"          # what a checkpoint keeps beside the weights


def checkpoint_run(run):
    """state.pt: everything that --resume needs, tensors and plain values only."""
    part = run.out / "state.pt.part"
    torch.save({"trained": run.trained.state_dict(), "optimizer": run.optimizer.state_dict(),
                "schedule": run.schedule.state_dict()} | {name: getattr(run, name) for name in PLAIN}, part)
    part.replace(run.out / "state.pt")


def restore(run):
    with torch.serialization.safe_globals([Pair, Ranking]):
        state = torch.load(run.out / "state.pt", weights_only=True, map_location="cpu")
    for name in ("trained", "optimizer", "schedule"):
        getattr(run, name).load_state_dict(state[name])
    for name in PLAIN:
        setattr(run, name, state[name])


def finish(run):
    """Save the policy and samples.txt, print before and after; returns the final metrics as compare.py reads them."""
    run.policy.save_pretrained(run.out)
    run.tokenizer.save_pretrained(run.out)
    before, after = run.samples["before"], run.samples["after"] if "after" in run.samples else run.samples["before"]
    texts = [f"{prompt}\n  before: {old}\n  after:  {new}\n" for prompt, old, new in
             zip(before["prompts"], before["responses"], after["responses"])]
    (run.out / "samples.txt").write_text("\n".join(texts))
    seconds = time.time() - run.began
    counts = run.counts | {"state_mb": training_state_mb(run.optimizer),
                           "seconds_per_step": run.counts["seconds_training"] / max(run.step, 1)}
    if not run.config.quiet:
        print(before_and_after(run.trace[0], run.trace[-1]), "", *texts[::run.config.eval_samples][:3], sep="\n")
        print(f"{seconds:.0f} s; the policy, metrics.jsonl and samples.txt are in {os.path.relpath(run.out)}")
        if counts["seconds_generating"]:
            print(f"{counts['tokens_generated'] / counts['seconds_generating']:.0f} tokens/s generated, "
                  f"{counts['seconds_generating'] / counts['seconds_training']:.0%} of the training time")
    final = {k: v for k, v in run.trace[-1].items() if k.startswith("eval/")}
    return {**final, **counts, "seconds": seconds, "trace": run.trace, "out": str(run.out)}


def training_state_mb(optimizer):
    """Megabytes (1e6) of what is trained: weights, their gradients and the optimizer's moments, as they lie in memory."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in (*weights, *weights, *moments)) / 1e6


def before_and_after(before, after):
    """A table of the metrics, each with its standard error over test prompts."""
    lines = [f"{'':28}{'before':>18}{'after':>18}"]
    for name in after:
        if name.startswith("eval/") and not name.endswith("_se"):
            cells = [f"{row[name]:.3f}" + (f" ± {row[name + '_se']:.3f}" if name + "_se" in row else " " * 8)
                     if name in row else "" for row in (before, after)]
            lines.append(f"{name.removeprefix('eval/'):28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main(config_class, run, experiments=None):
    """The command line of a script: one run, or --reproduce; a UserError is one line and exit status 2."""
    try:
        parser = HfArgumentParser(config_class, description=(sys.modules["__main__"].__doc__ or "").split("\n\n")[0])
        config = config_class(**vars(parser.parse_args()))
        if config.reproduce:
            import compare
            compare.reproduce(Path(inspect.getfile(config_class)).stem, config)
        else:
            run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def test_pool(config):
    """(proxy [P, N], gold [P, N]) of N SFT samples of each test prompt, for best-of-n curves; None without a gold."""
    if config.data != "reviews":
        return None
    from tasks import build
    return build.test_pool(config)


if __name__ == "__main__":
    from tasks import build
    main(Config, build.report)
