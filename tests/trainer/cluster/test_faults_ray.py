"""Runs on real Ray actors: several of each kind, some of which die, hang or are interrupted."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from llmquest_rl.types import Group
from tests.trainer.conftest import Runs, rows
from trainer.cluster.ray_group import RayWorkerGroup
from trainer.cluster.worker_group import ClusterError
from trainer.run.trained import trained_model
from trainer.sources.replay import load_rollouts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = (
    "cluster.kind=ray",
    "rollout.workers=2",
    "graders.workers=2",
    "learner.processes=2",
    "rollout.save=true",
    "algorithm.beta=0.1",
    "eval.every=0",
    "optimizer.eps=1e-3",
)
"""A large eps: updates are then smooth in the gradient, so that rounding stays rounding."""

ONE_EACH = ("rollout.workers=1", "graders.workers=1", "learner.processes=1", "algorithm.beta=0")

Fault = Callable[[list[int]], None]
"""Does something to the members of a group, given their process ids."""


def assert_same_groups(mine: list[Group], theirs: list[Group]) -> None:
    """Check that both have the same completions with the same scores."""
    for group, other in zip(mine, theirs, strict=True):
        assert [c.token_ids for c in group.completions] == [c.token_ids for c in other.completions]
        assert [s.value for s in group.scores] == [s.value for s in other.scores]


def assert_same_weights(run: Path, expected: Path) -> None:
    """Up to rounding: several learners add up in another order than one."""
    mine, theirs = (load_file(folder / "checkpoints/step-000003/model/model.safetensors") for folder in (run, expected))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} differs")


def ray_processes() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with_name = " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
        if "raylet" in with_name or "gcs_server" in with_name or "ray::" in with_name:
            found.add(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 20
    while (left := ray_processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left and not ray.is_initialized()


@pytest.fixture
def inject(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int, Fault], None]:
    """Lets a fault happen while the n-th call of a method of a group is under way."""

    def set_up(group: str, method: str, call: int, fault: Fault) -> None:
        for name in ("map", "call_each"):
            monkeypatch.setattr(
                RayWorkerGroup, name, _with_fault(getattr(RayWorkerGroup, name), group, method, call, fault)
            )

    return set_up


def _with_fault(original: Any, group: str, method: str, call: int, fault: Fault) -> Any:
    calls = 0

    def wrapped(self: RayWorkerGroup[Any], called: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if (self.name, called.__name__) == (group, method):
            calls += 1
            if calls == call:
                fault([ray.get(built) for built in self.built])
        return original(self, called, *arguments, **options)

    return wrapped


def kill(member: int) -> Fault:
    """The process stands still, so that it is surely at work when it is killed."""

    def fault(pids: list[int]) -> None:
        os.kill(pids[member], signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (pids[member], signal.SIGKILL)).start()

    return fault


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Path]:
    """The run that others are compared with, made by the first test."""
    return {}


def test_two_of_each_train_what_one_process_trains(runs: Runs, undisturbed: dict[str, Path]) -> None:
    expected = runs.train(*RAY, "cluster.kind=inline", "rollout.workers=1", "learner.processes=1", "name=inline")
    run = runs.train(*RAY, "learner.zero_stage=2")
    undisturbed["run"] = run
    for step in (1, 2, 3):
        assert_same_groups(load_rollouts(run / "rollouts", step), load_rollouts(expected / "rollouts", step))
    assert_same_weights(run, expected)
    members = [f"{name}-{i}.log" for name in ("grader", "learner", "rollout") for i in (0, 1)]
    assert sorted(path.name for path in (run / "logs").iterdir()) == members


def test_dead_workers_and_graders_are_replaced_and_nothing_changes(
    runs: Runs, undisturbed: dict[str, Path], inject: Callable[[str, str, int, Fault], None]
) -> None:
    """ZeRO-3. A rollout worker dies while it samples the second step, a grader while it grades the third."""
    inject("rollout", "generate", 2, kill(1))
    inject("grader", "grade", 3, kill(0))
    run = runs.train(*RAY, "learner.zero_stage=3")
    assert [row["rollout/worker_restarts"] for row in rows(run)] == [0, 1, 1]
    assert [row["reward/grader_restarts"] for row in rows(run)] == [0, 0, 1]
    for step in (1, 2, 3):
        groups = load_rollouts(run / "rollouts", step)
        assert {c.weight_version for group in groups for c in group.completions} == {step - 1}
        assert_same_groups(groups, load_rollouts(undisturbed["run"] / "rollouts", step))
    assert_same_weights(run, undisturbed["run"])


def test_a_dead_reward_model_is_rebuilt_and_nothing_changes(
    runs: Runs, reward_model_run: Path, inject: Callable[[str, str, int, Fault], None]
) -> None:
    """One of its two processes dies while it scores the second step; there are no other reward workers."""
    runs.values["rewards"] = []
    model = trained_model(str(reward_model_run))
    reward_model = {"name": "scorer", "path": str(model), "system_prompt": "Add.", "dtype": "float32", "workers": 2}
    runs.values["reward_models"] = [reward_model]
    expected = runs.train(*RAY, *ONE_EACH, "cluster.kind=inline", "name=inline")
    inject("reward-model-scorer", "grade", 2, kill(1))
    run = runs.train(*RAY, *ONE_EACH)
    assert [row["reward/grader_restarts"] for row in rows(run)] == [0, 1, 1]
    for step in (1, 2, 3):
        groups, others = (load_rollouts(folder / "rollouts", step) for folder in (run, expected))
        for group, other in zip(groups, others, strict=True):
            assert [c.token_ids for c in group.completions] == [c.token_ids for c in other.completions]
            assert [s.value for s in group.scores] == pytest.approx([s.value for s in other.scores], abs=1e-5)
    assert sorted(path.name for path in (run / "logs").iterdir() if "reward-model" in path.name) == [
        "reward-model-scorer-0.log",
        "reward-model-scorer-1.log",
    ]


def test_a_dead_learner_ends_the_run_and_is_named(runs: Runs, inject: Callable[[str, str, int, Fault], None]) -> None:
    inject("learner", "update", 2, kill(1))
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"learner-1 died during update .*; its log: .*/logs/learner-1\.log"):
        runs.train(*RAY, *ONE_EACH, "learner.zero_stage=2", "learner.processes=2")
    assert time.monotonic() - started < 150
    assert [row["step"] for row in rows(runs.newest())] == [1]


def test_a_worker_that_hangs_is_named(runs: Runs, inject: Callable[[str, str, int, Fault], None]) -> None:
    inject("rollout", "generate", 2, lambda pids: os.kill(pids[0], signal.SIGSTOP))
    message = r"no answer to generate within 5 s from rollout-0 \(log: .*rollout-0\.log\)\. If the work is only slow"
    with pytest.raises(ClusterError, match=message):
        runs.train(*RAY, *ONE_EACH, "rollout.timeout_s=5")
