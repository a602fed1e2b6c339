"""Components found by name: every kind, a user's own files and modules, and the message for each mistake."""

import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import DATASETS
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import MalformedRows
from llmquest_rl.data.task import open_task
from llmquest_rl.data.tasks import TASKS
from llmquest_rl.loader import ComponentError, ComponentKind, absolute_name, did_you_mean
from llmquest_rl.objectives import OBJECTIVES
from llmquest_rl.options import options_class
from rewards.builtin import REWARDS
from rewards.config import RewardConfig
from rewards.grader import Grader
from rewards.load import RewardError, load_reward
from rewards.types import GradeItem
from rollout import ENGINES
from trainer.config.load import ConfigError, dump, parse_config

ROOT = Path(__file__).parents[1]
KINDS = {"task": TASKS, "dataset": DATASETS, "objective": OBJECTIVES, "engine": ENGINES, "reward": REWARDS}
WHOLE = ("objective", "engine")
"""Kinds that are a whole module: one function is not enough."""
MODULE = """
from llmquest_rl.options import Options

class Config(Options):
    size: int = 3

def load(config, *rest): ...
def build(config, *rest):
    from llmquest_rl.objectives import Supervised
    return Supervised()
def check(config, *rest): ...
def reward(completion): return 1.0
"""


def open_component(kind: str, name: str, **options: Any) -> None:
    """Open a component as a run does, from a section of a configuration; a reward then as a grader process does.

    Raises:
        ConfigError: the configuration is refused.
        RewardError: the reward is.
    """
    section = {"name": name, **options}
    data: dict[str, Any] = {"task": {"name": "arithmetic"}, "dataset": {"name": "text"}}
    run: dict[str, Any] = {"name": "a", "steps": 1, "data": data, "rewards": [{"name": "exact_number"}]}
    if kind == "reward":
        config = parse_config({**run, "rewards": [{"function": name, **options}]})
        load_reward(config.rewards[0])
    elif kind in ("task", "dataset"):
        parse_config({**run, "data": {**data, kind: section}})
    else:
        parse_config({**run, "objective": section} if kind == "objective" else {**run, "rollout": {"engine": section}})


def refusal(kind: str, name: str, **options: Any) -> str:
    with pytest.raises((ConfigError, RewardError)) as caught:
        open_component(kind, name, **options)
    return str(caught.value)


def users_name(kind: str, file: Path | str, function: str = "mine") -> str:
    return str(file) if kind in WHOLE else f"{file}:{function}"


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_an_unknown_name_is_told_its_neighbours_and_every_name(kind: str) -> None:
    *_, near = KINDS[kind].names()
    message = refusal(kind, f"{near}x")
    assert f"'{near}x' is not the name of {KINDS[kind].noun}; did you mean {near}" in message
    assert all(name in message for name in KINDS[kind].names())
    assert f"there are: {', '.join(KINDS[kind].names())} (your own code: `path/file.py" in refusal(kind, "zzz")


@every_kind
def test_a_missing_file_is_told_with_the_folder_that_paths_start_at(kind: str) -> None:
    message = refusal(kind, users_name(kind, "nowhere/mine.py"))
    assert f"there is no file {Path.cwd()}/nowhere/mine.py (relative paths start at {Path.cwd()})" in message


@every_kind
def test_a_missing_function_is_told_the_functions_that_resemble_it(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def bild(): ...\ndef min_e(): ...\n")
    message = refusal(kind, users_name(kind, file))
    expected = "'build'; did you mean bild?" if kind in WHOLE else "'mine'; did you mean min_e?"
    assert f"{file} has no function {expected}" in message


@every_kind
def test_a_missing_module_is_told_where_it_was_looked_for(kind: str) -> None:
    message = refusal(kind, users_name(kind, "no_such_package.module"))
    assert f"there is no module 'no_such_package', neither in the current folder {Path.cwd()} nor installed" in message


@every_kind
@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("import surely_missing", 2, "ModuleNotFoundError: No module named 'surely_missing'"),
        ("def broken(:", 2, "SyntaxError: invalid syntax"),
        ("value = {}['key']", 2, "KeyError: 'key'"),
        ("import sys\nsys.exit('enough')", 3, "SystemExit: enough"),
        ("import json\njson.loads('{')", 3, "JSONDecodeError: Expecting property name"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told_its_own_line(
    kind: str, code: str, line: int, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"# mine\n{code}\n")
    expected = f"{file} cannot be imported: {file}, line {line}, `{code.splitlines()[-1]}`: {message}"
    assert expected in refusal(kind, users_name(kind, file))


@every_kind
def test_the_failing_line_of_a_neighbour_is_told(kind: str, tmp_path: Path) -> None:
    neighbour = tmp_path / f"failing_neighbour_of_{kind}.py"
    neighbour.write_text("1 / 0\n")
    file = tmp_path / "mine.py"
    file.write_text(f"import {neighbour.stem}\n")
    expected = f"{file} cannot be imported: {neighbour}, line 1, `1 / 0`: ZeroDivisionError"
    assert expected in refusal(kind, users_name(kind, file))


@every_kind
def test_a_missing_package_is_told_how_to_be_installed(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import surely_missing.part\n")
    assert "Install the package that has 'surely_missing', e.g. `pip install surely_missing`" in refusal(
        kind, users_name(kind, file)
    )


@every_kind
def test_a_file_imports_its_neighbours_and_is_executed_once(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"neighbour_of_{kind}.py").write_text("VALUE = 7\n")
    file, count = tmp_path / "mine.py", tmp_path / "count.txt"
    head = f"from neighbour_of_{kind} import VALUE\nwith open({str(count)!r}, 'a') as file: file.write('x')\n"
    file.write_text(f"{head}{MODULE}def mine(): ...\n")
    for _ in range(3):
        open_component(kind, users_name(kind, file))
    open_component(kind, users_name(kind, Path(os.path.relpath(file))))
    link = tmp_path / "link.py"
    link.symlink_to(file)
    open_component(kind, users_name(kind, link))
    assert count.read_text() == "x"


@every_kind
def test_a_module_of_the_current_folder_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"package_of_{kind}"
    folder.mkdir()
    (folder / "part.py").write_text(f"{MODULE}def mine(): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    open_component(kind, users_name(kind, f"package_of_{kind}.part"))


@pytest.mark.parametrize("kind", ["task", "dataset", "objective", "engine"])
def test_a_file_of_the_form_of_a_built_in_is_a_component_with_its_options(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    open_component(kind, str(file), size=4)
    assert "size: expected an integer, found 'large'" in refusal(kind, str(file), size="large")
    assert "sise: unknown key; did you mean size?" in refusal(kind, str(file), sise=4)


@pytest.mark.parametrize("kind", WHOLE)
def test_one_function_is_no_engine_and_no_objective(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    assert f"{KINDS[kind].noun} is a whole module, not one function; write '{file}'" in refusal(kind, f"{file}:build")


def test_options_that_are_no_options_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("class Config: ...\ndef load(): ...\ndef odd(size: 'Nothing'): ...\n")
    assert f"{file}: `Config` must be a class derived from llmquest_rl.options.Options" in refusal("task", str(file))
    expected = f"the parameters of {file}:odd cannot be read as options: NameError: name 'Nothing' is not defined"
    assert expected in refusal("task", f"{file}:odd")


def test_a_built_in_that_needs_a_missing_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packaged_kinds"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("import surely_missing\n")
    (package / "two.py").write_text("raise OSError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    kind = ComponentKind("a thing", "packaged_kinds", ("make",))
    assert kind.names() == ["one", "two"]
    with pytest.raises(ComponentError, match="'one' needs the package 'surely_missing', which is not .*make setup"):
        kind.module("one")
    with pytest.raises(ComponentError, match=r"two.py, line 1, `raise OSError\('no licence'\)`: OSError: no licence"):
        kind.module("two")


def test_the_path_of_a_name_is_made_absolute_and_nothing_else() -> None:
    names = ["mine.py", "a/mine.py:f", "~/mine.py:f", "package.module:f", "package.module", "gsm8k"]
    here, home = Path.cwd(), Path.home()
    expected = [f"{here}/mine.py", f"{here}/a/mine.py:f", f"{home}/mine.py:f", *names[3:]]
    assert [absolute_name(name) for name in names] == expected


def test_a_saved_configuration_names_the_same_file_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("def mine(count: int = 2): ...\n")
    monkeypatch.chdir(tmp_path)
    run = {"name": "a", "steps": 1, "rewards": [{"name": "exact_number"}]}
    config = parse_config({**run, "data": {"task": {"name": "mine.py:mine"}}})
    assert config.data.task is not None
    assert config.data.task.model_dump() == {"name": f"{tmp_path}/mine.py:mine", "count": 2}
    assert f"name: {tmp_path}/mine.py:mine" in dump(config)


LOAD = "import pickle, sys; values = pickle.load(sys.stdin.buffer); print(values)"


@pytest.mark.parametrize(
    "make",
    [
        lambda file: options_class(TASKS, f"{file}:mine")(shape=file.parent.name, limit=file.parent),
        lambda file: options_class(ENGINES, str(file))(size=5),
        lambda file: OBJECTIVES.module(str(file)).Loss(6),
    ],
)
def test_what_a_users_file_makes_is_unpickled_by_another_process(make: Callable[[Path], Any], tmp_path: Path) -> None:
    neighbour = f"neighbour_of_{tmp_path.name}"
    (tmp_path / f"{neighbour}.py").write_text("FACTOR = 2\n")
    file = tmp_path / "mine.py"
    extra = (
        "from __future__ import annotations\n"
        f"from dataclasses import dataclass\nfrom pathlib import Path\nimport {neighbour}\n"
        f"{MODULE}\n"
        "@dataclass\nclass Loss:\n    scale: float\n\n"
        "def mine(seed, shape: str, limit: Path, factor: float = 0.5): ...\n"
    )
    file.write_text(extra)
    value = make(file)
    assert pickle.loads(pickle.dumps(value)) == value
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", LOAD]
    other = subprocess.run(command, input=pickle.dumps(value), capture_output=True, env=environment, cwd="/")
    assert other.stdout.decode().strip() == str(value), other.stderr.decode()


def test_the_loader_imports_nothing_but_the_standard_library() -> None:
    script = (
        "import sys; import llmquest_rl.loader; print([n for n in ('torch', 'pydantic', 'numpy') if n in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_unknown_words_are_told_near_ones_or_else_all() -> None:
    assert did_you_mean("rewrad", ["reward", "prompt"]) == "; did you mean reward?"
    assert re.fullmatch("; did you mean (lr or lrs|lrs or lr)\\?", did_you_mean("lrr", ["lr", "lrs", "eps"]))
    assert did_you_mean("zzz", ["reward", "prompt"]) == "; there are: reward, prompt"
    assert did_you_mean("zzz", []) == ""
    assert did_you_mean("lR", ["LR", "eps"], list_all=True) == "; there are: LR, eps"
    assert did_you_mean("Lr_", ["Lr", "EPS"], list_all=True) == "; did you mean Lr? There are: Lr, EPS"


HIDING = ("llmquest_rl", "rewards", "rollout", "trainer", "yaml")


def test_a_users_file_hides_no_package_in_this_process_or_in_a_grader(tmp_path: Path) -> None:
    """A reward in a file called rewards.py, beside files with the names of our packages and of an installed one."""
    for name in HIDING:
        (tmp_path / f"{name}.py").write_text("raise AssertionError('a file of the user hides a package')\n")
    code = "from rewards.types import GradeItem\ndef mine(completion):\n    return float(completion)\n"
    (tmp_path / "rewards.py").write_text(code)
    with Grader([RewardConfig(function=f"{tmp_path}/rewards.py:mine")]) as grader:
        assert [score.value for score in grader.grade([GradeItem("", "0.5", None)])] == [0.5]
    assert str(tmp_path) not in sys.path


@every_kind
def test_a_neighbour_that_something_else_hides_is_an_error_that_names_both(kind: str, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"hidden_{kind}.py").write_text(f"FOLDER = {folder!r}\n")
        (tmp_path / folder / "mine.py").write_text(f"from hidden_{kind} import FOLDER\n{MODULE}def mine(): ...\n")
    open_component(kind, users_name(kind, tmp_path / "one" / "mine.py"))
    message = refusal(kind, users_name(kind, tmp_path / "two" / "mine.py"))
    names = (tmp_path / folder / f"hidden_{kind}.py" for folder in ("two", "one"))
    assert "imports 'hidden_{}', which is beside it ({}), but got {},".format(kind, *names) in message
    (tmp_path / "random.py").write_text("VALUE = 1\n")
    (tmp_path / "mine.py").write_text("from random import VALUE\n")
    assert f"beside it ({tmp_path}/random.py), but got {random.__file__}" in refusal(
        kind, users_name(kind, tmp_path / "mine.py")
    )


@every_kind
def test_a_file_that_is_a_component_and_a_neighbour_is_executed_once(kind: str, tmp_path: Path) -> None:
    count = tmp_path / "count.txt"
    code = f"with open({str(count)!r}, 'a') as file: file.write('x')\n{MODULE}def mine(): ...\n"
    first, second = (tmp_path / f"shared_{kind}_{i}.py" for i in range(2))
    for file in (first, second):
        file.write_text(code)
        file.with_name(f"uses_{file.stem}.py").write_text(f"import {file.stem}\n{MODULE}def mine(): ...\n")
    open_component(kind, users_name(kind, first))
    open_component(kind, users_name(kind, tmp_path / f"uses_{first.stem}.py"))
    open_component(kind, users_name(kind, tmp_path / f"uses_{second.stem}.py"))
    open_component(kind, users_name(kind, second))
    assert count.read_text() == "xx"


@every_kind
def test_a_file_named_by_path_and_as_a_module_is_executed_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, count = tmp_path / f"folder_of_{kind}", tmp_path / "count.txt"
    folder.mkdir()
    for name in ("first", "second"):
        code = f"with open({str(count)!r}, 'a') as file: file.write('x')\n{MODULE}def mine(): ...\n"
        (folder / f"{name}.py").write_text(code)
    open_component(kind, users_name(kind, folder / "first.py"))
    open_component(kind, users_name(kind, f"{folder.name}.first"))
    open_component(kind, users_name(kind, f"{folder.name}.second"))
    open_component(kind, users_name(kind, folder / "second.py"))
    assert count.read_text() == "xx"


@every_kind
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import ast\nast.literal_eval('[1, 2')", "line 2, `ast.literal_eval('[1, 2')`: SyntaxError: "),
        ("a = 1\0", "cannot be imported: SyntaxError: source code "),
    ],
)
def test_an_error_in_text_that_is_no_file_is_told_by_the_users_line(
    kind: str, code: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(code)
    assert expected in refusal(kind, users_name(kind, tmp_path / "mine.py"))


@every_kind
def test_a_location_that_is_neither_a_file_nor_a_module_says_so(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    assert "folder.py is a folder, not a file" in refusal(kind, users_name(kind, tmp_path / "folder.py"))
    for location in ("./my/file", "..package.module"):
        assert f"{location!r} is neither a file that ends in .py nor the name of a module" in refusal(
            kind, users_name(kind, location)
        )


@pytest.mark.parametrize("kind", ["task", "dataset"])
def test_a_file_without_its_function_is_told_to_name_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from json import loads\nclass Rows: ...\ndef _private(): ...\n")
    message = refusal(kind, f"{tmp_path}/mine.py")
    assert f"has no function 'load'; there are: Rows (or name one function: {tmp_path}/mine.py:...)" in message
    assert "did you mean Rows?" in refusal(kind, f"{tmp_path}/mine.py:Rowz")


FAILING = """
def rows():
    yield {"prompt": "a", "answer": "b"}
    yield {}["key"]

def load(*rest):
    return 1 / 0
"""


@pytest.mark.parametrize("kind", ["task", "dataset"])
def test_code_that_fails_when_it_is_called_is_told_by_its_line(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FAILING)
    lines = {f"{file}:rows": 'line 4, `yield {}["key"]`: KeyError', str(file): "line 7, `return 1 / 0`: ZeroDivis"}
    for name, line in lines.items():
        options = options_class(KINDS[kind], name)()
        with pytest.raises(ComponentError, match=re.escape(f"{name} failed: {file}, {line}")):
            if kind == "task":
                open_task(name, TASKS.function(name), options, 0, MalformedRows("error"))
            else:
                open_dataset(name, DATASETS.function(name), options, DatasetContext(None, 8, 0, MalformedRows("error")))


def test_an_objective_that_fails_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build(*rest):\n    return undefined\n")
    expected = f"{tmp_path}/mine.py failed: {tmp_path}/mine.py, line 2, `return undefined`: NameError"
    assert expected in refusal("objective", f"{tmp_path}/mine.py")


def test_a_reward_is_a_file_of_the_form_of_a_built_in(tmp_path: Path) -> None:
    file = tmp_path / "near.py"
    file.write_text(
        "from llmquest_rl.options import Options\n\nclass Config(Options):\n    width: float = 1.0\n\n"
        "def reward(completion, answer, config):\n    return float(abs(float(completion) - answer) < config.width)\n"
    )
    config = RewardConfig.model_validate({"function": str(file), "width": 0.5})
    assert config.name == "near"
    with Grader([config]) as grader:
        assert [score.value for score in grader.grade([GradeItem("", text, 1.0) for text in ("1.2", "1.7")])] == [1, 0]
    assert f"`{file}` has no option `widht`; did you mean width?" in refusal("reward", str(file), widht=1)


def test_an_argument_that_a_users_reward_lacks_is_told_with_the_key_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(completion): return 1.0\n")
    rewards = [{"name": "exact_number"}, {"function": f"{tmp_path}/mine.py:reward", "wieght": 2}]
    with pytest.raises(ConfigError) as caught:
        parse_config({"name": "a", "steps": 1, "data": {"task": {"name": "arithmetic"}}, "rewards": rewards})
    assert "rewards.1: reward `reward`: it has no argument `wieght`; did you mean weight?" in str(caught.value)


def test_the_task_of_a_data_set_is_checked_with_the_configuration() -> None:
    run: dict[str, Any] = {"name": "a", "steps": 1, "objective": {"name": "next_token"}}
    for task, expected in (
        ({"name": "arithmetic", "digitz": 2}, "`arithmetic` has no option `digitz`; did you mean digits?"),
        ({"name": "arithmetics"}, "'arithmetics' is not the name of a task; did you mean arithmetic?"),
        ({"digits": 2}, "a task needs a `name`"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config({**run, "data": {"dataset": {"name": "sft", "task": task}}})
        assert "data.dataset.task: " in str(caught.value) and expected in str(caught.value)
