"""The configuration reference is generated from the typed tree, and every option has a description."""

from pathlib import Path

from trainer.config.reference_docs import TARGET, reference

ROOT = Path(__file__).parents[3]


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / TARGET).read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_option_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.rstrip("| ").endswith("|") or row.split("|")[-2].strip() == ""] == []
