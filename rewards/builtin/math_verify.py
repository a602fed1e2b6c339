"""Math: the completion's final answer equals the gold one mathematically, as Hugging Face's Math-Verify decides.

It is strict by default, because Math-Verify alone accepts many texts that are not answers. In strict mode the answer
must be in the last `\\boxed{...}` (or `<answer>...</answer>`) after the thinking. A gold number requires an evaluated
number and not arithmetic that leads to it; an exact irrational number requires an exact form; an equation is not a
number; the brackets of a gold set or tuple must match; and a percent sign is a unit (18% is 18, not 0.18). The grader's
time limit applies, because that of Math-Verify uses SIGALRM and turns an answer that takes too long into a wrong one.
"""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig
from sympy import Float, Integer, MatrixBase, Mul, Number, Pow
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from llmquest_rl.options import Options
from rewards.extract import after_thinking, last_boxed, last_tagged

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its own time limit is off

Expression = Any
"""A parsed answer: an expression or matrix of sympy, or a text."""


class Config(Options):
    """The strictness of the comparison."""

    strict: bool = True
    """False accepts all that Math-Verify accepts: an expression anywhere in the text, in any equivalent form."""


LATEX = LatexExtractionConfig(boxed_match_priority=0)
ANYWHERE = (LATEX, ExprExtractionConfig())
OPENING = re.compile(r"\s*(?:\\left\s*)?(\\\{|[(\[{])")
PERCENT = re.compile(r"\s*\\?%\s*$")
UNCOMPARABLE = (TypeError, ValueError, ArithmeticError, NotImplementedError, AttributeError)
"""Errors of sympy for forms that it cannot compare; such an answer counts as not equal."""


def reward(completion: str, answer: Any, config: Config) -> float:
    """1 if the final answer equals the gold answer, else 0.

    Raises:
        ValueError: the gold answer cannot be read as mathematics.
    """
    if not config.strict:
        return float(_equal(_gold(str(answer)), _parse(completion, ANYWHERE)))
    gold_text = _gold_text(str(answer))
    text = _marked(completion)
    if text is None:
        return 0.0
    text = PERCENT.sub("", text)
    if text.replace(" ", "") == gold_text.replace(" ", ""):
        return 1.0
    gold, predicted = _gold(gold_text), _parse(_boxed(text), (LATEX,))
    if not predicted or not _same_form(gold[0], predicted[0]) or not _same_bracket(gold_text, text):
        return 0.0
    return float(_equal(gold, predicted))


def _marked(completion: str) -> str | None:
    """The text of the marked final answer, or None if there is none."""
    said = after_thinking(completion)
    if said is None:
        return None
    tagged = last_tagged(said, "answer")
    boxed = last_boxed(said if tagged is None else tagged)
    return tagged if boxed is None else boxed


def _gold_text(answer: str) -> str:
    """The gold answer without a solution before `####` or around `\\boxed{}`, and without dollar and percent signs."""
    text = answer.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    text = text.strip("$").strip() if boxed is None else boxed
    return PERCENT.sub("", text)


@lru_cache(maxsize=1024)  # the completions of a group share their gold answer
def _gold(answer: str) -> list[Expression]:
    text = _gold_text(answer)
    parsed = _parse(_boxed(text), (LATEX,))
    if not parsed:
        raise ValueError(f"the gold answer {answer[-200:]!r} cannot be read as mathematics")
    return parsed


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _parse(text: str, extraction: tuple[Any, ...]) -> list[Expression]:
    parsed: list[Expression] = parse(text, extraction, parsing_timeout=None, raise_on_error=True)
    return parsed


def _equal(gold: list[Expression], predicted: list[Expression]) -> bool:
    try:
        return bool(verify(gold, predicted, timeout_seconds=None, raise_on_error=True))
    except UNCOMPARABLE:
        return False


def _same_form(gold: Expression, predicted: Expression) -> bool:
    """Whether the prediction is evaluated as far as the gold answer."""
    if isinstance(gold, str) or isinstance(predicted, str):
        return True
    if isinstance(predicted, Relational) and not isinstance(gold, Relational):
        return False
    if _is_plain(gold):
        return _is_plain(predicted)
    return gold.has(Float) or not predicted.has(Float)


def _is_plain(expression: Any) -> bool:
    """Whether this is an evaluated number, or a set, tuple, interval or matrix of such numbers."""
    if isinstance(expression, Number | BooleanAtom):
        return True
    if isinstance(expression, MatrixBase):
        return all(_is_plain(entry) for entry in expression)
    if isinstance(expression, Mul):
        return _is_scientific(expression)
    is_container = not hasattr(expression, "as_coeff_Mul")  # sympy's Expr, i.e. terms and sums, have it; sets do not
    return is_container and bool(expression.args) and all(_is_plain(part) for part in expression.args)


def _is_scientific(expression: Mul) -> bool:
    """Whether this is a number like 1.5 x 10^3."""
    parts = expression.args
    is_power_of_ten = isinstance(parts[-1], Pow) and parts[-1].args[0] == 10 and isinstance(parts[-1].args[1], Integer)
    return len(parts) == 2 and isinstance(parts[0], Number) and is_power_of_ten


def _same_bracket(gold: str, predicted: str) -> bool:
    """Whether the brackets of a gold set, tuple or interval match: `1,2` is neither {1, 2} nor (1, 2)."""
    opening = OPENING.match(gold)
    if opening is None or "," not in gold:
        return True
    found = OPENING.match(predicted)
    return found is not None and found[1].strip("\\") == opening[1].strip("\\")


EXAMPLES = [
    (r"So \boxed{42}.", "42", 1.0),
    (r"\boxed{41}, no: \boxed{42}", "42", 1.0),
    (r"\boxed{42}, no: \boxed{41}", "42", 0.0),
    (r"\boxed{42", "42", 0.0),
    ("42", "42", 0.0),
    ("no idea 1 2 3 18", "18", 0.0),
    ("<answer>42</answer>", "42", 1.0),
    (r"<answer>\boxed{42}</answer>", "42", 1.0),
    (r"<think>maybe \boxed{42}</think> \boxed{41}", "42", 0.0),
    (r"<think>maybe \boxed{42}", "42", 0.0),
    (r"<think>hm</think>\boxed{42}", "42", 1.0),
    (r"\boxed{42}", "She has 6 * 7 = 42.\n#### 42", 1.0),
    (r"\boxed{42}", r"so $x = \boxed{42}$", 1.0),
    (r"\boxed{1{,}234}", "1234", 1.0),
    (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1.0),
    (r"\boxed{1/2}", r"$\frac{1}{2}$", 1.0),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 1.0),
    (r"\boxed{-\frac{1}{2}}", r"\frac{-1}{2}", 1.0),
    (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}", 1.0),
    (r"\boxed{1.5\times 10^3}", "1500", 1.0),
    (r"\boxed{6\times7}", "42", 0.0),
    (r"\boxed{1+1}", "2", 0.0),
    (r"\boxed{2^3}", "8", 0.0),
    (r"\boxed{\sqrt{4}}", "2", 0.0),
    (r"\boxed{18\%}", "18", 1.0),
    (r"\boxed{18\%}", "0.18", 0.0),
    (r"\boxed{18}", r"18\%", 1.0),
    (r"\boxed{y=5}", "5", 0.0),
    (r"\boxed{y=5}", "y=5", 1.0),
    (r"\boxed{1,2}", r"\{1,2\}", 0.0),
    (r"\boxed{1,2}", "(1,2)", 0.0),
    (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
    (r"\boxed{(1,2)}", "(1,2)", 1.0),
    (r"\boxed{(2,1)}", "(1,2)", 0.0),
    (r"\boxed{[1,2)}", "[1,2)", 1.0),
    (r"\boxed{2, 1}", "1,2", 1.0),
    (r"\boxed{1, 1+1}", "1,2", 0.0),
    (r"\boxed{1.41421356}", r"\sqrt{2}", 0.0),
    (r"\boxed{\sqrt{2}}", r"\sqrt{2}", 1.0),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1.0),
    (r"\boxed{3.14159}", r"\pi", 0.0),
    (r"\boxed{.3333}", r"\frac{1}{3}", 0.0),
    (r"\boxed{5\text{ cm}}", "5", 1.0),
    (r"\boxed{5}", r"5\text{ cm}", 1.0),
    (r"\boxed{90^\circ}", "90", 1.0),
    (r"\boxed{\$5}", "5", 1.0),
    (r"\boxed{2x+x^2}", "x^2+2x", 1.0),
    (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
    (r"\boxed{\text{even}}", r"\text{even}", 1.0),
    (r"\boxed{\text{odd}}", r"\text{even}", 0.0),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
    (r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0.0),
    (r"\boxed{x<5}", "x<5", 1.0),
    (r"\boxed{x>5}", "x<5", 0.0),
    (r"\boxed{}", "5", 0.0),
    ("", "5", 0.0),
]
"""Examples in strict mode."""
