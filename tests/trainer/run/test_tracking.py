"""Metrics and sample completions on disk, and the trackers of Accelerate."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmquest_rl.types import Completion, Group, Problem, Score
from trainer.run.folder import RunFolder
from trainer.run.samples import completions_table, sample_rows
from trainer.run.tracking import JsonLines, Tracker, check_trackers, system_metrics

KILLED = """
import sys
from pathlib import Path
from trainer.run.tracking import JsonLines
file = JsonLines(Path(sys.argv[1]))
step = 0
while True:
    file.append({"step": step, "reward/mean": step / 3, "text": "x" * 5000})
    step += 1
    if step == 5:
        print("going", flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "a")


def group(index: int, failures: tuple[int, ...] = (), answer: Any = 7) -> Group:
    completions = [Completion([1, 2], [-0.5, -0.5], f"{index}.{i} [bold]", "stop", 3) for i in range(2)]
    scores = [
        Score(None, {}, "timeout", "5 s") if i in failures else Score(0.5, {"exact": 1.0, "x": None}) for i in (0, 1)
    ]
    return Group(Problem(f"t/{index}", f"prompt {index}", [1], answer), completions, scores)


def test_a_row_is_one_object_a_step_with_exact_numbers(folder: RunFolder) -> None:
    with Tracker(folder, [], "p", first_step=0) as tracker:
        tracker.log(0, {"eval/accuracy": 0.1 + 0.2})
        tracker.log(1, {"reward/mean": torch.tensor(0.25), "policy/updates": 2, "eval/loss": None})
    assert folder.metrics.read_text().splitlines() == [
        '{"step": 0, "eval/accuracy": 0.30000000000000004}',
        '{"step": 1, "reward/mean": 0.25, "policy/updates": 2, "eval/loss": null}',
    ]


def test_a_row_is_readable_before_the_next_one_is_written(folder: RunFolder) -> None:
    with Tracker(folder, [], "p", first_step=0) as tracker:
        tracker.log(1, {"reward/mean": 0.25})
        assert JsonLines(folder.metrics).read() == [{"step": 1, "reward/mean": 0.25}]


def test_non_finite_values_are_null_and_counted(folder: RunFolder) -> None:
    with Tracker(folder, [], "p", first_step=0) as tracker:
        row = tracker.log(1, {"policy/loss": math.nan, "policy/ratio": torch.tensor(math.inf), "reward/mean": 1.0})
        tracker.log(2, {"policy/loss": -math.inf})
    assert row == {"policy/loss": None, "policy/ratio": None, "reward/mean": 1.0, "tracking/non_finite_count": 2}
    assert tracker.non_finite == 3
    assert "NaN" not in folder.metrics.read_text() and "Infinity" not in folder.metrics.read_text()


def test_what_is_no_number_is_an_error_and_a_step_is_recorded_once(folder: RunFolder) -> None:
    with Tracker(folder, [], "p", first_step=0) as tracker:
        with pytest.raises(TypeError, match="metric policy/loss must be a number, got 'high'"):
            tracker.log(1, {"policy/loss": "high"})  # type: ignore[dict-item]
        tracker.log(2, {})
        with pytest.raises(AssertionError, match="recorded already"):
            tracker.log(2, {})


def run_steps(folder: RunFolder, first: int, last: int) -> None:
    with Tracker(folder, [], "p", first_step=first) as tracker:
        for step in range(first, last):
            tracker.log(step, {"reward/mean": math.sin(step), "eval/accuracy": None if step % 2 else step / 7})
            tracker.log_completions(step, [group(step), group(step + 1, failures=(1,))], 3)


@pytest.mark.parametrize(("interrupted", "resumed"), [(6, 6), (6, 3), (8, 5), (6, 0)])
def test_a_resumed_run_writes_the_files_of_an_uninterrupted_one(tmp_path: Path, interrupted: int, resumed: int) -> None:
    whole, parts = RunFolder.create(tmp_path, "whole"), RunFolder.create(tmp_path, "parts")
    run_steps(whole, 0, 10)
    run_steps(parts, 0, interrupted)
    with parts.metrics.open("a") as file:
        file.write('{"step": 6, "reward/me')  # killed in the middle of a line
    run_steps(parts, resumed, 10)
    assert parts.metrics.read_bytes() == whole.metrics.read_bytes()
    assert parts.completions.read_bytes() == whole.completions.read_bytes()


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        process.communicate()
        rows = JsonLines(path).read()
        assert len(rows) >= 5
        assert all(row == {"step": i, "reward/mean": i / 3, "text": "x" * 5000} for i, row in enumerate(rows))
        assert JsonLines(path).truncate(0) == len(rows)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_names_the_file() -> None:
    with pytest.raises(OSError, match="No space left on device; resume the run .*/dev/full"):
        JsonLines(Path("/dev/full")).append({"step": 1})


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": }\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        JsonLines(path).read()
    path.write_text('{"step": 0}\n{"reward/mean": 1}\n')
    with pytest.raises(ValueError, match="line 2: not an object with an integer `step`"):
        JsonLines(path).truncate(1)


def test_completions_are_taken_of_each_group_in_turn_failures_first() -> None:
    groups = [group(0), group(1, failures=(1,)), group(2, failures=(0, 1))]
    assert [row["completion"][:3] for row in sample_rows(4, groups, 4)] == ["2.0", "1.1", "0.0", "1.0"]
    assert [row["completion"][:3] for row in sample_rows(4, groups, 1)] == ["0.0"]
    assert len(sample_rows(4, groups, 100)) == 6
    assert sample_rows(4, groups, 0) == sample_rows(4, [], 3) == []


def test_the_table_of_completions_holds_all_that_explains_a_reward(folder: RunFolder) -> None:
    odd = group(5, failures=(1,), answer={"set": {3}, "half": "\ud800"})
    with Tracker(folder, [], "p", first_step=0) as tracker:
        rows = tracker.log_completions(2, [odd], 2)
    assert [json.loads(line) for line in folder.completions.read_text().splitlines()] == rows
    assert rows[1] == {
        "step": 2,
        "problem": "t/5",
        "prompt": "prompt 5",
        "completion": "5.0 [bold]",
        "answer": {"set": "{3}", "half": "\ud800"},
        "reward": 0.5,
        "rewards": {"exact": 1.0, "x": None},
        "failure": None,
        "detail": "",
        "finish_reason": "stop",
        "num_tokens": 2,
        "repetition": 0.0,
        "kl": None,
        "weight_version": 3,
    }
    assert (rows[0]["reward"], rows[0]["failure"], rows[0]["detail"]) == (None, "timeout", "5 s")


def test_the_printed_table_shows_text_as_it_is() -> None:
    rows = sample_rows(1, [group(5, failures=(1,))], 2)
    rows[1]["prompt"] = [{"role": "user", "content": "a" * 5000}]
    rows[1]["finish_reason"] = "length"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(completions_table(rows))
    text = console.export_text()
    for part in ("t/5", "[bold]", "unscored: timeout", "exact 1", "x -", "token", "…"):
        assert part in text
    assert text.count("a") < 600


def test_an_unknown_or_missing_tracker_is_an_error_before_the_start(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="'tensorbord' does not exist; did you mean tensorboard\\? There are: .*wandb"):
        check_trackers(["tensorbord"])
    missing = next(name for name in ("aim", "comet_ml", "clearml") if importlib.util.find_spec(name) is None)
    with pytest.raises(ValueError, match=f"pip install {missing}"):
        Tracker(folder, [missing], "p", first_step=0)


def test_tensorboard_has_every_metric_and_forgets_abandoned_steps(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, value in ((0, 6, 1.0), (3, 5, 2.0)):
        with Tracker(folder, ["tensorboard"], "p", first_step=first) as tracker:
            tracker.start({"optimizer": {"lr": 1e-5, "betas": (0.9, 0.95)}, "name": "a"})
            for step in range(first, last):
                tracker.log(step, {"reward/mean": value, "policy/loss": math.nan})
    events = EventAccumulator(str(folder.path / "tensorboard" / "p")).Reload()
    assert {event.step: event.value for event in events.Scalars("reward/mean")} == {0: 1, 1: 1, 2: 1, 3: 2, 4: 2}
    assert "policy/loss" not in events.Tags()["scalars"]


def test_trackers_leave_the_state_of_a_learner_in_this_process_alone(folder: RunFolder) -> None:
    from accelerate import PartialState

    assert not PartialState._shared_state, "another test left its state"
    with Tracker(folder, ["tensorboard"], "p", first_step=0) as tracker:
        tracker.start({})
        assert PartialState._shared_state
    assert not PartialState._shared_state
    learner_state = PartialState(cpu=True)
    try:
        with Tracker(folder, ["tensorboard"], "p", first_step=0) as tracker:
            tracker.start({})
        assert learner_state.initialized
    finally:
        PartialState._reset_state()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_start_log_and_finish(folder: RunFolder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(folder.path / "trackio"))  # read when trackio is imported
    pytest.importorskip(name)
    with Tracker(folder, [name], "p", first_step=0) as tracker:
        tracker.start({"a": {"b": 1}})
        tracker.log(0, {"reward/mean": 0.5})
    assert list((folder.path / name).rglob("*.wandb" if name == "wandb" else "*.db"))


def test_a_tracker_that_cannot_start_shows_its_own_error(folder: RunFolder) -> None:
    (folder.path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises((FileExistsError, NotADirectoryError)), Tracker(folder, ["tensorboard"], "p", 0) as tracker:
        tracker.start({})


def test_system_metrics_measure_this_process() -> None:
    before = system_metrics()
    ballast = bytearray(300_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    after = system_metrics()
    assert after["system/driver_memory_gb"] - before["system/driver_memory_gb"] == pytest.approx(0.3, abs=0.05)
    assert after["system/driver_peak_memory_gb"] >= after["system/driver_memory_gb"] - 0.01
    assert 0 <= after["system/cpu_share"] <= 1
