"""Claims of a recipe: statements about a metric of its arms, which are checked seed by seed.

Two arms are compared by the simplest exact permutation test: every seed of one arm lies above every seed of the other.
With three seeds per arm this happens by chance once in C(6, 3) = 20 times, with five once in 252.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from statistics import fmean
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from llmquest_rl.options import Options
from trainer.config.renamed_keys import MetricName
from trainer.papers.series import Results, Window, window_mean


class _Claim(Options):
    """Fields of every claim."""

    says: str
    """The claim in words."""
    metric: MetricName
    over: Window = (0.8, 1.0)
    """Start and end of the part of each run over which the metric is averaged, as fractions of its steps."""


class _Change(_Claim):
    """Fields of claims about the change of a metric from the beginning of the run to `over`."""

    arm: str
    start: Window = (0.0, 0.1)
    """Start and end of the part of the run that counts as its beginning, as fractions of its steps."""


class Rises(_Change):
    """The metric rises by at least `by` in every seed."""

    kind: Literal["rises"]
    by: NonNegativeFloat


class Falls(_Change):
    """The metric falls by at least `by` in every seed. A negative `by` allows it to rise by that much."""

    kind: Literal["falls"]
    by: float


class Stays(_Change):
    """The metric changes by at most `within` in every seed."""

    kind: Literal["stays"]
    within: NonNegativeFloat


class Above(_Claim):
    """Every seed of `arm` lies above every seed of `than`, its mean by at least `by` and a factor of `times`."""

    kind: Literal["above"]
    arm: str
    than: str
    by: float = 0.0
    times: float = 1.0


class Close(_Claim):
    """The means of two arms over their seeds differ by at most `within`."""

    kind: Literal["close"]
    arm: str
    than: str
    within: NonNegativeFloat


class Inside(_Claim):
    """Every seed of `arm` lies between the bounds `low` and `high`; one of them may be omitted."""

    kind: Literal["inside"]
    arm: str
    low: float = float("-inf")
    high: float = float("inf")

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if not self.low < self.high or self.low == -self.high == float("-inf"):
            raise ValueError(f"set `low`, `high`, or both with low < high; they are {self.low:g} and {self.high:g}")
        return self


Claim = Annotated[Rises | Falls | Stays | Above | Close | Inside, Field(discriminator="kind")]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of one claim, with its numbers."""

    says: str
    holds: bool
    numbers: str


def check(claim: Claim, results: Results) -> Verdict:
    """Check one claim.

    Raises:
        ValueError: an arm or a metric does not exist.
    """
    holds, numbers = _CHECKS[claim.kind](claim, results)
    return Verdict(claim.says, holds, f"{claim.metric}: {numbers}")


def _values(claim: _Claim, arm: str, results: Results, window: Window | None = None) -> list[float]:
    """The mean of the metric over the window, for each seed."""
    if arm not in results:
        raise ValueError(f"a claim names the arm {arm!r}, which does not exist; the arms are: {', '.join(results)}")
    return [window_mean(rows, claim.metric, window or claim.over) for rows in results[arm].values()]


def _changes(claim: _Change, results: Results) -> tuple[list[float], str]:
    before, after = (_values(claim, claim.arm, results, window) for window in (claim.start, claim.over))
    changes = [b - a for a, b in zip(before, after, strict=True)]
    return changes, f"{claim.arm} {_range(before)} -> {_range(after)}, expected "


def _rises(claim: Rises, results: Results) -> tuple[bool, str]:
    changes, numbers = _changes(claim, results)
    return all(change >= claim.by for change in changes), f"{numbers}{claim.by:+g} or more"


def _falls(claim: Falls, results: Results) -> tuple[bool, str]:
    changes, numbers = _changes(claim, results)
    return all(change <= -claim.by for change in changes), f"{numbers}{-claim.by:+g} or less"


def _stays(claim: Stays, results: Results) -> tuple[bool, str]:
    changes, numbers = _changes(claim, results)
    return all(abs(change) <= claim.within for change in changes), f"{numbers}within {claim.within:g}"


def _above(claim: Above, results: Results) -> tuple[bool, str]:
    high, low = (_values(claim, arm, results) for arm in (claim.arm, claim.than))
    apart, difference = _apart(high, low), fmean(high) - fmean(low)
    holds = apart and difference >= claim.by and fmean(high) >= claim.times * fmean(low)
    expected = f", expected {claim.by:+g}" * (claim.by != 0) + f", expected {claim.times:g} times" * (claim.times != 1)
    chance = f", 1 in {comb(len(high) + len(low), len(low))} by chance"
    if apart:
        order = f"every seed apart{chance}"
    else:
        order = f"every seed the other way round{chance}" if _apart(low, high) else "seeds overlap"
    return holds, f"{claim.arm} {_range(high)} above {claim.than} {_range(low)}{expected}; {order}"


def _apart(high: list[float], low: list[float]) -> bool:
    return all(one > other for one in high for other in low)


def _close(claim: Close, results: Results) -> tuple[bool, str]:
    one, other = (_values(claim, arm, results) for arm in (claim.arm, claim.than))
    difference = fmean(one) - fmean(other)
    numbers = f"{claim.arm} {_range(one)}, {claim.than} {_range(other)}, expected within {claim.within:g}"
    return abs(difference) <= claim.within, numbers


def _inside(claim: Inside, results: Results) -> tuple[bool, str]:
    values = _values(claim, claim.arm, results)
    holds = all(claim.low <= value <= claim.high for value in values)
    return holds, f"{claim.arm} {_range(values)}, expected {claim.low:g} to {claim.high:g}"


def _range(values: list[float]) -> str:
    """Mean, minimum and maximum as text."""
    return f"{fmean(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


_CHECKS: dict[str, Callable[..., tuple[bool, str]]] = {
    "rises": _rises,
    "falls": _falls,
    "stays": _stays,
    "above": _above,
    "close": _close,
    "inside": _inside,
}
