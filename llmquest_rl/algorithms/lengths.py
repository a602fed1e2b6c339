"""Length penalties: an amount that depends on a completion's length and is added to its reward.

Each function takes the rewards of one group `[samples]`, the lengths in tokens `[samples]` and the maximum completion
length, and returns the amounts `[samples]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field

from llmquest_rl.algorithms.variant import Variant, Weight
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class LengthWeight(Options):
    """Setting of every length penalty."""

    length_weight: Weight = 1.0
    """Factor of the length penalty. DAPO's rewards are +-1, so use half of its weight for rewards of 0 and 1."""


class Overlong(LengthWeight):
    """Settings of `soft_overlong`."""

    overlong_buffer: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """`soft_overlong`: the last share of `rollout.sampling.max_tokens`, in which the penalty grows from 0 to 1."""


def none(rewards: Tensor, lengths: Tensor, max_tokens: int) -> Tensor:
    """Zeros: lengths do not matter."""
    return torch.zeros_like(rewards)


def soft_overlong(rewards: Tensor, lengths: Tensor, max_tokens: int, settings: Overlong) -> Tensor:
    """0 up to L_max - L_cache, then falling in a line to -1 at L_max (DAPO, arXiv 2503.14476, equation 13)."""
    zone = settings.overlong_buffer * max_tokens
    return settings.length_weight * ((max_tokens - zone - lengths) / zone).clamp(-1.0, 0.0)


def relative(rewards: Tensor, lengths: Tensor, max_tokens: int, settings: LengthWeight) -> Tensor:
    """0.5 - (|o| - shortest) / (longest - shortest), and for wrong answers (reward <= 0) at most 0.

    Kimi k1.5, arXiv 2501.12599, section 2.3.3: 0 where all completions of the group have the same length.
    """
    spread = lengths.max() - lengths.min()
    if spread == 0:
        return torch.zeros_like(rewards)
    value = 0.5 - (lengths - lengths.min()) / spread
    return settings.length_weight * torch.where(rewards > 0, value, value.clamp(max=0.0))


LengthPenaltyFunction: TypeAlias = "Callable[[Tensor, Tensor, int], Tensor]"


@dataclass(frozen=True, slots=True)
class LengthPenalty(Variant[LengthPenaltyFunction]):
    """A length penalty, and its properties."""

    group_relative: bool = False
    """Whether the lengths of a group are compared with each other: a group of one has no penalty."""


LENGTH_PENALTIES: dict[str, LengthPenalty] = {
    "none": LengthPenalty(none),
    "soft_overlong": LengthPenalty(soft_overlong, Overlong),
    "relative": LengthPenalty(relative, LengthWeight, group_relative=True),
}
