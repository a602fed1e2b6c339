"""Completions that are good or bad, each by itself, from files or the Hub: data for KTO and its relatives.

Pairs need two replies to one prompt; here each row has one reply and a judgement (Ethayarajh et al. 2024,
arXiv:2402.01306).
"""

from collections.abc import Iterator, Sequence

from llmquest_rl.batch import BAD, GOOD, SequenceGroup
from llmquest_rl.data.conversation import check_completion, is_blank
from llmquest_rl.data.dataset import DatasetContext, Fields, PlacedFields, RowKind, SupervisedData, rows_data
from llmquest_rl.data.files import read_rows
from llmquest_rl.data.pairs import compared_ids, group_for_prediction
from llmquest_rl.data.row_source import Location, templated_rows
from llmquest_rl.data.rows import check_prompt, question_key
from llmquest_rl.options import Options

ROLES = ("prompt", "completion", "label")


class Columns(Options):
    """The role of each column."""

    prompt: str = "prompt"
    """A string, or a list of chat messages."""
    completion: str = "completion"
    """The reply: a string, or a list of messages that ends with the assistant's."""
    label: str = "label"
    """true or 1 = the completion is good; false or 0 = it is bad."""


class Config(Location):
    """The place of the rows, and the way they are read."""

    path: str
    """A file, a glob pattern, or a Hub id such as `trl-lib/kto-mix-14k`."""
    columns: Columns = Columns()
    """The column mapping."""
    template: str = "{prompt}"
    """The prompt; `{prompt}` and further columns in braces are replaced. Prompts of messages stay as they are."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set: groups of one completion, with the token field `sides`: 1 for good ones and -1 for bad ones.

    Raises:
        DataError: a file or column is missing, all rows have the same label, or a row is malformed and
            `data.malformed_rows` is `error`.
    """
    sides = config.sides(config.path, lambda path, split: _rows(config, path, split, context))
    return rows_data(f"unpaired_preferences/{config.path}", *sides, judged(context), context)


def judged(context: DatasetContext) -> RowKind:
    """The kind of rows that have a reply and a label; the targets are the tokens of its last message."""
    renderer = context.renderer

    def group(row: Fields) -> SequenceGroup:
        asked = {"prompt": row["prompt"], "completion": row["completion"]}
        made = group_for_prediction([compared_ids(asked, renderer)])
        return made.with_constants("sides", [GOOD if row["label"] else BAD])

    return RowKind(_problem, group, lambda row: question_key(row["prompt"]), _one_sided)


def _rows(config: Config, path: str, split: str, context: DatasetContext) -> Iterator[PlacedFields]:
    placed = read_rows(path, config.subset, split, context.malformed)
    return templated_rows(placed, config.columns, config.template, ROLES, context.malformed)


def _problem(row: Fields) -> str | None:
    """The reason why a row is unusable, or None."""
    missing = next((role for role in ROLES if role not in row), None)
    if missing is not None:
        return f"the row has no {missing}"
    problem = check_prompt(row["prompt"]) or check_completion(row["completion"])
    if problem is not None:
        return problem
    if is_blank(row["completion"]):
        return "the completion is empty"
    label = row["label"]
    if not isinstance(label, int) or label not in (0, 1):
        return f"the label must be true (or 1) for a good completion, or false (or 0) for a bad one, not {label!r}"
    return None


def _one_sided(groups: Sequence[SequenceGroup]) -> str | None:
    """The reason why groups cannot be compared, or None."""
    found = {group.token_fields["sides"][0][0] for group in groups}
    if len(found) == 2:
        return None
    same, other = ("good", "bad") if GOOD in found else ("bad", "good")
    return f"all their completions are {same}, but good ones are compared with bad ones: add {other} completions"
