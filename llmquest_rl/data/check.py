"""What a dry run wants to know about data: whether it loads and renders, and how long it is."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmquest_rl.batch import Atom
from llmquest_rl.data.stream import AtomStream, PromptStream
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.types import Sample


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of prompts or sequences, in tokens."""

    shortest: int
    mean: float
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """The summary of at least one length."""
        return cls(min(lengths), sum(lengths) / len(lengths), max(lengths))


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What a look at a few rows found."""

    lengths: Lengths
    counters: dict[str, int]
    """What was left out, by cause."""
    example: str = ""
    """The first prompt as the model sees it, special tokens written out."""


def check_task(stream: PromptStream, renderer: PromptRenderer, rows: int = 10) -> tuple[list[Sample], DataCheck]:
    """The samples that the stream gives next, held-out rows rendered too; the stream stays where it was.

    Raises:
        DataError: the data cannot be used.
    """
    state = stream.state_dict()
    samples = stream.take(rows)
    stream.held_out(rows)
    counters = stream.counters
    stream.load_state_dict(state)
    lengths = Lengths.of([len(sample.prompt_ids) for sample in samples])
    return samples, DataCheck(lengths, counters, renderer.decode(samples[0].prompt_ids))


def check_dataset(stream: AtomStream, rows: int = 10) -> tuple[list[Atom], DataCheck]:
    """The sequences that the stream gives next; the stream stays where it was."""
    state = stream.state_dict()
    atoms = stream.take(rows)
    stream.load_state_dict(state)
    return atoms, DataCheck(Lengths.of([atom.num_tokens for atom in atoms]), stream.counters)
