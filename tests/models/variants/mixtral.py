"""Shapes of Mixtral for the tests against transformers."""

CONFIG = "MixtralConfig"
MODEL = "MixtralForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}

VARIANTS = {
    "two of four experts": {},
    "tied, 3 heads on 1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no grouping, head size apart": {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 14},
    "all experts for each token": {"num_experts_per_tok": 4},
    "odd number of experts": {"num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 12},
    "more experts than tokens": {"num_local_experts": 90, "num_experts_per_tok": 3},
    "a single expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "a window": {"sliding_window": 9},
    "a window of two tokens": {"sliding_window": 2},
    "yarn": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "another epsilon and base": {
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}
