"""The learning rate as a pure function of the update's number: nothing to save, nothing to drift on resume."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""From 1 to 0 as progress goes from 0 to 1 (constant: 1)."""


def lr_factor(schedule: str, update: int, total_updates: int, warmup: int = 0, min_ratio: float = 0.0) -> float:
    """What the peak learning rate is multiplied by.

    Args:
        schedule: a name in `SCHEDULES`.
        update: number of the optimizer update, from 0.
        total_updates: updates in the whole run; beyond it the factor stays at its end.
        warmup: updates of linear rise; the first has 1 / warmup of the peak, the last of them the peak.
        min_ratio: where a falling schedule ends.
    """
    if update < warmup:
        return (update + 1) / warmup
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    return min_ratio + (1.0 - min_ratio) * SCHEDULES[schedule](progress)
