"""Linear layers and matrix products by the fastest kernel of this processor.

PyTorch multiplies float32 matrices on CPUs with MKL. On AMD processors MKL leaves half of the AVX-512 units idle (110
against 240 GFLOP/s for each core of a Zen 5), and oneDNN, which PyTorch brings as well, does not. oneDNN makes a kernel
for each new shape of operands, so small products stay with MKL. The choice follows from the processor and the shapes
alone: an interrupted and resumed run chooses the same.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN_MIN_MULTIPLICATIONS = 2**24
"""Multiplications from which a product by oneDNN pays for making its kernel, about 0.2 ms, even if used once."""

ONEDNN_ROW_BLOCK = 64
"""oneDNN takes whole blocks of so many rows where their number would differ from call to call, PyTorch the rest: a
kernel that is used once costs its time, and memory that it keeps apart."""

KERNEL_CACHE_SIZES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""How many kernels PyTorch and oneDNN keep, read when the first is made: a training step needs 20 to 60, and others for
other numbers of tokens. By default 1,024, which had cost gigabytes: kernels lie between the tensors of their time."""
for _name, _number in KERNEL_CACHE_SIZES.items():
    os.environ.setdefault(_name, _number)


class Linear(nn.Linear):
    """`y = x W^T + b`."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in_features] to [..., out_features]."""
        if not onednn_is_faster(input.numel() * self.out_features, input, self.weight):
            return super().forward(input)
        out: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


def onednn_is_faster(multiplications: int, *operands: Tensor) -> bool:
    """Whether oneDNN computes a product of these operands faster than what PyTorch calls."""
    return (
        multiplications >= ONEDNN_MIN_MULTIPLICATIONS
        and all(operand.dtype == torch.float32 and operand.device.type == "cpu" for operand in operands)
        and _mkl_is_slow()
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` without gradient: [..., in] to [..., out]. Views are fine, and a weight in oneDNN's own order."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` by oneDNN, without gradient: [..., n] and [n, m] to [..., m]."""
    return onednn_linear(left, right.t())


def matmul_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right` for matrices, by whichever is faster, without gradient."""
    if onednn_is_faster(left.numel() * right.shape[1], left, right):
        out.copy_(onednn_matmul(left, right))
    else:
        torch.mm(left, right, out=out)


def weight_gradient(gradient: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`gradient^T x` for rows [R, out] and [R, in], into `out` if given: whole blocks of rows by oneDNN."""
    whole = onednn_rows(len(x), gradient.shape[1] * x.shape[1], x)
    if not whole:
        return torch.mm(gradient.t(), x, out=out)
    total = onednn_matmul(gradient[:whole].t(), x[:whole]).addmm_(gradient[whole:].t(), x[whole:])
    return total if out is None else out.copy_(total)


def onednn_rows(rows: int, multiplications: int, operand: Tensor) -> int:
    """How many of some rows oneDNN should take.

    Args:
        rows: All of them.
        multiplications: For each row.
        operand: Of the product's kind.
    """
    whole = rows - rows % ONEDNN_ROW_BLOCK
    return whole if onednn_is_faster(whole * multiplications, operand) else 0


class _Linear(torch.autograd.Function):
    """The weight is kept as the parameter that it is: ZeRO-3 frees and fetches it between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            onednn_matmul(gradient, weight) if needs_x else None,
            weight_gradient(rows, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


@cache
def _mkl_is_slow() -> bool:
    """An AMD processor with AVX-512, and a PyTorch that has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    has_kernels = torch.backends.mkldnn.is_available()
    return is_amd and "AVX512" in torch.backends.cpu.get_cpu_capability() and bool(has_kernels)
