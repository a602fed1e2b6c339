"""The parameters of the tests in this folder: random checkpoints of the shapes in `variants/`."""

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM
from tests.models import variants

FAMILIES: dict[str, ModuleType] = {
    info.name: importlib.import_module(f"{variants.__name__}.{info.name}")
    for info in pkgutil.iter_modules(variants.__path__)
}
"""The variants of each architecture, by the name of its file: `CONFIG` and `MODEL` (classes of transformers), `BASE`
(tiny arguments), `VARIANTS` (changes of them by name), `TOLERANCE`."""

LANGUAGE_MODELS = {
    module.MODEL: name
    for name, module in FAMILIES.items()
    if module.MODEL in architectures() and issubclass(architectures()[module.MODEL].model, CausalLM)
}
"""The name of the file of each language model, by its name on the Hub."""


CASES = [(family, variant) for family in LANGUAGE_MODELS.values() for variant in FAMILIES[family].VARIANTS]
"""Every variant of every language model."""


def case_name(case: tuple[str, str]) -> str:
    """Return the name of a case, for the name of a test."""
    return f"{case[0]}: {case[1]}"


def write_reference(
    folder: Path,
    case: tuple[str, str],
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    kind: str | None = None,
    **changes: Any,
) -> Path:
    """Write a random checkpoint with a class of transformers: the family's `MODEL`, or `kind`, with `changes`."""
    import transformers

    family, variant = FAMILIES[case[0]], FAMILIES[case[0]].VARIANTS[case[1]]
    config = getattr(transformers, family.CONFIG)(**{**family.BASE, **variant, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, kind or family.MODEL)(config)
    with torch.no_grad():  # so that a norm, bias or buffer that is left out shows
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        persistent = set(model.state_dict())
        buffers = [buffer for name, buffer in model.named_buffers() if name in persistent]
        for tensor in vectors + buffers:
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    for parameter in model.parameters():  # buffers are float32 in published files of any dtype
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tiny_folder(folder: Path, architecture: str) -> Path:
    """Write the config.json of an architecture's `tiny()`, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(architectures()[architecture].config.tiny().to_hf()))
    return folder
