"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2) and its context extensions.

Pair i of a head's rotated dimensions is rotated by the angle `position * inv_freq[i]`. The checkpoint's layout defines
the pairs: dimensions i and i + half (`rotate`, nearly every model on the Hub), or 2i and 2i + 1 (`rotate_interleaved`,
DeepSeek). Dimensions after the rotated ones pass through unchanged.

Extensions whose frequencies depend on the longest sequence of a batch (`dynamic`, `longrope`) are not supported: a
token's key would change with the other sequences of a packed batch, and with every token generated after it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosine and sine of the angles of one batch of positions, each `[tokens, 1, rotated dimensions / 2]`."""

    cos: Tensor
    sin: Tensor


class Frequencies(NamedTuple):
    """The frequencies of a rotary embedding."""

    inv_freq: Tensor
    """Radians per position `[rotated dimensions / 2]`, float32."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine, and so the scores by its square."""


class RoPE:
    """Computes the angles of positions.

    It is not a module: the frequencies follow from the configuration, and stay float32 in a model of any dtype.
    """

    def __init__(self, dim: int, parameters: Mapping[str, Any]) -> None:
        """Prepare the frequencies.

        Args:
            dim: Head size. The first `partial_rotary_factor` (default 1) of it is rotated.
            parameters: `rope_theta`, `rope_type` and the parameters of that type, as `rope_parameters` returns them.

        Raises:
            ValueError: `rope_type` is not supported, one of its parameters is missing, or the number of rotated
                dimensions is not even.
        """
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not supported: expected one of {', '.join(ROPE_TYPES)}")
        part = parameters.get("partial_rotary_factor", 1.0)
        rotated = int(dim * part)
        if rotated < 2 or rotated % 2 or rotated > dim:
            whole = f"head_dim {dim} with partial_rotary_factor {part}"
            raise ValueError(f"{whole} gives {rotated} rotated dimensions: expected an even number from 2 to {dim}")
        powers = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
        try:
            self.inv_freq, self.attention_factor = ROPE_TYPES[kind](parameters["rope_theta"] ** powers, parameters)
        except KeyError as missing:
            raise ValueError(f"rope_type {kind!r} needs {missing} in the rope parameters of config.json") from missing

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Compute cosine and sine for `positions` `[tokens]` in float32 and round them to `dtype`."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = (positions.float()[:, None] * self.inv_freq)[:, None, :]
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return Rotary(cos.to(dtype), sin.to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads `x` `[tokens, heads, head_dim]` whose pairs are half the rotated dimensions apart.

    `[x1 | x2 | rest]` becomes `[x1 cos - x2 sin | x2 cos + x1 sin | rest]`.
    """
    cos, sin = rotary
    half = cos.shape[-1]
    x1, x2, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


def rotate_interleaved(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads `x` `[tokens, heads, rotated dimensions]` whose pairs are neighbouring dimensions.

    In the result the pairs are half the dimensions apart. Queries and keys change in the same way, so
    the scores do not.
    """
    cos, sin = rotary
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's scale of attention for a context `factor` times longer: `0.1 mscale ln(factor) + 1`.

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.4.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(
    values: Mapping[str, Any], layer_type: str | None = None, default_theta: float = 10000.0
) -> dict[str, Any]:
    """Collect the rotary parameters of a config.json in the form that `RoPE` expects.

    transformers 5 writes them to `rope_parameters`, transformers 4 to `rope_theta`, `rope_scaling` and
    `partial_rotary_factor`.

    Args:
        values: The content of a config.json.
        layer_type: Layer type to select if `rope_parameters` holds one dict per layer type (Gemma 3).
        default_theta: Base of the frequencies if the file gives none.

    Raises:
        ValueError: The parameters are not a dict, or they differ between layer types and `layer_type` is None.
    """
    found = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if isinstance(found, Mapping) and any(isinstance(entry, Mapping) for entry in found.values()):
        if layer_type is None:
            raise ValueError(f"rope_parameters {found} differ between layers, which this architecture does not support")
        found = found.get(layer_type) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"rope_parameters (rope_scaling) is {found!r}: expected a dict")
    merged = {name: value for name, value in found.items() if value is not None}
    merged.setdefault("rope_type", merged.pop("type", "default"))  # "type" is the older spelling
    merged.setdefault("rope_theta", values.get("rope_theta") or default_theta)
    if values.get("partial_rotary_factor") is not None:
        merged.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    if merged["rope_type"] in ("llama3", "yarn"):
        _fill_lengths(merged, values)
    return merged


def _fill_lengths(merged: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Fill in context lengths from other fields of the file, and the factor that follows from them if it is absent."""
    original, longest = "original_max_position_embeddings", values.get("max_position_embeddings")
    if values.get(original) is not None:
        merged[original] = values[original]
    if longest is not None:
        merged.setdefault(original, longest)
        merged.setdefault("factor", longest / merged[original])


def _unscaled(period: Tensor, parameters: Mapping[str, Any]) -> Frequencies:
    return Frequencies(1.0 / period)


def _linear(period: Tensor, parameters: Mapping[str, Any]) -> Frequencies:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595, eq. 3): divides all frequencies by `factor`."""
    return Frequencies(1.0 / period / parameters["factor"])


def _llama3(period: Tensor, parameters: Mapping[str, Any]) -> Frequencies:
    """Llama 3.1's context extension: divides low frequencies by `factor`, keeps high ones, interpolates in between.

    Source: the reference code of Llama 3.1. The bounds are the wavelengths `L / low_freq_factor` and
    `L / high_freq_factor`, where L is the original context length.
    """
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = parameters["original_max_position_embeddings"]
    inv_freq = 1.0 / period
    wavelength = 2 * math.pi / inv_freq
    keep = (length / wavelength - low) / (high - low)
    between = (1 - keep) * inv_freq / factor + keep * inv_freq
    slowed = torch.where(wavelength > length / low, inv_freq / factor, between)
    return Frequencies(torch.where(wavelength < length / high, inv_freq, slowed))


def _yarn(period: Tensor, parameters: Mapping[str, Any]) -> Frequencies:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): like `_llama3`, but it interpolates over dimensions.

    The ramp lies between the dimensions that rotate `beta_fast` and `beta_slow` times within the original context.
    """
    factor, length = parameters["factor"], parameters["original_max_position_embeddings"]
    dim, theta = 2 * len(period), parameters["rope_theta"]

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0  # avoids a division by zero
    keep = 1 - ((torch.arange(len(period), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    inv_freq = 1.0 / (factor * period) * (1 - keep) + 1.0 / period * keep
    return Frequencies(inv_freq, _yarn_attention_factor(parameters))


def _yarn_attention_factor(parameters: Mapping[str, Any]) -> float:
    """The factor of cosine and sine. DeepSeek's configurations move a part of it to the softmax scale of attention."""
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor, mscale, all_dim = parameters["factor"], parameters.get("mscale"), parameters.get("mscale_all_dim")
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor)


ROPE_TYPES: dict[str, Callable[[Tensor, Mapping[str, Any]], Frequencies]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""Frequencies of each `rope_type`, as a function of the unscaled positions per radian `[rotated dimensions / 2]`."""
