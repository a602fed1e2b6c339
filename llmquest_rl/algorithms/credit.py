"""Credit of tokens: the factor of a token's advantage, where the tokens of a completion do not all count the same.

Each function takes advantages `[targets]`, log(pi / pi_old) of the sampled tokens without gradient `[targets]`, and the
number of the sequence that each target belongs to `[targets]`. It returns the factors `[targets]`, without gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Self, TypeAlias

from pydantic import model_validator

from llmquest_rl.algorithms.ratios import bounded_exp, discounted_sum_to_end
from llmquest_rl.algorithms.variant import PositiveFinite, Variant, Weight
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class FutureKL(Options):
    """Settings of `future_kl`."""

    future_half_life: PositiveFinite = 32.0
    """`future_kl`: number of tokens after which a later token counts half."""
    future_low: Weight = 1.0
    """`future_kl`: smallest factor of an advantage."""
    future_high: PositiveFinite = 1.2
    """`future_kl`: largest factor of an advantage."""
    future_max_ratio: PositiveFinite = 10.0
    """`future_kl`: tokens whose ratio is larger do not count in the sum, and their factor is at most 1 if their
    advantage is negative."""

    @model_validator(mode="after")
    def _future_bounds_are_in_order(self) -> Self:
        if self.future_low >= self.future_high:
            raise ValueError(f"future_low is {self.future_low:g}, but must be below future_high = {self.future_high:g}")
        return self


def uniform(advantages: Tensor, log_ratio: Tensor, sequence_ids: Tensor) -> Tensor:
    """Ones: every token has the advantage of its completion."""
    return torch.ones_like(log_ratio)


def future_kl(advantages: Tensor, log_ratio: Tensor, sequence_ids: Tensor, settings: FutureKL) -> Tensor:
    """clip(exp(sum_{k >= t} gamma^(k - t) log r_k), low, high), gamma = 2^(-1 / half-life): a token counts more if the
    current policy makes what follows it more likely (FIPO, arXiv 2603.19835, and its authors' code).

    A token whose ratio is beyond `future_max_ratio` is not in the sum. Where the advantage is negative, it is not
    weighted up either.
    """
    too_far = log_ratio > math.log(settings.future_max_ratio)
    discount = 2 ** (-1 / settings.future_half_life)
    future = discounted_sum_to_end(log_ratio.masked_fill(too_far, 0.0), sequence_ids, discount)
    factors = bounded_exp(future).clamp(settings.future_low, settings.future_high)
    return torch.where(too_far & (advantages < 0), factors.clamp(max=1.0), factors)


CreditFunction: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


class Credit(Variant[CreditFunction]):
    """The factor of each token's advantage."""


CREDITS: dict[str, Credit] = {
    "uniform": Credit(uniform),
    "future_kl": Credit(future_kl, FutureKL, " {future_low:g} .. {future_high:g}, half-life {future_half_life:g}"),
}
