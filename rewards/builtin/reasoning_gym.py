"""reasoning-gym: the score of the task's own scorer, in [0, 1], often with partial credit.

The column `entry` is reasoning-gym's own dict of question, answer and metadata; its `metadata.source_dataset` names the
scorer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llmquest_rl.compat.reasoning_gym import import_reasoning_gym
from llmquest_rl.options import Options
from rewards.extract import after_thinking, last_tagged

reasoning_gym: Any = import_reasoning_gym()


class Config(Options):
    """The part of the completion that is scored."""

    tag: str | None = None
    """Score the content of the last `<tag>...</tag>`, e.g. `answer`, or 0. Default: the text after the thinking."""


def reward(completion: str, entry: dict[str, Any], config: Config) -> float:
    """The score of the task's own scorer.

    Raises:
        ValueError: the entry does not name its data set in reasoning-gym.
    """
    said = after_thinking(completion)
    if said is not None and config.tag is not None:
        said = last_tagged(said, config.tag)
    if said is None:
        return 0.0
    source = entry.get("metadata", {}).get("source_dataset")
    if source is None:
        raise ValueError("the column `entry` has no metadata.source_dataset: it is not an entry of reasoning-gym")
    return float(_scorer(source)(said.strip(), entry))


@cache
def _scorer(source: str) -> Callable[[str, dict[str, Any]], float]:
    scorer: Callable[[str, dict[str, Any]], float] = reasoning_gym.get_score_answer_fn(source)
    return scorer


_SUM = {"question": "4 - 1 - 7 =", "answer": "-4", "metadata": {"source_dataset": "chain_sum"}}
EXAMPLES = [
    ("-4", _SUM, 1.0),
    (" -4\n", _SUM, 1.0),
    ("<think>4 - 8</think> -4", _SUM, 1.0),
    ("<think>-4", _SUM, 0.0),
    ("5", _SUM, 0.0),
]
"""Examples with the column `entry` in place of the answer."""
