"""Checks of a configuration before a model is built from it. Messages use the names of config.json."""

from collections.abc import Mapping
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
"""The attention types of layers with and without a window, in the words of config.json."""


def check_sizes(**sizes: Any) -> None:
    """Check that each of `sizes` (by its name in config.json) is a positive integer.

    Raises:
        ValueError: a size is not a positive integer.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}: expected a positive integer")


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
    """Check that all key/value heads serve the same number of query heads, and that the head size is even for RoPE.

    Raises:
        ValueError: the number of query heads is not a multiple of the key/value heads, or the head size is odd.
    """
    check_sizes(num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: RoPE rotates pairs of dimensions")


def check_whole_rotation(rope: Mapping[str, Any]) -> None:
    """Check that RoPE rotates whole heads, for architectures that have no partial rotation.

    Raises:
        ValueError: `partial_rotary_factor` is not 1.
    """
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']}: this architecture supports 1.0 only"
        )


def head_dim_of(values: Mapping[str, Any]) -> int:
    """Return the head size of a config.json: `head_dim`, or the hidden size divided by the number of heads.

    Raises:
        KeyError: `head_dim` and the fields that it is computed from are missing.
        ValueError: the hidden size is not a multiple of the number of heads.
    """
    if values.get("head_dim") is not None:
        return int(values["head_dim"])
    size, heads = values["hidden_size"], values["num_attention_heads"]
    check_sizes(hidden_size=size, num_attention_heads=heads)
    if size % heads:
        raise ValueError(f"hidden_size {size} is not a multiple of num_attention_heads {heads}: give head_dim")
    return int(size // heads)


def listed_layer_types(values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return `layer_types` of a config.json; None if the file does not list the types of its layers.

    Raises:
        KeyError: the number of layers is missing.
        ValueError: `layer_types` has another length than the number of layers.
    """
    num_layers, types = values["num_hidden_layers"], values.get("layer_types")
    if types is None:
        return None
    if len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries for num_hidden_layers {num_layers}")
    return tuple(types)


def windowed_layers(values: Mapping[str, Any], window: int | None) -> tuple[str, ...]:
    """Return the attention type of each layer of a Qwen: `layer_types`, or `max_window_layers` in older files.

    Args:
        values: The content of config.json.
        window: The size of the window in tokens; None = no layer has one, unless `layer_types` says so.

    Raises:
        KeyError: the number of layers is missing.
        ValueError: `layer_types` has another length than the number of layers.
    """
    num_layers: int = values["num_hidden_layers"]
    check_sizes(num_hidden_layers=num_layers)
    listed = listed_layer_types(values)
    if listed is not None:
        return listed
    num_full = num_layers if window is None else min(values.get("max_window_layers", 28), num_layers)
    return (FULL,) * num_full + (SLIDING,) * (num_layers - num_full)


def check_windows(layer_types: tuple[str, ...], window: int | None) -> None:
    """Check that all attention types are known, and that sliding layers have a window of at least one token.

    Raises:
        ValueError: an attention type is unknown, or sliding layers have no window.
    """
    unknown = sorted(set(layer_types) - {SLIDING, FULL})
    if unknown:
        raise ValueError(f"layer_types holds {unknown}: expected {SLIDING!r} or {FULL!r}")
    if SLIDING in layer_types and (not isinstance(window, int) or window < 1):
        raise ValueError(
            f"layer_types asks for sliding layers, but their sliding_window is {window}: "
            'expected a positive integer, and in a Qwen "use_sliding_window": true'
        )


def check_router(chosen: int, experts: int, experts_name: str, **coefficients: float) -> None:
    """Check the number of experts of a token, and the coefficients of the router's losses.

    Raises:
        ValueError: a token is routed to more experts than there are, or a coefficient is negative.
    """
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok {chosen} is more than {experts_name} {experts}")
    for name, value in coefficients.items():
        if value < 0:
            raise ValueError(f"{name} is {value}: expected 0 or more")
