"""Weights in the blocked order of the CPU's matrix kernels, for models that only generate.

A matrix product first copies its weights into an order that suits the processor. For the few rows of a decoding step
that copy costs up to half of the time, so here it is made once and kept beside the weights: a copy in memory, and to be
made again when they change.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquest_rl.layers.linear import Linear, onednn_linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.moe.experts import RoutedExperts, combine_pairs, sort_by_expert
from llmquest_rl.models.base import CausalLM

ROWS_HINT = 128
"""Rows for which the order is chosen; any number can be multiplied."""
SMALL_BLOCK, LARGE_BLOCK = 8, 64
"""Rows of an expert are filled up to multiples of this: a kernel is made for each number of rows, which takes longer
than a small product does."""


class _PackedWeight:
    """A layer whose `weight` is kept packed."""

    weight: nn.Parameter | Tensor
    _packed: Tensor | None = None

    @property
    def packed(self) -> list[Tensor]:
        """The packed copy."""
        return [] if self._packed is None else [self._packed]

    def pack(self) -> None:
        """Take over the weight as it is now."""
        self._packed = _reorder(self.weight)

    def unpack(self) -> None:
        """Give the copy's memory back; `pack` comes before the next use."""
        self._packed = None


class PackedLinear(_PackedWeight, nn.Linear):
    """A linear layer without gradient that shares `linear`'s parameters and keeps its weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """`input` [rows, in_features] to [rows, out_features]."""
        return _packed_linear(input, self._packed, self.bias)


class PackedHead(_PackedWeight, LMHead):
    """An output layer that shares `head`'s weight; packed for `logits` alone."""

    def __init__(self, head: LMHead) -> None:
        super().__init__(0, 0, tied_to=head.weight, softcap=head.softcap)

    def logits(self, states: Tensor) -> Tensor:
        """See `LMHead.logits`."""
        return self.apply_softcap(_packed_linear(states, self._packed, None))


class PackedExperts(RoutedExperts):
    """Routed experts without gradient that share `experts`' parameters and keep every matrix packed."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__(0, 1, 1)
        self.gate_up, self.down = experts.gate_up, experts.down
        self._gate_up: list[Tensor] | None = None
        self._down: list[Tensor] | None = None

    @property
    def packed(self) -> list[Tensor]:
        """The packed copies."""
        return [*(self._gate_up or ()), *(self._down or ())]

    def pack(self) -> None:
        """Take over the weights as they are now."""
        self._gate_up, self._down = (list(map(_reorder, weights)) for weights in (self.gate_up, self.down))

    def unpack(self) -> None:
        """Give the copies' memory back; `pack` comes before the next use."""
        self._gate_up = self._down = None

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, capacity: int | None = None) -> Tensor:
        """See `RoutedExperts.forward`."""
        assert self._gate_up is not None and self._down is not None, "pack() comes first"
        if len(x) == 1:  # matrices are read once, in any order: fewer steps count
            return super().forward(x, experts, weights, capacity)
        sorted_experts, order = sort_by_expert(experts, capacity)
        numbers, counts = sorted_experts.unique_consecutive(return_counts=True)
        blocks = _round_up_rows(counts)
        shifts = (blocks - counts).cumsum(0) - (blocks - counts)  # rows filled in before each expert's
        places = torch.arange(len(order)) + shifts.repeat_interleave(counts)
        pairs = order.new_zeros(int(blocks.sum()))  # filled up with the first one, whose result nobody reads there
        pairs[places] = order
        rows, scales = x.index_select(0, pairs // weights.shape[1]), weights.flatten()[pairs, None]
        sizes, outputs = blocks.tolist(), [x[:0]]
        for expert, part, scale in zip(numbers.tolist(), rows.split(sizes), scales.split(sizes), strict=True):
            gate, up = _packed_linear(part, self._gate_up[expert], None).chunk(2, -1)
            outputs.append(_packed_linear(F.silu(gate).mul_(up).mul_(scale), self._down[expert], None))
        return combine_pairs(torch.cat(outputs), order, weights.shape, places)


def _round_up_rows(counts: Tensor) -> Tensor:
    """Numbers of rows, each filled up to a multiple of `FEW`, or of `MANY` where it is larger."""
    step = torch.where(counts > LARGE_BLOCK, LARGE_BLOCK, SMALL_BLOCK)
    return (counts + step - 1) // step * step


PACKED_TYPES: dict[type[nn.Module], Callable[[Any], "PackedModule"]] = {
    Linear: PackedLinear,
    LMHead: PackedHead,
    RoutedExperts: PackedExperts,
}
"""What is packed, by its exact type."""
PackedModule = PackedLinear | PackedHead | PackedExperts


def can_pack(model: CausalLM) -> bool:
    """Whether the kernels are there: a CPU model in float32 or bfloat16, and a torch build with oneDNN."""
    weight = next(model.parameters())
    has_kernels = torch.backends.mkldnn.is_available()
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and bool(has_kernels)


def pack_model(model: CausalLM) -> None:
    """Replace linear layers, experts and the head by packed ones, or pack anew after weights have changed.

    Parameters keep their names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in PACKED_TYPES:
                setattr(parent, name, PACKED_TYPES[type(child)](child))
    for module in _packed_modules(model):
        module.pack()


def unpack_model(model: CausalLM) -> None:
    """Give the memory of the packed copies back, until `pack_model` makes them again."""
    for module in _packed_modules(model):
        module.unpack()


def packed_bytes(model: CausalLM) -> int:
    """Memory of the packed copies."""
    return sum(copy.nbytes for module in _packed_modules(model) for copy in module.packed)


def _packed_modules(model: CausalLM) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return packed


def _packed_linear(x: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    assert packed is not None, "pack() comes first"
    return onednn_linear(x, packed, bias)
