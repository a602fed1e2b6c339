"""Packed attention: who sees whom, and that padding inside a bucket never shows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention import PackedAttention, sees, segment_ids

torch.set_num_threads(1)

LAYOUTS = {
    "one": Layout((7,), (-1,)),
    "plain": Layout((5, 1, 9, 9, 2), (-1, -1, -1, -1, -1)),
    "group": Layout((6, 3, 4, 1), (-1, 0, 0, 0)),
    "groups": Layout((6, 3, 12, 4, 2, 2, 11), (-1, 0, 0, -1, 3, 3, 3)),
    "mixed": Layout((4, 3, 8, 1, 5, 2), (-1, 0, -1, 2, -1, 2)),
    "empty segment": Layout((4, 0, 3, 2), (-1, 0, 0, -1)),
}


def inputs(tokens: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, 8), (tokens, kv_heads, 8), (tokens, kv_heads, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def visible(layout: Layout) -> Tensor:
    """The definition, token by token: [tokens, tokens]."""
    place = [(segment, i) for segment, length in enumerate(layout.lengths) for i in range(length)]
    table = [[(s == t and j <= i) or layout.parents[s] == t for t, j in place] for s, i in place]
    return torch.tensor(table, dtype=torch.bool)


def dense(layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~visible(layout), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def assert_equal_to_dense(layout: Layout, heads: int = 4, kv_heads: int = 2) -> None:
    tensors = inputs(layout.num_tokens, heads, kv_heads)
    expected = dense(layout, *tensors, 0.3)
    actual = PackedAttention(layout, "cpu").attend(0, *tensors, 0.3)
    upstream = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    for a, b in zip(
        torch.autograd.grad(actual, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_equal_dense_attention(name: str) -> None:
    assert_equal_to_dense(LAYOUTS[name])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_head_ratios(heads: int, kv_heads: int) -> None:
    assert_equal_to_dense(LAYOUTS["groups"], heads, kv_heads)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=5))
def test_any_layout_equals_dense_attention(groups: list[tuple[int, list[int]]]) -> None:
    lengths: list[int] = []
    parents: list[int] = []
    for prompt, completions in groups:
        parent = len(lengths)
        lengths += [prompt, *completions]
        parents += [-1, *[parent] * len(completions)]
    if sum(lengths):
        assert_equal_to_dense(Layout(tuple(lengths), tuple(parents)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_gpu_mask_is_the_same_definition(name: str) -> None:
    layout = LAYOUTS[name]
    segments, parents = segment_ids(layout)
    index = torch.arange(layout.num_tokens)
    assert torch.equal(sees(segments, parents, index[:, None], index[None, :]), visible(layout))


def test_gpu_block_mask_and_flex_attention_equal_dense_attention() -> None:
    """FlexAttention has an uncompiled form that runs on a CPU: the mask and the call are those of the GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = Layout((60, 90, 70, 150), (-1, 0, 0, -1))
    segments, parents = segment_ids(layout)
    size = layout.num_tokens
    mask = create_block_mask(lambda b, h, q, k: sees(segments, parents, q, k), None, None, size, size, device="cpu")
    q, k, v = inputs(size, dtype=torch.float32)
    heads_first = [x.detach().transpose(0, 1)[None] for x in (q, k, v)]
    out = flex_attention(*heads_first, block_mask=mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out, dense(layout, q, k, v, 0.3), atol=1e-5, rtol=1e-5)


def test_bfloat16_is_attended_in_float32() -> None:
    layout = LAYOUTS["groups"]
    q, k, v = inputs(layout.num_tokens, dtype=torch.bfloat16)
    out = PackedAttention(layout, "cpu").attend(0, q, k, v, 0.3)
    assert out.dtype == torch.bfloat16
    expected = dense(layout, q.float(), k.float(), v.float(), 0.3)
    torch.testing.assert_close(out.float(), expected, atol=0.0, rtol=2**-8)  # one rounding of the result, no more


def test_no_tokens() -> None:
    q, k, v = inputs(0)
    assert PackedAttention(Layout((), ()), "cpu").attend(0, q, k, v, 1.0).shape == q.shape


def test_few_calls_for_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 completions of 8 to 32 tokens on 16 prompts of 40 take a handful of kernel calls."""
    lengths: list[int] = []
    parents: list[int] = []
    for group in range(16):
        lengths += [40, *(8 + (3 * group + 5 * i) % 25 for i in range(8))]
        parents += [-1, *[9 * group] * 8]
    layout = Layout(tuple(lengths), tuple(parents))
    calls = []
    kernel = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0].shape)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    PackedAttention(layout, "cpu").attend(0, *inputs(layout.num_tokens, dtype=torch.float32), scale=0.3)
    assert len(calls) <= 8
    assert sum(shape[0] * shape[2] for shape in calls) <= 1.25 * layout.num_tokens
