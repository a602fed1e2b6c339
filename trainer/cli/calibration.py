"""The command `calibration`: the reliability curve of a reward model, from its last evaluation on held-out pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from trainer.sources.intervals import Estimate

console = Console()


@dataclass(frozen=True)
class Bin:
    """The held-out pairs whose ranking has a certain confidence, that is sigmoid of the difference of both scores."""

    start: int
    """The lowest confidence, in percent."""
    pairs: int
    confidence: float
    """Mean confidence."""
    right: "Estimate"
    """Share of the pairs that are ranked correctly, with its 95 % interval."""


def calibration(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run of a reward model: a folder, runs/NAME, or runs/latest.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .png or .svg file; default: reliability.png in the run's folder.")
    ] = None,
) -> None:
    """Draw how often a reward model is right, given how sure it is, and print the expected calibration error."""
    from trainer.run.folder import RunFolder
    from trainer.run.tracking import JsonLines

    folder = RunFolder.open(run)
    rows = JsonLines(folder.metrics).read()
    row = next((row for row in reversed(rows) if "eval/ece" in row), None)
    if row is None:
        raise ValueError(f"{folder.path}: no evaluation of a reward model on held-out pairs: see eval.every")
    bins = reliability(row)
    table = Table("confidence from", "pairs", "mean confidence", "ranked right", box=None)
    for one in bins:
        table.add_row(f"{one.start} %", f"{one.pairs}", f"{one.confidence:.3f}", str(one.right))
    console.print(table)
    accuracy = f"{row['eval/accuracy']:.3f} (95 % CI {row['eval/accuracy_low']:.3f} to {row['eval/accuracy_high']:.3f})"
    console.print(f"step {row['step']}: {row['eval/pairs']:.0f} held-out pairs, accuracy {accuracy}")
    console.print(f"loss {row['eval/loss']:.3f}, expected calibration error {row['eval/ece']:.3f}")
    console.print(
        Text(f"figure: {draw(bins, row['eval/ece'], out or folder.path / 'reliability.png')}"), soft_wrap=True
    )


def reliability(row: dict[str, Any]) -> list[Bin]:
    """The bins that have pairs, from one row of `metrics.jsonl`."""
    from llmquest_rl.objectives.reward_model import BIN_STARTS
    from trainer.sources.intervals import wilson

    bins = []
    for start in BIN_STARTS:
        pairs = round(row[f"eval/pairs_at_{start}"])
        if pairs:
            right = wilson(round(row[f"eval/right_at_{start}"]) / pairs, pairs)
            bins.append(Bin(start, pairs, row[f"eval/confidence_at_{start}"] / pairs, right))
    return bins


def draw(bins: list[Bin], error: float, out: Path) -> Path:
    """Draw the share of right rankings over the confidence; returns `out`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from trainer.run.plot import COLOURS, INK, save

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0.5, 1.0], [0.5, 1.0], color="#999999", linestyle=":", linewidth=1.4, label="calibrated")
    x, y = [one.confidence for one in bins], [one.right.value for one in bins]
    axes.vlines(x, [one.right.low for one in bins], [one.right.high for one in bins], color=COLOURS[0], alpha=0.35)
    axes.plot(x, y, marker="o", color=COLOURS[0], linewidth=1.8, label="reward model, 95 % intervals")
    for one in bins:
        axes.annotate(f"{one.pairs}", (one.confidence, 0.0), ha="center", fontsize=8, color="#777777")
    axes.set_title(f"calibration error {error:.3f}", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("confidence of the ranking (numbers: pairs)")
    axes.set_ylabel("share of right rankings")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.06))
    return save(figure, out)
