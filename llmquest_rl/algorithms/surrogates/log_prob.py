"""The policy gradient itself, without a ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens) -> Tensor:
    """-A log pi: the policy gradient itself (Williams 1992), right for samples of the current policy only."""
    return -tokens.advantages * tokens.logprobs


SURROGATE = Surrogate(loss, has_ratio=False, own_gradient=True)
