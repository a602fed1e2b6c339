"""What the length of a completion adds to its reward.

Each function takes the rewards of one group [samples], lengths in tokens [samples], the longest completion allowed and
the share of it that is the soft zone; it gives what is added [samples].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def none(rewards: Tensor, lengths: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """Nothing."""
    return torch.zeros_like(rewards)


def soft_overlong(rewards: Tensor, lengths: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """0 up to L_max - L_cache, then falling in a line to -1 at L_max (DAPO, arXiv 2503.14476, equation 13)."""
    zone = buffer * max_tokens
    return ((max_tokens - zone - lengths) / zone).clamp(-1.0, 0.0)


def relative(rewards: Tensor, lengths: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """0.5 - (|o| - shortest) / (longest - shortest), and for wrong answers (reward <= 0) at most 0.

    Kimi k1.5, arXiv 2501.12599, section 2.3.3: nothing where all of the group have the same length.
    """
    spread = lengths.max() - lengths.min()
    if spread == 0:
        return torch.zeros_like(rewards)
    value = 0.5 - (lengths - lengths.min()) / spread
    return torch.where(rewards > 0, value, value.clamp(max=0.0))


LENGTH_PENALTIES: dict[str, Callable[[Tensor, Tensor, int, float], Tensor]] = {
    "none": none,
    "soft_overlong": soft_overlong,
    "relative": relative,
}
