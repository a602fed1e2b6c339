"""The progress display: a bar on a terminal, otherwise one line per step."""

import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

LIVE_METRICS = {
    "reward/mean": "reward",
    "policy/loss": "loss",
    "train/loss": "loss",
    "eval/accuracy": "held-out accuracy",
    "eval/loss": "held-out loss",
    "rollout/tokens_per_s": "rollout tok/s",
    "learner/tokens_per_s": "learner tok/s",
}
"""Label by metric of the progress display; metrics that a step does not have are left out."""


class Progress:
    """A bar with metrics, speed and time left; if the output is not a terminal, one plain line per step."""

    def __init__(self, steps: int, done: int = 0, label: str = "train", console: Console | None = None) -> None:
        """Show `done` of `steps` as finished; a resumed run starts above 0."""
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

    def phase(self, name: str) -> None:
        """Show the current phase, e.g. `rollout`, on a terminal."""
        if self._bar:
            self._bar.update(self._task, description=f"{self._label}: {name}")

    def advance(self, metrics: Mapping[str, float | None]) -> None:
        """Count a finished step and show its metrics."""
        self._done += 1
        self._times.append(time.monotonic())
        live = self._live(metrics)
        if self._bar:
            self._bar.update(self._task, completed=self._done, live=live, description=self._label)
        else:
            self.print(Text(f"{self._label} {self._done}/{self._steps}  {live}"))

    def print(self, content: RenderableType) -> None:
        """Print a line or a table above the bar. Markup in a plain string is not interpreted."""
        text = Text(content) if isinstance(content, str) else content
        self.console.print(text, soft_wrap=isinstance(text, Text))

    def _live(self, metrics: Mapping[str, float | None]) -> str:
        seconds = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
        values = [(label, metrics.get(key)) for key, label in LIVE_METRICS.items()]
        shown = [f"{label} {_short(value)}" for label, value in values if value is not None]
        left = format_duration(seconds * (self._steps - self._done))
        return "  ".join([*shown, f"{seconds:.1f} s/step", f"{left} left"])


def _short(value: float) -> str:
    """The value with about four digits: 0.4219, 12.31, 1834."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Format a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
