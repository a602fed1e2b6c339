"""A mixture of experts in the learner: routers are balanced once for each update, equally on every process and in
every ZeRO stage, and float32 weights stay float32."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.deepseek_v3 import DeepseekV3Config
from rollout.weights import WeightSnapshot, take_snapshot, verify
from tests.trainer.learner.learner_cases import Case, make_setup, minibatches, run_group, run_steps, whole_weights
from trainer.cluster.worker_group import free_port
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner
from trainer.run.metric_table import METRICS

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
RATE = 0.01


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny DeepSeek-V3 without its balance loss, which is a mean over the sequences of a microbatch and so depends a
    little on the division into microbatches."""
    path = tmp_path / "model"
    path.mkdir()
    shape = replace(DeepseekV3Config.tiny(), aux_loss_alpha=0.0, router_bias_update_rate=RATE)
    (path / "config.json").write_text(json.dumps(shape.to_hf()))
    return path


@pytest.fixture
def learner(folder: Path) -> Iterator[Learner]:
    opened = Learner(make_setup(folder, dtype="bfloat16"))
    yield opened
    opened.close()


def test_each_update_moves_the_bias_once(learner: Learner) -> None:
    """The bias moves once, also with several microbatches, old and reference log-probs, and evaluation in between."""
    before = whole_weights(learner)[BIAS]
    assert before.dtype == torch.float32 and not before.any()
    learner.evaluate(minibatches(9)[0])
    assert torch.equal(whole_weights(learner)[BIAS], before)
    metrics = learner.update(minibatches(0, count=1), 1)
    bias = whole_weights(learner)[BIAS]
    assert bias.any()
    assert all(size == pytest.approx(RATE) for size in bias[bias != 0].abs().tolist())
    assert metrics["moe/max_vio"] > 0
    assert {name for name in metrics if name.startswith("moe/")} <= set(METRICS)
    learner.update(minibatches(1, count=2), 2)
    assert float(whole_weights(learner)[BIAS].abs().max()) <= 5 * RATE + 1e-6


def test_weights_are_published_one_expert_at_a_time(learner: Learner) -> None:
    tensors, checksums = take_snapshot(learner.weights())
    verify(WeightSnapshot(tensors, checksums))
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert tensors[key].untyped_storage().nbytes() == tensors[key].nbytes
    assert tensors[BIAS].dtype == torch.float32
    assert tensors[key].dtype == torch.bfloat16


@pytest.mark.slow
def test_two_processes_are_one_in_every_zero_stage(folder: Path, tmp_path: Path) -> None:
    """Each is also saved, trained, loaded and trained again: bit for bit."""
    setup = make_setup(folder, tokens_per_microbatch=45)
    learners = [LearnerConfig(processes=2, zero_stage=stage, timeout_s=60) for stage in (0, 2, 3)]  # type: ignore[arg-type]
    setups = [replace(setup, learner=config) for config in learners]
    ranks = run_group(Case(setups, 2, free_port("127.0.0.1"), save_to=tmp_path / "saved"))
    alone = Learner(make_setup(folder))
    metrics = run_steps(alone, Case([], 1, 0), 0)
    expected = whole_weights(alone)
    alone.close()
    for result in (*ranks[0], *ranks[1]):
        for name, tensor in expected.items():
            assert float((result[0][name] - tensor).norm() / tensor.norm()) < 1e-3, name
        for name in (
            "moe/expert_tokens_min",
            "moe/expert_tokens_max",
            "moe/max_vio",
            "moe/max_vio_worst",
            "moe/idle_share",
            "moe/entropy",
            "policy/loss",
        ):
            assert result[1][name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), name
