"""Loads every recipe of the given folders (`python -m trainer.cli.check_configs configs`) and names what is wrong."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.config.load import ConfigError, load_config
from trainer.config.recipes import recipes
from trainer.papers.recipe import load_recipe

LOADERS: dict[str, Callable[[Path], object]] = {
    ".": load_config,
    "papers": load_recipe,
    "papers/gpu": load_config,
    "papers/gpu/stages": load_config,
}
"""How the files of a folder below the given one are read; folders that do not exist are left out."""


def problems(folders: Iterable[Path]) -> list[str]:
    """What is wrong with the recipes in the folders: unsound, or without a first line that says what they show."""
    found = []
    for folder, (below, load) in ((folder, item) for folder in folders for item in LOADERS.items()):
        if below != "." and not (folder / below).is_dir():
            continue
        for path, line in recipes(folder / below):
            if not line:
                found.append(f"{path}: the first line must be a comment that says what the recipe shows")
            try:
                load(path)
            except ConfigError as error:
                found.append(f"{path}: {error}")
    return found


if __name__ == "__main__":
    listed = problems(map(Path, sys.argv[1:]))
    print("\n".join(listed) or "every recipe loads")
    sys.exit(bool(listed))
