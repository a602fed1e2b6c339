"""Logs metrics and sample completions as JSON lines in the run folder, and to any tracker of Accelerate.

A row of `metrics.jsonl` holds one step: `step` and keys named `area/name_unit`. The areas `time/` and `system/` and
keys that end in `_per_s` are measurements; all other values follow from the configuration and the seed.
"""

import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from llmquest_rl.loader import did_you_mean
from llmquest_rl.types import Group
from trainer.run.folder import RunFolder
from trainer.run.samples import KLToReference, sample_rows, unknown_kl

Metrics = Mapping[str, float | None]

PACKAGES = {"comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow", "swanlab": "swanlab", "aim": "aim"} | {
    "clearml": "clearml",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Package by name of Accelerate's tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker can be used, before models are loaded.

    Raises:
        ValueError: a tracker does not exist, or its package is not installed.
    """
    for name in names:
        if name not in PACKAGES:
            hint = did_you_mean(name, sorted(PACKAGES), list_all=True)
            raise ValueError(f"tracking.trackers: {name!r} does not exist{hint}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"tracking.trackers: {name!r} needs a package that is not installed: pip install {PACKAGES[name]}"
            )


class JsonLines:
    """A file with one JSON object per line. Each line is written before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Raises:
            OSError: the row cannot be written, e.g. on a full disk. Half a line may remain; `truncate` removes it.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            # UTF-8 cannot encode half a surrogate pair; it becomes the escape that JSON has for it.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        except OSError as error:
            fix = "resume the run once there is room to write"
            raise OSError(error.errno, f"{error.strerror}; {fix}", str(self.path)) from error

    def read(self) -> list[dict[str, Any]]:
        """All rows. An incomplete last line, as a killed process leaves it, is ignored.

        Raises:
            ValueError: a line is not a JSON object with a step; the message gives its number.
        """
        rows = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path}, line {number}: not JSON ({error}): remove this line") from None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f"{self.path}, line {number}: not an object with an integer `step`: remove this line")
            rows.append(row)
        return rows

    def truncate(self, step: int) -> int:
        """Remove the rows of `step` and later atomically, because a resumed run repeats them; returns their number."""
        if not self.path.exists():
            return 0
        lines = self._lines()
        kept = [line for line, row in zip(lines, self.read(), strict=True) if row["step"] < step]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        return len(lines) - len(kept)

    def _lines(self) -> list[str]:
        with self.path.open(encoding="utf-8", newline="\n") as file:
            return [line for line in file if line.endswith("\n")]


def _plain(value: Any) -> Any:
    """A value that JSON can hold: other objects, e.g. of an answer, become text, and NaN and inf become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int) else str(value)


def system_metrics() -> dict[str, float]:
    """Memory of this process, and memory and CPU use of the machine. CPU use is the mean since the last call."""
    memory = psutil.virtual_memory()
    # ru_maxrss is in kB on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "system/driver_memory_gb": psutil.Process().memory_info().rss / 1e9,
        "system/driver_peak_memory_gb": peak / 1e9,
        "system/memory_used_gb": (memory.total - memory.available) / 1e9,
        "system/cpu_share": psutil.cpu_percent() / 100,
    }


class Tracker:
    """Writes each step's metrics and sample completions to the run folder and to the chosen trackers."""

    def __init__(self, folder: RunFolder, names: Sequence[str], project: str, first_step: int) -> None:
        """Open the files; rows of `first_step` and later, from an interrupted run, are removed.

        Raises:
            ValueError: a tracker does not exist or is not installed.
        """
        check_trackers(names)
        self.non_finite = 0
        """Number of metric values so far that were NaN or inf; they are written as null."""
        self._folder, self._names, self._project, self._first_step = folder, tuple(names), project, first_step
        self._metrics, self._completions = JsonLines(folder.metrics), JsonLines(folder.completions)
        self._metrics.truncate(first_step)
        self._completions.truncate(first_step)
        self._last_step = first_step - 1
        self._trackers: list[Any] = []
        self._on_close: list[Callable[[], object]] = []

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the trackers with the resolved configuration. Call it after the learners exist; see `_new_trackers`."""
        for tracker in self._new_trackers():
            tracker.start()
            self._trackers.append(tracker)
            tracker.store_init_configuration(_flat(config))

    def log(self, step: int, metrics: Metrics) -> dict[str, float | None]:
        """Record a step; steps must increase. Returns the row as written, without `step`."""
        assert step > self._last_step, f"step {step} was recorded already: {self._last_step} was the last one"
        self._last_step = step
        row = {key: _number(key, value) for key, value in metrics.items()}
        bad = [key for key, value in metrics.items() if value is not None and row[key] is None]
        if bad:
            self.non_finite += len(bad)
            row["tracking/non_finite_count"] = len(bad)
        self._metrics.append({"step": step, **row})
        known = {key: value for key, value in row.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(known, step=step)
        return row

    def log_completions(
        self, step: int, groups: Sequence[Group], count: int, kl: KLToReference = unknown_kl
    ) -> list[dict[str, Any]]:
        """Record `count` sample completions of a step, and return their rows; `kl` gives the KL of each."""
        rows = [_plain(row) for row in sample_rows(step, groups, count, kl)]
        for row in rows:
            self._completions.append(row)
        return rows

    def close(self) -> None:
        """Finish every tracker, even if another one fails."""
        with ExitStack() as stack:
            for action in [*self._on_close, *(tracker.finish for tracker in self._trackers)]:
                stack.callback(action)
        self._trackers, self._on_close = [], []

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_trackers(self) -> list[Any]:
        if not self._names:
            return []
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # Accelerate's trackers need a global state. A learner in this process has created it with its process group, so
        # it must not be created before the learner. Without one, create it on the CPU; `close` removes it.
        if not PartialState._shared_state:
            PartialState(cpu=True)
            self._on_close.append(PartialState._reset_state)
        run_name, folder = self._folder.path.name, str(self._folder.path)
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": self._first_step},
            "wandb": {"name": run_name, "id": f"{self._project}-{run_name}", "resume": "allow", "dir": folder},
            "trackio": {"name": run_name, "resume": "allow"},
        }
        trackers = []
        for name in self._names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            where = {"logging_dir": str(self._folder.path / name)} if tracker_class.requires_logging_directory else {}
            trackers.append(tracker_class(self._project, **where, **options.get(name, {})))
        return trackers


def _number(key: str, value: Any) -> float | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"metric {key} must be a number, got {value!r}") from None
    return number if math.isfinite(number) else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Flatten `{"a": {"b": 1}}` to `{"a.b": 1}`, as trackers expect; values of other types become text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat
