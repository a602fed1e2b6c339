"""Loads every recipe of the given folders (`python -m trainer.check_configs configs`) and names what is wrong."""

import sys
from collections.abc import Iterable
from pathlib import Path

from trainer.config_load import ConfigError, load_config
from trainer.recipes import recipes


def problems(folders: Iterable[Path]) -> list[str]:
    """What is wrong with the recipes in the folders: unsound, or without a first line that says what they show."""
    found = []
    for path, line in (recipe for folder in folders for recipe in recipes(folder)):
        if not line:
            found.append(f"{path}: the first line must be a comment that says what the recipe shows")
        try:
            load_config(path)
        except ConfigError as error:
            found.append(f"{path}: {error}")
    return found


if __name__ == "__main__":
    listed = problems(map(Path, sys.argv[1:]))
    print("\n".join(listed) or "every recipe loads")
    sys.exit(bool(listed))
