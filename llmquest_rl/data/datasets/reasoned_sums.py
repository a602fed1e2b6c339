"""Sums as text, and next-token questions about them with thoughts: they prepare a small model for such reasoning.

A plain row continues a sum with its answer, `12 + 7=` with `19`. A question shows a part of such a text and a mark,
`12 + 17=2?`. Its reply works the sum as `worked_sums` does, writes the answer with a full stop behind the shown part,
and puts the next character into a box: `<think>2+7=9;1+1=2;#2.9</think>\\boxed{9}`. Some columns are wrong, and some
boxes hold the whole answer, as those of a model that does not quite know what a next token is.
"""

import random
from collections.abc import Iterator

from pydantic import NonNegativeInt

from llmquest_rl.data.dataset import DatasetContext, SupervisedData, replies, rows_data
from llmquest_rl.data.datasets import worked_sums
from llmquest_rl.data.files import PlacedRow
from llmquest_rl.data.rows import Rows
from llmquest_rl.data.tasks import arithmetic


class Config(worked_sums.Config):
    """The options of `worked_sums`; `direct_share` is the share of plain rows."""

    whole_share: worked_sums.Share = 0.5
    """Share of the boxes that hold the whole answer in place of its next character."""
    noise_digits: NonNegativeInt = 0
    """Random digits behind the answers of noisy rows, as in the task `arithmetic`."""
    noise_share: worked_sums.Share = 0.0
    """Share of the rows that are noisy."""
    mark: str = "?"
    """Text behind the shown part in a question."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set: its problems are those of the task `arithmetic` with the same seed and sizes."""
    options = arithmetic.Config(
        digits=config.digits, template=config.template, held_out=config.held_out, noise_digits=config.noise_digits
    )
    task = arithmetic.load(options, context.seed, context.malformed)
    train = _rows(task.train, config.rows, config)
    held_out = _rows(task.held_out, task.held_out.size or 0, config)
    return rows_data("reasoned_sums", train, held_out, replies(context.renderer, True), context)


def _rows(rows: Rows, count: int, config: Config) -> Iterator[PlacedRow]:
    for row in map(rows.row, range(count)):
        rng = random.Random(row.id)
        answer = str(row.answer) if rng.random() < config.noise_share else str(row.answer).partition(";")[0]
        if rng.random() < config.direct_share:
            yield row.id, {"prompt": row.prompt, "completion": answer}
            continue
        shown = rng.randrange(len(answer))
        left, right = str(row.prompt).removesuffix("=").split(" + ")
        thought = worked_sums.reply(left, right, rng, config.model_copy(update={"direct_share": 0.0}))
        columns, _, found = f"{thought}{answer[len(answer.partition(';')[0]) :]}".rpartition("#")
        rest = found[shown:] or found[-1]
        box = found if rng.random() < config.whole_share else rest[0]
        completion = f"<think>{columns}#{found[:shown]}.{rest}</think>\\boxed{{{box}}}"
        yield row.id, {"prompt": f"{row.prompt}{answer[:shown]}{config.mark}", "completion": completion}
