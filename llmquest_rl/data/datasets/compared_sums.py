"""Generated preference pairs of worked sums: of two replies to a sum, the right one is chosen.

The replies are those of the data set `worked_sums`, except that some of the answers given at once are wrong, like those
of a model trained on it. A reward model can learn from them when to trust a reply.
"""

import random
from collections.abc import Iterator

from llmquest_rl.data.dataset import DatasetContext, PlacedFields, SupervisedData, rows_data
from llmquest_rl.data.datasets import worked_sums
from llmquest_rl.data.datasets.preferences import pairs
from llmquest_rl.data.rows import DataError, Rows
from llmquest_rl.data.tasks import arithmetic

MAX_REPLIES = 1000
"""Maximum number of replies written for one sum to find a right one and a wrong one."""


class Config(worked_sums.Config):
    """The options of `worked_sums`; `rows` counts pairs."""

    direct_error_rate: worked_sums.Share = 0.5
    """Share of the answers given at once in which one digit is wrong."""
    flip_rate: worked_sums.BelowOne = 0.0
    """Share of the training pairs in which the wrong reply is chosen: label noise. Held-out pairs have none."""


def load(config: Config, context: DatasetContext) -> SupervisedData:
    """Load the data set: its problems are those of the task `arithmetic` with the same seed and sizes.

    Raises:
        DataError: with these options no reply is right, or none is wrong.
    """
    options = arithmetic.Config(digits=config.digits, template=config.template, held_out=config.held_out)
    task = arithmetic.load(options, context.seed, context.malformed)
    train = _rows(task.train, config.rows, config, config.flip_rate)
    held_out = _rows(task.held_out, task.held_out.size or 0, config, flip_rate=0.0)
    return rows_data("compared_sums", train, held_out, pairs(context), context)


def _rows(rows: Rows, count: int, config: Config, flip_rate: float) -> Iterator[PlacedFields]:
    for row in map(rows.row, range(count)):
        left, right = str(row.prompt).removesuffix("=").split(" + ")
        rng = random.Random(row.id)
        found: dict[bool, str] = {}
        for _ in range(MAX_REPLIES):
            reply = _reply(left, right, rng, config)
            found.setdefault(reply.rpartition("#")[2] == row.answer, reply)
            if len(found) == 2:
                break
        else:
            raise DataError(
                f"{MAX_REPLIES} replies to {row.prompt} are all alike: choose an error_rate between 0 and 1"
            )
        is_flipped = rng.random() < flip_rate
        yield row.id, {"prompt": row.prompt, "chosen": found[not is_flipped], "rejected": found[is_flipped]}


def _reply(left: str, right: str, rng: random.Random, config: Config) -> str:
    reply = worked_sums.reply(left, right, rng, config)
    if not reply.startswith("#") or rng.random() >= config.direct_error_rate:
        return reply
    place = rng.randrange(1, len(reply))
    digit = rng.choice([digit for digit in "0123456789" if digit != reply[place]])
    return f"{reply[:place]}{digit}{reply[place + 1 :]}"
