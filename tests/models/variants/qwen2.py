"""Shapes of Qwen2 for the tests against transformers."""

CONFIG = "Qwen2Config"
MODEL = "Qwen2ForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

VARIANTS = {
    "untied, 4 heads on 2": {},
    "tied, 3 heads on 1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no grouping, odd head count": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 50},
    "seven heads on one, as in 0.5B and 7B": {
        "tie_word_embeddings": True,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "hidden_size": 56,
    },
    "head size apart from width": {"head_dim": 24, "num_key_value_heads": 1},
    "windows after the first layer": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "windows in listed layers": {
        "use_sliding_window": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "a window of two tokens": {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0},
    "a window that is switched off": {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0},
    "another epsilon and base": {
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn rope with windows, tied": {
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}
