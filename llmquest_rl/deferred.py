"""torch, imported when a function first uses it.

A configuration is checked against the options of each algorithm, objective, task and engine, and their files compute
with torch. Importing torch takes seconds, so these files write `from llmquest_rl.deferred import torch` in place of
`import torch`, and a mistyped key is reported at once. Types are imported under `TYPE_CHECKING`.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Deferred(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self.__name__), name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(importlib.import_module(self.__name__), name, value)

    torch = _Deferred("torch")
