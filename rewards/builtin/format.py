"""Format: the completion thinks and answers in tags: `<think>...</think>` and then `<answer>...</answer>`.

The reward is 1 if every tag opens and closes once, in order, with some text inside and only white space outside.
"""

import re
from typing import Annotated

from pydantic import Field

from llmquest_rl.options import Options

Tag = Annotated[str, Field(pattern=r"^\w+$")]


class Config(Options):
    """The tags that a completion must have."""

    tags: tuple[Tag, ...] = Field(default=("think", "answer"), min_length=1)
    """Names of the tags, in order."""
    opened: bool = False
    """Whether the chat template opens the first tag, so that the completion begins inside it."""


def reward(completion: str, config: Config) -> float:
    """1 if the completion has this form, else 0."""
    text = f"<{config.tags[0]}>{completion}" if config.opened else completion
    if any(text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1 for tag in config.tags):
        return 0.0
    pattern = r"\s*".join(rf"<{tag}>(?P<{tag}>.*?)</{tag}>" for tag in config.tags)
    match = re.fullmatch(rf"\s*{pattern}\s*", text, re.DOTALL)
    return float(match is not None and all(match[tag].strip() for tag in config.tags))


EXAMPLES = [
    ("<think>2 + 2</think><answer>4</answer>", None, 1.0),
    (" <think>2\n+ 2</think>\n\n<answer>4</answer>\n", None, 1.0),
    ("<answer>4</answer><think>2 + 2</think>", None, 0.0),
    ("<think>2 + 2</think><answer>4", None, 0.0),
    ("<think>2 + 2<answer>4</answer></think>", None, 0.0),
    ("<think>2 + 2</think>so<answer>4</answer>", None, 0.0),
    ("<think>2 + 2</think><answer>4</answer>!", None, 0.0),
    ("<think>2 + 2</think><answer> </answer>", None, 0.0),
    ("<think></think><answer>4</answer>", None, 0.0),
    ("<think>a</think><think>b</think><answer>4</answer>", None, 0.0),
    ("<think>a</think><answer>4</answer><answer>5</answer>", None, 0.0),
    ("<think>a</think></think><answer>4</answer>", None, 0.0),
    ("4", None, 0.0),
    ("", None, 0.0),
]
