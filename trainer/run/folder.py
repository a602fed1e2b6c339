"""The folder of one run: the paths of its files, and a lock against a second run in it."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fcntl import LOCK_EX, flock
from pathlib import Path

import psutil

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
START_FORMAT = "%Y-%m-%d_%H-%M-%S"
MARKER = "config.yaml"
"""A folder with this file is a run folder."""


class RunFolderError(ValueError):
    """A run folder cannot be created, found or locked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/<name>/<start>/`: all files of one run."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> "RunFolder":
        """Create a new folder and point the link `<root>/latest` to it.

        Raises:
            RunFolderError: the name is not a valid folder name, or `<root>/latest` exists and is not a link.
        """
        if not RUN_NAME.fullmatch(name) or name == "latest":
            raise RunFolderError(
                f"name: {name!r} is not a valid name for a run folder: use letters, digits, '.', '_' and '-' "
                "(but not 'latest')"
            )
        parent = root.resolve() / name
        parent.mkdir(parents=True, exist_ok=True)
        start = datetime.now().strftime(START_FORMAT)
        folder = cls(_make_unique(parent, start))
        for sub_folder in (folder.logs, folder.checkpoints, folder.rollouts):
            sub_folder.mkdir()
        _point(parent.parent / "latest", folder.path)
        return folder

    @classmethod
    def open(cls, reference: Path | str) -> "RunFolder":
        """The run folder at `reference`: a run folder, `runs/latest`, or `runs/<name>` (its newest run).

        Raises:
            RunFolderError: there is no run at `reference`.
        """
        path = Path(reference).resolve()
        if (path / MARKER).is_file():
            return cls(path)
        runs = sorted(marker.parent for marker in path.glob(f"*/{MARKER}")) if path.is_dir() else []
        if not runs:
            raise RunFolderError(
                f"{reference}: there is no run here. Give a run folder (it holds {MARKER}), runs/<name> for the newest "
                "run of that name, or runs/latest"
            )
        return cls(runs[-1])

    @property
    def config(self) -> Path:
        """The resolved configuration, which is enough to repeat the run."""
        return self.path / MARKER

    @property
    def metrics(self) -> Path:
        """Metrics, one JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """Sample completions with their rewards by name, one JSON object each."""
        return self.path / "completions.jsonl"

    @property
    def logs(self) -> Path:
        """Folder with a log file of each actor."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Folder with saved rollouts, one file per step, for `train --replay`."""
        return self.path / "rollouts"

    @property
    def plot(self) -> Path:
        return self.path / "plot.png"

    @contextmanager
    def locked(self) -> Iterator[str | None]:
        """Lock the folder, so that a second run in it is an error.

        Yields a message if the lock of a dead process was taken over, otherwise None.

        Raises:
            RunFolderError: a live process holds the lock.
        """
        lock = self.path / "lock"
        message = _take_lock(lock)
        try:
            yield message
        finally:
            lock.write_text("")


def _make_unique(parent: Path, start: str) -> Path:
    """Create a folder named by the start time. Further ones within the same second get a suffix that sorts after it."""
    for attempt in range(1000):
        path = parent / (start if attempt == 0 else f"{start}_{attempt:03d}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise RunFolderError(f"{parent}: a thousand runs started within one second; start this one again")


def _point(link: Path, target: Path) -> None:
    """Point the symbolic link `link` to `target` atomically: readers see the old or the new target, never none."""
    if link.exists() and not link.is_symlink():
        raise RunFolderError(
            f"{link} exists but is not a symbolic link; move it elsewhere, because it must point to the newest run"
        )
    temporary = link.with_name(f".{link.name}-{os.getpid()}-{threading.get_ident()}")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def _identity() -> str:
    """Owner of a lock: process id, host, and start time of the process, because process ids are reused."""
    return f"{os.getpid()} {socket.gethostname()} {psutil.Process().create_time():.2f}"


def _is_alive(owner: str) -> bool:
    """Whether the process `owner` may still run. A process on another host cannot be checked and counts as alive."""
    pid, host, started = owner.split()
    if host != socket.gethostname():
        return True
    try:
        # A clock adjustment shifts create_time by less than two seconds; a reused id differs by more.
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) < 2.0)
    except psutil.NoSuchProcess:
        return False


def _take_lock(lock: Path) -> str | None:
    # The file names the owner. Forked workers, which may outlive the run, would inherit a lock held by flock.
    with lock.open("a+") as file:
        flock(file, LOCK_EX)
        file.seek(0)
        owner = file.read().strip()
        if owner and _is_alive(owner):
            pid, host, _ = owner.split()
            raise RunFolderError(
                f"{lock.parent}: another run uses this folder (process {pid} on {host}). Wait for it or stop it; "
                f"if it no longer exists, delete {lock}"
            )
        file.truncate(0)
        file.write(_identity())
    if not owner:
        return None
    return f"{lock.parent}: took over the lock of process {owner.split()[0]}, which no longer exists"


def check_new_folder(out: Path) -> None:
    """Check that a model can be written into the folder `out` without touching other files.

    Raises:
        ValueError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another folder")
