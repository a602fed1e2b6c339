"""Prompts with privileged context: a teacher reads the gold answer or a hint that the student does not see."""

from llmquest_rl.data.rows import DataError, Row
from llmquest_rl.data.template import fill, placeholders
from llmquest_rl.types import Message


def hinted_prompt(template: str, row: Row) -> str | list[Message]:
    """The prompt of a row with privileged context, in the form of the row's own prompt.

    In a conversation the last message of the user gets the context.

    Args:
        template: Text in which `{prompt}` stands for the prompt, `{answer}` for the gold answer, and the name of any
            other column for its value.
        row: The row.

    Raises:
        DataError: the template names a column that the row does not have, or no message is the user's.
    """
    if isinstance(row.prompt, str):
        return _filled(template, row, row.prompt)
    last = max((i for i, message in enumerate(row.prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise DataError(f"the prompt {row.id} has no message of the user that could get the hint")
    return [
        {**message, "content": _filled(template, row, message["content"])} if i == last else message
        for i, message in enumerate(row.prompt)
    ]


def _filled(template: str, row: Row, prompt: str) -> str:
    values = {**row.columns, "answer": row.answer, "prompt": prompt}
    missing = [name for name in placeholders(template) if name not in values]
    if missing:
        raise DataError(f"the hint names {{{missing[0]}}}, but the row {row.id} has only: {', '.join(sorted(values))}")
    return fill(template, values)
