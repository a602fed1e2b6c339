"""Batch sources: a data set, or graded rollouts. The loop treats both in the same way."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.stream import PromptStream, SequenceGroupStream
from llmquest_rl.objectives import Objective
from llmquest_rl.packing import minibatches
from llmquest_rl.types import Group
from trainer.config.schema import BatchConfig, Config
from trainer.learner.group import LearnerGroup, StepBatch
from trainer.run.samples import completions_table, sample_rows
from trainer.sources.engine_teacher import EngineTeacher
from trainer.sources.eval_metrics import accuracy_metrics, lengths_by_outcome
from trainer.sources.intervals import wilson
from trainer.sources.sampler import Sampler

log = logging.getLogger(__name__)


class BatchSource(Protocol):
    """The source of a run's batches."""

    def next(self, step: int) -> StepBatch:
        """The batch of one step (steps count from 1)."""
        ...

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        """Sync the learners' weights to the rollout workers, if there are any; returns metrics."""
        ...

    def evaluate(self, learners: LearnerGroup) -> dict[str, float]:
        """Metrics on held-out data."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        ...


def weighted_minibatches(
    sequence_groups: Sequence[SequenceGroup], objective: Objective, batch: BatchConfig
) -> list[list[SequenceGroup]]:
    """Split a step into minibatches, and weight the tokens of each so that its loss is a mean over the minibatch."""
    return [
        objective.assign_token_weights(minibatch)
        for minibatch in minibatches(sequence_groups, batch.minibatches_per_step)
    ]


class DatasetSource:
    """Batches of a data set's sequences."""

    def __init__(self, stream: SequenceGroupStream, objective: Objective, config: Config) -> None:
        self.stream = stream
        self.objective = objective
        self.batch = config.batch
        self.validation = objective.assign_token_weights(stream.validation(config.data.eval_size))

    def next(self, step: int) -> StepBatch:
        sequence_groups = self.stream.take(self.batch.sequences_per_step)
        step_minibatches = weighted_minibatches(sequence_groups, self.objective, self.batch)
        return StepBatch(step_minibatches, self.batch.epochs_per_step, self.stream.metrics)

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        return {}

    def evaluate(self, learners: LearnerGroup) -> dict[str, float]:
        metrics = learners.evaluate(self.validation)
        if "eval/accuracy" not in metrics:
            return metrics
        # A sequence group is one decision: a pair, or a labelled text.
        estimate = wilson(metrics["eval/accuracy"], len(self.validation))
        return metrics | {"eval/accuracy_low": estimate.low, "eval/accuracy_high": estimate.high}

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class RolloutSource:
    """Batches of graded completions with their advantages."""

    def __init__(
        self,
        stream: PromptStream,
        sampler: Sampler,
        objective: Objective,
        config: Config,
        teacher: EngineTeacher | None = None,
    ) -> None:
        """`teacher` scores the completions of every step; None = no engine holds a teacher."""
        self.stream = stream
        self.teacher = teacher
        self.sampler = sampler
        self.objective = objective
        self.batch = config.batch
        self.correct = config.correct_if
        self.skips_groups = config.batch.zero_advantage_groups == "skip" and config.algorithm.needs_advantage
        self.weight_sync_interval = config.rollout.weight_sync_interval
        self.resumed = False
        self.held_out = stream.held_out(config.data.eval_size)
        self.zero_advantage_steps = 0

    def next(self, step: int) -> StepBatch:
        groups, metrics = self.sampler.groups(step, self.stream)
        sequence_groups, group_metrics = self.objective.sequence_groups(groups)
        metrics |= group_metrics.to_floats() | lengths_by_outcome(groups, *self.correct) | _staleness(groups, step)
        metrics |= self.stream.metrics
        self._watch_zero_advantage(sequence_groups, groups)
        metrics["reward/zero_advantage_steps"] = float(self.zero_advantage_steps)
        if self.teacher is not None:
            sequence_groups = self.teacher.score(sequence_groups)
        step_minibatches = weighted_minibatches(sequence_groups, self.objective, self.batch)
        if self.skips_groups:  # after the weights, which count them
            kept = [list(filter(_has_signal, minibatch)) for minibatch in step_minibatches]
            step_minibatches = list(filter(None, kept))
        return StepBatch(step_minibatches, self.batch.epochs_per_step, metrics, groups)

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        due = version % self.weight_sync_interval == 0 or self.resumed
        self.resumed = False
        return self.sampler.sync_weights(learners, version) if due else {}

    def evaluate(self, learners: LearnerGroup) -> dict[str, float]:
        groups, metrics = self.sampler.held_out(self.held_out)
        return metrics | accuracy_metrics(groups, *self.correct) if groups else metrics

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict(), "zero_advantage_steps": self.zero_advantage_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.zero_advantage_steps = state["zero_advantage_steps"]
        self.resumed = True  # the workers still have the weights that the run began with

    def _watch_zero_advantage(self, sequence_groups: Sequence[SequenceGroup], groups: Sequence[Group]) -> None:
        """Count consecutive steps in which no group has an advantage; after several, show the user some completions."""
        if any(map(_has_signal, sequence_groups)):
            self.zero_advantage_steps = 0
            return
        self.zero_advantage_steps += 1
        log.warning("all rewards are equal within every group of this step: there is nothing to learn from")
        if self.zero_advantage_steps % self.batch.max_zero_advantage_steps == 0:
            title = (
                f"{self.zero_advantage_steps} steps in a row without any difference in reward: the task is too "
                "hard or too easy, or the reward does not read the model's answers"
            )
            Console(stderr=True).print(completions_table(sample_rows(0, groups, 4), title))


def _has_signal(sequence_group: SequenceGroup) -> bool:
    """Whether a group has an advantage; objectives without advantages have made groups of those with a signal only."""
    advantages = sequence_group.token_fields.get("advantages")
    return advantages is None or any(value for values in advantages for value in values)


def _staleness(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Number of steps by which the learners were ahead of the oldest weights that sampled."""
    versions = [completion.weight_version for group in groups for completion in group.completions]
    return {"rollout/staleness": float(step - 1 - min(versions))} if versions else {}
