"""A run that was interrupted and resumed equals one that never was: bit for bit, in weights, optimizer, metrics."""

import logging
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.conftest import REWARDS, Command, Runs, assert_equal_runs, rows, saved
from trainer.run.checkpoint import CheckpointError
from trainer.run.folder import RunFolder, RunFolderError
from trainer.training_run import TrainingRun

HARD = ("batch.minibatches_per_step=2", "batch.epochs_per_step=2", "algorithm.beta=0.1")
"""Several updates on the same completions, and a frozen reference: the initial model, also after a resume."""


def supervised(runs: Runs) -> Runs:
    """Runs that train the same model on text."""
    generator = random.Random(0)
    for i in range(10):
        words = generator.choices(["sun", "moon", "river", "stone", "bird", "tree"], k=100)
        (runs.folder / f"page-{i}.txt").write_text(" ".join(words))
    runs.values["objective"] = {"name": "next_token"}
    runs.values["data"] = {"dataset": {"name": "text", "path": f"{runs.folder}/page-*.txt"}, "eval_size": 4}
    runs.values["batch"] |= {"sequences_per_step": 8, "tokens_per_sequence": 64}
    return runs


def resumed_at_every_step(runs: Runs, interrupt_at: Callable[[int], None], *overrides: str) -> Path:
    """One run that is stopped by Ctrl-C after each of its steps and started again."""
    folder = None
    for step in range(1, runs.values["steps"] + 1):
        interrupt_at(step)
        folder = runs.train(*overrides, resume=folder)
        assert [row["step"] for row in rows(folder)][-1] == step
    assert folder is not None
    return folder


@pytest.mark.parametrize("ref_sync_interval", ["null", "2"])
def test_rollouts_resumed_at_every_step_change_nothing(
    ref_sync_interval: str, runs: Runs, interrupt_at: Callable[[int], None]
) -> None:
    options = (*HARD, f"algorithm.ref_sync_interval={ref_sync_interval}", "checkpoint.every=0")
    expected = runs.train(*options)
    stopped = resumed_at_every_step(runs, interrupt_at, *options)
    assert_equal_runs(stopped, expected, 3)
    assert max(row["policy/kl"] for row in rows(expected)) > 0
    assert saved(expected, 3)["weights"] != saved(stopped, 2)["weights"], "training changes the weights"


def test_a_data_set_resumed_at_every_step_changes_nothing(runs: Runs, interrupt_at: Callable[[int], None]) -> None:
    supervised(runs)
    options = ("batch.minibatches_per_step=2", "model.init=random", "checkpoint.every=0", "eval.at_start=true")
    expected = runs.train(*options)
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *options), expected, 3)
    assert rows(expected)[-1]["eval/loss"] < rows(expected)[0]["eval/loss"]


def _kill_within_a_step(command: Command, run: RunFolder, after: int, wait_s: float) -> bool:
    """Kill -9 at a moment after the checkpoint of step `after`; False when the command had ended before."""
    deadline = time.monotonic() + 120
    while not (run.checkpoints / f"step-{after:06d}").exists() and command.process.poll() is None:
        assert time.monotonic() < deadline, command.output.read_text()
        time.sleep(0.01)
    time.sleep(wait_s)
    ended = command.process.poll() is not None
    command.process.kill()
    command.wait()
    command.assert_nothing_left(within_s=10)
    return not ended


@pytest.mark.slow
def test_a_run_that_was_killed_continues_as_if_it_had_not_been(runs: Runs) -> None:
    """`kill -9` at two moments within steps, then `train --resume`."""
    runs.values |= {"steps": 6, "rewards": [{"function": f"{REWARDS}:slow_low_characters"}]}
    expected = runs.train(*HARD, "name=expected")
    generator = random.Random()
    command = runs.command(*HARD)
    while not (runs.folder / "runs" / "tiny").exists() and command.process.poll() is None:
        time.sleep(0.05)
    run = RunFolder(runs.newest())
    assert _kill_within_a_step(command, run, 1, generator.uniform(0, 0.6)), "it was to be killed before its end"
    _kill_within_a_step(runs.command(*HARD, "--resume"), run, 3, generator.uniform(0, 0.6))
    code, output = runs.command(*HARD, "--resume").wait()
    assert code == 0 and "took over the lock of process" in output, output
    assert runs.newest() == run.path
    assert_equal_runs(run.path, expected, 6)


def test_a_damaged_checkpoint_is_passed_over(
    runs: Runs, interrupt_at: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = runs.train()
    interrupt_at(2)
    run = runs.train()
    file = run / "checkpoints" / "step-000002" / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    interrupt_at(0)
    with caplog.at_level(logging.WARNING, "trainer"):
        runs.train(resume=run)
    assert "step-000002 is damaged: the content of model/model.safetensors has changed" in caplog.text
    assert "falling back" in caplog.text
    assert_equal_runs(run, expected, 3)
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
        runs.train(resume=run)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = runs.train()
    save, kept = TrainingRun._save, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(self: TrainingRun, step: int, metrics: dict[str, float]) -> dict[str, float]:
        if step != 2:
            return save(self, step, metrics)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            return save(self, step, metrics)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            kept.extend(path.name for path in self.folder.checkpoints.iterdir())

    monkeypatch.setattr(TrainingRun, "_save", save_on_a_full_disk)
    run = runs.train()
    assert kept == ["step-000001"]
    assert "the disk is full: the checkpoint of step 2 does not fit" in caplog.text
    assert [row["checkpoint/failed_saves"] for row in rows(run)] == [0, 0, 1]
    assert saved(run, 3) == saved(expected, 3)


def test_ctrl_c_at_a_terminal_costs_no_completion_its_score(runs: Runs) -> None:
    """The signal also reaches the graders' processes. The step in progress is finished and saved, and can resume."""
    runs.values |= {"steps": 1000, "rewards": [{"function": f"{REWARDS}:slow_low_characters"}]}
    command = runs.command("checkpoint.every=0", "eval.every=0")
    deadline = time.monotonic() + 120
    while not list(runs.folder.glob("runs/tiny/*/metrics.jsonl")):
        assert command.process.poll() is None and time.monotonic() < deadline, command.output.read_text()
        time.sleep(0.05)
    command.left()
    command.interrupt()
    code, output = command.wait()
    assert code == 0 and "Traceback" not in output, output
    command.assert_nothing_left(within_s=5)
    last = rows(runs.newest())[-1]
    assert last["reward/scored_samples"] == 16
    assert (runs.newest() / "checkpoints" / f"step-{last['step']:06d}" / "manifest.json").is_file()


def test_two_runs_in_one_folder_are_an_error(runs: Runs) -> None:
    run = RunFolder(runs.train("steps=1", "optimizer.warmup_steps=0"))
    with run.locked(), pytest.raises(RunFolderError, match="another run uses this folder"):
        runs.train(resume=run.path)


def test_weights_that_are_not_all_there_are_found_before_the_start(
    runs: Runs, tmp_path: Path, tiny_model: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match="model.safetensors"):
        runs.train(f"model.path={copy}")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="safetensors"):
        runs.train(f"model.path={copy}")
    assert not (tmp_path / "runs").exists()
