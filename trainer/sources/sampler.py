"""Where a step's graded groups come from: live rollout workers and graders, or a folder of saved rollouts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmquest_rl.types import Group, Problem, Sampling
from rewards.failures import TooManyUnscoredError, check_unscored, failure_counts
from trainer.config.schema import BatchConfig
from trainer.learner.group import LearnerGroup
from trainer.sources.dynamic_sampling import Ask, NothingUsableError, Sampled
from trainer.sources.generate_and_grade import Rollouts, grade_item
from trainer.sources.replay import load_rollouts, save_rollouts

Draw = Callable[[int], list[Problem]]
"""Takes so many samples off the stream of prompts."""


class GroupCollector(Protocol):
    """Makes a step's groups with a function that asks prompts."""

    def __call__(self, ask: Ask, batch: BatchConfig) -> Sampled: ...

    def forget(self) -> None:
        """The weights that sample have changed."""
        ...


class SingleRound:
    """Every prompt gives a group, whatever its rewards."""

    def __call__(self, ask: Ask, batch: BatchConfig) -> Sampled:
        return ask(batch.prompts_per_step)

    def forget(self) -> None:
        """Nothing is kept."""


class Sampler(Protocol):
    """Answers prompts with graded groups."""

    def groups(self, step: int, draw: Draw, batch: BatchConfig, sampling: Sampling) -> Sampled:
        """Groups for training, and metrics."""
        ...

    def held_out(self, step: int, problems: list[Problem], n: int, sampling: Sampling) -> Sampled:
        """Groups for evaluation; none where nothing can be sampled."""
        ...

    def push(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        """Give the learners' weights to whoever samples; returns metrics."""
        ...


def check_groups(groups: Sequence[Group], limit: float) -> dict[str, float]:
    """Count ungraded completions by cause.

    Raises:
        TooManyUnscoredError: their share is above the limit.
    """
    scores = [score for group in groups for score in group.scores]
    items = [grade_item(group.problem, completion) for group in groups for completion in group.completions]
    check_unscored(scores, items, limit)
    return {f"reward/failed_{kind}": float(count) for kind, count in failure_counts(scores).items()}


class LiveSampler:
    """Rollout workers and graders."""

    def __init__(
        self, rollouts: Rollouts, gather: GroupCollector, max_unscored_share: float, sleeps: bool, save_to: Path | None
    ) -> None:
        self.rollouts = rollouts
        self.gather = gather
        self.max_unscored_share = max_unscored_share
        self.sleeps = sleeps
        self.save_to = save_to
        self.current: tuple[Any, int] | None = None
        rollouts.workers.on_restart = self._restore

    def groups(self, step: int, draw: Draw, batch: BatchConfig, sampling: Sampling) -> Sampled:
        sampled: list[Group] = []

        def ask(count: int) -> Sampled:
            n, key = batch.samples_per_prompt, f"train/{step}"
            groups, metrics = self.rollouts.run(draw(count), n, sampling, key, first=len(sampled))
            sampled.extend(groups)
            return groups, metrics | check_groups(sampled, self.max_unscored_share)

        try:
            groups, metrics = self.gather(ask, batch)
        except (TooManyUnscoredError, NothingUsableError):
            self._save(step, sampled)  # all of them: to be looked at
            raise
        if self.sleeps:
            self._all("sleep")
        self._save(step, groups)
        return groups, metrics

    def held_out(self, step: int, problems: list[Problem], n: int, sampling: Sampling) -> Sampled:
        # The key does not hold the step: evaluations differ by the weights alone.
        groups, metrics = self.rollouts.run(problems, n, sampling, "eval")
        check_groups(groups, self.max_unscored_share)
        return groups, {"time/eval_s": metrics["time/generate_s"] + metrics["time/grade_s"]}

    def push(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        """Every worker compares what it received with the learners' checksums, loads it, and reports what it loaded."""
        started = time.perf_counter()
        if self.sleeps:
            self._all("wake")
        self.gather.forget()
        self.current = None  # a worker that dies while it loads gets these weights when its work is redone
        current = (learners.weights(), version)
        reports = self._all("load_weights", *current)
        self.current = current
        assert all(report.version == version for report in reports)
        return {
            "time/sync_s": time.perf_counter() - started,
            "rollout/weight_version": float(version),
            "rollout/synced_mb": sum(report.num_bytes for report in reports) / 1e6,
        }

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self.rollouts.workers.all(method, *args, timeout_s=self.rollouts.timeout_s)

    def _save(self, step: int, groups: Sequence[Group]) -> None:
        if self.save_to is not None:
            save_rollouts(self.save_to, step, groups)

    def _restore(self, member: int) -> None:
        """A rebuilt worker starts with the initial weights: give it the current ones."""
        if self.current is not None:
            self.rollouts.workers.one(member, "load_weights", *self.current, timeout_s=self.rollouts.timeout_s)


@dataclass
class ReplayedSampler:
    """Rollouts that an earlier run saved: training without an engine."""

    folder: Path

    def groups(self, step: int, draw: Draw, batch: BatchConfig, sampling: Sampling) -> Sampled:
        groups = load_rollouts(self.folder, step)
        draw(len(groups))  # the epoch moves on; prompts whose groups were not saved are not known here
        return groups, {}

    def held_out(self, step: int, problems: list[Problem], n: int, sampling: Sampling) -> Sampled:
        return [], {}

    def push(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        return {}
