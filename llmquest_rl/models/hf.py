"""Models from and to the Hub's folder layout: config.json, safetensors, tokenizer files.

`architectures: ["Qwen3MoeForCausalLM"]` in config.json means the file of this folder whose `HF` has that name and says
how weights are called on disk. Reading is strict both ways: a key that maps nowhere, a missing one and a wrong shape
are errors.
"""

import importlib
import json
import pkgutil
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmquest_rl import models
from llmquest_rl.models.base import CausalLM, Model
from llmquest_rl.models.names import HFMap, Piece, disk_pieces, disk_tensors, fused_pieces, module_maps, named_weights
from llmquest_rl.models.skeleton import without_memory
from llmquest_rl.models.weight_files import (
    Entry,
    has_weights,
    read_json,
    read_tensors,
    weight_entries,
    write_tensors,
)

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "preprocessor_config.json",
)
"""Files besides config.json and weights that make a folder usable: they are copied as they are."""

MAX_SHARD_BYTES = 2 * 2**30
"""Largest weight file written: what has to fit into memory at once while saving."""


def load_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLM:
    """The language model in checkpoint folder `path`, its weights cast to `dtype`. Reads one tensor at a time.

    Raises:
        ValueError: the architecture is unknown or no language model; a file is missing or damaged; keys or shapes do
            not fit.
    """
    return _language_model(load_any_model(path, dtype, device), path)


def load_any_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Model:
    """As `load_model`, of any kind of model."""
    folder = Path(path)
    entries = weight_entries(folder)
    model, hf = _skeleton(folder, entries)
    pieces = match_keys(model, hf, entries, folder)
    allocate(model, dtype, device)
    weights = dict(named_weights(model))
    spare: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, tensor in read_tensors(entries):
            if key in pieces:
                pieces[key].view(weights[pieces[key].ours]).copy_(tensor)
            else:
                spare[key] = tensor
    _check_spare(model, spare, folder)
    return model


def new_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> CausalLM:
    """A language model of the shape in `path`/config.json with random weights: the same for a seed on every device.

    Raises:
        ValueError: config.json is missing or damaged, or names an unknown architecture.
    """
    return _language_model(new_any_model(path, dtype, device, seed), path)


def new_any_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Model:
    """As `new_model`, of any kind of model."""
    model = _skeleton(Path(path))[0]
    allocate(model, dtype, device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def check_weights(path: Path | str) -> None:
    """Check that `load_model` will find every weight of `path`, in its right shape, without reading one.

    Raises:
        ValueError: as `load_model`.
    """
    entries = weight_entries(Path(path))
    model, hf = _skeleton(Path(path), entries)
    match_keys(model, hf, entries, Path(path))


def _language_model(model: Model, path: Path | str) -> CausalLM:
    if not isinstance(model, CausalLM):
        raise ValueError(f"{path} holds a {type(model).__name__}, which is no language model")
    return model


def save_model(
    config_source: Path | str,
    tensors: Iterable[tuple[str, Tensor]],
    path: Path | str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config_fields: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a checkpoint folder that transformers, vLLM and `load_model` read.

    Args:
        config_source: Folder whose config.json and tokenizer files the new one gets.
        tensors: Pairs (name on disk, tensor), as from `disk_tensors`. Their dtype is kept, and noted in config.json.
        path: Folder to write into; made if needed. Whoever needs it atomic writes elsewhere and renames.
        max_shard_bytes: Largest weight file.
        config_fields: What config.json says otherwise than its source; see `Model.config_fields`.
    """
    source, target = Path(config_source), Path(path)
    target.mkdir(parents=True, exist_ok=True)
    dtypes: list[torch.dtype] = []

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            dtypes.append(tensor.dtype)
            yield name, tensor

    write_tensors(noted(), target, max_shard_bytes)
    _write_config(source, target, dtypes, config_fields)
    if source.resolve() == target.resolve():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, target / file.name)


def _write_config(source: Path, target: Path, dtypes: list[torch.dtype], fields: Mapping[str, Any]) -> None:
    config = read_json(source / "config.json")
    wanted = {**config, **fields}
    if dtypes:
        name = "torch_dtype" if "torch_dtype" in config else "dtype"
        wanted[name] = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    if wanted != config:
        (target / "config.json").write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    elif source.resolve() != target.resolve():
        shutil.copyfile(source / "config.json", target / "config.json")


def disk_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name on disk to shape of every weight of the model in `path`, a shared one once. No weight is read.

    Raises:
        ValueError: config.json is missing or damaged, or names an unknown architecture.
    """
    folder = Path(path)
    model, _ = _skeleton(folder, weight_entries(folder) if has_weights(folder) else None)
    return {name: tuple(tensor.shape) for name, tensor in disk_tensors(model)}


@cache
def architectures() -> dict[str, HFMap]:
    """Every architecture in this folder's files: name on the Hub to its map."""
    names = [f"{models.__name__}.{info.name}" for info in pkgutil.iter_modules(models.__path__)]
    modules = [importlib.import_module(name) for name in names]
    return {name: hf for module in modules for name, hf in module_maps(module).items()}


def find_architecture(config: dict[str, Any], source: Path) -> HFMap:
    """The map for a config.json's content.

    Raises:
        ValueError: config.json names no architecture, or one that has no file here.
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


def read_shape(folder: Path) -> tuple[HFMap, Any]:
    """The map and the config of the model in `folder`.

    Raises:
        ValueError: config.json is missing or damaged, names an unknown architecture or a shape that cannot be.
    """
    config = read_json(folder / "config.json")
    hf = find_architecture(config, folder / "config.json")
    try:
        return hf, hf.config.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _skeleton(folder: Path, keys: Collection[str] | None = None) -> tuple[Model, HFMap]:
    """The model without memory for its weights; with `keys` on disk, as those keys ask for."""
    hf, shape = read_shape(folder)
    with without_memory():
        return hf.model(shape if keys is None else hf.fit(shape, keys)), hf


def allocate(model: Model, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a skeleton memory; what was one parameter in two places stays one, and what was frozen stays frozen."""
    made: dict[Tensor, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype, device=device), parameter.requires_grad
                )
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            kept = torch.float32 if model.stays_float32(f"{path}.{name}") else dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=kept, device=device))


def match_keys(model: Model, hf: HFMap, entries: dict[str, Entry], folder: Path) -> dict[str, Piece]:
    """Key on disk to the part of our weights that it fills, for a checkpoint that fits the model exactly.

    Raises:
        ValueError: a key maps nowhere, one is missing, or a shape differs; names them.
    """
    plain = hf.prefix if not any(key.startswith(hf.prefix) for key in entries) else ""
    pieces, second_names, fused = (
        {key.removeprefix(plain): piece for key, piece in found.items()}
        for found in (disk_pieces(model), disk_pieces(model, tied=True), fused_pieces(model))
    )
    whole = {key: piece for key, piece in fused.items() if key in entries}
    stacked = {piece.ours for piece in whole.values()}
    copies = hf.copies(model.config)
    wanted = {key: piece for key, piece in pieces.items() if piece.ours not in stacked and key not in copies} | whole
    allowed = second_names | whole
    unmapped = [key for key in entries if key not in allowed and not any(fnmatch(key, name) for name in hf.ignored)]
    missing = [key for key in wanted if key not in entries]
    weights = _weights_by_any_name(model)
    shapes = {key: tuple(piece.view(weights[piece.ours]).shape) for key, piece in allowed.items() if key in entries}
    wrong = [
        f"{key} is {list(entries[key].shape)}, config.json says {list(shape)}"
        for key, shape in shapes.items()
        if entries[key].shape != shape
    ]
    problems = [f"unknown {_some(unmapped)}"] * bool(unmapped) + [f"missing {_some(missing)}"] * bool(missing)
    problems += [f"wrong shape: {_some(wrong)}"] * bool(wrong)
    if problems:
        raise ValueError(
            f"the weights in {folder} do not fit {hf.architecture}: {'; '.join(problems)}. "
            "Check that config.json and the weights come from the same checkpoint and that no file is missing"
        )
    return wanted


def _weights_by_any_name(model: Model) -> dict[str, Tensor]:
    """Every parameter and buffer, a shared one under each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _check_spare(model: Model, spare: dict[str, Tensor], folder: Path) -> None:
    """A weight may be on disk a second time (a tied output layer), if it is the same."""
    pieces = disk_pieces(model, tied=True)
    weights = _weights_by_any_name(model)
    for key, tensor in spare.items():
        if key not in pieces:  # ignored
            continue
        ours = pieces[key].view(weights[pieces[key].ours])
        if not torch.equal(tensor.to(ours.dtype), ours.cpu()):
            raise ValueError(
                f"{folder}: config.json ties {key} to another weight, but the file holds a different one: "
                'set "tie_word_embeddings": false, or remove the key'
            )
