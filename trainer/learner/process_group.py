"""The process group of the learners, and the DeepSpeed configuration that partitions their state."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmquest_rl.metrics import Metrics
from trainer.config.schema import LearnerConfig

ON_HOST = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
"""DeepSpeed's configuration sections for each value of `learner.offload`."""


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


def zero_config(
    config: LearnerConfig, dtype: torch.dtype, max_grad_norm: float | None, vector_sizes: Sequence[int]
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        config: stage and offload.
        dtype: of weights and arithmetic. With bfloat16 the stage is at least 1: only there DeepSpeed keeps float32
            master weights and float32 gradients.
        max_grad_norm: clips the global norm, from stage 1 on.
        vector_sizes: elements of the norms and biases, which are too small to be worth gathering one by one.
    """
    half = dtype == torch.bfloat16
    stage = max(1, config.zero_stage) if half else config.zero_stage
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": max(vector_sizes, default=0)}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": (max_grad_norm or 0.0) if stage else 0.0,
        "zero_optimization": zero | {section: {"device": "cpu"} for section in ON_HOST[config.offload]},
        "bf16": {"enabled": half, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's own needs a compiler at run time
    }
