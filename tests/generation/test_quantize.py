"""Fake quantisation: the grid, the layers that are not rounded, and an engine that rounds on every load."""

import json
from pathlib import Path

import pytest
import torch

from llmquest_rl.generation.quantize import fake_quantize, fake_quantize_model
from llmquest_rl.models.checkpoint.load_save import new_model, save_model
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.qwen3_moe import Qwen3MoeConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.types import Request, Sampling
from rollout.engine import EngineSetup
from rollout.engines.native import Config, build


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rows_lie_on_their_grid_and_move_by_half_a_step_at_most(bits: int) -> None:
    weight = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0.0
    found = fake_quantize(weight, bits)
    levels = 2 ** (bits - 1) - 1
    step = weight.abs().amax(-1, keepdim=True) / levels
    assert ((found - weight).abs() <= step / 2 * 1.001).all()
    assert all(len(row.unique()) <= 2 * levels + 1 for row in found.flatten(0, 1))
    assert (found[0, 0] == 0).all()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3MoeConfig])
def test_linear_and_expert_weights_are_rounded_and_nothing_else(tmp_path: Path, config: type[LlamaConfig]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.tiny().to_hf()))
    model, plain = (new_model(tmp_path, torch.float32, seed=1) for _ in range(2))
    fake_quantize_model(model, 3)
    for (name, weight), before in zip(model.named_parameters(), plain.parameters(), strict=True):
        inner = "blocks" in name and weight.ndim > 1 and "router" not in name
        assert torch.equal(weight, before) != inner, name


def test_the_engine_rounds_what_it_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LlamaConfig.tiny().to_hf(), "eos_token_id": 7}))
    models = [new_model(tmp_path, torch.float32, seed=seed) for seed in (1, 2)]
    save_model(tmp_path, disk_tensors(models[0]), tmp_path)
    setup = EngineSetup(context_tokens=32, max_sequences=4)
    engine = build(tmp_path, Config(weight_bits=3), setup)
    requests, sampling = [Request([5, 9, 3], 2, seed=1)], Sampling(max_tokens=8)
    for version, model in enumerate(models):
        if version:
            engine.load_weights(disk_tensors(model), version)
        fake_quantize_model(model, 3)
        [completions] = engine.generate(requests, sampling)
        sequences = [[5, 9, 3, *completion.token_ids] for completion in completions]
        plain = build(tmp_path, Config(), setup)
        plain.load_weights(disk_tensors(model), 1)
        for own, expected in zip(engine.logprobs(sequences), plain.logprobs(sequences), strict=True):
            assert own == pytest.approx(expected, abs=1e-5)
