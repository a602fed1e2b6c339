"""What is done to the advantages of a whole step, after they were estimated group by group.

Each function takes, for every group of the step, advantages [samples], rewards [samples] and lengths in tokens
[samples], and gives the advantages of every group [samples].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.algorithms.advantages import STD_EPS
from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

Groups: TypeAlias = "Sequence[Tensor]"


def none(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """As they are."""
    return list(advantages)


def whiten(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Minus their mean, in units of their deviation, over all tokens of the step; 0 where all are equal.

    REINFORCE++, arXiv 2501.03262, its global advantage normalisation: the set that it normalises over has an advantage
    for each token, so a sample counts by its length.
    """
    values, counts = torch.cat(list(advantages)), torch.cat(list(lengths))
    if bool((values == values[0]).all()):
        return [torch.zeros_like(group) for group in advantages]
    mean = (counts * values).sum() / counts.sum()
    std = ((counts * (values - mean).square()).sum() / counts.sum()).sqrt()
    return [(group - mean) / (std + STD_EPS) for group in advantages]


def batch_std(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """In units of the deviation (n - 1) of all rewards of the step (arXiv 2508.08221)."""
    values = torch.cat(list(rewards))
    if bool((values == values[0]).all()):
        return list(advantages)
    return [group / (values.std() + STD_EPS) for group in advantages]


def valid_groups(advantages: Groups, rewards: Groups, lengths: Groups) -> list[Tensor]:
    """Times all samples / samples of groups whose rewards differ (GPG, arXiv 2504.02546, its alpha = B / (B - M)).

    Groups without a difference add nothing to the gradient; without this they make it smaller.
    """
    samples = sum(len(group) for group in rewards)
    valid = sum(len(group) for group in rewards if bool((group != group[0]).any()))
    return [group * (samples / valid) if valid else group for group in advantages]


NORMALIZATIONS: dict[str, Callable[[Groups, Groups, Groups], list[Tensor]]] = {
    "none": none,
    "whiten": whiten,
    "batch_std": batch_std,
    "valid_groups": valid_groups,
}
