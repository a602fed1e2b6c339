"""Shapes of DeepSeek-V3 for the tests against transformers. The class writes `num_nextn_predict_layers` to
config.json, but never saves these layers."""

CONFIG = "DeepseekV3Config"
MODEL = "DeepseekV3ForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.1,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

VARIANTS = {
    "queries through a latent, four groups": {},
    "queries directly, one group": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "YaRN of DeepSeek": {
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 128,
    },
    "YaRN with two scales": {
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707},
        "max_position_embeddings": 128,
    },
    "rotated in halves, with biases": {"rope_interleave": False, "attention_bias": True},
    "tied, weights of experts as they are": {"tie_word_embeddings": True, "norm_topk_prob": False},
    "experts in every layer, three shared": {"first_k_dense_replace": 0, "n_shared_experts": 3},
    "dense throughout": {"first_k_dense_replace": 3},
    "odd sizes, another epsilon": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "kv_lora_rank": 11,
        "q_lora_rank": 13,
        "rms_norm_eps": 0.01,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 1,
    },
}
