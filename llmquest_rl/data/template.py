"""Templates: texts with the names of columns in braces, e.g. `{prompt}\\n{input}`."""

import re
from collections.abc import Mapping
from typing import Any


def placeholders(template: str) -> list[str]:
    """The names in braces, in order."""
    return re.findall(r"\{(\w+)\}", template)


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Replace every name in the template by its value.

    Raises:
        KeyError: a name has no value.
    """
    return re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), template)
