"""Routing replay in the learner and in a whole run: the updates of one step use the recorded experts."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import TokenBatch
from llmquest_rl.metrics import Metrics
from llmquest_rl.models.qwen3_moe import Qwen3MoeConfig
from llmquest_rl.objectives import Loss
from llmquest_rl.objectives.policy import Policy
from tests.trainer.conftest import Runs, rows
from tests.trainer.learner.learner_cases import make_setup, minibatches, whole_weights
from tests.trainer.test_families import tiny_of
from trainer.cli.dry_run import dry_run
from trainer.config.schema import LearnerConfig, OptimizerConfig
from trainer.learner.learner import Learner
from trainer.run.metric_table import METRICS

SHARE = "moe/changed_share"
FAST = OptimizerConfig(lr=1e-2)

OpenLearner = Callable[..., Learner]


class Watched(Policy):
    """Keeps the metrics of every microbatch, which the learner merges."""

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        loss = super().loss(model, batch)
        SEEN.append(loss.metrics)
        return loss


SEEN: list[Metrics] = []


def policy(kind: type[Policy], replay: bool) -> Policy:
    return kind(resolve("grpo", {"beta": 0.0, "routing_replay": replay}), temperature=0.9, max_tokens=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen3-MoE without its balance loss, which depends a little on the division into microbatches."""
    path = tmp_path / "model"
    path.mkdir()
    shape = replace(Qwen3MoeConfig.tiny(), router_aux_loss_coef=0.0, initializer_range=0.1)
    (path / "config.json").write_text(json.dumps(shape.to_hf()))
    return path


@pytest.fixture
def open_learner(folder: Path) -> Iterator[OpenLearner]:
    """Opens one learner at a time, because a process has one process group, and closes the last one."""
    SEEN.clear()
    with ExitStack() as stack:

        def open_(stage: int = 0, **changes: Any) -> Learner:
            stack.close()
            config = LearnerConfig.model_validate({"zero_stage": stage, "timeout_s": 60})
            learner = Learner(make_setup(folder, learner=config, **changes))
            stack.callback(learner.close)
            return learner

        yield open_


def test_the_second_update_of_a_step_has_the_experts_of_the_first(open_learner: OpenLearner) -> None:
    ratios = {}
    for replay in (False, True):
        learner = open_learner(objective=policy(Watched, replay), optimizer=FAST)
        metrics = learner.update(minibatches(0), 1)
        first, second = (seen.to_floats() for seen in SEEN)
        assert first["policy/ratio"] == first["policy/ratio_max"] == 1.0
        assert first[SHARE] == 0.0
        assert 0.0 < second[SHARE] < 1.0
        assert first[SHARE] < metrics[SHARE] < second[SHARE]
        assert SHARE in METRICS
        ratios[replay] = second["policy/ratio_max"]
        SEEN.clear()
    assert ratios[True] != ratios[False]


def test_one_update_neither_records_nor_replays(open_learner: OpenLearner) -> None:
    learner = open_learner(objective=policy(Policy, True))
    assert SHARE not in learner.update(minibatches(0, count=1), 1)


def test_a_batch_without_weight_does_not_count(open_learner: OpenLearner) -> None:
    """Such batches only keep processes in step."""
    learner = open_learner(objective=policy(Watched, False), optimizer=FAST)
    work = minibatches(0, count=1)
    silent = [[group.with_token_field("weights", [[0.0] * len(c) for c in group.completions]) for group in work[0]]]
    metrics = learner.update(work + silent, 1)
    assert [SHARE in seen.to_floats() for seen in SEEN] == [True, False]
    assert metrics[SHARE] == 0.0


def test_shared_out_cut_up_and_computed_twice_it_is_the_same(open_learner: OpenLearner) -> None:
    """ZeRO-3 with gradient checkpointing and small microbatches, each with its own record, against none of that."""
    weights, shares = [], []
    small: dict[str, Any] = {"stage": 3, "tokens_per_microbatch": 45, "gradient_checkpointing": True}
    for changes in ({}, small):
        learner = open_learner(objective=policy(Policy, True), **changes)
        for step in range(2):
            metrics = learner.update(minibatches(step), 2)
        assert metrics["learner/skipped_updates"] == 0
        weights.append(whole_weights(learner))
        shares.append(metrics[SHARE])
    assert shares[0] > 0
    assert shares[1] == pytest.approx(shares[0], rel=1e-3)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


SEVERAL = ("batch.epochs_per_step=2", "algorithm.routing_replay=true")


def test_a_run_replays(tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    folder = tiny_of("Qwen3MoeForCausalLM", tiny_model, tmp_path / "family")
    options = ["rollout.engine.name=native", "steps=2", "eval.every=0", "checkpoint.every=0"]
    for row in rows(runs.train(f"model.path={folder}", *SEVERAL, *options)):
        assert 0.0 < row[SHARE] < 1.0
        assert row["policy/logp_gap"] < 1e-4


def test_replay_without_experts_is_refused_before_anything_starts(runs: Runs) -> None:
    with pytest.raises(ValueError, match=r"routing_replay: in LlamaForCausalLM .* set it to false"):
        runs.train(*SEVERAL)
    assert not (runs.folder / "runs").exists()
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        list(dry_run(runs.config(*SEVERAL)))
