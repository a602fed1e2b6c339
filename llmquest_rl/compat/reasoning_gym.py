"""The one way to import reasoning-gym: it works where `pycosat` is missing.

reasoning-gym imports `pycosat` (a C extension without wheels) for one of its puzzles, `zebra_puzzles`, and fails as a
whole without it. Here the import gets a stand-in whose use is an error that says what to install.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


def _itersolve(*_: object) -> Iterator[list[int]]:
    raise ImportError("reasoning-gym's `zebra_puzzles` needs the SAT solver `pycosat`, which needs a C compiler")


def import_reasoning_gym() -> ModuleType:
    """The package `reasoning_gym`.

    Raises:
        ImportError: it is not installed.
    """
    loaded = sys.modules.get("reasoning_gym")
    if loaded is not None:
        return loaded
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ImportError("reasoning-gym is not installed: see the requirement files")
    if importlib.util.find_spec("pycosat") is not None:
        return importlib.import_module("reasoning_gym")
    stand_in = ModuleType("pycosat")
    stand_in.itersolve = _itersolve  # type: ignore[attr-defined]
    sys.modules["pycosat"] = stand_in
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        # Whoever else looks for pycosat must find it missing; reasoning-gym keeps its own reference.
        del sys.modules["pycosat"]
