"""Grouped matrix products: rows are multiplied with the matrix of their group, as in a mixture of experts.

Rows are sorted by group, so each group is a contiguous slice and costs one product of its own size. Nothing is padded,
no matrix is copied, and the cost of a group without rows does not grow with its matrix.

Shapes: R rows, G groups, each with a matrix `[out, in]`.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquest_rl.layers.linear import onednn_is_faster, onednn_matmul, onednn_rows, weight_gradient

SPARSE_GROUPS = 8
"""Groups per row from which a loop over the groups that have rows is faster on a CPU: `F.grouped_mm` spends a
microsecond on each group, even without rows."""


class GroupedMatmul(Protocol):
    """The three matrix products of a linear layer `y = x W^T`, with a separate W for each group."""

    def outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute `x W^T` from rows `[R, in]` and matrices `[G, out, in]`: `[R, out]`."""
        ...

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Compute `g W` from gradients `[R, out]` and matrices `[G, out, in]`: `[R, in]`."""
        ...

    def weight_gradient(self, gradient: Tensor, x: Tensor, num_groups: int) -> Tensor:
        """Compute `g^T x` of each group's rows, from `[R, out]` and `[R, in]`: `[G, out, in]`, zeros without rows."""
        ...


def choose_grouped_matmul(groups: Tensor, weights: tuple[Tensor, ...]) -> GroupedMatmul:
    """Choose the fastest implementation for the given groups.

    Args:
        groups: Group of each row, long `[R]`, ascending.
        weights: The matrices `[G, out, in]` of each product that the caller will compute.
    """
    num_groups, on_cpu = len(weights[0]), weights[0].device.type == "cpu"
    sparse = len(groups) == 0 or (on_cpu and len(groups) * SPARSE_GROUPS <= num_groups)
    average = len(groups) * sum(weight[0].numel() for weight in weights) // (num_groups * len(weights))
    looped = sparse or onednn_is_faster(average, *weights) or not all(map(_has_kernel, weights))
    return LoopedGroupedMatmul(groups) if looped else FusedGroupedMatmul(groups, num_groups)


def _has_kernel(weight: Tensor) -> bool:
    """True if `F.grouped_mm` supports the matrices: rows of a multiple of 16 bytes, and on GPUs bfloat16 only."""
    dtypes = (torch.bfloat16,) if weight.device.type == "cuda" else (torch.bfloat16, torch.float16, torch.float32)
    return weight.dtype in dtypes and all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])


class FusedGroupedMatmul:
    """One kernel call for all groups, without a synchronisation with the GPU."""

    def __init__(self, groups: Tensor, num_groups: int) -> None:
        numbers = torch.arange(num_groups, device=groups.device)
        self._ends = torch.searchsorted(groups, numbers, right=True, out_int32=True)  # [G]

    def outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `GroupedMatmul`."""
        return F.grouped_mm(x, weight.transpose(1, 2), offs=self._ends)

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """See `GroupedMatmul`."""
        return F.grouped_mm(gradient, weight, offs=self._ends)

    def weight_gradient(self, gradient: Tensor, x: Tensor, num_groups: int) -> Tensor:
        """See `GroupedMatmul`."""
        return F.grouped_mm(gradient.t(), x, offs=self._ends)


class LoopedGroupedMatmul:
    """One product for each group that has rows, written directly into the result, for any dtype and size."""

    def __init__(self, groups: Tensor) -> None:
        numbers, counts = torch.unique_consecutive(groups, return_counts=True)
        ends = counts.cumsum(0)
        self._slices = list(zip(numbers.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))

    def outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `GroupedMatmul`."""
        out = x.new_empty(len(x), weight.shape[1])
        for group, start, stop in self._slices:
            _matmul_into(x[start:stop], weight[group].t(), out[start:stop])
        return out

    def input_gradient(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """See `GroupedMatmul`."""
        out = gradient.new_empty(len(gradient), weight.shape[2])
        for group, start, stop in self._slices:
            _matmul_into(gradient[start:stop], weight[group], out[start:stop])
        return out

    def weight_gradient(self, gradient: Tensor, x: Tensor, num_groups: int) -> Tensor:
        """See `GroupedMatmul`."""
        out = x.new_zeros(num_groups, gradient.shape[1], x.shape[1])
        for group, start, stop in self._slices:
            weight_gradient(gradient[start:stop], x[start:stop], out[group])
        return out


def _matmul_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right`."""
    whole = onednn_rows(len(left), right.numel(), left)
    if whole:
        out[:whole] = onednn_matmul(left[:whole], right)
    torch.mm(left[whole:], right, out=out[whole:])
