"""Measures: numbers that recipes compute from trained models. Each file has the functions `measure` and `labels`.

A measure may import the library, `trainer.config` and `trainer.inference`; only `trainer.papers` imports it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmquest_rl.loader import ComponentKind
from trainer.config.schema import Config
from trainer.papers.series import Rows

MEASURES = ComponentKind("a measure", __name__, ("measure", "labels"), can_be_function=False)


@dataclass(frozen=True, slots=True)
class Trained:
    """Inputs of a measure: the start model and the trained runs of one seed."""

    seed: int
    start: Path
    """Folder of the start model."""
    configs: dict[str, Config]
    """Run configurations by arm."""
    runs: dict[str, Path]
    """Run folders by arm."""


Measure = Callable[[Trained], dict[str, Rows]]
"""Type of the function `measure`, which returns rows by label."""
Labels = Callable[[Iterable[str]], set[str]]
"""Type of the function `labels`, which returns those labels for a recipe with the given arms."""
