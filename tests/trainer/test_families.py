"""Every architecture through the real loop: two GRPO steps, learner and engine in step with each other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.hf import architectures, load_model, new_model, save_model
from llmquest_rl.models.names import disk_tensors, named_weights
from tests.models.families import LANGUAGE_MODELS
from tests.trainer.conftest import Runs, rows
from trainer.replay import load_rollouts


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
