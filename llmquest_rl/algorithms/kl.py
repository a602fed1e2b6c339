"""Estimates of KL(policy || reference) for each token, from samples of the policy.

Each function takes log-probs of the policy [targets] and of the reference [targets]; the names are those of
J. Schulman, "Approximating KL divergence" (2020), with r = reference / policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmquest_rl.algorithms.log_ratios import LOG_LIMIT

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, of high variance. In the loss its expected gradient is 0: for the reward, or ratio-weighted."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: biased in value, its gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: unbiased, never negative (DeepSeekMath, arXiv 2402.03300, equation 4).

    Its value is the KL's, its gradient in a loss is not, unless it is weighted with the ratio.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(max=LOG_LIMIT)
    return log_ratio.expm1() - log_ratio


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log r|: no estimate of the KL, but a distance whose gradient does not grow with it (OpenRLHF, verl)."""
    return (logprobs - ref_logprobs).abs()


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
