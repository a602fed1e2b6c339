"""Grades a file of completions, to try a reward before training with it."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmquest_rl.types import Score
from rewards.config import GraderConfig, RewardConfig
from rewards.failures import failure_counts
from rewards.grader import Grader
from rewards.types import GradeItem

CHUNK = 4096
"""Maximum number of rows in memory."""
OWN_KEYS = ("prompt", "completion", "answer")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file: an item, or a text that describes the defect of the line."""

    line: int
    item: GradeItem | None
    defect: str = ""


@dataclass(slots=True)
class Summary:
    """The result of grading a file."""

    rows: int = 0
    scored: int = 0
    total: float = 0.0
    parts: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Number and sum of the values, by name in logs."""
    failures: dict[str, int] = field(default_factory=dict)
    """Number of failed rows by kind of failure."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first message for each kind of failure."""
    seconds: float = 0.0
    """Wall time in seconds, without the start of the worker processes."""

    @property
    def mean(self) -> float | None:
        """Mean score of the scored rows; None if no row has a score."""
        return self.total / self.scored if self.scored else None

    @property
    def not_applicable(self) -> int:
        """Number of rows to which no reward applies."""
        return self.rows - self.scored - sum(self.failures.values())

    def add(self, line: int, score: Score) -> None:
        """Add one row to the counts."""
        self.rows += 1
        if score.value is not None:
            self.scored += 1
            self.total += score.value
        for name, value in score.parts.items():
            if value is not None:
                count, total = self.parts.get(name, (0, 0.0))
                self.parts[name] = (count + 1, total + value)
        for kind, count in failure_counts([score]).items():
            self.failures[kind] = self.failures.get(kind, 0) + count
            self.examples.setdefault(kind, f"line {line}: {score.detail}")

    def __str__(self) -> str:
        mean = "none" if self.mean is None else f"{self.mean:.4f}"
        lines = [
            f"{self.rows} rows in {self.seconds:.1f} s ({self.rows / max(self.seconds, 1e-9):.0f} rows/s)",
            f"score: mean {mean} of {self.scored} scored, {self.not_applicable} not applicable, "
            f"{sum(self.failures.values())} failed",
        ]
        lines += [f"  {name}: mean {total / count:.4f} of {count}" for name, (count, total) in self.parts.items()]
        lines += [f"  failed, {kind}: {count}, e.g. {self.examples[kind]}" for kind, count in self.failures.items()]
        return "\n".join(lines)


def parse_reward(text: str) -> RewardConfig:
    """Parse a reward on a command line: `exact_number`, `my.py:reward` or `module:function`, options after commas.

    In `exact_number,whole=true,weight=0.5` the values are read as JSON if they are valid JSON, or else as text.

    Raises:
        ValueError: the reward or an option does not exist, or an option has no value.
    """
    function, *pairs = text.split(",")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"the option {pair!r} of the reward {function!r} has no value: write key=value")
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = value
    try:
        return RewardConfig.model_validate({"function": function, **options})
    except ValidationError as error:
        messages = [part["msg"].removeprefix("Value error, ") for part in error.errors()]
        raise ValueError(f"--reward {text}: {'; '.join(messages)}") from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file, malformed ones included; blank lines are skipped."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield _read_row(line, raw)


def _read_row(line: int, raw: bytes) -> Row:
    try:
        record = json.loads(raw)
    except ValueError as error:  # JSON or UTF-8
        return Row(line, None, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Row(line, None, "not a JSON object")
    if not isinstance(record.get("completion"), str):
        return Row(
            line, None, f"the key `completion` must be a text; the row has: {', '.join(sorted(record)) or 'nothing'}"
        )
    columns = {key: value for key, value in record.items() if key not in OWN_KEYS}
    return Row(line, GradeItem(record.get("prompt", ""), record["completion"], record.get("answer"), columns))


def grade_file(rewards: Sequence[RewardConfig], path: Path, out: Path, config: GraderConfig | None = None) -> Summary:
    """Grade every row of a JSONL file.

    Args:
        path: Rows with `completion` and the columns that the rewards need: `answer`, `prompt` and any others.
        out: One output line for each input line, in order: `line`, `score`, `scores` by name, `failure`, `detail`,
            `seconds`. The file appears when it is complete.

    Raises:
        RewardError: a reward cannot be imported, or needs a column that the first row lacks.
        OSError: a file cannot be read or written.
    """
    first = next((row.item for row in read_rows(path) if row.item is not None), None)
    summary = Summary()
    unfinished = out.with_name(out.name + ".unfinished")
    with Grader(rewards, config) as grader, unfinished.open("w", encoding="utf-8") as file:
        if first is not None:
            grader.check(first.columns)
        started = time.perf_counter()
        rows = read_rows(path)
        while chunk := list(islice(rows, CHUNK)):
            for row, score in zip(chunk, _grade(grader, chunk), strict=True):
                summary.add(row.line, score)
                file.write(json.dumps(_record(row, score)) + "\n")
        summary.seconds = time.perf_counter() - started
    os.replace(unfinished, out)
    return summary


def _grade(grader: Grader, rows: list[Row]) -> list[Score]:
    scores = iter(grader.grade([row.item for row in rows if row.item is not None]))
    return [Score(None, {}, "invalid", row.defect) if row.item is None else next(scores) for row in rows]


def _record(row: Row, score: Score) -> dict[str, Any]:
    return {
        "line": row.line,
        "score": score.value,
        "scores": score.parts,
        "failure": score.failure,
        "detail": score.detail,
        "seconds": round(score.seconds, 6),
    }
