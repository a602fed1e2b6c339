"""Finds settings that the chosen variants do not read: they would change nothing, silently."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from llmquest_rl.algorithms.variant import Cells
from llmquest_rl.options import Options


class Reader(NamedTuple):
    """The condition under which a setting is read."""

    condition: str
    holds: Callable[[Any], bool]
    """Whether a row with the user's settings fulfils it."""


def readers_of_variants(cells: Cells) -> Iterator[tuple[str, Reader]]:
    """Every setting that belongs to variants of a cell, with the variants that read it."""
    for cell, variants in cells.items():
        for setting in dict.fromkeys(setting for variant in variants.values() for setting in variant.reads):
            names = [name for name, variant in variants.items() if setting in variant.reads]
            if len(names) < len(variants):
                yield setting, _one_of(cell, names)


def _one_of(cell: str, names: list[str]) -> Reader:
    return Reader(f"{cell}: {' or '.join(names)}", lambda row: getattr(row, cell) in names)


def check_read(given: Options, row: Options, readers: Mapping[str, Reader]) -> None:
    """Check that the chosen variants read every setting that the user gave in addition to a row's name.

    Args:
        given: the row with the user's settings.
        row: the row without the user's settings.
        readers: the condition under which each setting is read; a setting without one always is.

    Raises:
        ValueError: a setting differs from the row's, but nothing reads it. null is accepted, because it has no effect.
    """
    for setting, reader in readers.items():
        value = getattr(given, setting)
        if value not in (None, getattr(row, setting)) and not reader.holds(given):
            raise ValueError(
                f"{setting} is read only with {reader.condition}, so here {setting}: {value} would change nothing: "
                "leave it out"
            )
