"""Corrections for an engine whose log-probs differ from the learner's for the same weights.

Each function takes a `Gap`, the log-probs of both for the sampled tokens, and two bounds of a ratio. It returns the
factor of each token's policy loss `[targets]`, and a mask of the factors that were cut `[targets]`. A ratio or a
divergence that equals a bound is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from pydantic import PositiveFloat

from llmquest_rl.algorithms.ratios import binary_kl, binary_tv, bounded_exp, sequence_mean, sequence_sum
from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Gap(NamedTuple):
    """The sampled tokens under both policies."""

    old_logprobs: Tensor
    """Log-probs under the learner's old policy `[targets]`."""
    rollout_logprobs: Tensor
    """Log-probs under the engine's policy, which sampled `[targets]`."""
    sequence_ids: Tensor
    """Number of the sequence that each target belongs to `[targets]`."""

    @property
    def log_ratio(self) -> Tensor:
        """log(pi_old / pi_engine) `[targets]`."""
        return self.old_logprobs - self.rollout_logprobs


class Correction(NamedTuple):
    """Factors of the policy loss `[targets]`."""

    weights: Tensor
    """The factors, without gradient."""
    cut: Tensor
    """Bool: tokens whose factor is not the ratio itself."""


class Divergence(Options):
    """Setting of the corrections that bound a divergence."""

    divergence_limit: PositiveFloat = 0.1
    """`..._binary_kl` and `..._binary_tv`: largest divergence between engine and learner that is kept: of a token, or
    the mean over a completion."""


def token_truncate(gap: Gap, low: float, high: float) -> Correction:
    """The token's ratio, cut at the bounds (TIS: F. Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025)."""
    return _truncate(bounded_exp(gap.log_ratio), low, high)


def sequence_truncate(gap: Gap, low: float, high: float) -> Correction:
    """The sequence's ratio, cut at the bounds (sequence TIS: J. Liu et al., "When Speed Kills Stability", 2025)."""
    return _truncate(bounded_exp(sequence_sum(gap.log_ratio, gap.sequence_ids)), low, high)


def token_mask(gap: Gap, low: float, high: float) -> Correction:
    """The token's ratio, and 0 outside the bounds (IcePop, in arXiv 2510.18855; its band is [0.5, 5])."""
    ratio = bounded_exp(gap.log_ratio)
    return _mask(ratio, _inside(ratio, low, high))


def sequence_mask(gap: Gap, low: float, high: float) -> Correction:
    """The sequence's ratio, and 0 outside the bounds (sequence MIS: J. Liu et al., 2025)."""
    ratio = bounded_exp(sequence_sum(gap.log_ratio, gap.sequence_ids))
    return _mask(ratio, _inside(ratio, low, high))


def geometric_mask(gap: Gap, low: float, high: float) -> Correction:
    """1, but 0 for sequences whose mean log-ratio is outside the logarithms of the bounds.

    Geometric sequence masking: Y. Li and J. Liu, "Trust Region Optimization via Sequence Masking", 2025. It has no bias
    against long sequences. The ratio is that of a mean token, so the bounds should be close to 1.
    """
    return _keep(_inside(bounded_exp(sequence_mean(gap.log_ratio, gap.sequence_ids)), low, high))


def reject(gap: Gap, low: float, high: float) -> Correction:
    """1, but 0 for the whole sequence if the ratio of any of its tokens is outside the bounds (the criterion of the
    largest gap in arXiv 2512.23075)."""
    outside = (~_inside(bounded_exp(gap.log_ratio), low, high)).to(gap.log_ratio.dtype)
    return _keep(sequence_sum(outside, gap.sequence_ids) == 0)


def token_binary_kl(gap: Gap, low: float, high: float, settings: Divergence) -> Correction:
    """The token's ratio, and 0 where KL(engine || old) or KL(old || engine) of "this token or another" is above the
    limit (KPop: J. Guo et al., "Taming Training-Inference Mismatch with Adaptive Masking Regions", 2026)."""
    old, rollout, _ = gap
    divergence = torch.maximum(binary_kl(rollout, old), binary_kl(old, rollout))
    return _mask(bounded_exp(gap.log_ratio), divergence <= settings.divergence_limit)


def token_binary_tv(gap: Gap, low: float, high: float, settings: Divergence) -> Correction:
    """The token's ratio, and 0 where the probabilities of the token differ by more than the limit."""
    divergence = binary_tv(gap.rollout_logprobs, gap.old_logprobs)
    return _mask(bounded_exp(gap.log_ratio), divergence <= settings.divergence_limit)


def sequence_binary_kl(gap: Gap, low: float, high: float, settings: Divergence) -> Correction:
    """The token's ratio, and 0 for sequences in which the mean of KL(engine || old) of "this token or another" is above
    the limit (FlashREINFORCE, 2026, its sequence trust region)."""
    divergence = sequence_mean(binary_kl(gap.rollout_logprobs, gap.old_logprobs), gap.sequence_ids)
    return _mask(bounded_exp(gap.log_ratio), divergence <= settings.divergence_limit)


def sequence_binary_tv(gap: Gap, low: float, high: float, settings: Divergence) -> Correction:
    """The token's ratio, and 0 for sequences whose tokens' probabilities differ by more than the limit in the mean."""
    divergence = sequence_mean(binary_tv(gap.rollout_logprobs, gap.old_logprobs), gap.sequence_ids)
    return _mask(bounded_exp(gap.log_ratio), divergence <= settings.divergence_limit)


def _inside(ratio: Tensor, low: float, high: float) -> Tensor:
    return (ratio >= low) & (ratio <= high)


def _truncate(ratio: Tensor, low: float, high: float) -> Correction:
    return Correction(ratio.clamp(low, high), ~_inside(ratio, low, high))


def _mask(ratio: Tensor, kept: Tensor) -> Correction:
    return Correction(ratio.where(kept, 0.0), ~kept)


def _keep(kept: Tensor) -> Correction:
    return Correction(kept.float(), ~kept)


CorrectionMethodFunction: TypeAlias = "Callable[[Gap, float, float], Correction]"


@dataclass(frozen=True, slots=True)
class CorrectionMethod(Variant[CorrectionMethodFunction]):
    """A correction, and its properties."""

    masks_tokens: bool = False
    """Whether a token can be left out of the loss while others of its sequence stay."""
    bounds_ratio: bool = True
    """Whether it reads the bounds of the ratio, `tis_floor` and `tis_cap`."""


def _of_divergence(function: Callable[[Gap, float, float, Divergence], Correction], of_token: bool) -> CorrectionMethod:
    return CorrectionMethod(function, Divergence, " {divergence_limit:g}", masks_tokens=of_token, bounds_ratio=False)


CORRECTIONS: dict[str, CorrectionMethod] = {
    "token_truncate": CorrectionMethod(token_truncate),
    "sequence_truncate": CorrectionMethod(sequence_truncate),
    "token_mask": CorrectionMethod(token_mask, masks_tokens=True),
    "sequence_mask": CorrectionMethod(sequence_mask),
    "geometric_mask": CorrectionMethod(geometric_mask),
    "reject": CorrectionMethod(reject),
    "token_binary_kl": _of_divergence(token_binary_kl, of_token=True),
    "token_binary_tv": _of_divergence(token_binary_tv, of_token=True),
    "sequence_binary_kl": _of_divergence(sequence_binary_kl, of_token=False),
    "sequence_binary_tv": _of_divergence(sequence_binary_tv, of_token=False),
}
