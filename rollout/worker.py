"""The rollout worker: one engine, and the checks around it. The cluster places it as an actor or calls it inline."""

import time
import warnings
from pathlib import Path

from llmquest_rl.options import Options
from llmquest_rl.types import Completion, Request, Sampling
from rollout.engine import EngineSetup, open_engine
from rollout.weights import SyncReport, WeightSnapshot, verify


class RolloutWorker:
    """Samples completions, and loads new weights only after it has compared them with their checksums."""

    def __init__(self, engine: str, config: Options, model_path: Path, setup: EngineSetup) -> None:
        # Weights in shared memory are read-only on purpose; torch warns each process that receives such arrays.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.engine = open_engine(engine, config, model_path, setup)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: [requests][n]. See `RolloutEngine.generate`."""
        return self.engine.generate(requests, sampling)

    def load_weights(self, snapshot: WeightSnapshot, version: int) -> SyncReport:
        """Check the snapshot and load it. The tensors are only read: they may lie in shared memory.

        Raises:
            WeightsDamagedError: a tensor differs from its checksum.
            ValueError: these are not this model's weights, or the version is not newer; nothing has been changed.
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
        """Give back the memory that only generation needs."""
        self.engine.sleep()

    def wake(self) -> None:
        """Undo `sleep`."""
        self.engine.wake()

    def close(self) -> None:
        """Free everything; the worker is of no use afterwards."""
        self.engine.close()
