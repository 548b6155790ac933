"""What a task is: the data a method trains on and the yardsticks it is measured by.

`tasks/reviews.py` makes one out of nothing, with a gold reward; `tasks/preferences.py` reads one from a file.
"""
import random
from dataclasses import dataclass, field
from typing import Callable, NamedTuple, Sequence


class UserError(ValueError):
    """A mistake the user can mend. `common.main` prints it as one line and exits with status 2."""


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
    """Several responses to one prompt. Higher scores are better; `systems` names the writers where they are known.

    `ended` says which responses end by themselves, empty: all. A sample that was cut off must not be taught to end there.
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


@dataclass
class Task:
    """Every dict but `pool` maps a split ("train", "test") to rows; no prompt stands in both splits.

    `pool` maps train prompts to samples of the initial policy, where they are at hand. pairs["off_policy"]: train pairs of a
    writer that no policy learned from. `ratings`: responses, good and bad, with levels of attributes that people gave them.

    `annotate(prompt, a, b, rng) -> bool` (does an annotator prefer a to b?), `gold(prompt, response, stopped) -> float`,
    `fluent(response) -> bool` and `attributes(prompt, response) -> {name: level}` exist only where text can be judged
    exactly; elsewhere they are None.
    """
    name: str
    prompts: dict[str, list[str]]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    rankings: dict[str, list[Ranking]] = field(default_factory=dict)
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    ratings: dict[str, list[Demonstration]] = field(default_factory=dict)
    pool: dict[str, list[str]] = field(default_factory=dict)
    annotate: Callable[[str, str, str, random.Random], bool] | None = None
    gold: Callable[[str, str, bool], float] | None = None
    fluent: Callable[[str], bool] | None = None
    attributes: Callable[[str, str], dict[str, int]] | None = None
