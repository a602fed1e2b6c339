"""Load and save models in the Hub's folder layout: config.json, safetensors, tokenizer files.

Reading is strict: an unknown key, a missing key and a wrong shape are errors.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from llmquest_rl.models.architectures import find_architecture
from llmquest_rl.models.base import CausalLM, Model
from llmquest_rl.models.checkpoint.skeleton import without_memory
from llmquest_rl.models.checkpoint.weight_files import (
    Entry,
    has_weights,
    read_json,
    read_tensors,
    weight_entries,
    write_tensors,
)
from llmquest_rl.models.config.labels import POOLING
from llmquest_rl.models.weight_map import (
    HFMap,
    Piece,
    disk_pieces,
    disk_tensors,
    fused_pieces,
    named_weights,
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
"""Shell patterns of the other files that a checkpoint folder needs: they are copied unchanged."""

MAX_SHARD_BYTES = 2 * 2**30
"""Size of the largest weight file that is written. Saving holds one file in memory at a time."""


def load_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> CausalLM:
    """Load the language model in checkpoint folder `path`, one tensor at a time, and cast its weights to `dtype`.

    Raises:
        ValueError: the architecture is unknown or not a language model, a file is missing or damaged, or keys or
            shapes do not match.
    """
    return _language_model(load_any_model(path, dtype, device), path)


def load_any_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Model:
    """Load a model of any kind; otherwise the same as `load_model`."""
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
    _check_duplicates(model, spare, folder)
    return model


def new_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> CausalLM:
    """Create a language model of the shape in `path`/config.json with random weights.

    A seed gives the same weights on every device.

    Raises:
        ValueError: config.json is missing or damaged, or the architecture is unknown or not a language model.
    """
    return _language_model(new_any_model(path, dtype, device, seed), path)


def new_any_model(path: Path | str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Model:
    """Create a model of any kind; otherwise the same as `new_model`."""
    model = _skeleton(Path(path))[0]
    allocate(model, dtype, device)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def check_weights(path: Path | str) -> None:
    """Check that `path` holds every weight in the right shape. Reads the headers of the weight files only.

    Raises:
        ValueError: see `load_any_model`.
    """
    entries = weight_entries(Path(path))
    model, hf = _skeleton(Path(path), entries)
    match_keys(model, hf, entries, Path(path))


def _language_model(model: Model, path: Path | str) -> CausalLM:
    if not isinstance(model, CausalLM):
        raise ValueError(f"{path} holds a {type(model).__name__}, which is not a language model")
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
        config_source: Folder whose config.json and tokenizer files are copied.
        tensors: Pairs (name on disk, tensor), for example from `disk_tensors`. Their dtype is kept, and written to
            config.json.
        path: Folder to write into; it is created if needed. Writing is not atomic: if that matters, write to another
            folder and rename it.
        max_shard_bytes: Size of the largest weight file.
        config_fields: Fields of config.json that replace those of the source; see `Model.config_fields`.
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
    if wanted.get(POOLING) == "eos" and _is_padding(wanted.get("eos_token_id"), wanted.get("pad_token_id")):
        # transformers skips padding at the end, and would read the score at the token before the end-of-sequence token.
        wanted["pad_token_id"] = None
    if wanted != config:
        (target / "config.json").write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    elif source.resolve() != target.resolve():
        shutil.copyfile(source / "config.json", target / "config.json")


def _is_padding(token: int | list[int] | None, padding: int | None) -> bool:
    return padding is not None and padding in (token if isinstance(token, list) else [token])


def disk_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the model in `path` by its name on disk, a shared weight once.

    Reads config.json and the headers of the weight files only.

    Raises:
        ValueError: config.json is missing or damaged, or the architecture is unknown.
    """
    folder = Path(path)
    model, _ = _skeleton(folder, weight_entries(folder) if has_weights(folder) else None)
    return {name: tuple(tensor.shape) for name, tensor in disk_tensors(model)}


def read_shape(folder: Path) -> tuple[HFMap, Any]:
    """Return the map and the configuration of the model in `folder`. Reads config.json only.

    Raises:
        ValueError: config.json is missing or damaged, the architecture is unknown, or the shape is impossible.
    """
    config = read_json(folder / "config.json")
    hf = find_architecture(config, folder / "config.json")
    try:
        return hf, hf.config.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _skeleton(folder: Path, keys: Collection[str] | None = None) -> tuple[Model, HFMap]:
    """Return the model without memory for its weights; `keys` are those on disk, if there are any."""
    hf, shape = read_shape(folder)
    with without_memory():
        return hf.model(shape if keys is None else hf.fit(shape, keys)), hf


def allocate(model: Model, dtype: torch.dtype, device: torch.device | str) -> None:
    """Allocate the weights of a model on the meta device. Shared parameters stay shared, frozen ones stay frozen.

    The values of the weights are undefined.
    """
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
    """Return the part of our weights that each key on disk fills, after checking that all keys and shapes match.

    Raises:
        ValueError: a key is unknown or missing, or a shape differs; the message names them.
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
    problems = [f"unknown {_first_few(unmapped)}"] * bool(unmapped) + [f"missing {_first_few(missing)}"] * bool(missing)
    problems += [f"wrong shape: {_first_few(wrong)}"] * bool(wrong)
    if problems:
        raise ValueError(
            f"the weights in {folder} do not match {hf.architecture}: {'; '.join(problems)}. "
            "Check that config.json and the weights come from the same checkpoint and that no file is missing"
        )
    return wanted


def _weights_by_any_name(model: Model) -> dict[str, Tensor]:
    """Return every parameter and buffer, a shared one under each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _check_duplicates(model: Model, spare: dict[str, Tensor], folder: Path) -> None:
    """Check tensors that are on disk a second time, such as a tied output layer: both must be equal."""
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
