"""Configurations that `models.py` measures: each architecture at about 20 and 135 million parameters.

vLLM's kernels for CPUs support the head sizes. Weights are random, because speed does not depend on them.
"""

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "20m": {"vocab_size": 16384, "hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
}
SPARSE_SIZES: dict[str, dict[str, Any]] = {
    "20m": {"vocab_size": 16384, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024},
    "135m": {"vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408},
}
EXPERTS = {"20m": (16, 128), "135m": (32, 192)}
"""Number of experts, and the inner size of each."""
HEADS = {"20m": (6, 2), "135m": (9, 3)}
SPARSE_HEADS = {"20m": (6, 2), "135m": (8, 2)}


def _grouped(heads: tuple[int, int]) -> dict[str, Any]:
    return {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 64}


def _llama(size: str) -> dict[str, Any]:
    return {**SIZES[size], **_grouped(HEADS[size]), "tie_word_embeddings": True}


def _gpt2(size: str) -> dict[str, Any]:
    shape = SIZES[size]
    heads = shape["hidden_size"] // 64
    layers = {"20m": 7, "135m": 26}[size]
    sizes = {"n_embd": shape["hidden_size"], "n_head": heads, "n_layer": layers, "n_positions": 1024}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"vocab_size": shape["vocab_size"], **sizes, **dropout, "bos_token_id": 0, "eos_token_id": 0}


def _gemma3(size: str) -> dict[str, Any]:
    window = {"sliding_window": 512, "query_pre_attn_scalar": 64}
    layers = {"20m": 6, "135m": 24}[size]
    return {**_llama(size), **window, "num_hidden_layers": layers, "max_position_embeddings": 8192}


def _mixture(size: str) -> dict[str, Any]:
    experts, inner = EXPERTS[size]
    chosen = {"num_experts_per_tok": 4, "moe_intermediate_size": inner, "norm_topk_prob": True}
    return {**SPARSE_SIZES[size], **chosen, "num_experts": experts, "tie_word_embeddings": True}


def _qwen3_moe(size: str) -> dict[str, Any]:
    return {**_mixture(size), **_grouped(SPARSE_HEADS[size])}


def _mixtral(size: str) -> dict[str, Any]:
    experts, inner = EXPERTS[size]
    shape = {**SPARSE_SIZES[size], **_grouped(SPARSE_HEADS[size]), "intermediate_size": 2 * inner}
    return {**shape, "num_local_experts": experts // 2, "num_experts_per_tok": 2, "tie_word_embeddings": True}


def _deepseek_v3(size: str) -> dict[str, Any]:
    experts, inner = EXPERTS[size]
    heads = SPARSE_HEADS[size][0]
    latent = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64}
    attention = {**latent, "v_head_dim": 64, "num_attention_heads": heads, "num_key_value_heads": heads}
    router = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "first_k_dense_replace": 1}
    mixture = {"n_routed_experts": experts, "moe_intermediate_size": inner, "n_shared_experts": 1, **router}
    return {**SPARSE_SIZES[size], **attention, **mixture, "tie_word_embeddings": False, "num_mtp_layers": 0}


def _qwen3_next(size: str) -> dict[str, Any]:
    value_heads = {"20m": 4, "135m": 6}[size]
    linear = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2}
    shared = {"shared_expert_intermediate_size": EXPERTS[size][1], "full_attention_interval": 4}
    layers = {"20m": 4, "135m": 12}[size]
    mixture = {**_mixture(size), **_grouped(SPARSE_HEADS[size]), "num_hidden_layers": layers}
    untied = {"tie_word_embeddings": False}  # vLLM has no tied head for it
    return {**mixture, **linear, **shared, **untied, "linear_num_value_heads": value_heads}


SHAPES = {
    "gpt2": ("GPT2", _gpt2),
    "llama": ("Llama", _llama),
    "qwen2": ("Qwen2", _llama),
    "qwen3": ("Qwen3", _llama),
    "gemma3": ("Gemma3", _gemma3),
    "qwen3_moe": ("Qwen3Moe", _qwen3_moe),
    "mixtral": ("Mixtral", _mixtral),
    "deepseek_v3": ("DeepseekV3", _deepseek_v3),
    "qwen3_next": ("Qwen3Next", _qwen3_next),
}
"""Stem of transformers' class names and configuration by size, for each architecture file."""

MISSING: dict[str, dict[str, str]] = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
"""Keys of config.json that vLLM needs and transformers does not write."""
