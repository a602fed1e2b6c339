"""Every architecture of this folder, found by walking over its files: nothing is registered.

`architectures: ["Qwen3MoeForCausalLM"]` in config.json means the file whose `HF` has that name.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from llmquest_rl import models
from llmquest_rl.models.weight_map import HFMap, module_maps


def model_files() -> list[ModuleType]:
    """The modules of this folder, in alphabetical order; imports those that are not imported yet."""
    files = [info.name for info in pkgutil.iter_modules(models.__path__) if not info.ispkg]
    return [importlib.import_module(f"{models.__name__}.{name}") for name in files]


@cache
def architectures() -> dict[str, HFMap]:
    """Every architecture by its name on the Hub."""
    return {name: hf for module in model_files() for name, hf in module_maps(module).items()}


def find_architecture(config: Mapping[str, Any], source: Path) -> HFMap:
    """Return the map of the architecture that a config.json names.

    Args:
        config: The content.
        source: The file or the field that it comes from, for messages.

    Raises:
        ValueError: the content names no architecture, or one that has no file here.
    """
    name = (config.get("architectures") or [None])[0]
    supported = ", ".join(architectures())
    if name is None:
        raise ValueError(f'{source} names no architecture: add "architectures": one of {supported}')
    advice = [hf.refused[name] for hf in architectures().values() if name in hf.refused]
    if advice:
        raise ValueError(f"{source} names architecture {name!r}: {advice[0]}")
    if name not in architectures():
        raise ValueError(f"{source} names architecture {name!r}, which is not supported: expected one of {supported}")
    return architectures()[name]
