"""Exact number: the completion's final number equals the gold one.

The final number is the content of the last `<answer>...</answer>`, or else of the last `\\boxed{...}`, or else of the
line after the last `####`, or else the last number of the text. A marked part must hold exactly one number, so
that neither `\\boxed{6\\times7}` nor `\\boxed{2^7}` passes for 7. Currency, percent, units and thousands commas are
ignored.
"""

import re
from decimal import Context, Decimal
from typing import Any

from pydantic import Field

from llmquest_rl.options import Options
from rewards.extract import last_boxed, last_tagged


class Config(Options):
    """The search for the number, and its comparison."""

    tolerance: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """Largest absolute difference that still counts as equal."""
    whole: bool = False
    """Whether the completion must be the number alone, with nothing but white space around it."""


DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
# A minus is a sign only where no operand stands before it; digits that belong to a word or a version are no number.
NUMBER = re.compile(rf"((?<![\w)\]}}])[-+])?(?<!\w)(?<!\d\.)({DIGITS})(?:\s*/\s*({DIGITS}))?", re.ASCII)
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
ARITHMETIC = Context(prec=50, traps=[])  # no traps: overflow gives infinity, which equals nothing


def reward(completion: str, answer: Any, config: Config) -> float:
    """1 if the final number equals the gold number, else 0.

    Raises:
        ValueError: the gold answer is not one number.
    """
    gold = gold_number(answer)
    predicted = _whole(completion) if config.whole else _final(completion)
    if predicted is None:
        return 0.0
    return float(abs(ARITHMETIC.subtract(predicted, gold)) <= Decimal(config.tolerance))


def gold_number(answer: Any) -> Decimal:
    """The gold number: a number, a text of one number, or GSM8K's solution that ends in `#### 18`.

    Raises:
        ValueError: the answer is not one number.
    """
    numbers = [] if isinstance(answer, bool) else _numbers(str(answer).rpartition("####")[2])
    if len(numbers) != 1:
        raise ValueError(f"the gold answer {str(answer)[-100:]!r} is not one number")
    return numbers[0]


def _numbers(text: str) -> list[Decimal]:
    return [number for match in NUMBER.finditer(_plain(text)) if (number := _value(match)) is not None]


def _plain(text: str) -> str:
    """The text without the marks that surround numbers in prose and LaTeX."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    text = FRACTION.sub(r"\1/\2", text)
    return re.sub(r"([-+])\s?\\?\$", r"\1", text).replace("\\$", " ").replace("$", " ")


def _value(match: re.Match[str]) -> Decimal | None:
    sign, above, below = match.groups()
    value = Decimal(above.replace(",", ""))
    if below is not None:
        value = ARITHMETIC.divide(value, Decimal(below.replace(",", "")))
    return None if value.is_nan() else value.copy_negate() if sign == "-" else value


def _whole(completion: str) -> Decimal | None:
    match = NUMBER.fullmatch(_plain(completion).strip())
    return _value(match) if match else None


def _final(completion: str) -> Decimal | None:
    marked = last_tagged(completion, "answer")
    if marked is None:
        marked = last_boxed(completion)
    if marked is None and "####" in completion:
        marked = completion.rpartition("####")[2].strip().partition("\n")[0]
    numbers = _numbers(completion if marked is None else marked)
    if not numbers or (marked is not None and len(numbers) > 1):
        return None
    return numbers[-1]


EXAMPLES = [
    ("The answer is 18.", "18", 1.0),
    ("The answer is 18.", "She sells 9 * 2 = 18 eggs.\n#### 18", 1.0),
    ("18", 18, 1.0),
    ("180", "18", 0.0),
    ("18.0", "18", 1.0),
    ("18.5", "18", 0.0),
    ("It costs $1,234.50 in all", "1234.5", 1.0),
    ("She owes -$7", "-7", 1.0),
    ("7", "-7", 0.0),
    ("10-7", "-7", 0.0),
    ("10 - 3 = 7", "7", 1.0),
    ("that is 25%", "25", 1.0),
    ("\u22123", "-3", 1.0),
    ("first 3, then 5", "5", 1.0),
    ("first 5, then 3", "5", 0.0),
    ("<answer>5</answer> and not 3", "5", 1.0),
    ("<answer>5</answer> or <answer>3</answer>", "5", 0.0),
    ("<answer>none</answer> 5", "5", 0.0),
    ("\\boxed{5} is larger than 3", "5", 1.0),
    ("\\boxed{6\\times7}", "7", 0.0),
    ("\\boxed{2^7}", "7", 0.0),
    ("\\boxed{\\frac{1}{2}}", "2", 0.0),
    ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
    ("1/2", "2", 0.0),
    ("#### 42 apples\nbye 3", "42", 1.0),
    ("no number", "5", 0.0),
    ("", "5", 0.0),
    ("x5", "5", 0.0),
    ("1e999999999999", "5", 0.0),
    ("9" * 5000, "9" * 4999 + "8", 0.0),
    ("123456789012345678901234567890", "123456789012345678901234567891", 0.0),
    ("123456789012345678901234567890", "123456789012345678901234567890", 1.0),
    ("1/0", "5", 0.0),
]
