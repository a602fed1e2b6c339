"""What every supervised data set gives, and what it is given to load."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmquest_rl.batch import Atom
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.tokenizer import PromptRenderer


@dataclass(frozen=True, slots=True)
class SupervisedData:
    """Sequences to train on, and others to validate on."""

    name: str
    train: Sequence[Atom]
    validation: Sequence[Atom]
    counters: dict[str, int] = field(default_factory=dict)
    """What loading left out, by cause: `dropped_malformed_rows`, `dropped_long_rows`."""


@dataclass(frozen=True, slots=True)
class DatasetContext:
    """The run's settings that every data set needs."""

    renderer: PromptRenderer
    tokens_per_sequence: int
    """Longest sequence in tokens: `batch.tokens_per_sequence`."""
    seed: int
    malformed: MalformedRows
    long_rows: Literal["drop", "error"] = "drop"
    """What happens to a row longer than a sequence: `data.long_prompts`."""
