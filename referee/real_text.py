"""The main arms on a real chat model, with instructions whose fulfilment a function checks.

    python -m referee real_text --model DIR --data FOLDER --seeds 3 --jobs 2     # run what is missing, report
    python -m referee real_text --report                                         # what is stored

FOLDER is what python -m tasks.verifiable wrote; experiments/real_text.py has the arms. A seed draws train
prompts from it, and trains one reward model, the proxy, from their pairs; all arms of the seed have both. The
test prompts are those of test.jsonl whose instructions have wordings that no train prompt has. What is stored
names the model and a hash of the data, no directory.
"""
import functools
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

import experiments.real_text as data
import harness
from harness import UserError, adapters, option
from harness.command_line import parser_of
from harness.rewards import load_rewards
from referee import mine, runs
from referee.arms import OWN, SET_HERE, config_of, load
from referee.statistics import plus_minus, t_interval
from referee.store import short_hash, shown
from referee.tables import arm_rows, checked, collect, markdown_table, provenance, text_table

NAME, SFT = "real_text", "SFT"
SECONDS, QUICK = (720, 900), (10, 20)          # a first guess: an arm; what a seed's arms share
MOST_SCORED = 128                              # rows that set the proxy's scale, or test it
NOT_HERE = OWN | {"policy", "reward", "reward_label", "reward_lr", "gold", "test_data", "columns", "limit",
                  "skip_bad_rows", "chat", "prompt", "out", "resume", "reproduce", "seed"}
COLUMNS = {"eval/gold": "gold", "eval/proxy": "proxy", "eval/kl": "KL, nats", "eval/length": "length, tokens",
           "eval/eos_rate": "ended", "eval/win_rate": "win rate", "cpu_seconds": "CPU s of training",
           "seconds": "s in all"}
RULES = ("Gold is the share of a prompt's instructions that an answer fulfils. ± is half a 95% t-interval "
         "over seeds; nothing corrects for the number of arms. Win rate is against SFT's answers, by gold; a "
         "tie counts half. Ended: the share of answers that end before the limit of tokens. KL is to SFT; "
         "that of best of 8 is an upper bound.")


@dataclass
class Config(harness.Config):
    data: str = option("", "the folder that python -m tasks.verifiable wrote")
    seeds: int = option(3, "how many seeds to run")
    quick: bool = option(False, "a trial of the whole way in few steps; its numbers mean nothing")


def constants(quick):
    """PROMPTS, SHARED, PROXY and ARMS of experiments/real_text.py, as {name: value}."""
    return data.QUICK if quick else {name: getattr(data, name) for name in data.QUICK}


def as_experiments(known):
    """The arms in the form of EXPERIMENTS."""
    arms = {name: {k: v for k, v in arm.items() if k not in ("about", "rows")}
            for name, arm in known["ARMS"].items()}
    shared = known["SHARED"] | {"chat": True, "gold": "tasks.verifiable:reward"}
    return {"real text": dict(arms=arms, claims=[], evaluation=shared)}


def train_proxy(config, folder, recipe, others):
    """Train the reward model of a seed; it gets mean 0 and deviation 1 on the rated answers.

    Returns how often it prefers the chosen answer, of pairs of other prompts; None where there are none.
    """
    def rows(name, kind):
        task = harness.load_task(replace(config, data=str(folder / f"{name}.json"), test_data=""))
        return sum(getattr(task, kind).values(), [])[:MOST_SCORED]

    part, task, tokenizer = folder / "proxy", harness.load_task(config), harness.load_tokenizer(config)
    torch.manual_seed(config.seed)
    recipe = harness.Recipe(**recipe, token_budget=config.token_budget, seed=config.seed, flag="lr of PROXY")
    model = harness.train_reward_model(harness.load_scorer(config), tokenizer, task.pairs["train"], recipe)
    for saved in (adapters.merge(model) if config.lora_rank else model, tokenizer):
        saved.save_pretrained(part)
    proxy, rated = load_rewards(replace(config, reward=str(part)), task)["proxy"], rows("rated", "ratings")
    scores = proxy([row.prompt for row in rated], [row.response for row in rated])
    if not scores.std() > 0:
        raise UserError("the proxy gives one score to all rated answers: the data need more pairs")
    scale = {"reward_scale": {"mean": scores.mean().item(), "std": scores.std().item()}}
    harness.write_json(part / "config.json", load(part / "config.json") | scale)
    pairs = rows("others", "pairs") if others else []
    gaps = [proxy([p.prompt for p in pairs], texts) for texts in zip(*(p.responses for p in pairs))]
    return ((gaps[0] > gaps[1]).float() + 0.5 * (gaps[0] == gaps[1])).mean().item() if pairs else None


class Work(runs.Work):
    """Before the arms of a seed its data and its proxy are made, by the first process that gets there."""

    def __init__(self, model, rows, quick, *arguments):
        self.model, self.rows, self.constants = model, rows, constants(quick)
        super().__init__(*arguments)

    def data_folder(self, seed):
        return self.runs_dir / f"seed{seed}-{self.builds.get(seed)}"

    def places(self, arm, seed):
        rows = self.constants["ARMS"][arm.name].get("rows", "pairs")
        files = {"data": f"{rows}.json", "test_data": "test.json", "reward": "proxy"}
        return {"model": self.model} | {k: str(self.data_folder(seed) / v) for k, v in files.items()}

    def config(self, seed):
        arm = next(arm for arm in self.arms.values() if arm.name == SFT)
        return config_of(arm, seed=seed, quiet=True, **self.places(arm, seed))

    def prepare(self, seed):
        self.builds[seed] = harness.fingerprint(self.config(seed))
        folder, config = self.data_folder(seed), replace(self.config(seed), reward="")
        with harness.lock(folder):
            if not (folder / "sizes.json").exists():                    # written last
                rows = harness.rows_of_seed(self.rows, seed, self.constants["PROMPTS"])
                for name, own in rows.items():
                    harness.write_json(folder / f"{name}.json", own)
                right = train_proxy(config, folder, self.constants["PROXY"], rows["others"])
                harness.write_json(folder / "sizes.json", {name: len(own) for name, own in rows.items()} | {
                    "prompts": len({row["prompt"] for row in rows["pairs"]}), "agreement": right})
        super().prepare(seed)

    def described(self, *which):
        return super().described(*which) | {"sizes": load(self.data_folder(which[1]) / "sizes.json")}


def run(config, given, results_dir="results", runs_dir="runs/referee"):
    """Run what is missing. `given` are the flags that the user gave."""
    for name in sorted(given.keys() & NOT_HERE):
        raise UserError(f"--{name} is not for {NAME}: experiments/real_text.py and --data settle it")
    if config.model == "tiny" or not config.data:
        raise UserError(f"{NAME} needs a chat model and its data: give --model DIR and --data FOLDER, which "
                        "python -m tasks.verifiable --prompts FILE --model DIR --out FOLDER makes")
    rows, known = harness.verifiable_rows(config.data), constants(config.quick)
    same = short_hash([rows, known["PROMPTS"], known["PROXY"]])                # wherever the data lie
    given = {k: v for k, v in given.items() if k not in SET_HERE} | {
        "model": Path(config.model).absolute().name if Path(config.model).exists() else config.model,
        "data": same}
    make_work = functools.partial(Work, config.model, rows, config.quick)
    runs.complete(NAME, config, range(config.seeds), results_dir, runs_dir, as_experiments(known), make_work,
                  given, QUICK if config.quick else SECONDS)


def differences(arms):
    """Gold of each arm less that of SFT, paired within the seeds that both have."""
    rows, sft = [["arm", "gold - SFT", "seeds"]], arms[SFT]
    for name, own in arms.items():
        gaps = [run["eval/gold"] - sft[seed]["eval/gold"] for seed, run in own.items()
                if seed in sft and "eval/gold" in run]                                  # else it has diverged
        rows += [[name, plus_minus(*t_interval(gaps), "+"), str(len(gaps))]] if gaps and name != SFT else []
    return rows


def how_small(view, shared):
    """The sizes of the runs that are shown, in words."""
    sizes = {run["seed"]: run["sizes"] for run in view["runs"]}.values()
    middle = {name: f"{fmean(size[name] for size in sizes):.0f}" for name in ("prompts", "pairs", "rated")}
    right = [size["agreement"] for size in sizes if size["agreement"] is not None]
    known = (f" The proxy prefers the chosen answer in a share of {fmean(right):.2f} of the pairs of other "
             "prompts." if right else "")
    return (f"How small this is: {len(sizes)} seed{'s' * (len(sizes) > 1)}, each with {middle['prompts']} "
            f"train prompts, {middle['pairs']} pairs and {middle['rated']} rated answers; at most "
            f"{shared['eval_prompts']} test prompts, {shared['eval_samples']} answers each (best of 8: 1). "
            f"No setting was tuned.{known}")


def parts(path):
    """[(rows of a table or None, text)] of one file of results."""
    results = checked(load(path), path)
    known = constants(results["config"].get("quick"))
    view, collected = (f(NAME, results, as_experiments(known)) for f in (shown, collect))
    if not (arms := {name: own for name, own in collected["real text"].items() if own}):
        return [(None, f"{path.name} has no run of the present arms.")]
    about = [["arm", "what it learns from"], *([name, known["ARMS"][name]["about"]] for name in arms)]
    small = f"{view['config']['model']}. {how_small(view, known['SHARED'] | view['config'])}"
    gaps = [(differences(arms), "Paired within seeds.")] if SFT in arms and len(arms) > 1 else []
    return [(about, small), (arm_rows(arms, COLUMNS), RULES), *gaps, (None, provenance(view))]


def files(results_dir):
    return sorted(Path(results_dir).glob(f"{NAME}@*.json"))


def report(results_dir="results"):
    """Print the tables of all models and data."""
    if not (found := files(results_dir)):
        raise UserError(f"no run is stored: python -m referee {NAME} --model DIR --data FOLDER makes them")
    for rows, text in (part for path in found for part in [(None, str(path)), *parts(path)]):
        print("\n" + "\n".join(([text_table(rows, 130)] if rows else []) + [textwrap.fill(text, 110)]))


def block(results_dir="results"):
    """The same in Markdown, for docs/comparison.md; without trials."""
    found = [part for path in files(results_dir) if not checked(load(path), path)["config"].get("quick")
             for rows, text in parts(path) for part in ([markdown_table(rows)] if rows else []) + [text]]
    return "\n\n".join(found) or f"Not run yet: `python -m referee {NAME} --model DIR --data FOLDER`."


def main(words):
    """The command line: python -m referee real_text."""
    flags = [word for word in words if word != "--report"]
    parser = parser_of(Config, __doc__.split("\n")[0], f"python -m referee {NAME}")
    config = Config(**vars(parser.parse_args(flags)))
    if "--report" not in words:
        run(config, mine.given(Config, flags, parser.prog))
    report()
