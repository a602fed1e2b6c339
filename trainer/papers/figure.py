"""Draws a recipe's figure: one panel per metric, one line per arm with the mean and range of its seeds."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator
from pydantic import PositiveInt

from llmquest_rl.options import Options
from trainer.config.renamed_keys import MetricName
from trainer.papers.series import Results, Rows, points, smooth
from trainer.run.plot import COLOURS, Curve, draw, legend, save, style_axes

SMALL = 0.3
"""Values that stay below this are not drawn on an axis from 0 to 1."""


class Panel(Options):
    """One panel of a figure."""

    metric: MetricName
    title: str
    x: str = "step"
    """Key of the x axis: `step`, `generated tokens`, `sqrt KL`, or a key of a measure's rows."""
    arms: tuple[str, ...] = ()
    """Arms to draw; empty = all that have the metric."""
    smooth: PositiveInt = 1
    """Number of consecutive values averaged into each point, because training metrics are noisy."""
    scale: Literal["linear", "log"] = "linear"
    """Scale of the y axis."""
    mark_peak: bool = False
    """Mark the x value at which each curve is highest with a dotted line."""


def draw_figure(panels: Sequence[Panel], results: Results, columns: int, out: Path) -> Path:
    """Draw the figure and write it to `out`; returns `out`.

    Raises:
        ValueError: no arm has the metric of a panel.
    """
    rows = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    figure = Figure(figsize=(0.4 + 4.6 * columns, 0.4 + 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(results)}
    for place, panel in zip(axes, panels, strict=False):
        _draw_panel(place, panel, results, colours)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    legend(figure, axes[: len(panels)])
    return save(figure, out, dpi=90)


def _draw_panel(axes: Axes, panel: Panel, results: Results, colours: Mapping[str, str]) -> None:
    chosen = {arm: seeds for arm, seeds in results.items() if not panel.arms or arm in panel.arms}
    curves = [curve for arm, seeds in chosen.items() if (curve := _curve(arm, seeds, panel)) is not None]
    if not curves:
        raise ValueError(f"panel {panel.title!r}: no arm has {panel.metric} over {panel.x}")
    for curve in curves:
        draw(axes, curve, colours[curve.label], crowded=False)
        if panel.mark_peak:
            peak = curve.steps[curve.values.index(max(curve.values))]
            axes.axvline(peak, color=colours[curve.label], linestyle=":", linewidth=1.4)
    style_axes(axes, panel.title, curves, panel.x)
    if panel.x != "step":
        axes.xaxis.set_major_locator(AutoLocator())
    _scale(axes, panel, curves)


def _scale(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    low = min(min(curve.low or curve.values) for curve in curves)
    high = max(max(curve.high or curve.values) for curve in curves)
    axes.set_yscale(panel.scale)
    if panel.scale == "log":
        axes.set_ylim(low / 1.25 if low > 0 else None, high * 1.25)
    elif 0 <= low <= high < SMALL:
        axes.set_ylim(low, high * 1.1)


def _curve(arm: str, seeds: Mapping[int, Rows], panel: Panel) -> Curve | None:
    """The mean over seeds, at the steps that all have. Other x values differ by seed and are averaged by position."""
    runs = [[(x, y) for x, y in points(rows, panel.metric, panel.x) if isfinite(y)] for rows in seeds.values()]
    if not all(runs):
        return None
    if panel.x == "step":
        common = set.intersection(*({x for x, _ in run} for run in runs))
        runs = [[(x, y) for x, y in run if x in common] for run in runs]
    shortest = min(map(len, runs))
    values = [smooth([y for _, y in run[:shortest]], panel.smooth) for run in runs]
    columns = list(zip(*values, strict=True))
    return Curve(
        arm,
        [fmean(run[i][0] for run in runs) for i in range(shortest)],
        [fmean(column) for column in columns],
        [min(column) for column in columns] if len(runs) > 1 else None,
        [max(column) for column in columns] if len(runs) > 1 else None,
        len(runs),
    )
