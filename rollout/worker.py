"""The rollout worker: one engine, and the checks around it. The cluster places it as an actor or calls it inline."""

import os
import time
import warnings
from pathlib import Path

from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling
from rollout.engine import FACTS, EngineSetup, open_engine
from rollout.weights import SyncReport, WeightSnapshot, verify


class RolloutWorker:
    """Samples completions, and takes new weights only after it has checked that they are what was sent."""

    def __init__(self, engine: str, config: Options, model_path: Path, setup: EngineSetup) -> None:
        # Weights in shared memory are read-only on purpose; torch warns each process that receives such arrays.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        started = time.perf_counter()
        self.engine = open_engine(engine, config, model_path, setup)
        self.start_seconds = time.perf_counter() - started

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: [requests][n]. See `RolloutEngine.generate`."""
        return self.engine.generate(requests, sampling)

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of given tokens: whoever pushed weights can compare them with the learner's own."""
        return self.engine.logprobs(sequences)

    def load_weights(self, published: WeightSnapshot, version: int) -> SyncReport:
        """Check and load what `rollout.weights.publish` made. The tensors are only read: they may lie in shared memory.

        Raises:
            WeightsDamagedError: what arrived is not what was sent.
            ValueError: these are not this model's weights, or the version is not newer; nothing has been changed.
        """
        started = time.perf_counter()
        tensors, _ = published
        fingerprint = verify(published)
        self.engine.load_weights(tensors.items(), version)
        return SyncReport(
            version=self.engine.version,
            num_tensors=len(tensors),
            num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            seconds=time.perf_counter() - started,
            checksum=fingerprint,
        )

    def sleep(self) -> None:
        """Give back the memory that only generation needs."""
        self.engine.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.engine.wake()

    def describe(self) -> FACTS:
        """The engine's facts, and this process's."""
        return {**self.engine.describe(), "start_seconds": round(self.start_seconds, 2), "pid": os.getpid()}

    def close(self) -> None:
        """Free everything; the worker is of no use afterwards."""
        self.engine.close()
