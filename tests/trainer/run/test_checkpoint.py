"""Checkpoints survive a kill at any moment, a full disk and damage: real processes, signals and a real small disk."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.run.checkpoint import Best, CheckpointError, best_checkpoint, latest, load, save

SAVE_FOR_EVER = """
import os, sys
from pathlib import Path
from trainer.run.checkpoint import latest, save
folder, step = Path(sys.argv[1]), int(sys.argv[2])
def write(path):
    for i in range(4):
        (path / f"part-{i}").write_bytes(step.to_bytes(4, "little") * 50_000)
print("saving", flush=True)
while True:
    save(folder, step, write, {"step": step, "payload": [0.1] * 5000}, keep_last=1)
    step += 1 if os.urandom(1)[0] % 2 else 0  # now and then the same step again, which replaces a checkpoint
"""

WRITERS = """
def plain(path):
    (path / "w").write_bytes(bytes(300_000))
def torch_save(path):
    import torch
    torch.save(torch.zeros(75_000), path / "w")
def safetensors(path):
    import numpy
    from safetensors.numpy import save_file
    save_file({"w": numpy.zeros(75_000, "float32")}, path / "w")
"""

FILL_THE_DISK = f"""
import resource, signal, sys
from pathlib import Path
from trainer.run.checkpoint import DiskFullError, check_disk_space, latest, save
{WRITERS}
folder, write, limit = Path(sys.argv[1]), globals()[sys.argv[2]], int(sys.argv[3])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save(folder, 1, write, {{}}, keep_last=50)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
steps = [1]
try:
    for step in range(2, 20):
        if sys.argv[4] == "checked":
            check_disk_space(folder, step)
        save(folder, step, write, {{}}, keep_last=50)
        steps.append(step)
except DiskFullError as error:
    print(error)
    assert latest(folder).step == steps[-1], (latest(folder).step, steps)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{{step:06d}}" for step in steps]
    print("intact", len(steps))
"""


def write_weights(path: Path) -> None:
    save_file({"w": torch.arange(5000.0)}, path / "model.safetensors")
    (path / "learner-0").mkdir()
    (path / "learner-0" / "rng.bin").write_bytes(random.Random(0).randbytes(3000))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "position": 2**80 + 1,
        "rng": [3, [1, 2], None],
        "float": 0.1 + 0.2,
        "text": "é\n",
        "flag": True,
    }
    path = save(tmp_path, 3, write_weights, state, keep_last=2)
    found = latest(tmp_path)
    assert (found.path, found.step, found.state, found.messages) == (path, 3, state, [])
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == {
        "model.safetensors",
        "learner-0/rng.bin",
        "state.json",
    }


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: "x"}}, {"a": [torch.zeros(1)]}, {"a": {"b": {3}}}])
def test_a_state_that_json_would_change_is_an_error(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"state\.a.*: JSON "):
        save(tmp_path, 1, write_weights, state, keep_last=1)
    assert not list(tmp_path.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = {1: 0.2, 2: 0.9, 3: 0.4, 4: None, 5: 0.9, 6: float("nan"), 7: 0.1, 8: 0.3}
    kept = {}
    for step, score in scores.items():
        best = None if score is None else Best("eval/accuracy", score)
        save(tmp_path, step, write_weights, {}, keep_last=2, best=best)
        kept[step] = steps(tmp_path)
    # A step that was not evaluated has no say in which is the best, and takes it from nobody.
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [4, 5], 6: [5, 6], 7: [5, 6, 7], 8: [5, 7, 8]}
    assert best_checkpoint(tmp_path) == tmp_path / "step-000005"


def test_the_smallest_loss_is_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0]):
        save(tmp_path, step, write_weights, {}, keep_last=1, best=Best("eval/loss", loss, "min"))
    assert steps(tmp_path) == [1, 3]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000001"


def test_a_resume_from_an_older_step_drops_the_abandoned_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, write_weights, {"run": 1}, keep_last=3)
    save(tmp_path, 4, write_weights, {"run": 2}, keep_last=3)
    assert steps(tmp_path) == [2, 4]
    assert latest(tmp_path).state == {"run": 2}


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "model.safetensors", 100),
    "missing": lambda path: (path / "learner-0" / "rng.bin").unlink(),
    "one bit": lambda path: flip_a_bit(path / "model.safetensors"),
    "state": lambda path: (path / "state.json").write_text("{}"),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "another format": lambda path: (path / "manifest.json").write_text('{"format": 0, "step": 1}'),
}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_saying_so(tmp_path: Path, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, step, write_weights, {"step": step}, keep_last=2)
    DAMAGES[damage](tmp_path / "step-000002")
    found = latest(tmp_path)
    assert found.state == {"step": 1}
    (message,) = found.messages
    assert "step-000002" in message and "falling back" in message
    save(tmp_path, 2, write_weights, {"step": 2, "again": True}, keep_last=2)
    assert latest(tmp_path).state == {"step": 2, "again": True}


def test_the_message_names_the_file_and_its_size(tmp_path: Path) -> None:
    path = save(tmp_path, 1, write_weights, {}, keep_last=1)
    os.truncate(path / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors has 100 bytes instead of 20,\d\d\d"):
        load(path)


def test_a_checkpoint_of_another_version_says_how_to_keep_its_weights(tmp_path: Path) -> None:
    path = save(tmp_path, 1, write_weights, {}, keep_last=1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 2', '"format": 1'))
    with pytest.raises(CheckpointError, match=f"another version .format 1; .* model.path={path}/model"):
        load(path)


def test_no_checkpoint_is_an_error_that_tells_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        latest(tmp_path / "never")
    path = save(tmp_path, 1, write_weights, {}, keep_last=1)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing(.|\n)*no complete checkpoint"):
        latest(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_nothing_of_it(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path, 1, write_weights, {"step": 1}, keep_last=1)

    def write(path: Path) -> None:
        write_weights(path)
        raise error

    with pytest.raises(type(error)):
        save(tmp_path, 2, write, {}, keep_last=1)
    assert steps(tmp_path) == [1]
    assert latest(tmp_path).step == 1


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """keep_last=1 is the hardest case: there is never more than one older checkpoint to fall back on."""
    randomness, seen, leftovers = random.Random(1), [], 0
    step = 1
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(step)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        # The first checkpoint must exist before there is something to lose.
        while not any(tmp_path.glob("step-*")):
            time.sleep(0.01)
        time.sleep(randomness.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        leftovers += any(path.name.startswith(".tmp") or path.suffix for path in tmp_path.iterdir())
        found = latest(tmp_path)
        assert found.messages == []
        assert found.state["step"] == found.step >= step
        assert (found.path / "part-3").read_bytes() == found.step.to_bytes(4, "little") * 50_000
        step = found.step
        seen.append(step)
    assert leftovers > 0, f"no kill ever hit a save: {seen}"


@pytest.mark.parametrize(
    ("writer", "room"),
    [("plain", "unchecked"), ("torch_save", "unchecked"), ("safetensors", "unchecked"), ("plain", "checked")],
)
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, writer: str, room: str) -> None:
    """A real 2 MB file system in its own mount namespace, which ends with the process."""
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    unshare = ["unshare", *as_root, "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here; the test with a limit on file size covers the same path")
    program = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), writer, "0", room]
    run = subprocess.run([*unshare, f'{mount} && exec "$0" "$@"', *program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the disk is full: the checkpoint of step" in run.stdout and "Older checkpoints are intact" in run.stdout
    assert int(run.stdout.split("intact")[-1]) >= 4


@pytest.mark.parametrize("writer", ["plain", "safetensors"])
def test_a_limit_on_file_size_counts_as_a_full_disk(tmp_path: Path, writer: str) -> None:
    """EFBIG comes from the same system calls as ENOSPC and needs no privileges."""
    program = [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), writer, "100000", "unchecked"]
    run = subprocess.run(program, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "the disk is full: the checkpoint of step 2" in run.stdout and run.stdout.endswith("intact 1\n")


def test_sealing_and_verifying_cost_less_than_writing(tmp_path: Path) -> None:
    """Checksums are worth it only while they are cheap: on two cores they ran at more than 1 GB/s."""
    size = 200_000_000
    data = os.urandom(1_000_000)

    def write(path: Path) -> None:
        for name in ("a", "b"):
            with (path / name).open("wb") as file:
                for _ in range(size // 2 // len(data)):
                    file.write(data)

    path = save(tmp_path, 1, write, {}, keep_last=1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    load(path)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 1.0, f"{size / cpu_seconds / 1e9:.2f} GB/s for each core"
