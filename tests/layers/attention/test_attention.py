"""Packed attention equals dense attention with an explicit mask; padding inside a bucket has no effect."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cpu import CHUNKS_PER_WINDOW, MIN_CHUNK, BucketPlan
from llmquest_rl.layers.attention.gpu import build_mask_mod, flex_attend
from llmquest_rl.layers.attention.scores import ScoreOptions

torch.set_num_threads(1)

LAYOUTS = {
    "one": Layout((7,), (-1,)),
    "plain": Layout((5, 1, 9, 9, 2), (-1, -1, -1, -1, -1)),
    "group": Layout((6, 3, 4, 1), (-1, 0, 0, 0)),
    "groups": Layout((6, 3, 12, 4, 2, 2, 11), (-1, 0, 0, -1, 3, 3, 3)),
    "mixed": Layout((4, 3, 8, 1, 5, 2), (-1, 0, -1, 2, -1, 2)),
    "empty segment": Layout((4, 0, 3, 2), (-1, 0, 0, -1)),
    "empty parent": Layout((0, 3, 2), (-1, 0, 0)),
    "long": Layout((90, 70, 3, 100, 40, 33, 1), (-1, 0, 0, -1, -1, 4, 4)),
}


@dataclass(frozen=True)
class Case:
    """The sizes and options of one attention call."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    value_size: int | None = 8
    """None = the keys serve as values."""
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def options(self, sinks: Tensor) -> dict[str, Any]:
        return {"window": self.window, "softcap": self.softcap, "sinks": sinks if self.sinks else None}


CASES = {
    "plain": Case(),
    "window 1": Case(window=1),
    "window 4": Case(window=4),
    "window of a chunk": Case(window=MIN_CHUNK),
    "window over some": Case(window=60),
    "window over all": Case(window=1000),
    "softcap": Case(softcap=1.5),
    "sinks": Case(sinks=True),
    "narrow values": Case(value_size=3),
    "wide values": Case(value_size=11, heads=3, kv_heads=3),
    "keys are values": Case(value_size=None, kv_heads=1),
    "everything": Case(window=5, softcap=1.5, sinks=True, value_size=5),
    "all of a latent": Case(window=40, softcap=1.5, sinks=True, value_size=None, kv_heads=1),
}


def inputs(tokens: int, case: Case = CASES["plain"], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values (or the keys again) and sinks."""
    generator = torch.Generator().manual_seed(tokens)
    sizes = [(tokens, case.heads, case.size), (tokens, case.kv_heads, case.size), (case.heads,)]
    if case.value_size is not None:
        sizes.insert(2, (tokens, case.kv_heads, case.value_size))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in sizes]


def definition(layout: Layout, window: int | None = None) -> Tensor:
    """The mask by its definition, token by token: bool [tokens, tokens]."""
    place = [(segment, i) for segment, length in enumerate(layout.lengths) for i in range(length)]
    table = [[(s == t and j <= i) or layout.parents[s] == t for t, j in place] for s, i in place]
    positions = layout.positions()
    near = positions[:, None] - positions[None, :] < (window or layout.num_tokens)
    return torch.tensor(table, dtype=torch.bool).view(len(place), len(place)) & near


def dense(
    seen: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention by its definition, with the mask `seen` [tokens, tokens]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)


def expected_for(layout: Layout, case: Case, tensors: list[Tensor]) -> Tensor:
    q, k, *v, sinks = tensors
    return dense(
        definition(layout, case.window).to(q.device),
        q,
        k,
        v[0] if v else k,
        0.3,
        case.softcap,
        sinks if case.sinks else None,
    )


def assert_equal_to_dense(layout: Layout, case: Case = CASES["plain"]) -> None:
    tensors = inputs(layout.num_tokens, case)
    q, k, *v, sinks = tensors
    expected = expected_for(layout, case, tensors)
    actual = PackedAttention(layout, "cpu").attend(0, q, k, v[0] if v else None, 0.3, **case.options(sinks))
    upstream = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
    used = tensors if case.sinks else tensors[:-1]
    for a, b in zip(
        torch.autograd.grad(actual, used, upstream), torch.autograd.grad(expected, used, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_equal_dense_attention(name: str, case: str) -> None:
    assert_equal_to_dense(LAYOUTS[name], CASES[case])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize("sinks", [False, True])
def test_head_ratios(heads: int, kv_heads: int, sinks: bool) -> None:
    assert_equal_to_dense(LAYOUTS["groups"], Case(heads=heads, kv_heads=kv_heads, sinks=sinks))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=5),
    st.sampled_from([None, 1, 2, 3, 5, 8, 13, 40]),
    st.sampled_from([1, 2, 3, MIN_CHUNK]),
)
def test_any_layout_equals_dense_attention(
    groups: list[tuple[int, list[int]]], window: int | None, min_chunk: int
) -> None:
    lengths: list[int] = []
    parents: list[int] = []
    for prompt, completions in groups:
        parent = len(lengths)
        lengths += [prompt, *completions]
        parents += [-1, *[parent] * len(completions)]
    if sum(lengths):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llmquest_rl.layers.attention.cpu.MIN_CHUNK", min_chunk)
            assert_equal_to_dense(Layout(tuple(lengths), tuple(parents)), Case(window=window))


def test_layers_with_and_without_a_window_share_one_context() -> None:
    layout = LAYOUTS["long"]
    context = PackedAttention(layout, "cpu")
    q, k, v, _ = tensors = inputs(layout.num_tokens)
    for window in (None, 7, 50, 7, None):
        expected = expected_for(layout, Case(window=window), tensors)
        torch.testing.assert_close(context.attend(0, q, k, v, 0.3, window=window), expected, atol=2e-6, rtol=2e-6)


def num_scores(layout: Layout, window: int | None) -> int:
    """Number of scores of one head, padding and masked ones included."""
    plan = BucketPlan(layout, window, torch.device("cpu"))
    return sum(bucket.num_queries * bucket.num_keys // bucket.batch for bucket in plan.buckets)


@pytest.mark.parametrize("window", [1, 16, 100, 128])
def test_the_work_grows_with_the_window_and_not_with_the_square_of_a_segment(window: int) -> None:
    for tokens in (1000, 2000, 4000):
        for layout in (Layout((tokens,), (-1,)), Layout((tokens // 2, tokens // 4, tokens // 4), (-1, 0, 0))):
            assert num_scores(layout, window) <= 1.1 * layout.num_tokens * (
                window + max(window // CHUNKS_PER_WINDOW, MIN_CHUNK)
            )
    assert num_scores(Layout((4000,), (-1,)), None) == 4000**2


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 4, 60])
def test_gpu_mask_is_the_same_definition(name: str, window: int | None) -> None:
    layout = LAYOUTS[name]
    index = torch.arange(layout.num_tokens)
    nothing = torch.tensor(0)
    pairs = build_mask_mod(layout, window, "cpu")(nothing, nothing, index[:, None], index[None, :])
    assert torch.equal(pairs, definition(layout, window))


FLEX_CASES = ("plain", "window 4", "softcap", "sinks", "keys are values", "narrow values", "everything")


@pytest.mark.parametrize("name", FLEX_CASES)
def test_gpu_block_mask_and_flex_attention_equal_dense_attention(name: str) -> None:
    """FlexAttention has an uncompiled form that runs on a CPU: the masks and the call are those of the GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, case = Layout((60, 90, 70, 150), (-1, 0, 0, -1)), CASES[name]
    size = layout.num_tokens
    mask = create_block_mask(build_mask_mod(layout, case.window, "cpu"), None, None, size, size, device="cpu")
    tensors = [x.detach() for x in inputs(size, case, torch.float32)]
    q, k, *v, sinks = tensors
    options = ScoreOptions(0.3, case.softcap, sinks if case.sinks else None)
    out = flex_attend(flex_attention, mask, q, k, v[0] if v else k, options)
    torch.testing.assert_close(out, expected_for(layout, case, tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLEX_CASES)
def test_values_and_gradients_on_a_gpu(name: str) -> None:
    layout, case = Layout((60, 90, 70, 150), (-1, 0, 0, -1)), CASES[name]
    case = replace(case, size=32, value_size=case.value_size and 16)  # the kernel wants 16 at least
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(layout.num_tokens, case, torch.float32)]
    q, k, *v, sinks = tensors
    expected = expected_for(layout, case, tensors)
    actual = PackedAttention(layout, "cuda").attend(0, q, k, v[0] if v else None, 0.3, **case.options(sinks))
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)  # products in TF32
    used = tensors if case.sinks else tensors[:-1]
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual, used, upstream), torch.autograd.grad(expected, used, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["plain", "window 4", "everything"])
def test_bfloat16_is_attended_in_float32(name: str) -> None:
    layout, case = LAYOUTS["groups"], CASES[name]
    tensors = inputs(layout.num_tokens, case, torch.bfloat16)
    q, k, v, sinks = tensors
    out = PackedAttention(layout, "cpu").attend(0, q, k, v, 0.3, **case.options(sinks))
    assert out.dtype == torch.bfloat16
    expected = expected_for(layout, case, [x.float() for x in tensors])
    torch.testing.assert_close(out.float(), expected, atol=0.0, rtol=2**-8)  # one rounding of the result, no more


@pytest.mark.parametrize("case", CASES)
def test_no_tokens(case: str) -> None:
    q, k, *v, sinks = inputs(0, CASES[case])
    out = PackedAttention(Layout((), ()), "cpu").attend(0, q, k, v[0] if v else None, 1.0, **CASES[case].options(sinks))
    assert out.shape == (0, q.shape[1], (v[0] if v else k).shape[-1])


def test_nothing_is_kept_while_training() -> None:
    context = PackedAttention(LAYOUTS["group"], "cpu")
    context.store_state(0, (torch.ones(4, 2),))
    assert context.load_state(0) is None
    assert not context.is_decoding and context.layout == LAYOUTS["group"]


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
    PackedAttention(layout, "cpu").attend(0, *inputs(layout.num_tokens, dtype=torch.float32)[:3], scale=0.3)
    assert len(calls) <= 8
    assert sum(shape[0] * shape[2] for shape in calls) <= 1.25 * layout.num_tokens
