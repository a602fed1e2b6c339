"""Atomic checkpoints: a crash at any moment leaves the newest complete checkpoint loadable.

A checkpoint is written under a temporary name in the folder of the others. Its files are synced to disk and listed with
size and CRC-32 in `manifest.json`; then one rename makes it `step-000012`. CRC-32 detects truncation and bit rot at
several GB/s on two cores, which a cryptographic hash does not reach. It does not detect deliberate changes.
"""

import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_TEXTS = ("iostream error", "unexpected pos")
"""Messages of torch.save when the disk is full; they do not name the cause."""
DISK_FULL_TEXTS = (*map(os.strerror, DISK_FULL), *(f"os error {number}" for number in DISK_FULL), *TORCH_TEXTS)
_NAME = re.compile(r"step-(\d{6,})(\.replaced)?")
_CHUNK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint cannot be loaded; the message names the file and the defect."""


class DiskFullError(CheckpointError):
    """A checkpoint did not fit on the disk. It was removed, and older checkpoints are intact."""


@dataclass(frozen=True, slots=True)
class Best:
    """The value by which checkpoints compete to be the best."""

    metric: str
    value: float
    mode: Literal["max", "min"] = "max"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint whose files match their checksums."""

    path: Path
    step: int
    state: dict[str, Any]
    """The state that was given to `save`."""
    messages: list[str] = field(default_factory=list)
    """Warnings for the user, e.g. that a newer checkpoint is damaged and was skipped."""


def save(
    folder: Path,
    step: int,
    write: Callable[[Path], object],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    best: Best | None = None,
) -> Path:
    """Write a checkpoint, then remove those that need not be kept.

    Args:
        folder: folder with the checkpoints of one run.
        step: the last finished step.
        write: writes the files (weights, optimizer, ...) into the folder that it is given.
        state: further state, saved as JSON: no tuples, and all keys are strings.
        keep_last: number of newest checkpoints to keep, at least 1; the best is kept as well. Checkpoints of later
            steps are removed: they belong to a history that a resume has abandoned.
        best: the value by which this checkpoint competes to be the best; None = it does not compete.

    Raises:
        DiskFullError: the checkpoint did not fit on the disk.
        TypeError: `state` holds a value that JSON would change.
    """
    _check_state(state, "state")
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder.glob(".tmp-*"))
    temporary, final = folder / f".tmp-step-{step:06d}", folder / f"step-{step:06d}"
    try:
        temporary.mkdir()
        write(temporary)
        (temporary / STATE).write_text(json.dumps(state))
        _seal(temporary, step, best)
        _move_into_place(temporary, final)
    except BaseException as error:
        full = _is_disk_full(error, folder)
        # If a file cannot be removed now, e.g. because another process still writes to it, the next save removes it.
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            raise DiskFullError(_disk_full_message(folder, step)) from error
        raise
    _prune(folder, step, keep_last)
    return final


def check_disk_space(folder: Path, step: int) -> None:
    """Check before any process writes that the disk has room for a checkpoint as large as the newest one.

    Raises:
        DiskFullError: the disk has less room; nothing was written.
    """
    newest = next(iter(_newest_first(folder)), None)
    if newest is not None and shutil.disk_usage(folder).free < sum(f.stat().st_size for f in newest.rglob("*")):
        raise DiskFullError(_disk_full_message(folder, step))


def latest(folder: Path) -> Checkpoint:
    """The newest complete checkpoint. Damaged ones are skipped; `messages` names them.

    Raises:
        CheckpointError: the folder has no complete checkpoint.
    """
    messages: list[str] = []
    for path in _newest_first(folder):
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            messages.append(f"{error}; falling back to the previous checkpoint")
            continue
        return Checkpoint(checkpoint.path, checkpoint.step, checkpoint.state, messages)
    raise CheckpointError("\n".join([*messages, f"{folder}: there is no complete checkpoint"]))


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, after a comparison of every file with the manifest.

    Raises:
        CheckpointError: a file is missing or differs from the manifest.
    """
    manifest = _read_manifest(path)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(lambda item: _fault(path, *item), manifest["files"].items()) if fault]
    if faults:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(faults)}")
    return Checkpoint(path, manifest["step"], json.loads((path / STATE).read_text()))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the best value; of equal ones the newest. None if no checkpoint has a value.

    Only checkpoints with the metric and mode of the newest one with a value are compared.
    """
    scored = [(path, score) for path in _newest_first(folder) if (score := _score(path)) is not None]
    if not scored:
        return None
    newest = scored[0][1]
    comparable = [
        (score.value, path) for path, score in scored if (score.metric, score.mode) == (newest.metric, newest.mode)
    ]
    return {"max": max, "min": min}[newest.mode](comparable, key=lambda item: item[0])[1]


def _newest_first(folder: Path) -> list[Path]:
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("step-*")]
    found = [(int(match[1]), match[2] is None, path) for path, match in names if match]
    return [path for _, _, path in sorted(found, reverse=True)]


def _seal(path: Path, step: int, score: Best | None) -> None:
    """Write the manifest with size and checksum of every file, and sync all files to disk."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        entries = list(pool.map(_entry, files))
    manifest = {
        "format": FORMAT,
        "step": step,
        "score": asdict(score) if score is not None and math.isfinite(score.value) else None,
        "files": {file.relative_to(path).as_posix(): entry for file, entry in zip(files, entries, strict=True)},
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(path / MANIFEST)
    for sub_folder in {file.parent for file in files} | {path}:
        _sync(sub_folder)


def _move_into_place(temporary: Path, final: Path) -> None:
    if final.exists():
        # `latest` finds this name as well, so a crash between the two renames loses nothing.
        replaced = final.with_name(f"{final.name}.replaced")
        _remove([replaced])
        final.rename(replaced)
    temporary.rename(final)
    _sync(final.parent)


def _entry(file: Path) -> dict[str, int | str]:
    _sync(file)
    return {"bytes": file.stat().st_size, "crc32": _checksum(file)}


def _checksum(file: Path) -> str:
    value = 0
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        known = manifest["format"] == FORMAT and {"step", "score", "files"} <= manifest.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None
    if not known:
        raise CheckpointError(
            f"checkpoint {path} was written by another version (format {manifest['format']}; this version reads "
            f"{FORMAT}), so it cannot be resumed: start a new run from its weights with model.path={path}/model"
        )
    return manifest


def _score(path: Path) -> Best | None:
    try:
        score = _read_manifest(path)["score"]
    except CheckpointError:
        return None  # `load` reports damaged checkpoints
    return None if score is None else Best(**score)


def _fault(path: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    file = path / name
    if not file.is_file():
        return f"{name} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
    return None if _checksum(file) == entry["crc32"] else f"the content of {name} has changed since it was written"


def _prune(folder: Path, step: int, keep_last: int) -> None:
    assert keep_last >= 1
    paths = _newest_first(folder)
    current = [path for path in paths if path.suffix != ".replaced" and int(path.name.removeprefix("step-")) <= step]
    _remove(path for path in paths if path not in current)
    kept = {*current[:keep_last], best_checkpoint(folder)}
    _remove(path for path in current if path not in kept)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.exists():
            # Rename first: a half-removed checkpoint must not look like a damaged one.
            hidden = path.with_name(f".tmp-{path.name.removeprefix('.tmp-')}")
            shutil.rmtree(path.rename(hidden))


def _disk_full_message(folder: Path, step: int) -> str:
    names = ", ".join(path.name for path in _newest_first(folder)) or "none"
    return (
        f"the disk is full: the checkpoint of step {step} does not fit in {folder} "
        f"({shutil.disk_usage(folder).free / 1e9:.1f} GB free without it). Older checkpoints are intact: {names}. "
        "Free some space, or keep fewer checkpoints (checkpoint.keep_last)"
    )


def _is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether a full disk was the cause. Libraries wrap the system's error, so its text and the free space count."""
    if not isinstance(error, Exception):
        return False
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(link, OSError) and link.errno in DISK_FULL for link in chain):
        return True
    text = " ".join(map(str, chain))
    return any(sign in text for sign in DISK_FULL_TEXTS) or shutil.disk_usage(folder).free < _CHUNK


def _check_state(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: JSON would turn the key {key!r} into a string")
            _check_state(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where}: JSON cannot hold a {type(value).__name__} without changing it")
