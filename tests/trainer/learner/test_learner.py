"""One learner process: against plain PyTorch, and against everything that can go wrong with a gradient."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.metrics import DERIVED
from llmquest_rl.models.checkpoint.load_save import load_model, new_model
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.objectives.next_token import NextToken
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.optim.schedules import lr_factor
from rollout.weights import WeightSnapshot, verify
from tests.trainer.learner.learner_cases import OPTIMIZER, POLICY, make_folder, make_setup, minibatches, whole_weights
from trainer.config.schema import LearnerConfig, OptimizerConfig
from trainer.learner.learner import Learner
from trainer.learner.state import TooManySkippedUpdatesError, seed_everything
from trainer.run.metric_table import METRICS

OpenLearner = Callable[..., Learner]
ALL_STAGES = [(dtype, stage) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


@pytest.fixture
def open_learner(folder: Path) -> Iterator[OpenLearner]:
    """Opens one learner at a time, because a process has one process group, and closes the last one."""
    with ExitStack() as stack:

        def open_(stage: int = 0, offload: str = "none", max_skipped_updates: int = 1, **changes: Any) -> Learner:
            stack.close()
            options = {
                "zero_stage": stage,
                "offload": offload,
                "max_skipped_updates": max_skipped_updates,
                "timeout_s": 60,
            }
            config = LearnerConfig.model_validate(options)
            learner = Learner(make_setup(folder, learner=config, **changes))
            stack.callback(learner.close)
            return learner

        yield open_


def plain_training(folder: Path, objective: Policy, steps: int, epochs: int) -> dict[str, Tensor]:
    """Compute the learner's updates with torch alone: no packing, no accumulation, no DeepSpeed."""
    model, reference = (new_model(folder, torch.float32) for _ in range(2))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    update = 0
    for step in range(steps):
        batches = [collate(sequence_groups) for sequence_groups in minibatches(step)]

        def with_logprobs(batch: TokenBatch) -> TokenBatch:
            with torch.no_grad():
                old, ref = (m(batch, temperature=objective.temperature).logprobs for m in (model, reference))
            return replace(batch, token_fields={**batch.token_fields, "old_logprobs": old, "ref_logprobs": ref})

        batches = [with_logprobs(batch) for batch in batches]
        for _ in range(epochs):
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = OPTIMIZER.lr * lr_factor("cosine", update, 20, warmup=2)
                optimizer.zero_grad()
                objective.loss(model, batch).value.backward()  # type: ignore[no-untyped-call]
                assert OPTIMIZER.max_grad_norm is not None
                torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
                optimizer.step()
                update += 1
    return {name: tensor.clone() for name, tensor in disk_tensors(model)}


def assert_unchanged(learner: Learner, before: dict[str, Tensor]) -> None:
    for name, tensor in learner.weights():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_plain_pytorch(folder: Path, open_learner: OpenLearner, stage: int) -> None:
    """Updates have minibatches, epochs and microbatches, a reference model, clipping, decay and a schedule."""
    learner = open_learner(stage, tokens_per_microbatch=40)
    for step in range(2):
        metrics = learner.update(minibatches(step), 2)
    expected = plain_training(folder, POLICY, steps=2, epochs=2)
    for name, tensor in learner.weights():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-6)
    assert metrics["learner/microbatches"] > 8
    assert metrics["learner/updates"] == 8
    names = set(metrics) - set(DERIVED)
    assert names <= set(METRICS), names - set(METRICS)


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offload_changes_nothing(folder: Path, open_learner: OpenLearner, stage: int, offload: str) -> None:
    learner = open_learner(stage, offload)
    for step in range(2):
        learner.update(minibatches(step), 2)
    expected = plain_training(folder, POLICY, steps=2, epochs=2)
    for name, tensor in learner.weights():
        torch.testing.assert_close(tensor.cpu(), expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("dtype", "stage"), ALL_STAGES)
def test_update_with_nan_is_skipped(open_learner: OpenLearner, dtype: str, stage: int) -> None:
    learner = open_learner(stage, dtype=dtype)
    good, bad = minibatches(0, count=1), minibatches(1, count=1)
    learner.update(good, 1)
    before = whole_weights(learner)
    bad[0][0].token_fields["advantages"][0][0] = float("nan")
    metrics = learner.update(bad, 1)
    assert metrics["learner/skipped_updates"] == 1
    assert "policy/loss" not in metrics
    assert_unchanged(learner, before)
    metrics = learner.update(good, 1)
    assert (metrics["learner/skipped_updates"], metrics["learner/updates"]) == (1, 3)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in learner.weights())
    assert all(bool(tensor.isfinite().all()) for _, tensor in learner.weights())


def test_infinite_loss_with_finite_gradient_is_skipped(open_learner: OpenLearner) -> None:
    """A KL of inf whose gradient is finite would pass a check of gradients alone."""

    class Shifted(NextToken):
        def loss(self, model: Any, batch: TokenBatch) -> Any:
            loss = super().loss(model, batch)
            return replace(loss, value=loss.value + torch.inf)

    learner = open_learner(0, objective=Shifted())
    before = whole_weights(learner)
    metrics = learner.update([NextToken().assign_token_weights([SequenceGroup([], [[1, 2, 3]])])], 1)
    assert metrics["learner/skipped_updates"] == 1
    assert_unchanged(learner, before)


def test_too_many_bad_updates_stop_and_save_the_batch(open_learner: OpenLearner, folder: Path) -> None:
    learner = open_learner(max_skipped_updates=1)
    before = whole_weights(learner)
    bad = minibatches(1, count=2)
    for sequence_groups in bad:
        sequence_groups[0].token_fields["advantages"][0][0] = float("inf")
    with pytest.raises(TooManySkippedUpdatesError, match=r"skipped_update2_rank0\.pt") as error:
        learner.update(bad, 1)
    saved = torch.load(folder / "run" / "skipped_update2_rank0.pt", weights_only=False)
    assert saved == bad[1]
    assert "max_skipped_updates is 1" in str(error.value)
    assert_unchanged(learner, before)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_keeps_float32_master_weights(open_learner: OpenLearner, stage: int) -> None:
    """At this learning rate pure bfloat16 weights stand still; master weights move, and the weights follow them."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer = OptimizerConfig(lr=1e-6, max_grad_norm=None)
    learner = open_learner(stage, dtype="bfloat16", optimizer=optimizer, objective=NextToken())
    name = "blocks.0.mlp.down.weight"
    parameter = dict(learner.model.named_parameters())[name]
    start = safe_get_full_fp32_param(parameter).clone()
    for _ in range(40):
        learner.update(
            [NextToken().assign_token_weights([SequenceGroup([], [list(range(i, 250, 7))]) for i in range(4)])], 1
        )
    master = safe_get_full_fp32_param(parameter)
    moved = (master - start).abs()
    assert master.dtype == torch.float32
    assert float((moved > 1e-6).float().mean()) > 0.9
    assert float(moved.max()) < 50e-6
    weights = dict(learner.weights())["model.layers.0.mlp.down_proj.weight"]
    assert weights.dtype == torch.bfloat16
    assert torch.equal(weights.float(), master.view_as(weights).bfloat16().float())


def test_bfloat16_trains_like_float32(open_learner: OpenLearner) -> None:
    losses = []
    for dtype in ("float32", "bfloat16"):
        learner = open_learner(dtype=dtype, objective=NextToken())
        batch = [NextToken().assign_token_weights([SequenceGroup([], [list(range(i, 250, 7))]) for i in range(4)])]
        losses.append([learner.update(batch, 1)["train/loss"] for _ in range(10)])
    assert losses[0][-1] < losses[0][0] - 0.5
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_resume_is_exact(open_learner: OpenLearner, tmp_path: Path) -> None:
    learner = open_learner()
    learner.update(minibatches(0), 2)
    (tmp_path / "saved").mkdir()
    learner.save(tmp_path / "saved")
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    first = learner.update(minibatches(1), 2)
    expected = whole_weights(learner)

    resumed = open_learner()
    resumed.load(tmp_path / "saved")
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn
    second = resumed.update(minibatches(1), 2)
    assert_unchanged(resumed, expected)
    for name in first.keys() - {"learner/tokens_per_s", "memory/learner_peak_gb"}:
        assert name.startswith("time/") or first[name] == second[name], name


def test_checkpoint_of_another_size_is_refused(open_learner: OpenLearner, tmp_path: Path) -> None:
    learner = open_learner()
    learner.save(tmp_path)
    (tmp_path / "learner" / "rng_1.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"written by 2 learner processes, but this run has 1"):
        learner.load(tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_published_and_exported_weights_are_the_trained_ones(
    open_learner: OpenLearner, folder: Path, tmp_path: Path, stage: int
) -> None:
    learner = open_learner(stage)
    initial = dict(disk_tensors(new_model(folder, torch.float32)))
    learner.update(minibatches(0), 1)
    learner.export(tmp_path / "exported")
    tensors, checksums = learner.weight_snapshot()
    verify(WeightSnapshot(tensors, checksums))
    exported = dict(disk_tensors(load_model(tmp_path / "exported", torch.float32)))
    assert set(exported) == set(tensors) == set(initial)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, exported[name])
        assert not torch.equal(tensor, initial[name]), name


def test_no_reference_model_without_kl(open_learner: OpenLearner) -> None:
    learner = open_learner(objective=Policy(resolve("grpo", {"beta": 0.0}), 1.0, 12))
    assert learner.reference is None
    metrics = learner.update(minibatches(0), 1)
    assert "policy/kl" not in metrics
    reference = open_learner().reference
    assert reference is not None
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_evaluation_is_the_loss_and_changes_nothing(open_learner: OpenLearner) -> None:
    learner = open_learner(objective=NextToken(), tokens_per_microbatch=12)
    before = whole_weights(learner)
    sequence_groups = NextToken().assign_token_weights(
        [SequenceGroup([], [[i, i + 1, i + 2, i + 3]]) for i in range(9)]
    )
    metrics = learner.evaluate(sequence_groups)
    assert_unchanged(learner, before)
    assert metrics["eval/tokens"] == 27
    assert learner.update([sequence_groups], 1)["train/loss"] == pytest.approx(metrics["eval/loss"], rel=1e-6)
    assert learner.evaluate(sequence_groups)["eval/loss"] < metrics["eval/loss"]


def test_gradient_checkpointing_changes_nothing(open_learner: OpenLearner) -> None:
    results = []
    for checkpointing in (False, True):
        learner = open_learner(gradient_checkpointing=checkpointing)
        learner.update(minibatches(0), 1)
        results.append(whole_weights(learner))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-7)


def test_a_step_without_minibatches_does_nothing(open_learner: OpenLearner) -> None:
    learner = open_learner()
    before = whole_weights(learner)
    metrics = learner.update([], 1)
    assert metrics["learner/updates"] == 0
    assert_unchanged(learner, before)


def test_processes_draw_different_random_numbers() -> None:
    """Whatever the seed is: Python's generator takes -1 for 1."""
    draws = []
    for rank in range(4):
        seed_everything(1, rank)
        draws.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert all(len(set(numbers)) == 4 for numbers in zip(*draws, strict=True))
