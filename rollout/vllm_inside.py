"""Helpers of the vLLM engine that run inside vLLM's worker or around its start. This file does not import vLLM."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # run the engine in this process
    "VLLM_HOST_IP": "127.0.0.1",  # the process group has a single node
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads pinned to cores would take those cores from the learners
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # we ask for one position more than the model has; it is never computed
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def quiet_loggers() -> None:
    """Silence two loggers of vLLM that do not help a user. Call it after the start, which resets their levels."""
    # On an error this one logs the whole state, megabytes in one line. The exception is enough.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    # At each reload this one warns of layers without tensors on disk: rotary tables and tied output layers, which are
    # complete without them.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


def forget_expert_kernels(model: nn.Module) -> None:
    """Make the next reload pack the experts again: vLLM 0.32 packs them for a CPU only when it creates the kernel."""
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def repack_output_layer(model: nn.Module) -> None:
    """Pack the output layer again. One that is tied to the embedding keeps its old packed copy after a reload."""
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            method: Any = module.quant_method
            method.process_weights_after_loading(module)


def read_back(given: list[tuple[str, Tensor]], model: nn.Module) -> tuple[int, list[str]]:
    """Compare the synced tensors with the parameters that vLLM keeps under the same name and shape.

    Rows that vLLM adds to pad the vocabulary are ignored. vLLM keeps GPT-2's matrices transposed; a square matrix may
    therefore equal its transpose.

    Returns:
        The number of tensors compared, and the names of those that differ.
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
    """Free the memory of the KV cache. Returns the size of each layer's storage in bytes, for `allocate_kv_cache`."""
    sizes = []
    for cache in worker.model_runner.kv_caches:
        storage = cache.untyped_storage()
        sizes.append(storage.nbytes())
        storage.resize_(0)
    return sizes


def allocate_kv_cache(worker: Any, sizes: list[int]) -> None:
    """Allocate the KV cache again, with the sizes from `free_kv_cache`; its contents are gone."""
    for cache, size in zip(worker.model_runner.kv_caches, sizes, strict=True):
        if size:  # layers may share one storage; only the first of them has a size
            cache.untyped_storage().resize_(size)


@contextmanager
def restored_process() -> Iterator[None]:
    """Undo the side effects of starting vLLM: environment variables, the thread count, and its lock on that count."""
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
    """Seed of completion `index` of a request. It is a hash of 48 bits, so that no two share a random stream."""
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=6).digest(), "little")


def without_compiler(device: str) -> AbstractContextManager[object]:
    """Switch torch.compile off on a CPU: for one tiny function it takes seconds and needs a C++ compiler."""
    return torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()
