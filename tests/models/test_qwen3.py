"""The dense Qwen3 beyond the tests of all families: the layers with a window, and refused shapes."""

from typing import Any

import pytest

from llmquest_rl.models.config.checks import FULL, SLIDING
from llmquest_rl.models.qwen3 import Qwen3, Qwen3Config

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

WINDOWS: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "off where it is left out": ({"sliding_window": 5, "max_window_layers": 0}, [None] * 3),
    "switched off": ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, [None] * 3),
    "after the first layers": (
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        [None, None, 5],
    ),
    "in no layer": ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 28}, [None] * 3),
    "on, without a size": ({"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3),
    "on, with no size": ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None] * 3),
    "listed": (
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]},
        [5, None, 5],
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_which_layers_see_a_window(name: str) -> None:
    change, expected = WINDOWS[name]
    config = Qwen3Config.from_hf({**SHAPE, **change})
    assert [block.get_submodule("attention").window for block in Qwen3(config).blocks] == expected
    assert Qwen3Config.from_hf(config.to_hf()) == config
    if change.get("use_sliding_window"):
        from transformers import Qwen3Config as Theirs

        theirs = Theirs(**SHAPE, **change)
        assert [theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers 3"),
        ({"layer_types": [FULL, FULL, "chunked_attention"]}, "layer_types holds .'chunked_attention'."),
        ({"layer_types": [FULL, FULL, SLIDING]}, "sliding_window is None.*use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "needs 'original_max_position_embeddings'"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen3(Qwen3Config.from_hf({**SHAPE, **change}))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        Qwen3Config.from_hf({name: value for name, value in SHAPE.items() if name != "hidden_size"})
