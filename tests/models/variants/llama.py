"""Shapes of Llama for the tests against transformers."""

CONFIG = "LlamaConfig"
MODEL = "LlamaForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}

VARIANTS = {
    "untied, 4 heads on 2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "tied, 3 heads on 1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no grouping, odd head size": {
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "hidden_size": 50,
        "head_dim": 10,
    },
    "head size apart from width": {"head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama 3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "num_key_value_heads": 2,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another epsilon and base": {
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "yarn rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn rope, two mscales, not truncated": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.3,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}
