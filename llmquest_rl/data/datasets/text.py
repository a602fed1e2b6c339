"""Pretraining on text: documents are joined, each followed by the end-of-sequence token, and cut into blocks.

A block may hold the end of one document and the beginning of others. Attention crosses their borders, as is usual in
pretraining. A document is either trained on or validated on as a whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from llmquest_rl.batch import LazyGroups, SequenceGroup
from llmquest_rl.data.dataset import DatasetContext, SupervisedData
from llmquest_rl.data.documents import Document, read_documents
from llmquest_rl.data.rows import DataError, held_out_keys
from llmquest_rl.options import Options


class Config(Options):
    """The place of the text."""

    path: str | tuple[str, ...] = "{stdlib}/*.py"
    """Text files, or files of rows (jsonl, json, csv, parquet), or a Hub id; glob patterns and lists are allowed.
    `{stdlib}` is replaced by the folder of Python's own standard library, which every machine has."""
    subset: str | None = None
    """Hub only: the data set's configuration name."""
    split: str = "train"
    """Hub only: the split to read."""
    text_column: str = "text"
    """The column with the text in files of rows. A row is one document, and so is a text file."""
    validation_path: str | tuple[str, ...] | None = None
    """Separate files for the validation loss; null = a share of the documents."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the documents set aside without `validation_path`, at least one; a seeded hash chooses them."""
    max_documents: PositiveInt | None = None
    """Maximum number of documents that are read; null = all."""


@dataclass(frozen=True, slots=True)
class Blocks(LazyGroups):
    """Consecutive blocks of one long sequence of tokens; the last may be shorter."""

    tokens: NDArray[np.int32]
    length: int

    def __len__(self) -> int:
        full, rest = divmod(len(self.tokens), self.length)
        return full + (rest >= 2)  # a single token predicts nothing

    def at(self, index: int) -> SequenceGroup:
        """See `LazyGroups.at`."""
        start = index * self.length
        return SequenceGroup([], [self.tokens[start : start + self.length].tolist()])


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set.

    Raises:
        DataError: a file is missing or holds no text, or a row is malformed and `data.malformed_rows` is `error`.
    """
    documents = list(islice(_documents(config, config.path, context), config.max_documents))
    if config.validation_path is None:
        if len(documents) < 2:
            raise DataError(f"{config.path} holds {len(documents)} documents: give more, or a validation_path")
        held_out = held_out_keys((text for _, text in documents), config.validation_share, context.seed)
        train = [document for document in documents if document[1] not in held_out]
        validation = [document for document in documents if document[1] in held_out]
    else:
        train, validation = documents, list(_documents(config, config.validation_path, context))
    name = f"text/{config.path}"
    data = SupervisedData(
        name,
        _blocks(train, context),
        _blocks(validation, context),
        {"dropped_malformed_rows": context.malformed.count},
    )
    if not data.train or not data.validation:
        raise DataError(
            f"{name} has too little text: {len(train)} documents to train on, {len(validation)} to validate"
        )
    return data


def _blocks(documents: Iterable[Document], context: DatasetContext) -> Blocks:
    encode, eos = context.renderer.encode, context.renderer.tokenizer.eos_token_id
    parts = [np.array([*encode(text), eos], dtype=np.int32) for _, text in documents]
    return Blocks(np.concatenate(parts) if parts else np.zeros(0, np.int32), context.tokens_per_sequence)


def _documents(config: Config, paths: str | tuple[str, ...], context: DatasetContext) -> Iterator[Document]:
    return read_documents(paths, config.subset, config.split, config.text_column, context.malformed)
