"""torch, imported when a function first uses it.

A configuration is checked against the options of each algorithm, objective, task and engine, and their files compute
with torch. Importing torch takes seconds, so these files write `from llmquest_rl.deferred import torch` in place of
`import torch`, and a mistyped key is reported at once. Types are imported under `TYPE_CHECKING`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Deferred(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(self._import(), name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self._import(), name, value)

        def _import(self) -> ModuleType:
            """Import torch, and put it in the place of this object in every file that has it."""
            module = importlib.import_module(self.__name__)
            for file in list(sys.modules.values()):
                if file.__dict__.get("torch") is self:
                    file.__dict__["torch"] = module
            return module

    torch = _Deferred("torch")
