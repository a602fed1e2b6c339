"""The clipped surrogate of PPO, with separate bounds (DAPO) and an optional dual bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import PositiveFloat, model_validator

from llmquest_rl.algorithms.surrogates import SHOW_BOUNDS, Bounds, Cuts, Surrogate, Tokens
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Bounds):
    """Bounds of the ratio."""

    dual_clip: PositiveFloat | None = None
    """`clip`: ratios are clipped at this where the advantage is negative; above 1 + clip_high. null = no limit."""

    @model_validator(mode="after")
    def _dual_clip_is_above_the_upper_bound(self) -> Self:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip is {self.dual_clip:g}, but must be above 1 + clip_high = {1 + self.clip_high:g}"
            )
        return self


def loss(tokens: Tokens, settings: Settings) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and with a dual bound c, where A < 0, -max(that minimum, c A).

    PPO, arXiv 1707.06347, equation 7; with two bounds: DAPO, arXiv 2503.14476, equation 10; with the dual bound:
    dual-clip PPO, arXiv 1912.09729.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    losses = -torch.minimum(ratio * advantages, clipped * advantages)
    if settings.dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -settings.dual_clip * advantages), losses)


def cuts(tokens: Tokens, settings: Settings) -> Cuts:
    """Tokens without a gradient: the ratio is below (above) its bound, and the advantage drives it further."""
    ratio, advantages = tokens.ratio, tokens.advantages
    low = (ratio < 1 - settings.clip_low) & (advantages < 0)
    high = (ratio > 1 + settings.clip_high) & (advantages > 0)
    if settings.dual_clip is not None:
        high = high | ((ratio > settings.dual_clip) & (advantages < 0))
    return Cuts(low, high)


SURROGATE = Surrogate(loss, Settings, SHOW_BOUNDS, cuts)
