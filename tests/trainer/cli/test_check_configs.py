"""The check of all recipes names the broken ones in every folder."""

import shutil
from pathlib import Path

import pytest

from tests.trainer.conftest import ROOT
from trainer.cli.check_configs import LOADERS, problems

SOUND = {".": "quickstart", "papers": "kl_estimators", "papers/gpu": "kl_estimators", "papers/gpu/stages": "hh_sft"}
"""A recipe of each folder."""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """One sound recipe in each folder."""
    for below, name in SOUND.items():
        (tmp_path / below).mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "configs" / below / f"{name}.yaml", tmp_path / below)
    shutil.copytree(ROOT / "configs" / "papers" / "parts", tmp_path / "papers" / "parts")
    return tmp_path


def test_sound_recipes_have_no_problems(configs: Path) -> None:
    assert set(SOUND) == set(LOADERS)
    assert problems([configs]) == []


@pytest.mark.parametrize(("below", "name"), SOUND.items())
def test_a_broken_recipe_is_named_and_the_others_are_not(configs: Path, below: str, name: str) -> None:
    path = configs / below / f"{name}.yaml"
    path.write_text(path.read_text() + "\nstepz: 3\n")
    [problem] = problems([configs])
    assert problem.startswith(f"{path}: ") and "stepz" in problem


@pytest.mark.parametrize(("below", "name"), SOUND.items())
def test_a_recipe_that_does_not_say_what_it_shows_is_named(configs: Path, below: str, name: str) -> None:
    path = configs / below / f"{name}.yaml"
    path.write_text("\n" + path.read_text())
    assert problems([configs]) == [f"{path}: the first line must be a comment that describes the recipe"]


def test_a_broken_arm_is_named(configs: Path) -> None:
    path = configs / "papers" / "kl_estimators.yaml"
    path.write_text(path.read_text().replace("name: grpo", "name: grop"))
    [problem] = problems([configs])
    assert problem.startswith(f"{path}: ") and "arms.trained policy" in problem and "grop" in problem


def test_folders_of_papers_may_be_missing(configs: Path) -> None:
    shutil.rmtree(configs / "papers")
    assert problems([configs]) == []
