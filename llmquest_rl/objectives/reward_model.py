"""The Bradley-Terry loss of reward models: of two replies to a prompt, the chosen one should get the higher score.

The loss is -log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2, the mean over the pairs of an
update. The first term is equation 1 of Ouyang et al. 2022 (arXiv:2203.02155). The margin is equation 2 of Touvron et
al. 2023 (arXiv:2307.09288); it is 0 if the data has none. The second term keeps scores near 0 (Eisenstein et al. 2023,
arXiv:2312.09244).

A pair is a group of two completions, the chosen one first, with one target each (`data.pairs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.objectives import Descriptions, Loss, Supervised, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn


METRICS: Descriptions = {
    "train/loss": ("nats", "Bradley-Terry loss of a pair, mean, without the term that centres the scores."),
    "train/accuracy": ("share", "Pairs that are ranked correctly."),
    "train/margin": ("score", "Score of the chosen reply minus that of the rejected one, mean over the pairs."),
    "train/reward_mean": ("score", "Score of a reply, mean over both replies of every pair."),
    "train/reward_square": ("score²", "Square of the score of a reply, mean."),
    "train/reward_std": ("score", "Standard deviation of the scores of replies."),
    "train/pairs": ("count", "Pairs of replies in the loss."),
}


class Config(Options):
    """The Bradley-Terry loss of a model with one score."""

    center: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Coefficient of the squared sum of a pair's scores. The other term only sees their difference; with, say, 0.01
    scores stay around 0, so that the scores of two trainings can be compared."""


def _std(mean: float, square: float) -> float:
    return math.sqrt(max(0.0, square - mean**2))


@dataclass(frozen=True, slots=True)
class RewardModel(Supervised):
    """The Bradley-Terry loss, in which every pair of an update weighs the same."""

    derived_metrics: ClassVar[Mapping[str, Derived]] = {
        "train/reward_std": (("train/reward_mean", "train/reward_square"), _std)
    }
    center: float = 0.0
    labels: tuple[str, ...] = ("reward",)
    needs_whole_group: int = 2

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """Give each score half of its pair's weight, and pairs without a margin the margin 0.

        Raises:
            ValueError: a group is not a pair.
        """
        if not all(map(_is_pair, groups)):
            raise ValueError(
                "the objective reward_model learns from pairs of replies: use a data set of pairs, e.g. "
                "`data: {dataset: {name: preferences, path: pairs.jsonl}}`"
            )
        weight = 1 / (2 * max(1, len(groups)))
        weighted = [group.with_constants("weights", (weight, weight)) for group in groups]
        return [
            group if "margins" in group.token_fields else group.with_constants("margins", (0.0, 0.0))
            for group in weighted
        ]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        """See `Objective.loss`. The single target of an idle microbatch is in no pair and has no gradient."""
        output = model(batch)
        scores = output.values[:, 0]
        weights = batch.token_fields["weights"]
        assert len(scores) % 2 == 0 or len(scores) == 1, "`needs_whole_group` keeps a pair in one microbatch"
        chosen, rejected = scores[:-1:2], scores[1::2]
        losses = -torch.nn.functional.logsigmoid(chosen - rejected - batch.token_fields["margins"][1::2])
        metrics = _metrics(losses, chosen, rejected)
        if self.center:
            losses = losses + self.center * (chosen + rejected) ** 2
        return with_aux((2 * weights[1::2] * losses).sum(), output.aux, batch, metrics)


def _is_pair(group: SequenceGroup) -> bool:
    return group.mask is not None and [sum(mask) for mask in group.mask] == [1, 1]


def _metrics(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Metrics:
    losses, chosen, rejected = losses.detach(), chosen.detach(), rejected.detach()
    pairs = len(losses)
    metrics = Metrics()
    metrics.mean("train/loss", losses.sum(), pairs)
    metrics.mean("train/accuracy", (chosen > rejected).sum(), pairs)
    metrics.mean("train/margin", (chosen - rejected).sum(), pairs)
    metrics.mean("train/reward_mean", (chosen + rejected).sum(), 2 * pairs)
    metrics.mean("train/reward_square", (chosen**2 + rejected**2).sum(), 2 * pairs)
    metrics.sum("train/pairs", pairs)
    return metrics


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> RewardModel:
    """Build the objective. It has no rollouts, so it ignores algorithm and sampling."""
    return RewardModel(config.center)
