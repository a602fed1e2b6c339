"""Texts or images with a label, for classifiers: from files, the Hub, or a task whose answers are the labels.

A text is encoded with `tokenizer.encode(text)`, which adds a beginning-of-sequence token if the family has one. No chat
template, system prompt or end-of-sequence token is added, as is usual for classifiers with transformers: there the
end-of-sequence token often is the padding that pooling skips. Messages go through the chat template. The label is the
target of the last token; it counts as a token of the sequence.

A model that reads images alone is given the row's image and not its text (e.g. the question of a task).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.dataset import DatasetContext, Fields, RowKind, SupervisedData
from llmquest_rl.data.row_source import RowSource, read_source
from llmquest_rl.data.rows import DataError, Row, check_prompt
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.options import Options
from llmquest_rl.types import ImageFormat, Message


class Columns(Options):
    """The role of each column. A row has a text, messages or an image, and a label."""

    text: str = "text"
    """The text, a string."""
    messages: str = "messages"
    """A conversation, classified as a whole."""
    images: str | None = None
    """The image, for a model that reads images alone; null = texts."""
    label: str = "label"
    """One of the names in `objective.labels`, or an integer: its number there, from 0 on."""


class Config(RowSource):
    """The place of the rows."""

    columns: Columns = Columns()
    """The column mapping."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set.

    Raises:
        DataError: the objective has no labels, a file is missing, or a row is malformed and `data.malformed_rows` is
            `error`.
    """
    return read_source("labelled", config, config.columns, _answer, labels_of(context), context)


def _answer(row: Row) -> Fields:
    role = "text" if isinstance(row.prompt, str) else "messages"
    return {role: row.prompt, "label": row.answer, "images": row.images}


def labels_of(context: DatasetContext) -> RowKind:
    """Rows of a text, messages or an image, with a label.

    Raises:
        DataError: the objective has no labels.
    """
    if not context.labels:
        raise DataError(
            "the data set `labelled` gives each sequence a label, but the objective has no labels: choose an "
            "objective with labels, e.g. `objective: {name: classify, labels: [no, yes]}`"
        )
    numbers = {name: i for i, name in enumerate(context.labels)}
    images, texts = context.images, context.texts
    if texts is None:
        assert images is not None, "a model reads text or images"
        return _image_kind(numbers, images.format)
    return _text_kind(numbers, texts)


def _text_kind(numbers: Mapping[str, int], renderer: PromptRenderer) -> RowKind:
    def check(row: Fields) -> str | None:
        return _check_text(row) or _check_label(row, numbers)

    def group(row: Fields) -> SequenceGroup:
        ids = _ids(row, renderer)
        return SequenceGroup([], [[*ids, _number(row, numbers)]], mask=[[*[False] * len(ids), True]])

    return RowKind(check, group, _question)


def _image_kind(numbers: Mapping[str, int], shape: ImageFormat) -> RowKind:
    def check(row: Fields) -> str | None:
        found = len(row.get("images", ()))
        problem = None if found == 1 else f"the model reads one image (columns.images), but the row has {found}"
        return problem or _check_label(row, numbers)

    def group(row: Fields) -> SequenceGroup:
        return SequenceGroup([shape.token_id] * shape.tokens, [[_number(row, numbers)]])

    return RowKind(check, group, lambda row: "")  # rows with the same image are the same question


def _number(row: Fields, numbers: Mapping[str, int]) -> int:
    label: str | int = row["label"]
    return label if isinstance(label, int) else numbers[label]


def _check_text(row: Fields) -> str | None:
    if row.get("images"):
        return "the row has an image, but the model reads text only"
    if ("text" in row) == ("messages" in row):
        return f"the row must have either `text` or `messages`; it has: {', '.join(row)}"
    if "messages" in row and not isinstance(row["messages"], list):
        return "`messages` must be a list of messages"
    if "text" in row and not isinstance(row["text"], str):
        return f"the text must be a string, not {type(row['text']).__name__}"
    return check_prompt(row.get("messages", row.get("text")))


def _check_label(row: Fields, numbers: Mapping[str, int]) -> str | None:
    """A number is a class of the Hub's ClassLabel; true and false do not count as numbers."""
    label: Any = row.get("label")
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if label in range(len(numbers)) if is_number else isinstance(label, str) and label in numbers:
        return None
    known = f"expected one of {', '.join(numbers)}, or a number from 0 to {len(numbers) - 1}"
    return f"the row has no label: {known}" if label is None else f"unknown label {label!r}: {known}"


def _ids(row: Fields, renderer: PromptRenderer) -> list[int]:
    if "messages" in row:
        messages: Sequence[Message] = renderer.with_system(row["messages"])
        return renderer.encode(renderer.chat_text(messages, add_generation_prompt=False))
    return cast(list[int], renderer.tokenizer.encode(row["text"]))


def _question(row: Fields) -> str:
    """The whole input of the classifier."""
    return json.dumps(row["messages"], sort_keys=True) if "messages" in row else str(row["text"]).strip()
