"""The surrogate of CISPO: the log-prob, weighted with a clipped ratio through which no gradient flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import SHOW_BOUNDS, Bounds, Cuts, Surrogate, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens, settings: Bounds) -> Tensor:
    """-sg[clip(r, 1 - low, 1 + high)] A log pi: no token loses its gradient (CISPO, arXiv 2506.13585, eq. 4-5)."""
    weight = tokens.ratio.detach().clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return -weight * tokens.advantages * tokens.logprobs


def cuts(tokens: Tokens, settings: Bounds) -> Cuts:
    """Tokens whose weight was raised (lowered) to a bound: they keep a gradient."""
    return Cuts(tokens.ratio < 1 - settings.clip_low, tokens.ratio > 1 + settings.clip_high)


SURROGATE = Surrogate(loss, Bounds, SHOW_BOUNDS, cuts, own_gradient=True)
