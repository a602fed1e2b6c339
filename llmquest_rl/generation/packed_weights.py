"""Weights in the blocked layout of the CPU's matrix kernels, for models that only generate.

A matrix product first copies its weights into a layout that suits the processor. For the few rows of a decoding step
that copy takes up to half of the time. So here it is made once and stored beside the weights. The price is memory for a
second copy, which must be made again when the weights change.
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
"""Number of rows that oneDNN chooses the layout for; products with any other number work too."""
SMALL_BLOCK, LARGE_BLOCK = 8, 64
"""The rows of an expert are padded to a multiple of these. oneDNN compiles a kernel for each number of rows, and that
takes longer than a small product."""


class _PackedWeight:
    """Mixin for a layer with one packed `weight`."""

    weight: nn.Parameter | Tensor
    _packed: Tensor | None = None

    @property
    def packed(self) -> list[Tensor]:
        """The packed copy, if there is one."""
        return [] if self._packed is None else [self._packed]

    def pack(self) -> None:
        """Copy the current weight into the packed layout."""
        self._packed = _reorder(self.weight)

    def unpack(self) -> None:
        """Free the copy. Call `pack` before the next use."""
        self._packed = None


class PackedLinear(_PackedWeight, nn.Linear):
    """A linear layer without gradient that shares the parameters of `linear` and packs its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """Transform `input` `[rows, in_features]` to `[rows, out_features]`."""
        return _packed_linear(input, self._packed, self.bias)


class PackedHead(_PackedWeight, LMHead):
    """An output layer that shares the weight of `head`; only `logits` uses the packed copy."""

    def __init__(self, head: LMHead) -> None:
        super().__init__(0, 0, tied_to=head.weight, softcap=head.softcap)

    def logits(self, states: Tensor) -> Tensor:
        """See `LMHead.logits`."""
        return self.apply_softcap(_packed_linear(states, self._packed, None))


class PackedExperts(RoutedExperts):
    """Routed experts without gradient that share the parameters of `experts` and pack every matrix."""

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
        """Copy the current weights into the packed layout."""
        self._gate_up, self._down = (list(map(_reorder, weights)) for weights in (self.gate_up, self.down))

    def unpack(self) -> None:
        """Free the copies. Call `pack` before the next use."""
        self._gate_up = self._down = None

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor, capacity: int | None = None) -> Tensor:
        """See `RoutedExperts.forward`."""
        assert self._gate_up is not None and self._down is not None, "call pack() before the first use"
        if len(x) == 1:  # reads each matrix once in any layout, in fewer steps
            return super().forward(x, experts, weights, capacity)
        sorted_experts, order = sort_by_expert(experts, capacity)
        numbers, counts = sorted_experts.unique_consecutive(return_counts=True)
        blocks = _round_up_rows(counts)
        shifts = (blocks - counts).cumsum(0) - (blocks - counts)  # padding rows before each expert's rows
        places = torch.arange(len(order)) + shifts.repeat_interleave(counts)
        pairs = order.new_zeros(int(blocks.sum()))  # padding repeats the first pair; its results are not read
        pairs[places] = order
        rows, scales = x.index_select(0, pairs // weights.shape[1]), weights.flatten()[pairs, None]
        sizes, outputs = blocks.tolist(), [x[:0]]
        for expert, part, scale in zip(numbers.tolist(), rows.split(sizes), scales.split(sizes), strict=True):
            gate, up = _packed_linear(part, self._gate_up[expert], None).chunk(2, -1)
            outputs.append(_packed_linear(F.silu(gate).mul_(up).mul_(scale), self._down[expert], None))
        return combine_pairs(torch.cat(outputs), order, weights.shape, places)


def _round_up_rows(counts: Tensor) -> Tensor:
    """Round numbers of rows up to a multiple of `SMALL_BLOCK`, those above `LARGE_BLOCK` to a multiple of that."""
    step = torch.where(counts > LARGE_BLOCK, LARGE_BLOCK, SMALL_BLOCK)
    return (counts + step - 1) // step * step


PACKED_TYPES: dict[type[nn.Module], Callable[[Any], "PackedModule"]] = {
    Linear: PackedLinear,
    LMHead: PackedHead,
    RoutedExperts: PackedExperts,
}
"""The packed class of each layer type; subclasses are not packed."""
PackedModule = PackedLinear | PackedHead | PackedExperts


def can_pack(model: CausalLM) -> bool:
    """True if the model is on a CPU in float32 or bfloat16, and the torch build has oneDNN."""
    weight = next(model.parameters())
    has_kernels = torch.backends.mkldnn.is_available()
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and bool(has_kernels)


def pack_model(model: CausalLM) -> None:
    """Replace linear layers, experts and the head with packed ones, and pack the current weights.

    Call it again after the weights have changed. Parameters keep their names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in PACKED_TYPES:
                setattr(parent, name, PACKED_TYPES[type(child)](child))
    for module in _packed_modules(model):
        module.pack()


def unpack_model(model: CausalLM) -> None:
    """Free the packed copies. Call `pack_model` before the next use."""
    for module in _packed_modules(model):
        module.unpack()


def packed_bytes(model: CausalLM) -> int:
    """Memory of the packed copies, in bytes."""
    return sum(copy.nbytes for module in _packed_modules(model) for copy in module.packed)


def _packed_modules(model: CausalLM) -> list[PackedModule]:
    return [module for module in model.modules() if isinstance(module, PackedModule)]


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return packed


def _packed_linear(x: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    assert packed is not None, "call pack() before the first use"
    return onednn_linear(x, packed, bias)
