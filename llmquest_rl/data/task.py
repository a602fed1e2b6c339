"""A task: problems to train on, and held-out problems that are never trained on."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmquest_rl.data.images import check_images, image_list
from llmquest_rl.data.rows import (
    MAX_ROWS,
    DataError,
    ListedRows,
    MalformedRows,
    Row,
    Rows,
    check_prompt,
    held_out_keys,
    question_key,
)
from llmquest_rl.loader import users_code
from llmquest_rl.options import Options, call_users_function

if TYPE_CHECKING:
    from llmquest_rl.data.token_scores import OpenProxy

REDRAWS = 256
PROBED_PER_HELD_OUT = 4
DRAWS_PER_PROBED = 4


@dataclass(frozen=True, slots=True)
class Task:
    """Two sets of problems without a common question."""

    name: str
    train: Rows
    held_out: Rows
    """Always finite."""
    counters: dict[str, int] = field(default_factory=dict)
    """Number of rows left out while loading, by cause: `dropped_malformed_rows`, `dropped_overlapping_rows`."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One generated problem, and its key: problems with equal keys count as the same problem."""

    row: Row
    key: str


@dataclass(frozen=True, slots=True)
class GeneratedRows:
    """Endless training problems of a generator, without the held-out ones."""

    name: str
    draw: Callable[[int], Draw]
    held_out: frozenset[str]

    @property
    def size(self) -> None:
        return None

    def row(self, index: int) -> Row:
        """The problem `index`. If the first draw is held out, draws with far larger indices replace it."""
        drawn = self.draw(index)
        for redraw in range(REDRAWS):
            if drawn.key not in self.held_out:
                return replace(drawn.row, id=f"{self.name}/train/{index}")
            drawn = self.draw(2**40 + index * REDRAWS + redraw)
        raise DataError(
            f"task {self.name}: {REDRAWS} consecutive draws were held-out problems: "
            "make `held_out` smaller or the space of problems larger"
        )


def generated_task(name: str, draw: Callable[[int], Draw], held_out: int, seed: int) -> Task:
    """Make a task of a generator. `draw(i)` must give the same problem for the same i.

    The held-out side is fixed first: four distinct problems are drawn for each one wanted (fewer if the space seems to
    have no more), and the quarter with the smallest hash of (seed, problem) is held out. Training skips these problems.
    So the sides are disjoint, and even a space of two problems leaves one on each side.

    Raises:
        DataError: the generator makes a single problem only.
    """
    probe: dict[str, Draw] = {}
    wanted = held_out * PROBED_PER_HELD_OUT
    for index in range(wanted * DRAWS_PER_PROBED):
        drawn = draw(index)
        probe[drawn.key] = drawn
        if len(probe) == wanted:
            break
    if len(probe) < 2:
        raise DataError(f"task {name} generates a single problem: its parameters leave no room for a held-out split")
    keys = held_out_keys(probe, 1 / PROBED_PER_HELD_OUT, seed)
    rows = [replace(probe[key].row, id=f"{name}/held_out/{i}") for i, key in enumerate(sorted(keys))]
    return Task(name, GeneratedRows(name, draw, frozenset(keys)), ListedRows(rows))


def listed_task(name: str, rows: list[Row], held_out: list[Row] | float, seed: int, malformed: MalformedRows) -> Task:
    """Make a task of rows in memory.

    Training rows that ask a held-out question are left out and counted.

    Args:
        held_out: The held-out rows, or the share of the questions to hold out.

    Raises:
        DataError: one of the sides has no rows.
    """
    if not rows:
        raise DataError(f"task {name} has no rows ({malformed.count} malformed rows were dropped)")
    asked = [question_key(row.prompt, row.images) for row in rows]
    if isinstance(held_out, float):
        keys = held_out_keys(asked, held_out, seed)
        test = [row for row, question in zip(rows, asked, strict=True) if question in keys]
        overlapping = 0
    else:
        keys, test = {question_key(row.prompt, row.images) for row in held_out}, held_out
        overlapping = sum(question in keys for question in asked)
    train = [row for row, question in zip(rows, asked, strict=True) if question not in keys]
    if not train or not test:
        side = "training" if not train else "held-out"
        raise DataError(
            f"task {name} has no {side} rows left ({malformed.count} malformed, {overlapping} on both sides)"
        )
    counters = {"dropped_malformed_rows": malformed.count, "dropped_overlapping_rows": overlapping}
    return Task(name, ListedRows(train), ListedRows(test), counters)


def open_task(
    name: str,
    function: Callable[..., Any],
    options: Options,
    seed: int,
    malformed: MalformedRows,
    proxy: "OpenProxy | None" = None,
) -> Task:
    """Open the task that a section of the configuration names.

    `function` is the `load` of a module, or a user's function if `name` has a colon. A user's function is called with
    its options as keyword arguments (and with `seed`, if it has such a parameter). It returns a whole `Task`, or an
    iterable of rows: dicts with `prompt`, `answer`, `images` if there are any, and further columns.
    A `load` with a parameter `proxy` is given `proxy`, with which it can score tokens of text by a model.

    Raises:
        DataError: there are no usable rows, or a row is malformed and `data.malformed_rows` is `error`.
    """
    if ":" not in name:
        with users_code(name):
            wanted = {"proxy": proxy} if "proxy" in inspect.signature(function).parameters else {}
            loaded = function(options, seed, malformed, **wanted)
        if not isinstance(loaded, Task):
            raise DataError(f"{name}: `load` must return a Task, not {type(loaded).__name__}")
        return loaded
    result = call_users_function(name, function, options, seed)
    if isinstance(result, Task):
        return result
    short = name.rpartition(":")[2]
    with users_code(name):  # a generator runs while its rows are read
        rows = _user_rows(short, name, result, malformed)
    return listed_task(short, rows, 0.1, seed, malformed)


def _user_rows(short: str, name: str, result: object, malformed: MalformedRows) -> list[Row]:
    if not isinstance(result, Iterable):
        raise DataError(
            f"{name} must return an iterable of dicts with `prompt` and `answer`, not {type(result).__name__}"
        )
    rows: list[Row] = []
    for i, item in enumerate(islice(result, MAX_ROWS + 1)):
        if i == MAX_ROWS:
            raise DataError(f"{name} yielded more than {MAX_ROWS} rows: return a Task if it is endless (docs/data.md)")
        if not isinstance(item, Mapping):
            malformed.report(f"{name}, row {i}", f"a row must be a dict, not {type(item).__name__}")
            continue
        columns: dict[str, Any] = dict(item)
        prompt, images = columns.pop("prompt", None), image_list(columns.pop("images", None))
        problem = check_prompt(prompt) or check_images(images)
        if problem is None:
            rows.append(Row(f"{short}/{i}", prompt, columns.pop("answer", None), columns, images))
        else:
            malformed.report(f"{name}, row {i}", problem)
    return rows
