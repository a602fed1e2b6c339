"""The recipes in `configs/`: each begins with a comment that says what it shows."""

from pathlib import Path


def recipes(folder: Path) -> list[tuple[Path, str]]:
    """Every recipe with the first line of its comment, sorted by name.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ValueError(
            f"there are no recipes in {folder.absolute()}: run this where the repository is, or give a folder"
        )
    return [(path, first_comment(path)) for path in paths]


def first_comment(path: Path) -> str:
    """The first line of the comment at the top of a file, or nothing."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
