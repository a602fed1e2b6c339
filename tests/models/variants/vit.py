"""Shapes of ViT for the tests against transformers."""

CONFIG = "ViTConfig"
MODEL = "ViTForImageClassification"
TOLERANCE = 1e-5

BASE = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 7,
    "initializer_range": 0.1,
}

VARIANTS = {
    "square": {},
    "3 heads, two labels by default": {"num_attention_heads": 3, "num_labels": 2},
    "named labels": {"id2label": dict(enumerate(("cat", "dog", "owl", "cow", "hen", "fox", "none of them")))},
    "wide image": {"image_size": [8, 24]},
    "tall patches": {"image_size": [24, 16], "patch_size": [8, 4]},
    "one patch": {"patch_size": 16},
    "grey": {"num_channels": 1},
    "no biases of q, k, v": {"qkv_bias": False},
    "tanh gelu": {"hidden_act": "gelu_new"},
    "relu, another epsilon": {"hidden_act": "relu", "layer_norm_eps": 0.01},
}
