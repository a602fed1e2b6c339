"""Shapes of Qwen3-MoE for the tests against transformers."""

CONFIG = "Qwen3MoeConfig"
MODEL = "Qwen3MoeForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

VARIANTS = {
    "normalized weights": {},
    "plain probabilities, tied, 3 heads on 1": {
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "every second layer": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "dense layers named": {"mlp_only_layers": [0, 2]},
    "both ways of dense layers": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "no layer with experts": {"mlp_only_layers": [0, 1, 2]},
    "one expert for each token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts for each token": {"num_experts": 4, "num_experts_per_tok": 4},
    "more experts than tokens": {"num_experts": 97, "num_experts_per_tok": 5},
    "odd counts": {"hidden_size": 52, "moe_intermediate_size": 12, "num_experts": 5, "head_dim": 10},
    "biases": {"attention_bias": True},
    "a window in every layer": {"use_sliding_window": True, "sliding_window": 7},
    "a window that is switched off": {"use_sliding_window": False, "sliding_window": 3},
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
