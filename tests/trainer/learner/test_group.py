"""Several learner processes over gloo are one learner: same weights and metrics for any division of the work."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives.distill import Offline, OnPolicy, Teacher
from llmquest_rl.objectives.policy import Policy
from tests.trainer.learner.learner_cases import (
    Case,
    dpo_pairs,
    kto_pairs,
    make_folder,
    make_setup,
    minibatches,
    preference,
    run_group,
    run_steps,
    whole_weights,
)
from trainer.cluster.worker_group import free_port
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner
from trainer.learner.setup import LearnerSetup

pytestmark = pytest.mark.slow

SHARED = {
    "policy/loss",
    "policy/entropy",
    "policy/kl",
    "policy/ratio",
    "policy/logp_gap",
    "policy/tokens",
    "learner/grad_norm",
}
"""Metrics that do not depend on how the work was shared out."""

Result = tuple[dict[str, Tensor], dict[str, float], list[Tensor]]
"""Weights, metrics, and the log-probs of the first minibatch's groups, for any number of processes in their order."""
Draw = Callable[..., list[list[SequenceGroup]]]


def alone(
    folder: Path, tokens_per_microbatch: int = 10_000, groups: int = 5, draw: Draw = minibatches, **changes: Any
) -> Result:
    """One process on the same data."""
    learner = Learner(make_setup(folder, tokens_per_microbatch=tokens_per_microbatch, **changes))
    scored = learner.logprobs(draw(0, groups=groups)[0])
    metrics = run_steps(learner, Case([], 1, 0, groups=groups, draw=draw), 0)
    weights = whole_weights(learner)
    learner.close()
    return weights, metrics, scored


def two(stage: int) -> LearnerConfig:
    return LearnerConfig(processes=2, zero_stage=stage, timeout_s=60)  # type: ignore[arg-type]


def assert_same(result: Result, expected: Result, tolerance: float = 1e-4, metrics: set[str] = SHARED) -> None:
    for name, tensor in expected[0].items():
        difference = (result[0][name] - tensor).float().norm() / tensor.float().norm()
        assert difference < tolerance, name
    for name in metrics:
        assert result[1][name] == pytest.approx(expected[1][name], rel=tolerance, abs=1e-6), name


def test_two_processes_are_one_in_every_zero_stage(tmp_path: Path) -> None:
    """With microbatches of another size. Each is also saved, trained, loaded and trained again: bit for bit."""
    folder = make_folder(tmp_path / "model")
    setup = make_setup(folder, tokens_per_microbatch=45)
    exact = [replace(setup, learner=two(stage)) for stage in (0, 1, 2, 3)]
    rounded = [replace(setup, learner=two(stage), dtype="bfloat16") for stage in (0, 2, 3)]
    from_teacher = taught(replace(setup, reference_path=make_teacher(tmp_path / "teacher")))
    setups = [*exact, *rounded, *from_teacher]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), save_to=tmp_path / "saved"))
    expected = alone(folder)
    assert_same(alone(folder, 30), expected)
    for result, other in zip(ranks[0][:4], ranks[1][:4], strict=True):
        assert_same(result, expected)
        assert result[1] == other[1], "both processes report the same metrics"
    expected = alone(folder, dtype="bfloat16")
    for result in ranks[0][4:7]:
        assert_same(result, expected, tolerance=0.05)
    for one, result, other in zip(from_teacher, ranks[0][7:], ranks[1][7:], strict=True):
        metrics = {name for name in result[1] if name in OF_TEACHERS}
        expected = alone(folder, objective=one.objective, reference_path=one.reference_path)
        assert_same(result, expected, metrics=metrics | {"learner/grad_norm"})
        assert len(metrics) == 2 and result[1] == other[1]


OF_TEACHERS = {"train/reverse_kl", "policy/ratio", "train/kl", "train/nll"}


def taught(setup: LearnerSetup) -> list[LearnerSetup]:
    """Distillation on-policy, and offline with a partitioned student, from a teacher that no process shares."""
    algorithm = resolve("reinforce", {"surrogate": "clip", "aggregation": "token_mean"})
    on_policy = OnPolicy(Policy(algorithm, 0.9, 12), Teacher("teacher"))
    offline = Offline(Teacher("teacher", gives_distributions=True), nll_weight=0.1)
    return [
        replace(setup, objective=objective, learner=two(stage)) for objective, stage in ((on_policy, 0), (offline, 3))
    ]


def make_teacher(folder: Path) -> Path:
    """A model with weights, wider than the student."""
    shape = replace(LlamaConfig.tiny(), hidden_size=48, initializer_range=0.2)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    save_model(folder, disk_tensors(new_model(folder, torch.float32, seed=7)), folder)
    return folder


OF_PAIRS = {"train/loss", "train/margin", "train/chosen_logprob", "train/rejected_reward", "learner/grad_norm"}


@pytest.mark.parametrize(("method", "draw"), [("dpo", dpo_pairs), ("kto", kto_pairs)])
def test_two_processes_are_one_for_preferences(method: str, draw: Draw, tmp_path: Path) -> None:
    """Pairs are not split, the reference is partitioned or not, and the KL of `kto` is that of all processes."""
    folder = make_folder(tmp_path / "model")
    setup = make_setup(folder, objective=preference(method), tokens_per_microbatch=60)
    setups = [replace(setup, learner=two(stage)) for stage in (0, 3)]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), save_to=tmp_path / "saved", draw=draw))
    expected = alone(folder, draw=draw, objective=preference(method))
    metrics = OF_PAIRS | ({"train/kl"} if method == "kto" else {"train/accuracy"})
    assert_same(alone(folder, 40, draw=draw, objective=preference(method)), expected, metrics=metrics)
    for result, other in zip(*ranks, strict=True):
        assert_same(result, expected, metrics=metrics)
        assert result[1] == other[1], "both processes report the same metrics"
        for i, values in enumerate(expected[2]):
            torch.testing.assert_close((result, other)[i % 2][2][i // 2], values, rtol=1e-5, atol=1e-6)


def test_a_process_without_groups_keeps_step(tmp_path: Path) -> None:
    """One group, two processes: the second computes empty microbatches and changes nothing."""
    folder = make_folder(tmp_path / "model", tied=True)
    setups = [make_setup(folder, learner=two(stage)) for stage in (2, 3)]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), groups=1))
    expected = alone(folder, 10_000, groups=1)
    for result in ranks[0]:
        assert_same(result, expected)
