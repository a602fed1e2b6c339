"""One real vLLM for all tests of this folder: it starts once per process, and each test syncs its own weights."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.weight_files import read_tensors, weight_entries
from rollout.engine import EngineSetup, engine_config
from rollout.weights import take_snapshot
from rollout.worker import RolloutWorker

VERSIONS = count(1)
SETUP = EngineSetup(context_tokens=128, max_sequences=32, threads=1)


@pytest.fixture(scope="session")
def model_path() -> Path:
    """SmolLM2-135M-Instruct as a folder."""
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def pretrained(model_path: Path) -> dict[str, Tensor]:
    """Its weights in float32."""
    return {name: tensor.float() for name, tensor in read_tensors(weight_entries(model_path))}


@pytest.fixture(scope="session")
def shared_vllm(model_path: Path) -> Iterator[RolloutWorker]:
    pytest.importorskip("vllm")
    worker = RolloutWorker("vllm", engine_config("vllm")(), model_path, SETUP)
    yield worker
    worker.close()


@pytest.fixture
def vllm_worker(shared_vllm: RolloutWorker, pretrained: dict[str, Tensor]) -> RolloutWorker:
    """vLLM in float32 with the pretrained weights."""
    sync_weights(shared_vllm, pretrained)
    return shared_vllm


class WorkerElsewhere:
    """A rollout worker in another process, because a process has room for one vLLM at a time.

    Importing vLLM takes longer than building a tiny engine, so a process whose worker was closed serves the next one.
    """

    idle: ClassVar[list[ProcessPoolExecutor]] = []

    def __init__(self, name: str, model_path: Path, setup: EngineSetup) -> None:
        self.process = self.idle.pop() if self.idle else ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self.process.submit(_open, name, model_path, setup).result()
        except BaseException:
            self.process.shutdown()
            raise

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self.process.submit(_call, method, *args).result()

    @property
    def engine(self) -> "EngineElsewhere":
        return EngineElsewhere(self)

    def close(self) -> None:
        self.process.submit(_call, "close").result()
        self.idle.append(self.process)


@pytest.fixture(scope="session", autouse=True)
def idle_processes_end() -> Iterator[None]:
    yield
    while WorkerElsewhere.idle:
        WorkerElsewhere.idle.pop().shutdown()


class EngineElsewhere:
    """The engine of that worker."""

    def __init__(self, worker: WorkerElsewhere) -> None:
        self.worker = worker

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self.worker.process.submit(_call, f"engine.{method}", *args).result()


def _open(name: str, model_path: Path, setup: EngineSetup) -> None:
    global _worker
    _worker = RolloutWorker(name, engine_config(name)(), model_path, setup)


def _call(method: str, *args: Any) -> Any:
    return attrgetter(method)(_worker)(*args)


def sync_weights(worker: RolloutWorker, tensors: dict[str, Tensor]) -> int:
    """Give a worker new weights; returns their version."""
    return worker.load_weights(take_snapshot(tensors.items()), next(VERSIONS)).version


def perturbed(tensors: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Every weight changed by about 2 %: still a working model, and visibly another one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=generator)) for name, tensor in tensors.items()
    }


@torch.no_grad()
def reference_logprobs(model_path: Path, tensors: dict[str, Tensor], sequences: list[list[int]]) -> list[list[float]]:
    """Log-probs [sequences][len - 1] by transformers, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, local_files_only=True)
    model.load_state_dict(tensors, strict=False)
    scored = []
    for tokens in sequences:
        logits = model(torch.tensor([tokens])).logits[0, :-1]
        scored.append(logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist())
    return scored
