"""Next token: the prediction continues a text exactly (Reinforcement Pre-Training, arXiv 2506.08007, eq. 3).

The prediction is the content of the last `\\boxed{...}` after `</think>`, with its spaces. With `prefix` the reward is
1 if the prediction's bytes are a prefix of the true continuation and end where one of its tokens ends.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from llmquest_rl.options import Options
from rewards.extract import BOXED


class Config(Options):
    """The reading and the comparison of the prediction."""

    match: Literal["prefix", "first_token", "dense"] = "prefix"
    """`prefix`: the bytes are a prefix that ends with a token. `first_token`: 1 if the prediction begins with the bytes
    of the first true token. `dense`: as `first_token`, and a wrong prediction gets the proxy's probability of its
    first token (appendix A). Conditional dense is `dense` with `batch.equalize_wrong_groups: true`."""
    thinking: Literal["required", "optional"] = "required"
    """`required`: only a prediction after `</think>` counts. `optional`: so does one without any `</think>`."""


def reward(
    completion: str,
    answer: str,
    config: Config,
    boundaries: Sequence[int] | None = None,
    likely: Mapping[str, float] | None = None,
) -> float:
    """The reward of a prediction, in [0, 1].

    Args:
        completion: The text of the completion.
        answer: The true continuation of the text.
        config: The options.
        boundaries: Number of bytes of `answer` up to the end of each of its tokens; None = it is one token.
        likely: For `dense`: the tokens that a model finds most likely at this place, with their probabilities.

    Raises:
        ValueError: the true continuation is empty, or `dense` has no column `likely`.
    """
    gold = answer.encode()
    if not gold:
        raise ValueError("the true continuation is empty")
    predicted = _prediction(completion, config.thinking == "required")
    if not predicted:
        return 0.0
    if config.match == "dense" and likely is None:
        raise ValueError("`dense` needs the column `likely`, which the task next_token_reasoning provides")
    return MATCHES[config.match](predicted, gold, boundaries or [len(gold)], likely or {})


def _prediction(completion: str, needs_thinking: bool) -> str | None:
    """The content of the last box after the thinking; None if there is none."""
    _, closing, said = completion.rpartition("</think>")
    if needs_thinking and not closing:
        return None
    boxes = list(BOXED.finditer(said))
    return _content(said[boxes[-1].end() :]) if boxes else None


def _content(text: str) -> str | None:
    """The content of an open box. A brace alone is a token, too: `{` of `\\boxed{{}`, `}` of `\\boxed{}}`."""
    depth = 1
    for end, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return "}" if end == 0 and text.startswith("}}") else text[:end]
    inside, closing, _ = text.rpartition("}")
    return inside if closing else None


def _prefix(predicted: str, gold: bytes, boundaries: Sequence[int], likely: Mapping[str, float]) -> float:
    said = predicted.encode()
    return float(gold.startswith(said) and len(said) in boundaries)


def _first_token(predicted: str, gold: bytes, boundaries: Sequence[int], likely: Mapping[str, float]) -> float:
    return float(predicted.encode().startswith(gold[: boundaries[0]]))


def _dense(predicted: str, gold: bytes, boundaries: Sequence[int], likely: Mapping[str, float]) -> float:
    if _first_token(predicted, gold, boundaries, likely):
        return 1.0
    first = max((token for token in likely if token and predicted.startswith(token)), key=len, default=None)
    return 0.0 if first is None else likely[first]


MATCHES: dict[str, Callable[[str, bytes, Sequence[int], Mapping[str, float]], float]] = {
    "prefix": _prefix,
    "first_token": _first_token,
    "dense": _dense,
}

EXAMPLES = [
    ("<think>hm</think>\\boxed{ para}", " para", 1.0),
    ("hm</think>So \\boxed{ pair}, no: \\boxed{ para}", " para", 1.0),
    ("hm</think>\\boxed{ para} or \\boxed{ pair}", " para", 0.0),
    ("hm</think>\\boxed{para}", " para", 0.0),
    ("hm</think>\\boxed{ par}", " para", 0.0),
    ("hm</think>\\boxed{ parade}", " para", 0.0),
    ("<think>\\boxed{ para}", " para", 0.0),
    ("<think>\\boxed{ para}</think> para", " para", 0.0),
    ("\\boxed{ para}", " para", 0.0),
    ("</think>\\boxed{é}", "é", 1.0),
    ("</think>\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
    ("</think>\\boxed{{}", "{", 1.0),
    ("</think>\\boxed{}}", "}", 1.0),
    ("</think>\\boxed{}", "}", 0.0),
    ("</think>\\boxed{ para", " para", 0.0),
    ("</think>", " para", 0.0),
    ("", " para", 0.0),
]
