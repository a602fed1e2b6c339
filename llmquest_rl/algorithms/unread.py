"""Numbers that only some cells read: set beside other cells they would change nothing, silently."""

from typing import NamedTuple

from llmquest_rl.algorithms.cells import Algorithm


class _Reader(NamedTuple):
    """Who reads a number."""

    cell: str
    choices: frozenset[str]


def _of(cell: str, *choices: str) -> _Reader:
    return _Reader(cell, frozenset(choices))


READERS: dict[str, _Reader] = {
    "pass_k": _of("advantage", "pass_at_k"),
    "overlong_buffer": _of("length_penalty", "soft_overlong"),
    "clip_low": _of("surrogate", "clip", "geometric_clip", "clipped_weight", "binary_tv", "binary_kl"),
    "clip_high": _of("surrogate", "clip", "geometric_clip", "clipped_weight", "binary_tv", "binary_kl"),
    "dual_clip": _of("surrogate", "clip"),
    "tau_positive": _of("surrogate", "soft_gate"),
    "tau_negative": _of("surrogate", "soft_gate"),
    "power_positive": _of("surrogate", "gamma_weight"),
    "power_negative": _of("surrogate", "gamma_weight"),
    "decay_positive": _of("surrogate", "gamma_weight"),
    "decay_negative": _of("surrogate", "gamma_weight"),
    "mismatch": _of("old_policy", "learner"),
    "tis_floor": _of("old_policy", "learner"),
    "tis_cap": _of("old_policy", "learner"),
}


def check_read(algorithm: Algorithm, row: Algorithm) -> None:
    """Check that what was set beside a row's name is read.

    Args:
        algorithm: the row with what was set.
        row: the row as it is.

    Raises:
        ValueError: a number differs from the row's, and none of the cells reads it. (null asks for nothing.)
    """
    for number, (cell, choices) in READERS.items():
        value, choice = getattr(algorithm, number), getattr(algorithm, cell)
        if value not in (None, getattr(row, number)) and choice not in choices:
            raise ValueError(
                f"{number} is read with {cell}: {' or '.join(sorted(choices))}, and here it is {choice}, so "
                f"{number}: {value} would change nothing; leave it out"
            )
