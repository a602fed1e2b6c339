"""Recipes of papers: a start model, the arms to compare, a figure, and the claims to check.

A recipe is a file `configs/papers/<name>.yaml`, which may `inherit` from another file. `run` is a run configuration,
and each arm changes some of its keys. The first lines describe the paper's result and the result of this small version.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from llmquest_rl.loader import did_you_mean
from llmquest_rl.options import Options
from trainer.config.load import parse_config, read_options
from trainer.config.schema import Config
from trainer.config.tree import ConfigTree
from trainer.papers.claims import Claim
from trainer.papers.figure import Panel
from trainer.papers.measures import MEASURES, Labels
from trainer.pipeline.stages import check_references

FOLDER = Path("configs/papers")
START = "start"
"""Name of the runs that pretrain start models."""
TEACHER = "teacher"
"""Name of the stage that stands for the recipe's second start model."""


class StartModel(Options):
    """Architecture and tokenizer of a start model."""

    config: dict[str, Any]
    """Contents of config.json; the size of the vocabulary and the end token are filled in."""
    characters: str = "0123456789+=;.?# "
    """Vocabulary of the tokenizer: each character is a token."""


class Start(Options):
    """The model that all arms start from. It is pretrained once and kept for later runs."""

    model: StartModel
    run: dict[str, Any]
    """Run configuration of the pretraining from random weights, without `model`."""


class Recipe(Options):
    """The claims of one paper at a size that two CPU cores can train."""

    paper: str
    """Title, arXiv number, and figure or table."""
    start: Start
    teacher: dict[str, Any] | None = None
    """Keys of `start` that differ for a second model, which is pretrained in the same way and kept as well. Arms name
    it as `objective: {name: distill, teacher: "stage:teacher"}`. null = there is none."""
    stages: dict[str, dict[str, Any]] = {}
    """Run configurations of further models that are trained from the start model for each seed, by name: `stage:NAME`
    in `run` or in an arm is the trained model, e.g. a reward model."""
    run: dict[str, Any]
    """Run configuration that all arms share, without `name`, `seed` and `model.path`."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Keys that each arm changes in `run`, by label."""
    measure: str | None = None
    """A file of `trainer/papers/measures/`, which computes numbers from the trained models."""
    panels: Annotated[tuple[Panel, ...], Field(min_length=1)]
    """Panels of the figure, from left to right."""
    columns: PositiveInt = 3
    """Number of panels in one row."""
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.measure is not None:
            MEASURES.module(self.measure)
        named = {arm for panel in self.panels for arm in panel.arms}
        named |= {arm for claim in self.claims for arm in (claim.arm, getattr(claim, "than", claim.arm))}
        known = set(self.arms) | self._measured()
        if named - known:
            unknown, existing = (", ".join(sorted(labels)) for labels in (named - known, known))
            raise ValueError(f"claims or panels name {unknown}, which is not an arm; the arms are: {existing}")
        return self

    @model_validator(mode="after")
    def _check_reserved_keys(self) -> Self:
        sections = {"run": self.run} | {f"arms.{arm}": values for arm, values in self.arms.items()}
        sections |= {f"stages.{name}": values for name, values in self.stages.items()}
        for place, values in sections.items():
            model = values.get("model")
            path = {"model.path"} if isinstance(model, dict) and "path" in model else set()
            own = ({"name", "seed"} & set(values)) | path
            if own:
                raise ValueError(
                    f"{place}: remove {', '.join(sorted(own))}; the recipe, the arm and the seed determine it"
                )
        return self

    @property
    def teacher_start(self) -> Start | None:
        """The section `start` of the teacher."""
        if self.teacher is None:
            return None
        tree = ConfigTree(self.start.model_dump(), "start")
        tree.merge(self.teacher, "teacher")
        return Start(**tree.values)

    def _measured(self) -> set[str]:
        if self.measure is None:
            return set()
        labels: Labels = MEASURES.module(self.measure).labels
        return labels(self.arms)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe and check every run configuration in it.

    Raises:
        ConfigError: the recipe is invalid; the message lists every problem.
    """
    recipe = read_options(Recipe, path)
    for start in filter(None, (recipe.start, recipe.teacher_start)):
        start_config(start, Path("start"), str(path))
    stages = {name: stage_config(recipe, name, 0, Path("start"), str(path)) for name in recipe.stages}
    if recipe.teacher_start is not None:
        stages[TEACHER] = start_config(recipe.teacher_start, Path("start"), str(path))
    for arm in recipe.arms:
        check_references(arm_config(recipe, arm, 0, Path("start"), str(path)), stages, str(path))
    return recipe


def find_recipe(name: str, folder: Path = FOLDER) -> Path:
    """The file of a recipe, given by name or path.

    Raises:
        ValueError: the recipe does not exist; the message lists those that do.
    """
    path = Path(name)
    if path.suffix == ".yaml" and path.is_file():
        return path
    if not (folder / f"{name}.yaml").is_file():
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        raise ValueError(
            f"there is no recipe {name!r} in {folder.absolute()}{did_you_mean(name, known, list_all=True)}"
        )
    return folder / f"{name}.yaml"


def start_config(start: Start, model: Path, origin: str) -> Config:
    """Configuration of the run that pretrains a start model from the shape in folder `model`."""
    tree = ConfigTree(start.run, f"{origin}: start.run")
    own = {"name": START, "model": {"path": str(model), "init": "random"}, "objective": {"name": "next_token"}}
    tree.merge(own, origin)
    return parse_config(tree.values, f"{origin}: start.run")


def stage_config(recipe: Recipe, name: str, seed: int, model: Path, origin: str) -> Config:
    """Configuration of the run of one stage and seed, which starts from the model in folder `model`."""
    tree = ConfigTree(recipe.stages[name], f"{origin}: stages.{name}")
    tree.merge({"name": f"stage-{slug(name)}", "seed": seed, "model": {"path": str(model)}}, origin)
    return parse_config(tree.values, f"{origin}: stages.{name}")


def arm_config(recipe: Recipe, arm: str, seed: int, model: Path, origin: str) -> Config:
    """Configuration of the run of one arm and seed, which starts from the model in folder `model`."""
    tree = ConfigTree(recipe.run, f"{origin}: run")
    tree.merge(recipe.arms[arm], f"{origin}: arms.{arm}")
    tree.merge({"name": f"arm-{slug(arm)}", "seed": seed, "model": {"path": str(model)}}, origin)
    return parse_config(tree.values, f"{origin}: arms.{arm}")


def slug(label: str) -> str:
    """Convert a label to a part of a folder's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in label).strip("-")


def jobs(recipe: Recipe, seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed) of every run, ordered by seed, so that an interrupted recipe has complete seeds."""
    for seed in range(seeds):
        for arm in recipe.arms:
            yield arm, seed
