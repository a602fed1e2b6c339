"""Weights on their way from the learners to the engines, and the proof that they arrived.

The learner publishes tensors with a checksum for each; every worker computes the checksums of what it received before
it loads, and answers with a `PushReport`. A push that was lost, truncated, mixed up or meant for another model is an
error there and then, not a run that quietly samples from old weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


Published: TypeAlias = "tuple[Mapping[str, Tensor], Mapping[str, str]]"
"""(tensors, checksums), both by the names of the Hub's layout on disk."""

COLUMNS = 4096
"""Words in a row of the matrix that a checksum is taken over."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What one worker loaded."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    """Checking and loading, without the transfer."""
    checksum: str
    """Of all tensors together: equal on every worker that holds the same weights."""


class WeightsDamagedError(RuntimeError):
    """What arrived is not what was sent."""


def checksum(tensor: Tensor) -> str:
    """Checksum of a tensor's bits, dtype and shape: the same on every device.

    The bits are laid out as a matrix of 64-bit words, and the sums of its columns and of its rows, each times an odd
    pseudo-random number, are added up modulo 2^64: a changed value changes both sums, and so do values that changed
    places. It is as fast as memory, and guards against accidents, not against attackers.
    """
    with torch.no_grad():
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        num_words = flat.numel() // 8
        words = _words(flat[: num_words * 8])
        num_rows = num_words // COLUMNS
        rows = words[: num_rows * COLUMNS].view(num_rows, COLUMNS)
        sums = [
            _weighted(rows.sum(0), COLUMNS),
            _weighted(rows.sum(1), num_rows),
            _weighted(words[num_rows * COLUMNS :], COLUMNS),
        ]
        tail = bytes(flat[num_words * 8 :].tolist())
    digest = blake2b(f"{tensor.dtype} {list(tensor.shape)} {sums} ".encode() + tail, digest_size=8)
    return digest.hexdigest()


def publish(tensors: Iterable[tuple[str, Tensor]]) -> Published:
    """Tensors by name with their checksums: what a learner hands to `RolloutWorker.load_weights`."""
    named = {name: _alone(tensor) for name, tensor in tensors}
    return named, {name: checksum(tensor) for name, tensor in named.items()}


def _alone(tensor: Tensor) -> Tensor:
    """A tensor in memory of its own: with a view (one expert of a stack) the whole stack would be sent each time."""
    shared = not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor


def verify(published: Published) -> str:
    """Check that tensors are those that the checksums were taken of; returns the checksum of all together.

    Raises:
        WeightsDamagedError: a tensor is missing, unannounced or different; names it.
    """
    tensors, checksums = published
    absent = sorted(set(checksums) ^ set(tensors))
    if absent:
        raise WeightsDamagedError(f"tensors and checksums do not have the same names: {_some(absent)}")
    wrong = [name for name, tensor in tensors.items() if checksum(tensor) != checksums[name]]
    if wrong:
        raise WeightsDamagedError(
            f"{len(wrong)} of {len(tensors)} tensors arrived with other content than was sent: {_some(wrong)}"
        )
    return blake2b(repr(sorted(checksums.items())).encode(), digest_size=8).hexdigest()


def check_newer(version: int, current: int) -> None:
    """Check that weights are newer than those in use.

    Raises:
        ValueError: they are not.
    """
    if version <= current:
        raise ValueError(f"weights of version {version} are not newer than version {current}, which is in use")


def check_fit(given: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that tensors are, by name and shape, exactly the weights of a model.

    Raises:
        ValueError: one is missing, unknown, given twice or of another shape; names them.
    """
    seen: dict[str, int] = {}
    wrong = []
    for name, tensor in given:
        seen[name] = seen.get(name, 0) + 1
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            wrong.append(f"{name} is {list(tensor.shape)} instead of {list(shapes[name])}")
    problems = {
        "missing": [name for name in shapes if name not in seen],
        "unknown": [name for name in seen if name not in shapes],
        "given twice": [name for name, count in seen.items() if count > 1],
        "of another shape": wrong,
    }
    found = [f"{kind}: {_some(items)}" for kind, items in problems.items() if items]
    if found:
        raise ValueError(f"these are not the weights of this model, nothing was changed. {'; '.join(found)}")


def _words(flat: Tensor) -> Tensor:
    """Bytes [8 n] as int64 [n]; copied only where they do not begin on a word's boundary."""
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _weighted(sums: Tensor, length: int) -> int:
    return int((sums * _multipliers(length)[: sums.numel()].to(sums.device)).sum()) if sums.numel() else 0


@lru_cache(maxsize=64)
def _multipliers(length: int) -> Tensor:
    """Odd 64-bit numbers [length], the same everywhere."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(0))
    return drawn | 1


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
