"""How the current policy's probability of what was sampled compares with the old policy's.

Each function takes log-probs of the current policy [targets], of the old policy [targets], and the number of the
sequence that each target belongs to [targets], and gives the ratio [targets] through which the gradient flows.
"""

from collections.abc import Callable

from torch import Tensor


def token(logprobs: Tensor, old_logprobs: Tensor, sequence_ids: Tensor) -> Tensor:
    """pi(token) / pi_old(token), each token by itself (PPO, arXiv 1707.06347, equation 6)."""
    return (logprobs - old_logprobs).exp()


RATIOS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"token": token}
