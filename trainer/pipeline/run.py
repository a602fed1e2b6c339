"""Trains the stages of a pipeline in order. Finished stages are kept, and an interrupted one is resumed."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config.load import dump
from trainer.config.schema import Config
from trainer.pipeline.stages import PREFIX, Reference, references, with_models
from trainer.run.folder import MARKER, RunFolder
from trainer.run.trained import newest_step, trained_model

RUNS = Path("runs")
"""Folder of all runs."""


class StageStoppedError(RuntimeError):
    """A stage was stopped before its last step, so the stages after it were not trained."""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """An earlier run with a given configuration."""

    path: Path
    step: int | None
    """The step of its newest complete checkpoint; None = it has none."""


@dataclass(frozen=True, slots=True)
class FinishedStage:
    """A stage with the checkpoint of its last step."""

    name: str
    run: Path
    how: Literal["kept", "resumed", "trained"]


def find_run(config: Config, runs: Path = RUNS) -> FoundRun | None:
    """The run below `runs`/<name> with exactly this configuration that got furthest, or None; of several the newest."""
    wanted = dump(config)
    markers = sorted((runs / config.name).resolve().glob(f"*/{MARKER}"), reverse=True)
    folders = [marker.parent for marker in markers if marker.read_text(encoding="utf-8") == wanted]
    found = [FoundRun(folder, newest_step(RunFolder(folder))) for folder in folders]
    return max(found, key=lambda run: run.step or 0, default=None)


def run_stages(
    stages: Mapping[str, Config], origin: str, begin: Callable[[str], object] = lambda line: None
) -> Iterator[FinishedStage]:
    """Train the stages in order, and yield each as soon as it has ended.

    A stage is kept if a finished run has the same configuration, in which references are the folders of models. So a
    stage is trained again if a stage was trained again from which it starts. A change of the code or of a data file
    does not count: delete the folder of the run then.

    Args:
        stages: configurations by name, with references to earlier stages.
        origin: name of the pipeline in error messages.
        begin: called with one line before a stage is trained.

    Raises:
        StageStoppedError: Ctrl-C or SIGTERM stopped a stage; its checkpoint is complete.
        ValueError, ClusterError: a stage cannot start (see `trainer.assemble.assemble`).
    """
    done: dict[str, FinishedStage] = {}
    for number, (name, config) in enumerate(stages.items(), start=1):
        ready = _ready(config, {earlier: stage.run for earlier, stage in done.items()}, origin)
        done[name] = _trained(ready, begin, f"stage {number} of {len(stages)}: {name}")
        yield done[name]


def _ready(config: Config, runs: Mapping[str, Path], origin: str) -> Config:
    """The configuration with the models of finished runs, given by the name of their stage."""
    folders = {found.text: _model(runs[found.stage], found) for found in references(config)}
    return with_models(config, folders, origin)


def _model(run: Path, reference: Reference) -> Path:
    """The folder of a model, relative to the working directory if it is below it: the project may then be moved."""
    path = trained_model(str(run), reference.checkpoint)
    here = Path.cwd().resolve()
    return Path(os.path.relpath(path, here)) if path.is_relative_to(here) else path


def _trained(config: Config, begin: Callable[[str], object], line: str) -> FinishedStage:
    found = find_run(config)
    if found is not None and found.step == config.steps:
        return FinishedStage(config.name, found.path, "kept")
    from trainer.loop import train  # imports torch, which a pipeline of finished stages does not need

    resumed = found.path if found is not None and found.step is not None else None
    begin(f"{line} goes on after step {found.step}" if found is not None and resumed is not None else line)
    run = train(config, resumed)
    reached = newest_step(RunFolder.open(run))
    if reached != config.steps:
        raise StageStoppedError(
            f"the stage {config.name} was stopped after step {reached or 0} of {config.steps} ({run}): repeat the "
            "command, which goes on from there"
        )
    return FinishedStage(config.name, run, "resumed" if resumed else "trained")


def finished_stages(stages: Mapping[str, Config], origin: str) -> dict[str, Path]:
    """Run folders, by name, of the first stages that need no training, up to the first one that does."""
    done: dict[str, Path] = {}
    for name, config in stages.items():
        found = find_run(_ready(config, done, origin))
        if found is None or found.step != config.steps:
            return done
        done[name] = found.path
    return done


def as_far_as_known(config: Config, stages: Mapping[str, Config], done: Mapping[str, Path]) -> Config:
    """A configuration for a dry run before all stages that it refers to have been trained.

    A model that does not exist yet is replaced by the one that its stage starts from, which has the same tokenizer.
    Reward models that do not exist yet are left out.

    Args:
        config: a stage.
        stages: the stages by name.
        done: run folders of the finished stages by name.
    """
    values = config.model_dump(mode="json")
    values["model"] |= _known_model(config, stages, done)
    judges = [judge for judge in values["reward_models"] if not _is_open(judge["path"], done)]
    values["reward_models"] = [judge | {"path": _known_path(judge["path"], done)} for judge in judges]
    return Config(**values)


def _known_model(config: Config, stages: Mapping[str, Config], done: Mapping[str, Path]) -> dict[str, str]:
    """Path and init of the model that a stage starts from, or else of the one that this model is trained from."""
    model = config.model
    while _is_open(model.path, done):
        model = stages[Reference.parse(model.path).stage].model
    return {"path": _known_path(model.path, done), "init": model.init}


def _is_open(path: str, done: Mapping[str, Path]) -> bool:
    return path.startswith(PREFIX) and Reference.parse(path).stage not in done


def _known_path(path: str, done: Mapping[str, Path]) -> str:
    reference = Reference.parse(path)
    return str(_model(done[reference.stage], reference)) if path.startswith(PREFIX) else path
