"""Exact match: the completion's text equals the gold one, for answers of a word or a few.

Case, white space and a full stop at the end make no difference; any other text in the completion does.
"""

from typing import Any

from llmquest_rl.options import Options


class Config(Options):
    """No options."""


def reward(completion: str, answer: Any, config: Config) -> float:
    """1 if the completion is the gold text, or one of a list of gold texts, else 0.

    Raises:
        ValueError: the gold answer is not a text, or is empty.
    """
    golds = list(answer) if isinstance(answer, list | tuple) else [answer]
    for gold in golds:
        if not isinstance(gold, str) or not _plain(gold):
            raise ValueError(f"the gold answer {gold!r} is not a text, or is empty")
    return float(_plain(completion) in map(_plain, golds))


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").casefold()


EXAMPLES = [
    ("circle", "circle", 1.0),
    (" Circle.\n", "circle", 1.0),
    ("new  york", "New York", 1.0),
    ("a circle", "circle", 0.0),
    ("circles", "circle", 0.0),
    ("circle square", "circle", 0.0),
    ("", "circle", 0.0),
    ("NYC", ["New York", "NYC"], 1.0),
    ("Boston", ["New York", "NYC"], 0.0),
]
