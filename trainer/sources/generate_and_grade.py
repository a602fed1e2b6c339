"""Prompts to graded groups: rollout workers sample, judges score; for training, evaluation and `generate` alike."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import TypeVar

from llmquest_rl.types import Completion, Group, Problem, Request, Sampling, Score
from rewards.combine import combined
from rewards.grader import GradeItem
from trainer.cluster.worker_group import WorkerGroup

T = TypeVar("T")


def seed_for(*parts: object) -> int:
    """A 32-bit seed that depends on every part and on nothing else: the same on every machine and after a resume."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "little")


def shares(items: Sequence[T], count: int) -> list[list[T]]:
    """At most `count` contiguous shares whose sizes differ by one at most; none of them empty."""
    size, rest = divmod(len(items), count)
    iterator = iter(items)
    return [list(islice(iterator, size + (i < rest))) for i in range(min(count, len(items)))]


@dataclass(frozen=True)
class RewardWorkers:
    """Members that score completions: graders, or the processes of one reward model."""

    members: WorkerGroup
    timeout_s: float
    """Longest wait for the scores of one call, beside what each item may take."""
    item_timeout_s: float = 0.0
    """The same for every item that one member is given."""

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """A score for each item, in order."""
        work = [(share,) for share in shares(items, self.members.size)]
        longest = max((len(share) for (share,) in work), default=0)
        timeout_s = self.timeout_s + self.item_timeout_s * longest
        answers = self.members.map("grade", work, timeout_s=timeout_s)
        return [score for answer in answers for score in answer]


@dataclass
class Rollouts:
    """The sampling half of the system behind one call."""

    workers: WorkerGroup
    judges: list[RewardWorkers]
    """Every completion is scored by each of them; the values add up."""
    seed: int
    timeout_s: float
    """Longest wait for the completions of one call."""

    def wait_ready(self, timeout_s: float) -> None:
        """Return when every worker and judge is built."""
        self.workers.wait_ready(timeout_s)
        for judge in self.judges:
            judge.members.wait_ready(timeout_s)

    def run(
        self, problems: list[Problem], n: int, sampling: Sampling, key: str, first: int = 0
    ) -> tuple[list[Group], dict[str, float]]:
        """Complete each sample `n` times and grade the completions.

        Args:
            key: what the random numbers depend on beside the run's seed and the sample's place, e.g. `train/12`.
            first: the first sample's place among those of this key; the others follow.

        Returns:
            Groups in the order of the samples, and metrics of time and throughput.
        """
        started = time.perf_counter()
        completions = self._generate(problems, n, sampling, key, first)
        generated = time.perf_counter()
        scores = self._grade(problems, completions)
        graded = time.perf_counter()
        groups = [Group(*parts) for parts in zip(problems, completions, scores, strict=True)]
        tokens = sum(len(completion.token_ids) for group in completions for completion in group)
        metrics = {
            "time/generate_s": generated - started,
            "time/grade_s": graded - generated,
            "rollout/tokens": float(tokens),
            "rollout/tokens_per_s": tokens / (generated - started),
            "rollout/worker_restarts": float(self.workers.restarts),
            "reward/grader_restarts": float(sum(judge.members.restarts for judge in self.judges)),
        }
        return groups, metrics

    def close(self) -> None:
        """End workers and judges."""
        self.workers.close()
        for judge in self.judges:
            judge.members.close()

    def _generate(
        self, problems: list[Problem], n: int, sampling: Sampling, key: str, first: int
    ) -> list[list[Completion]]:
        requests = [
            Request(problem.prompt_ids, n, seed_for(self.seed, key, i, problem.id), problem.images)
            for i, problem in enumerate(problems, start=first)
        ]
        work = [(share, sampling) for share in shares(requests, self.workers.size)]
        answers = self.workers.map("generate", work, timeout_s=self.timeout_s)
        return [group for answer in answers for group in answer]

    def _grade(self, problems: list[Problem], completions: list[list[Completion]]) -> list[list[Score]]:
        items = [
            grade_item(problem, completion)
            for problem, group in zip(problems, completions, strict=True)
            for completion in group
        ]
        by_reward = [judge.grade(items) for judge in self.judges]
        scores = map(combined, zip(*by_reward, strict=True))
        return [[next(scores) for _ in group] for group in completions]


def grade_item(problem: Problem, completion: Completion) -> GradeItem:
    """What a reward gets to see: the row as the data set has it, the completion's text, and how long it was."""
    seen = {"completion_tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
    return GradeItem(problem.prompt, completion.text, problem.answer, problem.columns | seen)
