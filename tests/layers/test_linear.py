"""Linear layers by oneDNN: exact values and gradients, and the choice of the kernel."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from llmquest_rl.layers import linear
from llmquest_rl.layers.linear import Linear, matmul_into, onednn_is_faster
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.layers.moe.grouped_matmul import FusedGroupedMatmul, LoopedGroupedMatmul, choose_grouped_matmul

torch.set_num_threads(1)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for every product, on every processor."""
    monkeypatch.setattr(linear, "ONEDNN_MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)


def calls(run: nn.Module, *inputs: Tensor) -> set[str]:
    """The names of the operations that forward and backward call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run(*inputs).sum().backward()
    return {event.key for event in recorded.key_averages()}


@needs_onednn
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 12), (7, 12), (2, 5, 12)])
def test_values_and_gradients_equal_float64(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = Linear(12, 20, bias=bias), torch.randn(shape, requires_grad=True)
    wide = nn.Linear(12, 20, bias=bias).double()
    wide.load_state_dict(layer.state_dict())
    wide_x = x.detach().double().requires_grad_()
    upstream = torch.randn(*shape[:-1], 20)
    out, expected = layer(x), wide(wide_x)
    assert type(out.grad_fn).__name__ == "_LinearBackward"
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    out.backward(upstream)
    expected.backward(upstream.double())
    ours = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    theirs = [wide_x.grad, *(parameter.grad for parameter in wide.parameters())]
    for left, right in zip(ours, theirs, strict=True):
        assert left is not None
        torch.testing.assert_close(left.double(), right, atol=1e-5, rtol=1e-5)


@needs_onednn
@pytest.mark.usefixtures("always")
def test_what_is_frozen_gets_no_gradient() -> None:
    layer, x = Linear(4, 4).requires_grad_(False), torch.ones(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))
    assert layer.weight.grad is None and layer.bias.grad is None
    trained = Linear(4, 4)
    trained(torch.ones(2, 4)).sum().backward()
    torch.testing.assert_close(trained.weight.grad, torch.full((4, 4), 2.0))


@needs_onednn
@pytest.mark.usefixtures("always")
def test_transposed_operands() -> None:
    torch.manual_seed(0)
    left, right, out = torch.randn(9, 6).t(), torch.randn(5, 9).t(), torch.empty(6, 5)
    matmul_into(left, right, out)
    torch.testing.assert_close(out, left @ right)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    enough, small = linear.ONEDNN_MIN_MULTIPLICATIONS, torch.ones(1, 1)
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    assert onednn_is_faster(enough, small)
    assert not onednn_is_faster(enough - 1, small)
    assert not onednn_is_faster(enough, small, small.bfloat16())
    assert not onednn_is_faster(enough, small.double())
    assert not onednn_is_faster(enough, small.to("meta"))
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: False)
    assert not onednn_is_faster(enough, small)


@needs_onednn
def test_only_large_products_leave_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear, "ONEDNN_MIN_MULTIPLICATIONS", 8 * 16 * 16)
    layer = Linear(16, 16)
    assert "mkldnn::_linear_pointwise" in calls(layer, torch.randn(8, 16))
    assert "mkldnn::_linear_pointwise" not in calls(layer, torch.randn(7, 16))


def test_experts_are_looped_over_where_their_average_product_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, groups = (torch.ones(4, 8, 8), torch.ones(4, 8, 8)), torch.arange(4).repeat_interleave(10)
    monkeypatch.setattr(linear, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(linear, "ONEDNN_MIN_MULTIPLICATIONS", 10 * 8 * 8)
    assert isinstance(choose_grouped_matmul(groups, weights), LoopedGroupedMatmul)
    monkeypatch.setattr(linear, "ONEDNN_MIN_MULTIPLICATIONS", 10 * 8 * 8 + 1)
    assert isinstance(choose_grouped_matmul(groups, weights), FusedGroupedMatmul)


@needs_onednn
@pytest.mark.usefixtures("always")
def test_experts_by_onednn_equal_grouped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ONEDNN_ROW_BLOCK", 4)
    torch.manual_seed(0)
    layer, x = RoutedExperts(5, 16, 8), torch.randn(30, 16)
    experts, weights = torch.randint(4, (30, 2)), torch.rand(30, 2)  # the last one is never chosen
    counts = experts.flatten().bincount()
    assert (counts % 4 != 0).any() and (counts >= 4).all()
    found = []
    for slow in (True, False):
        monkeypatch.setattr(linear, "_mkl_is_slow", lambda slow=slow: slow)
        inputs = x.clone().requires_grad_()
        out = layer(inputs, experts, weights)
        out.square().sum().backward()
        gradients = [parameter.grad for parameter in layer.parameters()]
        layer.zero_grad()
        found.append([out, inputs.grad, *gradients])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


@needs_onednn
def test_few_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    many = """
import torch
from llmquest_rl.layers.linear import onednn_matmul

x, weight = torch.ones(140, 4), torch.ones(4, 4)
for rows in [*range(1, 141), 140, 1]:
    onednn_matmul(x[:rows], weight)
"""
    for name in linear.KERNEL_CACHE_SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_VERBOSE", "profile_create")
    done = subprocess.run([sys.executable, "-c", many], capture_output=True, text=True, check=True)
    made = [line for line in done.stdout.splitlines() if "create:cache_" in line and "mb" in line]
    assert "cache_hit" in made[-2] and "mb140" in made[-2]
    assert "cache_miss" in made[-1] and "mb1i" in made[-1]
