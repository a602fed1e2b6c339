"""A recipe from its file to the figure, at a size that takes seconds; and every recipe of configs/papers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.trainer.conftest import REWARDS, ROOT
from trainer.cli.main import main
from trainer.config.tree import ConfigError
from trainer.papers.measures import gradient_noise
from trainer.papers.recipe import arm_config, find_recipe, load_recipe
from trainer.papers.reproduce import WORK, Report, reproduce
from trainer.papers.runs import ArmError
from trainer.pipeline.stages import with_models

BOUND = {"says": "", "kind": "inside", "metric": "m", "high": 1.0}
RECIPES = sorted((ROOT / "configs" / "papers").glob("*.yaml"))


def values() -> dict[str, Any]:
    """Two arms of two steps from a model of one step; a reward model of one step scores the second arm, too."""
    base = yaml.safe_load((ROOT / "configs" / "papers" / "parts" / "sums.yaml").read_text())
    start, run = base["start"], base["run"]
    start["run"] |= {"steps": 1, "batch": {"sequences_per_step": 4, "tokens_per_sequence": 96}}
    start["run"]["data"]["eval_size"] = 4
    start["run"]["optimizer"] = {"lr": 1.0e-3}
    run |= {"steps": 2, "batch": {"prompts_per_step": 2, "samples_per_prompt": 4}}
    run["data"]["eval_size"] = 4
    run["rewards"] = [{"name": "length", "max": 8, "cache": 8}]  # an untrained model gets some of it
    run["rollout"] = {"dtype": "float32", "sampling": {"max_tokens": 8}}
    pairs = {"dataset": {"name": "compared_sums", "rows": 8, "held_out": 4}, "chat_template": "none", "eval_size": 4}
    scorer = start["run"] | {"objective": {"name": "reward_model"}, "data": pairs}
    judge = {"name": "scorer", "path": "stage:scorer", "chat_template": "none", "dtype": "float32"}
    return {
        "paper": "nobody's",
        "start": start,
        "stages": {"scorer": scorer},
        "run": run,
        "arms": {
            "one": {"algorithm": {"name": "grpo"}},
            "two": {"algorithm": {"name": "dr_grpo", "beta": 0.01}, "reward_models": [judge]},
        },
        "panels": [{"metric": "rollout/completion_tokens", "title": "tokens", "x": "generated tokens"}],
        "claims": [{"says": "few tokens", "kind": "inside", "arm": "one", "metric": "rollout/tokens", "high": 1000}],
    }


def write(folder: Path, **changes: object) -> Path:
    """A recipe in a file `small.yaml`: where its runs are kept depends on the file's name alone."""
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values() | changes))
    return path


@dataclass(frozen=True)
class Done:
    """A recipe that is run once for all tests of this file; their changes need no new run."""

    folder: Path
    report: Report
    lines: list[str]

    @property
    def work(self) -> Path:
        return self.folder / WORK

    def times(self) -> dict[Path, int]:
        """Time of the last change of each run."""
        return {path: path.stat().st_mtime_ns for path in self.work.glob("small/*/runs/*/*/metrics.jsonl")}

    def arm(self, name: str, seed: int) -> Path:
        """The run folder of one arm."""
        [run] = self.work.glob(f"small/{name}-seed{seed}-*/runs/{name}/*")
        return run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder, lines = tmp_path_factory.mktemp("recipe"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        report = reproduce(write(folder), 2, None, lines.append, folder / WORK)
        yield Done(folder, report, lines)


def test_a_recipe_runs_draws_and_decides(done: Done) -> None:
    assert done.report.holds and done.report.figure.read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(done.report.numbers.read_text())
    assert [claim["holds"] for claim in numbers["claims"]] == [True]
    curve = numbers["curves"]["rollout/completion_tokens over generated tokens"]
    assert {arm: sorted(seeds) for arm, seeds in curve.items()} == {"one": ["0", "1"], "two": ["0", "1"]}
    assert curve["one"]["0"] != curve["one"]["1"], "seeds differ"
    assert len(done.times()) == 6 and len(done.lines) == 7


def test_an_arm_uses_the_models_that_its_seed_trained_in_stages(done: Done) -> None:
    for seed in (0, 1):
        config = yaml.safe_load((done.arm("arm-two", seed) / "config.yaml").read_text())
        [judge] = config["reward_models"]
        assert Path(judge["path"]) == done.arm("stage-scorer", seed).resolve() / "checkpoints" / "step-000001" / "model"
        row = json.loads((done.arm("arm-two", seed) / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["reward/mean"] == pytest.approx(row["reward/length"] + row["reward/scorer"], rel=1e-5)
        assert row["policy/kl_sequence"] > 0
        assert "reward_models: []" in (done.arm("arm-one", seed) / "config.yaml").read_text()


def test_a_curve_over_the_root_of_the_kl_marks_its_peak(done: Done, tmp_path: Path) -> None:
    panel = {"metric": "reward/scorer", "title": "score", "x": "sqrt KL", "mark_peak": True}
    report = reproduce(write(tmp_path, panels=[panel]), 2, tmp_path / "out", print, done.work)
    [(name, curves)] = [item for item in json.loads(report.numbers.read_text())["curves"].items() if "over" in item[0]]
    rows = [json.loads(line) for line in (done.arm("arm-two", 0) / "metrics.jsonl").read_text().splitlines()]
    expected = [[row["policy/kl_sequence"] ** 0.5, row["reward/scorer"]] for row in rows if "reward/scorer" in row]
    assert name == "reward/scorer over sqrt KL" and list(curves) == ["two"]
    assert curves["two"]["0"] == [pytest.approx(pair, rel=1e-5) for pair in expected]


def test_what_was_run_is_not_run_again(done: Done, tmp_path: Path) -> None:
    before = done.times()
    again = reproduce(write(tmp_path), 2, tmp_path / "elsewhere", print, done.work)
    assert done.times() == before
    assert again.numbers.read_text() == done.report.numbers.read_text()
    assert again.figure.parent == tmp_path / "elsewhere"


def test_the_command_fails_with_the_claim(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = {"says": "many tokens", "kind": "inside", "arm": "one", "metric": "rollout/tokens", "low": 1000}
    path = write(tmp_path, claims=[claim])
    monkeypatch.chdir(done.folder)
    monkeypatch.setattr(sys, "argv", ["llmquest-rl", "reproduce", str(path), "--seeds", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr().out
    assert ended.value.code == 1 and "does not hold  many tokens" in printed and "1 of 1 claims" in printed


@pytest.mark.parametrize(
    ("measure", "label", "metric"),
    [("kl_estimators", "k3", "gradient bias"), ("gradient_noise", "rloo baseline", "gradient noise")],
)
def test_what_is_measured_on_the_trained_models_is_drawn_and_decided(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measure: str, label: str, metric: str
) -> None:
    monkeypatch.setattr(gradient_noise, "BATCHES", 3)
    before = done.times()
    panel = {"metric": metric, "title": metric, "x": "kl" if measure == "kl_estimators" else "group size"}
    claim = {"says": "it is there", "kind": "inside", "arm": label, "metric": metric, "low": 0.0, "over": [0.0, 1.0]}
    path = write(tmp_path, measure=measure, panels=[panel], claims=[claim])
    report = reproduce(path, 1, tmp_path / "out", print, done.work)
    curve = json.loads(report.numbers.read_text())["curves"][metric][label]["0"]
    assert report.holds and report.figure.is_file() and curve
    assert done.times() == before


def test_a_run_that_fails_is_named_and_the_others_are_kept(done: Done, tmp_path: Path) -> None:
    arms = values()["arms"]
    arms["one"]["steps"] = 1
    arms["two"]["rewards"] = [{"function": f"{REWARDS}:always_fails"}]
    path = write(tmp_path, arms=arms).rename(tmp_path / "failing.yaml")
    with pytest.raises(ArmError, match=r"two, seed 0: (.|\n)*this grader is broken(.|\n)*arm-two-seed0-.*/log.txt"):
        reproduce(path, 1, tmp_path, print, done.work)
    [kept] = done.work.glob("failing/arm-one-*/runs/*/*/metrics.jsonl")
    assert json.loads(kept.read_text().splitlines()[-1])["step"] == 1
    assert not list(done.work.glob("failing/arm-two-*/runs/*/*/checkpoints/*"))


@pytest.mark.parametrize(("number", "part"), [(signal.SIGINT, "start"), (signal.SIGTERM, "run")])
def test_what_was_interrupted_does_not_count_as_trained(
    done: Done, tmp_path: Path, number: signal.Signals, part: str
) -> None:
    """Neither a start model nor an arm, nor does a process stay behind."""
    changes = values()
    steps = changes["start"]["run"] if part == "start" else changes["run"]
    steps["steps"] = 100_000
    recipe = write(tmp_path, **changes).rename(tmp_path / "interrupted.yaml")
    rows = f"{WORK}/{'start-*' if part == 'start' else 'interrupted/arm-*'}/runs/*/*/metrics.jsonl"
    before = set(done.folder.glob(rows))
    command = [sys.executable, "-m", "trainer.cli.main", "reproduce", str(recipe), "--seeds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "printed").open("wb") as printed:
        process = subprocess.Popen(command, cwd=done.folder, env=environment, stdout=printed, stderr=printed)
        try:
            wait_until(lambda: any(file.stat().st_size for file in {*done.folder.glob(rows)} - before))
            process.send_signal(number)
            assert process.wait(120) != 0
        finally:
            process.kill()
    assert "numbers:" not in (tmp_path / "printed").read_text()
    assert len(list(done.work.glob("start-*/model"))) == 1, "that of the other tests"
    wait_until(lambda: not processes_in(done.folder))


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those that work below the folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"panels": []}, "panels"),
        ({"arms": {"one": {"algorithm": {"name": "nothing"}}}}, "arms.one: .*nothing"),
        ({"run": {"stepz": 1}}, "stepz"),
        ({"claims": [{"says": "", "kind": "larger", "arm": "one", "metric": "m"}]}, "claims.0"),
        ({"claims": [{**BOUND, "arm": "three"}]}, "three"),
        ({"measure": "nothing"}, "nothing"),
        (
            {"measure": "own_weights", "claims": [{**BOUND, "arm": "three, own weights"}]},
            "not an arm; .* one, own weights",
        ),
        ({"arms": {"one": {"seed": 3}}}, "arms.one: remove seed;"),
        ({"stages": {}}, "stage:scorer: there is no such stage before this one"),
        ({"stages": {"scorer": {"name": "mine"}}}, "stages.scorer: remove name;"),
        ({"run": {"name": "mine", "model": {"path": "m"}}}, "run: remove model.path, name;"),
    ],
)
def test_an_unsound_recipe_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, **changes))


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no recipe 'grpo'.*grpo_curve"):
        find_recipe("grpo", ROOT / "configs" / "papers")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_shows(path: Path) -> None:
    load_recipe(path)
    text = path.read_text()
    assert all(f"# {part}: " in text for part in ("Paper", "Here", "Hardware"))


def test_an_arm_may_learn_from_a_second_model(tmp_path: Path) -> None:
    arms = {"one": {"objective": {"name": "distill", "teacher": "stage:teacher"}, "algorithm": {"name": "reinforce"}}}
    changed = values() | {"arms": arms}
    with pytest.raises(ConfigError, match="there is no such stage before this one"):
        load_recipe(write(tmp_path, arms=arms))
    recipe = load_recipe(write(tmp_path, arms=arms, teacher={"run": {"steps": 7}}))
    assert recipe.teacher_start is not None and recipe.teacher_start.model == recipe.start.model
    assert recipe.teacher_start.run == changed["start"]["run"] | {"steps": 7}
    named = arm_config(recipe, "one", 0, tmp_path / "start", "here")
    config = with_models(named, {"stage:teacher": tmp_path / "second"}, "here")
    assert config.objective.options.teacher == str(tmp_path / "second")
