"""The surrogate of GMPO: the geometric mean of ratios that are clipped token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.ratios import bounded_exp, sequence_mean
from llmquest_rl.algorithms.surrogates import SHOW_BOUNDS, Bounds, Cuts, Surrogate, Tokens
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens, settings: Bounds) -> Tensor:
    """-A exp(mean of c over the sequence), c = min(log r, high) where A > 0, max(log r, -low) elsewhere (GMPO, arXiv
    2507.20673, its objective).

    Tokens are clipped one by one, before the mean: a token that is cut loses its gradient, and no other token does.
    """
    low, high = settings.clip_low, settings.clip_high
    log_ratio = tokens.ratio.log()
    clipped = torch.where(tokens.advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    return -tokens.advantages * bounded_exp(sequence_mean(clipped, tokens.sequence_ids))


def cuts(tokens: Tokens, settings: Bounds) -> Cuts:
    """Tokens without a gradient: the log-ratio is below (above) its bound, and the advantage drives it further."""
    log_ratio, advantages = tokens.ratio.log(), tokens.advantages
    return Cuts(
        (log_ratio < -settings.clip_low) & (advantages < 0),
        (log_ratio > settings.clip_high) & (advantages > 0),
    )


SURROGATE = Surrogate(loss, Bounds, SHOW_BOUNDS, cuts, mixes_tokens=True)
