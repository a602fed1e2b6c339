"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), rounded as in the Llama family."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    The normalised value is computed in float32 and rounded to the input's dtype *before* the product with the weight:
    that order is part of the architecture, because bfloat16 checkpoints were trained with it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., size]."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)
