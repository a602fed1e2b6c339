"""Estimators of KL(policy || reference) for each token, from samples of the policy.

Each function takes log-probs of the policy `[targets]` and of the reference `[targets]`, and returns the estimate
`[targets]` in nats. The names are those of J. Schulman, "Approximating KL divergence" (2020); r is reference / policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.algorithms.ratios import LOG_LIMIT
from llmquest_rl.algorithms.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, with a high variance.

    Its expected gradient in a loss is 0, unless it is weighted with the ratio.
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: its value is biased, but its expected gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: unbiased, never negative (DeepSeekMath, arXiv 2402.03300, equation 4).

    Its expected value is the KL, but its expected gradient in a loss is the KL's only if it is weighted with the ratio.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(max=LOG_LIMIT)
    return log_ratio.expm1() - log_ratio


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log r|: no estimate of the KL, but a distance whose gradient does not grow with it (OpenRLHF, verl)."""
    return (logprobs - ref_logprobs).abs()


KLEstimatorFunction: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True, slots=True)
class KLEstimator(Variant[KLEstimatorFunction]):
    """An estimator of the KL, and its properties."""

    only_noise_in_loss: bool = False
    """Whether its expected gradient in a loss is 0."""
    exact_if_weighted: bool = False
    """Whether its expected gradient in a loss is the KL's only if it is weighted with the ratio."""


KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": KLEstimator(k1, only_noise_in_loss=True, exact_if_weighted=True),
    "k2": KLEstimator(k2),
    "k3": KLEstimator(k3, exact_if_weighted=True),
    "abs": KLEstimator(absolute),
}
