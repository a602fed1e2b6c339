"""What every supervised data set gives, and what it is given to load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

from llmquest_rl.batch import Atom
from llmquest_rl.data.conversation import check_row, row_atom
from llmquest_rl.data.images import ImageReader, check_images, image_list
from llmquest_rl.data.rows import DataError, MalformedRows, RawImage, held_out_keys, question_key
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.deferred import torch

Fields = Mapping[str, Any]
"""A row: what it has, by name."""
PlacedFields = tuple[str, Fields]
"""A row and where it stands, `file:line`."""


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

    texts: PromptRenderer | None
    """Turns text into tokens; None = the model reads images alone."""
    tokens_per_sequence: int
    """Longest sequence in tokens: `batch.tokens_per_sequence`."""
    seed: int
    malformed: MalformedRows
    long_rows: Literal["drop", "error"] = "drop"
    """What happens to a row longer than a sequence: `data.long_prompts`."""
    labels: tuple[str, ...] = ()
    """The classes that the objective tells apart; () = it has none."""
    images: ImageReader | None = None
    """Reads the model's images; None = it reads text only."""

    @property
    def renderer(self) -> PromptRenderer:
        """What turns text into tokens.

        Raises:
            DataError: the model reads none.
        """
        if self.texts is None:
            raise DataError("the data set holds text, but the model reads images alone: take one that reads text")
        return self.texts


@dataclass(frozen=True, slots=True)
class RowKind:
    """How rows of one kind become sequences. A row's raw images, if it has any, are a tuple by the name `images`."""

    check: Callable[[Fields], str | None]
    """What makes a row unusable, or None; images are checked already."""
    atom: Callable[[Fields], Atom]
    """The sequence of a usable row, with room for its images but without them; a DataError where the chat template
    cannot render it."""
    question: Callable[[Fields], str]
    """What makes two rows with the same images the same question: a question is either trained on or validated on."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A sequence whose images are still raw."""

    atom: Atom
    images: tuple[RawImage, ...]


@dataclass(frozen=True, slots=True)
class Sequences(Sequence[Atom]):
    """Sequences in memory; each one's images are read when it is asked for, and never all of them at once."""

    unread: Sequence[Unread]
    images: ImageReader | None

    def __len__(self) -> int:
        return len(self.unread)

    @overload
    def __getitem__(self, index: int) -> Atom: ...
    @overload
    def __getitem__(self, index: slice) -> list[Atom]: ...
    def __getitem__(self, index: int | slice) -> Atom | list[Atom]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        found = self.unread[index]
        if self.images is None or not found.images:
            return found.atom
        return replace(found.atom, images=torch.from_numpy(self.images.read(found.images)))


def replies(renderer: PromptRenderer, mask_prompt: bool) -> RowKind:
    """Rows of prompt and completion, or of messages, whose replies are learnt."""

    def atom(row: Fields) -> Atom:
        return row_atom(row, renderer, mask_prompt)

    return RowKind(check_row, atom, _question)


def _question(row: Fields) -> str:
    if "messages" in row:
        return next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
    return str(row["prompt"])


@dataclass(slots=True)
class RowsToAtoms:
    """Turns placed rows into sequences; counts what is left out."""

    context: DatasetContext
    kind: RowKind
    dropped_long: int = 0

    def __call__(self, rows: Iterable[PlacedFields]) -> dict[str, list[Unread]]:
        """The sequences by their question, in the order of the rows."""
        sequences: dict[str, list[Unread]] = {}
        for where, fields in rows:
            images = image_list(fields.get("images"))
            row = {**fields, "images": images} if images else fields
            problem = check_images(images) or self.kind.check(row)
            if problem is not None:
                self.context.malformed.report(where, problem)
                continue
            try:
                atom = self.kind.atom(row)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if self._fits(where, atom):
                question = question_key(self.kind.question(row), images)
                sequences.setdefault(question, []).append(Unread(atom, images))
        return sequences

    def _fits(self, where: str, atom: Atom) -> bool:
        limit = self.context.tokens_per_sequence
        if atom.longest_sequence <= limit:
            return True
        if self.context.long_rows == "error":
            raise DataError(
                f"{where}: the row has {atom.longest_sequence} tokens, more than batch.tokens_per_sequence = {limit}: "
                "raise it, or set data.long_prompts: drop"
            )
        self.dropped_long += 1
        return False


def rows_data(
    name: str,
    rows: Iterable[PlacedFields],
    validation: Iterable[PlacedFields] | float,
    kind: RowKind,
    context: DatasetContext,
) -> SupervisedData:
    """A data set of rows of one kind, with its own validation rows or a share of the questions.

    No question is on both sides: training rows that ask a validation question are left out and counted.

    Raises:
        DataError: nothing is left on one of the sides, or a malformed row where those are errors.
    """
    convert = RowsToAtoms(context, kind)
    sequences = convert(rows)
    if isinstance(validation, float):
        keys = held_out_keys(sequences, validation, context.seed) if sequences else ()
        held_out = {key: sequences[key] for key in keys}
        overlapping = 0
    else:
        held_out = convert(validation)
        overlapping = sum(len(found) for key, found in sequences.items() if key in held_out)
    train = [sequence for key, found in sequences.items() if key not in held_out for sequence in found]
    counters = {
        "dropped_malformed_rows": context.malformed.count,
        "dropped_long_rows": convert.dropped_long,
        "dropped_overlapping_rows": overlapping,
    }
    if not train or not held_out:
        left_out = ", ".join(f"{count} {cause}" for cause, count in counters.items())
        raise DataError(f"data set {name} has no {'validation' if train else 'training'} rows left ({left_out})")
    validated = [sequence for key in sorted(held_out) for sequence in held_out[key]]
    return SupervisedData(name, Sequences(train, context.images), Sequences(validated, context.images), counters)
