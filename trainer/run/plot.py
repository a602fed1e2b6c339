"""Draws curves of one or several runs from their `metrics.jsonl`."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llmquest_rl.loader import did_you_mean
from trainer.run.folder import RunFolder
from trainer.run.tracking import JsonLines

PANELS = {
    "reward/mean": "sampled reward, mean",
    "eval/accuracy": "held-out accuracy",
    "train/loss": "training loss",
    "eval/loss": "held-out loss",
}
"""Title by metric. Without `--metric`, a plot shows those of these metrics that the runs have."""
OF_ANY_OBJECTIVE = ("train/", "eval/")
"""Areas of the metrics that a plot shows of runs that have none of these."""
MAX_PANELS = 4

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The palette of Okabe and Ito, which colour-blind people can tell apart, with grey instead of its yellow."""

INK = "#333333"


@dataclass(frozen=True, slots=True)
class Run:
    """Folder, configuration and metrics of a run."""

    folder: RunFolder
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    def points(self, key: str) -> dict[int, float]:
        """Values of a metric by step; steps without a value are left out."""
        return {row["step"]: float(row[key]) for row in self.rows if row.get(key) is not None}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line, with lower and upper bounds at each step if there are any."""

    label: str
    steps: Sequence[float]
    values: list[float]
    low: list[float] | None
    high: list[float] | None
    num_runs: int


def plot_runs(
    runs: Sequence[Path | str], metrics: Sequence[str] = (), out: Path | None = None, group_seeds: bool = False
) -> Path:
    """Draw one panel per metric with one line per run; returns the file.

    The metrics `<metric>_low` and `<metric>_high`, if they exist, are drawn as the 95 % interval of `<metric>`.

    Args:
        runs: run folders, or other references that `RunFolder.open` accepts.
        metrics: keys of `metrics.jsonl`; empty = those of `PANELS` that any of the runs has, or, if there is none
            because the objective logs other ones, the first of its metrics.
        out: a .png or .svg file; None = `plot.png` in the folder of the first run.
        group_seeds: draw runs that differ only in their seed as one line, their mean, with a band from the lowest to
            the highest.

    Raises:
        ValueError: a run or a metric does not exist, or the file is neither .png nor .svg.
    """
    loaded = [_load(reference) for reference in runs]
    if not loaded:
        raise ValueError("there are no runs to plot: give at least one run folder")
    out = out or loaded[0].folder.plot
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"{out}: the name of a plot must end with .png or .svg")
    keys = _choose(loaded, metrics)
    figure = Figure(figsize=(0.4 + 4.6 * len(keys), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(keys), squeeze=False, sharex=True)[0])
    colours: dict[str, str] = {}
    for axes, key in zip(panels, keys, strict=True):
        curves = _curves(loaded, key, group_seeds)
        for curve in curves:
            colours.setdefault(curve.label, COLOURS[len(colours) % len(COLOURS)])
            draw(axes, curve, colours[curve.label], crowded=len(curves) > 2)
        style_axes(axes, _title(key, curves), curves)
    legend(figure, panels)
    return save(figure, out)


def save(figure: Figure, out: Path, dpi: int = 160) -> Path:
    """Write a figure; returns its file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # A date or a random salt would make the files of equal runs differ.
    with rc_context({"svg.hashsalt": "llmquest_rl"}):
        figure.savefig(out, dpi=dpi, metadata={"Date": None} if out.suffix == ".svg" else None)
    return out


def _load(reference: Path | str) -> Run:
    folder = RunFolder.open(reference)
    if not folder.metrics.is_file():
        raise ValueError(
            f"{folder.path}: this run has no {folder.metrics.name}, because it has not finished a step yet"
        )
    return Run(folder, yaml.safe_load(folder.config.read_text()) or {}, JsonLines(folder.metrics).read())


def _choose(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    present = {key for run in runs for row in run.rows for key, value in row.items() if value is not None} - {"step"}
    chosen = list(metrics) or [key for key in PANELS if key in present]
    chosen = chosen or [key for key in sorted(present) if key.startswith(OF_ANY_OBJECTIVE)][:MAX_PANELS]
    for key in chosen:
        if key not in present:
            raise ValueError(f"no run has the metric {key!r}{did_you_mean(key, sorted(present))}")
    if not chosen:
        raise ValueError(f"these runs have none of {', '.join(PANELS)}; choose from {', '.join(sorted(present))}")
    return chosen


def _curves(runs: Sequence[Run], key: str, group_seeds: bool) -> list[Curve]:
    having = [run for run in runs if run.points(key)]
    if not group_seeds:
        return [_single(run, label, key) for run, label in zip(runs, _labels(runs), strict=True) if run in having]
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in having:
        groups[json.dumps({**run.config, "seed": None}, sort_keys=True, default=str)].append(run)
    names = Counter(_name(members[0]) for members in groups.values())
    return [_grouped(members, key, ambiguous=names[_name(members[0])] > 1) for members in groups.values()]


def _single(run: Run, label: str, key: str) -> Curve:
    points, low, high = (run.points(name) for name in (key, f"{key}_low", f"{key}_high"))
    steps = sorted(points)
    has_interval = all(step in low and step in high for step in steps)
    return Curve(
        label,
        steps,
        [points[step] for step in steps],
        [low[step] for step in steps] if has_interval else None,
        [high[step] for step in steps] if has_interval else None,
        1,
    )


def _grouped(runs: Sequence[Run], key: str, ambiguous: bool) -> Curve:
    """The mean of several runs, at the steps that all of them have."""
    points = [run.points(key) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in points)))
    columns = [[each[step] for each in points] for step in steps]
    label = f"{_name(runs[0])}/{runs[0].folder.path.name}" if ambiguous else _name(runs[0])
    if len(runs) > 1:
        label += f" (mean of {len(runs)} seeds, lowest to highest)"
    return Curve(
        label,
        steps,
        [sum(column) / len(column) for column in columns],
        [min(column) for column in columns] if len(runs) > 1 else None,
        [max(column) for column in columns] if len(runs) > 1 else None,
        len(runs),
    )


def _name(run: Run) -> str:
    return str(run.config.get("name", run.folder.path.parent.name))


def _labels(runs: Sequence[Run]) -> list[str]:
    """Labels that differ between the runs: the name, else name and seed, else name and start time."""
    candidates = (
        [_name(run) for run in runs],
        [f"{_name(run)}, seed {run.config.get('seed')}" for run in runs],
        [f"{_name(run)}/{run.folder.path.name}" for run in runs],
    )
    return next((labels for labels in candidates if len(set(labels)) == len(runs)), candidates[-1])


def draw(axes: Axes, curve: Curve, colour: str, crowded: bool) -> None:
    """Draw a line with its band; intervals of several single runs become bars, because bands would overlap."""
    marker = "o" if len(curve.steps) <= 40 else ""
    axes.plot(curve.steps, curve.values, marker=marker, markersize=4, color=colour, label=curve.label, linewidth=1.8)
    if curve.low and curve.high:
        if (crowded and curve.num_runs == 1) or len(curve.steps) == 1:
            axes.vlines(curve.steps, curve.low, curve.high, color=colour, alpha=0.35, linewidth=1.2)
        else:
            axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)


def _title(key: str, curves: Sequence[Curve]) -> str:
    title = PANELS.get(key, key)
    if len(curves) == 1 and len(curves[0].values) > 1:
        title += f": {curves[0].values[0]:.3g} → {curves[0].values[-1]:.3g}"
    return title


def style_axes(axes: Axes, title: str, curves: Sequence[Curve], xlabel: str = "step") -> None:
    """Set title, labels, grid and limits of one panel."""
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(xlabel)
    if any(curve.low and curve.num_runs == 1 for curve in curves):
        axes.text(0.98, 0.03, "with 95 % intervals", transform=axes.transAxes, ha="right", fontsize=8, color="#777777")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = [value for curve in curves for value in [*curve.values, *(curve.low or ()), *(curve.high or ())]]
    if min(values) >= 0 and max(values) <= 1 and "loss" not in title:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=9)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend below all panels; a run has the same colour in each."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = min(3, len(entries))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
