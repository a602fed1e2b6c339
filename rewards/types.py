"""What the grader is given, and the form of a reward function."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from llmquest_rl.types import Message

Value = float | dict[str, float | None] | None
"""What a reward returns: a number, named components, or None for "does not apply"."""

RewardFunction = Callable[..., Value | Awaitable[Value]]
"""`def reward(prompt, completion, answer, **columns)`: called by keyword with what its signature names."""


@dataclass(frozen=True, slots=True)
class GradeItem:
    """One completion to be judged."""

    prompt: str | list[Message]
    """As the data set has it, before the chat template."""
    completion: str
    """The text, without special tokens."""
    answer: Any
    """The gold answer."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments: the data set's columns; from the rollout `completion_tokens`, `finish_reason`."""
