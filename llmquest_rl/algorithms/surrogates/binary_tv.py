"""The surrogate of DPPO with total variation: a trust region around the probability of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import SHOW_BOUNDS, Bounds, Cuts, Surrogate, Tokens, within

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens, settings: Bounds) -> Tensor:
    """-r A, and 0 where the token's probability has changed by more than low (high) in the direction in which A < 0
    (A > 0) drives it: the total variation of "this token or another" (DPPO, arXiv 2602.04879, equations 12, 13)."""
    return within(tokens, cuts(tokens, settings))


def cuts(tokens: Tokens, settings: Bounds) -> Cuts:
    """Tokens without a gradient: they lost (gained) more probability than their bound, and are to lose (gain) more."""
    gain, advantages = tokens.logprobs.exp() - tokens.old_logprobs.exp(), tokens.advantages
    return Cuts((gain < -settings.clip_low) & (advantages < 0), (gain > settings.clip_high) & (advantages > 0))


SURROGATE = Surrogate(loss, Bounds, SHOW_BOUNDS, cuts)
