"""Models from and to the Hub's folder layout: config.json, safetensors, tokenizer files.

The architecture file is found by name: `architectures: ["Qwen3MoeForCausalLM"]` in config.json means
`models/qwen3_moe.py`, whose `HF` says how parameters are called on disk. Reading is strict both ways: a key that maps
nowhere, a missing one and a wrong shape are errors.
"""

import importlib
import importlib.util
import json
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmquest_rl import models
from llmquest_rl.models.base import CausalLM, HFMap
from llmquest_rl.models.weight_files import Entry, read_json, read_tensors, weight_entries, write_tensors

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
"""Files besides config.json and weights that make a folder usable: they are copied as they are."""

MAX_SHARD_BYTES = 2 * 2**30
"""Largest weight file written: what has to fit into memory at once while saving."""


def load_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLM:
    """The model in checkpoint folder `path`, its weights cast to `dtype`. Reads one tensor at a time.

    Raises:
        ValueError: the architecture is unknown; a file is missing or damaged; keys or shapes do not fit.
    """
    folder = Path(path)
    model, hf = _skeleton(folder)
    entries = weight_entries(folder)
    ours_of = match_keys(model, hf, entries, folder)
    _allocate(model, dtype, device)
    parameters = dict(model.named_parameters())
    second_names = disk_names(model, tied=True)
    spare: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, tensor in read_tensors(entries):
            if key in ours_of:
                parameters[ours_of[key]].copy_(tensor)
            elif key in second_names:
                spare[key] = tensor
    _check_tied(model, spare, folder)
    return model


def new_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> CausalLM:
    """A model of the shape in `path`/config.json with random weights: the same for a seed on every device.

    Raises:
        ValueError: config.json is missing or damaged, or names an unknown architecture.
    """
    model, _ = _skeleton(Path(path))
    _allocate(model, dtype, device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def check_weights(path: Path | str) -> None:
    """Check that `load_model` will find every weight of `path`, in its right shape, without reading one.

    Raises:
        ValueError: as `load_model`.
    """
    model, hf = _skeleton(Path(path))
    match_keys(model, hf, weight_entries(Path(path)), Path(path))


def save_model(
    config_source: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    path: Path | str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint folder that transformers, vLLM and `load_model` read.

    Args:
        config_source: Folder whose config.json and tokenizer files the new one gets.
        tensors: Pairs (name on disk, tensor), as from `disk_tensors`. Their dtype is kept, and noted in config.json.
        path: Folder to write into; made if needed. Whoever needs it atomic writes elsewhere and renames.
        max_shard_bytes: Largest weight file.
    """
    source, target = Path(config_source), Path(path)
    target.mkdir(parents=True, exist_ok=True)
    dtypes: list[torch.dtype] = []

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            dtypes.append(tensor.dtype)
            yield name, tensor

    write_tensors(noted(), target, max_shard_bytes)
    _write_config(source, target, dtypes)
    if source.resolve() == target.resolve():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, target / file.name)


def _write_config(source: Path, target: Path, dtypes: list[torch.dtype]) -> None:
    config = read_json(source / "config.json")
    dtype = str(max(dtypes, key=dtypes.count)).removeprefix("torch.") if dtypes else None
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    if dtype and config.get(name) != dtype:
        config[name] = dtype
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    elif source.resolve() != target.resolve():
        shutil.copyfile(source / "config.json", target / "config.json")


def disk_names(model: CausalLM, tied: bool = False) -> dict[str, str]:
    """Name on disk to our parameter name, in model order. With `tied`, also the second names of shared parameters."""
    rename = _renamer(hf_map(model))
    return {rename(name): name for name, _ in model.named_parameters(remove_duplicate=not tied)}


def disk_tensors(model: CausalLM, named: Iterable[tuple[str, Tensor]] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Pairs (name on disk, tensor), a shared parameter once: what `save_model` and a rollout engine take.

    Args:
        model: Whose layout it is.
        named: Pairs (our parameter name, tensor) to take instead of the model's own: gathered shards, master weights.
    """
    disk_of = {ours: disk for disk, ours in disk_names(model).items()}
    for name, tensor in model.named_parameters() if named is None else named:
        if name in disk_of:
            yield disk_of[name], tensor.detach()


def disk_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name on disk to shape of every weight of a model of `path`/config.json, a shared one once. No weight is read.

    Raises:
        ValueError: config.json is missing or damaged, or names an unknown architecture.
    """
    model, _ = _skeleton(Path(path))
    return {name: tuple(tensor.shape) for name, tensor in disk_tensors(model)}


def hf_map(model: CausalLM) -> HFMap:
    """The map at the end of the architecture file that `model` comes from."""
    found: HFMap = sys.modules[type(model).__module__].HF
    return found


def architectures() -> dict[str, HFMap]:
    """Every architecture file in this folder: name on the Hub to its map."""
    names = [f"{models.__name__}.{info.name}" for info in pkgutil.iter_modules(models.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return {module.HF.architecture: module.HF for module in modules if hasattr(module, "HF")}


def find_architecture(config: dict[str, Any], source: Path) -> HFMap:
    """The map for a config.json's content.

    Raises:
        ValueError: config.json names no architecture, or one that has no file here.
    """
    name = (config.get("architectures") or [None])[0]
    if name is None:
        raise ValueError(f'{source} names no architecture: add "architectures": one of {", ".join(architectures())}')
    stem = re.sub(r"(ForCausalLM|LMHeadModel)$", "", name)
    module_name = f"{models.__name__}.{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', stem).lower()}"
    if importlib.util.find_spec(module_name) is not None:
        hf = getattr(importlib.import_module(module_name), "HF", None)
        if hf is not None and hf.architecture == name:
            return hf  # type: ignore[no-any-return]
    supported = ", ".join(architectures())
    raise ValueError(f"{source} names architecture {name!r}, which is not supported: expected one of {supported}")


def _skeleton(folder: Path) -> tuple[CausalLM, HFMap]:
    """The model without memory for its weights."""
    config = read_json(folder / "config.json")
    hf = find_architecture(config, folder / "config.json")
    try:
        shape = hf.config.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    with torch.device("meta"):
        return hf.model(shape), hf


def _allocate(model: CausalLM, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a skeleton memory; what was one parameter in two places stays one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, made[parameter])


def match_keys(model: CausalLM, hf: HFMap, entries: dict[str, Entry], folder: Path) -> dict[str, str]:
    """Key on disk to our parameter name, for a checkpoint that fits the model exactly.

    Raises:
        ValueError: a key maps nowhere, one is missing, or a shape differs; names them.
    """
    wanted = disk_names(model)
    allowed = disk_names(model, tied=True)
    known = (*allowed, *hf.ignored)
    unmapped = [key for key in entries if not any(fnmatch(key, pattern) for pattern in known)]
    missing = [key for key in wanted if key not in entries]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wrong = [
        f"{key} is {list(entries[key].shape)}, config.json says {list(parameters[name].shape)}"
        for key, name in allowed.items()
        if key in entries and entries[key].shape != tuple(parameters[name].shape)
    ]
    problems = [f"unknown {_some(unmapped)}"] * bool(unmapped) + [f"missing {_some(missing)}"] * bool(missing)
    problems += [f"wrong shape: {_some(wrong)}"] * bool(wrong)
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit {hf.architecture}: {'; '.join(problems)}. "
            "Check that config.json and the weights come from the same checkpoint and that no file is missing"
        )
    return wanted


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _check_tied(model: CausalLM, spare: dict[str, Tensor], folder: Path) -> None:
    """A tied output layer may be on disk a second time, if it is the same."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = disk_names(model, tied=True)
    for key, tensor in spare.items():
        parameter = parameters[names[key]]
        if not torch.equal(tensor.to(parameter.dtype), parameter.cpu()):
            raise ValueError(
                f"{folder}: config.json ties {key} to another weight, but the file holds a different one: "
                'set "tie_word_embeddings": false, or remove the key'
            )


def _renamer(hf: HFMap) -> Callable[[str], str]:
    """Turns a parameter's path into its name on disk."""

    def rename(name: str) -> str:
        module, _, ending = name.rpartition(".")
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", f".{module}.")
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", f".{module}.")[1:-1]
        assert pattern in hf.names, f"{name} is not in the names of {hf.architecture}"
        return hf.names[pattern].replace("{i}", numbers[0] if numbers else "") + f".{ending}"

    return rename
