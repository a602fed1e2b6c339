"""Opens the data set that a section of the configuration names: a module with `load`, or a user's own function."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from llmquest_rl.data.dataset import DatasetContext, RowKind, SupervisedData, replies, rows_data
from llmquest_rl.data.datasets import unpaired_preferences
from llmquest_rl.data.datasets.labelled import labels_of
from llmquest_rl.data.datasets.preferences import pairs
from llmquest_rl.data.rows import MAX_ROWS, DataError
from llmquest_rl.loader import users_code
from llmquest_rl.options import Options, call_users_function

VALIDATION_SHARE = 0.05

KINDS: dict[tuple[str, ...], Callable[[DatasetContext], RowKind]] = {
    ("completion",): lambda context: replies(context.renderer, True),
    ("messages",): lambda context: replies(context.renderer, True),
    ("chosen",): pairs,
    ("label",): labels_of,
    unpaired_preferences.ROLES: unpaired_preferences.judged,
}
"""Row kind by identifying keys; if the first row has the keys of several kinds, the last entry wins."""


def open_dataset(name: str, function: Callable[..., Any], options: Options, context: DatasetContext) -> SupervisedData:
    """Load the data set that a section of the configuration names.

    `function` is the `load` of a module, or a user's function if `name` has a colon. A user's function is called with
    its options as keyword arguments (and with `seed`, if it has such a parameter). It returns an iterable of rows with
    the default columns of `sft`, `preferences`, `unpaired_preferences` or `labelled`, or a whole `SupervisedData`.

    Raises:
        DataError: there are no usable rows, or a row is malformed and `data.malformed_rows` is `error`.
    """
    if ":" not in name:
        with users_code(name):
            loaded = function(options, context)
        if not isinstance(loaded, SupervisedData):
            raise DataError(f"{name}: `load` must return SupervisedData, not {type(loaded).__name__}")
        return loaded
    result = call_users_function(name, function, options, context.seed)
    if isinstance(result, SupervisedData):
        return result
    if not isinstance(result, Iterable):
        raise DataError(f"{name} must return rows, not {type(result).__name__}")
    with users_code(name):  # a generator runs while its rows are read
        rows = list(islice(result, MAX_ROWS + 1))
    if len(rows) > MAX_ROWS:
        raise DataError(f"{name} yielded more than {MAX_ROWS} rows: return SupervisedData if it is that large")
    placed = [(f"{name}, row {i}", row if isinstance(row, Mapping) else {}) for i, row in enumerate(rows)]
    kind = _kind(placed[0][1] if placed else {})
    return rows_data(name.rpartition(":")[2], placed, VALIDATION_SHARE, kind(context), context)


def _kind(row: Mapping[str, Any]) -> Callable[[DatasetContext], RowKind]:
    found = [kind for keys, kind in KINDS.items() if all(key in row for key in keys)]
    return found[-1] if found else KINDS[("completion",)]  # its check names the keys that a row needs
