"""Where members run: in this process, or as Ray actors.

Rollout workers, graders and learners are plain classes. `cluster.spawn` makes a group of one class and returns a
`WorkerGroup`, which alone knows whether a member is an object next door or an actor on another node
(`trainer/cluster/ray_cluster.py`).
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from trainer.config.schema import ClusterConfig


class ClusterError(RuntimeError):
    """A member died for good, did not answer in time, or could not be placed."""


def free_port(address: str) -> int:
    """A port that nobody listens on at the moment.

    Raises:
        ClusterError: there is none, or the address is not this machine's.
    """
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ClusterError(
                f"no free port on {address} for the learners to meet at ({error.strerror}): end processes that hold "
                "many connections, or widen net.ipv4.ip_local_port_range"
            ) from error
        return int(probe.getsockname()[1])


class WorkerGroup(ABC):
    """A group of identical members, numbered from 0."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.restarts = 0
        self.on_restart: Callable[[int], None] | None = None
        """Called with a rebuilt member's number before it gets work again, e.g. to give it the current weights."""

    @abstractmethod
    def wait_ready(self, timeout_s: float) -> None:
        """Return when every member is built."""

    @abstractmethod
    def one(self, member: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call one member and return its answer; a dead member is an error."""

    @abstractmethod
    def all(self, method: str, *args: Any, timeout_s: float, fetch: bool = True) -> list[Any]:
        """Call every member with the same arguments; answers in order (with `fetch=False`, references to them)."""

    @abstractmethod
    def each(self, method: str, items: Sequence[Any], *, timeout_s: float) -> list[Any]:
        """Call member i with `items[i]`; answers in order. For members that work in step, such as learners."""

    @abstractmethod
    def map(self, method: str, items: Sequence[tuple[Any, ...]], *, timeout_s: float) -> list[Any]:
        """Share out independent pieces of work (argument tuples); answers in order. A dead member's work is redone."""

    @abstractmethod
    def close(self) -> None:
        """Close every member and end its process."""


class InlineWorkerGroup(WorkerGroup):
    """Members are objects in this process: for a debugger, a notebook or a test. Time limits do not apply."""

    def __init__(self, name: str, members: list[Any]) -> None:
        super().__init__(name, len(members))
        self.members = members

    def wait_ready(self, timeout_s: float) -> None:
        """Members are built by the time the handle exists."""

    def one(self, member: int, method: str, *args: Any, timeout_s: float) -> Any:
        return getattr(self.members[member], method)(*args)

    def all(self, method: str, *args: Any, timeout_s: float, fetch: bool = True) -> list[Any]:
        return [getattr(member, method)(*args) for member in self.members]

    def each(self, method: str, items: Sequence[Any], *, timeout_s: float) -> list[Any]:
        return [getattr(member, method)(item) for member, item in zip(self.members, items, strict=True)]

    def map(self, method: str, items: Sequence[tuple[Any, ...]], *, timeout_s: float) -> list[Any]:
        return [getattr(self.members[i % self.size], method)(*args) for i, args in enumerate(items)]

    def close(self) -> None:
        for member in self.members:
            member.close()


@dataclass(frozen=True)
class ResourceRequest:
    """One group that the cluster must hold."""

    name: str
    count: int
    cpus: float
    gpus: float


class Cluster(ABC):
    """Places groups of members."""

    @abstractmethod
    def spawn(
        self,
        cls: type,
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup:
        """Build the members of the group `name`, member i from `cls(**kwargs(i))`. Returns before they are ready.

        Args:
            max_restarts: how many deaths in the group are made good before one ends the run.
            collective: members join a process group: each is also given `master_address` and `master_port`.
        """

    @abstractmethod
    def close(self) -> None:
        """End what this run started."""


class InlineCluster(Cluster):
    """Everything in this process."""

    def __init__(self, config: ClusterConfig, needs: list[ResourceRequest], log_dir: Path) -> None:
        self.counts = {need.name: need.count for need in needs}

    def spawn(
        self,
        cls: type,
        name: str,
        kwargs: Callable[[int], dict[str, Any]],
        max_restarts: int = 0,
        collective: bool = False,
    ) -> WorkerGroup:
        return InlineWorkerGroup(name, [cls(**kwargs(i)) for i in range(self.counts[name])])

    def close(self) -> None:
        """Nothing was started."""


CLUSTERS = {"inline": "trainer.cluster.worker_group:InlineCluster", "ray": "trainer.cluster.ray_cluster:RayCluster"}


def open_cluster(config: ClusterConfig, needs: list[ResourceRequest], log_dir: Path) -> Cluster:
    """The cluster that `config.kind` names, large enough for `needs`. Ray is imported only where it is used.

    Raises:
        ClusterError: the cluster is too small; the message says what is missing.
    """
    module, name = CLUSTERS[config.kind].split(":")
    return cast(Cluster, getattr(import_module(module), name)(config, needs, log_dir))
