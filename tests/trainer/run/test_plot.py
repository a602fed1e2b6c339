"""Plots: drawn lines, labels and errors. The lines are read back from the SVG and from the figure's data."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

import trainer.run.plot
from trainer.run.folder import RunFolder
from trainer.run.plot import plot_runs
from trainer.run.tracking import JsonLines

REWARDS = [{"reward/mean": 0.1 * step, "x/y": 5.0} for step in range(6)]


def new_run(root: Path, rows: list[dict[str, Any]], name: str = "a", seed: int = 0, **config: Any) -> Path:
    folder = RunFolder.create(root, name)
    folder.config.write_text(yaml.safe_dump({"name": name, "seed": seed, **config}))
    for step, row in enumerate(rows):
        JsonLines(folder.metrics).append({"step": step, **row})
    return folder.path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of every figure that is drawn from here on."""
    panels: list[Any] = []
    legend = trainer.run.plot.legend

    def watch(figure: Any, axes: Any) -> None:
        panels.extend(axes)
        legend(figure, axes)

    monkeypatch.setattr(trainer.run.plot, "legend", watch)
    return panels


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_default_panels_follow_what_the_run_has(tmp_path: Path, drawn: list[Any]) -> None:
    rl = [
        {"reward/mean": 0.5, "eval/accuracy": 0.25 if step % 2 == 0 else None, "policy/loss": 0.0} for step in range(5)
    ]
    supervised = [{"train/loss": 4.0 - step, "eval/loss": 4.5 - step} for step in range(3)]
    out = plot_runs([new_run(tmp_path, rl, "rl")])
    assert out == (tmp_path / "rl").resolve() / out.parent.name / "plot.png"
    assert out.read_bytes().startswith(b"\x89PNG")
    plot_runs([new_run(tmp_path, supervised, "sft")])
    titles = [axes.get_title(loc="left") for axes in drawn]
    assert titles == [
        "sampled reward, mean: 0.5 → 0.5",
        "held-out accuracy: 0.25 → 0.25",
        "training loss: 4 → 2",
        "held-out loss: 4.5 → 2.5",
    ]
    assert lines(drawn[1])["rl"] == ([0, 2, 4], [0.25, 0.25, 0.25])  # steps without a value are left out


def test_runs_have_labels_that_tell_them_apart_and_one_colour_in_all_panels(tmp_path: Path, drawn: list[Any]) -> None:
    seeds = [new_run(tmp_path, REWARDS, seed=seed) for seed in (1, 2)]
    other = new_run(tmp_path, [{"eval/accuracy": 0.5, "reward/mean": 0.1}] * 3, "b")
    plot_runs([seeds[0], other], out=tmp_path / "x.svg")
    plot_runs(seeds, out=tmp_path / "x.svg")
    twins = [new_run(tmp_path, REWARDS, seed=1) for _ in range(2)]
    plot_runs(twins, out=tmp_path / "x.svg")
    assert list(lines(drawn[0])) == ["a", "b"]
    assert drawn[1].lines[0].get_color() == drawn[0].lines[1].get_color()
    assert list(lines(drawn[2])) == ["a, seed 1", "a, seed 2"]
    assert list(lines(drawn[3])) == [f"a/{path.name}" for path in twins]


def test_seeds_are_grouped_into_their_mean_and_range(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [new_run(tmp_path, [{"reward/mean": v} for v in values], seed=seed, lr=1)
            for seed, values in enumerate([[0.1, 0.4, 0.5], [0.2, 0.6], [0.6, 0.8, 0.9]])]  # fmt: skip
    runs.append(new_run(tmp_path, [{"reward/mean": 0.3}] * 2, seed=0, lr=2))
    plot_runs(runs, out=tmp_path / "x.svg", group_seeds=True)
    (axes,) = drawn
    mean, single = axes.lines
    assert mean.get_label() == f"a/{runs[0].name} (mean of 3 seeds, lowest to highest)"
    assert single.get_label() == f"a/{runs[3].name}"
    assert list(mean.get_xdata()) == [0, 1]  # the steps that all of them have
    assert list(mean.get_ydata()) == pytest.approx([0.3, 0.6])
    (band,) = axes.collections
    corners = {(round(x, 6), round(y, 6)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.1), (1, 0.4), (1, 0.8), (0, 0.6)}


@pytest.mark.parametrize(("count", "shapes"), [(1, 1), (3, 3)])
def test_confidence_intervals_are_drawn(tmp_path: Path, drawn: list[Any], count: int, shapes: int) -> None:
    rows = [{"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.7}] * 3
    plot_runs([new_run(tmp_path, rows, seed=seed) for seed in range(count)], out=tmp_path / "x.svg")
    (axes,) = drawn
    assert len(axes.collections) == shapes
    assert [text.get_text() for text in axes.texts] == ["with 95 % intervals"]
    heights = {round(y, 6) for shape in axes.collections for path in shape.get_paths() for _, y in path.vertices}
    assert heights == {0.4, 0.7}


def test_svg_is_text_the_same_for_the_same_runs(tmp_path: Path) -> None:
    run = new_run(tmp_path, REWARDS)
    svg = plot_runs([run], ["x/y", "reward/mean"], tmp_path / "deep" / "a.svg").read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert plot_runs([run], ["x/y", "reward/mean"], tmp_path / "b.svg").read_text() == svg


def test_what_cannot_be_drawn_is_an_error(tmp_path: Path) -> None:
    run = new_run(tmp_path, REWARDS)
    with pytest.raises(ValueError, match="no run has the metric 'reward/means'; did you mean reward/mean"):
        plot_runs([run], ["reward/means"])
    with pytest.raises(ValueError, match=r"must end with \.png or \.svg"):
        plot_runs([run], out=tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="no runs to plot"):
        plot_runs([])
    with pytest.raises(ValueError, match="no run here"):
        plot_runs([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="has not finished a step yet"):
        plot_runs([new_run(tmp_path, [])])
    with pytest.raises(ValueError, match="none of reward/mean.*choose from x/y"):
        plot_runs([new_run(tmp_path, [{"x/y": 1.0}])])
