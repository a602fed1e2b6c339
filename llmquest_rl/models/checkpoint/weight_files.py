"""Find, check, read and write the safetensors files of a checkpoint folder, one tensor at a time.

This file knows nothing of models.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """The place and form of one tensor, from the header of its file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors: `F32`, `BF16`, ..."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint folder.

    Raises:
        ValueError: the file is missing, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: is {path.parent} a checkpoint folder in the Hub's layout?") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): the file is damaged, download or save it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def has_weights(folder: Path) -> bool:
    """Return whether a folder has weight files, damaged or not."""
    return (folder / INDEX).exists() or (folder / SINGLE).exists()


def weight_entries(folder: Path) -> dict[str, Entry]:
    """Return every tensor of a checkpoint by its key. Reads the headers of the files only.

    Raises:
        ValueError: there are no weights, a file is missing or damaged, or the index and the files disagree.
    """
    files = _weight_files(folder)
    entries = {key: entry for file in files for key, entry in read_header(file).items()}
    if (folder / INDEX).exists():
        promised: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        for key, name in promised.items():
            if key not in entries or entries[key].file.name != name:
                problem = f"{folder / INDEX} places {key!r} in {name}, which does not contain it"
                raise ValueError(f"{problem}: download or save the checkpoint again")
    return entries


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map: the file is damaged, download or save it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            lost = ", ".join(missing)
            raise ValueError(f"{folder} lacks {lost}, which {INDEX} names: download or save the checkpoint again")
        return files
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
    hint = f"; it has {', '.join(others)}: convert with transformers' save_pretrained" if others else ""
    raise ValueError(f"{folder} has no weights: expected {SINGLE} or {INDEX}{hint}")


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors in the header of a safetensors file by their keys.

    Raises:
        ValueError: the header is damaged, or the size of the file contradicts it (an incomplete download).
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_size <= size - 8:
                raise ValueError("its header does not fit into it")
            header = json.loads(stream.read(header_size))
        header.pop("__metadata__", None)
        entries = {key: Entry(file, tuple(value["shape"]), value["dtype"]) for key, value in header.items()}
        end = max((value["data_offsets"][1] for value in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{file} is damaged ({error}): download or save it again") from error
    promised = 8 + header_size + end
    if promised != size:
        state = "truncated" if size < promised else "damaged"
        raise ValueError(
            f"{file} is {state}: {size} bytes, but its header promises {promised}; download or save it again"
        )
    return entries


def read_tensors(entries: Mapping[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield each key with its tensor, file by file, on the CPU and in the dtype on disk.

    Raises:
        ValueError: a file is damaged.
    """
    for file in sorted({entry.file for entry in entries.values()}):
        try:
            with safe_open(file, framework="pt", device="cpu") as stream:
                for key in stream.keys():  # noqa: SIM118 (not a dict)
                    yield key, stream.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}): download or save it again") from error


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int) -> None:
    """Write safetensors into `folder`: one file, or shards with an index.

    One shard is in memory at a time. The files get their final names after all are written, the index last.

    Args:
        tensors: Pairs (key, tensor).
        folder: Folder to write into.
        max_shard_bytes: Size of the largest file.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    memory: set[int] = set()
    total = size = 0
    for key, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if shard and size + bytes_ > max_shard_bytes:
            shards.append(_write_part(shard, folder, len(shards)))
            shard, memory, size = {}, set(), 0
        written = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for the same memory, so a repeated weight is copied.
        shard[key] = written.clone() if written.data_ptr() in memory else written
        memory.add(written.data_ptr())
        size += bytes_
        total += bytes_
    shards.append(_write_part(shard, folder, len(shards)))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for i, name in enumerate(names):
        _part(folder, i).replace(folder / name)
    if len(shards) > 1:
        weight_map = {key: name for keys, name in zip(shards, names, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.incomplete"


def _write_part(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    save_file(shard, _part(folder, number), metadata={"format": "pt"})
    return list(shard)
