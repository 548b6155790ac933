"""What an evening's runs (mine.py) say: a table, paired differences, and a recommendation with its doubt.

The sample is the held-out prompts: a prompt's answers are averaged first. Of k comparisons that are made at
once, each has the level 1 - 0.05/k (Bonferroni): all k intervals hold together in 95% of such evenings. One
training run of each method says nothing about other seeds.
"""
from itertools import combinations
from statistics import fmean, stdev

from referee.statistics import MOST_SEEDS, mean_interval, plus_minus, seeds_needed, share_interval, t_interval

MODEL = "your model"
FEWEST = 6                   # prompts below which no sign test reaches 5%: no difference is called one
FAR, LONG = 20.0, 2.0        # extreme: a larger KL, in nats; answers so many times as long, or as short
TOO_FEW = "too few to tell"
RULE = ("The rule: of the methods whose whole interval of the win rate lies above 0.5, whose KL is at most "
        f"{FAR:g} nats and whose answers are at most {LONG:g} times as long or as short as your model's, the "
        "one with the highest win rate. The win rate is how often an answer of the method gets a higher "
        "score than an answer of your model to the same prompt; a tie counts half.")


def by_prompt(values, n):
    return [fmean(values[i:i + n]) for i in range(0, len(values), n)]


def win_rates(ours, theirs, n):
    """For each prompt: the share of the n * n pairs of answers in which ours has the higher score."""
    return [fmean((a > b) + 0.5 * (a == b) for a in ours[i:i + n] for b in theirs[i:i + n])
            for i in range(0, len(ours), n)]


def share_of(values, k=1):
    """(mean, low, high) of values in [0, 1], one for each prompt; one of k intervals."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return fmean(values), *share_interval(fmean(values), error, len(values), 1 - 0.05 / k)


def said(mean, low, high):
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


class Evening:
    """The numbers of one evening. runs: {method: what its <name>.json holds}; state: mine.json."""

    def __init__(self, state, runs):
        self.state, self.runs, self.names = state, runs, list(runs)
        self.n, self.prompts = state["sized"]["eval_samples"], state["sized"]["eval_prompts"]
        mean, std = state["scale"]
        self.all = {MODEL: state["initial"]} | runs
        self.scores = {name: [mean + std * score for score in run["samples"]["proxy"]]
                       for name, run in self.all.items()}                           # as the reward gave them
        self.wins = {name: win_rates(self.scores[name], self.scores[MODEL], self.n) for name in runs}
        self.rates = {name: share_of(values, len(runs)) for name, values in self.wins.items()}

    def mean(self, metrics, name):
        return plus_minus(metrics[name], mean_interval(metrics.get(name + "_se"), self.prompts))

    def share(self, metrics, name, n):
        return said(metrics[name], *share_interval(metrics[name], metrics.get(name + "_se"), n))

    def table(self):
        """Rows of text: one for your model and one for each method."""
        rows = [["", "win rate", "reward", "KL, nats", "length, tokens", "ended by itself",
                 "held-out pairs told apart", "training prompts", "minutes"]]
        gold = "eval/gold" in self.all[MODEL]["metrics"]
        for name, run in self.all.items():
            metrics, plan = run["metrics"], run.get("plan")
            reward = plus_minus(*t_interval(by_prompt(self.scores[name], self.n)))
            rows.append([name, said(*self.rates[name]) if plan else "-", reward,
                         self.mean(metrics, "eval/kl"), self.mean(metrics, "eval/length"),
                         self.share(metrics, "eval/eos_rate", self.prompts), self.held_out(run),
                         worked(plan, self.state["train"]) if plan else "-",
                         f"{run['seconds'] / 60:.1f}" if plan else "-"])
            rows[-1] += [self.mean(metrics, "eval/gold")] if gold else []
        rows[0] += ["gold"] if gold else []
        return rows

    def held_out(self, run):
        """The method's own accuracy on held-out pairs, before and after, where it measures one."""
        names = [name for name in run["metrics"] if name.endswith(("accuracies", "accuracy"))]
        if "plan" not in run or not names:
            return "-"
        before = run["before"].get(names[0])
        return (f"{before:.2f}, then " if before is not None else "") + self.share(
            run["metrics"], names[0], len(self.state["agreement"]))

    def differences(self):
        """Rows of text: the reward of one less that of another, paired within a prompt, and a verdict."""
        pairs = [(b, a) for a, b in combinations(self.all, 2)]
        rows = [["difference of the reward", "mean", "verdict"]]
        for a, b in pairs:
            values = [x - y for x, y in zip(*(by_prompt(self.scores[name], self.n) for name in (a, b)))]
            mean, half = t_interval(values, 1 - 0.05 / len(pairs))
            known = len(values) >= FEWEST and abs(mean) > half
            rows.append([f"{a} - {b}", plus_minus(mean, half, "+"),
                         ("higher" if mean > 0 else "lower") if known else TOO_FEW])
        return rows

    def extreme(self, name):
        """Why a method is not recommended, whatever its win rate; "" if there is no such reason."""
        metrics = self.runs[name]["metrics"]
        length = metrics["eval/length"] / max(self.all[MODEL]["metrics"]["eval/length"], 1e-9)
        if metrics["eval/kl"] > FAR:
            return f"its KL is {metrics['eval/kl']:.0f} nats"
        if not 1 / LONG <= length <= LONG:
            return f"its answers are {length:.1f} times as long as your model's"
        return ""

    def recommendation(self):
        """Sentences: which method, what is not known of the others, how far the judge is to be trusted."""
        enough = self.prompts >= FEWEST
        better = [name for name in self.names if enough and self.rates[name][1] > 0.5]
        good = [name for name in better if not self.extreme(name)]
        sentences = []
        if good:
            best = max(good, key=lambda name: self.rates[name][0])
            sentences.append(f"Try {best}: its win rate against your model is {said(*self.rates[best])}. Its "
                             f"policy is in the directory {best} beside this page.")
            for other in (name for name in self.names if name != best):
                gaps = [a - b for a, b in zip(self.wins[best], self.wins[other])]
                mean, half = t_interval(gaps, 1 - 0.05 / len(self.names))
                if mean <= half or len(gaps) < FEWEST:
                    sentences.append(f"The prompts are {TOO_FEW} whether it is better than {other}.")
        else:
            sentences.append(f"None is better than the model you have ({', '.join(self.names)}), as far as "
                             f"these {self.prompts} prompts tell.")
        for name in better:
            if self.extreme(name):
                sentences.append(f"{name} wins by the reward, but {self.extreme(name)}: it may have found a "
                                 "fault of the reward. It is not recommended.")
        sentences += [f"{name} is worse than your model by the reward." for name in self.names
                      if enough and self.rates[name][2] < 0.5]
        return sentences + self.doubt() + self.next_steps(good)

    def doubt(self):
        right, text = self.state["agreement"], "The judge is a reward, not people."
        if not right:
            return [f"{text} There are no held-out pairs that could tell how well it agrees with people."]
        mean, low, high = share_of(right)
        found = (f"{text} On your {self.state['pairs']} held-out pairs it prefers the better answer in a "
                 f"share of {said(mean, low, high)} (mean over prompts).")
        if low <= 0.5:
            return [found, f"Your held-out pairs are {TOO_FEW} whether it agrees with people more often than "
                           "a coin. So this advice is doubtful too."]
        return [found, "A method can also win where the reward errs."]

    def next_steps(self, good):
        sentences = ["Read the answers below before you believe the table."]
        open_ = [name for name in self.names if self.rates[name][1] <= 0.5 <= self.rates[name][2]]
        if open_ and not good and self.prompts > 1:
            name = max(open_, key=lambda name: self.rates[name][0])
            gap, deviation = self.rates[name][0] - 0.5, stdev(self.wins[name])
            needed = seeds_needed(gap, deviation, 0.05 / len(self.names)) if deviation else 0
            if needed > self.prompts:
                sentences.append(f"With {f'over {MOST_SEEDS}' if needed > MOST_SEEDS else f'about {needed}'} "
                                 f"held-out prompts one could tell for {name}, if its win rate stays as it "
                                 "is (--test_data gives more prompts, and "
                                 "--eval_prompts reads more than 128).")
        return sentences


def worked(plan, total):
    """What a method was trained on: "20 of 54, 1 of 5 rounds"."""
    rounds = f", {plan['rounds']} of {plan['asked']} rounds" if plan["asked"] > 1 else ""
    return f"{plan['prompts']} of {total}{rounds}"
