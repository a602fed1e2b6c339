"""Corrections for an engine whose log-probs differ from the learner's for the same weights.

Each function takes log(pi_old / pi_engine) of the sampled tokens `[targets]`, the sequence of each target `[targets]`
and two bounds of a ratio. It returns the factor of each token's policy loss `[targets]`, and a mask of the factors that
were cut `[targets]`. A ratio that equals a bound is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from llmquest_rl.algorithms.ratios import bounded_exp, sequence_mean, sequence_sum
from llmquest_rl.algorithms.variant import Variant

if TYPE_CHECKING:
    from torch import Tensor


class Correction(NamedTuple):
    """Factors of the policy loss `[targets]`."""

    weights: Tensor
    """The factors, without gradient."""
    cut: Tensor
    """Bool: tokens whose factor is not the ratio itself."""


def token_truncate(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """The token's ratio, cut at the bounds (TIS: F. Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025)."""
    return _truncate(bounded_exp(log_gap), low, high)


def sequence_truncate(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """The sequence's ratio, cut at the bounds (sequence TIS: J. Liu et al., "When Speed Kills Stability", 2025)."""
    return _truncate(bounded_exp(sequence_sum(log_gap, sequence_ids)), low, high)


def token_mask(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """The token's ratio, and 0 outside the bounds (IcePop, in arXiv 2510.18855; its band is [0.5, 5])."""
    return _mask(bounded_exp(log_gap), low, high)


def sequence_mask(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """The sequence's ratio, and 0 outside the bounds (sequence MIS: J. Liu et al., 2025)."""
    return _mask(bounded_exp(sequence_sum(log_gap, sequence_ids)), low, high)


def geometric_mask(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """1, but 0 for sequences whose mean log-ratio is outside the logarithms of the bounds.

    Geometric sequence masking: Y. Li and J. Liu, "Trust Region Optimization via Sequence Masking", 2025. It has no bias
    against long sequences. The ratio is that of a mean token, so the bounds should be close to 1.
    """
    return _keep(_inside(bounded_exp(sequence_mean(log_gap, sequence_ids)), low, high))


def reject(log_gap: Tensor, sequence_ids: Tensor, low: float, high: float) -> Correction:
    """1, but 0 for the whole sequence if the ratio of any of its tokens is outside the bounds (the criterion of the
    largest gap in arXiv 2512.23075)."""
    outside = (~_inside(bounded_exp(log_gap), low, high)).to(log_gap.dtype)
    return _keep(sequence_sum(outside, sequence_ids) == 0)


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def _truncate(ratio: Tensor, low: float, high: float) -> Correction:
    return Correction(ratio.clamp(low, high), ~_inside(ratio, low, high))


def _mask(ratio: Tensor, low: float, high: float) -> Correction:
    inside = _inside(ratio, low, high)
    return Correction(ratio.where(inside, 0.0), ~inside)


def _keep(kept: Tensor) -> Correction:
    return Correction(kept.float(), ~kept)


CorrectionMethodFunction: TypeAlias = "Callable[[Tensor, Tensor, float, float], Correction]"


@dataclass(frozen=True, slots=True)
class CorrectionMethod(Variant[CorrectionMethodFunction]):
    """A correction, and its properties."""

    masks_tokens: bool = False
    """Whether a token can be left out of the loss while others of its sequence stay."""


CORRECTIONS: dict[str, CorrectionMethod] = {
    "token_truncate": CorrectionMethod(token_truncate),
    "sequence_truncate": CorrectionMethod(sequence_truncate),
    "token_mask": CorrectionMethod(token_mask, masks_tokens=True),
    "sequence_mask": CorrectionMethod(sequence_mask),
    "geometric_mask": CorrectionMethod(geometric_mask),
    "reject": CorrectionMethod(reject),
}
