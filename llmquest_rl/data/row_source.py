"""The source of a supervised data set's rows (files, the Hub, or a task), and their columns."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from llmquest_rl.data.dataset import DatasetContext, Fields, PlacedFields, RowKind, SupervisedData, rows_data
from llmquest_rl.data.files import PlacedRow, is_local, read_rows
from llmquest_rl.data.rows import DataError, MalformedRows, Row, Rows
from llmquest_rl.data.task import Task, open_task
from llmquest_rl.data.tasks import TASKS
from llmquest_rl.data.template import fill, placeholders
from llmquest_rl.options import Options, checked_component, checked_options

PLAIN = "{prompt}"
"""The template that leaves a prompt as it is."""

Sides = tuple[Iterator[PlacedFields], Iterator[PlacedFields] | float]
"""Rows to train on, and rows to validate on or the share of the questions to validate on."""


class Location(Options):
    """The rows of a file, or of a data set of the Hub, to train on and to validate on."""

    subset: str | None = None
    """Hub only: the data set's configuration name."""
    split: str = "train"
    """Hub only: the split to train on."""
    validation_path: str | None = None
    """A separate file for validation; null = `validation_split` of a Hub data set, or else a share of the rows."""
    validation_split: str | None = None
    """Hub only: the split to validate on."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the distinct questions set aside without `validation_path` and `validation_split`; a seeded hash of the
    question chooses them."""

    def sides(self, path: str, read: Callable[[str, str], Iterator[PlacedFields]]) -> Sides:
        """Rows to train on, and rows to validate on or their share.

        Args:
            path: A file, a glob pattern, or a Hub id.
            read: Reads the rows of a path and a split.
        """
        has_own = self.validation_path is not None or (self.validation_split is not None and not is_local(path))
        if not has_own:
            return read(path, self.split), self.validation_share
        own = read(self.validation_path or path, self.validation_split or self.split)
        return read(path, self.split), own


class RowSource(Location):
    """The place of the rows."""

    path: str | None = None
    """A file, a glob pattern, or a Hub id. Give either this or `task`."""
    task: dict[str, Any] | None = None
    """A task, built-in or your own, e.g. `{name: arithmetic, digits: 2}`; each prompt with its gold answer is a row."""
    task_rows: PositiveInt = 2000
    """Number of training rows taken from `task`, at most."""

    @field_validator("task")
    @classmethod
    def _check_task(cls, task: dict[str, Any] | None) -> dict[str, Any] | None:
        """Check the task's options, and make the path of its file absolute."""
        return None if task is None else checked_component(TASKS, task, "{name: arithmetic, digits: 2}")

    @model_validator(mode="after")
    def _path_or_task(self) -> "RowSource":
        if (self.path is None) == (self.task is None):
            raise ValueError("give either `path` or `task`")
        return self


def read_source(
    name: str,
    source: RowSource,
    columns: Options,
    of_task: Callable[[Row], Fields],
    kind: RowKind,
    context: DatasetContext,
    template: str = PLAIN,
) -> SupervisedData:
    """Read the data set `name` from one source.

    Args:
        columns: The column of each role, e.g. `prompt`; other columns are left out.
        of_task: Makes a row of a task's problem and its answer.
        template: Text of a prompt from a file, with columns in braces.

    Raises:
        DataError: a file or task is missing, or a row is malformed and `data.malformed_rows` is `error`.
    """
    if source.task is not None:
        task = _open_task(dict(source.task), context)
        train, held_out = (_task_rows(rows, source.task_rows, of_task) for rows in (task.train, task.held_out))
        return rows_data(f"{name}/{task.name}", train, held_out, kind, context)
    assert source.path is not None

    sides = source.sides(source.path, lambda path, split: _read(path, source.subset, split, columns, context, template))
    return rows_data(f"{name}/{source.path}", *sides, kind, context)


def _read(
    path: str, subset: str | None, split: str, columns: Options, context: DatasetContext, template: str
) -> Iterator[PlacedFields]:
    images = getattr(columns, "images", None)
    placed = read_rows(path, subset, split, context.malformed, images)
    if template != PLAIN:
        yield from templated_rows(placed, columns, template, (), context.malformed)
        return
    roles = {getattr(columns, role): role for role in type(columns).model_fields}
    for number, (where, record) in enumerate(placed):
        if number == 0 and images is not None and images not in record:
            raise DataError(f"{where} has no column {images!r} (columns.images); it has: {', '.join(record)}")
        yield where, {roles[column]: value for column, value in record.items() if column in roles and value is not None}


def templated_rows(
    placed: Iterable[PlacedRow], columns: Options, template: str, required: Sequence[str], malformed: MalformedRows
) -> Iterator[PlacedFields]:
    """Rows by role, in which the template fills in a prompt that is a string.

    Args:
        columns: The column of each role, e.g. `prompt`; other columns are left out.
        template: The prompt; `{prompt}` and further columns in braces are replaced.
        required: The roles whose columns the first row must have.

    Raises:
        DataError: the columns or the template do not fit the first row, or a later row does not fit the template and
            `data.malformed_rows` is `error`.
    """
    roles = {role: getattr(columns, role) for role in type(columns).model_fields}
    added = [name for name in placeholders(template) if name != "prompt"]
    wanted = [(f"columns.{role}", roles[role]) for role in required] + [("template", name) for name in added]
    for number, (where, record) in enumerate(placed):
        if number == 0:
            _check_columns(where, record, wanted)
        row = {role: record[column] for role, column in roles.items() if record.get(column) is not None}
        missing = [name for name in added if name not in record]
        if missing:
            malformed.report(where, f"the template needs the missing column {missing[0]!r}")
            continue
        if isinstance(row.get("prompt"), str):
            row["prompt"] = fill(template, {**record, "prompt": row["prompt"]})
        yield where, row


def _check_columns(where: str, record: Mapping[str, Any], wanted: Iterable[tuple[str, str]]) -> None:
    """Refuse a mapping that does not fit the first row: that is a mistake in the configuration, not in the row."""
    for option, column in wanted:
        if column not in record:
            raise DataError(f"{where} has no column {column!r} ({option}); it has: {', '.join(record)}")


def _open_task(section: dict[str, Any], context: DatasetContext) -> Task:
    name = section.pop("name")
    options = checked_options(TASKS, name, section)
    return open_task(name, TASKS.function(name), options, context.seed, context.malformed)


def _task_rows(rows: Rows, limit: int, of_task: Callable[[Row], Fields]) -> Iterator[PlacedFields]:
    indices = range(limit if rows.size is None else rows.size)
    for row in islice(map(rows.row, indices), limit):
        yield row.id, of_task(row)
