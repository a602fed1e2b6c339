"""Reads documents: text files, the text column of files of rows, and data sets of the Hub."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmquest_rl.data.files import READERS, find_files, is_local, read_files, read_hub
from llmquest_rl.data.rows import DataError, MalformedRows

Document = tuple[str, str]
"""The place of a document (`file:line`), and its text."""


def read_documents(
    paths: str | tuple[str, ...], subset: str | None, split: str, text_column: str, malformed: MalformedRows
) -> Iterator[Document]:
    """The documents of files or of the Hub; a text file is one document, and so is a row.

    Args:
        paths: Files, glob patterns or Hub ids. `{stdlib}` is replaced by the folder of Python's standard library.
        subset: Hub only: the data set's configuration name.
        split: Hub only: the split to read.
        text_column: The column with the text in files of rows.
        malformed: Told of every document without text.

    Raises:
        DataError: a file is missing, or a row is malformed and `data.malformed_rows` is `error`.
    """
    for raw in [paths] if isinstance(paths, str) else paths:
        path = raw.replace("{stdlib}", sysconfig.get_path("stdlib"))
        if is_local(path) and not any(file.suffix in READERS for file in find_files(path)):
            yield from _text_files(path, malformed)
            continue
        rows = read_files(path, malformed) if is_local(path) else read_hub(path, subset, split)
        for where, row in rows:
            text = row.get(text_column)
            if isinstance(text, str) and text.strip():
                yield where, text
            else:
                malformed.report(where, f"there is no text in the column {text_column!r}")


def _text_files(path: str, malformed: MalformedRows) -> Iterator[Document]:
    files: list[Path] = find_files(path)
    if not files:
        raise DataError(f"there is no file {path} (relative paths start at {Path.cwd()})")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            malformed.report(str(file), f"not UTF-8 text: {error}")
            continue
        if text.strip():
            yield str(file), text
