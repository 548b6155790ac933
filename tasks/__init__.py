"""What a task is: the data a method trains on and the yardsticks it is measured by.

`tasks/reviews.py` makes one out of nothing, with a gold reward; `tasks/preferences.py` reads one from a file.
"""
from dataclasses import dataclass, field
from typing import Callable, NamedTuple


class UserError(ValueError):
    """A mistake the user can mend. `common.main` prints it as one line and exits with status 2."""


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


class Ranking(NamedTuple):
    """Several responses to one prompt. Higher scores are better; `systems` names the writers where they are known."""
    prompt: str
    responses: list[str]
    scores: list[float]
    systems: list[str] = []


class Demonstration(NamedTuple):
    prompt: str
    response: str
    attributes: dict[str, int] = {}


@dataclass
class Task:
    """Every dict maps a split ("train", "test") to rows; no prompt stands in both splits.

    `gold(prompt, response, stopped) -> float`, `fluent(response) -> bool` and `attributes(prompt, response) ->
    {name: level}` exist only where text can be judged exactly; elsewhere they are None.
    """
    name: str
    prompts: dict[str, list[str]]
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    rankings: dict[str, list[Ranking]] = field(default_factory=dict)
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)
    gold: Callable[[str, str, bool], float] | None = None
    fluent: Callable[[str], bool] | None = None
    attributes: Callable[[str, str], dict[str, int]] | None = None
