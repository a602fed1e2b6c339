"""The stages of a pipeline: run configurations, in which `stage:NAME` stands for the model that a stage before trains.

A pipeline is a YAML file with the list `stages`. A stage is a run configuration with a name; it may `inherit` a recipe,
whose keys it changes. `shared` holds keys of every stage. `stage:NAME` is the model of that stage's last checkpoint,
and `stage:NAME@best` or `stage:NAME@200` that of another one.
"""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from llmquest_rl.loader import did_you_mean
from llmquest_rl.options import Options
from trainer.config.load import STAGES, parse_config, read_options, validated
from trainer.config.schema import Config
from trainer.config.tree import COMMAND_LINE, ConfigError, ConfigTree

PREFIX = "stage:"
"""Begins a reference to the model of a stage."""
SHARED = "shared"
"""Section with keys of every stage, and the name by which overrides address all of them."""
LATEST = "latest"


class PipelineFile(Options):
    """The content of a pipeline's file."""

    shared: dict[str, Any] = {}
    """Keys that all stages have. A stage's own value counts more, that of a recipe which it inherits counts less."""
    stages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    """Run configurations in the order of their training."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference to a trained model, `stage:NAME` or `stage:NAME@CHECKPOINT`."""

    text: str
    stage: str
    checkpoint: str
    """`latest`, `best` or the number of a step."""

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference, which begins with `PREFIX`."""
        stage, _, checkpoint = text.removeprefix(PREFIX).partition("@")
        return cls(text, stage, checkpoint or LATEST)


def load_pipeline(path: Path, overrides: Iterable[str] = ()) -> dict[str, Config]:
    """Read and validate every stage of a pipeline; returns configurations by name, with their references.

    Args:
        path: a YAML file.
        overrides: `NAME.key=value` each, for one stage, or `shared.key=value` for all of them.

    Raises:
        ConfigError: the file, a stage, a reference or an override is invalid; the message lists every problem.
    """
    if STAGES not in ConfigTree.read(path).values:
        raise ConfigError([f"{path}: the file has no `stages`: run it with `llmquest-rl train {path}`"])
    file = read_options(PipelineFile, path)
    trees = [_tree(file, number, path) for number in range(len(file.stages))]
    problems = _apply(overrides, {str(tree.values.get("name")): tree for tree in trees})
    if problems:
        raise ConfigError(problems)
    stages: dict[str, Config] = {}
    for tree in trees:
        config = validated(tree)
        if config.name in (*stages, SHARED):
            raise ConfigError([f"{path}: two stages are called {config.name!r}, or one {SHARED!r}: rename one of them"])
        check_references(config, stages, str(path))
        stages[config.name] = config
    return stages


def _tree(file: PipelineFile, number: int, path: Path) -> ConfigTree:
    own = dict(file.stages[number])
    origin = f"{path}: stages.{number}"
    inherited = {"inherit": own.pop("inherit")} if "inherit" in own else {}
    tree = ConfigTree.inheriting(inherited, path, origin)
    tree.merge(deepcopy(file.shared), f"{path}: {SHARED}")  # an override changes the sections of one stage
    tree.merge(own, origin)
    return tree


def _apply(overrides: Iterable[str], trees: Mapping[str, ConfigTree]) -> list[str]:
    """Apply overrides to the stages that they name; returns the problems with them."""
    problems = []
    for text in overrides:
        name = max((name for name in (*trees, SHARED) if text.startswith(f"{name}.")), key=len, default=None)
        if name is None:
            known = f"expected STAGE.KEY=VALUE, with a stage of {', '.join(trees)}, or {SHARED}.KEY=VALUE for all"
            problems.append(f"{COMMAND_LINE}: {text!r}: {known}")
            continue
        chosen = trees.values() if name == SHARED else [trees[name]]
        problems += [found for tree in chosen if (found := tree.override(text.removeprefix(f"{name}.")))]
    return problems


def check_references(config: Config, earlier: Mapping[str, Config], origin: str) -> None:
    """Check that every reference names an earlier stage, and a checkpoint that this stage will have.

    Raises:
        ConfigError: one does not; the message says what is possible.
    """
    for reference in references(config):
        place = f"{origin}: {config.name}: {reference.text}"
        if reference.stage not in earlier:
            hint = did_you_mean(reference.stage, sorted(earlier), list_all=True) if earlier else ", this is the first"
            raise ConfigError([f"{place}: there is no such stage before this one{hint}"])
        if reference.checkpoint == "best" and earlier[reference.stage].checkpoint.best_metric is None:
            raise ConfigError([f"{place}: that stage has no best checkpoint: set its checkpoint.best_metric"])
        if reference.checkpoint not in (LATEST, "best") and not reference.checkpoint.isdecimal():
            raise ConfigError([f"{place}: expected `@{LATEST}`, `@best` or `@` and the number of a step"])


def references(config: Config) -> list[Reference]:
    """The references in a configuration, each once."""
    found = _texts(config.model_dump(mode="json"))
    return [Reference.parse(text) for text in dict.fromkeys(found) if text.startswith(PREFIX)]


def with_models(config: Config, models: Mapping[str, Path], origin: str) -> Config:
    """The configuration with a folder in place of each reference.

    Args:
        config: a configuration with references.
        models: folder of the model by the text of its reference.
        origin: name of the configuration's source in error messages.

    Raises:
        ConfigError: the configuration is invalid with these paths.
    """
    return parse_config(_replaced(config.model_dump(mode="json"), models), origin)


def _texts(value: Any) -> Iterator[str]:
    """Every string in nested values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _replaced(value: Any, models: Mapping[str, Path]) -> Any:
    if isinstance(value, Mapping):
        return {key: _replaced(item, models) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, models) for item in value]
    return str(models[value]) if isinstance(value, str) and value in models else value
