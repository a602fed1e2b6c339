"""The policy gradient itself, without a ratio."""

from torch import Tensor

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens


def loss(tokens: Tokens) -> Tensor:
    """-A log pi: the policy gradient itself (Williams 1992), right for samples of the current policy only."""
    return -tokens.advantages * tokens.logprobs


SURROGATE = Surrogate(loss, has_ratio=False, own_gradient=True)
