"""The workers that make rollouts, seen from the driver: those that sample completions, and those that score them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Protocol, TypeVar

from llmquest_rl.types import Completion, Request, Sampling, Score
from rewards.types import GradeItem
from rollout.weights import SyncReport, WeightSnapshot
from rollout.worker import RolloutWorker
from trainer.cluster.worker_group import WorkerGroup

T = TypeVar("T")


class RolloutWorkers:
    """The rollout workers of a run. A restarted worker gets the weights of the last sync before it gets work."""

    def __init__(self, group: WorkerGroup[RolloutWorker], timeout_s: float) -> None:
        """`timeout_s` is the longest wait for the answers of one call, in seconds."""
        self.group = group
        self.timeout_s = timeout_s
        self._current: tuple[WeightSnapshot, int] | None = None
        group.on_restart = self._restore

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: `[requests][n]`, in the order of the requests."""
        work = [(share, sampling) for share in split_evenly(requests, self.group.size)]
        return list(chain.from_iterable(self.group.map(RolloutWorker.generate, work, timeout_s=self.timeout_s)))

    def sync_weights(self, snapshot: WeightSnapshot, version: int) -> list[SyncReport]:
        """Load new weights into every worker, which first compares them with their checksums."""
        self._current = None  # a worker that dies while it loads gets these weights when its work is redone
        reports = self.group.call_all(RolloutWorker.load_weights, snapshot, version, timeout_s=self.timeout_s)
        self._current = snapshot, version
        return reports

    def sleep(self) -> None:
        """Free the memory that only sampling needs."""
        self.group.call_all(RolloutWorker.sleep, timeout_s=self.timeout_s)

    def wake(self) -> None:
        """Undo `sleep`."""
        self.group.call_all(RolloutWorker.wake, timeout_s=self.timeout_s)

    def _restore(self, worker: int) -> None:
        if self._current is not None:
            self.group.call(worker, RolloutWorker.load_weights, *self._current, timeout_s=self.timeout_s)


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
    """Longest wait for the scores of one call, in seconds, beside the time of the items."""
    item_timeout_s: float = 0.0
    """Longest time of one item, in seconds."""

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item, in order."""
        work = [(share,) for share in split_evenly(items, self.group.size)]
        longest = max((len(share) for (share,) in work), default=0)
        timeout_s = self.timeout_s + self.item_timeout_s * longest
        return list(chain.from_iterable(self.group.map(GradingWorker.grade, work, timeout_s=timeout_s)))


def split_evenly(items: Sequence[T], count: int) -> list[list[T]]:
    """At most `count` contiguous parts whose sizes differ by at most one; no part is empty."""
    size, rest = divmod(len(items), count)
    iterator = iter(items)
    return [list(islice(iterator, size + (i < rest))) for i in range(min(count, len(items)))]
