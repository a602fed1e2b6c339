"""Norm, rotary positions and feed-forward against their formulas in float64, and against Llama's own rounding."""

import math

import pytest
import torch

from llmquest_rl.layers.mlp import SwiGLU
from llmquest_rl.layers.norm import RMSNorm
from llmquest_rl.layers.rope import RoPE, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rms_norm_formula() -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(12, 0.1)
    norm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    expected = norm.weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-6, rtol=1e-6)


def test_rms_norm_rounds_before_the_weight() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    ours, theirs = RMSNorm(32, 1e-5).bfloat16(), LlamaRMSNorm(32, 1e-5).bfloat16()
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    assert torch.equal(ours(x), theirs(x))


def test_rotation_formula_and_relativity() -> None:
    dim, base = 8, 100.0
    x = torch.randn(1, 2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = RoPE(dim, {"rope_theta": base})
    turned = rotate(x, rope(torch.tensor([7]), torch.float64))
    for i in range(dim // 2):
        angle = 7 * base ** (-2 * i / dim)
        a, b = x[0, :, i], x[0, :, i + dim // 2]
        expected_a, expected_b = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
        torch.testing.assert_close(turned[0, :, i], expected_a, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(turned[0, :, i + dim // 2], expected_b, atol=1e-5, rtol=1e-5)
    q, k = x[:, :1], x[:, 1:]

    def score(at_q: int, at_k: int) -> torch.Tensor:
        q_turned = rotate(q, rope(torch.tensor([at_q]), torch.float64))
        return (q_turned * rotate(k, rope(torch.tensor([at_k]), torch.float64))).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=1e-4)


def test_llama3_frequencies_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=dict(LLAMA3))
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert factor == 1.0
    torch.testing.assert_close(RoPE(64, LLAMA3).inv_freq, expected, atol=0.0, rtol=1e-6)


def test_frequencies_stay_float32_on_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RoPE(8, LLAMA3)
    assert rope.inv_freq.device.type == "cpu"
    assert rope.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "spiral.*expected one of"),
        ({"rope_type": "llama3", "rope_theta": 1e4}, "factor"),
        ({}, "rope_theta"),
    ],
)
def test_bad_rope_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoPE(8, parameters)


def test_swiglu_formula() -> None:
    torch.manual_seed(0)
    mlp = SwiGLU(6, 10, bias=True).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.t() + mlp.gate.bias, x @ mlp.up.weight.t() + mlp.up.bias
    expected = (gate / (1 + (-gate).exp()) * up) @ mlp.down.weight.t() + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)
