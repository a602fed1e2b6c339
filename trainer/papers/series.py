"""Metrics by arm and seed, from which figures are drawn and claims are checked."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from statistics import fmean
from typing import Annotated, Any

from pydantic import AfterValidator

Rows = list[dict[str, Any]]
"""Metrics of one run by step, or the rows of a measure, with `step` or another key as the x value."""
Results = dict[str, dict[int, Rows]]
"""Rows by arm and seed."""


def _in_order(window: tuple[float, float]) -> tuple[float, float]:
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"expected two fractions of a run, 0 <= start < end <= 1, found {low:g} and {high:g}")
    return window


Window = Annotated[tuple[float, float], AfterValidator(_in_order)]
"""Start and end of a part of a run as fractions of its steps; (0.8, 1.0) is its last fifth."""

SUMS = {"generated tokens": "rollout/tokens"}
"""Metric by the name of the x value that sums it over the steps."""


ROOTS = {"sqrt KL": "policy/kl_sequence"}
"""Metric by the name of the x value that is its square root: the distance of two policies is quadratic in the KL."""


def with_roots(rows: Rows) -> Rows:
    """The rows with every x value of `ROOTS` added."""
    for name, key in ROOTS.items():
        rows = [row | {name: math.sqrt(max(0.0, row[key]))} if row.get(key) is not None else row for row in rows]
    return rows


def with_cumulative_sums(rows: Rows) -> Rows:
    """The rows with every x value of `SUMS` added."""
    for name, key in SUMS.items():
        totals = accumulate(row.get(key) or 0.0 for row in rows)
        rows = [row | {name: total} for row, total in zip(rows, totals, strict=True)]
    return rows


def points(rows: Rows, metric: str, x: str = "step") -> list[tuple[float, float]]:
    """(x, value) of the rows that have both; a value may be infinite."""
    pairs = ((row.get(x), row.get(metric)) for row in rows)
    return [(float(a), float(b)) for a, b in pairs if a is not None and b is not None and not math.isnan(b)]


def window_mean(rows: Rows, metric: str, window: Window) -> float:
    """The mean of a metric over a window of the run's steps.

    Raises:
        ValueError: the metric has no value in the window.
    """
    first, last = rows[0]["step"], rows[-1]["step"]
    low, high = (first + share * (last - first) for share in window)
    values = [value for step, value in points(rows, metric) if low <= step <= high]
    if not values:
        raise ValueError(
            f"{metric} has no value between step {low:g} and {high:g}: check its name and that the runs log it"
        )
    return fmean(values)


def smooth(values: list[float], width: int) -> list[float]:
    """Moving average: the mean of each value and up to `width - 1` values before it."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def summary(results: Mapping[str, Mapping[int, Rows]], curves: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Curves by metric, arm and seed, rounded to six digits. The key is `metric over x` if x is not the step.

    Args:
        results: rows by arm and seed.
        curves: (metric, x) pairs.
    """
    return {
        metric if x == "step" else f"{metric} over {x}": {
            arm: {
                str(seed): [[_rounded(a), _rounded(b)] for a, b in points(rows, metric, x) if math.isfinite(b)]
                for seed, rows in seeds.items()
            }
            for arm, seeds in results.items()
            if any(points(rows, metric, x) for rows in seeds.values())
        }
        for metric, x in curves
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
