"""The gated delta rule and the short convolution before it, against loops over single tokens in float64."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.recurrent.delta_chunks import CHUNK, chunk_layout
from llmquest_rl.layers.recurrent.delta_rule import gated_delta_rule, gated_delta_step
from llmquest_rl.layers.recurrent.short_conv import ShortConv

torch.set_num_threads(1)

LAYOUTS = {
    "one token": Layout((1,), (-1,)),
    "around a chunk": Layout((63, 64, 65), (-1, -1, -1)),
    "many lengths": Layout((0, 1, 200, 63, 0, 130, 2), (-1,) * 7),
    "shared prompts": Layout((70, 5, 0, 64, 3, 1, 2, 130), (-1, 0, 0, 0, -1, 4, 4, 0)),
    "prompts of whole chunks": Layout((128, 10, 64, 1, 0, 7), (-1, 0, -1, 2, -1, 4)),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def inputs(layout: Layout, heads: tuple[int, int] = (2, 4), seed: int = 0) -> list[Tensor]:
    """q, k, v, g, beta in float32 with gradients; key size 6, value size 5."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(layout.num_tokens, *shape, generator=generator)

    q, k = F.normalize(normal(heads[0], 6), dim=-1), F.normalize(normal(heads[0], 6), dim=-1)
    g, beta = -F.softplus(normal(heads[1])), normal(heads[1]).sigmoid()
    return [x.requires_grad_() for x in (q, k, normal(heads[1], 5), g, beta)]


def by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The rule as the paper writes it, S transposed: one token of one head after the other, in float64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    shared = v.shape[1] // k.shape[1]
    outputs: list[list[Tensor]] = [[] for _ in range(v.shape[1])]
    states = [[torch.zeros(k.shape[2], v.shape[2], dtype=torch.float64)] * v.shape[1] for _ in layout.lengths]
    for segment, (start, length, parent) in enumerate(zip(layout.starts, layout.lengths, layout.parents, strict=True)):
        states[segment] = list(states[parent]) if parent >= 0 else states[segment]
        for head in range(v.shape[1]):
            state = states[segment][head]
            for t in range(start, start + length):
                key = k[t, head // shared]
                state = g[t, head].exp() * state
                state = state + beta[t, head] * torch.outer(key, v[t, head] - state.T @ key)
                outputs[head].append(state.T @ q[t, head // shared])
            states[segment][head] = state
    last = torch.stack([torch.stack(heads) for heads in states])
    empty = torch.zeros(0, v.shape[2], dtype=torch.float64)
    return torch.stack([torch.stack(rows) if rows else empty for rows in outputs], 1), last


def check(layout: Layout, given: Sequence[Tensor], tolerance: float = 2e-6) -> None:
    """Values, states and gradients."""
    out, last = gated_delta_rule(*given, layout)
    expected, expected_last = by_token(*given, layout)
    assert out.dtype == last.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0.0)
    torch.testing.assert_close(last.double(), expected_last, atol=tolerance, rtol=0.0)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator), torch.randn(last.shape, generator=generator)
    wide = tuple(x.double() for x in weights)
    gradients = torch.autograd.grad((out, last), given, weights)
    references = torch.autograd.grad((expected, expected_last), given, wide)
    for gradient, reference in zip(gradients, references, strict=True):
        scale = max(float(reference.abs().max()), 1.0)
        torch.testing.assert_close(gradient.double(), reference.double(), atol=5 * tolerance * scale, rtol=0.0)


@every_layout
def test_values_states_and_gradients(layout: Layout) -> None:
    check(layout, inputs(layout))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 3)])
def test_head_counts(heads: tuple[int, int]) -> None:
    layout = LAYOUTS["shared prompts"]
    check(layout, inputs(layout, heads))


@pytest.mark.parametrize("kept", [-1e4, -50.0, -1e-7, 0.0], ids=str)
@pytest.mark.parametrize("written", [0.0, 1.0], ids=str)
def test_extreme_gates(kept: float, written: float) -> None:
    layout = LAYOUTS["many lengths"]
    q, k, v, g, beta = inputs(layout)
    constant = (torch.full_like(x, value).requires_grad_() for x, value in ((g, kept), (beta, written)))
    check(layout, [q, k, v, *constant], 5e-6)


def test_a_token_that_forgets_all_leaves_its_neighbours_exact() -> None:
    """Sums of g near 1e5 have no digits left for the small differences between the tokens after it."""
    layout = LAYOUTS["many lengths"]
    q, k, v, g, beta = inputs(layout)
    with torch.no_grad():
        g.mul_(0.1)[::7] = -1e4
    check(layout, [q, k, v, g, beta])


def test_one_key_again_and_again() -> None:
    """The inverse within a chunk is worst conditioned if all keys are the same and nothing fades."""
    layout = LAYOUTS["around a chunk"]
    q, k, v, g, beta = inputs(layout)
    same = k.detach()[:1].expand_as(k).clone().requires_grad_()
    check(layout, [q, same, v, torch.zeros_like(g, requires_grad=True), beta], 1e-5)


@every_layout
def test_steps_continue_what_chunks_began(layout: Layout) -> None:
    """Each segment's last tokens, one at a time from the state after the others."""
    given = [x.detach() for x in inputs(layout)]
    whole, last = gated_delta_rule(*given, layout)
    cut = [length if i in layout.parents else max(length - 3, 0) for i, length in enumerate(layout.lengths)]
    kept = torch.cat([torch.arange(n) + start for n, start in zip(cut, layout.starts, strict=True)])
    _, state = gated_delta_rule(*(x[kept] for x in given), Layout(tuple(cut), layout.parents))
    for step in range(3):
        rows = [i for i, length in enumerate(layout.lengths) if cut[i] + step < length]
        if rows:
            tokens = torch.tensor([layout.starts[i] + cut[i] + step for i in rows])
            out, state[rows] = gated_delta_step(*(x[tokens] for x in given), state[rows])
            torch.testing.assert_close(out, whole[tokens], atol=2e-6, rtol=0.0)
    torch.testing.assert_close(state, last, atol=2e-6, rtol=0.0)


def test_a_shared_prompt_is_the_same_as_a_repeated_one() -> None:
    layout = LAYOUTS["shared prompts"]
    given = [x.detach() for x in inputs(layout)]
    shared, _ = gated_delta_rule(*given, layout)
    for start, length, parent in zip(layout.starts, layout.lengths, layout.parents, strict=True):
        before = range(layout.starts[parent], layout.starts[parent] + layout.lengths[parent]) if parent >= 0 else ()
        rows = torch.tensor([*before, *range(start, start + length)], dtype=torch.long)
        alone, _ = gated_delta_rule(*(x[rows] for x in given), Layout((len(rows),), (-1,)))
        torch.testing.assert_close(alone[len(rows) - length :], shared[start : start + length], atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("layout", [Layout((0, 0), (-1, 0)), Layout((), ())], ids=["empty segments", "no segments"])
def test_nothing_gives_nothing(layout: Layout) -> None:
    given = inputs(layout)
    out, last = gated_delta_rule(*given, layout)
    assert out.shape == (0, 4, 5)
    assert torch.equal(last, torch.zeros(len(layout.lengths), 4, 6, 5))
    (out.sum() + last.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in given)
    convolution, tails = ShortConv(3, 4)(torch.zeros(0, 3), layout)
    assert convolution.shape == (0, 3)
    assert torch.equal(tails, torch.zeros(len(layout.lengths), 3, 3))


def test_generation_and_training_with_the_same_lengths() -> None:
    """Index tensors are shared between calls, and tensors made for inference cannot be trained with."""
    layout = Layout((17, 3), (-1, 0))
    given, conv = inputs(layout), ShortConv(3, 4)
    torch.nn.init.normal_(conv.weight)
    x = torch.ones(20, 3, requires_grad=True)
    with torch.inference_mode():
        gated_delta_rule(*given, layout)
        conv(x, layout)
    gated_delta_rule(*given, layout)[0].sum().backward()
    conv(x, layout)[0].sum().backward()
    assert given[0].grad is not None
    assert x.grad is not None


def test_padding_is_less_than_a_chunk_for_each_segment() -> None:
    """A step processes all chunks of one depth, so the longest sequence determines the number of steps."""
    layout = Layout((1000, 10, 500, 70, 300, 64), (-1, -1, 0, 0, 1, -1))
    chunks = chunk_layout(layout, torch.device("cpu"))
    assert chunks.num_chunks * CHUNK - layout.num_tokens < CHUNK * len(layout.lengths)
    assert len(chunks.levels) == 16 + 8
    assert sum(level.stop - level.start for level in chunks.levels) == chunks.num_chunks


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    layout = LAYOUTS["around a chunk"]
    rounded = [x.detach().bfloat16() for x in inputs(layout)]
    out, last = gated_delta_rule(*rounded, layout)
    expected, expected_last = gated_delta_rule(*(x.float() for x in rounded), layout)
    assert torch.equal(out, expected)
    assert torch.equal(last, expected_last)


def convolved(x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """One sequence after `before`, by `F.conv1d`, which takes no empty one."""
    if not len(x):
        return x
    rows = F.pad(torch.cat((before, x)), (0, 0, weight.shape[-1] - 1, 0))
    out = F.conv1d(rows.t()[None], weight, groups=len(weight))[0].t()
    return out[len(before) :]


@every_layout
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_stays_in_its_sequence(layout: Layout, width: int) -> None:
    torch.manual_seed(0)
    conv = ShortConv(3, width)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(layout.num_tokens, 3, requires_grad=True)
    out, tails = conv(x, layout)
    parts = list(x.split(layout.lengths))
    before = [parts[p] if p >= 0 else x[:0] for p in layout.parents]
    expected = torch.cat([convolved(own, conv.weight, seen) for own, seen in zip(parts, before, strict=True)])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0.0)
    for tail, own, seen in zip(tails, parts, before, strict=True):
        history = F.pad(torch.cat((seen, own)), (0, 0, width - 1, 0))
        assert torch.equal(tail, history[len(history) - width + 1 :])
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, conv.weight), weights)
    references = torch.autograd.grad(expected, (x, conv.weight), weights)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-5)


def test_convolution_in_steps() -> None:
    torch.manual_seed(0)
    conv = ShortConv(3, 4)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(2, 9, 3)
    whole, tails = conv(x.flatten(0, 1), Layout((9, 9), (-1, -1)))
    _, tail = conv(x[:, :2].flatten(0, 1), Layout((2, 2), (-1, -1)))
    for t in range(2, 9):
        out, tail = conv(x[:, t], Layout((1, 1), (-1, -1)), tail)
        torch.testing.assert_close(out, whole.view(2, 9, 3)[:, t], atol=1e-6, rtol=0.0)
    assert torch.equal(tail, tails)
