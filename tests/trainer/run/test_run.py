"""The run folder, its lock, the progress display and stopping, with real processes and signals."""

import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from trainer.run.folder import RunFolder, RunFolderError
from trainer.run.progress import Progress, format_duration
from trainer.run.stop import StopSignal

HOLD = """
import sys, time
from pathlib import Path
from trainer.run.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""

LOOP = """
import sys, time
from trainer.run.stop import StopSignal
with StopSignal() as stop:
    for step in stop.steps(range(1000)):
        print(step, flush=True)
        time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def new_run(root: Path, name: str = "a") -> RunFolder:
    folder = RunFolder.create(root, name)
    folder.config.write_text(f"name: {name}\n")
    return folder


def test_runs_started_in_one_second_have_folders_that_sort_by_start(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_run(tmp_path).path, range(24)))
    assert len(set(made)) == 24
    in_order = [new_run(tmp_path).path for _ in range(3)]
    assert in_order == sorted(in_order)
    assert (tmp_path / "latest").resolve() == in_order[-1]
    assert not list(tmp_path.glob(".latest*"))


def test_open_finds_a_run_by_folder_by_name_and_by_latest(tmp_path: Path) -> None:
    first, second, other = new_run(tmp_path), new_run(tmp_path), new_run(tmp_path, "b")
    assert RunFolder.open(first.path) == first
    assert RunFolder.open(tmp_path / "a") == second
    assert RunFolder.open(str(tmp_path / "latest")) == other
    assert all(path.is_dir() for path in (first.logs, first.checkpoints, first.rollouts))


def test_the_folder_of_runs_can_be_moved(tmp_path: Path) -> None:
    new_run(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert RunFolder.open(tmp_path / "elsewhere" / "latest").path.is_dir()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "two words", "latest"])
def test_a_name_that_cannot_be_a_folder_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="not a valid name for a run folder"):
        RunFolder.create(tmp_path, name)


def test_no_run_and_a_folder_in_the_way_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run here"):
        RunFolder.open(tmp_path / "nothing")
    (tmp_path / "latest").mkdir()
    with pytest.raises(RunFolderError, match="is not a symbolic link"):
        RunFolder.create(tmp_path, "a")


def test_a_second_run_in_a_folder_is_an_error_and_a_dead_one_is_taken_over(tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    holder = python(HOLD, folder.path)
    assert line(holder) == "held"
    with (
        pytest.raises(RunFolderError, match=f"another run uses this folder .process {holder.pid} "),
        folder.locked(),
    ):
        pass
    holder.kill()
    holder.communicate()
    with folder.locked() as message:
        assert message is not None and f"took over the lock of process {holder.pid}" in message
        with pytest.raises(RunFolderError, match=f"process {os.getpid()}"), folder.locked():
            pass
    with folder.locked() as message:
        assert message is None


def test_a_lock_of_another_process_with_a_used_again_id_is_taken_over(tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    with folder.locked():
        pid, host, started = (folder.path / "lock").read_text().split()
    (folder.path / "lock").write_text(f"{pid} {host} {float(started) - 1000}")
    with folder.locked() as message:
        assert message is not None
    (folder.path / "lock").write_text(f"{pid} another-host {float(started) - 1000}")
    with pytest.raises(RunFolderError, match="on another-host.*delete"), folder.locked():
        pass


def test_one_of_many_simultaneous_runs_gets_the_lock(tmp_path: Path) -> None:
    folder = new_run(tmp_path)
    holders = [python(HOLD, folder.path) for _ in range(4)]
    try:
        deadline = time.monotonic() + 30
        while sum(holder.poll() is None for holder in holders) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        alive = [holder for holder in holders if holder.poll() is None]
        assert len(alive) == 1
        assert line(alive[0]) == "held"
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_step_and_saves(number: signal.Signals) -> None:
    loop = python(LOOP, 0.5)
    assert line(loop) == "0"
    loop.send_signal(number)
    out, err = loop.communicate(timeout=30)
    assert out.split() == ["saved"]  # step 0 ended, step 1 did not begin
    assert f"{number.name}: finishing this step" in err
    assert loop.returncode == 0


def test_the_second_signal_aborts() -> None:
    loop = python(LOOP, 60)
    assert line(loop) == "0"
    loop.send_signal(signal.SIGINT)
    assert loop.stderr is not None
    while "finishing" not in loop.stderr.readline():
        pass
    loop.send_signal(signal.SIGINT)
    out, err = loop.communicate(timeout=30)
    assert "saved" not in out and "KeyboardInterrupt" in err
    assert loop.returncode != 0


def test_handlers_are_restored_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before

    def in_a_thread() -> list[int]:
        with StopSignal() as stop:
            return list(stop.steps(range(3)))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(in_a_thread).result() == [0, 1, 2]


def test_plain_progress_is_one_line_a_step() -> None:
    out = io.StringIO()
    with Progress(12, done=2, console=Console(file=out, width=40)) as progress:
        progress.phase("rollout")
        progress.advance({"reward/mean": 0.421875, "rollout/tokens_per_s": 1834.2, "train/loss": None, "x/y": 3.0})
        progress.print("[not markup] " + "long " * 20)
        progress.advance({"policy/loss": -0.001})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("train 3/12  reward 0.4219  rollout tok/s 1834  0.0 s/step")
    assert lines[1].startswith("[not markup] long")
    assert lines[2].startswith("train 4/12  loss -0.001")
    assert len(lines) == 3


def test_time_left_follows_the_measured_rate() -> None:
    out = io.StringIO()
    with Progress(100, done=50, console=Console(file=out, width=200)) as progress:
        time.sleep(0.4)
        progress.advance({})
        time.sleep(0.4)
        progress.advance({})
    seconds, left = out.getvalue().splitlines()[1].split("  ")[1:]
    assert float(seconds.split()[0]) == pytest.approx(0.4, abs=0.15)
    minutes, rest = left.split()[0].split(":")
    assert 60 * int(minutes) + int(rest) == pytest.approx(48 * 0.4, abs=7)


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Progress(4, console=Console(file=out, force_terminal=True, width=120)) as progress:
        progress.phase("rollout")
        progress.advance({"reward/mean": 0.5})
        progress.print("a line above")
    assert "1/4" in out.getvalue() and "reward 0.5" in out.getvalue() and "a line above" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
