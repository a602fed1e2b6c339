"""Finds settings that the chosen variants do not read: they would change nothing, silently."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from llmquest_rl.algorithms.algorithm import Algorithm
from llmquest_rl.algorithms.cells import CELLS, SURROGATES


class _Reader(NamedTuple):
    """The condition under which a setting is read."""

    condition: str
    holds: Callable[[Algorithm], bool]


def _corrects(algorithm: Algorithm) -> bool:
    return algorithm.old_policy == "learner" and algorithm.tis_cap is not None


_CORRECTED = _Reader("old_policy: learner and a tis_cap", _corrects)
_WITH_KL = _Reader("a beta above 0", lambda algorithm: algorithm.beta > 0)
_SHARED = {
    "ratio": _Reader("a surrogate that has a ratio", lambda algorithm: SURROGATES[algorithm.surrogate].has_ratio),
    "kl": _WITH_KL,
    "kl_in": _WITH_KL,
    "is_correction": _CORRECTED,
    "tis_floor": _CORRECTED,
    "tis_cap": _CORRECTED,
}


def _of_variants() -> Iterator[tuple[str, _Reader]]:
    """Every setting that belongs to variants of a cell, with the variants that read it."""
    for cell, variants in CELLS.items():
        for setting in dict.fromkeys(setting for variant in variants.values() for setting in variant.reads):
            names = [name for name, variant in variants.items() if setting in variant.reads]
            yield setting, _one_of(cell, names)


def _one_of(cell: str, names: list[str]) -> _Reader:
    return _Reader(f"{cell}: {' or '.join(names)}", lambda algorithm: getattr(algorithm, cell) in names)


READERS: dict[str, _Reader] = {**_SHARED, **dict(_of_variants())}


def check_read(algorithm: Algorithm, row: Algorithm) -> None:
    """Check that the chosen variants read every setting that the user gave in addition to a row's name.

    Args:
        algorithm: the row with the user's settings.
        row: the row without the user's settings.

    Raises:
        ValueError: a setting differs from the row's, but nothing reads it. null is accepted, because it has no effect.
    """
    for setting, reader in READERS.items():
        value = getattr(algorithm, setting)
        if value not in (None, getattr(row, setting)) and not reader.holds(algorithm):
            raise ValueError(
                f"{setting} is read only with {reader.condition}, so here {setting}: {value} would change nothing: "
                "leave it out"
            )
