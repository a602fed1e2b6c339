"""The data checks of a dry run: they load and render a few rows, and measure the lengths of sequences."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.stream import PromptStream, SequenceGroupStream
from llmquest_rl.types import Problem


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of prompts or sequences, in tokens."""

    shortest: int
    mean: float
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Summarise one or more lengths."""
        return cls(min(lengths), sum(lengths) / len(lengths), max(lengths))


@dataclass(frozen=True, slots=True)
class DataCheck:
    """The result of a look at a few rows."""

    lengths: Lengths
    counters: dict[str, int]
    """Number of rows left out, by cause."""


def check_task(stream: PromptStream, rows: int = 10) -> tuple[list[Problem], DataCheck]:
    """Look at the next problems of the stream and render held-out ones, too; the stream's position does not change.

    Raises:
        DataError: the data cannot be used.
    """
    state = stream.state_dict()
    problems = stream.take(rows)
    stream.held_out(rows)
    counters = stream.counters
    stream.load_state_dict(state)
    lengths = Lengths.of([len(problem.prompt_ids) for problem in problems])
    return problems, DataCheck(lengths, counters)


def check_dataset(stream: SequenceGroupStream, rows: int = 10) -> tuple[list[SequenceGroup], DataCheck]:
    """Look at the next sequences of the stream; its position does not change."""
    state = stream.state_dict()
    groups = stream.take(rows)
    stream.load_state_dict(state)
    return groups, DataCheck(Lengths.of([group.num_tokens for group in groups]), stream.counters)
