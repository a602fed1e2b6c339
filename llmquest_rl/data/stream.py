"""Resumable streams, from which each step takes problems of a task or sequences of a data set.

The state of a stream is one position. The order of every epoch follows from (seed, epoch), so a resumed stream
continues exactly as an uninterrupted one, also in the middle of an epoch.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.dataset import SupervisedData
from llmquest_rl.data.hint import hinted_prompt
from llmquest_rl.data.rows import DataError, Row
from llmquest_rl.data.task import Task
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.types import Problem

LongPrompts = Literal["drop", "error"]
MAX_DROPPED_IN_A_ROW = 1000


class EpochOrder:
    """Maps a running position to a row's index: a new seeded permutation in every epoch. Endless data has no epochs."""

    def __init__(self, size: int | None, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, position: int) -> int:
        if self.size is None:
            return position
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._order = list(range(self.size))
            random.Random(f"{self._seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._order[offset]


def _check_same_data(state: dict[str, Any], name: str, size: int | None, seed: int) -> None:
    for key, now in (("name", name), ("size", size), ("seed", seed)):
        if state[key] != now:
            raise DataError(
                f"the checkpoint was made with other data ({key} was {state[key]!r}, is {now!r}), "
                "so it cannot be resumed exactly"
            )


class PromptStream:
    """An endless stream of a task's problems, rendered, in a seeded order.

    Args:
        max_prompt_tokens: Maximum length of a prompt in tokens, with those of its images. Longer prompts are dropped
            and counted, or are an error, as `long_prompts` says.
        hint: Template of the prompts that the reference model reads (`llmquest_rl/data/hint.py`); None = the same.
    """

    def __init__(
        self,
        task: Task,
        renderer: PromptRenderer,
        seed: int,
        max_prompt_tokens: int = 512,
        long_prompts: LongPrompts = "drop",
        hint: str | None = None,
    ) -> None:
        if task.train.size == 0:
            raise DataError(f"task {task.name} has no training rows")
        self._task = task
        self._renderer = renderer
        self._seed = seed
        self._max_prompt_tokens = max_prompt_tokens
        self._long_prompts = long_prompts
        self._hint = hint
        self._order = EpochOrder(task.train.size, seed)
        self._position = 0
        self._dropped_long = 0
        self._dropped_long_held_out = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The passes through the data so far (0 for endless data), and the number of rows left out, by cause."""
        epoch = self._position / self._order.size if self._order.size else 0.0
        return {"data/epoch": epoch} | {f"data/{name}": float(count) for name, count in self.counters.items()}

    @property
    def counters(self) -> dict[str, int]:
        """Number of rows left out, by cause. A long prompt counts once in every epoch."""
        return {
            "dropped_malformed_rows": 0,
            **self._task.counters,
            "dropped_long_prompts": self._dropped_long,
            "dropped_long_held_out_prompts": self._dropped_long_held_out,
        }

    def take(self, n: int) -> list[Problem]:
        """Take the next n problems; they may span several epochs.

        Raises:
            DataError: a prompt is too long and `long_prompts` is `error`, or all prompts of an epoch are too long.
        """
        problems: list[Problem] = []
        dropped_in_a_row = 0
        while len(problems) < n:
            row = self._task.train.row(self._order(self._position))
            self._position += 1
            problem = self._render(row)
            if problem is not None:
                problems.append(problem)
                dropped_in_a_row = 0
                continue
            self._dropped_long += 1
            dropped_in_a_row += 1
            if dropped_in_a_row >= (self._order.size or MAX_DROPPED_IN_A_ROW):
                raise DataError(
                    f"{dropped_in_a_row} consecutive prompts of task {self._task.name} have more than "
                    f"{self._max_prompt_tokens} tokens: raise data.max_prompt_tokens"
                )
        return problems

    def held_out(self, n: int) -> list[Problem]:
        """Up to n held-out problems, drawn with the seed; the same ones at every call."""
        size = self._task.held_out.size
        assert size is not None, "held-out rows are finite"
        order = EpochOrder(size, self._seed)
        problems: list[Problem] = []
        dropped = 0
        for position in range(size):
            if len(problems) == n:
                break
            problem = self._render(self._task.held_out.row(order(position)))
            if problem is None:
                dropped += 1
            else:
                problems.append(problem)
        self._dropped_long_held_out = dropped
        return problems

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume, small enough for JSON."""
        return {
            "name": self._task.name,
            "size": self._order.size,
            "seed": self._seed,
            "position": self._position,
            "dropped_long": self._dropped_long,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            DataError: the state belongs to other data or another seed.
        """
        _check_same_data(state, self._task.name, self._order.size, self._seed)
        self._position = state["position"]
        self._dropped_long = state["dropped_long"]

    def _render(self, row: Row) -> Problem | None:
        ids = self._renderer.prompt_ids(row.prompt, len(row.images))
        if len(ids) > self._max_prompt_tokens:
            if self._long_prompts == "error":
                raise DataError(
                    f"the prompt {row.id} has {len(ids)} tokens, more than data.max_prompt_tokens = "
                    f"{self._max_prompt_tokens}: raise it, or set data.long_prompts: drop"
                )
            return None
        images = self._renderer.images.read(row.images) if self._renderer.images and row.images else None
        hinted = None if self._hint is None else hinted_prompt(self._hint, row)
        reference_ids = None if hinted is None else self._renderer.prompt_ids(hinted, len(row.images))
        return Problem(row.id, row.prompt, ids, row.answer, row.columns, images, reference_ids)


class SequenceGroupStream:
    """An endless stream of a supervised data set's training sequences, in a seeded order."""

    def __init__(self, data: SupervisedData, seed: int) -> None:
        if len(data.train) == 0:
            raise DataError(f"data set {data.name} has no training sequences")
        self.data = data
        self._seed = seed
        self._order = EpochOrder(len(data.train), seed)
        self._position = 0

    @property
    def metrics(self) -> dict[str, float]:
        """The passes through the data so far, and the number of rows left out while loading, by cause."""
        epoch = self._position / len(self.data.train)
        return {"data/epoch": epoch} | {f"data/{name}": float(count) for name, count in self.counters.items()}

    @property
    def counters(self) -> dict[str, int]:
        """Number of rows left out while loading, by cause."""
        return dict(self.data.counters)

    def take(self, n: int) -> list[SequenceGroup]:
        """Take the next n sequences; they may span several epochs."""
        start, self._position = self._position, self._position + n
        return [self.data.train[self._order(position)] for position in range(start, self._position)]

    def validation(self, n: int | None = None) -> list[SequenceGroup]:
        """Up to n validation sequences (all if n is None), drawn with the seed; the same ones at every call."""
        sequences: Sequence[SequenceGroup] = self.data.validation
        order = EpochOrder(len(sequences), self._seed)
        count = len(sequences) if n is None else min(n, len(sequences))
        return [sequences[order(position)] for position in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume, small enough for JSON."""
        return {"name": self.data.name, "size": len(self.data.train), "seed": self._seed, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            DataError: the state belongs to other data or another seed.
        """
        _check_same_data(state, self.data.name, len(self.data.train), self._seed)
        self._position = state["position"]
