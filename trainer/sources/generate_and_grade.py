"""From problems to graded groups: sample completions and score them, for training, evaluation and `rollout` alike."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from llmquest_rl.types import Completion, Group, Problem, Request, Sampling, Score
from rewards.combine import combined
from rewards.types import GradeItem
from trainer.sources.workers import RewardWorkers, RolloutWorkers

Sampled = tuple[list[Group], dict[str, float]]
"""Groups, and metrics of how they were made."""


def seed_for(*parts: object) -> int:
    """A 32-bit seed that follows from the parts alone: equal on every machine and after a resume."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "little")


@dataclass
class Rollouts:
    """Samples completions and grades them."""

    workers: RolloutWorkers
    rewards: list[RewardWorkers]
    """Each of them scores every completion; the values add up."""
    seed: int

    def wait_ready(self, timeout_s: float) -> None:
        """Return when every worker is built."""
        self.workers.group.wait_ready(timeout_s)
        for reward in self.rewards:
            reward.group.wait_ready(timeout_s)

    def run(self, problems: Sequence[Problem], n: int, sampling: Sampling, key: str, first: int = 0) -> Sampled:
        """Complete each problem `n` times and grade the completions.

        Args:
            problems: the problems.
            n: completions of each problem.
            sampling: how tokens are drawn.
            key: part of the seed of each request, beside the run's seed and the problem's place, e.g. `train/12`.
            first: the place of the first problem among those of this key; the others follow.

        Returns:
            Groups in the order of the problems, and metrics of time and throughput.
        """
        started = time.perf_counter()
        requests = [
            Request(problem.prompt_ids, n, seed_for(self.seed, key, i, problem.id), problem.images)
            for i, problem in enumerate(problems, start=first)
        ]
        completions = self.workers.generate(requests, sampling)
        generated = time.perf_counter()
        scores = self._grade(problems, completions)
        graded = time.perf_counter()
        tokens = sum(len(completion.token_ids) for answers in completions for completion in answers)
        metrics = {
            "time/generate_s": generated - started,
            "time/grade_s": graded - generated,
            "rollout/tokens": float(tokens),
            "rollout/tokens_per_s": tokens / (generated - started),
            "rollout/worker_restarts": float(self.workers.group.restarts),
            "reward/grader_restarts": float(sum(reward.group.restarts for reward in self.rewards)),
        }
        return [Group(*parts) for parts in zip(problems, completions, scores, strict=True)], metrics

    def close(self) -> None:
        """End every worker."""
        self.workers.group.close()
        for reward in self.rewards:
            reward.group.close()

    def _grade(self, problems: Sequence[Problem], completions: list[list[Completion]]) -> list[list[Score]]:
        items = [
            grade_item(problem, completion)
            for problem, answers in zip(problems, completions, strict=True)
            for completion in answers
        ]
        by_reward = [reward.grade(items) for reward in self.rewards]
        scores = map(combined, zip(*by_reward, strict=True))
        return [[next(scores) for _ in answers] for answers in completions]


def grade_item(problem: Problem, completion: Completion) -> GradeItem:
    """The input of a reward: the row as the data set has it, the completion's text, and the completion's length."""
    extra = {"completion_tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
    return GradeItem(problem.prompt, completion.text, problem.answer, problem.columns | extra)
