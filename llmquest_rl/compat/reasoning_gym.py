"""Imports reasoning-gym, even if its dependency `pycosat` is missing.

reasoning-gym imports `pycosat` (a C extension without wheels) for one of its puzzles, `zebra_puzzles`, and cannot be
imported without it. A substitute takes its place here: its use is an error that says what to install.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


def _itersolve(*_: object) -> Iterator[list[int]]:
    raise ImportError("reasoning-gym's `zebra_puzzles` needs `pycosat`: install a C compiler and `pip install pycosat`")


def import_reasoning_gym() -> ModuleType:
    """The package `reasoning_gym`.

    Raises:
        ImportError: it is not installed.
    """
    loaded = sys.modules.get("reasoning_gym")
    if loaded is not None:
        return loaded
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("reasoning-gym is not installed: run `make setup`, or `pip install reasoning-gym`")
    if importlib.util.find_spec("pycosat") is not None:
        return importlib.import_module("reasoning_gym")
    stand_in = ModuleType("pycosat")
    stand_in.itersolve = _itersolve  # type: ignore[attr-defined]
    sys.modules["pycosat"] = stand_in
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        # Other importers must find pycosat missing; reasoning-gym keeps its own reference.
        del sys.modules["pycosat"]
