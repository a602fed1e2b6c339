"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, size: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(size, inner, bias=bias)
        self.up = nn.Linear(size, inner, bias=bias)
        self.down = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [tokens, size] to the same shape."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out
