"""How the current policy's probability of what was sampled compares with the old policy's.

Each function takes log-probs of the current policy [targets], of the old policy [targets], and the number of the
sequence that each target belongs to [targets], and gives the ratio [targets] through which the gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmquest_rl.algorithms.log_ratios import bounded_exp, sequence_mean, sequence_sum

if TYPE_CHECKING:
    from torch import Tensor


def token(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """pi(token) / pi_old(token), each token by itself (PPO, arXiv 1707.06347, equation 6)."""
    return bounded_exp(logprobs - old_logprobs)


def sequence(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """(pi(o) / pi_old(o))^(1/|o|): the geometric mean over the sequence (GSPO, arXiv 2507.18071, equation 7)."""
    return bounded_exp(sequence_mean(logprobs - old_logprobs, sequence_ids))


def sequence_token(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """The value of `sequence`, the gradient of each token's own log-prob (GSPO-token, arXiv 2507.18071, equation 14).

    So advantages may differ within a sequence; where they do not, and nothing else does, the gradient is `sequence`'s.
    """
    value = sequence_mean(logprobs.detach() - old_logprobs, sequence_ids)
    return bounded_exp(value + logprobs - logprobs.detach())


def sequence_product(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """pi(o) / pi_old(o), not normalised by length: exact importance sampling of completions, of large variance."""
    return bounded_exp(sequence_sum(logprobs - old_logprobs, sequence_ids))


OF_SEQUENCES = frozenset({"sequence", "sequence_product"})
"""Ratios with one value and one gradient for all tokens of a sequence."""

RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token": token,
    "sequence": sequence,
    "sequence_token": sequence_token,
    "sequence_product": sequence_product,
}
