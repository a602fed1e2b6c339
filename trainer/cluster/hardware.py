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
"""Rows of the probed product: those of a packed microbatch, or of one decoding step of many sequences."""
PROBE_WIDTH = 576
"""Width of the probed product: that of a small model, because CPUs are used for small models."""
PROBE_SECONDS = 0.1
"""Seconds spent on each dtype."""
MARGIN = 1.2
"""Minimum speed-up at which bfloat16 is chosen, because it rounds more than float32."""


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

    On GPUs it is bfloat16 if the hardware supports it. On CPUs a probe of 0.2 s decides, because CPUs with the same
    name differ by a factor of six in bfloat16. The machine should be idle otherwise during the probe.

    Args:
        device: `cpu` or a CUDA device.
        purpose: `learner` for products of many rows (training), `engine` for products of few rows (decoding).
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
    """Speed of the fastest of several products, so that a short disturbance does not count."""
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
    """The container's CPU quota in cores; infinite if the quota is -1 or `max`."""
    combined = _control_file("cpu.max").split()
    quota, period = (
        combined if combined else (_control_file("cpu/cpu.cfs_quota_us"), _control_file("cpu/cpu.cfs_period_us"))
    )
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else math.inf


def _limit(unified: str, version_1: str) -> int | None:
    """A number of bytes from the control group, version 1 or 2; None if there is no limit."""
    text = _control_file(unified) or _control_file(version_1)
    return int(text) if text.isdecimal() else None


def _control_file(name: str) -> str:
    """The text of a control-group file as a container sees it, with its own group as the root; empty if missing."""
    file = Path("/sys/fs/cgroup") / name
    return file.read_text().strip() if file.is_file() else ""
