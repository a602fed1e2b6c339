"""Fine-tuning on given replies: prompt/completion or messages rows, from files, the Hub, or a task's gold answers."""

from llmquest_rl.data.dataset import DatasetContext, Fields, SupervisedData, replies
from llmquest_rl.data.row_source import RowSource, read_source
from llmquest_rl.data.rows import Row
from llmquest_rl.options import Options


class Columns(Options):
    """The role of each column. A row has messages, or a prompt and a completion."""

    prompt: str = "prompt"
    """A string, or a list of chat messages."""
    completion: str = "completion"
    """The reply to learn: a string, or a list of messages that ends with the assistant's."""
    messages: str = "messages"
    """A conversation of any number of turns; the loss covers the assistant's messages."""
    images: str | None = None
    """Images of the prompt: one, or a list of them; null = none."""


class Config(RowSource):
    """The place of the rows, and the tokens that are learnt."""

    columns: Columns = Columns()
    """The column mapping."""
    template: str = "{prompt}"
    """The prompt of rows from a file; `{prompt}` and further columns in braces are replaced. Prompts of messages stay
    as they are."""
    mask_prompt: bool = True
    """Learn the assistant's tokens only; false = every token of the row."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set.

    Raises:
        DataError: a file is missing, or a row is malformed and `data.malformed_rows` is `error`.
    """
    kind = replies(context.renderer, config.mask_prompt)
    return read_source("sft", config, config.columns, _gold_answer, kind, context, config.template)


def _gold_answer(row: Row) -> Fields:
    return {"prompt": row.prompt, "completion": str(row.answer), "images": row.images}
