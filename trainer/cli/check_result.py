"""What `train --dry-run` and `doctor` print line by line."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    text: str
    """What was found; where it is not good, also what to do."""
    passed: bool = True
