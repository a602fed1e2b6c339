"""Every architecture through the real loop and the real learner, in agreement with its engine,
and with its parameters divided between processes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.weight_map import disk_tensors, named_weights
from rollout.weights import WeightSnapshot, take_snapshot, verify
from tests.models.families import LANGUAGE_MODELS, tiny_folder
from tests.trainer.conftest import Runs, rows
from tests.trainer.learner.learner_cases import make_setup, minibatches
from trainer.config.schema import LearnerConfig
from trainer.learner.learner import Learner
from trainer.sources.replay import load_rollouts


def tiny_of(architecture: str, tokenizer: Path, folder: Path) -> Path:
    """A random model of an architecture with the tokenizer of the tiny Llama."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    shape = replace(architectures()[architecture].config.tiny(), vocab_size=vocabulary, initializer_range=0.1)
    source = folder / "source"
    source.mkdir(parents=True)
    for file in tokenizer.glob("*"):
        if file.suffix != ".safetensors":
            shutil.copy(file, source)
    (source / "config.json").write_text(json.dumps({**shape.to_hf(), "eos_token_id": 1}))
    save_model(source, disk_tensors(new_model(source, torch.float32, seed=3)), folder / "model")
    return folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_two_grpo_steps(architecture: str, tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    folder = tiny_of(architecture, tiny_model, tmp_path / "family")
    run = runs.train(
        f"model.path={folder}",
        "rollout.engine.name=native",
        "rollout.save=true",
        "steps=2",
        "model.gradient_checkpointing=true",
    )
    logged = rows(run)
    assert [row["rollout/weight_version"] for row in logged] == [1, 2]
    assert all(row["policy/logp_gap"] < 1e-4 for row in logged), "the engine computes what the learner computes"
    assert len(load_rollouts(run / "rollouts", 2)) == 4
    before = dict(named_weights(load_model(folder, torch.float32)))
    after = dict(named_weights(load_model(run / "checkpoints" / "step-000002" / "model", torch.float32)))
    trained = {name for name, weight in before.items() if weight.requires_grad}
    assert any(not torch.equal(before[name], after[name]) for name in trained)
    routed = [row for row in logged if "moe/max_vio" in row]
    assert len(routed) in (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_parameters_shared_out_between_processes_change_nothing(architecture: str, tmp_path: Path) -> None:
    """ZeRO-3 empties parameters between their uses: a layer that keeps a view of one would compute with nothing."""
    source = tiny_folder(tmp_path / "model", architecture)
    weights = []
    for stage in (0, 3):
        config = LearnerConfig.model_validate({"zero_stage": stage, "timeout_s": 60})
        learner = Learner(make_setup(source, learner=config))
        metrics = learner.update(minibatches(0), 2)
        assert metrics["learner/skipped_updates"] == 0
        tensors, checksums = take_snapshot(learner.weights())
        verify(WeightSnapshot(tensors, checksums))
        weights.append({name: tensor.clone() for name, tensor in tensors.items()})
        learner.close()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.slow
@pytest.mark.ray
def test_grpo_with_vllm(tiny_model: Path, runs: Runs, tmp_path: Path) -> None:
    """vLLM samples with the weights that the learner has just trained: experts, router bias, latent projections."""
    pytest.importorskip("vllm")
    folder = tiny_of("DeepseekV3ForCausalLM", tiny_model, tmp_path / "family")
    run = runs.train(f"model.path={folder}", "rollout.engine.name=vllm", "cluster.kind=ray", "steps=3")
    logged = rows(run)
    assert [row["rollout/weight_version"] for row in logged] == [1, 2, 3]
    assert all(row["policy/logp_gap_max"] < 1e-4 for row in logged)
