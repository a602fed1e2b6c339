"""A run that was interrupted and resumed equals one that never was: bit for bit, in weights, optimizer and metrics."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.conftest import Runs, assert_equal_runs, rows, saved
from trainer.checkpoint import CheckpointError
from trainer.loop import train

HARD = ("batch.updates_per_step=2", "batch.passes_per_step=2", "algorithm.beta=0.1")
"""Several updates on the same completions, and a frozen reference that must be the initial model also after a resume."""


def supervised(runs: Runs) -> Runs:
    """The same model on text."""
    generator = random.Random(0)
    for i in range(10):
        words = generator.choices(["sun", "moon", "river", "stone", "bird", "tree"], k=100)
        (runs.folder / f"page-{i}.txt").write_text(" ".join(words))
    runs.values["objective"] = {"name": "next_token"}
    runs.values["data"] = {"dataset": {"name": "text", "path": f"{runs.folder}/page-*.txt"}, "eval_samples": 4}
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


def test_rollouts_resumed_at_every_step_change_nothing(runs: Runs, interrupt_at: Callable[[int], None]) -> None:
    expected = runs.train(*HARD, "checkpoint.every=0")
    stopped = resumed_at_every_step(runs, interrupt_at, *HARD, "checkpoint.every=0")
    assert_equal_runs(stopped, expected, 3)
    assert max(row["policy/kl"] for row in rows(expected)) > 0
    assert saved(expected, 3)["weights"] != saved(stopped, 2)["weights"], "training changes the weights"


def test_a_data_set_resumed_at_every_step_changes_nothing(runs: Runs, interrupt_at: Callable[[int], None]) -> None:
    supervised(runs)
    options = ("batch.updates_per_step=2", "model.init=random", "checkpoint.every=0", "eval.at_start=true")
    expected = runs.train(*options)
    assert_equal_runs(resumed_at_every_step(runs, interrupt_at, *options), expected, 3)
    assert rows(expected)[-1]["eval/loss"] < rows(expected)[0]["eval/loss"]
