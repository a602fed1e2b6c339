"""Classification of texts and images: cross-entropy of the label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Metrics
from llmquest_rl.objectives import Descriptions, Loss, Supervised, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn


METRICS: Descriptions = {
    "train/loss": ("nats", "Cross-entropy of a sequence, mean."),
    "train/accuracy": ("share", "Sequences whose label has the highest score."),
    "train/sequences": ("count", "Sequences with a label in the loss."),
}


class Config(Options):
    """The labels of the classifier, and how its loss counts them."""

    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of the classes, in the order of their numbers; the exported model's config.json keeps them."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability that moves from the right label to all labels in equal parts (Szegedy et al. 2016,
    arXiv:1512.00567, section 7)."""

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two labels have the same name: {', '.join(twice)}")
        return labels


@dataclass(frozen=True, slots=True)
class Classify(Supervised):
    """Mean cross-entropy of the labels: every sequence of an update weighs the same."""

    labels: tuple[str, ...] = field()  # no default, although `Objective` has one
    label_smoothing: float = 0.0

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """See `Objective.assign_token_weights`.

        Raises:
            ValueError: a sequence does not have exactly one target, or the target is not the number of a label.
        """
        for group in groups:
            self._check(group)
        weight = 1 / max(1, sum(len(group.completions) for group in groups))
        return [
            group.with_token_field("weights", [[weight] * len(completion) for completion in group.completions])
            for group in groups
        ]

    def _check(self, group: SequenceGroup) -> None:
        for targets in _targets(group):
            if len(targets) != 1 or not 0 <= targets[0] < len(self.labels):
                raise ValueError(
                    f"the data set gives a sequence with {len(targets)} targets, but a classifier needs one target, "
                    f"the number of one of its {len(self.labels)} labels: use a data set of labels, e.g. `labelled`"
                )

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        scores = model(batch)
        weights = batch.token_fields["weights"]
        losses = cross_entropy(scores.values, batch.targets, self.label_smoothing)
        counted = weights != 0
        right = scores.values.argmax(-1) == batch.targets
        metrics = Metrics()
        metrics.mean("train/loss", losses.detach()[counted].sum(), counted.sum())
        metrics.mean("train/accuracy", (right & counted).sum(), counted.sum())
        metrics.sum("train/sequences", counted.sum())
        return with_aux((weights * losses).sum(), scores.aux, batch, metrics)


def cross_entropy(scores: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """-sum_k q_k log softmax(scores)_k with q = (1 - smoothing) one-hot + smoothing / labels (Szegedy et al. 2016,
    section 7).

    Args:
        scores: Logits `[targets, labels]`.
        targets: Long `[targets]`, each the number of the right label.
        smoothing: 0 to 1.

    Returns:
        Losses `[targets]`, in nats.
    """
    return torch.nn.functional.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)


def _targets(group: SequenceGroup) -> Iterator[list[int]]:
    """The predicted tokens of each completion."""
    first = 0 if group.prompt else 1
    for i, completion in enumerate(group.completions):
        mask = group.mask[i] if group.mask is not None else [True] * len(completion)
        yield [token for j, token in enumerate(completion) if mask[j] and j >= first]


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> Classify:
    """Build the objective. It has no rollouts, so it ignores algorithm and sampling."""
    return Classify(config.labels, config.label_smoothing)
