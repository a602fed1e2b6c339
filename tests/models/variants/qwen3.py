"""Shapes of the dense Qwen3 for the tests against transformers."""

CONFIG = "Qwen3Config"
MODEL = "Qwen3ForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

VARIANTS = {
    "heads wider than the hidden size, untied": {},
    "tied, 3 heads on 1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no grouping, odd head count": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 10},
    "biases": {"attention_bias": True},
    "windows after the first layer": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "windows in listed layers": {
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "a window of two tokens": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 2},
    "a window that is switched off": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "another epsilon": {"rms_norm_eps": 0.01},
}
