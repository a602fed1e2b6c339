"""The form of a rule on several options."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.config.schema import Config


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on several options."""

    key: str
    """The option to change if the rule is broken."""
    holds: Callable[[Config], bool]
    """Whether a configuration follows the rule."""
    message: str
    """The reason and the remedy."""
    applies_to: Literal["rollout", "dataset", "any"] = "any"
    """The source of the objective's batches. The rule does not apply to configurations with another source."""
