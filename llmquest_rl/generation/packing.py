"""Weights in the blocked order of the CPU's matrix kernels, for models that only generate.

A matrix product first copies its weights into an order that suits the processor. For the few rows of a decoding step
that copy costs up to half of the time, so here it is made once and kept beside the weights: a copy in memory, and to be
made again when they change.
"""

from typing import Any

import torch
from torch import Tensor, nn

from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.models.base import CausalLM

ROWS_HINT = 128
"""Rows for which the order is chosen; any number can be multiplied."""


class PackedLinear(nn.Linear):
    """A linear layer without gradient that shares `linear`'s parameters and keeps its weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Take over the weight as it is now."""
        self._packed = _reorder(self.weight)

    def unpack(self) -> None:
        """Give the copy's memory back; `pack` comes before the next use."""
        self._packed = None

    def forward(self, input: Tensor) -> Tensor:
        """`input` [rows, in_features] to [rows, out_features]."""
        return _product(input, self._packed, self.bias)


class PackedHead(LMHead):
    """An output layer that shares `head`'s weight; packed for `logits` alone."""

    def __init__(self, head: LMHead) -> None:
        super().__init__(0, 0, tied_to=head.weight, softcap=head.softcap)
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Take over the weight as it is now."""
        self._packed = _reorder(self.weight)

    def unpack(self) -> None:
        """Give the copy's memory back; `pack` comes before the next use."""
        self._packed = None

    def logits(self, states: Tensor) -> Tensor:
        """See `LMHead.logits`."""
        return self.capped(_product(states, self._packed, None))


def can_pack(model: CausalLM) -> bool:
    """Whether the kernels are there: a CPU model in float32 or bfloat16, and a torch build with oneDNN."""
    weight = next(model.parameters())
    has_kernels = torch.backends.mkldnn.is_available()
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and bool(has_kernels)


def pack_model(model: CausalLM) -> None:
    """Replace every linear layer and the head by packed ones, or pack anew after weights have changed.

    Parameters keep their names.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
            elif type(child) is LMHead:
                setattr(parent, name, PackedHead(child))
    for module in _packed_modules(model):
        module.pack()


def unpack_model(model: CausalLM) -> None:
    """Give the memory of the packed copies back, until `pack_model` makes them again."""
    for module in _packed_modules(model):
        module.unpack()


def packed_bytes(model: CausalLM) -> int:
    """Memory of the packed copies."""
    return sum(module._packed.nbytes for module in _packed_modules(model) if module._packed is not None)


def _packed_modules(model: CausalLM) -> list[PackedLinear | PackedHead]:
    return [module for module in model.modules() if isinstance(module, PackedLinear | PackedHead)]


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        packed: Tensor = _kernels()._reorder_linear_weight(weight.detach(), ROWS_HINT)
    return packed


def _product(x: Tensor, packed: Tensor | None, bias: Tensor | None) -> Tensor:
    assert packed is not None, "pack() comes first"
    result: Tensor = _kernels()._linear_pointwise(x, packed, bias, "none", [], "")
    return result


def _kernels() -> Any:
    return torch.ops.mkldnn
