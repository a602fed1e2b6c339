"""The last lines of a command that trains: the run's folder, its plot, and its first and last held-out result."""

from collections.abc import Iterator
from pathlib import Path

LAST_LINE = {"eval/accuracy": "held-out accuracy", "eval/loss": "held-out loss"}
"""Label by metric. The report ends with the first and last value of the first metric that the run has."""


def run_report(folder: Path) -> Iterator[str]:
    """Draw the curves of a run, and describe the run in two or three lines. `trainer.cli` alone imports this."""
    from trainer.run.plot import plot_runs
    from trainer.run.tracking import JsonLines

    yield f"run: {folder}"
    yield f"plot: {plot_runs([folder])}"
    rows = JsonLines(folder / "metrics.jsonl").read()
    for key, label in LAST_LINE.items():
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            yield f"{label}: {values[0]:.2f} -> {values[-1]:.2f}"
            return
