"""The grader: weighted rewards of completions, run in worker processes with limits on time and memory per item.

If a reward fails on an item, that item has no score, rather than a score of 0. Other items are not affected.
"""

import math
import pickle
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from llmquest_rl.types import Score
from rewards.config import GraderConfig, RewardConfig, check_names
from rewards.load import OWN_ARGUMENTS, VERL_ARGUMENTS, RewardError, is_verl_form, missing_message
from rewards.pool import Pool, Task
from rewards.types import GradeItem
from rewards.worker import Outcome

__all__ = ["GradeItem", "Grader", "check_rewards", "combine_scores"]


class Grader:
    """Grades lists of items. A cluster runs it as an actor; a test can use it directly."""

    def __init__(self, rewards: Sequence[RewardConfig], config: GraderConfig | None = None) -> None:
        """Start the worker processes.

        Raises:
            RewardError: a reward cannot be imported; the message names it and the reason.
            ValueError: there are no rewards, or two have the same name.
        """
        self._rewards = list(rewards)
        check_names(self._rewards)
        self._config = config or GraderConfig()
        self._pool = self._new_pool()
        self._lock = threading.Lock()

    def _new_pool(self) -> Pool:
        return Pool(self._rewards, self._config, self._config.processes)

    def grade(self, items: Sequence[GradeItem]) -> list[Score]:
        """Score each item; the scores are in the order of the items."""
        drafts = [_Draft() for _ in items]
        with self._lock:
            try:
                for item, reward, outcome in self._pool.run(self._tasks(items, drafts)):
                    drafts[item].outcomes[reward] = outcome
            except BaseException:
                # Late answers must not be mistaken for answers to the next call.
                self._pool.close()
                raise
        return [draft.score(self._rewards) for draft in drafts]

    def _tasks(self, items: Sequence[GradeItem], drafts: list["_Draft"]) -> list[Task]:
        tasks = []
        for index, item in enumerate(items):
            try:
                pickled = pickle.dumps(item)
            except Exception as error:  # pickle calls code of the columns' classes, which may raise anything
                detail = f"the columns of this item cannot be sent to a worker process: {type(error).__name__}: {error}"
                drafts[index].outcomes[0] = Outcome({}, "invalid", detail)
            else:
                tasks.append(Task(index, list(range(len(self._rewards))), pickled))
        return tasks

    def check(self, columns: Iterable[str]) -> None:
        """Check that the data set has a column for every argument that the rewards need.

        Args:
            columns: Names of the columns. The arguments prompt, completion and answer always exist.

        Raises:
            RewardError: a column is missing; the message lists the existing ones.
        """
        available = {*columns, *OWN_ARGUMENTS}
        for name, required in self._pool.required.items():
            filled = available | set(VERL_ARGUMENTS) if is_verl_form(required) else available
            missing = set(required) - filled
            if missing:
                raise RewardError(missing_message(name, missing, available))

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
    """The outcomes of an item so far, by reward index."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def score(self, rewards: list[RewardConfig]) -> Score:
        """The weighted sum of the rewards that apply; unscored if one failed or none applies."""
        return combine_scores([_weighted(rewards[index], outcome) for index, outcome in sorted(self.outcomes.items())])


def _weighted(reward: RewardConfig, outcome: Outcome) -> Score:
    """The contribution of one reward to the score."""
    value = None if outcome.failure is not None else outcome.parts[reward.name]
    total = None if value is None else reward.weight * value
    weights = {reward.name: reward.weight}
    return Score(total, outcome.parts, outcome.failure, outcome.detail, outcome.seconds, weights)


def check_rewards(rewards: Sequence[RewardConfig], columns: Iterable[str], config: GraderConfig | None = None) -> None:
    """Load the rewards in a worker process and check their arguments, without grading anything.

    Raises:
        RewardError: a reward cannot be imported, or needs an argument for which there is no column.
    """
    with Grader(rewards, (config or GraderConfig()).model_copy(update={"processes": 1})) as grader:
        grader.check(columns)


def combine_scores(scores: Sequence[Score]) -> Score:
    """The sum of the values, with the parts, the weights and the seconds of all scores.

    If a score failed, the result is a failure of the first one's kind, because a sum without one of its terms would be
    a different reward. A sum that is not finite is the failure `invalid`. If no reward applies, there is no value.
    """
    parts = {name: value for score in scores for name, value in score.parts.items()}
    seconds = sum(score.seconds for score in scores)
    weights = {name: weight for score in scores for name, weight in score.weights.items()}
    failed = [score for score in scores if score.failure is not None]
    if failed:
        detail = "; ".join(score.detail for score in failed)
        return Score(None, parts, failed[0].failure, detail, seconds, weights)
    values = [score.value for score in scores if score.value is not None]
    total = sum(values) if values else None
    if total is not None and not math.isfinite(total):
        detail = f"the total reward is {total}, the weighted sum of {parts}: lower the weights"
        return Score(None, parts, "invalid", detail, seconds, weights)
    return Score(total, parts, None, "", seconds, weights)
