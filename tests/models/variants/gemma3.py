"""Shapes of Gemma 3 for the tests against transformers. The texts are longer than every window."""

CONFIG = "Gemma3TextConfig"
MODEL = "Gemma3ForCausalLM"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.1,
}

VARIANTS = {
    "4 heads on 2": {},
    "untied, 3 heads on 1": {"tie_word_embeddings": False, "num_attention_heads": 3, "num_key_value_heads": 1},
    "no grouping, head size apart from width": {"num_key_value_heads": 4, "head_dim": 10},
    "window of two tokens": {"sliding_window": 2},
    "window of the prompt": {"sliding_window": 24},
    "sliding alone": {"layer_types": ["sliding_attention"] * 3},
    "full alone": {"layer_types": ["full_attention"] * 3},
    "period of layers": {"layer_types": None, "sliding_window_pattern": 2},
    "default period": {"layer_types": None, "num_hidden_layers": 7},
    "scale apart from head size": {"query_pre_attn_scalar": 5},
    "two rotary bases, linear scaling": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        },
    },
    "soft cap on the logits": {"final_logit_softcapping": 2.0},
    "biases": {"attention_bias": True},
    "exact gelu, another epsilon": {"hidden_activation": "gelu", "rms_norm_eps": 0.01},
}
