"""The group of learner processes seen from the loop: one batch in, one set of metrics out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.packing import split_ranks
from llmquest_rl.types import Group
from trainer.cluster.worker_group import WorkerGroup

MODEL = "model"
"""The folder of the Hub's layout inside a checkpoint."""


@dataclass(frozen=True)
class StepBatch:
    """What one step trains on."""

    minibatches: list[list[SequenceGroup]]
    """Sequence groups of each optimizer update; their token weights make the update's loss a mean. May be empty."""
    passes: int = 1
    """Times that the minibatches are gone through."""
    metrics: dict[str, float] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    """For RL, what the sequence groups were made from: shown and saved, not trained on."""


class LearnerGroup:
    """Learners that hold one model together; every call goes to all of them, since they work in step."""

    def __init__(self, handle: WorkerGroup, timeout_s: float, start_timeout_s: float) -> None:
        self.handle = handle
        self.timeout_s = timeout_s
        self.start_timeout_s = start_timeout_s

    def wait_ready(self) -> None:
        """Return when every learner holds its model."""
        self.handle.wait_ready(self.start_timeout_s)

    def update(self, batch: StepBatch) -> dict[str, float]:
        """Run the step's optimizer updates; each learner gets its share of every minibatch."""
        shares = self._split(batch.minibatches)
        updates = [(share, batch.passes) for share in shares]
        metrics: dict[str, float] = self.handle.each("update", updates, timeout_s=self.timeout_s)[0]
        return batch.metrics | metrics

    def evaluate(self, sequence_groups: list[SequenceGroup]) -> dict[str, float]:
        """The objective's metrics on held-out sequence groups, without a gradient."""
        shares = self._split([sequence_groups])
        metrics: dict[str, float] = self.handle.each("evaluate", [s[0] for s in shares], timeout_s=self.timeout_s)[0]
        return metrics

    def weights(self) -> Any:
        """A reference to `(tensors by disk name, checksums)`, gathered on the first learner: to be passed on."""
        return self.handle.all("published", timeout_s=self.timeout_s, fetch=False)[0]

    def save(self, folder: Path) -> None:
        """Write what an exact resume needs into an existing folder, and the model for everybody else's tools."""
        self.handle.all("save", folder, timeout_s=self.timeout_s)
        self.export(folder / MODEL)

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote."""
        self.handle.all("load", folder, timeout_s=self.timeout_s)

    def export(self, folder: Path) -> None:
        """Write the model as a folder of the Hub's layout."""
        self.handle.all("export", folder, timeout_s=self.timeout_s)

    def close(self) -> None:
        self.handle.close()

    def _split(self, minibatches: list[list[SequenceGroup]]) -> list[list[list[SequenceGroup]]]:
        """[learners][minibatches][sequence groups]"""
        by_minibatch = [split_ranks(minibatch, self.handle.size) for minibatch in minibatches]
        return [[ranks[rank] for ranks in by_minibatch] for rank in range(self.handle.size)]
