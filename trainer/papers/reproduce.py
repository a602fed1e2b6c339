"""Runs a recipe: trains the arms, draws the figure, writes the numbers and checks the claims."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.schema import Config
from trainer.papers.claims import Verdict, check
from trainer.papers.figure import draw_figure
from trainer.papers.measures import MEASURES, Measure, Trained
from trainer.papers.recipe import TEACHER, Recipe, arm_config, jobs, load_recipe, stage_config
from trainer.papers.runs import run_all
from trainer.papers.series import Results, summary, with_cumulative_sums, with_roots
from trainer.papers.start import start_model
from trainer.pipeline.stages import PREFIX, with_models
from trainer.run.tracking import JsonLines
from trainer.run.trained import trained_model

WORK = Path("runs/papers")
"""Folder in which start models and runs are kept."""


@dataclass(frozen=True, slots=True)
class Report:
    """The results of a recipe."""

    verdicts: list[Verdict]
    figure: Path
    numbers: Path

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)


def reproduce(path: Path, seeds: int, out: Path | None, report: Callable[[str], None], work: Path = WORK) -> Report:
    """Train the missing runs of a recipe, measure, draw, and check its claims.

    Args:
        path: the recipe.
        seeds: number of runs of each arm; their seeds are 0, 1, ...
        out: output folder of `<name>.png` and `<name>.json`; None = `work`/<name>.
        report: called with one line for each finished run.
        work: folder for start models and runs; finished ones are used again.

    Raises:
        ConfigError: the recipe is invalid.
        ArmError: a run failed.
        ValueError: a claim or a panel names a metric that no arm has.
    """
    recipe, origin = load_recipe(path), str(path)
    out = out or work / path.stem
    out.mkdir(parents=True, exist_ok=True)
    start = start_model(recipe.start, work, origin).resolve()
    report(f"start model: {start}")
    configs = _configs(recipe, seeds, start, work, origin, report)
    results = _with_runs(recipe, configs, start, work / path.stem, report)
    figure = draw_figure(recipe.panels, results, recipe.columns, out / f"{path.stem}.png")
    verdicts = [check(claim, results) for claim in recipe.claims]
    curves = sorted({(panel.metric, panel.x) for panel in recipe.panels} | {(c.metric, "step") for c in recipe.claims})
    numbers = out / f"{path.stem}.json"
    content = {"paper": recipe.paper, "seeds": seeds, "claims": [asdict(verdict) for verdict in verdicts]}
    numbers.write_text(_json(content | {"curves": summary(results, curves)}), encoding="utf-8")
    return Report(verdicts, figure, numbers)


def _configs(
    recipe: Recipe, seeds: int, start: Path, work: Path, origin: str, report: Callable[[str], None]
) -> dict[tuple[str, int], Config]:
    """The run of every arm and seed, after the models of teacher and stages have been trained."""
    configs = {job: arm_config(recipe, *job, start, origin) for job in jobs(recipe, seeds)}
    shared: dict[str, Path] = {}
    if recipe.teacher_start is not None:
        shared[f"{PREFIX}{TEACHER}"] = start_model(recipe.teacher_start, work, origin).resolve()
        report(f"teacher: {shared[f'{PREFIX}{TEACHER}']}")
    of_seeds = _stage_models(recipe, seeds, start, work / Path(origin).stem, origin, report)
    if not shared and not recipe.stages:
        return configs
    return {job: with_models(config, shared | of_seeds[job[1]], origin) for job, config in configs.items()}


def _with_runs(
    recipe: Recipe, configs: dict[tuple[str, int], Config], start: Path, folder: Path, report: Callable[[str], None]
) -> Results:
    """Train every arm with every seed, and run the measure."""
    names = {job: f"{job[0]}, seed {job[1]}" for job in configs}
    by_name = run_all({names[job]: config for job, config in configs.items()}, folder, report)
    results: Results = defaultdict(dict)
    for (arm, seed), name in names.items():
        results[arm][seed] = with_cumulative_sums(with_roots(JsonLines(by_name[name] / "metrics.jsonl").read()))
    if recipe.measure is not None:
        measure: Measure = MEASURES.module(recipe.measure).measure
        for seed in sorted({seed for _, seed in configs}):
            own = {arm: configs[arm, seed] for arm in recipe.arms}
            trained = Trained(seed, start, own, {arm: by_name[names[arm, seed]] for arm in recipe.arms})
            for label, rows in measure(trained).items():
                results[label][seed] = rows
            report(f"measured, seed {seed}")
    return dict(results)


def _stage_models(
    recipe: Recipe, seeds: int, start: Path, folder: Path, origin: str, report: Callable[[str], None]
) -> dict[int, dict[str, Path]]:
    """Train every stage with every seed; returns the folders of the models by seed and reference."""
    jobs = {(name, seed): f"{name}, seed {seed}" for seed in range(seeds) for name in recipe.stages}
    configs = {label: stage_config(recipe, name, seed, start, origin) for (name, seed), label in jobs.items()}
    runs = run_all(configs, folder, report)
    models: dict[int, dict[str, Path]] = defaultdict(dict)
    for (name, seed), label in jobs.items():
        models[seed][f"{PREFIX}{name}"] = trained_model(str(runs[label]))
    return models


def _json(content: dict[str, Any]) -> str:
    """Indented JSON with one line per curve, so that the file and its diffs are readable."""
    curves = content.pop("curves")
    lines = [
        f"    {json.dumps(metric)}: {{\n"
        + ",\n".join(f"      {json.dumps(arm)}: {json.dumps(seeds)}" for arm, seeds in arms.items())
        + "\n    }"
        for metric, arms in curves.items()
    ]
    head = json.dumps(content, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{head},\n  "curves": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
