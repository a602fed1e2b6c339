"""Saves the groups of a step without loss, and loads them, so that training can be debugged without an engine.

Each step is a gzipped file of JSON lines: a header, then one line per group. Values that data sets contain and JSON
lacks (tuples, sets, dates, keys that are not strings) are written as `{"$type": [...]}`.
"""

import base64
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmquest_rl.types import Completion, Group, Problem, Score

FORMAT = 2
_FILE = re.compile(r"step-(\d{6,})\.jsonl\.gz")


def _encode_array(array: NDArray[Any]) -> list[Any]:
    if array.dtype.hasobject or array.dtype.names:
        raise TypeError(f"an array of {array.dtype} holds more than numbers, which cannot be written")
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _decode_array(data: list[Any]) -> NDArray[Any]:
    dtype, shape, content = data
    return np.frombuffer(base64.b64decode(content), dtype).reshape(shape).copy()


_CODECS: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    tuple: ("tuple", lambda value: list(map(_encode, value)), lambda data: tuple(map(_decode, data))),
    set: ("set", lambda value: list(map(_encode, value)), lambda data: set(map(_decode, data))),
    frozenset: ("frozenset", lambda value: list(map(_encode, value)), lambda data: frozenset(map(_decode, data))),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode(), base64.b64decode),
    complex: ("complex", lambda value: [value.real, value.imag], lambda data: complex(*data)),
    Decimal: ("decimal", str, Decimal),
    Fraction: ("fraction", str, Fraction),
    datetime: (
        "datetime",
        lambda value: [value.isoformat(), value.fold],
        lambda data: datetime.fromisoformat(data[0]).replace(fold=data[1]),
    ),
    date: ("date", date.isoformat, date.fromisoformat),
    time: (
        "time",
        lambda value: [value.isoformat(), value.fold],
        lambda data: time.fromisoformat(data[0]).replace(fold=data[1]),
    ),
    timedelta: (
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda data: timedelta(*data),
    ),
    np.ndarray: ("array", _encode_array, _decode_array),
}
_DECODERS = {name: decode for name, _, decode in _CODECS.values()}


def save_rollouts(folder: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write the groups of a step, atomically, and return the file.

    Raises:
        TypeError: an answer or column is of a type that cannot be written; the message names the problem.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, step)
    lines = [json.dumps({"format": FORMAT, "step": step, "groups": len(groups)})]
    for group in groups:
        try:
            lines.append(json.dumps(_row(group)))
        except TypeError as error:
            raise TypeError(f"problem {group.problem.id} cannot be saved for replay: {error}") from None
    # Level 1 and no time stamp: rollouts are mostly digits, and equal rollouts make equal files.
    data = gzip.compress("\n".join([*lines, ""]).encode(), compresslevel=1, mtime=0)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
    return path


def load_rollouts(folder: Path, step: int) -> list[Group]:
    """The groups of a step as they were saved, every float exact.

    Raises:
        ValueError: there is no such file, or it is damaged; the message says which steps there are.
    """
    path = _path(folder, step)
    if not path.is_file():
        raise ValueError(f"{folder}: no rollouts of step {step}; saved steps: {replay_steps(folder) or 'none'}")
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        header, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:] if line]
        if header["format"] == FORMAT:
            if header["groups"] != len(rows):
                raise ValueError(f"it has {len(rows)} of {header['groups']} groups")
            return [_group(_decode(row)) for row in rows]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged, or is not a file of rollouts ({error})") from error
    raise ValueError(
        f"{path} was saved by another version (format {header['format']}; this version reads {FORMAT}): sample again "
        "with `llmquest-rl rollout`"
    )


def replay_steps(folder: Path) -> list[int]:
    """The steps whose rollouts are in `folder`, in order."""
    matches = [_FILE.fullmatch(path.name) for path in folder.glob("step-*.jsonl.gz")]
    return sorted(int(match[1]) for match in matches if match)


def check_replay(folder: Path, steps: int) -> None:
    """Check that a run of that many steps can be replayed.

    Raises:
        ValueError: steps are missing; the message names the first.
    """
    missing = sorted(set(range(1, steps + 1)) - set(replay_steps(folder)))
    if missing:
        raise ValueError(f"{folder}: no rollouts of step {missing[0]}, but the run has {steps} steps: lower `steps`")


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.jsonl.gz"


def _row(group: Group) -> dict[str, Any]:
    return {
        "problem": _fields(group.problem),
        "completions": [_fields(completion) for completion in group.completions],
        "scores": [_fields(score) for score in group.scores],
    }


def _fields(item: Problem | Completion | Score) -> dict[str, Any]:
    return {field.name: _encode(getattr(item, field.name)) for field in fields(item)}


def _group(row: dict[str, Any]) -> Group:
    return Group(
        problem=Problem(**row["problem"]),
        completions=[Completion(**completion) for completion in row["completions"]],
        scores=[Score(**score) for score in row["scores"]],
    )


def _encode(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encode(item) for item in value]
    if type(value) is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _encode(item) for key, item in value.items()}
        return {"$dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if type(value) not in _CODECS:
        raise TypeError(f"{value!r} is a {type(value).__name__}, a type that cannot be written")
    name, encode, _ = _CODECS[type(value)]
    return {f"${name}": encode(value)}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if tag == "$dict":
        return {_decode(key): _decode(item) for key, item in value[tag]}
    if tag.startswith("$"):
        return _DECODERS[tag[1:]](value[tag])
    return {key: _decode(item) for key, item in value.items()}
