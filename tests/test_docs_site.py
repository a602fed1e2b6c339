"""The documentation site: it builds, it needs no network, and every kind of dead link ends a strict build."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]
GOOD = {
    "docs/index.md": "# Start\n\n[source](../code.py), [page](page.md#a-heading), `[x](a)`\n\n```\n[x](a)\n```\n",
    "docs/page.md": "# Page\n\n## A heading\n\n![picture](picture.png)\n",
    "docs/picture.png": "",
    "code.py": "",
    "README.md": "# Read me\n\n[the page](docs/page.md#a-heading), [elsewhere](https://example.org)\n",
}
BROKEN = {
    "a page that does not exist": ("docs/index.md", "[gone](gone.md)"),
    "a heading that does not exist": ("docs/index.md", "[gone](page.md#gone)"),
    "a heading of the same page": ("docs/index.md", "[gone](#gone)"),
    "a picture that does not exist": ("docs/index.md", "![gone](gone.png)"),
    "a source file that does not exist": ("docs/index.md", "[gone](../gone.py)"),
    "a page that the navigation lacks": ("docs/hidden.md", "# Hidden"),
    "a file that README links to": ("README.md", "[gone](docs/gone.md)"),
    "a heading that README links to": ("README.md", "[gone](docs/page.md#gone)"),
    "a picture of another host": ("docs/index.md", "![far](https://example.org/far.png)"),
}


def build_site(config: Path, site: Path) -> None:
    build(load_config(str(config), strict=True, site_dir=str(site)))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site of two pages with the settings and the hook of the real one; returns its folder."""
    for name, text in GOOD.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copytree(ROOT / "docs" / "hooks", tmp_path / "docs" / "hooks", ignore=shutil.ignore_patterns("__pycache__"))
    settings: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    settings["nav"] = ["index.md", "page.md"]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_the_site_builds_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    build_site(ROOT / "mkdocs.yml", tmp_path)
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert len(pages) > 30
    fetched = re.compile(r"<(?:script|img)[^>]*src=\"?https?:|<link[^>]*href=\"?https?:|@import\s+url\(\"?https?:")
    styles = [path.read_text() for path in tmp_path.rglob("*.css")]
    assert [found for text in (*pages, *styles) for found in fetched.findall(text)] == []


def test_links_to_source_files_become_text(small: Path) -> None:
    build_site(small / "mkdocs.yml", small / "site")
    page = (small / "site" / "index.html").read_text()
    assert "<p>source, <a" in page
    assert "[x](a)</code>" in page and "code.py" not in page


@pytest.mark.parametrize("name", BROKEN)
def test_a_dead_link_ends_the_build(name: str, small: Path) -> None:
    file, text = BROKEN[name]
    path = small / file
    path.write_text((path.read_text() if path.exists() else "") + "\n" + text + "\n")
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        build_site(small / "mkdocs.yml", small / "site")


def test_every_target_of_the_makefile_has_one_sentence_of_help() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert targets == set(re.findall(r"^([a-z]+):.*## [A-Z].*\.$", makefile, re.MULTILINE))
    assert targets == set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
