"""The surrogate of DPPO with a KL divergence: a trust region around the probability of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms import ratios
from llmquest_rl.algorithms.surrogates import SHOW_BOUNDS, Bounds, Cuts, Surrogate, Tokens, within

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens, settings: Bounds) -> Tensor:
    """-r A, and 0 where KL(old || current) of "this token or another" is above low (high) and the probability has
    changed in the direction in which A < 0 (A > 0) drives it (DPPO, arXiv 2602.04879, equations 12, 14)."""
    return within(tokens, cuts(tokens, settings))


def cuts(tokens: Tokens, settings: Bounds) -> Cuts:
    """Tokens without a gradient: their KL is above its bound, and their probability is to move further away."""
    new, old, advantages = tokens.logprobs.detach(), tokens.old_logprobs, tokens.advantages
    kl = ratios.binary_kl(old, new)
    return Cuts(
        (kl > settings.clip_low) & (new < old) & (advantages < 0),
        (kl > settings.clip_high) & (new > old) & (advantages > 0),
    )


SURROGATE = Surrogate(loss, Bounds, SHOW_BOUNDS, cuts)
