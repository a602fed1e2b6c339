"""What is done inside vLLM's worker and around its start: called by its engine, or handed to vLLM; imports no vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_HOST_IP": "127.0.0.1",  # its process group has one node
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads pinned to cores would take them from the learners
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one more than a model's positions: the token after a full text is not read
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def forget_expert_kernels(model: nn.Module) -> None:
    """Make the next reload pack the experts of MoE layers: vLLM 0.32 packs them for CPUs only with a new kernel."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def repack_output_layer(model: nn.Module) -> None:
    """Renew the packed copy that an output layer tied to the embedding computes with: a reload leaves it as it was."""
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            method: Any = module.quant_method
            method.process_weights_after_loading(module)


def read_back(given: list[tuple[str, Tensor]], model: nn.Module) -> tuple[int, list[str]]:
    """How many of the pushed tensors vLLM keeps as they came, vocabulary padding aside, and which of those differ.

    GPT-2's matrices are kept transposed, which the shape of a square one does not show.
    """
    held = dict(model.named_parameters())
    kept = [(name, held[name][: len(tensor)], tensor) for name, tensor in given if name in held]
    kept = [(name, ours, tensor) for name, ours, tensor in kept if ours.shape == tensor.shape]
    different = [
        name
        for name, ours, tensor in kept
        if not (_same(ours, tensor) or (ours.ndim == 2 and ours.shape == ours.T.shape and _same(ours.T, tensor)))
    ]
    return len(kept), different


def _same(ours: Tensor, tensor: Tensor) -> bool:
    return torch.allclose(ours, tensor.to(ours.device, ours.dtype), rtol=0, atol=0, equal_nan=True)


def free_kv_cache(worker: Any) -> list[int]:
    """Give back the memory of the KV cache; returns what `take_kv_cache` needs to get it again, empty."""
    sizes = []
    for cache in worker.model_runner.kv_caches:
        storage = cache.untyped_storage()
        sizes.append(storage.nbytes())
        storage.resize_(0)
    return sizes


def take_kv_cache(worker: Any, sizes: list[int]) -> None:
    """Undo `free_kv_cache`."""
    for cache, size in zip(worker.model_runner.kv_caches, sizes, strict=True):
        if size:  # layers may share one storage: it is listed once
            cache.untyped_storage().resize_(size)


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Undo what starting vLLM does to the rest of the process: variables, thread count, and its lock on that count."""
    variables, set_num_threads, count = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(count)
        for name in set(os.environ) | set(variables):
            if name.startswith("VLLM_") or name in ENVIRONMENT:
                continue
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]


def completion_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request: 48 bits, so that neighbours do not share a random stream."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=6).digest(), "little")


def without_compiler(device: str) -> AbstractContextManager[object]:
    """No torch.compile on a CPU: for one tiny function it would need seconds, and a C++ compiler that may be absent."""
    return torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()
