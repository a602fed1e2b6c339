"""Tokens that the policy loss leaves out. Shapes are `[targets]`; masks are True where a token is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.ratios import sequence_mean, sequence_sum
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-4
"""Subtracted before rounding up, because a share of a length may be just above a whole number in binary."""


def on_policy_enough(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, sequence_ids: Tensor, delta: float
) -> Tensor:
    """Mask out tokens with A < 0 in a sequence whose mean log(pi_rollout / pi) is above `delta`.

    DeepSeek-V3.2, arXiv 2512.02556, equation 9. The mistakes of such a sequence are no longer the policy's own, and
    unlearning them can make training unstable.
    """
    divergence = sequence_mean(rollout_logprobs - logprobs.detach(), sequence_ids)
    return (advantages >= 0) | (divergence <= delta)


def most_uncertain(entropies: Tensor, sequence_ids: Tensor, share: float) -> Tensor:
    """Keep the `share` of each sequence's tokens with the largest entropy, at least one (arXiv 2506.01939).

    The paper takes the quantile over a microbatch. Here it is the quantile of each sequence, so that the result does
    not depend on the rest of the batch. Of equal entropies, the earlier token counts as the larger.
    """
    largest = entropies.argsort(descending=True, stable=True)
    order = largest[sequence_ids[largest].argsort(stable=True)]
    lengths = sequence_sum(torch.ones_like(entropies), sequence_ids)
    place = torch.arange(len(order), device=order.device)
    starts = torch.zeros_like(place)
    changes = torch.ones_like(order, dtype=torch.bool)
    changes[1:] = sequence_ids[order][1:] != sequence_ids[order][:-1]
    starts[changes] = place[changes]
    rank = torch.empty_like(order).scatter(0, order, place - starts.cummax(0).values)
    return rank < (share * lengths - ROUNDING).ceil().clamp(min=1)
