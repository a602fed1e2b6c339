"""A very small model of every architecture that vLLM serves, also on a CPU, as values of config.json.

vLLM's kernels for CPUs require heads of at least 32 numbers and a latent of 512 + 64; for linear attention they require
heads of 64, a convolution of 4 and bfloat16.
"""

from typing import Any

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

LLAMA = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

QWEN2 = COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_attention_heads": 2,  # vLLM has no other head size than hidden_size / num_attention_heads
    "num_key_value_heads": 1,
}

EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,  # vLLM pads it to 64
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

DEEPSEEK = {name: value for name, value in COMMON.items() if name != "head_dim"} | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 128,
        "n_positions": 96,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.1,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama with RoPE of Llama 3, tied": LLAMA
    | {
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama with YaRN": LLAMA | {"rope_scaling": YARN},
    "qwen2": QWEN2,
    "qwen2 with YaRN and a window, tied": QWEN2
    | {
        "tie_word_embeddings": True,
        "rope_scaling": YARN,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 0,
    },
    "qwen3": COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": COMMON | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
    "mixtral": COMMON
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
    },
    "gemma3": COMMON
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_local_base_freq": 1000.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 with YaRN, no latent queries": DEEPSEEK
    | {"q_lora_rank": None, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "qwen3_next": COMMON
    | EXPERTS
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_experts_per_tok": 6,  # all: in bfloat16 a router that decides otherwise would hide any other difference
        "partial_rotary_factor": 0.5,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 32,
    },
}
"""Name to config.json; the name begins with that of the architecture's file."""
