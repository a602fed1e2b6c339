"""Routed experts: SwiGLU layers, each computed only for the tokens that the router sends to it.

A token with k experts makes k pairs (token, expert). The pairs are sorted by expert, each expert computes its slice of
the pairs (`layers/moe/grouped_matmul.py`), and the k results of a token are added up. Cost and memory grow with the
number of pairs, not with tokens x experts. As in MegaBlocks (Gale et al. 2022, arXiv:2211.15841) there is no padding,
and no pair is dropped unless the caller gives a capacity.

Shapes: T tokens, E experts, k experts per token, P = T k pairs (fewer with a capacity), D hidden size, I inner size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmquest_rl.layers.moe.grouped_matmul import GroupedMatmul, choose_grouped_matmul


class RoutedExperts(nn.Module):
    """E SwiGLU layers without biases: `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, section 2)."""

    def __init__(self, num_experts: int, size: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, size).normal_(0.0, size**-0.5))
        """Weights of the gate and up projections `[E, 2I, D]`: the rows of `gate`, then the rows of `up`."""
        self.down = nn.Parameter(torch.empty(num_experts, size, inner).normal_(0.0, inner**-0.5))
        """Weights of the down projection `[E, D, I]`."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, capacity: int | None = None) -> Tensor:
        """Sum the weighted outputs of each token's experts. The same batch always gives the same bits.

        Args:
            x: Hidden states `[T, D]`.
            experts: Expert ids of each token, long `[T, k]`.
            weights: Weight of each expert's output `[T, k]`, any floating dtype.
            capacity: Maximum pairs per expert, of which the first in token order are computed; None = all pairs.

        Returns:
            Hidden states `[T, D]`.
        """
        sorted_experts, order = sort_by_expert(experts, capacity)
        matmul = choose_grouped_matmul(sorted_experts, (self.gate_up, self.down))
        out: Tensor = _ExpertsFunction.apply(x, weights, self.gate_up, self.down, order, matmul)  # type: ignore[no-untyped-call]
        return out


def sort_by_expert(experts: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert and drop those beyond an expert's capacity.

    Args:
        experts: Expert ids, long `[T, k]`.
        capacity: Maximum pairs per expert; None = all.

    Returns:
        The expert of each pair `[P]`, ascending, and its index in the flattened `[T, k]`, also `[P]`.
    """
    sorted_experts, order = experts.flatten().sort(stable=True)
    if capacity is not None:
        ranks = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_experts, sorted_experts)
        sorted_experts, order = sorted_experts[ranks < capacity], order[ranks < capacity]
    return sorted_experts, order


def expert_capacity(factor: float, routed: Tensor, num_experts: int) -> int:
    """Compute the maximum pairs per expert, `ceil(factor * T k / E)`.

    Source: Fedus et al. 2021, arXiv:2101.03961, eq. 3, extended to k experts per token.

    Args:
        factor: Capacity factor; 1 is just enough if all experts are chosen equally often.
        routed: Chosen experts `[T, k]`.
        num_experts: Number of experts, E.
    """
    return math.ceil(factor * routed.numel() / num_experts)


class _ExpertsFunction(torch.autograd.Function):
    """Gather tokens by expert, compute the experts, multiply by the weights, and add up.

    It saves `[P, 2I]` for backward, and no copy of the tokens or of the results. It saves the parameters themselves,
    not views of them, because ZeRO-3 frees and fetches parameters between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, matmul: GroupedMatmul
    ) -> Tensor:
        inner = matmul.outputs(x.index_select(0, order // weights.shape[1]), gate_up)  # [P, 2I]
        gate, up = inner.chunk(2, -1)
        hidden = F.silu(gate).mul_(up).mul_(weights.flatten()[order, None])  # [P, I]
        ctx.save_for_backward(x, weights, gate_up, down, order, inner)
        ctx.matmul = matmul
        return combine_pairs(matmul.outputs(hidden, down), order, weights.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, gate_up, down, order, inner = ctx.saved_tensors
        needs_x, needs_weights, needs_gate_up, needs_down, *_ = ctx.needs_input_grad
        matmul: GroupedMatmul = ctx.matmul
        tokens = order // weights.shape[1]
        weight = weights.flatten()[order, None]  # [P, 1]
        gate, up = inner.chunk(2, -1)
        activated = F.silu(gate)
        hidden = activated * up  # [P, I], before its weight
        pair_gradient = gradient.index_select(0, tokens)  # [P, D]
        hidden_gradient = matmul.input_gradient(pair_gradient, down)  # [P, I], with respect to hidden x weight
        weights_gradient = down_gradient = gate_up_gradient = x_gradient = None
        if needs_weights:
            by_pair = (hidden_gradient * hidden).sum(-1, dtype=weights.dtype)
            weights_gradient = torch.zeros_like(weights).flatten().index_copy_(0, order, by_pair).view(weights.shape)
        if needs_down:
            down_gradient = matmul.weight_gradient(pair_gradient, hidden.mul_(weight), len(down))
        hidden_gradient *= weight
        inner_gradient = torch.empty_like(inner)
        gate_gradient, up_gradient = inner_gradient.chunk(2, -1)
        torch.mul(hidden_gradient, activated, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(hidden_gradient.mul_(up), gate, grad_input=gate_gradient)
        if needs_gate_up:
            gate_up_gradient = matmul.weight_gradient(inner_gradient, x.index_select(0, tokens), len(gate_up))
        if needs_x:
            x_gradient = combine_pairs(matmul.input_gradient(inner_gradient, gate_up), order, weights.shape)
        return x_gradient, weights_gradient, gate_up_gradient, down_gradient, None, None


def combine_pairs(rows: Tensor, order: Tensor, shape: torch.Size, row_of_pair: Tensor | None = None) -> Tensor:
    """Add up the results of each token's pairs.

    Each token gathers its own rows, in the order of its experts and in float32. On GPUs `index_add` would add in an
    arbitrary order, and the log-probs of the same batch would differ from one forward to the next.

    Args:
        rows: Results of the pairs `[P, D]`.
        order: Index `[P]` of each pair in the flattened `[T, k]`, as `sort_by_expert` returns it.
        shape: (T, k).
        row_of_pair: Row of each pair in `rows` `[P]`; None = `rows` are in the order of `order`.

    Returns:
        Sums `[T, D]`.
    """
    places = order.new_full((shape.numel(),), len(rows))  # row of each pair; a dropped pair reads zeros
    places[order] = torch.arange(len(rows), device=order.device) if row_of_pair is None else row_of_pair
    padded = rows if len(order) == shape.numel() else F.pad(rows, (0, 0, 0, 1))
    return F.embedding_bag(places.view(shape), padded, mode="sum")
