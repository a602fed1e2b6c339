"""Shapes of GPT-2 for the tests against transformers."""

CONFIG = "GPT2Config"
MODEL = "GPT2LMHeadModel"
TOLERANCE = 1e-5

BASE = {
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 96,
    "initializer_range": 0.1,
}

VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "5 heads, odd head size": {"n_head": 5, "n_embd": 35},
    "another inner size, ReLU": {"n_inner": 50, "activation_function": "relu"},
    "exact GELU, another epsilon": {"activation_function": "gelu", "layer_norm_epsilon": 0.01},
    "as many positions as the longest text": {"n_positions": 64},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "scores not scaled": {"scale_attn_weights": False},
    "scores scaled by layer only": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}
