"""Several learner processes with a teacher are one learner, in ZeRO stages that partition the student or do not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives.distill import Offline, OnPolicy, Teacher
from llmquest_rl.objectives.policy import Policy
from tests.trainer.learner.learner_cases import Case, make_folder, make_setup, run_group
from tests.trainer.learner.test_group import alone, assert_same, two
from trainer.cluster.worker_group import free_port

pytestmark = pytest.mark.slow

ALGORITHM = resolve("reinforce", {"surrogate": "clip", "aggregation": "token_mean"})
ON_POLICY = OnPolicy(Policy(ALGORITHM, 0.9, 12), Teacher("teacher"))
OFFLINE = Offline(Teacher("teacher", gives_distributions=True), nll_weight=0.1)
METRICS = {ON_POLICY: {"train/reverse_kl", "policy/loss", "policy/ratio"}, OFFLINE: {"train/kl", "train/nll"}}


def make_teacher(folder: Path) -> Path:
    """A model with weights, wider than the student."""
    shape = replace(LlamaConfig.tiny(), hidden_size=48, initializer_range=0.2)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    save_model(folder, disk_tensors(new_model(folder, torch.float32, seed=7)), folder)
    return folder


def test_two_processes_with_a_teacher_are_one(tmp_path: Path) -> None:
    """Also saved, trained, loaded and trained again: bit for bit."""
    folder, teacher = make_folder(tmp_path / "model"), make_teacher(tmp_path / "teacher")
    setup = make_setup(folder, reference_path=teacher, tokens_per_microbatch=45)
    kinds = [(ON_POLICY, 0), (OFFLINE, 3)]
    setups = [replace(setup, objective=objective, learner=two(stage)) for objective, stage in kinds]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), save_to=tmp_path / "saved"))
    for objective, metrics in METRICS.items():
        expected = alone(folder, objective=objective, reference_path=teacher)
        for (of, _), result, other in zip(kinds, *ranks, strict=True):
            if of == objective:
                assert_same(result, expected, metrics=metrics | {"learner/grad_norm"})
                assert result[1] == other[1], "both processes report the same metrics"
