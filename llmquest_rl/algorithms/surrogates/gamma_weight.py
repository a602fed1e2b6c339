"""The surrogate of VESPO: the log-prob, weighted with a smooth function of the ratio that is largest near 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.ratios import LOG_LIMIT
from llmquest_rl.algorithms.surrogates import Surrogate, Tokens, by_sign
from llmquest_rl.algorithms.variant import PositiveFinite
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Options):
    """Shape of the weight r^power exp(decay (1 - r))."""

    power_positive: PositiveFinite = 2.0
    """`gamma_weight`, r^power exp(decay (1 - r)): how fast it falls below r = 1 where the advantage is positive."""
    power_negative: PositiveFinite = 3.0
    """`gamma_weight`: how fast it falls below r = 1 where the advantage is 0 or negative."""
    decay_positive: PositiveFinite = 3.0
    """`gamma_weight`: how fast it falls above r = 1 where the advantage is positive."""
    decay_negative: PositiveFinite = 2.0
    """`gamma_weight`: how fast it falls above r = 1 where the advantage is 0 or negative."""


def loss(tokens: Tokens, settings: Settings) -> Tensor:
    """-sg[r^k exp(lambda (1 - r))] A log pi, with k+, lambda+ where A > 0 and k-, lambda- elsewhere (VESPO, arXiv
    2602.10693, equation 20, where r is the ratio of the whole sequence).

    The weight is 1 at r = 1, fades as r^k towards 0 and as exp(-lambda r) upwards, and is largest at r = k / lambda.
    """
    ratio = tokens.ratio.detach()
    power = by_sign(tokens.advantages, settings.power_positive, settings.power_negative)
    decay = by_sign(tokens.advantages, settings.decay_positive, settings.decay_negative)
    weight = (power * ratio.log() + decay * (1 - ratio)).clamp(max=LOG_LIMIT).exp()
    return -weight * tokens.advantages * tokens.logprobs


SURROGATE = Surrogate(
    loss,
    Settings,
    " {power_positive:g} / {power_negative:g}, {decay_positive:g} / {decay_negative:g}",
    own_gradient=True,
)
