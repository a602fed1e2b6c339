"""What a batch is trained with. An objective `foo` is the file `llmquest_rl/objectives/foo.py`, which has

* `Config(Options)`: the keys beside `name:` in the configuration;
* `build(config, algorithm, sampling) -> Objective`.

The learner asks an objective for what this protocol names and never which one it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.metrics import Metrics

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Loss:
    """What one microbatch gives."""

    value: Tensor
    """A scalar with a gradient: the sum of weight x token loss, plus the model's own terms. Sums over microbatches and
    processes are the loss of the whole update, because the weights already carry the global mean."""
    metrics: Metrics


def with_aux(value: Tensor, aux: Mapping[str, Tensor], batch: TokenBatch, metrics: Metrics) -> Loss:
    """The objective's value plus the model's terms: means, so they count by the microbatch's share of weight."""
    share = batch.token_fields["weights"].sum()
    for name, term in aux.items():
        metrics.mean(f"aux/{name}", term.detach() * share, share)
        value = value + share * term
    return Loss(value, metrics)


class Objective(Protocol):
    """A loss, and what it needs."""

    @property
    def source(self) -> Literal["rollout", "dataset"]:
        """Where its batches come from."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """What the model scores: names of classes, or one for a reward model; () = it predicts tokens."""
        ...

    @property
    def needs_whole_group(self) -> bool:
        """Whether a group's completions are compared with each other, so that a microbatch must hold all of them."""
        ...

    @property
    def temperature(self) -> float:
        """Divides the logits of every forward pass, so that log-probs are those of the distribution sampled from."""
        ...

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        """The log-probs that must be computed without gradient first, given how many updates a step's batch serves:
        `old_logprobs` (of the model before the step) and `ref_logprobs` (of the frozen initial model)."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the initial model is held."""
        ...

    @property
    def ref_sync_interval(self) -> int | None:
        """Steps after which that copy becomes the current model; None = it stays the initial one."""
        ...

    @property
    def routing_replay(self) -> bool:
        """Whether a mixture's updates use the experts that were recorded with `old_logprobs` (`TokenBatch.experts`)."""
        ...

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """Set the token field `weights` on all groups of one optimizer update, before they are split over processes."""
        ...

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        """Forward pass and loss of one microbatch."""
        ...


class Supervised:
    """What objectives that learn from given sequences have in common: one model, and its targets as they are."""

    source: Literal["rollout", "dataset"] = "dataset"
    labels: tuple[str, ...] = ()
    needs_whole_group: bool = False
    temperature: float = 1.0
    needs_reference: bool = False
    ref_sync_interval: int | None = None
    routing_replay: bool = False

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        return ()
