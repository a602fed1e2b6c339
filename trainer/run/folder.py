"""The folder of one run: where everything is written, and the lock that keeps a second run out."""

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
"""The file that makes a folder a run folder."""


class RunFolderError(ValueError):
    """A run folder that cannot be made, found or locked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/<name>/<start>/`: everything that one run writes."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> "RunFolder":
        """Make a new folder and let `<root>/latest` point to it.

        Raises:
            RunFolderError: the name cannot be a folder name.
        """
        if not RUN_NAME.fullmatch(name) or name == "latest":
            raise RunFolderError(
                f"name: {name!r} cannot name a run folder: use letters, digits, '.', '_', '-' (but not 'latest')"
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
            RunFolderError: there is no run at that place.
        """
        path = Path(reference).resolve()
        if (path / MARKER).is_file():
            return cls(path)
        runs = sorted(marker.parent for marker in path.glob(f"*/{MARKER}")) if path.is_dir() else []
        if not runs:
            raise RunFolderError(
                f"{reference}: no run here. Give a run folder (it holds {MARKER}), runs/<name> for the newest run "
                "of that name, or runs/latest"
            )
        return cls(runs[-1])

    @property
    def config(self) -> Path:
        """The resolved configuration: enough to run again."""
        return self.path / MARKER

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """Sample completions, one JSON object each, with their rewards by name."""
        return self.path / "completions.jsonl"

    @property
    def logs(self) -> Path:
        """One log file for each actor."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        """Saved rollouts, one file a step, for `--replay`."""
        return self.path / "rollouts"

    @property
    def plot(self) -> Path:
        return self.path / "plot.png"

    @contextmanager
    def locked(self) -> Iterator[str | None]:
        """Hold the folder: a second run in it is an error.

        Yields a message when the lock of a dead process was taken over, else None.

        Raises:
            RunFolderError: a live process holds the folder.
        """
        lock = self.path / "lock"
        message = _take_lock(lock)
        try:
            yield message
        finally:
            lock.write_text("")


def _make_unique(parent: Path, start: str) -> Path:
    """A new folder named by its start; the second, third, ... of one second get a suffix that sorts after it."""
    for attempt in range(1000):
        path = parent / (start if attempt == 0 else f"{start}_{attempt:03d}")
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise RunFolderError(f"{parent}: a thousand runs started within one second")


def _point(link: Path, target: Path) -> None:
    """Let the symbolic link `link` point to `target`, atomically: a reader sees the old or the new one, never none."""
    if link.exists() and not link.is_symlink():
        raise RunFolderError(f"{link} is in the way: it must be a link to the newest run; move it elsewhere")
    temporary = link.with_name(f".{link.name}-{os.getpid()}-{threading.get_ident()}")
    temporary.symlink_to(os.path.relpath(target, link.parent))
    temporary.replace(link)


def _identity() -> str:
    """Who holds a lock: process, host, and when the process began, because process ids are used again."""
    return f"{os.getpid()} {socket.gethostname()} {psutil.Process().create_time():.2f}"


def _is_alive(owner: str) -> bool:
    """Whether the process that wrote `owner` may still run; one on another host cannot be asked and counts as alive."""
    pid, host, started = owner.split()
    if host != socket.gethostname():
        return True
    try:
        # A clock that is stepped moves create_time by less than a second or two; a recycled id is further off.
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) < 2.0)
    except psutil.NoSuchProcess:
        return False


def _take_lock(lock: Path) -> str | None:
    # The owner is written down; an flock kept open would be inherited by forked workers, which may outlive the run.
    with lock.open("a+") as file:
        flock(file, LOCK_EX)
        file.seek(0)
        owner = file.read().strip()
        if owner and _is_alive(owner):
            pid, host, _ = owner.split()
            raise RunFolderError(
                f"{lock.parent}: another run works in this folder (process {pid} on {host}). Wait for it or stop it; "
                f"if it is surely gone, delete {lock}"
            )
        file.truncate(0)
        file.write(_identity())
    if not owner:
        return None
    return f"{lock.parent}: took over the lock of process {owner.split()[0]}, which no longer runs"
