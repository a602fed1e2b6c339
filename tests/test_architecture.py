"""Promises of the architecture: sizes of folders, files and functions, import rules, and sound recipes."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from trainer.cli.check_configs import problems

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FOLDER_FILES = 20
"""Python files in one folder, `__init__.py` included."""
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of lines of a function without its docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_the_packages_are_found() -> None:
    assert len(SOURCES) > 50


def test_folders_have_few_enough_files_to_be_read() -> None:
    counts = Counter(relative(path.parent) for path in SOURCES)
    assert {folder: count for folder, count in counts.items() if count > MAX_FOLDER_FILES} == {}


def test_every_folder_says_what_lives_in_it() -> None:
    folders = {path.parent for path in SOURCES}
    assert [relative(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    docstrings = {
        folder: ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "" for folder in folders
    }
    assert [relative(folder) for folder, text in docstrings.items() if "import" not in text] == []


def test_files_are_short_enough_to_be_read() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short_enough_to_be_read() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > MAX_FUNCTION_LINES:
                long[f"{relative(path)}:{node.name}"] = body_lines(node)
    assert long == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [relative(path) for path in SOURCES if path.name in FORBIDDEN_NAMES] == []


def test_every_module_and_public_function_says_what_it_is() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if tree.body and ast.get_docstring(tree) is None:
            missing.append(relative(path))
        public = (
            node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        )
        missing += [f"{relative(path)}:{node.name}" for node in public if ast.get_docstring(node) is None]
    assert missing == []


def test_the_trainer_never_asks_which_objective_it_runs() -> None:
    asks = re.compile(r"\b(if|elif|match)\b.*\bobjective\b.*(name|==|\bis\b(?! not None| None)|isinstance)")
    named = re.compile(r"""['"](policy|next_token)['"]""")
    found = [
        f"{relative(path)}:{number}"
        for path in (ROOT / "trainer").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if asks.search(line) or (named.search(line) and "==" in line)
    ]
    assert found == []


def test_the_import_rules_hold() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run([sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_recipe_loads_and_says_what_it_shows() -> None:
    assert problems([ROOT / "configs"]) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_states_its_hardware(recipe: Path) -> None:
    comment = [line for line in recipe.read_text().splitlines()[:6] if line.startswith("#")]
    assert any("Hardware:" in line for line in comment)


def test_no_requirement_file_names_a_host() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        assert "://" not in path.read_text(), path
