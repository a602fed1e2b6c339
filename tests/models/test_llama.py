"""Llama beyond the tests of all families: refused shapes, and optional fields of config.json."""

from typing import Any

import pytest

from llmquest_rl.models.llama import Llama, LlamaConfig

MINIMAL = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def test_what_config_json_leaves_out() -> None:
    config = LlamaConfig.from_hf(MINIMAL)
    assert (config.num_kv_heads, config.head_dim, config.tied, config.rms_norm_eps) == (4, 8, False, 1e-6)
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5: give head_dim"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": 8.0}, "intermediate_size is 8.0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs 'factor'"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama(LlamaConfig.from_hf({**MINIMAL, **change}))
