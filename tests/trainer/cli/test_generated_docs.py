"""The generated pages are up to date, and the table of metrics has the names that the code logs: all and no others."""

import ast
import json
import re
from pathlib import Path

import pytest

from llmquest_rl.objectives import OBJECTIVES
from tests.trainer.conftest import Runs
from trainer.cli.generated_docs import BEGIN, END, generated, with_block
from trainer.run.metric_table import AREAS, METRICS, entry

ROOT = Path(__file__).parents[3]
PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")
KEY_OF_RANDOM_NUMBERS = "train/<>"
"""Looks like a metric's name and is none: see `seed_for`."""
PREFIXES = ("eval", "data")
"""Areas that the code puts before other names: those of the objectives (`train/loss`), those of counters."""


def test_the_pages_are_up_to_date() -> None:
    stale = [path for path, text in generated(ROOT / "docs").items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run `make docs`"


def test_a_page_without_markers_is_an_error() -> None:
    assert with_block(f"a\n{BEGIN}old{END}\nb", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb"
    with pytest.raises(ValueError, match="found 0"):
        with_block("a page", "new")


def texts() -> set[str]:
    """Every string of the code except docstrings and descriptions, with `<>` for each field of an f-string."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if path.name in ("metric_table.py", "renamed_keys.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        described = {id(part) for node in tree.body if is_description(node) for part in ast.walk(node)}
        left_out = docstrings | pieces | described
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values)
                found.add("".join(parts))
    return found


def is_description(node: ast.stmt) -> bool:
    """Whether a statement is the table `METRICS` of an objective."""
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "METRICS"


def written(name: str) -> str:
    """A name of the table as the code writes it."""
    return re.sub("<[a-z]+>", "<>", name)


def test_every_metric_of_the_code_is_in_the_table() -> None:
    names = re.compile(rf"({'|'.join(AREAS)})/[a-z0-9_<>/]+")
    logged = {text for text in texts() if names.fullmatch(text)} - {KEY_OF_RANDOM_NUMBERS}
    whole_areas = {f"{area}/<>" for area in AREAS}
    assert len(logged) > 100
    assert logged - whole_areas - set(map(written, METRICS)) == set()


def test_the_table_has_no_metric_that_the_code_does_not_log() -> None:
    """The code writes a name out, or puts an area before its rest, or puts `_max` after it."""
    found = texts()
    rests = found | {text.partition("/")[2] for text in found}

    def is_logged(name: str) -> bool:
        area, _, rest = name.partition("/")
        takes_any_rest = f"{area}/<>" in found and (area in PREFIXES or rest.startswith("<>"))
        is_maximum = name.endswith("_max") and "<>_max" in found and name.removesuffix("_max") in found
        return name in found or is_maximum or (takes_any_rest and rest in rests)

    assert {name for name in METRICS if not is_logged(written(name))} == set()


def test_objectives_that_log_the_same_name_agree_on_its_unit() -> None:
    tables = [OBJECTIVES.module(name).METRICS for name in OBJECTIVES.names()]
    assert all(METRICS[key][0] == unit for table in tables for key, (unit, _) in table.items())


def test_every_entry_is_complete() -> None:
    assert {name.partition("/")[0] for name in METRICS} == AREAS.keys()
    assert [name for name, (_, meaning) in METRICS.items() if not meaning.endswith(".") or not meaning[0].strip()] == []


def test_a_key_is_found_by_itself_or_by_its_pattern() -> None:
    assert entry("reward/mean") == "reward/mean"
    assert entry("reward/exact_number") == "reward/<name>"
    assert entry("reward/failed_timeout") == "reward/failed_<kind>"
    assert entry("reward/style/length") == "reward/<name>/<component>"
    assert entry("eval/pass_at_4_low") == "eval/pass_at_<k>_low"
    assert entry("rollout/unheard_of") is None


OPTIONS = (
    "algorithm.name=dapo",
    "algorithm.overlong_filter=false",
    "algorithm.beta=0.05",
    "batch.minibatches_per_step=2",
)


def test_what_a_run_logs_is_in_the_table(runs: Runs) -> None:
    folder = runs.train("steps=2", "eval.samples_per_prompt=2", *OPTIONS)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {key for line in lines for key in json.loads(line)} - {"step"}
    assert len(keys) > 60
    assert {key for key in keys if entry(key) is None} == set()
    by_pattern = {key for key in keys if key not in METRICS}
    assert by_pattern == {"reward/low_characters", "eval/pass_at_2", "eval/pass_at_2_low", "eval/pass_at_2_high"}
