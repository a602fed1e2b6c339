"""Rows of problems, the policy for malformed rows, and splits without a common question.

A question is identified by its text. A hash of (seed, text) decides whether it is held out, so the split does not
depend on the order of the rows, and a repeated question is never on both sides.
"""

import hashlib
import json
import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from llmquest_rl.types import Message

MalformedPolicy = Literal["drop", "error"]

RawImage = Any
"""An image as a data set holds it: see `llmquest_rl.data.images`."""

MAX_ROWS = 5_000_000
"""Maximum number of rows from a user's function; one that yields more is taken to be endless."""

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Raised for data that cannot be used; the message says where the data is and what to do."""


class MalformedRowError(DataError):
    """Raised for a row that turns out to be malformed when it is tokenised; the message does not name its place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem as the data set has it, before the chat template."""

    id: str
    """Stable identity, e.g. `gsm8k/train/17`."""
    prompt: str | list[Message]
    answer: Any
    columns: dict[str, Any] = field(default_factory=dict)
    """Every further column: rewards receive these as keyword arguments."""
    images: tuple[RawImage, ...] = ()
    """The images of the prompt, in order."""


class Rows(Protocol):
    """One side of a task's split."""

    @property
    def size(self) -> int | None:
        """Number of rows; None = endless."""

    def row(self, index: int) -> Row:
        """The row of an index; always the same one for the same index."""


@dataclass(frozen=True, slots=True)
class ListedRows:
    """Rows held in memory."""

    rows: Sequence[Row]

    @property
    def size(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]


@dataclass(slots=True)
class MalformedRows:
    """Applies `data.malformed_rows` and counts the rows that it drops. Each task or data set has its own."""

    policy: MalformedPolicy = "error"
    count: int = 0
    reports: list[str] = field(default_factory=list)
    """The first few messages, for people."""

    def report(self, where: str, problem: str) -> None:
        """Count the row at `where` (`file:line`) as dropped, or raise an error.

        Raises:
            DataError: the policy is `error`.
        """
        message = f"{where}: {problem}"
        if self.policy == "error":
            raise DataError(f"{message} (set data.malformed_rows: drop to leave such rows out and count them)")
        self.count += 1
        if len(self.reports) < 5:
            self.reports.append(message)
            logger.warning("malformed row dropped: %s", message)


def question_key(prompt: str | list[Message], images: Sequence[RawImage] = ()) -> str:
    """The identity of a question: its text without surrounding space, and its images."""
    text = prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return "\0".join([text, *map(image_key, images)])


def image_key(image: RawImage) -> str:
    """The identity of a raw image: the path of its file, or else a hash of its content."""
    if isinstance(image, str | Path):
        return str(image)
    if isinstance(image, Mapping):
        return image_key(image["path"] if image.get("bytes") is None else image["bytes"])
    kind = [getattr(image, name, None) for name in ("mode", "size", "shape", "dtype", "palette")]
    kind[-1] = kind[-1] and kind[-1].tobytes()
    content = image if isinstance(image, bytes) else repr(kind).encode() + image.tobytes()
    return hashlib.sha256(content).hexdigest()


def rank(seed: int, key: Hashable) -> bytes:
    """A seeded pseudo-random sort key for a question."""
    return hashlib.sha256(f"{seed}\0{key}".encode()).digest()


def held_out_keys(keys: Iterable[str], share: float, seed: int) -> set[str]:
    """Choose a share of the distinct keys to hold out: at least one, but not all.

    Raises:
        DataError: there are fewer than two distinct keys, so they cannot be split.
    """
    ranked = sorted(set(keys), key=lambda key: rank(seed, key))
    if len(ranked) < 2:
        raise DataError(
            f"{len(ranked)} distinct questions cannot be split into train and held-out: "
            "give more rows, or separate held-out rows"
        )
    return set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])


def check_message(message: object) -> str | None:
    """The reason why a chat message is invalid, or None."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        return "a message must be an object with `role` and `content`"
    if not isinstance(message["role"], str) or not isinstance(message["content"], str):
        return "`role` and `content` of a message must be strings"
    return None


def check_prompt(prompt: object) -> str | None:
    """The reason why a prompt is invalid, or None. It must be a non-empty string or list of messages."""
    if isinstance(prompt, str):
        return None if prompt.strip() else "the prompt is empty"
    if not isinstance(prompt, list):
        return f"the prompt must be a string or a list of messages, not {type(prompt).__name__}"
    if not prompt:
        return "the prompt has no messages"
    return next((problem for message in prompt if (problem := check_message(message))), None)
