"""The rollout worker, which runs one engine and verifies new weights. It runs as a Ray actor or inline."""

import time
import warnings
from pathlib import Path

from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling
from rollout.engine import EngineSetup, open_engine
from rollout.weights import SyncReport, WeightSnapshot, verify


class RolloutWorker:
    """Samples completions with one engine. It loads new weights only after their checksums have been verified."""

    def __init__(self, engine: str, config: Options, model_path: Path, setup: EngineSetup) -> None:
        # Weights in shared memory are read-only on purpose, and torch would warn of them in every process.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.engine = open_engine(engine, config, model_path, setup)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Sample `n` completions of each request: `[requests][n]`. See `RolloutEngine.generate`, also for errors."""
        return self.engine.generate(requests, sampling)

    def logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs of given tokens: `[sequences][len - 1]`. See `RolloutEngine.logprobs`."""
        return self.engine.logprobs(sequences)

    def load_weights(self, snapshot: WeightSnapshot, version: int) -> SyncReport:
        """Verify a snapshot and load it. The tensors are only read, because they may be in shared memory.

        Raises:
            WeightsDamagedError: A tensor differs from its checksum.
            ValueError: The tensors are not weights of this model, or the version is not newer. No weight has been
                changed then.
        """
        started = time.perf_counter()
        fingerprint = verify(snapshot)
        self.engine.load_weights(snapshot.tensors.items(), version)
        return SyncReport(
            version=self.engine.version,
            num_tensors=len(snapshot.tensors),
            num_bytes=sum(tensor.nbytes for tensor in snapshot.tensors.values()),
            seconds=time.perf_counter() - started,
            checksum=fingerprint,
        )

    def sleep(self) -> None:
        """Free the memory that only generation needs."""
        self.engine.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.engine.wake()

    def close(self) -> None:
        """Free the engine; the worker cannot be used afterwards."""
        self.engine.close()
