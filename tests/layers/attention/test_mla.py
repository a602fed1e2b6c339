"""Latent attention: the two forms of its formula agree, and a cache holds only the latents."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.generation.packed_weights import PackedLinear, pack_model
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import SlotCache
from llmquest_rl.layers.attention.mla import LatentAttention, LatentShape
from llmquest_rl.layers.rope import RoPE

torch.set_num_threads(1)

BASE = LatentShape(
    hidden_size=20,
    num_heads=3,
    q_lora_rank=7,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    scale=0.4,
)

SHAPES = {
    "queries through a latent": BASE,
    "queries directly": replace(BASE, q_lora_rank=None),
    "biases": replace(BASE, bias=True),
    "halves": replace(BASE, interleaved=False),
    "values wider than keys": replace(BASE, v_head_dim=17),
}

PROMPTS, PARENTS, STEPS = (5, 1, 9), (0, 0, 1, 2, 2, 2), 7


def build(shape: LatentShape) -> LatentAttention:
    torch.manual_seed(0)
    layer = LatentAttention(shape, 0).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.4)
    return layer


def decoded(layer: LatentAttention, prompts: Tensor, tails: Tensor) -> tuple[Tensor, Tensor, SlotCache]:
    """Outputs for packed `prompts` [T, D] and for `tails` [completions, steps, D], one step at a time."""
    rope = RoPE(layer.shape.qk_rope_head_dim, {"rope_theta": 100.0})
    layout = Layout(PROMPTS, (-1,) * len(PROMPTS))
    kept, tail_cache = SlotCache(len(PROMPTS), max(PROMPTS)), SlotCache(len(PARENTS), STEPS)
    prefilled = layer(
        prompts, rope(layout.positions(), prompts.dtype), PrefillContext(kept, layout, range(len(PROMPTS)))
    )
    outputs = []
    for step in range(STEPS):
        context = DecodeContext(kept, PROMPTS, tail_cache, [step] * len(PARENTS), PARENTS)
        positions = torch.tensor([PROMPTS[parent] + step for parent in PARENTS])
        outputs.append(layer(tails[:, step], rope(positions, prompts.dtype), context))
    return prefilled, torch.stack(outputs, 1), kept


def packed(layer: LatentAttention, prompts: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
    layout = Layout((*PROMPTS, *[STEPS] * len(PARENTS)), (*[-1] * len(PROMPTS), *PARENTS))
    rotary = RoPE(layer.shape.qk_rope_head_dim, {"rope_theta": 100.0})(layout.positions(), prompts.dtype)
    out = layer(torch.cat((prompts, tails.flatten(0, 1))), rotary, PackedAttention(layout, "cpu"))
    return out[: len(prompts)], out[len(prompts) :].unflatten(0, tails.shape[:2])


@pytest.mark.parametrize("name", SHAPES)
def test_absorbed_equals_expanded(name: str) -> None:
    layer = build(SHAPES[name])
    prompts, tails = torch.randn(sum(PROMPTS), 20), torch.randn(len(PARENTS), STEPS, 20)
    prefilled, stepwise, _ = decoded(layer, prompts, tails)
    expected_prompts, expected = packed(layer, prompts, tails)
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(prefilled, expected_prompts, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(stepwise, expected, atol=1e-5, rtol=0.0)


def test_the_cache_holds_one_latent_and_one_key_for_each_token() -> None:
    _, _, cache = decoded(build(BASE), torch.randn(sum(PROMPTS), 20), torch.randn(len(PARENTS), STEPS, 20))
    per_token = BASE.kv_lora_rank + BASE.qk_rope_head_dim
    assert cache.num_bytes == 4 * cache.slots * cache.capacity * per_token


def test_packed_weights_give_the_same() -> None:
    """The native engine replaces linear layers; the absorbed form reads one's weight itself."""
    layer = build(BASE)
    prompts, tails = torch.randn(sum(PROMPTS), 20), torch.randn(len(PARENTS), STEPS, 20)
    _, expected, _ = decoded(layer, prompts, tails)
    pack_model(layer)  # type: ignore[arg-type]
    assert isinstance(layer.latent_up, PackedLinear)
    _, found, _ = decoded(layer, prompts, tails)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)


def test_bfloat16_stays_close() -> None:
    layer = build(BASE)
    prompts, tails = torch.randn(sum(PROMPTS), 20), torch.randn(len(PARENTS), STEPS, 20)
    _, expected, _ = decoded(layer, prompts, tails)
    _, found, _ = decoded(layer.bfloat16(), prompts.bfloat16(), tails.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.0)
