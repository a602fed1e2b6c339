"""Feed-forward layers."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from llmquest_rl.layers.linear import Linear

_gelu_tanh = partial(F.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""Activation functions by their names in config.json (GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""


def check_activation(name: str, field: str) -> None:
    """Check that an activation is implemented.

    Raises:
        ValueError: The activation is not implemented. The message names the `field` of config.json.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"{field} {name!r} is not implemented: expected one of {', '.join(ACTIVATIONS)}")


class GatedMLP(nn.Module):
    """Gated feed-forward layer `down(f(gate(x)) * up(x))`: SwiGLU with silu, GeGLU with GELU.

    Source: Shazeer 2020, arXiv:2002.05202, section 2.
    """

    def __init__(self, size: int, inner: int, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = Linear(size, inner, bias=bias)
        self.up = Linear(size, inner, bias=bias)
        self.down = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` `[tokens, size]`; returns `[tokens, size]`."""
        out: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return out


class MLP(nn.Module):
    """Feed-forward layer `down(f(up(x)))` with biases (Vaswani et al. 2017, arXiv:1706.03762, eq. 2, with f = ReLU)."""

    def __init__(self, size: int, inner: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = Linear(size, inner)
        self.down = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` `[tokens, size]`; returns `[tokens, size]`."""
        out: Tensor = self.down(self.activation(self.up(x)))
        return out
