"""Normalisation of the advantages of a whole step, after they were estimated group by group.

Each function takes, for every group of the step, advantages `[samples]`, rewards `[samples]` and lengths in tokens
`[samples]`, and returns the advantages of every group `[samples]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.algorithms.advantages import STD_EPS
from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

Groups: TypeAlias = "Sequence[Tensor]"


def none(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """The advantages as they are."""
    return list(advantages)


def whiten(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Advantages minus their mean, in units of their deviation, over all tokens of the step; 0 where all are equal.

    This is the global advantage normalisation of REINFORCE++, arXiv 2501.03262. The set that it normalises over has an
    advantage for each token, so a sample counts by its length.
    """
    values, counts = torch.cat(list(advantages)), torch.cat(list(lengths))
    if bool((values == values[0]).all()):
        return [torch.zeros_like(group) for group in advantages]
    mean = (counts * values).sum() / counts.sum()
    std = ((counts * (values - mean).square()).sum() / counts.sum()).sqrt()
    return [(group - mean) / (std + STD_EPS) for group in advantages]


def standardize(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Advantages minus their mean, in units of their deviation (n - 1), over all completions of the step; 0 where all
    are equal (GDPO, arXiv 2601.05242). Unlike `whiten`, a long completion counts no more than a short one."""
    values = torch.cat(list(advantages))
    if bool((values == values[0]).all()):
        return [torch.zeros_like(group) for group in advantages]
    return [(group - values.mean()) / (values.std() + STD_EPS) for group in advantages]


def batch_mean(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Advantages minus their mean over all completions of the step: a baseline that needs no group (FlashREINFORCE,
    2026). 0, without rounding, where all are equal."""
    values = torch.cat(list(advantages))
    mean = values[0] if bool((values == values[0]).all()) else values.mean()
    return [group - mean for group in advantages]


def batch_std(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Advantages in units of the deviation (n - 1) of all rewards of the step (arXiv 2508.08221)."""
    values = torch.cat(list(rewards))
    if bool((values == values[0]).all()):
        return list(advantages)
    return [group / (values.std() + STD_EPS) for group in advantages]


def valid_groups(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Advantages times the number of samples over the number of samples in groups whose rewards differ.

    This is alpha = B / (B - M) of GPG, arXiv 2504.02546. Groups of equal rewards add nothing to the gradient, but they
    count in its mean. The factor compensates for that.
    """
    samples = sum(len(group) for group in rewards)
    valid = sum(len(group) for group in rewards if bool((group != group[0]).any()))
    return [group * (samples / valid) if valid else group for group in advantages]


NormalizationFunction: TypeAlias = "Callable[[Groups, Groups, Groups], list[Tensor]]"


@dataclass(frozen=True, slots=True)
class Normalization(Variant[NormalizationFunction]):
    """A normalisation, and its properties."""

    needs_comparison: bool = False
    """Whether it assumes that groups of equal rewards have no advantages."""
    in_deviations: bool = False
    """Whether it divides by a deviation of rewards, which must not be done twice (`Advantage.in_deviations`)."""


NORMALIZATIONS: dict[str, Normalization] = {
    "none": Normalization(none),
    "whiten": Normalization(whiten),
    "standardize": Normalization(standardize),
    "batch_mean": Normalization(batch_mean),
    "batch_std": Normalization(batch_std, in_deviations=True),
    "valid_groups": Normalization(valid_groups, needs_comparison=True),
}
