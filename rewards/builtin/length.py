"""Length: a soft penalty for completions that are too long (DAPO, arXiv:2503.14476, eq. 13).

The penalty is 0 up to the length `max - cache`, falls linearly to -1 at `max`, and is -1 beyond it.
"""

from typing import Self

from pydantic import Field, model_validator

from llmquest_rl.options import Options


class Config(Options):
    """The lengths at which the penalty begins and ends, in tokens (in characters if `completion_tokens` is missing)."""

    max: int = Field(default=1024, gt=0)
    """Length at which the penalty is -1; DAPO: 20480."""
    cache: int = Field(default=256, gt=0)
    """Length of the interval before `max` in which the penalty grows; DAPO: 4096."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cache > self.max:
            raise ValueError(f"cache ({self.cache}) is a part of max ({self.max}), so it cannot be larger")
        return self


def reward(completion: str, config: Config, completion_tokens: int | None = None) -> float:
    """The penalty, in [-1, 0]."""
    length = len(completion) if completion_tokens is None else completion_tokens
    over = length - (config.max - config.cache)
    return -min(1.0, max(0.0, over / config.cache))


EXAMPLES = [
    ("", None, 0.0),
    ("x" * 768, None, 0.0),
    ("x" * 832, None, -0.25),
    ("x" * 1024, None, -1.0),
    ("x" * 2000, None, -1.0),
]
