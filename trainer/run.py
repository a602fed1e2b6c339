"""One run's place on disk and its life: the folder, its lock, the progress display, stopping on a signal."""

import os
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from fcntl import LOCK_EX, flock
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
START_FORMAT = "%Y-%m-%d_%H-%M-%S"
MARKER = "config.yaml"
"""The file that makes a folder a run folder."""

LIVE_METRICS = {
    "reward/mean": "reward",
    "policy/loss": "loss",
    "train/loss": "loss",
    "eval/accuracy": "held-out accuracy",
    "eval/loss": "validation loss",
    "rollout/tokens_per_s": "rollout tok/s",
    "learner/tokens_per_s": "learner tok/s",
}
"""Metrics drawn beside the progress bar, by key, with their label; those that a step does not have are left out."""


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


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to finish the step, save and stop; the second one aborts.

    Used as a context manager in the main thread (elsewhere signals cannot be caught, and nothing changes).
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.requested = True
        name = signal.Signals(number).name
        message = f"\n{name}: finishing this step, then saving. Once more aborts without saving.\n"
        # Not through rich: a handler may interrupt the very code that holds the console's lock.
        os.write(2, message.encode())

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """The given steps, until a stop is requested."""
        for step in steps:
            if self.requested:
                return
            yield step


class Progress:
    """A bar with rates, time left and live metrics; where the output is no terminal, one plain line for each step."""

    def __init__(self, steps: int, done: int = 0, label: str = "train", console: Console | None = None) -> None:
        """`steps` in total, of which `done` were done before (a resumed run)."""
        self.console = console or Console()
        self._steps, self._done, self._label = steps, done, label
        self._times: deque[float] = deque([time.monotonic()], maxlen=11)
        self._bar: RichProgress | None = None
        if self.console.is_terminal:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[live]}", markup=False),
                console=self.console,
            )
            self._task = self._bar.add_task(label, total=steps, completed=done, live="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        self._times[-1] = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def phase(self, what: str) -> None:
        """Say what is being done now, e.g. `rollout`; shown on a terminal only."""
        if self._bar:
            self._bar.update(self._task, description=f"{self._label}: {what}")

    def advance(self, metrics: Mapping[str, float | None]) -> None:
        """One more step is done."""
        self._done += 1
        self._times.append(time.monotonic())
        live = self._live(metrics)
        if self._bar:
            self._bar.update(self._task, completed=self._done, live=live, description=self._label)
        else:
            self.print(Text(f"{self._label} {self._done}/{self._steps}  {live}"))

    def print(self, what: RenderableType) -> None:
        """Print a line or a table above the bar. A plain string is not searched for markup."""
        self.console.print(Text(what) if isinstance(what, str) else what, soft_wrap=isinstance(what, str | Text))

    def _live(self, metrics: Mapping[str, float | None]) -> str:
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        values = [(label, metrics.get(key)) for key, label in LIVE_METRICS.items()]
        shown = [f"{label} {_short(value)}" for label, value in values if value is not None]
        left = clock(seconds * (self._steps - self._done))
        return "  ".join([*shown, f"{seconds:.1f} s/step", f"{left} left"])


def _short(value: float) -> str:
    """About four figures: 0.4219, 12.31, 1834."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
