"""CONTRIBUTING.md works as it stands: its files, its commands, and its promise that one file is all a new part takes.

The files are written into a copy of the repository, and the commands run there, in one process of its own.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from llmquest_rl.algorithms.surrogates import Tokens
from tests.contributing_page import COMMAND, commands, equation, files, run

ROOT = Path(__file__).parents[1]
COPIED = ("llmquest_rl", "rollout", "rewards", "trainer", "configs", "docs", "tests/contributing_page.py")
TESTED = (*COPIED, "tests", "pyproject.toml", "requirements", "mkdocs.yml")
PARITIES = """
def parities():
    for n in range(80):
        yield {"text": f"{n};", "label": ("even", "odd")[n % 2]}
"""
RL = f"{COMMAND}train configs/doubles.yaml"
ON_DATA = f"{COMMAND}train configs/sums.yaml data.dataset.name=my_dataset.py:counting data.eval_size=4"
UNLIKELY = f"{ON_DATA} objective.name=unlikelihood optimizer.warmup_steps=0"
SHORT = "steps=1 batch.minibatches_per_step=2 optimizer.lr=0.01 eval.at_start=false"
ALL_AT_ONCE = f"{RL} model.path=mistral algorithm.name=spo rollout.engine.name=my_engine.py"

FURTHER = {
    "a setting with another row": f"{RL} algorithm.name=dapo algorithm.surrogate=spo algorithm.epsilon=3.0 --dry-run",
    "a large epsilon": f"{RL} name=large algorithm.name=spo algorithm.epsilon=10 {SHORT}",
    "the default of the row": f"{RL} name=default algorithm.name=spo {SHORT}",
    "double strength": f"{UNLIKELY} name=double objective.strength=2.0 steps=1",
    "an objective of one's own": "cp llmquest_rl/objectives/unlikelihood.py my_objective.py",
    "... is the same": f"{ON_DATA} name=own objective.name=my_objective.py optimizer.warmup_steps=0 steps=1",
    "an engine that is built in": "cp my_engine.py rollout/engines/plain.py",
    "... is found": f"{RL} rollout.engine.name=plain --dry-run",
    "a classifier": f"{COMMAND}train configs/sums.yaml name=parity model.path=trained model.init=pretrained "
    "'objective={name: classify, labels: [even, odd]}' data.dataset.name=parities.py:parities data.eval_size=4 "
    "steps=1 optimizer.warmup_steps=0",
    "... is exported": f"{COMMAND}export runs/parity classifier",
    "... is that of transformers": f"{COMMAND}parity classifier",
    "the generated pages": f"{sys.executable} -m trainer.cli.generated_docs",
    "a copy with heads of size 32": "cp -r mistral served && sed -i 's/_heads\": 4/_heads\": 2/' served/config.json",
    "... is served by vLLM": f"{RL} model.path=served rollout.engine.name=vllm --dry-run",
    "a copy with a window": "cp -r mistral window && sed -i 's/null/16/' window/config.json",
}
"""Commands that are not on the page and succeed, too."""
REFUSED = {
    f"{RL} algorithm.name=grpo algorithm.epsilon=0.3": "is read only with surrogate: spo, so here epsilon: 0.3",
    f"{RL} algorithm.name=spo algorithm.epsilo=0.3": "algorithm.epsilo: unknown key; did you mean epsilon",
    f"{RL} algorithm.name=spo algorithm.epsilon=-1.0": "algorithm.epsilon: expected greater than 0",
    f"{UNLIKELY} objective.strenth=2.0": "objective.strenth: unknown key; did you mean strength",
    f"{UNLIKELY} objective.strength=0.0": "objective.strength: expected greater than 0",
    f"{RL} data.task.larges=3": "data.task.larges: unknown key; did you mean largest",
    f"{RL} rollout.engine.name=my_engine.py rollout.engine.fast=1": "rollout.engine.fast: unknown key",
    f"{RL} model.path=window --dry-run": "sliding_window 16, but Mistral here supports None only",
    f"{COMMAND}grade --reward my_reward.py:rewards completions.jsonl --out s.jsonl": "did you mean reward",
}
"""Commands with a mistake, and a part of the message."""


def copy_with_the_page(tree: Path, names: tuple[str, ...]) -> None:
    """Copy files and folders of the repository, and write the files of the page."""
    for name in names:
        copy = partial(shutil.copytree, dirs_exist_ok=True) if (ROOT / name).is_dir() else shutil.copy
        (tree / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tree / name)
    for name, text in files().items():
        assert not (tree / name).exists(), f"{name} is in the repository: the page should add another part"
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the files of the page, in which all commands have run."""
    tree = tmp_path_factory.mktemp("tree")
    copy_with_the_page(tree, COPIED)
    (tree / "parities.py").write_text(PARITIES)
    (tree / "commands.json").write_text(json.dumps([*commands(), *FURTHER.values(), *REFUSED]))
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "tests.contributing_page", "commands.json", "results.json"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture(scope="module")
def results(tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tree / "results.json").read_text())
    return found


def rows(tree: Path, name: str) -> list[dict[str, Any]]:
    """The metrics of each step of the run with this name; `eval.at_start` is step 0."""
    [run_folder] = (tree / "runs" / name).iterdir()
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def last(tree: Path, name: str) -> dict[str, Any]:
    return rows(tree, name)[-1]


def module(tree: Path, name: str) -> ModuleType:
    """A file of the page, executed with the packages of the repository itself."""
    spec = spec_from_file_location(Path(name).stem, tree / name)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    sys.modules[spec.name] = made  # pydantic looks for the annotations of its classes there
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[spec.name]
    return made


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [*commands(), *FURTHER.values()])
def test_a_command_succeeds(command: str, results: dict[str, Any]) -> None:
    assert results[command]["code"] == 0, results[command]


@pytest.mark.parametrize("command", REFUSED)
def test_a_mistake_is_told(command: str, results: dict[str, Any]) -> None:
    assert results[command]["code"] == 2
    assert REFUSED[command] in results[command]["error"]


def test_a_command_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(f"{COMMAND}train absent.yaml")["code"] == 2
    assert run("cat absent")["code"] == 1


def test_the_files_keep_the_rules_of_the_linter(tree: Path) -> None:
    names = [name for name in files() if name.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *names]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert max(len(text.splitlines()) for text in files().values()) < 80, "the examples are short"


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with its tests and the files of the page, in which no command has run."""
    tree = tmp_path_factory.mktemp("untouched")
    copy_with_the_page(tree, TESTED)
    return tree


def run_tests(tree: Path, *arguments: str) -> str:
    """The output of pytest in a copy of the repository; the tests may fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


def test_the_files_keep_the_rules_of_the_house(untouched: Path) -> None:
    output = run_tests(untouched, "tests/test_architecture.py")
    assert " passed" in output and " failed" not in output, output


def test_the_shapes_of_the_model_run_the_tests_of_all_models(untouched: Path) -> None:
    output = run_tests(untouched, "tests/models", "tests/generation", "-k", "mistral or has_variants")
    found = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert found is not None and int(found[1]) > 60, output


def test_one_test_fails_until_the_loss_has_its_equation(untouched: Path) -> None:
    names = "spo or by_hand or any_combination or has_its_equation or is_the_papers or papers_loss"
    chosen = ("tests/algorithms", "tests/objectives/test_policy.py", "-rpf", "-k", names)
    before = run_tests(untouched, *chosen)
    assert "1 failed, " in before and "oracle.py: add the loss of a token with spo to EQUATIONS" in before, before
    oracle = untouched / "tests" / "algorithms" / "oracle.py"
    text = oracle.read_text()
    for table, line in equation().items():
        text, count = re.subn(rf"^{table}: .* = {{$", rf"\g<0>\n{line}", text, flags=re.MULTILINE)
        assert count == 1, f"oracle.py has no table {table}"
    oracle.write_text(text)
    after = run_tests(untouched, *chosen)
    assert "test_against_equations.py::test_rows[spo]" in after and " failed" not in after, after


def test_the_recipe_says_what_it_shows() -> None:
    first, second, *_ = files()["configs/doubles.yaml"].splitlines()
    assert first.endswith(".") and second.startswith("# Hardware:")


def test_all_parts_train_together(tree: Path) -> None:
    start, first, second = rows(tree, "doubles")
    assert start["eval/problems"] == 5, "a tenth of fifty questions"
    for metrics in (first, second):
        assert metrics["learner/skipped_updates"] == 0
        assert metrics["learner/grad_norm"] > 0
        assert metrics["reward/mean"] == pytest.approx(
            metrics["reward/reward/right"] + metrics["reward/reward/digits"], abs=1e-9
        )
        assert "policy/clip_frac" not in metrics, "the loss has no bound"
    assert second["rollout/weight_version"] == 2


def test_the_engine_and_the_model_agree_after_a_live_update(tree: Path) -> None:
    """transformers samples with its Mistral, the learner computes with that of the page."""
    for metrics in rows(tree, "doubles")[1:]:
        assert 0 < metrics["policy/logp_gap_max"] < 1e-5


def test_the_trained_model_and_its_classifier_are_those_of_transformers(tree: Path, results: dict[str, Any]) -> None:
    for command, folder, name in (
        (f"{COMMAND}parity trained", "trained", "MistralForCausalLM"),
        (f"{COMMAND}parity classifier", "classifier", "MistralForSequenceClassification"),
    ):
        assert results[command]["output"].startswith(f"{name}: ")
        assert json.loads((tree / folder / "config.json").read_text())["architectures"] == [name]
        differences = [float(word.rstrip(",")) for word in results[command]["output"].split() if "e-" in word]
        assert len(differences) == 2 and max(differences) < 1e-5


def test_the_loss_is_the_equation_of_the_paper(tree: Path) -> None:
    """Its value, and its gradient: 0 where the ratio is 1 + epsilon (A > 0) or 1 - epsilon (A < 0)."""
    spo = module(tree, "llmquest_rl/algorithms/surrogates/spo.py")
    ratio = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0, 1.3], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([2.0, -1.5, 1.0, 0.5, -1.0, 0.0], dtype=torch.float64)
    losses = spo.loss(Tokens(ratio, ratio, ratio, advantages, ratio), spo.Settings(epsilon=0.3))
    pairs = list(zip(ratio.tolist(), advantages.tolist(), strict=True))
    assert losses.tolist() == pytest.approx([abs(a) / 0.6 * (r - 1) ** 2 - r * a for r, a in pairs], abs=1e-12)
    [gradient] = torch.autograd.grad(losses.sum(), ratio)
    assert gradient.tolist() == pytest.approx([abs(a) / 0.3 * (r - 1) - a for r, a in pairs], abs=1e-12)
    assert gradient[1].item() == pytest.approx(0, abs=1e-12) == gradient[3].item()


def test_the_setting_reaches_the_loss(tree: Path) -> None:
    """A smaller epsilon is a larger penalty once the ratio has left 1."""
    default, large = (last(tree, name) for name in ("default", "large"))
    assert default["policy/ratio_max"] > 1 and default["reward/mean"] == large["reward/mean"]
    assert default["policy/loss"] > large["policy/loss"]
    [folder] = (tree / "runs" / "default").iterdir()
    saved = yaml.safe_load((folder / "config.yaml").read_text())["algorithm"]
    assert (saved["surrogate"], saved["epsilon"]) == ("spo", 0.2)


def test_the_objective_is_learnt_and_its_option_counts(tree: Path) -> None:
    start, first, second = rows(tree, "sums")
    assert start["eval/unlikelihood"] > second["eval/unlikelihood"] > 0
    assert first["train/unlikelihood"] > second["train/unlikelihood"] > 0
    assert second["learner/skipped_updates"] == 0
    single, double = last(tree, "own"), last(tree, "double")
    assert double["learner/grad_norm"] == pytest.approx(2 * single["learner/grad_norm"], rel=1e-5)
    assert double["train/unlikelihood"] == single["train/unlikelihood"] == first["train/unlikelihood"]
    assert math.isclose(single["train/unlikelihood"], -math.log1p(-1 / 18), rel_tol=0.2), "18 tokens, random weights"


def test_a_plot_of_another_objective_shows_its_metrics(tree: Path) -> None:
    [folder] = (tree / "runs" / "sums").iterdir()
    assert (folder / "plot.png").stat().st_size > 0


def test_the_generated_pages_have_the_new_parts(tree: Path) -> None:
    pages = {name: (tree / "docs" / f"{name}.md").read_text() for name in ("metrics", "algorithms", "configuration")}
    assert "| `train/unlikelihood` | nats | -log(1 - p) of a token" in pages["metrics"]
    assert "| `eval/unlikelihood` | nats | As `train/unlikelihood`. |" in pages["metrics"]
    [row] = [line for line in pages["algorithms"].splitlines() if line.startswith("| `spo`")]
    assert "| spo 0.2 |" in row and row.endswith("| SPO, arXiv 2401.16025 |")
    for key in ("epsilon", "strength"):
        [line] = [line for line in pages["configuration"].splitlines() if line.startswith(f"| `{key}`")]
        assert "distance from 1" in line or "Factor of the loss" in line
    [surrogates] = [line for line in pages["configuration"].splitlines() if line.startswith("| `surrogate`")]
    assert "`spo`" in surrogates


def test_the_table_of_algorithms_has_the_row(results: dict[str, Any]) -> None:
    [row] = [line for line in results[f"{COMMAND}algorithms"]["output"].splitlines() if line.strip().startswith("spo ")]
    assert "spo 0.2" in row and "SPO, arXiv 2401.16025" in row


def test_the_reward_is_graded(tree: Path) -> None:
    scored = json.loads((tree / "scores.jsonl").read_text())
    assert scored["score"] == pytest.approx(1.1)
