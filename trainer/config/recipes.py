"""Lists the recipes in `configs/`. The first line of each is a comment that describes it."""

from pathlib import Path


def recipes(folder: Path) -> list[tuple[Path, str]]:
    """Every recipe with the first line of its comment, sorted by name.

    Raises:
        ValueError: the folder has no recipes.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ValueError(
            f"no recipes in {folder.absolute()}: run the command in the repository's folder, or give another folder"
        )
    return [(path, first_comment(path)) for path in paths]


def first_comment(path: Path) -> str:
    """The first line of a file if it is a comment, without its `#`; otherwise an empty string."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
