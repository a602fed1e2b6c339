"""Three checks that MkDocs lacks. Each of them logs a warning, which `mkdocs build --strict` counts as an error.

1. The pages link to source files, which are no part of the site. Such a link becomes its text on the site, and the file
   must exist.
2. The other Markdown files of the repository (README and the like) have no dead links.
3. No page loads a script, a font or a picture from another host: the site works without a network.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify

log = logging.getLogger("mkdocs.hooks")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OTHER_MARKDOWN = ("*.md", "*/*.md")
LINK = re.compile(r"(?P<code>^ *```.*?^ *```)|!?\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE)
"""A fenced block of code, in which nothing is a link, or a link with its text and its target."""
EXTERNAL = re.compile(r"^(\w+:|//)")
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?P<src>https?:[^\"'\s>]+)"
    r"|<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?(?P<href>https?:[^\"'\s>]+)"
)
"""Something that a browser fetches from another host while it shows a page."""


def on_pre_build(config: Any) -> None:
    """Check the Markdown files outside docs/."""
    for path in other_markdown(ROOT):
        for problem in dead_links(path):
            log.warning("%s: %s", path.relative_to(ROOT), problem)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside docs/ into their text."""
    source = DOCS / page.file.src_uri

    def replaced(match: re.Match[str]) -> str:
        if match["code"] or EXTERNAL.match(match["target"]):
            return match[0]
        path = linked_file(source, match["target"])
        if path.is_relative_to(DOCS):
            return match[0]
        if not path.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match["target"])
        return match["text"]

    return LINK.sub(replaced, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Look for anything that a page would fetch from another host."""
    for match in LOADED.finditer(output):
        log.warning(
            "%s loads %s: the site must work without a network", page.file.src_uri, match["src"] or match["href"]
        )
    return output


def other_markdown(root: Path) -> list[Path]:
    """The Markdown files at the root and one folder below it, without those of the site and of hidden folders."""
    found = (path for pattern in OTHER_MARKDOWN for path in root.glob(pattern))
    return sorted(path for path in found if path.parent.name != "docs" and not path.parent.name.startswith("."))


def dead_links(path: Path) -> Iterator[str]:
    """One sentence for each relative link of the file that leads to no file or to no heading."""
    for match in LINK.finditer(path.read_text(encoding="utf-8")):
        target = match["target"]
        if match["code"] or EXTERNAL.match(target):
            continue
        linked = linked_file(path, target)
        heading = target.partition("#")[2]
        if not linked.exists():
            yield f"the link to {target} leads nowhere"
        elif heading and heading not in headings(linked):
            yield f"{target.partition('#')[0] or path.name} has no heading #{heading}"


def linked_file(source: Path, target: str) -> Path:
    """The absolute path that a relative link in the file `source` leads to."""
    path = target.partition("#")[0]
    return (source.parent / path).resolve() if path else source


def headings(path: Path) -> set[str]:
    """The anchors of a Markdown file, one for each heading."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {slugify(line.lstrip("#").strip().replace("`", ""), "-") for line in lines if line.startswith("#")}
