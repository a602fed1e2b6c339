"""Arithmetic of log-ratios of probabilities: exponentials that stay finite, and sums over the tokens of a sequence.

All tensors are `[targets]`. `sequence_ids` are those of a packed batch, in which the targets of a sequence are adjacent
and in order. A value of a sequence is repeated for each of its targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    return _totals(values, sequence_ids)[sequence_ids]


def sequence_mean(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Mean over the targets of each sequence, repeated for each of them."""
    return sequence_sum(values, sequence_ids) / sequence_sum(torch.ones_like(values), sequence_ids)


def sum_to_end(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum over each target and all later targets of its sequence."""
    wide = values.double()  # one running sum over the batch: float32 would lose the small terms
    ends = _totals(wide, sequence_ids).cumsum(0)[sequence_ids]
    return (ends - wide.cumsum(0) + wide).to(values.dtype)


def _totals(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Sum over the targets of each sequence `[sequences]`."""
    sequences = int(sequence_ids.max()) + 1 if sequence_ids.numel() else 0
    return values.new_zeros(sequences).index_add(0, sequence_ids, values)
