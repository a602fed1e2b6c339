"""Problems from a table: jsonl, json, parquet or csv files, or a data set of the Hub, with a column mapping."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from llmquest_rl.data.files import PlacedRow, is_local, read_rows
from llmquest_rl.data.images import check_images
from llmquest_rl.data.rows import DataError, MalformedRows, RawImage, Row, check_prompt
from llmquest_rl.data.task import Task, listed_task
from llmquest_rl.data.template import fill, placeholders
from llmquest_rl.options import Options


class Columns(Options):
    """The role of each column. Every other column is given to the rewards under its own name."""

    prompt: str = "prompt"
    """The question: a string, or a list of chat messages."""
    answer: str | None = "answer"
    """The gold answer; null = the rewards need none."""
    images: str | None = None
    """Images of the prompt: one, or a list of them; null = none."""


class Config(Options):
    """The place of the rows, and the way they are read."""

    path: str
    """A file, a glob pattern, or a Hub id such as `openai/gsm8k`."""
    subset: str | None = None
    """Hub only: the data set's configuration name."""
    split: str = "train"
    """Hub only: the split to train on."""
    held_out_path: str | None = None
    """A separate file for evaluation; null = `held_out_split` of a Hub data set, or else a share of the rows."""
    held_out_split: str | None = None
    """Hub only: the split to evaluate on."""
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the distinct questions set aside without `held_out_path` and `held_out_split`; a seeded hash of the
    question chooses them."""
    columns: Columns = Columns()
    """The column mapping."""
    template: str = "{prompt}"
    """The prompt; `{prompt}` and further columns in braces are replaced. Prompts of messages stay as they are."""
    answer_after: str | None = None
    """Keep the part of the gold answer after the last such string, e.g. `####`; a row without it is malformed."""
    answer_remove: str = ""
    """Characters taken out of the gold answer, e.g. `,` in `1,000`."""


def load(config: Config, seed: int, malformed: MalformedRows) -> Task:
    """Open the task; see `read_task`."""
    return read_task("table", config, seed, malformed)


def read_task(name: str, config: Config, seed: int, malformed: MalformedRows) -> Task:
    """A task whose problems have the ids `<name>/train/<row>` and `<name>/held_out/<row>`.

    Raises:
        DataError: a file or column is missing, or a row is malformed and `data.malformed_rows` is `error`.
    """
    rows = list(_rows(f"{name}/train", config, config.path, config.split, malformed))
    held_out: list[Row] | float = config.held_out_share
    if config.held_out_path is not None or (config.held_out_split is not None and not is_local(config.path)):
        path, split = config.held_out_path or config.path, config.held_out_split or config.split
        held_out = list(_rows(f"{name}/held_out", config, path, split, malformed))
    return listed_task(name, rows, held_out, seed, malformed)


def _rows(prefix: str, config: Config, path: str, split: str, malformed: MalformedRows) -> Iterator[Row]:
    placed: Iterator[PlacedRow] = read_rows(path, config.subset, split, malformed, config.columns.images)
    columns = config.columns
    for number, (where, record) in enumerate(placed):
        if number == 0:
            _check_columns(config, where, record)
        problem = _problem(config, record)
        if problem is not None:
            malformed.report(where, problem)
            continue
        mapped = (columns.prompt, columns.answer, columns.images)
        extra = {key: value for key, value in record.items() if key not in mapped}
        prompt = _prompt(config.template, record[columns.prompt], extra)
        yield Row(f"{prefix}/{number}", prompt, _answer(config, record), extra, _images(config, record))


def _check_columns(config: Config, where: str, record: dict[str, Any]) -> None:
    """Refuse a mapping that does not fit the first row: that is a mistake in the configuration, not in the row."""
    for role, column in config.columns.model_dump().items():
        if column is not None and column not in record:
            raise DataError(f"{where} has no column {column!r} (columns.{role}); it has: {', '.join(record)}")
    offered = {"prompt", *record} - {config.columns.answer, config.columns.images}
    for name in placeholders(config.template):
        if name not in offered:
            raise DataError(
                f"template: {{{name}}} is none of {', '.join(sorted(offered))} "
                "(the answer is not offered, nor are images)"
            )


def _problem(config: Config, record: dict[str, Any]) -> str | None:
    """The reason why a row is unusable, or None."""
    prompt = record.get(config.columns.prompt)
    wrong_prompt = check_prompt(prompt)
    if wrong_prompt:
        return f"{wrong_prompt} (column {config.columns.prompt!r})"
    wrong_image = check_images(_images(config, record))
    if wrong_image:
        return f"{wrong_image} (column {config.columns.images!r})"
    missing = [name for name in placeholders(config.template) if name != "prompt" and name not in record]
    if missing:
        return f"the template needs the missing column {missing[0]!r}"
    if config.columns.answer is None:
        return None
    answer = record.get(config.columns.answer)
    if answer is None or answer == "":
        return f"there is no gold answer (column {config.columns.answer!r})"
    if config.answer_after is not None and config.answer_after not in str(answer):
        return f"the gold answer has no {config.answer_after!r}; if none of them has it, set `answer_after` to null"
    return None


def _prompt(template: str, prompt: Any, columns: dict[str, Any]) -> Any:
    if not isinstance(prompt, str):
        return prompt
    return fill(template, {**columns, "prompt": prompt})


def _images(config: Config, record: dict[str, Any]) -> tuple[RawImage, ...]:
    return () if config.columns.images is None else record.get(config.columns.images, ())


def _answer(config: Config, record: dict[str, Any]) -> Any:
    answer = None if config.columns.answer is None else record[config.columns.answer]
    if config.answer_after is not None:
        answer = str(answer).rpartition(config.answer_after)[2].strip()
    for character in config.answer_remove:
        answer = str(answer).replace(character, "")
    return answer
