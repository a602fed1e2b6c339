"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2), half-split as in the Hub's checkpoints.

A head vector is split into halves `[x1 | x2]`, and pair i is turned by `position * inv_freq[i]`:
`[x1 cos - x2 sin | x2 cos + x1 sin]`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosine and sine for one batch of positions, each [tokens, 1, rotated dimensions / 2]."""

    cos: Tensor
    sin: Tensor


class RoPE:
    """Angles for positions. Not a module: its frequencies follow from the config, and stay float32 in any model."""

    def __init__(self, dim: int, parameters: Mapping[str, Any]) -> None:
        """Prepare the frequencies.

        Args:
            dim: Rotated dimensions of a head; even.
            parameters: `rope_theta`, `rope_type` and what that type needs, as `rope_parameters` of a config.json.

        Raises:
            ValueError: `rope_type` is unknown, or one of its parameters is missing.
        """
        kind = parameters.get("rope_type", "default")
        if kind not in SCALINGS:
            raise ValueError(f"rope_type {kind!r} is not supported: expected one of {', '.join(SCALINGS)}")
        powers = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
        try:
            self.inv_freq: Tensor = SCALINGS[kind](1.0 / (parameters["rope_theta"] ** powers), parameters)
        except KeyError as missing:
            raise ValueError(f"rope_type {kind!r} needs {missing} in the rope parameters of config.json") from missing

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosine and sine of `positions` [tokens], computed in float32 and then rounded to `dtype`."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = (positions.float()[:, None] * self.inv_freq)[:, None, :]
        return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the heads `x` [tokens, heads, head_dim] by their positions."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def _unscaled(inv_freq: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    return inv_freq


def _llama3(inv_freq: Tensor, parameters: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's context extension: long waves are slowed by `factor`, short ones kept, those between interpolated.

    Source: the reference code of Llama 3.1. The bounds are wavelengths: `L / low_freq_factor`, `L / high_freq_factor`.
    """
    factor, low, high = (float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = (1 - keep) * inv_freq / factor + keep * inv_freq
    return scaled


SCALINGS: dict[str, Callable[[Tensor, Mapping[str, Any]], Tensor]] = {"default": _unscaled, "llama3": _llama3}
"""What each `rope_type` does to the frequencies [dim / 2]."""
