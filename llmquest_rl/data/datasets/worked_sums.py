"""Sums worked digit by digit: text that teaches a small model to add, before reinforcement learning.

A reply is the answer at once (`#93`), or the columns from the right with their carries and then the answer
(`7+6=13;1+7+1=9;#93`). Some columns are wrong, and the rest of the reply follows from the error. A model of this text
is therefore right only part of the time and has several ways to answer: reinforcement learning can favour the better.
"""

import random
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from llmquest_rl.data.dataset import DatasetContext, SupervisedData, replies, rows_data
from llmquest_rl.data.files import PlacedRow
from llmquest_rl.data.rows import Rows
from llmquest_rl.data.tasks import arithmetic
from llmquest_rl.options import Options

Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Config(Options):
    """The sums, and the way they are worked."""

    digits: PositiveInt = 3
    """Decimal digits of both operands."""
    template: str = "{question}="
    """The prompt, as in the task `arithmetic`."""
    held_out: PositiveInt = 100
    """Distinct problems set aside as the validation set, as in the task `arithmetic`."""
    rows: PositiveInt = 20000
    """Number of training rows."""
    direct_share: Share = 0.3
    """Share of the replies that give the answer at once."""
    error_rate: Share = 0.1
    """Share of the worked columns that are off by one."""
    doubt: Share = 0.0
    """Probability that a wrong column is marked with `?`, as by a writer who notices the error but goes on."""
    pause: BelowOne = 0.0
    """Probability that a worked reply pauses (`.`) before its answer, and again after each pause. The lengths of such
    replies are independent of the answer."""
    pause_after_error: BelowOne = 0.0
    """Probability of each pause in replies with a wrong column, as by a writer who hesitates."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set: its problems are those of the task `arithmetic` with the same seed and sizes."""
    options = arithmetic.Config(digits=config.digits, template=config.template, held_out=config.held_out)
    task = arithmetic.load(options, context.seed, context.malformed)
    train = _rows(task.train, config.rows, config)
    held_out = _rows(task.held_out, task.held_out.size or 0, config)
    return rows_data("worked_sums", train, held_out, replies(context.renderer, True), context)


def _rows(rows: Rows, count: int, config: Config) -> Iterator[PlacedRow]:
    for row in map(rows.row, range(count)):
        left, right = str(row.prompt).removesuffix("=").split(" + ")
        yield row.id, {"prompt": row.prompt, "completion": reply(left, right, random.Random(row.id), config)}


def reply(left: str, right: str, rng: random.Random, config: Config) -> str:
    """One reply to `left + right`."""
    if rng.random() < config.direct_share:
        return f"#{int(left) + int(right)}"
    columns, answer, carry, erred = "", "", 0, False
    for a, b in zip(reversed(left), reversed(right), strict=True):
        total = int(a) + int(b) + carry
        mark = ""
        if rng.random() < config.error_rate:
            total, erred = total + (-1 if total and rng.random() < 0.5 else 1), True
            mark = "?" * (rng.random() < config.doubt)
        columns += f"{a}+{b}{'+1' if carry else ''}={total}{mark};"
        answer, carry = f"{total % 10}{answer}", total // 10
    pauses, chance = 0, config.pause_after_error if erred else config.pause
    while rng.random() < chance:
        pauses += 1
    return f"{columns}{'.' * pauses}#{'1' if carry else ''}{answer}"
