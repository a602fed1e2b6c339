"""Experts against a dense loop in float64, routers and balance losses against transformers and against formulas."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.moe.experts import RoutedExperts, expert_capacity
from llmquest_rl.layers.moe.grouped_matmul import FusedGroupedMatmul, LoopedGroupedMatmul, choose_grouped_matmul
from llmquest_rl.layers.moe.moe import (
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    balance_loss,
    expert_counts,
    router_load,
    sequence_balance_loss,
    z_loss,
)

torch.set_num_threads(1)


def dense(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Run every expert on every token, and multiply the output of experts that a token did not choose by zero."""
    out = torch.zeros_like(x)
    for e in range(len(gate_up)):
        gate, up = (x @ gate_up[e].T).chunk(2, -1)
        chosen = (weights * (experts == e)).sum(-1, keepdim=True)
        out = out + chosen * ((F.silu(gate) * up) @ down[e].T)
    return out


def make(tokens: int, experts: int, k: int, size: int, inner: int, dtype: torch.dtype, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    module = RoutedExperts(experts, size, inner).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    # A skewed router: some experts get most tokens, some none.
    logits = torch.randn(tokens, experts, generator=generator) + 3 * torch.randn(experts, generator=generator)
    weights, chosen = logits.softmax(-1).topk(k, dim=-1)
    return module, x, chosen, weights.to(dtype).requires_grad_()


@given(
    tokens=st.integers(0, 40),
    num_experts=st.integers(1, 40),
    k=st.integers(1, 4),
    size=st.sampled_from([1, 4, 7, 16]),
    inner=st.sampled_from([1, 4, 5, 8]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_values_and_gradients_equal_a_dense_loop(
    tokens: int, num_experts: int, k: int, size: int, inner: int, seed: int
) -> None:
    """Covers sizes with and without a kernel, more and fewer rows than experts, idle experts, and no tokens at all."""
    k = min(k, num_experts)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        module, x, chosen, weights = make(tokens, num_experts, k, size, inner, dtype, seed)
        out = module(x, chosen, weights)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        out.backward(upstream.to(dtype))
        inputs = [t.detach().double().requires_grad_() for t in (x, weights, module.gate_up, module.down)]
        expected = dense(inputs[0], chosen, *inputs[1:])
        expected.backward(upstream)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip((x, weights, module.gate_up, module.down), inputs, strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            scale = max(float(theirs.grad.abs().max()), 1.0) if theirs.numel() else 1.0
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=tolerance * scale, rtol=0.0)


@pytest.mark.parametrize("capacity", [None, 2])
def test_gradients_equal_differences(capacity: int | None) -> None:
    module, x, chosen, weights = make(6, 5, 2, 4, 3, torch.float64, 0)

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(("gate_up", "down"), parameters, strict=True))
        out: Tensor = torch.func.functional_call(module, named, (x, chosen, weights, capacity))
        return out

    assert torch.autograd.gradcheck(run, (x, weights, module.gate_up, module.down))


def test_bfloat16_is_as_exact_as_the_dtype() -> None:
    module, x, chosen, weights = make(64, 8, 2, 16, 8, torch.bfloat16, 0)
    with torch.no_grad():
        out = module(x, chosen, weights.float())
    expected = dense(
        *(t.double() for t in (x,)), chosen, weights.double(), module.gate_up.double(), module.down.double()
    )
    assert out.dtype == torch.bfloat16
    assert float((out - expected).abs().max() / expected.detach().abs().max()) < 0.02


@pytest.mark.parametrize("rows", [3, 300])
def test_both_ways_of_multiplying_are_one(rows: int) -> None:
    groups = torch.randint(40, (rows,), generator=torch.Generator().manual_seed(0)).sort().values
    groups = groups[groups != 7]
    weight = torch.randn(40, 8, 12)
    x, gradient = torch.randn(len(groups), 12), torch.randn(len(groups), 8)
    grouped, looped = FusedGroupedMatmul(groups, 40), LoopedGroupedMatmul(groups)
    assert isinstance(
        choose_grouped_matmul(groups, (weight,)), LoopedGroupedMatmul if rows == 3 else FusedGroupedMatmul
    )
    assert isinstance(choose_grouped_matmul(groups, (weight.double(),)), LoopedGroupedMatmul)
    torch.testing.assert_close(grouped.outputs(x, weight), looped.outputs(x, weight))
    torch.testing.assert_close(grouped.input_gradient(gradient, weight), looped.input_gradient(gradient, weight))
    ours = grouped.weight_gradient(gradient, x, 40)
    torch.testing.assert_close(ours, looped.weight_gradient(gradient, x, 40))
    assert not ours[7].any()


def test_experts_without_tokens_get_zero_gradients() -> None:
    module, x, _, _ = make(5, 6, 2, 8, 4, torch.float32, 0)
    chosen = torch.tensor([[1, 4]]).expand(5, 2)
    module(x, chosen, torch.full((5, 2), 0.5)).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert [bool(rows.any()) for rows in parameter.grad] == [False, True, False, False, True, False]


def test_frozen_experts_pass_gradients_on() -> None:
    module, x, chosen, weights = make(5, 6, 2, 8, 4, torch.float32, 0)
    module.requires_grad_(False)
    module(x, chosen, weights).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    assert module.gate_up.grad is None


def test_parameters_may_be_away_between_forward_and_backward() -> None:
    """ZeRO-3 frees parameters after a module's forward and fetches them again, to other memory, for its backward."""
    gradients = []
    for goes_away in (False, True):
        module, x, chosen, weights = make(9, 6, 2, 8, 4, torch.float32, 0)
        out = module(x, chosen, weights)
        if goes_away:
            fetched = [parameter.detach().clone() for parameter in module.parameters()]
            for parameter, values in zip(module.parameters(), fetched, strict=True):
                parameter.data.fill_(float("nan"))
                parameter.data = torch.empty(0)
                parameter.data = values
        out.square().sum().backward()
        gradients.append([tensor.grad for tensor in (x, weights, *module.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_capacity_drops_the_last_tokens() -> None:
    module, x, _, _ = make(6, 4, 2, 8, 4, torch.float32, 0)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [1, 0], [3, 0], [0, 1]])
    weights = torch.rand(6, 2).requires_grad_()
    assert expert_capacity(1.0, chosen, 4) == 3
    assert expert_capacity(1.01, chosen, 4) == 4
    out = module(x, chosen, weights, 3)
    kept = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 0], [0, 0]])
    torch.testing.assert_close(out, module(x, chosen, weights * kept))
    out.sum().backward()
    assert weights.grad is not None
    assert torch.equal(weights.grad != 0, kept != 0)
    assert not out[5].any()
    torch.testing.assert_close(module(x, chosen, weights, 100), module(x, chosen, weights))


def test_memory_kept_for_backward_does_not_hold_copies_of_tokens() -> None:
    """With k = 4 and hidden size 64, copies of the tokens or of the results would take most of the saved memory."""
    module, x, chosen, weights = make(256, 8, 4, 64, 4, torch.float32, 0)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, chosen, weights)
    assert sum(sizes) <= x.numel() + 2 * weights.numel() + sum(p.numel() for p in module.parameters()) + 256 * 4 * 8


def qwen_router(normalize: bool) -> Any:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    return Qwen3MoeTopKRouter(
        Qwen3MoeConfig(num_experts=12, num_experts_per_tok=3, hidden_size=16, norm_topk_prob=normalize)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_router_equals_transformers(normalize: bool, dtype: torch.dtype) -> None:
    """In bfloat16 many logits tie. transformers rounds the weights to bfloat16; ours stay float32."""
    theirs, ours = qwen_router(normalize), SoftmaxRouter(16, 12, 3, normalize)
    torch.nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(200, 16).to(dtype)
    logits, weights, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts, experts)
    assert torch.equal(routing.weights.to(dtype), weights)
    assert torch.equal(routing.logits, logits.float())
    assert {routing.weights.dtype, routing.probs.dtype, routing.logits.dtype} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("groups", "chosen", "normalize"), [(1, 1, True), (4, 2, True), (3, 1, False), (2, 2, True), (6, 3, False)]
)
def test_sigmoid_router_equals_transformers(groups: int, chosen: int, normalize: bool, dtype: torch.dtype) -> None:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        n_routed_experts=12,
        num_experts_per_tok=3,
        hidden_size=16,
        n_group=groups,
        topk_group=chosen,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.e_score_correction_bias, 0.0, 0.3)
    ours = SigmoidRouter(16, 12, 3, normalize, 2.5, groups, chosen)
    ours.load_state_dict(theirs.state_dict())
    for router in (theirs, ours):
        router.weight.data = router.weight.data.to(dtype)
    x = torch.randn(200, 16).to(dtype)
    logits, weights, experts = theirs(x)
    routing = ours(x)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights)
    assert torch.equal(routing.logits, logits)
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(200))
    in_group = torch.stack([row.unique().new_tensor(len(row.unique())) for row in experts // (12 // groups)])
    assert int(in_group.max()) <= chosen


def random_routing(tokens: int, experts: int, k: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).requires_grad_()
    probs = logits.softmax(-1)
    weights, chosen = probs.topk(k, dim=-1)
    return Routing(chosen, weights, probs, logits)


def test_balance_loss_equals_transformers_and_the_formula() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = random_routing(50, 8, 3)
    ours = balance_loss(routing)
    theirs = load_balancing_loss_func((routing.logits,), 8, 3)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(3 * ours, theirs.double(), rtol=1e-6, atol=0.0)
    f = np.bincount(routing.experts.numpy().ravel(), minlength=8) / 150
    p = routing.probs.detach().numpy().mean(0)
    assert float(ours.detach()) == pytest.approx(8 * (f * p).sum(), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours, routing.probs)  # through P alone: every token gets E f / T
    torch.testing.assert_close(gradient, torch.from_numpy(8 * f / 50).expand(50, 8), rtol=1e-6, atol=0.0)


def test_balance_loss_is_one_when_balanced_and_largest_when_collapsed() -> None:
    uniform = torch.full((8, 8), 1 / 8)
    even = torch.stack((torch.arange(8), torch.arange(8).roll(1)), 1)
    assert float(balance_loss(Routing(even, uniform[:, :2], uniform, uniform))) == pytest.approx(1.0)
    sure = torch.zeros(8, 8).index_fill_(1, torch.tensor([0, 1]), 0.5)
    same = torch.tensor([[0, 1]]).expand(8, 2)
    assert float(balance_loss(Routing(same, sure[:, :2], sure, sure))) == pytest.approx(4.0)


def test_z_loss_equals_the_formula() -> None:
    routing = random_routing(20, 8, 2)
    logits = routing.logits.detach().numpy()
    assert float(z_loss(routing).detach()) == pytest.approx((np.log(np.exp(logits).sum(1)) ** 2).mean())


def sequence_formula(routing: Routing, sequences: list[list[int]], k: int) -> float:
    """Equations 17 to 20, written down for lists of token indices."""
    experts, probs = routing.experts.numpy(), routing.probs.detach().numpy()
    num_experts, losses = probs.shape[1], []
    for tokens in sequences:
        f = np.bincount(experts[tokens].ravel(), minlength=num_experts) * num_experts / (k * len(tokens))
        losses.append((f * probs[tokens].mean(0)).sum())
    return float(np.mean(losses))


def test_sequence_balance_loss_equals_the_formula() -> None:
    """Two completions of one prompt, a lone sequence, an empty one, and a completion of which nothing was computed."""
    routing = random_routing(21, 6, 2)
    layout = Layout((4, 3, 5, 6, 0, 2, 1, 0), (-1, 0, 0, -1, -1, -1, 5, 5))
    first, second = [0, 1, 2, 3], [18, 19]
    sequences = [[*first, 4, 5, 6], [*first, *range(7, 12)], list(range(12, 18)), [*second, 20], second]
    loss = sequence_balance_loss(routing, layout)
    assert float(loss.detach()) == pytest.approx(sequence_formula(routing, sequences, 2))
    (gradient,) = torch.autograd.grad(loss, routing.probs)
    assert bool((gradient != 0).any(1).all())


def test_sequence_balance_loss_of_shared_and_repeated_prompts_is_one() -> None:
    routing = random_routing(9, 6, 2)
    shared = sequence_balance_loss(routing, Layout((4, 2, 3), (-1, 0, 0)))
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8])
    repeated = Routing(*(part[rows] for part in routing))
    torch.testing.assert_close(sequence_balance_loss(repeated, Layout((6, 7), (-1, -1))), shared)


def test_losses_of_no_tokens_are_zero() -> None:
    empty = Routing(torch.zeros(0, 2, dtype=torch.long), *(torch.zeros(0, n, requires_grad=True) for n in (2, 4, 4)))
    for loss in (balance_loss(empty), z_loss(empty), sequence_balance_loss(empty, Layout((0,), (-1,)))):
        assert float(loss.detach()) == 0.0
        loss.backward()


def test_load_counts_choices_and_entropy() -> None:
    layers = [random_routing(30, 5, 2, seed) for seed in range(3)]
    found = router_load(layers)
    assert found is not None
    assert found.counts.dtype == torch.float32
    for layer, routing in enumerate(layers):
        assert found.counts[layer].tolist() == np.bincount(routing.experts.numpy().ravel(), minlength=5).tolist()
        assert torch.equal(found.counts[layer], expert_counts(routing))
        probs = routing.probs.detach().numpy()
        assert float(found.entropy[layer]) == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-5)
    assert found.tokens.tolist() == [30.0] * 3
    both = found.plus(found)
    doubled = {name: 2 * value if "tokens" in name else value for name, value in found.metrics().items()}
    assert both.metrics() == pytest.approx(doubled)
    assert found.metrics()["moe/expert_tokens_max"] == float(found.counts.max())
    assert router_load([]) is None
