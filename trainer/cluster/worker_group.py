"""Groups of identical workers, and the cluster that places them: in this process, or as Ray actors.

Rollout workers, graders and learners are plain classes. `Cluster.spawn` builds a group of one class and returns a
`WorkerGroup`, which alone knows whether a worker is an object in this process or an actor on another node
(`trainer/cluster/ray_cluster.py`). A call names the method itself, `group.map(RolloutWorker.generate, work, ...)`, so
that type checkers and a search for its callers follow it.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, TypeVarTuple, cast

from trainer.config.cluster_section import ClusterConfig

Worker = TypeVar("Worker", covariant=True)
Arguments = TypeVarTuple("Arguments")
Answer = TypeVar("Answer")


class ClusterError(RuntimeError):
    """A worker died and is not restarted, did not answer in time, or could not be placed."""


def free_port(address: str) -> int:
    """Return a port of this machine that no process listens on at the moment.

    Raises:
        ClusterError: no port is free, or the address does not belong to this machine.
    """
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ClusterError(
                f"no free port on {address} for the rendezvous of the learners ({error.strerror}): end processes that "
                "hold many connections, or widen net.ipv4.ip_local_port_range"
            ) from error
        return int(probe.getsockname()[1])


class WorkerGroup(ABC, Generic[Worker]):
    """Identical workers, numbered from 0. The answers of a call are in the order of the workers or of the work.

    Every call raises ClusterError if a worker dies and is not restarted, or does not answer within `timeout_s` seconds.
    An exception of the worker's method is raised unchanged.
    """

    in_this_process: ClassVar[bool]
    """Whether the workers are objects in this process; otherwise several groups may be called at the same time."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.restarts = 0
        self.on_restart: Callable[[int], None] | None = None
        """Called with the number of a restarted worker before it gets work again, e.g. to load the current weights."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Return when every worker is built. The first call of a method waits for that, too.

        Raises:
            ClusterError: a worker does not start within `cluster.start_timeout_s`.
        """

    @abstractmethod
    def call(
        self, worker: int, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> Answer:
        """Call one worker."""

    @abstractmethod
    def call_all(
        self, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> list[Answer]:
        """Call every worker with the same arguments."""

    @abstractmethod
    def call_deferred(
        self, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> list[Answer]:
        """Like `call_all`, but the answers stay on the workers' nodes: use them only as arguments of other calls."""

    @abstractmethod
    def call_each(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        """Call worker i with the arguments `work[i]`, all at the same time, as collectives need it."""

    @abstractmethod
    def map(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        """Spread independent pieces of work (argument tuples) over the workers; those of a dead worker are repeated."""

    @abstractmethod
    def close(self) -> None:
        """Close every worker and end its process."""


class InlineWorkerGroup(WorkerGroup[Worker]):
    """Workers as objects in this process: for a debugger, a notebook or a test. Time limits do not apply.

    A call looks up the worker's own method of that name, which may override the one that the caller named.
    """

    in_this_process = True

    def __init__(self, name: str, workers: list[Any]) -> None:
        super().__init__(name, len(workers))
        self.workers = workers

    def wait_ready(self) -> None:
        """Return at once: the workers were built before the group."""

    def call(
        self, worker: int, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> Answer:
        return cast(Answer, getattr(self.workers[worker], method.__name__)(*arguments))

    def call_all(
        self, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> list[Answer]:
        return [getattr(worker, method.__name__)(*arguments) for worker in self.workers]

    call_deferred = call_all

    def call_each(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        return [
            getattr(worker, method.__name__)(*arguments) for worker, arguments in zip(self.workers, work, strict=True)
        ]

    def map(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        return [getattr(self.workers[i % self.size], method.__name__)(*arguments) for i, arguments in enumerate(work)]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


@dataclass(frozen=True)
class ResourceRequest:
    """The CPUs and GPUs of one worker group."""

    name: str
    count: int
    """Workers in the group."""
    cpus: float
    """CPU cores of each worker."""
    gpus: float
    """GPUs of each worker; a fraction shares one."""


class Cluster(ABC):
    """Places worker groups."""

    @abstractmethod
    def spawn(
        self,
        cls: type[Worker],
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup[Worker]:
        """Build the workers of the group `name`; returns before they are ready.

        Args:
            cls: the class of the workers.
            name: name of a resource request that the cluster was opened with.
            kwargs: arguments of worker i's constructor, as `kwargs(i)`.
            max_restarts: maximum restarts in the whole group; the next death ends the run.
            collective: whether the workers join a process group; each then also gets `master_address` and
                `master_port`.

        Raises:
            ClusterError: the first worker of a collective group did not start, or has no free port.
        """

    @abstractmethod
    def close(self) -> None:
        """End everything that this run started."""


class InlineCluster(Cluster):
    """A cluster whose workers are objects in this process."""

    def __init__(self, config: ClusterConfig, requests: list[ResourceRequest], log_dir: Path) -> None:
        self.counts = {request.name: request.count for request in requests}

    def spawn(
        self,
        cls: type[Worker],
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup[Worker]:
        return InlineWorkerGroup(name, [cls(**kwargs(i)) for i in range(self.counts[name])])

    def close(self) -> None:
        """Do nothing: no process was started."""
