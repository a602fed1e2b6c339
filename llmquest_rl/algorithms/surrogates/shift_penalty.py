"""The surrogate of DRPO: DPPO's trust region around the probability of each token, as a smooth penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens
from llmquest_rl.algorithms.variant import PositiveFinite
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Options):
    """Strength of the penalty."""

    shift_limit: PositiveFinite = 12.5
    """`shift_penalty`: change of a token's probability at which its gradient is 0; beyond it, the gradient points back.
    Probabilities change by 1 at most, so the paper's 12.5 is a weak penalty; DPPO's bounds are 0.15 to 0.2."""


def loss(tokens: Tokens, settings: Settings) -> Tensor:
    """-r A + |A| p_old (r - 1)^2 / (2 limit) (DRPO, arXiv 2606.09821, section 3, and its authors' code).

    The gradient is the policy gradient's times r (1 - sign(A) (p - p_old) / limit): DPPO's mask is 0 or 1 there.
    """
    shift = tokens.old_logprobs.exp() * (tokens.ratio - 1).square()
    return tokens.advantages.abs() * shift / (2 * settings.shift_limit) - tokens.ratio * tokens.advantages


SURROGATE = Surrogate(loss, Settings, " {shift_limit:g}")
