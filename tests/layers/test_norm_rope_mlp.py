"""Norm, rotary positions and feed-forward against their formulas in float64, and against Llama's own rounding."""

import math
from typing import Any

import pytest
import torch

from llmquest_rl.layers.mlp import ACTIVATIONS, GatedMLP, check_activation
from llmquest_rl.layers.norm import OffsetRMSNorm, RMSNorm
from llmquest_rl.layers.rope import RoPE, rope_parameters, rotate, rotate_interleaved, yarn_mscale

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_rms_norm_rounds_last(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    x = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    ours, theirs = OffsetRMSNorm(32, 1e-5).to(dtype), Gemma3RMSNorm(32, 1e-5).to(dtype)
    assert torch.equal(ours(x), theirs(x))  # a weight of 0 is where both start
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1)).to(dtype)
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 8.0},
    "linear, no power of two": {"rope_type": "linear", "factor": 2.7},
    "llama 3.1": {**LLAMA3, "factor": 8.0},
    "llama 3.2": LLAMA3,
    "llama 3, all between": {**LLAMA3, "low_freq_factor": 0.001, "high_freq_factor": 10000.0},
    "yarn": YARN,
    "yarn, null factor": {**YARN, "factor": None, "original_max_position_embeddings": 1000},
    "yarn, own attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, DeepSeek V3": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    "yarn, two mscales": {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn, one mscale": {**YARN, "mscale": 0.707},
    "yarn, another ramp": {**YARN, "beta_fast": 8.0, "beta_slow": 2.5},
    "yarn, ramp of no width": {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, ramp beyond the head": {**YARN, "original_max_position_embeddings": 10**9},
    "yarn, ramp before the head": {**YARN, "original_max_position_embeddings": 4},
    "yarn, length from the model's": {"rope_type": "yarn", "factor": 2.0},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
}


@pytest.mark.parametrize("theta", [10000.0, 1000000, 500.5])
@pytest.mark.parametrize("shape", [(64, 1.0), (128, 1.0), (10, 1.0), (256, 0.25)], ids=str)
@pytest.mark.parametrize("name", SCALED)
def test_frequencies_are_those_of_transformers_bit_for_bit(name: str, shape: tuple[int, float], theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim, part = shape
    values = {
        "head_dim": head_dim,
        "max_position_embeddings": 4096,
        "rope_parameters": {**SCALED[name], "rope_theta": theta, "partial_rotary_factor": part},
    }
    rope = RoPE(head_dim, rope_parameters(values))
    config = LlamaConfig(**values)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    assert torch.equal(rope.inv_freq, expected)
    assert rope.attention_factor == factor
    cos, sin = rope(torch.tensor([0, 1, 77]), torch.float32)
    angles = torch.tensor([0, 1, 77])[:, None].float() * expected
    assert torch.equal(cos[:, 0], angles.cos() * factor)
    assert torch.equal(sin[:, 0], angles.sin() * factor)


def test_default_frequencies_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for head_dim in (2, 10, 64, 128):
        config = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        expected = LlamaRotaryEmbedding(config)
        rope = RoPE(head_dim, {"rope_theta": 1e4})
        assert torch.equal(rope.inv_freq, expected.inv_freq)
        assert rope.attention_factor == 1.0


def test_part_of_a_head_is_rotated() -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 9])
    part = RoPE(16, {"rope_theta": 1e4, "partial_rotary_factor": 0.25})
    whole = RoPE(4, {"rope_theta": 1e4})
    turned = rotate(x, part(positions, torch.float32))
    assert torch.equal(turned[..., :4], rotate(x[..., :4], whole(positions, torch.float32)))
    assert torch.equal(turned[..., 4:], x[..., 4:])


def test_interleaved_pairs_equal_transformers() -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7) * 3
    rotary = RoPE(8, {"rope_theta": 100.0})(positions, torch.float32)
    cos, sin = (torch.cat((part, part), -1).transpose(0, 1) for part in rotary)  # [1, tokens, 8]
    expected, _ = apply_rotary_pos_emb_interleave(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    turned = rotate_interleaved(x, rotary)
    assert torch.equal(turned, expected[0].transpose(0, 1))
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    assert torch.equal(turned, rotate(halves, rotary))


def test_yarn_mscale() -> None:
    assert yarn_mscale(40.0) == 0.1 * math.log(40.0) + 1
    assert yarn_mscale(40.0, 0.707) == 0.0707 * math.log(40.0) + 1
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 2.0) == 1.0


PARAMETERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {"rope_type": "default", "rope_theta": 1e4}),
    "version 4": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5e5}),
    "version 4, scaled": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
    ),
    "both spellings of the type": (
        {"rope_scaling": {"type": "odd", "rope_type": "linear", "factor": 2.0}},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "version 5": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0}, "rope_theta": 8.0},
        {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0},
    ),
    "version 4, a part of the head": (
        {"partial_rotary_factor": 0.5, "rope_theta": 9.0},
        {"rope_type": "default", "rope_theta": 9.0, "partial_rotary_factor": 0.5},
    ),
    "the model's length": (
        {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64},
    ),
    "a length outside": (
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_spellings_of_parameters(name: str) -> None:
    values, expected = PARAMETERS[name]
    assert rope_parameters(values) == expected
    assert rope_parameters({**values, "rope_parameters": expected, "rope_scaling": None}) == expected


def test_parameters_of_layer_types() -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    values = {"rope_parameters": {"full_attention": full, "sliding_attention": {"rope_type": "default"}}}
    assert rope_parameters(values, "full_attention") == full
    assert rope_parameters(values, "sliding_attention", 5.0) == {"rope_type": "default", "rope_theta": 5.0}
    with pytest.raises(ValueError, match="differ between layers"):
        rope_parameters(values)


def test_frequencies_stay_float32_on_the_meta_device() -> None:
    with torch.device("meta"):
        rope = RoPE(8, LLAMA3)
    assert rope.inv_freq.device.type == "cpu"
    assert rope.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, "spiral.*expected one of"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic.*expected one of"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}, "longrope.*expected one of"),
        ({"rope_type": "llama3", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "original_max_position_embeddings"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({}, "rope_theta"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 gives 3"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 2.0}, "from 2 to 8"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.1}, "gives 0"),
    ],
)
def test_bad_rope_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoPE(8, parameters)


def test_parameters_that_are_no_dict() -> None:
    with pytest.raises(ValueError, match="expected a dict"):
        rope_parameters({"rope_scaling": "yarn"})


def test_swiglu_formula() -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(6, 10, bias=True).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up = x @ mlp.gate.weight.t() + mlp.gate.bias, x @ mlp.up.weight.t() + mlp.up.bias
    expected = (gate / (1 + (-gate).exp()) * up) @ mlp.down.weight.t() + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_config_json(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 201, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=1e-7, rtol=1e-7)


def test_gated_mlp_with_another_activation() -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(6, 10, activation="gelu_pytorch_tanh").double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate = x @ mlp.gate.weight.t()
    bent = gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(mlp(x), bent * (x @ mlp.up.weight.t()) @ mlp.down.weight.t())


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="hidden_act 'wavy' is not implemented: expected one of silu"):
        check_activation("wavy", "hidden_act")
