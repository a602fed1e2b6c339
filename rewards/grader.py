"""The grader: weighted rewards over completions, in worker processes with limits on time and memory for each item.

A reward that fails on an item costs that item its score and nothing else: no retry of its neighbours, no reward 0.
"""

import pickle
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from llmquest_rl.types import Score
from rewards.combine import combined
from rewards.config import GraderConfig, RewardConfig, check_names
from rewards.load import OWN_ARGUMENTS, VERL_ARGUMENTS, RewardError, is_verl_form, missing_message
from rewards.pool import Pool, Task
from rewards.types import GradeItem
from rewards.worker import Outcome

__all__ = ["GradeItem", "Grader", "check_rewards"]


class Grader:
    """Grades lists of items. A plain class: the cluster makes it an actor, a test uses it as it is."""

    def __init__(self, rewards: Sequence[RewardConfig], config: GraderConfig | None = None) -> None:
        """Start the worker processes.

        Raises:
            RewardError: a reward cannot be imported; the message names it and the reason.
            ValueError: no rewards, or two of the same name.
        """
        self._rewards = list(rewards)
        check_names(self._rewards)
        self._config = config or GraderConfig()
        self._pool = self._new_pool()
        self._lock = threading.Lock()

    def _new_pool(self) -> Pool:
        return Pool(self._rewards, self._config, self._config.processes)

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item; scores come in the order of the items."""
        drafts = [_Draft() for _ in items]
        with self._lock:
            try:
                for item, reward, outcome in self._pool.run(self._tasks(items, drafts)):
                    drafts[item].outcomes[reward] = outcome
            except BaseException:
                # Answers still on their way must not be taken for those of the next call.
                self._pool.close()
                raise
        return [draft.score(self._rewards) for draft in drafts]

    def _tasks(self, items: Sequence[GradeItem], drafts: list["_Draft"]) -> list[Task]:
        tasks = []
        for index, item in enumerate(items):
            try:
                pickled = pickle.dumps(item)
            except Exception as error:  # pickle raises whatever the columns' own code raises
                detail = f"its columns cannot be sent to a worker process: {type(error).__name__}: {error}"
                drafts[index].outcomes[0] = Outcome({}, "invalid", detail)
            else:
                tasks.append(Task(index, list(range(len(self._rewards))), pickled))
        return tasks

    def check(self, columns: Iterable[str]) -> None:
        """Check that the data set's columns fill every argument that the rewards need.

        Args:
            columns: beside prompt, completion and answer, which always exist.

        Raises:
            RewardError: an argument is missing; the message names the columns there are.
        """
        available = {*columns, *OWN_ARGUMENTS}
        for name, required in self._pool.required.items():
            filled = available | set(VERL_ARGUMENTS) if is_verl_form(required) else available
            missing = set(required) - filled
            if missing:
                raise RewardError(missing_message(name, missing, available))

    @property
    def replaced(self) -> int:
        """Worker processes that were killed or died, and were replaced, so far."""
        return self._pool.replaced

    def close(self) -> None:
        """End every worker process."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class _Draft:
    """What is known of an item's score so far: outcomes by reward index."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def score(self, rewards: list[RewardConfig]) -> Score:
        """The weighted sum of what applies; unscored if anything failed or nothing applies."""
        return combined([_weighted(rewards[index], outcome) for index, outcome in sorted(self.outcomes.items())])


def _weighted(reward: RewardConfig, outcome: Outcome) -> Score:
    """What one reward contributes."""
    value = None if outcome.failure is not None else outcome.parts[reward.name]
    total = None if value is None else reward.weight * value
    return Score(total, outcome.parts, outcome.failure, outcome.detail, outcome.seconds)


def check_rewards(rewards: Sequence[RewardConfig], columns: Iterable[str], config: GraderConfig | None = None) -> None:
    """Load the rewards in a worker process and check their arguments, without grading anything.

    Raises:
        RewardError: a reward cannot be imported, or needs an argument that is no column.
    """
    with Grader(rewards, (config or GraderConfig()).model_copy(update={"processes": 1})) as grader:
        grader.check(columns)
