"""Objectives: the loss of a batch. An objective `foo` is the file `llmquest_rl/objectives/foo.py`.

The file has `Config(Options)`, the keys next to `name:` in the configuration, and `build(config, algorithm, sampling)`,
which returns an `Objective`. A dictionary `METRICS` may describe the metrics of its loss for docs/metrics.md. No other
file changes, because the learner uses only the members of this protocol. This package may import
`llmquest_rl.algorithms`, batches and metrics, but no model.
Only `trainer` imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import PositiveFloat

from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.loader import ComponentKind
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.options import Options
from llmquest_rl.types import Group, Pooling

if TYPE_CHECKING:
    from torch import Tensor, nn

OBJECTIVES = ComponentKind("an objective", __name__, ("build",), can_be_function=False)

Descriptions = Mapping[str, tuple[str, str]]
"""Unit and meaning of metrics by name; a unit may be empty."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of one microbatch."""

    value: Tensor
    """A scalar with a gradient: the sum of weight x token loss, plus the model's own terms. Sums over microbatches and
    processes are the loss of the whole update, because the weights already carry the global mean."""
    metrics: Metrics


def with_aux(value: Tensor, aux: Mapping[str, Tensor], batch: TokenBatch, metrics: Metrics) -> Loss:
    """Add the model's own terms to the objective's value.

    These terms are means over the microbatch, so each counts by the microbatch's share of weight.
    """
    share = batch.token_fields["weights"].sum()
    for name, term in aux.items():
        metrics.mean(f"aux/{name}", term.detach() * share, share)
        value = value + share * term
    return Loss(value, metrics)


class ModelOutput(Protocol):
    """What objectives read of a language model's forward pass; see `llmquest_rl.models.base.Output`."""

    @property
    def logprobs(self) -> Tensor: ...

    @property
    def entropy(self) -> Tensor | None: ...

    @property
    def aux(self) -> Mapping[str, Tensor]: ...

    @property
    def teacher_kl(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class Teacher:
    """A reference model that differs from a frozen copy of the initial model, or reads other prompts."""

    path: str | None = None
    """A folder in the Hub's layout, or a Hub id; None = the weights are those of the initial model."""
    hint: str | None = None
    """Template of the prompts that the teacher reads (`llmquest_rl/data/hint.py`); None = the same prompts."""
    gives_distributions: bool = False
    """Whether microbatches get `TokenBatch.soft_targets`, rather than the teacher's log-probs of the targets."""
    cache: Path | None = None
    """File of the teacher's most likely tokens at all targets of the data set, which is made if it is missing; None =
    the learners hold the teacher."""
    top_k: int = 0
    """Number of these tokens at each target."""
    in_engine: bool = False
    """Whether a worker with a rollout engine holds the teacher and scores the sampled completions."""


class CriticOptions(Options):
    """The model that a critic begins with, and its optimizer."""

    path: str | None = None
    """A folder in the Hub's layout, or a Hub id: a text decoder, or a reward model, which keeps its head; null = the
    model that is trained. It must have the same tokenizer."""
    lr: PositiveFloat = 1e-5
    """Peak learning rate of the critic. Its schedule and the other options are those of `optimizer`."""


class Objective(Protocol):
    """A loss, and the inputs that it needs.

    Objectives inherit the defaults: one model that predicts tokens, and nothing to compute before the loss.
    """

    derived_metrics: ClassVar[Mapping[str, Derived]] = {}
    """Metrics that are computed from merged ones, by name: no mean, sum or maximum over microbatches gives them."""

    @property
    def source(self) -> Literal["rollout", "dataset"]:
        """Source of the batches: completions that the run samples, or a data set of given sequences."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that the model scores: class names, or one label for a reward model; () = it predicts tokens."""
        return ()

    @property
    def pooling(self) -> Pooling | None:
        """The tokens at which a reward model reads its score; None = it is no reward model."""
        return None

    @property
    def needs_whole_group(self) -> int:
        """Completions of a group at most, if they are compared with each other: a microbatch must hold all of them.
        0 = a group may be split."""
        return 0

    @property
    def temperature(self) -> float:
        """Divides the logits of every forward pass, so that log-probs are those of the sampled distribution."""
        return 1.0

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        """Names of the log-probs that must be computed first, without gradient.

        Args:
            updates: number of optimizer updates that a step's batch serves.

        Returns:
            `old_logprobs` (of the model before the step), `ref_logprobs` (of the reference model), both or neither.
        """
        return ()

    @property
    def needs_reference(self) -> bool:
        """Whether the learner holds a frozen copy of the initial model, the reference."""
        return False

    @property
    def teacher(self) -> Teacher | None:
        """The reference model, if it is not just a frozen copy of the initial model."""
        return None

    @property
    def ref_sync_interval(self) -> int | None:
        """Steps after which the reference becomes the current model; None = it stays the initial model."""
        return None

    @property
    def reference_cache(self) -> Path | None:
        """File of the reference's log-probs of the whole data set, which are then computed once; None = each step
        computes its own. Only with `source` dataset."""
        return None

    @property
    def critic(self) -> CriticOptions | None:
        """The critic that the learner trains beside the model; None = there is none."""
        return None

    @property
    def routing_replay(self) -> bool:
        """Whether updates of an MoE model use the experts recorded with `old_logprobs` (`TokenBatch.experts`)."""
        return False

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """Set the token field `weights` on all groups of one optimizer update, before they are split over processes."""
        ...

    def sequence_groups(self, groups: Sequence[Group]) -> tuple[list[SequenceGroup], Metrics]:
        """The sequences to train on of a step's graded rollouts, and metrics. Only with `source` rollout."""
        raise RuntimeError("this objective learns from given sequences")

    def with_shared_values(
        self, microbatches: list[TokenBatch], all_reduce: Callable[[Tensor], object]
    ) -> list[TokenBatch]:
        """Add token fields whose values depend on all microbatches of an update. A collective call.

        Args:
            microbatches: those of this process, with the log-probs of `computed_logprobs`, and the token field
                `values` if there is a critic.
            all_reduce: sums a tensor over the processes, in place.
        """
        return microbatches

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        """Compute the forward pass and the loss of one microbatch."""
        ...

    def value_loss(self, critic: nn.Module, batch: TokenBatch) -> Loss:
        """Compute the forward pass and the loss of the critic on one microbatch. Only with a `critic`."""
        raise RuntimeError("this objective has no critic")


class Supervised(Objective):
    """An objective that learns from given sequences."""

    source: Literal["rollout", "dataset"] = "dataset"
