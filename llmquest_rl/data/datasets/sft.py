"""Fine-tuning on given replies: prompt/completion or messages rows, from files, the Hub, or a task's gold answers."""

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from llmquest_rl.data.dataset import DatasetContext, SupervisedData, replies, rows_data
from llmquest_rl.data.files import PlacedRow, is_local, read_files, read_hub
from llmquest_rl.data.rows import DataError, Rows
from llmquest_rl.data.task import Task
from llmquest_rl.options import Options


class Columns(Options):
    """Which column is what. A row has messages, or a prompt and a completion."""

    prompt: str = "prompt"
    """A string, or a list of chat messages."""
    completion: str = "completion"
    """The reply to learn, a string."""
    messages: str = "messages"
    """A conversation of any number of turns; the loss falls on the assistant's."""


class Config(Options):
    """Where the rows are, and which of their tokens are learnt."""

    path: str | None = None
    """A file, a glob pattern, or a Hub id; or give a `task`."""
    subset: str | None = None
    """Hub only: the data set's configuration name."""
    split: str = "train"
    """Hub only: the split to train on."""
    validation_path: str | None = None
    """A file of its own for the validation loss; null = a share of the rows."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the distinct questions set aside otherwise; a seeded hash of the question chooses."""
    columns: Columns = Columns()
    """The column mapping."""
    mask_prompt: bool = True
    """Learn the assistant's tokens only; false = every token of the row."""
    task: dict[str, Any] | None = None
    """A task with text answers, e.g. `{name: arithmetic, digits: 2}`: its prompts with its gold answers become rows."""
    task_rows: PositiveInt = 2000
    """Training rows taken from an endless `task`."""

    @model_validator(mode="after")
    def _path_or_task(self) -> "Config":
        if (self.path is None) == (self.task is None):
            raise ValueError("give either `path` or `task`")
        return self


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """The data set.

    Raises:
        DataError: no such file, or a malformed row where those are errors.
    """
    kind = replies(context.renderer, config.mask_prompt)
    if config.task is not None:
        task = _open_task(dict(config.task), context)
        train, held_out = _task_rows(task.train, config.task_rows), _task_rows(task.held_out, config.task_rows)
        return rows_data(f"sft/{task.name}", train, held_out, kind, context)
    assert config.path is not None
    rows = _read(config, config.path, context)
    validation = (
        config.validation_share if config.validation_path is None else _read(config, config.validation_path, context)
    )
    return rows_data(f"sft/{config.path}", rows, validation, kind, context)


def _read(config: Config, path: str, context: DatasetContext) -> Iterator[PlacedRow]:
    placed = read_files(path, context.malformed) if is_local(path) else read_hub(path, config.subset, config.split)
    names = {getattr(config.columns, role): role for role in type(config.columns).model_fields}
    for where, record in placed:
        yield where, {names[column]: value for column, value in record.items() if column in names and value is not None}


def _open_task(spec: dict[str, Any], context: DatasetContext) -> Task:
    name = spec.pop("name", None)
    try:
        module = import_module(f"llmquest_rl.data.tasks.{name}")
    except ModuleNotFoundError as error:
        raise DataError(f"task: there is no task {name!r}: {error}") from error
    task = module.load(module.Config(**spec), context.seed, context.malformed)
    assert isinstance(task, Task)
    return task


def _task_rows(rows: Rows, limit: int) -> Iterator[PlacedRow]:
    indices = range(limit if rows.size is None else rows.size)
    for row in islice(map(rows.row, indices), limit):
        yield row.id, {"prompt": row.prompt, "completion": str(row.answer)}
