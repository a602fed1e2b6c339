"""The distributed side of a learner: its process group, and DeepSpeed's engine around a model, made by Accelerate.

No other file imports DeepSpeed.

The behaviour of DeepSpeed depends on dtype and ZeRO stage:

* float32, stage 0: plain AdamW on the parameters themselves; gradients are all-reduced between processes.
* bfloat16, stage 0: the same as stage 1, because DeepSpeed keeps float32 master weights only from stage 1 on.
* stages 1 to 3: master weights and AdamW state are partitioned; from 2 on gradients too, from 3 on parameters too.
"""

import io
import logging
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from inspect import unwrap
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.metrics import Metrics
from llmquest_rl.models.base import Model
from llmquest_rl.models.weight_map import named_weights
from llmquest_rl.optim.groups import decay_groups
from trainer.config.schema import LearnerConfig
from trainer.learner.setup import LearnerSetup

log = logging.getLogger(__name__)

ON_HOST = {"none": (), "optimizer": ("offload_optimizer",), "parameters": ("offload_optimizer", "offload_param")}
"""DeepSpeed's configuration sections for each value of `learner.offload`."""


def trainable(
    model: Model, lr: float, setup: LearnerSetup, rank: int, world_size: int
) -> tuple[Any, torch.optim.Optimizer]:
    """A DeepSpeed engine around the model, and the model's AdamW.

    The process must have joined its process group before.

    Args:
        model: the model.
        lr: peak learning rate; the other options are those of `setup.optimizer`.
        setup: the learner's setup.
        rank: number of this process.
        world_size: number of processes.
    """
    options, groups = setup.optimizer, decay_groups(model.named_parameters(), setup.optimizer.weight_decay)
    with _without_compiler():
        adamw = torch.optim.AdamW(groups, lr, options.betas, options.eps, fused=True)
        return _wrap_model(model, adamw, setup, rank, world_size), adamw


def _wrap_model(model: Model, optimizer: torch.optim.Optimizer, setup: LearnerSetup, rank: int, world_size: int) -> Any:
    """Wrap the model and its optimizer in a DeepSpeed engine."""
    import deepspeed.ops
    from accelerate import Accelerator

    # DeepSpeed would compile its shared-memory collectives for CPUs at their first use, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    forget_accelerate()
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in place.items()}, ACCELERATE_USE_DEEPSPEED="true")
    vectors = [parameter.numel() for parameter in model.parameters() if parameter.ndim <= 1]
    dtype = getattr(torch, setup.dtype)
    config = zero_config(setup.learner, dtype, setup.optimizer.max_grad_norm, vectors)
    with redirect_stdout(io.StringIO()) as output:
        accelerator = Accelerator(deepspeed_plugin=_plugin(config))
        engine, _ = accelerator.prepare(model, optimizer)
    log.debug("DeepSpeed: %s", output.getvalue())
    reduces_itself = engine.zero_optimization_stage() > 1 or hasattr(engine.optimizer, "reduce_gradients")
    if world_size == 1 and not reduces_itself:
        engine.enable_backward_allreduce = False  # it would copy every gradient twice in vain
    return engine


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Import DeepSpeed and build optimizers without loading torch's compiler, which takes 2 s of processor time.

    DeepSpeed's Muon asks for it at import, and torch's optimizers to keep a method from being compiled. Learners use
    neither.
    """
    compile_function, add_group = torch.compile, unwrap(torch.optim.Optimizer.add_param_group)
    torch.compile = lambda function: function  # type: ignore[assignment]
    add_group.__dynamo_disable = add_group  # the name under which torch keeps what its compiler made of the method
    try:
        yield
    finally:
        torch.compile = compile_function
        del add_group.__dynamo_disable


def _plugin(config: dict[str, Any]) -> Any:
    """Accelerate's plugin with DeepSpeed's configuration."""
    from accelerate.utils import DeepSpeedPlugin

    class Plugin(DeepSpeedPlugin):  # type: ignore[misc]
        def set_deepspeed_weakref(self) -> None:
            """Leave out the object that tells models of transformers about ZeRO-3: it imports transformers."""

    return Plugin(hf_ds_config=config, zero3_init_flag=False)


def apply_gradients(engine: Any, limit: float | None) -> float | None:
    """Clip the gradients to the norm `limit` and update the weights.

    Returns:
        The norm before clipping, or None if it was not finite and the weights are unchanged.
    """
    if engine.zero_optimization():
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    if not norm.isfinite():
        engine.zero_grad()
        return None
    if limit is not None and norm > limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    engine.step()
    return float(norm)


def whole_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Pairs (our name, tensor) of all weights; ZeRO-3 gathers one at a time. A collective call."""
    from deepspeed.runtime.zero import GatheredParameters

    is_partitioned = engine.zero_optimization_partition_weights()
    for name, weight in named_weights(engine.module):
        gather = is_partitioned and isinstance(weight, nn.Parameter)
        with GatheredParameters([weight]) if gather else nullcontext():
            yield name, weight.detach().clone() if is_partitioned else weight.detach()


def leave_process_group() -> None:
    """End the process group that this process joined."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def forget_accelerate() -> None:
    """Reset Accelerate's global state, which a second learner in this process must not inherit."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_DEEPSPEED", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def zero_config(
    config: LearnerConfig, dtype: torch.dtype, max_grad_norm: float | None, vector_sizes: Sequence[int]
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        config: stage and offload.
        dtype: dtype of weights and arithmetic. With bfloat16 the stage is at least 1, because DeepSpeed keeps float32
            master weights and float32 gradients only from stage 1 on.
        max_grad_norm: limit of the global gradient norm, which DeepSpeed clips from stage 1 on.
        vector_sizes: elements of each norm and bias; parameters of this size are not partitioned.
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


def sum_over_processes(values: Tensor, device: torch.device) -> None:
    """Sum a tensor of any device over the processes, in place; `device` is the learner's. A collective call."""
    moved = values.to(device)  # NCCL takes tensors of a GPU only
    dist.all_reduce(moved)
    values.copy_(moved)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
