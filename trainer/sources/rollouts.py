"""Rollouts: completions of problems with their scores, for training, evaluation and `llmquest-rl rollout`.

`Rollouts` samples with the rollout workers, and scores every completion with the graders and the reward models.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from typing import Protocol, TypeVar

from llmquest_rl.types import Completion, Group, Problem, Request, Sampling, Score
from rewards.grader import combine_scores
from rewards.types import GradeItem
from rollout.weights import SyncReport, WeightSnapshot
from rollout.worker import RolloutWorker
from trainer.cluster.worker_group import WorkerGroup
from trainer.sources.answer_logprobs import AnswerScorer

T = TypeVar("T")

Sampled = tuple[list[Group], dict[str, float]]
"""Graded groups, and metrics of sampling and grading."""


class GradingWorker(Protocol):
    """A worker that scores completions: a grader, or a process of a reward model."""

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item, in order."""
        ...


@dataclass(frozen=True)
class RewardWorkers:
    """The workers of one reward: the graders, or the processes of one reward model."""

    group: WorkerGroup[GradingWorker]
    timeout_s: float
    """Time limit for the scores of one call in seconds, in addition to the time of its items."""
    item_timeout_s: float = 0.0
    """Time limit for one item, in seconds."""

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item, in order."""
        work = [(share,) for share in split_evenly(items, self.group.size)]
        longest = max((len(share) for (share,) in work), default=0)
        timeout_s = self.timeout_s + self.item_timeout_s * longest
        return list(chain.from_iterable(self.group.map(GradingWorker.grade, work, timeout_s=timeout_s)))


class Rollouts:
    """Samples completions and grades them. A restarted rollout worker gets the weights of the last sync."""

    def __init__(
        self,
        workers: WorkerGroup[RolloutWorker],
        rewards: list[RewardWorkers],
        seed: int,
        timeout_s: float,
        answers: AnswerScorer | None = None,
    ) -> None:
        """Take the workers of a run.

        Args:
            workers: the rollout workers.
            rewards: each of them scores every completion; the values add up.
            seed: the run's seed.
            timeout_s: time limit for the answers of one call of the rollout workers, in seconds.
            answers: computes the log-probs of gold answers behind thoughts; None = no reward needs them.
        """
        self.workers = workers
        self.rewards = rewards
        self.seed = seed
        self.timeout_s = timeout_s
        self.answers = answers
        self._current: tuple[WeightSnapshot, int] | None = None
        # Workers of other processes score side by side, and a thread calls each group. Those of this process take
        # turns: they share its number of threads, and a debugger can follow them.
        are_apart = len(rewards) > 1 and not any(reward.group.in_this_process for reward in rewards)
        self._threads = ThreadPoolExecutor(len(rewards), "reward") if are_apart else None
        workers.on_restart = self._restore

    def wait_ready(self) -> None:
        """Return when every worker is built."""
        self.workers.wait_ready()
        for reward in self.rewards:
            reward.group.wait_ready()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: `[requests][n]`, in the order of the requests.

        Raises:
            ClusterError: a worker does not answer within the time limit, or dies too often.
            ValueError: a prompt does not fit the engine's context.
        """
        work = [(share, sampling) for share in split_evenly(requests, self.workers.size)]
        return list(chain.from_iterable(self.workers.map(RolloutWorker.generate, work, timeout_s=self.timeout_s)))

    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """See `engine_logprobs`."""
        return engine_logprobs(self.workers, sequences, self.timeout_s)

    def sync_weights(self, snapshot: WeightSnapshot, version: int) -> list[SyncReport]:
        """Load new weights into every rollout worker, which verifies their checksums first."""
        self._current = None  # a worker that dies while it loads gets these weights when its work is redone
        reports = self.workers.call_all(RolloutWorker.load_weights, snapshot, version, timeout_s=self.timeout_s)
        self._current = snapshot, version
        return reports

    def sleep(self) -> None:
        """Free the memory that only sampling needs."""
        self.workers.call_all(RolloutWorker.sleep, timeout_s=self.timeout_s)

    def wake(self) -> None:
        """Undo `sleep`."""
        self.workers.call_all(RolloutWorker.wake, timeout_s=self.timeout_s)

    def run(self, problems: Sequence[Problem], n: int, sampling: Sampling, key: str, first: int = 0) -> Sampled:
        """Complete each problem `n` times and grade the completions.

        Args:
            problems: the problems.
            n: completions of each problem.
            sampling: how tokens are drawn.
            key: part of each request's seed, e.g. `train/12`, next to the run's seed, the problem's index and its id.
            first: index of the first problem among all problems of this key.

        Returns:
            Groups in the order of the problems, and metrics of time and throughput.

        Raises:
            ClusterError: a worker does not answer within the time limit, or dies too often.
        """
        started = time.perf_counter()
        requests = [
            Request(problem.prompt_ids, n, seed_for(self.seed, key, i, problem.id), problem.images)
            for i, problem in enumerate(problems, start=first)
        ]
        completions = self.generate(requests, sampling)
        generated = time.perf_counter()
        scores = self._grade(problems, completions)
        graded = time.perf_counter()
        tokens = sum(len(completion.token_ids) for answers in completions for completion in answers)
        metrics = {
            "time/generate_s": generated - started,
            "time/grade_s": graded - generated,
            "rollout/tokens": float(tokens),
            "rollout/tokens_per_s": tokens / (generated - started),
            "rollout/worker_restarts": float(self.workers.restarts),
            "reward/grader_restarts": float(sum(reward.group.restarts for reward in self.rewards)),
        }
        return [Group(*parts) for parts in zip(problems, completions, scores, strict=True)], metrics

    def close(self) -> None:
        """End every worker."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self.workers.close()
        for reward in self.rewards:
            reward.group.close()

    def _restore(self, worker: int) -> None:
        if self._current is not None:
            self.workers.call(worker, RolloutWorker.load_weights, *self._current, timeout_s=self.timeout_s)

    def _grade(self, problems: Sequence[Problem], completions: list[list[Completion]]) -> list[list[Score]]:
        items = [
            grade_item(problem, completion)
            for problem, answers in zip(problems, completions, strict=True)
            for completion in answers
        ]
        if self.answers is not None:
            pairs = [(problem, one) for problem, own in zip(problems, completions, strict=True) for one in own]
            items = self.answers.add(items, pairs, self.logprobs)
        if self._threads is None:
            by_reward = [reward.grade(items) for reward in self.rewards]
        else:
            futures = [self._threads.submit(reward.grade, items) for reward in self.rewards]
            by_reward = [future.result() for future in futures]
        scores = map(combine_scores, zip(*by_reward, strict=True))
        return [[next(scores) for _ in answers] for answers in completions]


def engine_logprobs(
    workers: WorkerGroup[RolloutWorker], sequences: Sequence[list[int]], timeout_s: float
) -> list[list[float]]:
    """Log-prob of each token given those before it, by the engines of rollout workers: `[sequences][len - 1]`."""
    work = [(share,) for share in split_evenly(sequences, workers.size)]
    return list(chain.from_iterable(workers.map(RolloutWorker.logprobs, work, timeout_s=timeout_s)))


def grade_item(problem: Problem, completion: Completion) -> GradeItem:
    """The input of a reward: the data set's row, and the completion with its length and finish reason."""
    extra = {"completion_tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
    return GradeItem(problem.prompt, completion.text, problem.answer, problem.columns | extra)


def seed_for(*parts: object) -> int:
    """A 32-bit seed that follows from the parts alone: equal on every machine and after a resume."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest(), "little")


def split_evenly(items: Sequence[T], count: int) -> list[list[T]]:
    """Split items into at most `count` contiguous parts whose sizes differ by at most one; no part is empty."""
    size, rest = divmod(len(items), count)
    iterator = iter(items)
    return [list(islice(iterator, size + (i < rest))) for i in range(min(count, len(items)))]
