"""The items that a grader scores, and the type of a reward function."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from llmquest_rl.types import Message

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
