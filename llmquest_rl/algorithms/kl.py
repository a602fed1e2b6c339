"""Estimates of KL(policy || reference) for each token, from samples of the policy.

Each function takes log-probs of the policy [targets] and of the reference [targets]; the names are those of
J. Schulman, "Approximating KL divergence" (2020), with r = reference / policy.
"""

from collections.abc import Callable

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, of high variance. As a loss its expected gradient is zero: for measuring only."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: biased in value, its gradient is the KL's."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r - 1 - log r: unbiased, never negative (DeepSeekMath, arXiv 2402.03300, equation 4)."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
