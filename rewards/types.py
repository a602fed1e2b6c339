"""The items that a grader scores, and the type of a reward function."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmquest_rl.types import Message, Score

Value = float | dict[str, float | None] | None
"""The return value of a reward: a number, named components, or None if the reward does not apply."""

RewardFunction = Callable[..., Value | Awaitable[Value]]
"""`def reward(prompt, completion, answer, **columns)`: it gets the arguments that its signature names, by keyword."""


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One completion to be scored."""

    prompt: str | list[Message]
    """The prompt of the data set, before the chat template."""
    completion: str
    """The text of the completion, without special tokens."""
    answer: Any
    """The gold answer."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments: the data set's columns, and in training `completion_tokens` and `finish_reason`."""


def combine_scores(scores: Sequence[Score]) -> Score:
    """The sum of the values, with the parts and the seconds of all scores.

    If a score failed, the result is a failure of the first one's kind, because a sum without one of its terms would be
    a different reward. If no reward applies, the result has no value.
    """
    parts = {name: value for score in scores for name, value in score.parts.items()}
    seconds = sum(score.seconds for score in scores)
    failed = [score for score in scores if score.failure is not None]
    if failed:
        return Score(None, parts, failed[0].failure, "; ".join(score.detail for score in failed), seconds)
    values = [score.value for score in scores if score.value is not None]
    return Score(sum(values) if values else None, parts, None, "", seconds)
