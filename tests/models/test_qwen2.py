"""Qwen2 beyond the tests of all families: its biases, the layers with a window, and refused shapes."""

from typing import Any

import pytest

from llmquest_rl.models.config.checks import FULL, SLIDING
from llmquest_rl.models.qwen2 import Qwen2, Qwen2Config

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
    config = Qwen2Config.from_hf({**SHAPE, **change})
    assert [block.get_submodule("attention").window for block in Qwen2(config).blocks] == expected
    assert Qwen2Config.from_hf(config.to_hf()) == config
    from transformers import Qwen2Config as Theirs

    theirs = Theirs(**SHAPE, **change)
    assert [theirs.sliding_window if kind == SLIDING else None for kind in theirs.layer_types] == expected


def test_biases_are_on_queries_keys_and_values_only() -> None:
    names = {name.split(".", 2)[2] for name, _ in Qwen2(Qwen2Config.tiny()).blocks.named_parameters(prefix="blocks")}
    assert {name for name in names if name.endswith("bias")} == {
        "attention.query.bias",
        "attention.key.bias",
        "attention.value.bias",
    }


def test_what_config_json_leaves_out() -> None:
    config = Qwen2Config.from_hf({name: value for name, value in SHAPE.items() if name != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim, config.tied, config.rms_norm_eps) == (4, 8, False, 1e-6)
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5: give head_dim"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"is_causal": False}, "is_causal False"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config {'chunk_size': 262144}"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers 3"),
        ({"layer_types": [FULL, FULL, "chunked_attention"]}, "layer_types holds .'chunked_attention'."),
        ({"layer_types": [FULL, FULL, SLIDING]}, "sliding_window is None.*use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "needs 'original_max_position_embeddings'"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Qwen2(Qwen2Config.from_hf({**SHAPE, **change}))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="lacks 'hidden_size'"):
        Qwen2Config.from_hf({name: value for name, value in SHAPE.items() if name != "hidden_size"})
