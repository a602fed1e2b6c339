"""What recipes compute on trained models, one file each with the functions `measure` and `labels`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llmquest_rl.loader import ComponentKind
from trainer.config.schema import Config
from trainer.papers.series import Rows

MEASURES = ComponentKind("a measure", __name__, ("measure", "labels"), can_be_function=False)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a measure is given."""

    seed: int
    start: Path
    """The start model."""
    configs: dict[str, Config]
    """By arm, of this seed."""
    runs: dict[str, Path]
    """Run folders by arm, of this seed."""


Measure = Callable[[Trained], dict[str, Rows]]
"""`measure` of a file in `trainer/papers/measures/`: rows by label."""
Labels = Callable[[Iterable[str]], set[str]]
"""`labels` of the same file: those labels, of a recipe with these arms."""
