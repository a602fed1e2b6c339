"""Several learner processes over gloo are one learner: same weights, same metrics, whatever is shared out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.trainer.learner_cases import Case, free_port, make_folder, make_setup, run_group, run_steps, whole_weights
from trainer.config import LearnerConfig
from trainer.learner import Learner

pytestmark = pytest.mark.slow

SHARED = {"policy/loss", "policy/entropy", "policy/kl", "policy/ratio", "policy/logp_gap", "policy/tokens", "learner/grad_norm"}
"""Metrics that do not depend on how the work was shared out."""

Result = tuple[dict[str, Tensor], dict[str, float]]


def alone(folder: Path, tokens_per_microbatch: int, groups: int = 5) -> Result:
    learner = Learner(make_setup(folder, tokens_per_microbatch=tokens_per_microbatch))
    metrics = run_steps(learner, Case([], 1, 0, groups=groups), 0)
    weights = whole_weights(learner)
    learner.close()
    return weights, metrics


def assert_same(result: Result, expected: Result) -> None:
    for name, tensor in expected[0].items():
        torch.testing.assert_close(result[0][name], tensor, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    for name in SHARED:
        assert result[1][name] == pytest.approx(expected[1][name], rel=1e-4, abs=1e-6), name


def test_two_processes_are_one_in_every_zero_stage(tmp_path: Path) -> None:
    """Stages 0 to 3, two processes, microbatches of other sizes; each is saved, trained on, loaded and trained again: bit for bit."""
    folder = make_folder(tmp_path / "model")
    setup = make_setup(folder, tokens_per_microbatch=45)
    setups = [replace(setup, learner=LearnerConfig(processes=2, zero_stage=stage, timeout_s=60)) for stage in (0, 1, 2, 3)]
    ranks = run_group(Case(setups, 2, free_port(), save_to=tmp_path / "saved"))
    expected = alone(folder, 10_000)
    assert_same(alone(folder, 30), expected)
    for stage in range(4):
        assert_same(ranks[0][stage], expected)
        assert ranks[0][stage][1] == ranks[1][stage][1], "both processes report the same metrics"


def test_a_process_without_atoms_keeps_step(tmp_path: Path) -> None:
    """One group, two processes: the second computes empty microbatches and changes nothing."""
    folder = make_folder(tmp_path / "model", tied=True)
    setups = [make_setup(folder, learner=LearnerConfig(processes=2, zero_stage=stage, timeout_s=60)) for stage in (2, 3)]
    ranks = run_group(Case(setups, 2, free_port(), groups=1))
    expected = alone(folder, 10_000, groups=1)
    for result in ranks[0]:
        assert_same(result, expected)
