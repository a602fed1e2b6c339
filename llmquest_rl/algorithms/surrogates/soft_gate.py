"""The soft gate of SAPO: tokens fade out smoothly as their ratio leaves 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens, by_sign
from llmquest_rl.algorithms.variant import PositiveFinite
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Options):
    """Temperatures of the gate."""

    tau_positive: PositiveFinite = 1.0
    """`soft_gate`: how fast the gate closes where the advantage is positive."""
    tau_negative: PositiveFinite = 1.05
    """`soft_gate`: how fast the gate closes where the advantage is 0 or negative."""


def loss(tokens: Tokens, settings: Settings) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, with tau+ where A > 0 and tau- elsewhere (SAPO, arXiv 2511.20347).

    Its gradient is the policy gradient's times r 4 p (1 - p) with p the sigmoid: 1 at r = 1, fading on both sides.
    """
    tau = by_sign(tokens.advantages, settings.tau_positive, settings.tau_negative)
    return -(4 / tau) * torch.sigmoid(tau * (tokens.ratio - 1)) * tokens.advantages


SURROGATE = Surrogate(loss, Settings, " {tau_positive:g} / {tau_negative:g}")
