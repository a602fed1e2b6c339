"""The learner processes, seen from the loop: one batch in, one set of metrics out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.packing import split_ranks
from llmquest_rl.soft_targets import TopTokens
from llmquest_rl.types import Group
from rollout.weights import WeightSnapshot
from trainer.cluster.worker_group import WorkerGroup
from trainer.learner.learner import Learner
from trainer.run.samples import Sample, unknown_kl
from trainer.run.trained import MODEL

if TYPE_CHECKING:
    from torch import Tensor

GROUPS_PER_CALL = 256
"""Sequence groups that one learner process scores in one call."""


@dataclass(frozen=True)
class StepBatch:
    """The data of one step."""

    minibatches: list[list[SequenceGroup]]
    """Sequence groups of each optimizer update; their token weights make the update's loss a mean. May be empty."""
    epochs: int = 1
    """Passes over the minibatches."""
    metrics: dict[str, float] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    """RL: the graded groups that the sequence groups were made from, for display and saving."""


class LearnerGroup:
    """The learner processes, which hold one model together: every call is a collective and goes to all of them."""

    def __init__(self, group: WorkerGroup[Learner], timeout_s: float, has_reference: bool = False) -> None:
        """Take the processes of a run.

        Args:
            group: the learner processes.
            timeout_s: time limit of each call, in seconds.
            has_reference: whether they hold a reference model.
        """
        self.group = group
        self.timeout_s = timeout_s
        self.has_reference = has_reference

    def update(self, batch: StepBatch) -> dict[str, float]:
        """Run the step's optimizer updates; each learner gets its share of every minibatch. Returns the metrics.

        Raises:
            TooManySkippedUpdatesError: too many updates in a row had NaN or inf.
        """
        work = [(share, batch.epochs) for share in self._split(batch.minibatches)]
        return batch.metrics | self.group.call_each(Learner.update, work, timeout_s=self.timeout_s)[0]

    def evaluate(self, sequence_groups: list[SequenceGroup]) -> dict[str, float]:
        """The objective's metrics on held-out sequence groups, without a gradient."""
        work = [(share,) for (share,) in self._split([sequence_groups])]
        return self.group.call_each(Learner.evaluate, work, timeout_s=self.timeout_s)[0]

    def logprobs(self, groups: Sequence[SequenceGroup], of_reference: bool = False) -> list[Tensor]:
        """Log-probs of the targets under the current weights or the reference: `[targets]` for each group, in order."""
        size = self.group.size
        work = [(groups[rank::size], of_reference) for rank in range(size)]
        found = self.group.call_each(Learner.logprobs, work, timeout_s=self.timeout_s)
        return [found[i % size][i // size] for i in range(len(groups))]

    def top_tokens(self, groups: Sequence[SequenceGroup]) -> Iterator[list[TopTokens]]:
        """The teacher's most likely tokens at every token of each completion: `[completions]` for each group.

        The learners hold the teacher until the last group.
        """
        size = self.group.size
        for start in range(0, len(groups), GROUPS_PER_CALL * size):
            part = groups[start : start + GROUPS_PER_CALL * size]
            work = [(part[rank::size],) for rank in range(size)]
            found = self.group.call_each(Learner.top_tokens, work, timeout_s=self.timeout_s)
            yield from (found[i % size][i // size] for i in range(len(part)))
        self.group.call_all(Learner.forget_teacher, timeout_s=self.timeout_s)

    def kl_to_reference(self, samples: Sequence[Sample]) -> list[float] | list[None]:
        """log pi(y) - log pi_ref(y) of each sample's completion y in nats, under the weights that sampled it.

        Its mean over samples is the KL to the reference model. Without a reference model there is None for each.
        """
        if not self.has_reference or not samples:
            return unknown_kl(samples)
        reference = self.logprobs([sample.sequence_group() for sample in samples], of_reference=True)
        sampled = (sum(sample.completion.logprobs) for sample in samples)
        return [own - float(values.double().sum()) for own, values in zip(sampled, reference, strict=True)]

    def weight_snapshot(self) -> WeightSnapshot:
        """The weights, gathered on the first learner. They stay there: use the result only as an argument of a call."""
        return self.group.call_deferred(Learner.weight_snapshot, timeout_s=self.timeout_s)[0]

    def save(self, folder: Path) -> None:
        """Write the state for an exact resume into an existing folder, and the model in the Hub's layout."""
        self.group.call_all(Learner.save, folder, timeout_s=self.timeout_s)
        self.export(folder / MODEL)

    def load(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            ValueError: the number of learners, the ZeRO stage or the dtype differs from that of the saved state.
        """
        self.group.call_all(Learner.load, folder, timeout_s=self.timeout_s)

    def export(self, folder: Path) -> None:
        """Write the model as a folder in the Hub's layout."""
        self.group.call_all(Learner.export, folder, timeout_s=self.timeout_s)

    def close(self) -> None:
        """End the learners."""
        self.group.close()

    def _split(self, minibatches: list[list[SequenceGroup]]) -> list[list[list[SequenceGroup]]]:
        """`[learners][minibatches][sequence groups]`"""
        by_minibatch = [split_ranks(minibatch, self.group.size) for minibatch in minibatches]
        return [[ranks[rank] for ranks in by_minibatch] for rank in range(self.group.size)]
