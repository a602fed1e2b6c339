"""The process group of the learners: joining it, and metrics over all of its processes."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmquest_rl.metrics import Metrics


def join_group(device: torch.device, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> bool:
    """Join the process group of the learners; False when this process already is in a group (an engine's, inline).

    A single process needs no address. On a loopback address nothing is bound to other interfaces.
    """
    if dist.is_initialized():
        assert dist.get_world_size() == world_size, "this process is in a group of another size"
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"rank": rank, "world_size": world_size, "timeout": timedelta(seconds=timeout_s)}
    if world_size == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), **options)
        return True
    if address.startswith("127.") or address == "localhost":
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(backend, init_method=f"tcp://{address}:{port}", **options)
    return True


def over_processes(metrics: Metrics) -> Metrics:
    """The metrics of all processes merged, on each of them. A collective call."""
    everyone: list[Metrics] = [metrics] * dist.get_world_size()
    dist.all_gather_object(everyone, metrics.fetched())
    return Metrics().merge(everyone)
