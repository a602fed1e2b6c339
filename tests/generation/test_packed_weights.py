"""Packed experts equal plain experts, pack new weights, and free their memory."""

import json
from pathlib import Path

import pytest
import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.generation.packed_weights import PackedExperts, can_pack, pack_model, packed_bytes, unpack_model
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.checkpoint.load_save import new_model

SPARSE = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", "Qwen3NextForCausalLM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 700])
def test_packed_experts_equal_plain_ones(tokens: int, capacity: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = RoutedExperts(6, 24, 10).requires_grad_(False).to(dtype)
    packed = PackedExperts(experts)
    for _ in range(2):
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        packed.pack()
        x = torch.randn(tokens, 24, generator=generator).to(dtype)
        chosen = torch.rand(tokens, 6, generator=generator).topk(3).indices
        weights = torch.rand(tokens, 3, generator=generator)
        expected = experts(x, chosen, weights, capacity)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(packed(x, chosen, weights, capacity), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", SPARSE)
def test_a_packed_mixture_is_the_same_model(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(architectures()[architecture].config.tiny().to_hf()))
    model = new_model(tmp_path, torch.float32, seed=1).requires_grad_(False).eval()
    batch = collate([SequenceGroup([3, 4, 5], [[6, 7, 8, 9], [1, 2]]), SequenceGroup([9], [[8, 7, 6]])])
    before, names = model(batch).logprobs, [name for name, _ in model.named_parameters()]
    assert can_pack(model) and packed_bytes(model) == 0
    pack_model(model)
    assert any(isinstance(module, PackedExperts) for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(batch).logprobs, before, atol=1e-5, rtol=0)
    matrices = [m for m in model.modules() if isinstance(m, RoutedExperts)]
    assert packed_bytes(model) > sum(w.nbytes for m in matrices for w in m.parameters(recurse=False))
    unpack_model(model)
    assert packed_bytes(model) == 0
