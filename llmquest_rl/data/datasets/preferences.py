"""Preference pairs from files or the Hub: two replies to one prompt, one of which people (or a rule) preferred.

Three forms of rows are read:

* `prompt`, `chosen` and `rejected`: the replies are strings, or lists of messages that follow the prompt's;
* `chosen` and `rejected`: whole conversations, as lists of messages with a common beginning;
* the same conversations as texts, "\\n\\nHuman: ...\\n\\nAssistant: ...", the form of Anthropic's HH (Bai et al. 2022,
  arXiv:2204.05862).
"""

import math
import re
from collections.abc import Iterator, Sequence

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import is_blank
from llmquest_rl.data.dataset import DatasetContext, Fields, PlacedFields, RowKind, SupervisedData, rows_data
from llmquest_rl.data.files import read_rows
from llmquest_rl.data.pairs import SplitIds, compared_ids, group_for_prediction, group_for_scoring, read_ids
from llmquest_rl.data.row_source import Location, templated_rows
from llmquest_rl.data.rows import MalformedRowError, check_message, check_prompt, question_key
from llmquest_rl.data.tokenizer import as_messages
from llmquest_rl.options import Options
from llmquest_rl.types import Message

TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
REPLIES = ("chosen", "rejected")


class Columns(Options):
    """The role of each column."""

    prompt: str = "prompt"
    """A string, or a list of chat messages; whole conversations need no such column."""
    chosen: str = "chosen"
    """The better reply, or the conversation that ends with it."""
    rejected: str = "rejected"
    """The worse reply, or the conversation that ends with it."""
    margin: str = "margin"
    """The minimum difference of the two scores; a data set without this column has no margins."""


class Config(Location):
    """The place of the pairs, and the way they are read."""

    path: str
    """A file, a glob pattern, or a Hub id such as `Anthropic/hh-rlhf`."""
    columns: Columns = Columns()
    """The column mapping."""
    template: str = "{prompt}"
    """The prompt; `{prompt}` and further columns in braces are replaced. Prompts of messages stay as they are."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set: groups of two completions, the chosen one first, and a token field `margins` if rows have one.

    Raises:
        DataError: a file or column is missing, or a row is malformed and `data.malformed_rows` is `error`.
    """
    sides = config.sides(config.path, lambda path, split: _rows(config, path, split, context))
    return rows_data(f"preferences/{config.path}", *sides, pairs(context), context)


def pairs(context: DatasetContext) -> RowKind:
    """The kind of rows that have two replies.

    If the objective has labels, the group has a score of each conversation, which its pooling reads. Otherwise its
    targets are the tokens of the last reply of each.
    """
    renderer = context.renderer

    def group(row: Fields) -> SequenceGroup:
        both = [compared_ids(conversation(row, reply), renderer) for reply in REPLIES]
        sequences = [before + reply for before, reply in both]
        if sequences[0] == sequences[1]:
            raise MalformedRowError("the tokens of the chosen and the rejected reply are equal")
        made = _scored(both, context) if context.labels else group_for_prediction(both)
        if "margin" not in row:
            return made
        return made.with_constants("margins", [float(row["margin"])] * 2)

    return RowKind(_problem, group, _question)


def _scored(both: Sequence[SplitIds], context: DatasetContext) -> SequenceGroup:
    eos = context.renderer.tokenizer.eos_token_id
    return group_for_scoring([read_ids(one, context.pooling, eos) for one in both], context.pooling)


def conversation(row: Fields, reply: str) -> Fields:
    """The row of one conversation, as `compared_ids` takes it: the prompt with one of its two replies."""
    said = row[reply]
    if isinstance(said, str):
        return {"prompt": row["prompt"], "completion": said} if "prompt" in row else {"messages": dialogue(said)}
    return {"messages": said if said[0]["role"] != "assistant" else [*as_messages(row["prompt"]), *said]}


def dialogue(text: str) -> list[Message]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..." ; empty if the text does not have this form.

    Its turns alternate, begin with the human's and end with the assistant's.
    """
    before, *parts = TURN.split(text)
    speakers, said = parts[::2], parts[1::2]
    alternate = speakers == ["Human", "Assistant"] * (len(speakers) // 2)
    if before.strip() or not speakers or not alternate:
        return []
    return [{"role": SPEAKERS[who], "content": what.strip()} for who, what in zip(speakers, said, strict=True)]


def _rows(config: Config, path: str, split: str, context: DatasetContext) -> Iterator[PlacedFields]:
    placed = read_rows(path, config.subset, split, context.malformed)
    required = REPLIES if config.columns.prompt == "prompt" else ("prompt", *REPLIES)
    return templated_rows(placed, config.columns, config.template, required, context.malformed)


def _problem(row: Fields) -> str | None:
    """The reason why a row is unusable, or None."""
    wrong_prompt = check_prompt(row["prompt"]) if "prompt" in row else None
    problems = (found for reply in REPLIES if (found := _reply_problem(row, reply) or _blank_problem(row, reply)))
    problem = wrong_prompt or next(problems, None)
    if problem is not None:
        return problem
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        return f"the margin must be a finite number, not {margin!r}"
    if conversation(row, "chosen") == conversation(row, "rejected"):
        return "the chosen and the rejected reply are equal"
    return None


def _reply_problem(row: Fields, reply: str) -> str | None:
    said = row.get(reply)
    if isinstance(said, str):
        if "prompt" in row or dialogue(said):
            return None
        return (
            f"there is no prompt, so `{reply}` must be a whole conversation: a list of messages, or turns that "
            f"alternate from '\\n\\nHuman:' to '\\n\\nAssistant:', but it begins {said[:40]!r}"
        )
    if not isinstance(said, list) or not said:
        return f"`{reply}` must be a string or a list of messages, not {said!r}"
    wrong_message = next((problem for message in said if (problem := check_message(message))), None)
    if wrong_message:
        return f"{wrong_message} (`{reply}`)"
    if said[-1]["role"] != "assistant":
        return f"`{reply}` must end with the assistant's message"
    if said[0]["role"] == "assistant" and "prompt" not in row:
        return f"`{reply}` begins with the assistant's message and there is no prompt"
    return None


def _blank_problem(row: Fields, reply: str) -> str | None:
    said = conversation(row, reply)
    return f"the last reply of `{reply}` is empty" if is_blank(said.get("completion", said.get("messages"))) else None


def _question(row: Fields) -> str:
    """The prompt, or the first message of the user."""
    if "prompt" in row:
        return question_key(row["prompt"])
    messages = conversation(row, "chosen")["messages"]
    return next((message["content"] for message in messages if message["role"] == "user"), "")
