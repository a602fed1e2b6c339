"""Margins: the score of an answer, whose difference between the chosen and the rejected answer is the margin of a pair.

Each function takes the sums over the tokens of each answer `[answers]`, and returns its score `[answers]`, through
which the gradient flows. Multiplied by beta, the score is the answer's implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

LOG_TWO = math.log(2)


class Answers(NamedTuple):
    """Sums over the tokens of each answer `[answers]`."""

    logprobs: Tensor
    """Log-probs under the current policy, with gradient."""
    reference: Tensor
    """Log-probs under the reference model; zeros if the margin does not read it."""
    tokens: Tensor
    """Number of tokens."""


def log_ratio(answers: Answers) -> Tensor:
    """log pi(y) - log pi_ref(y) (DPO, arXiv 2305.18290, equation 5, without beta and the part that cancels)."""
    return answers.logprobs - answers.reference


def log_ratio_mean(answers: Answers) -> Tensor:
    """The log-ratio per token, (log pi(y) - log pi_ref(y)) / |y|."""
    return log_ratio(answers) / answers.tokens


def logprob(answers: Answers) -> Tensor:
    """log pi(y): no reference model (CPO, arXiv 2401.08417, equation 3)."""
    return answers.logprobs


def logprob_mean(answers: Answers) -> Tensor:
    """log pi(y) / |y|: no reference model, and no advantage for long answers (SimPO, arXiv 2405.14734, equation 4)."""
    return answers.logprobs / answers.tokens


def log_odds(answers: Answers) -> Tensor:
    """log(p / (1 - p)) with p = pi(y)^(1/|y|) (ORPO, arXiv 2403.07691, equation 4)."""
    mean = logprob_mean(answers)
    return mean - _log1mexp(mean)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it. At 0 it is that of the largest number below 0."""
    values = values.clamp(max=-torch.finfo(values.dtype).tiny)
    is_near = values > -LOG_TWO
    near = torch.log(-torch.expm1(torch.where(is_near, values, -LOG_TWO)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -LOG_TWO, values)))
    return torch.where(is_near, near, far)


MarginFunction: TypeAlias = "Callable[[Answers], Tensor]"


@dataclass(frozen=True, slots=True)
class Margin(Variant[MarginFunction]):
    """A score of an answer, and its properties."""

    has_reference: bool = True
    """Whether it compares the policy with a reference model."""


MARGINS: dict[str, Margin] = {
    "log_ratio": Margin(log_ratio),
    "log_ratio_mean": Margin(log_ratio_mean),
    "logprob": Margin(logprob, has_reference=False),
    "logprob_mean": Margin(logprob_mean, has_reference=False),
    "log_odds": Margin(log_odds, has_reference=False),
}
