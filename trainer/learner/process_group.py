"""The process group of the learners: joins it, and merges metrics over its processes."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmquest_rl.metrics import Metrics


def join_group(device: torch.device, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> bool:
    """Join the process group of the learners; returns False if this process is already in a group, e.g. an engine's.

    A single process needs no address. With a loopback address no other network interface is used.

    Args:
        device: device of this learner; it selects the backend, NCCL or Gloo.
        rank: number of this process.
        world_size: number of processes.
        address: address of the first process.
        port: port of the first process.
        timeout_s: time limit for each collective, in seconds.
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
    """Merge the metrics of all processes; each process gets the result. A collective call."""
    everyone: list[Metrics] = [metrics] * dist.get_world_size()
    dist.all_gather_object(everyone, metrics.fetched())
    return Metrics().merge(everyone)
