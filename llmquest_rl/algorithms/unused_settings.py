"""Settings that only some cells read: beside other cells they would change nothing, silently."""

from collections.abc import Callable
from typing import NamedTuple

from llmquest_rl.algorithms.algorithm import Algorithm
from llmquest_rl.algorithms.surrogates import CUTS, ON_POLICY


class _Reader(NamedTuple):
    """Who reads a setting."""

    who: str
    reads: Callable[[Algorithm], bool]


def _cell(cell: str, *choices: str) -> _Reader:
    return _Reader(f"{cell}: {' or '.join(choices)}", lambda algorithm: getattr(algorithm, cell) in choices)


_BOUNDED = _cell("surrogate", *sorted(CUTS))
_CORRECTED = _Reader("old_policy: learner and a tis_cap", lambda a: a.old_policy == "learner" and a.tis_cap is not None)
_WITH_KL = _Reader("a beta above 0", lambda a: a.beta > 0)
READERS: dict[str, _Reader] = {
    "pass_k": _cell("advantage", "pass_at_k"),
    "length_weight": _cell("length_penalty", "soft_overlong", "relative"),
    "overlong_buffer": _cell("length_penalty", "soft_overlong"),
    "ratio": _Reader("a surrogate that has a ratio", lambda a: a.surrogate not in ON_POLICY),
    "clip_low": _BOUNDED,
    "clip_high": _BOUNDED,
    "dual_clip": _cell("surrogate", "clip"),
    "tau_positive": _cell("surrogate", "soft_gate"),
    "tau_negative": _cell("surrogate", "soft_gate"),
    "power_positive": _cell("surrogate", "gamma_weight"),
    "power_negative": _cell("surrogate", "gamma_weight"),
    "decay_positive": _cell("surrogate", "gamma_weight"),
    "decay_negative": _cell("surrogate", "gamma_weight"),
    "kl": _WITH_KL,
    "kl_in": _WITH_KL,
    "is_correction": _CORRECTED,
    "tis_floor": _CORRECTED,
    "tis_cap": _CORRECTED,
}


def check_read(algorithm: Algorithm, row: Algorithm) -> None:
    """Check that what was set beside a row's name is read.

    Args:
        algorithm: the row with what was set.
        row: the row as it is.

    Raises:
        ValueError: a setting differs from the row's, and no cell reads it. (null asks for nothing.)
    """
    for setting, reader in READERS.items():
        value = getattr(algorithm, setting)
        if value not in (None, getattr(row, setting)) and not reader.reads(algorithm):
            raise ValueError(
                f"{setting} is read with {reader.who}, so here {setting}: {value} would change nothing; leave it out"
            )
