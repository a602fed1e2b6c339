"""Shapes that cannot be, found in a configuration before a model is built of it. Messages use config.json's names."""

from collections.abc import Mapping
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
"""The kinds of layers with and without a window, as config.json calls them."""


def check_sizes(**sizes: Any) -> None:
    """Whether each of `sizes` (by its name in config.json) is a whole number above 0.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a whole number above 0")


def check_supported(values: Mapping[str, Any], supported: Mapping[str, Any], model: str) -> None:
    """Check that a config.json asks for nothing that is not implemented.

    Args:
        values: The content of config.json.
        supported: The fields for which one value is implemented, with this value; a missing field has it.
        model: The name of the architecture, for the message.

    Raises:
        ValueError: a field has another value.
    """
    for name, value in supported.items():
        found = values.get(name, value)
        if found != value:
            raise ValueError(f"config.json asks for {name} {found!r}, but {model} here supports {value!r} only")


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


def windowed_layers(values: Mapping[str, Any], window: int | None) -> tuple[str, ...]:
    """The kind of each layer of a Qwen: a list in config.json, or in older ones the number of full layers before
    sliding ones.

    Raises:
        KeyError: the number of layers is missing.
        ValueError: the list has another length.
    """
    num_layers: int = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    check_sizes(num_hidden_layers=num_layers)
    if kinds is None:
        num_full = num_layers if window is None else min(values.get("max_window_layers", 28), num_layers)
        return (FULL,) * num_full + (SLIDING,) * (num_layers - num_full)
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for num_hidden_layers {num_layers}")
    return tuple(kinds)


def check_windows(layer_types: tuple[str, ...], window: int | None) -> None:
    """Whether all kinds of layers are known, and sliding ones have a window of at least one token.

    Raises:
        ValueError: one is not, or they have none.
    """
    unknown = sorted(set(layer_types) - {SLIDING, FULL})
    if unknown:
        raise ValueError(f"layer_types holds {unknown}: expected {SLIDING!r} or {FULL!r}")
    if SLIDING in layer_types and (window is None or window < 1):
        raise ValueError(
            f"layer_types asks for sliding layers, but their sliding_window is {window}: "
            'expected a whole number above 0, and "use_sliding_window": true'
        )
