"""RMS normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), with the two rounding orders in use."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    The normalised value is computed in float32 and rounded to the input's dtype *before* the product with the weight.
    This order is part of the architecture, because bfloat16 checkpoints were trained with it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., size]`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """`(1 + weight) * x / sqrt(mean(x^2) + eps)` over the last dimension, so weights start at 0.

    Everything is computed in float32 and rounded to the input's dtype *last*, as Gemma and Qwen3-Next were trained.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., size]`."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * (1.0 + self.weight.float())).to(x.dtype)
