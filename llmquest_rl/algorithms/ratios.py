"""Importance ratios: the probability of the sampled tokens under the current policy over that under the old policy.

The file begins with arithmetic of log-ratios: exponentials that stay finite, sums over the tokens of a sequence, and
divergences between the probabilities of a token.
`sequence_ids` are those of a packed batch, in which the targets of a sequence are adjacent and in order; a value of a
sequence is repeated for each of its targets.

Each ratio takes log-probs of the current policy `[targets]`, of the old policy `[targets]`, and the number of the
sequence that each target belongs to `[targets]`. It returns the ratio `[targets]`, through which the gradient flows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


LOG_LIMIT = 20.0
"""Log-ratios are clamped to +-20: e^20 is 4.9e8, beyond any bound of a surrogate, and the product of three is finite in
float32. The gradient of a clamped log-ratio is 0."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio that is clamped to +-LOG_LIMIT."""
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def sequence_sum(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum over the targets of each sequence, repeated for each of them."""
    return totals(values, sequence_ids)[sequence_ids]


def sequence_mean(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean over the targets of each sequence, repeated for each of them."""
    return sequence_sum(values, sequence_ids) / sequence_sum(torch.ones_like(values), sequence_ids)


def sum_to_end(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum over each target and all later targets of its sequence."""
    wide = values.double()  # one running sum over the batch: float32 would lose the small terms
    ends = totals(wide, sequence_ids).cumsum(0)[sequence_ids]
    return (ends - wide.cumsum(0) + wide).to(values.dtype)


def discounted_sum_to_end(values: Tensor, sequence_ids: Tensor, discount: float) -> Tensor:
    """Sum over each target and all later targets of its sequence; one that comes k places later counts discount^k.

    Sums over 1, 2, 4, ... targets are joined, so there are as many passes as the longest sequence has binary digits.
    """
    longest = int(totals(torch.ones_like(values), sequence_ids).max()) if values.numel() else 0
    sums, reach = values, 1
    while reach < longest:
        later = sums[reach:].where(sequence_ids[reach:] == sequence_ids[:-reach], 0.0)
        sums = torch.cat((sums[:-reach] + discount**reach * later, sums[-reach:]))
        reach *= 2
    return sums


def totals(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum over the targets of each sequence `[sequences]`."""
    sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    return values.new_zeros(sequences).index_add(0, sequence_ids, values)


def binary_kl(logprobs: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of the distributions "this token or another", from log p and log q of each token (DPPO, arXiv
    2602.04879, equation 14)."""
    rest, other_rest = _log_complement(logprobs), _log_complement(other)
    return logprobs.exp() * (logprobs - other) + rest.exp() * (rest - other_rest)


def binary_tv(logprobs: Tensor, other: Tensor) -> Tensor:
    """|p - q|: the total variation between the same distributions (DPPO, arXiv 2602.04879, equation 13)."""
    return (logprobs.exp() - other.exp()).abs()


def _log_complement(logprobs: Tensor) -> Tensor:
    """log(1 - p), finite also where p is rounded to 1."""
    return (-torch.expm1(logprobs)).clamp(min=torch.finfo(torch.float32).tiny).log()


def mean_of_sequence(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean over the targets of each sequence `[sequences]`."""
    return totals(values, sequence_ids) / totals(torch.ones_like(values), sequence_ids).clamp(min=1)


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
