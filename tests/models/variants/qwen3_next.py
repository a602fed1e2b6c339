"""Shapes of Qwen3-Next for the tests against transformers. The texts fit into a chunk;
test_qwen3_next.py has longer ones."""

CONFIG = "Qwen3NextConfig"
MODEL = "Qwen3NextForCausalLM"
TOLERANCE = 5e-5
GRADIENT_TOLERANCES = {"A_log": 1e-3, "dt_bias": 1e-3}
"""transformers sums these gradients in float32, where heads with fast decay leave mostly noise: in these shapes its
error is up to 6e-4 against float64, ours at most 4e-5."""

LINEAR, FULL = "linear_attention", "full_attention"

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": [LINEAR, FULL, LINEAR],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "initializer_range": 0.1,
}

VARIANTS = {
    "2 value heads on each of 2": {},
    "tied, 3 value heads on 1": {
        "tie_word_embeddings": True,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "no grouping": {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "num_key_value_heads": 4},
    "linear layers first": {"layer_types": [LINEAR, LINEAR, FULL]},
    "full alone": {"layer_types": [FULL] * 3},
    "period of layers": {"layer_types": None, "full_attention_interval": 2, "num_hidden_layers": 4},
    "default period": {"layer_types": None, "num_hidden_layers": 5},
    "convolution of 2": {"linear_conv_kernel_dim": 2},
    "convolution of 6": {"linear_conv_kernel_dim": 6},
    "keys wider than values": {"linear_key_head_dim": 20, "linear_value_head_dim": 4},
    "half rotated, another base": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "all rotated, yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
        },
    },
    "all experts": {"num_experts_per_tok": 5},
    "one expert of 7, weights not normalised": {
        "norm_topk_prob": False,
        "num_experts": 7,
        "num_experts_per_tok": 1,
    },
    "every second layer has experts": {"decoder_sparse_step": 2},
    "first layer dense": {"mlp_only_layers": [0]},
    "dense": {"mlp_only_layers": [0, 1, 2]},
    "biases, another epsilon": {"attention_bias": True, "rms_norm_eps": 0.01},
}
