"""Tensors that are computed once and kept in a file, together with a key of everything that they were made from.

A file is used only if those keys are equal: a cache of another model or of other data is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
"""Patterns of the files of a model folder that decide what the model computes and how it reads text."""


def content_key(*parts: str | bytes) -> str:
    """A key of these parts, in order: SHA-256, in hexadecimal digits."""
    digest = sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))  # without the length, ("ab", "c") would equal ("a", "bc")
        digest.update(data)
    return digest.hexdigest()


def folder_key(folder: Path) -> str:
    """A key of a model folder: of the contents of its configuration, tokenizer and weights."""
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    parts: list[str] = []
    for file in files:
        with file.open("rb") as stream:
            parts += [file.name, file_digest(stream, "sha256").hexdigest()]
    return content_key(*parts)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> None:
    """Write tensors atomically: after a crash the file is whole or is not there.

    Args:
        path: the file; its folder is made if it is missing.
        tensors: the tensors by name.
        made_from: key of each thing that they were made from, by a name that a reader understands: `model`, `data`.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(made_from))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path, made_from: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The tensors that `save_tensors` wrote; None if there is no such file.

    Raises:
        ValueError: the file is damaged, or was made from something else; the message says from what.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            other = [name for name in made_from if found.get(name) != made_from[name]]
            if other:
                raise ValueError(
                    f"{path} was made with another {' and another '.join(other)}: name another file, or remove this "
                    "one, and it is made anew"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (this object has no iterator)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and it is made anew") from error
