"""Reads rows from files (jsonl, json, parquet, csv) and from the Hub, each with its place.

jsonl and csv are read line by line rather than through `datasets`, so that messages give the line of a malformed row.
"""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmquest_rl.data.images import image_list
from llmquest_rl.data.rows import DataError, MalformedRows

Place = str
"""The place of a row: `file:line`."""
PlacedRow = tuple[Place, dict[str, Any]]
Reader = Callable[[Path, MalformedRows], Iterator[PlacedRow]]


def _jsonl(path: Path, malformed: MalformedRows) -> Iterator[PlacedRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:  # JSON or UTF-8
                malformed.report(where, f"not valid JSON: {error}")
                continue
            if isinstance(row, dict):
                yield where, row
            elif line.strip():
                malformed.report(where, f"a row must be a JSON object, not {type(row).__name__}")


def _json(path: Path, malformed: MalformedRows) -> Iterator[PlacedRow]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of objects (a file with one object per line is .jsonl)")
    for i, row in enumerate(rows):
        if isinstance(row, dict):
            yield f"{path}, row {i}", row
        else:
            malformed.report(f"{path}, row {i}", f"a row must be a JSON object, not {type(row).__name__}")


def _csv(path: Path, malformed: MalformedRows) -> Iterator[PlacedRow]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                malformed.report(where, f"the row does not have the header's {len(reader.fieldnames or [])} fields")
            else:
                yield where, dict(row)


def _parquet(path: Path, malformed: MalformedRows) -> Iterator[PlacedRow]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.lib.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1


READERS: dict[str, Reader] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def is_local(path: str) -> bool:
    """Whether a path names local files rather than a data set of the Hub."""
    looks_like_hub = path.count("/") <= 1 and not Path(path).suffix and not path.startswith((".", "/", "~"))
    return bool(find_files(path)) or not looks_like_hub


def find_files(path: str) -> list[Path]:
    """The files that a path or glob pattern matches, sorted; `**` matches folders at any depth."""
    expanded = str(Path(path).expanduser())
    return sorted(file for name in glob.glob(expanded, recursive=True) if (file := Path(name)).is_file())


def read_rows(
    path: str, subset: str | None, split: str, malformed: MalformedRows, images: str | None = None
) -> Iterator[PlacedRow]:
    """Rows of files, or of a data set of the Hub; see `read_files` and `read_hub`."""
    return read_files(path, malformed, images) if is_local(path) else read_hub(path, subset, split, images)


def read_files(path: str, malformed: MalformedRows, images: str | None = None) -> Iterator[PlacedRow]:
    """Rows of every file that `path`, a file or a glob pattern, matches.

    Args:
        images: The column of raw images, which becomes a tuple; a relative path in it starts at its file's folder.

    Raises:
        DataError: a file is missing or unreadable, or has an unknown format.
    """
    files = find_files(path)
    if not files:
        raise DataError(f"there is no file {path} (relative paths start at {Path.cwd()})")
    for file in files:
        if file.suffix not in READERS:
            raise DataError(f"{file}: rows can be read from files ending in {', '.join(READERS)}")
        for where, row in READERS[file.suffix](file, malformed):
            if images is not None and images in row:
                row[images] = image_list(row[images], file.parent)
            yield where, row


def read_hub(name: str, subset: str | None, split: str, images: str | None = None) -> Iterator[PlacedRow]:
    """Rows of one split of a data set of the Hub, from the local cache when there is no network.

    Args:
        images: The column of raw images, which becomes a tuple; they stay as they are stored, PNG or JPEG.

    Raises:
        DataError: the data set, subset or split cannot be loaded.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:
        # `datasets` passes on errors of a dozen libraries, and all of them mean the same to the user.
        raise DataError(
            f"the data set {name} (subset {subset}, split {split}) could not be loaded from the Hub or its cache: "
            f"{type(error).__name__}: {error}. Without a network, give the path of a .jsonl or .parquet file"
        ) from error
    if images is not None:
        rows = _undecoded(rows, images)
    for i, row in enumerate(rows):
        placed = dict(row)
        if images is not None and images in row:
            placed[images] = image_list(row[images])
        yield f"{name}/{split}, row {i}", placed


def _undecoded(rows: Any, column: str) -> Any:
    """Keep the images of a column compressed (PNG or JPEG), since their pixels could fill the memory."""
    from datasets import Image, List

    feature = rows.features.get(column)
    if isinstance(feature, Image):
        return rows.cast_column(column, Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return rows.cast_column(column, List(Image(decode=False)))
    return rows
