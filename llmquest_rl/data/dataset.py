"""Supervised data sets: their result, the context that they are given, and the way from rows to sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmquest_rl.batch import LazyGroups, SequenceGroup
from llmquest_rl.data.conversation import check_row, tokenize_row
from llmquest_rl.data.images import ImageReader, check_images, image_list
from llmquest_rl.data.rows import DataError, MalformedRowError, MalformedRows, RawImage, held_out_keys, question_key
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.deferred import torch
from llmquest_rl.types import Pooling

Fields = Mapping[str, Any]
"""A row: its values by name."""
PlacedFields = tuple[str, Fields]
"""The place of a row (`file:line`), and the row."""


@dataclass(frozen=True, slots=True)
class SupervisedData:
    """Sequences to train on, and others to validate on."""

    name: str
    train: Sequence[SequenceGroup]
    validation: Sequence[SequenceGroup]
    counters: dict[str, int] = field(default_factory=dict)
    """Number of rows left out by cause: `dropped_malformed_rows`, `dropped_long_rows`, `dropped_overlapping_rows`."""


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
    """The treatment of a row with more than `tokens_per_sequence` tokens: `data.long_prompts`."""
    labels: tuple[str, ...] = ()
    """What the objective scores, e.g. classes; () = it predicts tokens."""
    images: ImageReader | None = None
    """Reads the model's images; None = it reads text only."""
    pooling: Pooling = "eos"
    """Where the objective reads the scores of replies."""

    @property
    def renderer(self) -> PromptRenderer:
        """The renderer, which turns text into tokens.

        Raises:
            DataError: the model does not read text.
        """
        if self.texts is None:
            raise DataError("the data set holds text, but the model reads images alone: choose a model that reads text")
        return self.texts


@dataclass(frozen=True, slots=True)
class RowKind:
    """Turns rows of one kind into sequences. A row's raw images, if it has any, are the tuple `row["images"]`."""

    check: Callable[[Fields], str | None]
    """Gives the reason why a row is unusable, or None. The images have been checked before."""
    group: Callable[[Fields], SequenceGroup]
    """Makes the sequence of a usable row, with image tokens but without the images. Raises DataError if the chat
    template cannot render the row, and MalformedRowError if its tokens are unusable."""
    question: Callable[[Fields], str]
    """Gives the row's question. Rows with equal question and images are either all trained on or all validated on."""
    check_together: Callable[[Sequence[SequenceGroup]], str | None] = lambda groups: None
    """Gives the reason why the training rows, or separate validation rows, are unusable together, or None."""


@dataclass(frozen=True, slots=True)
class UnreadSequence:
    """A sequence whose images have not been read yet."""

    group: SequenceGroup
    images: tuple[RawImage, ...]


@dataclass(frozen=True, slots=True)
class Sequences(LazyGroups):
    """Sequences in memory. The images of a sequence are read on access, so they are never in memory all at once."""

    unread: Sequence[UnreadSequence]
    images: ImageReader | None

    def __len__(self) -> int:
        return len(self.unread)

    def at(self, index: int) -> SequenceGroup:
        """See `LazyGroups.at`."""
        found = self.unread[index]
        if self.images is None or not found.images:
            return found.group
        return replace(found.group, images=torch.from_numpy(self.images.read(found.images)))


def replies(renderer: PromptRenderer, mask_prompt: bool) -> RowKind:
    """The kind of rows whose replies are learnt: prompt and completion, or messages."""

    def group(row: Fields) -> SequenceGroup:
        return tokenize_row(row, renderer, mask_prompt)

    return RowKind(check_row, group, _question)


def _question(row: Fields) -> str:
    if "messages" in row:
        return next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
    return str(row["prompt"])


@dataclass(slots=True)
class RowTokenizer:
    """Turns rows into sequences, and counts the rows that are left out."""

    context: DatasetContext
    kind: RowKind
    dropped_long: int = 0

    def __call__(self, rows: Iterable[PlacedFields]) -> dict[str, list[UnreadSequence]]:
        """The sequences by question, in the order of the rows."""
        sequences: dict[str, list[UnreadSequence]] = {}
        for where, fields in rows:
            images = image_list(fields.get("images"))
            row = {**fields, "images": images} if images else fields
            problem = check_images(images) or self.kind.check(row)
            if problem is not None:
                self.context.malformed.report(where, problem)
                continue
            try:
                group = self.kind.group(row)
            except MalformedRowError as error:
                self.context.malformed.report(where, str(error))
                continue
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if self._fits(where, group):
                question = question_key(self.kind.question(row), images)
                sequences.setdefault(question, []).append(UnreadSequence(group, images))
        return sequences

    def _fits(self, where: str, group: SequenceGroup) -> bool:
        limit = self.context.tokens_per_sequence
        if group.longest_sequence <= limit:
            return True
        if self.context.long_rows == "error":
            raise DataError(
                f"{where}: the row has {group.longest_sequence} tokens, more than batch.tokens_per_sequence = {limit}: "
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
    """Make a data set of rows of one kind.

    No question is on both sides: training rows that ask a validation question are left out and counted.

    Args:
        validation: Rows to validate on, or the share of the questions that is set aside for validation.

    Raises:
        DataError: one of the sides has no rows left or is unusable as a whole, or a row is malformed and
            `data.malformed_rows` is `error`.
    """
    convert = RowTokenizer(context, kind)
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
    for side, found in (("training", train), ("validation", [] if isinstance(validation, float) else validated)):
        problem = kind.check_together([sequence.group for sequence in found]) if found else None
        if problem is not None:
            raise DataError(f"the {side} rows of data set {name} are unusable: {problem}")
    return SupervisedData(name, Sequences(train, context.images), Sequences(validated, context.images), counters)
