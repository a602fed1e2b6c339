"""What every supervised data set gives, and what it is given to load."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from llmquest_rl.batch import Atom
from llmquest_rl.data.conversation import check_row, row_atom
from llmquest_rl.data.rows import MAX_ROWS, DataError, MalformedRows, held_out_keys
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.options import Options

VALIDATION_SHARE = 0.05

Fields = Mapping[str, Any]
"""A row: what it has, by name."""
PlacedFields = tuple[str, Fields]
"""A row and where it stands, `file:line`."""


@dataclass(frozen=True, slots=True)
class SupervisedData:
    """Sequences to train on, and others to validate on."""

    name: str
    train: Sequence[Atom]
    validation: Sequence[Atom]
    counters: dict[str, int] = field(default_factory=dict)
    """What loading left out, by cause: `dropped_malformed_rows`, `dropped_long_rows`."""


@dataclass(frozen=True, slots=True)
class DatasetContext:
    """The run's settings that every data set needs."""

    renderer: PromptRenderer
    tokens_per_sequence: int
    """Longest sequence in tokens: `batch.tokens_per_sequence`."""
    seed: int
    malformed: MalformedRows
    long_rows: Literal["drop", "error"] = "drop"
    """What happens to a row longer than a sequence: `data.long_prompts`."""
    labels: tuple[str, ...] = ()
    """The classes that the objective tells apart; () = it has none."""


@dataclass(frozen=True, slots=True)
class RowKind:
    """How rows of one kind become sequences."""

    check: Callable[[Fields], str | None]
    """What makes a row unusable, or None."""
    atom: Callable[[Fields], Atom]
    """The sequence of a usable row; a DataError where the chat template cannot render it."""
    question: Callable[[Fields], str]
    """What makes two rows the same question: a question is either trained on or validated on."""


def replies(renderer: PromptRenderer, mask_prompt: bool) -> RowKind:
    """Rows of prompt and completion, or of messages, whose replies are learnt."""

    def atom(row: Fields) -> Atom:
        return row_atom(row, renderer, mask_prompt)

    return RowKind(check_row, atom, _question)


def _question(row: Fields) -> str:
    if "messages" in row:
        return next((message["content"] for message in row["messages"] if message["role"] == "user"), "")
    return str(row["prompt"])


@dataclass(slots=True)
class RowsToAtoms:
    """Turns placed rows into sequences; counts what is left out."""

    context: DatasetContext
    kind: RowKind
    dropped_long: int = 0

    def __call__(self, rows: Iterable[PlacedFields]) -> dict[str, list[Atom]]:
        """The sequences by their question, in the order of the rows."""
        atoms: dict[str, list[Atom]] = {}
        for where, row in rows:
            problem = self.kind.check(row)
            if problem is not None:
                self.context.malformed.report(where, problem)
                continue
            try:
                atom = self.kind.atom(row)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if self._fits(where, atom):
                atoms.setdefault(self.kind.question(row), []).append(atom)
        return atoms

    def _fits(self, where: str, atom: Atom) -> bool:
        limit = self.context.tokens_per_sequence
        if atom.num_tokens <= limit:
            return True
        if self.context.long_rows == "error":
            raise DataError(
                f"{where}: the row has {atom.num_tokens} tokens, more than batch.tokens_per_sequence = {limit}: "
                "raise it, or set data.long_prompts: drop"
            )
        self.dropped_long += 1
        return False


def rows_data(
    name: str,
    rows: Iterable[PlacedFields],
    validation: Iterable[PlacedFields] | float,
    kind: RowKind,
    context: DatasetContext,
) -> SupervisedData:
    """A data set of rows of one kind, with its own validation rows or a share of the questions.

    No question is on both sides: training rows that ask a validation question are left out and counted.

    Raises:
        DataError: nothing is left on one of the sides, or a malformed row where those are errors.
    """
    convert = RowsToAtoms(context, kind)
    atoms = convert(rows)
    if isinstance(validation, float):
        held_out = {key: atoms[key] for key in held_out_keys(atoms, validation, context.seed)}
        overlapping = 0
    else:
        held_out = convert(validation)
        overlapping = sum(len(found) for key, found in atoms.items() if key in held_out)
    train = [atom for key, found in atoms.items() if key not in held_out for atom in found]
    counters = {
        "dropped_malformed_rows": context.malformed.count,
        "dropped_long_rows": convert.dropped_long,
        "dropped_overlapping_rows": overlapping,
    }
    if not train or not held_out:
        left_out = ", ".join(f"{count} {cause}" for cause, count in counters.items())
        raise DataError(f"data set {name} has no {'validation' if train else 'training'} rows left ({left_out})")
    return SupervisedData(name, train, [atom for key in sorted(held_out) for atom in held_out[key]], counters)


def open_dataset(name: str, function: Callable[..., Any], options: Options, context: DatasetContext) -> SupervisedData:
    """The data set that a section of the configuration names.

    `function` is the `load` of a data set file, or, when `name` has a colon, a user's function: it is called with its
    options as keyword arguments (and `seed`, if it takes one) and returns an iterable of prompt/completion or messages
    rows, or a whole `SupervisedData`.

    Raises:
        DataError: no usable rows, or a malformed one where those are errors.
    """
    if ":" not in name:
        loaded = function(options, context)
        assert isinstance(loaded, SupervisedData), f"{name}: load must return SupervisedData"
        return loaded
    keywords: dict[str, Any] = {key: getattr(options, key) for key in type(options).model_fields}
    if "seed" in inspect.signature(function).parameters:
        keywords["seed"] = context.seed
    result = function(**keywords)
    if isinstance(result, SupervisedData):
        return result
    if not isinstance(result, Iterable):
        raise DataError(f"{name} must return rows, not {type(result).__name__}")
    rows = list(islice(result, MAX_ROWS + 1))
    if len(rows) > MAX_ROWS:
        raise DataError(f"{name} yielded more than {MAX_ROWS} rows: return SupervisedData if it is that large")
    placed = [(f"{name}, row {i}", row if isinstance(row, Mapping) else {}) for i, row in enumerate(rows)]
    return rows_data(name.rpartition(":")[2], placed, VALIDATION_SHARE, replies(context.renderer, True), context)
