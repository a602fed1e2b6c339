"""Weight sync from the learners to the engines, verified by checksums.

The learner takes a snapshot of its tensors with a checksum for each. Every worker compares the received tensors with
the checksums, loads them, and returns a `SyncReport`. A sync that is lost, truncated, corrupted or meant for another
model raises an error at once. Otherwise the run would silently sample from old weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 4096
"""64-bit words per row of the matrix that a checksum is computed over."""


class WeightSnapshot(NamedTuple):
    """All weights of a model in host memory, under their names in the Hub layout on disk."""

    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SyncReport:
    """A worker's confirmation of the weights that it has loaded."""

    version: int
    num_tensors: int
    num_bytes: int
    seconds: float
    """Time for verification and loading, in seconds, without the transfer."""
    checksum: str
    """Checksum over all tensors; it is equal on every worker that has the same weights."""


class WeightsDamagedError(RuntimeError):
    """The received tensors differ from the sent tensors."""


def checksum(tensor: Tensor) -> str:
    """Compute a checksum of a tensor's bits, dtype and shape, which is the same on every device.

    The bits are arranged as a matrix of 64-bit words. The sums of its columns and of its rows are each multiplied by an
    odd pseudo-random number and added up modulo 2^64. So a changed value changes the checksum, and so do swapped
    values. The checksum is as fast as memory allows. It detects accidents, not attacks.
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


def take_snapshot(weights: Iterable[tuple[str, Tensor]]) -> WeightSnapshot:
    """Copy (name, tensor) pairs to host memory and compute their checksums, for `RolloutWorker.load_weights`."""
    tensors = {name: _alone(tensor.cpu()) for name, tensor in weights}
    return WeightSnapshot(tensors, {name: checksum(tensor) for name, tensor in tensors.items()})


def _alone(tensor: Tensor) -> Tensor:
    """Copy a view into its own memory, because sending the view of one expert would send the whole stack of experts."""
    shared = not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor


def verify(snapshot: WeightSnapshot) -> str:
    """Check that the tensors match their checksums, and return the checksum over all of them.

    Raises:
        WeightsDamagedError: A tensor is missing, has no checksum, or differs from it. The message names it.
    """
    tensors, checksums = snapshot
    absent = sorted(set(checksums) ^ set(tensors))
    if absent:
        raise WeightsDamagedError(f"tensors and checksums do not have the same names: {_some(absent)}")
    wrong = [name for name, tensor in tensors.items() if checksum(tensor) != checksums[name]]
    if wrong:
        raise WeightsDamagedError(
            f"{len(wrong)} of {len(tensors)} tensors were damaged in transfer (checksum mismatch): {_some(wrong)}"
        )
    return blake2b(repr(sorted(checksums.items())).encode(), digest_size=8).hexdigest()


def check_newer(version: int, current: int) -> None:
    """Check that weights are newer than the current weights.

    Raises:
        ValueError: their version is not larger than the current one.
    """
    if version <= current:
        raise ValueError(f"weights of version {version} are not newer than version {current}, which is in use")


def check_fit(given: Iterable[tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the names and shapes of tensors are exactly those of a model's weights.

    Args:
        given: Pairs (name, tensor).
        shapes: Shape of each weight of the model, by name.

    Raises:
        ValueError: A tensor is missing, unknown, given twice or of the wrong shape. The message names it.
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
        "wrong shape": wrong,
    }
    found = [f"{kind}: {_some(items)}" for kind, items in problems.items() if items]
    if found:
        raise ValueError(
            f"the tensors do not match the weights of this model, and no weight was changed. {'; '.join(found)}"
        )


def _words(flat: Tensor) -> Tensor:
    """View bytes [8 n] as int64 [n]; copy them first if they are not aligned to 8 bytes."""
    if flat.data_ptr() % 8 or flat.storage_offset() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def _weighted(sums: Tensor, length: int) -> int:
    return int((sums * _multipliers(length)[: sums.numel()].to(sums.device)).sum()) if sums.numel() else 0


@lru_cache(maxsize=64)
def _multipliers(length: int) -> Tensor:
    """Odd pseudo-random 64-bit numbers [length], the same in every process."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (length,), generator=torch.Generator().manual_seed(0))
    return drawn | 1


def _some(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
