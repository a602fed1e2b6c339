"""What is minimised for each token, and which tokens a bound took out of the gradient. All shapes are [targets]."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """The numbers of the surrogates."""

    low: float = 0.2
    """Ratios count down to 1 - low."""
    high: float = 0.2
    """Ratios count up to 1 + high."""
    dual: float | None = None
    """Where the advantage is negative, ratios count up to this; None = without limit."""
    tau_positive: float = 1.0
    tau_negative: float = 1.05


def clip(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and with a dual bound c, where A < 0, -max(that minimum, c A).

    PPO, arXiv 1707.06347, equation 7; with two bounds: DAPO, arXiv 2503.14476, equation 10; the dual one: arXiv
    1912.09729, its dual-clip PPO.
    """
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - bounds.low, 1 + bounds.high) * advantages)
    if bounds.dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -bounds.dual * advantages), losses)


def soft_gate(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with tau+ where A > 0 and tau- elsewhere (SAPO, arXiv 2511.20347).

    Its gradient is the policy gradient's times r 4 p (1 - p) with p the sigmoid: 1 at r = 1, fading on both sides.
    """
    tau = torch.full_like(ratio, bounds.tau_negative).masked_fill(advantages > 0, bounds.tau_positive)
    return -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages


def clipped_weight(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """-sg[clip(r, 1 - low, 1 + high)] A log pi: no token loses its gradient (CISPO, arXiv 2506.13585, eq. 4-5)."""
    return -ratio.detach().clamp(1 - bounds.low, 1 + bounds.high) * advantages * logprobs


def log_prob(ratio: Tensor, logprobs: Tensor, advantages: Tensor, bounds: Bounds) -> Tensor:
    """-A log pi: the policy gradient itself (Williams 1992), right for samples of the current policy only."""
    return -advantages * logprobs


Surrogate = Callable[[Tensor, Tensor, Tensor, Bounds], Tensor]
SURROGATES: dict[str, Surrogate] = {
    "clip": clip,
    "soft_gate": soft_gate,
    "clipped_weight": clipped_weight,
    "log_prob": log_prob,
}
"""(ratio, log-probs, advantages, bounds) -> losses"""

ON_POLICY = frozenset({"log_prob"})
"""Surrogates without a ratio: a step's data may serve one update only."""


def clip_cuts(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Tokens without a gradient: the ratio is below (above) its bound, and the advantage drives it further."""
    low = (ratio < 1 - bounds.low) & (advantages < 0)
    high = (ratio > 1 + bounds.high) & (advantages > 0)
    return low, high if bounds.dual is None else high | ((ratio > bounds.dual) & (advantages < 0))


def weight_cuts(ratio: Tensor, advantages: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Tokens whose weight was cut: they keep a gradient, a smaller (larger) one."""
    return ratio < 1 - bounds.low, ratio > 1 + bounds.high


CUTS: dict[str, Callable[[Tensor, Tensor, Bounds], tuple[Tensor, Tensor]]] = {
    "clip": clip_cuts,
    "clipped_weight": weight_cuts,
}
"""(ratio, advantages, bounds) -> (cut at the lower bound, cut at the upper bound); not for surrogates without one."""
