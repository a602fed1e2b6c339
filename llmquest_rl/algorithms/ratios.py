"""Importance ratios: the probability of the sampled tokens under the current policy over that under the old policy.

Each function takes log-probs of the current policy `[targets]`, of the old policy `[targets]`, and the number of the
sequence that each target belongs to `[targets]`. It returns the ratio `[targets]`, through which the gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.algorithms.log_ratios import bounded_exp, sequence_mean, sequence_sum
from llmquest_rl.algorithms.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor


def token(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """pi(token) / pi_old(token) of each token (PPO, arXiv 1707.06347, equation 6)."""
    return bounded_exp(logprobs - old_logprobs)


def sequence(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """(pi(o) / pi_old(o))^(1/|o|): the geometric mean over the sequence (GSPO, arXiv 2507.18071, equation 7)."""
    return bounded_exp(sequence_mean(logprobs - old_logprobs, sequence_ids))


def sequence_token(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """The value of `sequence`, the gradient of each token's own log-prob (GSPO-token, arXiv 2507.18071, equation 14).

    Advantages may therefore differ within a sequence. If nothing differs within it, the gradient is that of `sequence`.
    """
    value = sequence_mean(logprobs.detach() - old_logprobs, sequence_ids)
    return bounded_exp(value + logprobs - logprobs.detach())


def sequence_product(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """pi(o) / pi_old(o), not normalised by length: exact importance sampling of completions, with a large variance."""
    return bounded_exp(sequence_sum(logprobs - old_logprobs, sequence_ids))


RatioFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


@dataclass(frozen=True, slots=True)
class Ratio(Variant[RatioFunction]):
    """An importance ratio, and its properties."""

    of_sequences: bool = False
    """Whether all tokens of a sequence share one value and one gradient."""


RATIOS: dict[str, Ratio] = {
    "token": Ratio(token),
    "sequence": Ratio(sequence, of_sequences=True),
    "sequence_token": Ratio(sequence_token),
    "sequence_product": Ratio(sequence_product, of_sequences=True),
}
