"""Shapes that cannot be, found in a configuration before a model is built of it. Messages use config.json's names."""

from collections.abc import Mapping
from typing import Any


def check_sizes(**sizes: Any) -> None:
    """Whether each of `sizes` (by its name in config.json) is a whole number above 0.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a whole number above 0")


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Whether each key/value head serves the same number of query heads, and a head can be rotated in pairs.

    Raises:
        ValueError: it does not, or cannot.
    """
    check_sizes(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: rotary positions turn pairs of dimensions")


def check_whole_rotation(rope: Mapping[str, Any]) -> None:
    """Whether rotary parameters turn whole heads, for architectures that know nothing else.

    Raises:
        ValueError: they turn a part.
    """
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}: this architecture has 1.0 only")


def head_dim_of(values: Mapping[str, Any]) -> int:
    """The head size of a config.json that may leave it to the other sizes.

    Raises:
        KeyError: those are missing.
        ValueError: the heads do not divide the hidden size.
    """
    if values.get("head_dim") is not None:
        return int(values["head_dim"])
    size, heads = values["hidden_size"], values["num_attention_heads"]
    check_sizes(hidden_size=size, num_attention_heads=heads)
    if size % heads:
        raise ValueError(f"hidden_size {size} is not a multiple of num_attention_heads {heads}: give head_dim")
    return int(size // heads)
