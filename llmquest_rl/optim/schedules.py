"""The learning rate as a pure function of the update's number, so that a resumed run has nothing to restore."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Factor of the peak learning rate, as a function of progress from 0 to 1; it falls from 1 to 0 (`constant`: 1)."""


def lr_factor(schedule: str, update: int, total_updates: int, warmup: int = 0, min_ratio: float = 0.0) -> float:
    """Factor of the peak learning rate at one update.

    Args:
        schedule: a name in `SCHEDULES`.
        update: number of the optimizer update, from 0.
        total_updates: updates in the whole run; after them the factor keeps its last value.
        warmup: updates of linear rise, from 1 / warmup in the first to 1 in the last of them.
        min_ratio: last value of a falling schedule.
    """
    if update < warmup:
        return (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    return min_ratio + (1.0 - min_ratio) * SCHEDULES[schedule](progress)
