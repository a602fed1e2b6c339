"""The experts of a mixture: SwiGLU layers, each computed for the tokens that chose it and for no others.

A token's k choices are k pairs (token, expert). The pairs are sorted by expert, each expert computes its slice of them
(`layers/grouped.py`), and a token's k results are added up: cost and memory grow with the pairs, never with
tokens x experts (Gale et al. 2022, arXiv:2211.15841: no capacity, no padding, no pair dropped, unless asked for).
Shapes: T tokens, E experts, k of them for each token, P = T k pairs, D size, I inner size.
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
        """[E, 2I, D]: the rows of `gate`, then those of `up`."""
        self.down = nn.Parameter(torch.empty(num_experts, size, inner).normal_(0.0, inner**-0.5))
        """[E, D, I]."""

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, capacity: int | None = None) -> Tensor:
        """Sum over the chosen experts of weight x their output [T, D]: the same for a batch, to the bit, every time.

        Args:
            x: [T, D].
            experts: Long [T, k]: which experts each token goes to.
            weights: [T, k], any floating dtype.
            capacity: Most pairs that an expert computes, the first ones in the order of tokens; None = all.
        """
        sorted_experts, order = sort_by_expert(experts, capacity)
        matmul = choose_grouped_matmul(sorted_experts, (self.gate_up, self.down))
        out: Tensor = _ExpertsFunction.apply(x, weights, self.gate_up, self.down, order, matmul)  # type: ignore[no-untyped-call]
        return out


def sort_by_expert(experts: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    """The expert of each pair, ascending, and which of the T k pairs it is: [P] each, without those beyond capacity."""
    sorted_experts, order = experts.flatten().sort(stable=True)
    if capacity is not None:
        ranks = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_experts, sorted_experts)
        sorted_experts, order = sorted_experts[ranks < capacity], order[ranks < capacity]
    return sorted_experts, order


def expert_capacity(factor: float, routed: Tensor, num_experts: int) -> int:
    """Most pairs for one expert: `ceil(factor * T k / E)` (Fedus et al. 2021, arXiv:2101.03961, eq. 3, with k choices).

    Args:
        factor: 1 = just enough if all experts were chosen equally often.
        routed: Chosen experts [T, k].
        num_experts: E.
    """
    return math.ceil(factor * routed.numel() / num_experts)


class _ExpertsFunction(torch.autograd.Function):
    """Gather, compute, weigh, add. Keeps [P, 2I] for backward, and no copy of the tokens or of the results.

    Parameters are kept as what they are, not as views: ZeRO-3 frees and fetches them between forward and backward.
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
        hidden = activated * up  # [P, I], without its weight
        pair_gradient = gradient.index_select(0, tokens)  # [P, D]
        hidden_gradient = matmul.input_gradient(pair_gradient, down)  # [P, I], of hidden x weight
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
    """Rows of pairs [P, D], sorted by expert, added up for each token [T, D]. `where` [P]: the row of each pair.

    Each token gathers its own rows, in the order of its choices and in float32: on GPUs index_add adds in an order of
    its own, and log-probs of the same batch would differ from one forward to the next.
    """
    places = order.new_full((shape.numel(),), len(rows))  # where each pair went; a dropped one reads zeros
    places[order] = torch.arange(len(rows), device=order.device) if row_of_pair is None else row_of_pair
    padded = rows if len(order) == shape.numel() else F.pad(rows, (0, 0, 0, 1))
    return F.embedding_bag(places.view(shape), padded, mode="sum")
