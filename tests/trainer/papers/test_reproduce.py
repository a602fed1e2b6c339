"""A recipe from its file to the figure, at a size that takes seconds; and every recipe of configs/papers."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from trainer.cli import main
from trainer.config_tree import ConfigError
from trainer.papers.recipe import find_recipe, load_recipe
from trainer.papers.reproduce import reproduce
from trainer.papers.runs import ArmError

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "papers").glob("*.yaml"))
BASE = yaml.safe_load((ROOT / "configs" / "papers" / "parts" / "sums.yaml").read_text())


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two arms of two steps from a model of one step, below a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    start = BASE["start"]
    start["run"] |= {"steps": 1, "batch": {"sequences_per_step": 4, "tokens_per_sequence": 96}}
    start["run"]["data"] = {**start["run"]["data"], "eval_samples": 4}
    start["run"]["optimizer"] = {"lr": 1.0e-3}
    run = {**BASE["run"], "steps": 2, "batch": {"prompts_per_step": 2, "samples_per_prompt": 2}}
    run["data"] = {**run["data"], "eval_samples": 4}
    run["rollout"] = {"dtype": "float32", "sampling": {"max_tokens": 8}}
    values = {
        "paper": "nobody's",
        "start": start,
        "run": run,
        "arms": {"one": {"algorithm": {"name": "grpo"}}, "two": {"algorithm": {"name": "dr_grpo"}}},
        "panels": [{"metric": "rollout/completion_tokens", "title": "tokens", "x": "generated tokens"}],
        "claims": [{"says": "few tokens", "kind": "inside", "arm": "one", "metric": "rollout/tokens", "high": 1000}],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_a_recipe_runs_once_draws_and_decides(recipe: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    report = reproduce(recipe, 2, None, lines.append)
    assert report.holds and report.figure.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(report.numbers.read_text())
    assert [claim["holds"] for claim in numbers["claims"]] == [True]
    curve = numbers["curves"]["rollout/completion_tokens"]
    assert {arm: sorted(seeds) for arm, seeds in curve.items()} == {"one": ["0", "1"], "two": ["0", "1"]}
    assert curve["one"]["0"] != curve["one"]["1"], "seeds differ"
    runs = sorted(tmp_path.glob("runs/papers/small/*/runs/*/*/metrics.jsonl"))
    assert len(runs) == 4 and len(lines) == 5
    times = [path.stat().st_mtime_ns for path in runs]
    again = reproduce(recipe, 2, tmp_path / "elsewhere", lines.append)
    assert [path.stat().st_mtime_ns for path in runs] == times, "nothing is run twice"
    assert json.loads(again.numbers.read_text()) == numbers
    assert again.figure.parent == tmp_path / "elsewhere"


def test_the_command_fails_with_the_claim(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = {"says": "many tokens", "kind": "inside", "arm": "one", "metric": "rollout/tokens", "low": 1000}
    rewrite(recipe, claims=[claim])
    monkeypatch.setattr(sys, "argv", ["llmquest-rl", "reproduce", str(recipe), "--seeds", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "does not hold" in printed and "many tokens" in printed


def test_a_run_that_fails_is_named_and_the_others_are_kept(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["arms"]["two"]["rewards"] = [{"function": "nowhere.py:nothing"}]
    rewrite(recipe, arms=values["arms"])
    with pytest.raises(ArmError, match="two, seed 0: .*nowhere.py.*log.txt"):
        reproduce(recipe, 1, None, print)
    [kept] = tmp_path.glob("runs/papers/small/arm-one-*/runs/*/*/metrics.jsonl")
    assert len(kept.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"panels": []}, "panels"),
        ({"arms": {"one": {"algorithm": {"name": "nothing"}}}}, "arms.one: .*nothing"),
        ({"run": {"stepz": 1}}, "stepz"),
        ({"claims": [{"says": "", "kind": "larger", "arm": "one", "metric": "m"}]}, "claims.0"),
        ({"claims": [{"says": "", "kind": "inside", "arm": "three", "metric": "m"}]}, "three"),
        ({"measure": "nothing"}, "nothing"),
    ],
)
def test_an_unsound_recipe_is_refused(recipe: Path, changes: dict[str, object], message: str) -> None:
    rewrite(recipe, **changes)
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no recipe 'grpo'.*grpo_curve"):
        find_recipe("grpo", ROOT / "configs" / "papers")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_shows(path: Path) -> None:
    load_recipe(path)
    text = path.read_text()
    assert all(f"# {part}: " in text for part in ("Paper", "Here", "Hardware"))
