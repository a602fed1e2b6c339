"""The Bradley-Terry loss of reward models: of two replies to a prompt, the chosen one should get the higher score.

The loss is -(1 - s) log sigmoid(d) - s log sigmoid(-d) + center (chosen + rejected)^2 with d = chosen - rejected -
margin, the mean over the pairs of an update. Without label smoothing (s = 0) the first two terms are equation 1 of
Ouyang et al. 2022 (arXiv:2203.02155). The margin is equation 2 of Touvron et al. 2023 (arXiv:2307.09288); it is 0 if
the data has none. Smoothing assumes that a share s of the labels is wrong (Wang et al. 2024, arXiv:2401.06080). The
last term keeps scores near 0 (Eisenstein et al. 2023, arXiv:2312.09244).

On held-out pairs the confidence of a ranking, sigmoid(|chosen - rejected|), is compared with the share of right
rankings, in bins of equal width: the expected calibration error of Guo et al. 2017 (arXiv:1706.04599, equation 3).

A pair is a group of two completions, the chosen one first. A score is the mean over the targets of its completion,
which are one or several by the pooling (`data.pairs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.ratios import mean_of_sequence, totals
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Derived, Metrics, ratio
from llmquest_rl.objectives import Descriptions, Loss, Supervised, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Pooling, Sampling

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
    "train/ece": (
        "share",
        "Held-out data only: expected calibration error, the mean distance between the confidence of a ranking and the "
        "share of right rankings, over ten bins of confidence.",
    ),
    "train/pairs_at_<percent>": ("count", "Held-out data only: pairs in the bin of confidence that begins there."),
    "train/right_at_<percent>": ("count", "Held-out data only: pairs of this bin that are ranked correctly."),
    "train/confidence_at_<percent>": ("", "Held-out data only: confidence of the pairs of this bin, summed."),
}

BINS = 10
"""Bins of confidence, from 50 to 100 percent."""
BIN_STARTS = tuple(50 + 50 * number // BINS for number in range(BINS))
"""The lowest confidence of each bin, in percent."""


class Config(Options):
    """The Bradley-Terry loss of a model with one score."""

    pooling: Pooling = "eos"
    """Tokens at which the score is read: `eos` = the end-of-sequence token after the reply; `last_token` = the last
    token of the reply itself; `mean` = the mean over the reply's tokens. It is written to the model's config.json as
    `score_pooling`. Other software reads the last token and does not know `mean`."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs whose replies are assumed to be the wrong way round (arXiv:2401.06080)."""

    center: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Coefficient of the squared sum of a pair's scores. The other term only sees their difference; with, say, 0.01
    scores stay around 0, so that the scores of two trainings can be compared."""


def _std(mean: float, square: float) -> float:
    return math.sqrt(max(0.0, square - mean**2))


_BIN_SUMS = tuple(
    name
    for start in BIN_STARTS
    for name in (f"train/pairs_at_{start}", f"train/right_at_{start}", f"train/confidence_at_{start}")
)


def _calibration_error(*sums: float) -> float:
    """The error from the three sums of every bin, in the order of `_BIN_SUMS`."""
    pairs, right, confidence = sums[::3], sums[1::3], sums[2::3]
    return ratio(sum(abs(a - b) for a, b in zip(right, confidence, strict=True)), sum(pairs))


@dataclass(frozen=True, slots=True)
class RewardModel(Supervised):
    """The Bradley-Terry loss, in which every pair of an update weighs the same."""

    derived_metrics: ClassVar[Mapping[str, Derived]] = {
        "train/reward_std": (("train/reward_mean", "train/reward_square"), _std),
        "train/ece": (_BIN_SUMS, _calibration_error),
    }
    center: float = 0.0
    label_smoothing: float = 0.0
    pooling: Pooling = "eos"
    labels: tuple[str, ...] = ("reward",)
    needs_whole_group: int = 2

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """Give each score half of its pair's weight, spread over its targets, and pairs without a margin the margin 0.

        Raises:
            ValueError: a group is not a pair.
        """
        if not all(map(_is_pair, groups)):
            raise ValueError(
                "the objective reward_model learns from pairs of replies: use a data set of pairs, e.g. "
                "`data: {dataset: {name: preferences, path: pairs.jsonl}}`"
            )
        weight = 1 / (2 * max(1, len(groups)))
        weighted = [
            group.with_constants("weights", [weight / sum(targets) for targets in group.targets]) for group in groups
        ]
        return [
            group if "margins" in group.token_fields else group.with_constants("margins", (0.0, 0.0))
            for group in weighted
        ]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        """See `Objective.loss`. The single target of an idle microbatch is in no pair and has no gradient."""
        output = model(batch)
        ids, fields = batch.sequence_ids, batch.token_fields
        scores, margins = mean_of_sequence(output.values[:, 0], ids), mean_of_sequence(fields["margins"], ids)
        weights = totals(fields["weights"], ids)
        assert len(scores) % 2 == 0 or len(scores) == 1, "`needs_whole_group` keeps a pair in one microbatch"
        chosen, rejected = scores[:-1:2], scores[1::2]
        differences = chosen - rejected - margins[1::2]
        losses = -torch.nn.functional.logsigmoid(differences)
        metrics = _metrics(losses, chosen, rejected)
        if self.label_smoothing:
            # -log sigmoid(-d) = -log sigmoid(d) + d
            losses = losses + self.label_smoothing * differences
        if self.center:
            losses = losses + self.center * (chosen + rejected) ** 2
        return with_aux((2 * weights[1::2] * losses).sum(), output.aux, batch, metrics)


def _is_pair(group: SequenceGroup) -> bool:
    return group.mask is not None and len(group.completions) == 2 and all(map(any, group.targets))


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
    if not torch.is_grad_enabled():
        _add_calibration(metrics, chosen - rejected)
    return metrics


def _add_calibration(metrics: Metrics, differences: Tensor) -> None:
    """Add the sums of every bin, from the differences of the scores of chosen and rejected replies `[pairs]`."""
    confidence = differences.abs().sigmoid()
    bins = ((confidence - 0.5) * (2 * BINS)).long().clamp(0, BINS - 1)
    for number, start in enumerate(BIN_STARTS):
        own = bins == number
        metrics.sum(f"train/pairs_at_{start}", own.sum())
        metrics.sum(f"train/right_at_{start}", (differences[own] > 0).sum())
        metrics.sum(f"train/confidence_at_{start}", confidence[own].sum())


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> RewardModel:
    """Build the objective. It has no rollouts, so it ignores algorithm and sampling."""
    return RewardModel(config.center, config.label_smoothing, config.pooling)
