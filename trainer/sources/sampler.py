"""Samplers, which provide the graded groups of a step: from live workers, or from a folder of saved rollouts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmquest_rl.data.stream import PromptStream
from llmquest_rl.types import Group, Problem
from rewards.failures import TooManyUnscoredError, check_unscored
from trainer.config.schema import Config
from trainer.learner.group import LearnerGroup
from trainer.sources.dynamic_sampling import DynamicSampling, NothingUsableError
from trainer.sources.eval_metrics import equalized
from trainer.sources.next_token_eval import argmax_metrics
from trainer.sources.replay import load_rollouts, save_rollouts
from trainer.sources.rollouts import Rollouts, Sampled, grade_item


class Sampler(Protocol):
    """Provides graded groups for prompts."""

    def groups(self, step: int, stream: PromptStream) -> Sampled:
        """Take prompts from the stream, and return their groups for training, and metrics.

        Raises:
            TooManyUnscoredError: more completions could not be graded than `graders.max_unscored_share` allows.
            NothingUsableError: dynamic sampling found no group to learn from.
            ValueError: saved rollouts are missing or damaged.
        """
        ...

    def held_out(self, problems: Sequence[Problem]) -> Sampled:
        """Groups for evaluation, and metrics. There are no groups if rollouts are replayed, because no engine runs."""
        ...

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        """Sync the learners' weights to the rollout workers; returns metrics."""
        ...


def check_groups(groups: Sequence[Group], limit: float) -> dict[str, float]:
    """Count completions that could not be graded, by cause.

    Raises:
        TooManyUnscoredError: their share is above the limit.
    """
    scores = [score for group in groups for score in group.scores]
    items = (grade_item(group.problem, completion) for group in groups for completion in group.completions)
    failures = check_unscored(scores, items, limit)
    return {f"reward/failed_{kind}": float(count) for kind, count in failures.items()}


class LiveSampler:
    """Samples with rollout workers and grades with reward workers."""

    def __init__(self, rollouts: Rollouts, config: Config, save_to: Path | None) -> None:
        """`save_to` is the folder in which every step's groups are saved; None = they are not saved."""
        self.rollouts = rollouts
        self.config = config
        self.save_to = save_to
        is_dynamic = config.algorithm.dynamic_sampling
        self.dynamic = DynamicSampling(config.batch, config.algorithm) if is_dynamic else None

    def groups(self, step: int, stream: PromptStream) -> Sampled:
        sampled: list[Group] = []
        try:
            if self.dynamic is None or step < self.config.batch.dynamic_sampling_from:
                groups, metrics = self._round(step, stream, self.config.batch.prompts_per_step, sampled)
            else:
                while count := self.dynamic.prompts_to_sample():
                    self.dynamic.add(*self._round(step, stream, count, sampled))
                groups, metrics = self.dynamic.finish()
        except (TooManyUnscoredError, NothingUsableError):
            if self.save_to is not None:
                save_rollouts(self.save_to, step, sampled)  # all of them: the user will want to look at them
            raise
        if self.config.rollout.sleep:
            self.rollouts.sleep()
        if self.save_to is not None:
            save_rollouts(self.save_to, step, groups)
        return groups, metrics

    def _round(self, step: int, stream: PromptStream, count: int, sampled: list[Group]) -> Sampled:
        """Sample and grade the next `count` problems, and append their groups to those of the step, `sampled`."""
        n, sampling = self.config.batch.samples_per_prompt, self.config.rollout.sampling
        problems = stream.take(count)
        groups, metrics = self.rollouts.run(problems, n, sampling, f"train/{step}", first=len(sampled))
        if self.config.batch.equalize_wrong_groups:
            groups = [equalized(group, *self.config.correct_if) for group in groups]
        sampled += groups
        return groups, metrics | check_groups(sampled, self.config.graders.max_unscored_share)

    def held_out(self, problems: Sequence[Problem]) -> Sampled:
        # The key does not hold the step: evaluations differ by the weights alone.
        n = self.config.eval.samples_per_prompt
        groups, metrics = self.rollouts.run(problems, n, self.config.eval_sampling, "eval")
        check_groups(groups, self.config.graders.max_unscored_share)
        timing = {"time/eval_s": metrics["time/generate_s"] + metrics["time/grade_s"]}
        return groups, timing | argmax_metrics(problems, self.rollouts.generate)

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        started = time.perf_counter()
        if self.config.rollout.sleep:
            self.rollouts.wake()
        if self.dynamic is not None:
            self.dynamic.forget()
        reports = self.rollouts.sync_weights(learners.weight_snapshot(), version)
        assert all(report.version == version for report in reports)
        return {
            "time/sync_s": time.perf_counter() - started,
            "rollout/weight_version": float(version),
            "rollout/synced_mb": sum(report.num_bytes for report in reports) / 1e6,
        }


@dataclass
class ReplayedSampler:
    """Reads the rollouts that an earlier run saved: training without an engine."""

    folder: Path

    def groups(self, step: int, stream: PromptStream) -> Sampled:
        groups = load_rollouts(self.folder, step)
        stream.take(len(groups))  # the epoch moves on; prompts whose groups were not saved are unknown here
        return groups, {}

    def held_out(self, problems: Sequence[Problem]) -> Sampled:
        return [], {}

    def sync_weights(self, learners: LearnerGroup, version: int) -> dict[str, float]:
        return {}
