"""Linear layers and matrix products with the fastest kernel of the processor.

PyTorch multiplies float32 matrices on CPUs with MKL. On AMD processors MKL leaves half of the AVX-512 units idle: it
reaches 110 GFLOP/s per core of a Zen 5, where oneDNN, which PyTorch includes as well, reaches 240. But oneDNN compiles
a kernel for each new shape, so small products stay with MKL. The choice depends on the processor and the shapes alone,
so a resumed run makes the same choice.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN_MIN_MULTIPLICATIONS = 2**24
"""Scalar multiplications from which oneDNN is faster even if its new kernel, 0.2 ms to compile, is used only once."""

ONEDNN_ROW_BLOCK = 64
"""Rows per block where the number of rows differs from call to call. oneDNN computes whole blocks and PyTorch the rest,
because each new number of rows would compile a kernel, which costs time and memory."""

KERNEL_CACHE_SIZES = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
"""Kernels that PyTorch and oneDNN cache, read from the environment when the first kernel is compiled. A training step
uses 20 to 60 kernels. The default of 1,024 cost gigabytes, because cached kernels fragment the memory of tensors."""
for _name, _number in KERNEL_CACHE_SIZES.items():
    os.environ.setdefault(_name, _number)


class Linear(nn.Linear):
    """Linear layer `y = x W^T + b`, computed by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Transform `input` `[..., in_features]` to `[..., out_features]`."""
        if not onednn_is_faster(input.numel() * self.out_features, input, self.weight):
            return super().forward(input)
        out: Tensor = _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


def onednn_is_faster(multiplications: int, *operands: Tensor) -> bool:
    """True if oneDNN computes a product of these operands faster than PyTorch's default kernel."""
    return (
        multiplications >= ONEDNN_MIN_MULTIPLICATIONS
        and all(operand.dtype == torch.float32 and operand.device.type == "cpu" for operand in operands)
        and _mkl_is_slow()
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `x W^T + b` by oneDNN, without gradient: `[..., in]` to `[..., out]`.

    Operands may be views, and the weight may be in oneDNN's blocked layout.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def onednn_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Compute `left @ right` by oneDNN, without gradient: `[..., n]` and `[n, m]` to `[..., m]`."""
    return onednn_linear(left, right.t())


def matmul_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Compute `out = left @ right` for matrices with the faster library, without gradient."""
    if onednn_is_faster(left.numel() * right.shape[1], left, right):
        out.copy_(onednn_matmul(left, right))
    else:
        torch.mm(left, right, out=out)


def weight_gradient(gradient: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute `gradient^T x` from rows `[R, out]` and `[R, in]`: `[out, in]`, written to `out` if given."""
    whole = onednn_rows(len(x), gradient.shape[1] * x.shape[1], x)
    if not whole:
        return torch.mm(gradient.t(), x, out=out)
    total = onednn_matmul(gradient[:whole].t(), x[:whole]).addmm_(gradient[whole:].t(), x[whole:])
    return total if out is None else out.copy_(total)


def onednn_rows(rows: int, multiplications: int, operand: Tensor) -> int:
    """Number of rows that oneDNN should compute; PyTorch computes the rest.

    Args:
        rows: Number of all rows.
        multiplications: Scalar multiplications per row.
        operand: An operand of the product, for its dtype and device.
    """
    whole = rows - rows % ONEDNN_ROW_BLOCK
    return whole if onednn_is_faster(whole * multiplications, operand) else 0


class _Linear(torch.autograd.Function):
    """Saves the parameter itself for backward, because ZeRO-3 frees and fetches it between forward and backward."""

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
    """True on an AMD processor with AVX-512, if PyTorch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    has_kernels = torch.backends.mkldnn.is_available()
    return is_amd and "AVX512" in torch.backends.cpu.get_cpu_capability() and bool(has_kernels)
