"""The importance-weighted policy gradient, without any bound on the ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquest_rl.algorithms.surrogates import Surrogate, Tokens

if TYPE_CHECKING:
    from torch import Tensor


def loss(tokens: Tokens) -> Tensor:
    """-r A: for use with a mask or a penalty that holds the policy back (KL-Cov, arXiv 2505.22617)."""
    return -tokens.ratio * tokens.advantages


SURROGATE = Surrogate(loss)
