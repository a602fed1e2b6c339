"""Every option of the configuration reference has a description."""

from trainer.config.reference_docs import reference


def test_every_option_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.rstrip("| ").endswith("|") or row.split("|")[-2].strip() == ""] == []


def test_types_are_called_as_in_python() -> None:
    types = {line.split(" | ")[1] for line in reference().splitlines() if line.startswith("| `")}
    assert {"`int`", "`float`", "`str`", "`bool`"} <= types
