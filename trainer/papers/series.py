"""Numbers by arm and seed: what figures are drawn from and claims are checked on."""

import math
from collections.abc import Iterable, Mapping
from itertools import accumulate
from statistics import fmean
from typing import Annotated, Any

from pydantic import AfterValidator

Rows = list[dict[str, Any]]
"""Of one run: its metrics by step; or what a measure gave, with `step` or another key as the abscissa."""
Results = dict[str, dict[int, Rows]]
"""Arm to seed to rows."""


def _in_order(window: tuple[float, float]) -> tuple[float, float]:
    low, high = window
    if not 0 <= low < high <= 1:
        raise ValueError(f"a share of a run goes up, from 0 at the earliest to 1, not from {low:g} to {high:g}")
    return window


Window = Annotated[tuple[float, float], AfterValidator(_in_order)]
"""Which share of a run, e.g. (0.8, 1.0): its last fifth."""

SUMS = {"generated tokens": "rollout/tokens"}
"""Abscissas that add up a metric over the steps."""


def with_sums(rows: Rows) -> Rows:
    """The rows with every abscissa of `SUMS`."""
    for name, key in SUMS.items():
        totals = accumulate(row.get(key) or 0.0 for row in rows)
        rows = [row | {name: total} for row, total in zip(rows, totals, strict=True)]
    return rows


def points(rows: Rows, metric: str, x: str = "step") -> list[tuple[float, float]]:
    """(abscissa, value) where both exist; a value may be infinite."""
    pairs = ((row.get(x), row.get(metric)) for row in rows)
    return [(float(a), float(b)) for a, b in pairs if a is not None and b is not None and not math.isnan(b)]


def statistic(rows: Rows, metric: str, window: Window) -> float:
    """The mean of a metric over a share of the run's steps.

    Raises:
        ValueError: it has no value there.
    """
    first, last = rows[0]["step"], rows[-1]["step"]
    low, high = (first + share * (last - first) for share in window)
    values = [value for step, value in points(rows, metric) if low <= step <= high]
    if not values:
        raise ValueError(f"{metric} has no value between step {low:g} and {high:g}: is it measured in this recipe?")
    return fmean(values)


def smooth(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width - 1` before it."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def summary(results: Mapping[str, Mapping[int, Rows]], curves: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Curves by metric (`metric over x` where the abscissa is not the step), arm and seed, rounded to six figures.

    Args:
        curves: metrics with their abscissas.
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
