"""`llmquest-rl train` on Ray, interrupted or killed: it saves its state and leaves no process behind."""

import os
import signal
import time

import pytest

from tests.trainer.conftest import Command, Runs, rows

pytestmark = [pytest.mark.ray, pytest.mark.slow]
START_S = 240


def under_way(runs: Runs) -> Command:
    """A long run on Ray that has made its first step."""
    runs.values |= {"steps": 10_000}
    command = runs.command("cluster.kind=ray", "eval.every=0", "checkpoint.every=0")
    deadline = time.monotonic() + START_S
    while not list(runs.folder.glob("runs/tiny/*/metrics.jsonl")):
        assert command.process.poll() is None and time.monotonic() < deadline, command.output.read_text()
        time.sleep(0.1)
    return command


def test_ctrl_c_saves_and_leaves_nothing_running(runs: Runs) -> None:
    command = under_way(runs)
    command.left()
    command.interrupt()
    code, output = command.wait()
    assert code == 0, output
    assert "finishing this step, then saving" in output and "Traceback" not in output
    command.assert_nothing_left(within_s=10)
    last = rows(runs.newest())[-1]["step"]
    assert (runs.newest() / "checkpoints" / f"step-{last:06d}" / "manifest.json").is_file()


def test_a_killed_driver_takes_everything_with_it(runs: Runs) -> None:
    command = under_way(runs)
    assert len(command.left()) > 4, "Ray, its actors, the graders' processes"
    os.kill(command.process.pid, signal.SIGKILL)
    command.wait()
    command.assert_nothing_left(within_s=20)
