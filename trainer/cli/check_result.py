"""The result of one check of `train --dry-run` or `doctor`: one line of their output."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check with its outcome."""

    name: str
    """Subject of the check, e.g. `model`."""
    text: str
    """The outcome in words; for a failed check also the remedy."""
    passed: bool = True
