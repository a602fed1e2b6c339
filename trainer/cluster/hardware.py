"""The resources of this process: cores, memory, and the dtype that is fastest here."""

import math
import os
import time
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
import torch

Purpose = Literal["learner", "engine"]

PROBE_ROWS: dict[Purpose, int] = {"learner": 768, "engine": 128}
"""Rows of the probed product: a packed microbatch, or one token of each of many sequences being decoded."""
PROBE_WIDTH = 576
"""Its width: that of a small model, since it is on small ones that a CPU is used."""
PROBE_SECONDS = 0.1
"""Time spent on each dtype."""
MARGIN = 1.2
"""bfloat16 rounds: it must be this much faster to be worth it."""


def available_cores() -> int:
    """CPU cores that this process may use: its affinity mask, and the quota of its container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _container_cores())))


def available_memory() -> int:
    """Bytes of main memory that this process and its children can still take without swapping or being killed."""
    free = psutil.virtual_memory().available
    limit = _limit("memory.max", "memory/memory.limit_in_bytes")
    used = _limit("memory.current", "memory/memory.usage_in_bytes")
    return free if limit is None or used is None else max(0, min(free, limit - used))


@cache
def choose_dtype(device: str, purpose: Purpose) -> tuple[torch.dtype, str]:
    """The dtype for a model's arithmetic, and the reason in words.

    On GPUs it is bfloat16 wherever the hardware has it. CPUs of one name differ by a factor of six in bfloat16, so
    there a probe of a fifth of a second decides. Probe while the machine is otherwise idle.

    Args:
        device: `cpu` or a CUDA device.
        purpose: whether products are large (training) or of few rows (decoding).
    """
    if torch.device(device).type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bfloat16"
        return torch.float32, "this GPU does not compute in bfloat16"
    speeds = {dtype: _matmul_gflops(PROBE_ROWS[purpose], dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = torch.bfloat16 if speeds[torch.bfloat16] > MARGIN * speeds[torch.float32] else torch.float32
    figures = f"{speeds[torch.float32]:.0f} GFLOP/s in float32, {speeds[torch.bfloat16]:.0f} in bfloat16"
    return chosen, f"a probe of this CPU's matrix products gave {figures}"


def _matmul_gflops(rows: int, dtype: torch.dtype) -> float:
    """Speed of the fastest of a few products, so that a passing disturbance does not count."""
    left = torch.randn(rows, PROBE_WIDTH).to(dtype)
    right = torch.randn(PROBE_WIDTH, 2 * PROBE_WIDTH).to(dtype)
    left @ right  # the first call picks and compiles its kernel
    fastest = math.inf
    end = time.perf_counter() + PROBE_SECONDS
    while (start := time.perf_counter()) < end:
        left @ right
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * rows * PROBE_WIDTH * 2 * PROBE_WIDTH / fastest / 1e9


def _container_cores() -> float:
    """The container's share of time in cores; a quota of -1 or `max` is none."""
    combined = _control_file("cpu.max").split()
    quota, period = (
        combined if combined else (_control_file("cpu/cpu.cfs_quota_us"), _control_file("cpu/cpu.cfs_period_us"))
    )
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def _limit(unified: str, version_1: str) -> int | None:
    """A number of bytes from the control group, of either version; None where there is no limit."""
    text = _control_file(unified) or _control_file(version_1)
    return int(text) if text.isdecimal() else None


def _control_file(name: str) -> str:
    """A file of the control group as a container sees it, where its own group is the root; else nothing."""
    file = Path("/sys/fs/cgroup") / name
    return file.read_text().strip() if file.is_file() else ""
