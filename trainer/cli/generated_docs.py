"""Writes the pages and tables that are made from code: `python -m trainer.cli.generated_docs`.

A test checks that they are up to date.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from trainer.cli.algorithm_table import algorithm_table, preference_table
from trainer.config.reference_docs import reference, table_cell
from trainer.run.metric_table import AREAS, METRICS

DOCS = Path("docs")
BEGIN, END = "<!-- begin: table of presets, made by `make docs` -->", "<!-- end: table of presets -->"
METRICS_INTRODUCTION = """# Metrics

This page is generated from `trainer/run/metric_table.py` and the files of the objectives by `make docs`.

A run writes one line for each step to `metrics.jsonl` in its run folder, and gives the same numbers to its trackers.
A line has the keys that apply to its run and to its step. A key is absent if there is nothing to average: the length of
correct completions, for example, if no completion is correct. A share lies between 0 and 1. Entropies and
differences of log-probs are in nats.
"""


def generated(docs: Path = DOCS) -> dict[Path, str]:
    """The text of every file of the folder `docs` that is made from code, in whole or in part.

    Raises:
        ValueError: a page does not have its two markers.
    """
    algorithms, preference = docs / "algorithms.md", docs / "algorithms" / "preference.md"
    return {
        docs / "configuration.md": reference(),
        docs / "metrics.md": metrics_page(),
        algorithms: with_block(algorithms.read_text(encoding="utf-8"), rows_block(algorithm_table())),
        preference: with_block(preference.read_text(encoding="utf-8"), rows_block(preference_table())),
    }


def metrics_page() -> str:
    """The page docs/metrics.md."""
    lines = [METRICS_INTRODUCTION]
    for area, sentence in AREAS.items():
        rows = [
            (f"`{key}`", unit, table_cell(meaning))
            for key, (unit, meaning) in METRICS.items()
            if key.partition("/")[0] == area
        ]
        lines += [f"## {area}/", "", sentence, "", *_table(("key", "unit", "meaning"), rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def rows_block(table: Table) -> str:
    """A table that `llmquest-rl algorithms` prints, in Markdown."""
    columns = table.columns
    rows = zip(*([table_cell(str(cell)) for cell in column.cells] for column in columns), strict=True)
    return "\n".join(_table([str(column.header) for column in columns], [(f"`{name}`", *rest) for name, *rest in rows]))


def with_block(page: str, block: str) -> str:
    """The page with the block between its two markers.

    Raises:
        ValueError: the page does not have each marker once, in order.
    """
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    replaced, count = re.subn(pattern, lambda _: f"{BEGIN}\n\n{block}\n\n{END}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one block between {BEGIN!r} and {END!r}, found {count}")
    return replaced


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
