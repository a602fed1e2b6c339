"""Loads every recipe of the given folders and prints the problems: `python -m trainer.cli.check_configs configs`."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.config.load import STAGES, ConfigError, load_config
from trainer.config.recipes import recipes
from trainer.config.tree import read_yaml
from trainer.papers.recipe import load_recipe
from trainer.pipeline.stages import load_pipeline


def load_recipe_or_pipeline(path: Path) -> object:
    """Load a run configuration, or a file with several of them.

    Raises:
        ConfigError: the file is invalid.
    """
    return load_pipeline(path) if STAGES in read_yaml(path) else load_config(path)


LOADERS: dict[str, Callable[[Path], object]] = {
    ".": load_recipe_or_pipeline,
    "papers": load_recipe,
    "papers/gpu": load_config,
    "papers/gpu/stages": load_config,
}
"""Loader of the files by subfolder; missing subfolders are skipped."""


def problems(folders: Iterable[Path]) -> list[str]:
    """Problems of the recipes in the folders: invalid ones, and those that do not start with a comment."""
    found = []
    for folder, (below, load) in ((folder, item) for folder in folders for item in LOADERS.items()):
        if below != "." and not (folder / below).is_dir():
            continue
        for path, line in recipes(folder / below):
            if not line:
                found.append(f"{path}: the first line must be a comment that describes the recipe")
            try:
                load(path)
            except ConfigError as error:
                found.append(f"{path}: {error}")
    return found


if __name__ == "__main__":
    listed = problems(map(Path, sys.argv[1:]))
    print("\n".join(listed) or "every recipe loads")
    sys.exit(bool(listed))
