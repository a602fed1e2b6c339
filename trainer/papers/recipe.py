"""A recipe: a start model, the arms that are compared, the figure, and the claims that must hold.

`configs/papers/<name>.yaml`, which may `inherit` from another file: `run` is a run configuration, and each arm changes
some of its keys. The first lines say what the paper shows and what the small version shows.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from llmquest_rl.loader import did_you_mean
from llmquest_rl.options import Options
from trainer.config.load import parse_config
from trainer.config.schema import Config
from trainer.config.tree import ConfigError, ConfigTree
from trainer.papers.claims import Claim
from trainer.papers.figure import Panel
from trainer.papers.measures import MEASURES, Labels

FOLDER = Path("configs/papers")
START = "start"
"""Name of the runs that make start models."""


class StartModel(Options):
    """The shape of a start model."""

    config: dict[str, Any]
    """As config.json of the architecture; the vocabulary's size and the end token are filled in."""
    characters: str = "0123456789+=;.?# "
    """The tokenizer's vocabulary: one token a character."""


class Start(Options):
    """How the model that all arms start from is made: once, kept for the next time."""

    model: StartModel
    run: dict[str, Any]
    """A run configuration without `model`: pretraining from random weights."""


class Recipe(Options):
    """One paper's claim at a size that two CPU cores run."""

    paper: str
    """Title, arXiv number, figure or table."""
    start: Start
    run: dict[str, Any]
    """A run configuration without `name`, `seed` and `model.path`: what all arms have in common."""
    arms: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Label to what is laid over `run`."""
    measure: str | None = None
    """A file of `trainer/papers/measures/`: what is computed on the models once the arms are trained."""
    panels: Annotated[tuple[Panel, ...], Field(min_length=1)]
    """The figure, from left to right."""
    columns: PositiveInt = 3
    """Panels in one row."""
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_what_there_is(self) -> Self:
        if self.measure is not None:
            MEASURES.module(self.measure)
        named = {arm for panel in self.panels for arm in panel.arms}
        named |= {arm for claim in self.claims for arm in (claim.arm, getattr(claim, "than", claim.arm))}
        known = set(self.arms) | self._measured()
        if named - known:
            unknown, there_is = (", ".join(sorted(labels)) for labels in (named - known, known))
            raise ValueError(f"claims and panels name {unknown}, which is no arm; there are: {there_is}")
        return self

    @model_validator(mode="after")
    def _leaves_what_is_set(self) -> Self:
        for place, values in (("run", self.run), *((f"arms.{arm}", values) for arm, values in self.arms.items())):
            model = values.get("model")
            path = {"model.path"} if isinstance(model, dict) and "path" in model else set()
            own = ({"name", "seed"} & set(values)) | path
            if own:
                raise ValueError(f"{place}: {', '.join(sorted(own))} follows from the recipe, the arm and the seed")
        return self

    def _measured(self) -> set[str]:
        if self.measure is None:
            return set()
        labels: Labels = MEASURES.module(self.measure).labels
        return labels(self.arms)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe and check every run configuration in it.

    Raises:
        ConfigError: with every problem found.
    """
    try:
        recipe = Recipe(**ConfigTree.read(path).values)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        ) from error
    start_config(recipe, Path("start"), str(path))
    for arm in recipe.arms:
        arm_config(recipe, arm, 0, Path("start"), str(path))
    return recipe


def find_recipe(name: str, folder: Path = FOLDER) -> Path:
    """The file of a recipe: its name, or a path.

    Raises:
        ValueError: there is none; the message lists those that there are.
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


def start_config(recipe: Recipe, model: Path, origin: str) -> Config:
    """The run that makes the start model out of the random one in folder `model`."""
    tree = ConfigTree(recipe.start.run, f"{origin}: start.run")
    own = {"name": START, "model": {"path": str(model), "init": "random"}, "objective": {"name": "next_token"}}
    tree.merge(own, origin)
    return parse_config(tree.values, f"{origin}: start.run")


def arm_config(recipe: Recipe, arm: str, seed: int, model: Path, origin: str) -> Config:
    """The run of one arm and seed from the start model in folder `model`."""
    tree = ConfigTree(recipe.run, f"{origin}: run")
    tree.merge(recipe.arms[arm], f"{origin}: arms.{arm}")
    tree.merge({"name": f"arm-{slug(arm)}", "seed": seed, "model": {"path": str(model)}}, origin)
    return parse_config(tree.values, f"{origin}: arms.{arm}")


def slug(label: str) -> str:
    """A label as part of a folder's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in label).strip("-")


def jobs(recipe: Recipe, seeds: int) -> Iterator[tuple[str, int]]:
    """(arm, seed) of every run, one seed after the other, so that an interrupted recipe has whole seeds."""
    for seed in range(seeds):
        for arm in recipe.arms:
            yield arm, seed
