"""Next-token prediction: pretraining, and supervised fine-tuning if a mask leaves out the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.objectives import Descriptions, Loss, Supervised, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling

if TYPE_CHECKING:
    from torch import nn


METRICS: Descriptions = {
    "train/loss": ("nats", "Loss of a target token, mean."),
    "train/perplexity": ("", "Exponential of the loss."),
    "train/tokens": ("tokens", "Target tokens in the loss."),
}


class Config(Options):
    """This objective has no options."""


def _perplexity(loss: float, tokens: float) -> float:
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True, slots=True)
class NextToken(Supervised):
    """Mean negative log-prob of the target tokens: every target of an update weighs the same."""

    derived_metrics: ClassVar[Mapping[str, Derived]] = {
        "train/perplexity": (("train/loss", "train/tokens"), _perplexity)
    }

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """See `Objective.assign_token_weights`.

        Raises:
            ValueError: the data set gives answers to compare, of which some must not be learnt.
        """
        if any(len(group.completions) > 1 or "sides" in group.token_fields for group in groups):
            raise ValueError(
                "the data set gives good and bad answers, and next_token would learn both: use the objective "
                "`preference` or `reward_model`, or a data set such as `sft`"
            )
        weight = 1 / max(1, sum(sum(map(sum, group.targets)) for group in groups))
        return [
            group.with_token_field("weights", [[weight] * len(completion) for completion in group.completions])
            for group in groups
        ]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        output = model(batch)
        weights = batch.token_fields["weights"]
        value = -(weights * output.logprobs).sum()
        counted = weights != 0
        metrics = Metrics()
        metrics.mean("train/loss", -output.logprobs.detach()[counted].sum(), counted.sum())
        metrics.sum("train/tokens", counted.sum())
        return with_aux(value, output.aux, batch, metrics)


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> NextToken:
    """Build the objective. It has no rollouts, so it ignores algorithm and sampling."""
    return NextToken()
