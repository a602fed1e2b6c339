"""A worker process: it imports the rewards once and then grades the items from its socket, one reward at a time.

It is a fresh interpreter and not started by multiprocessing, which would import the parent's main script again: that is
slow inside a Ray actor, and recurses without end in a script that has no main guard.
"""

import asyncio
import fcntl
import inspect
import os
import pickle
import resource
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from rewards.config import RewardConfig
from rewards.load import InvalidReturnError, LoadedReward, RewardError, load_reward, read_return
from rewards.types import GradeItem

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message to a worker."""

    rewards: list[RewardConfig]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Started:
    """The first message from a worker."""

    required: dict[str, list[str]] = field(default_factory=dict)
    """Required arguments of each reward, by its name."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one reward of one item: either `parts` or a failure."""

    parts: dict[str, float | None] = field(default_factory=dict)
    failure: str | None = None
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A message from a worker: an outcome, and whether the process has grown so much that it should be replaced."""

    task: int
    reward: int
    outcome: Outcome
    should_replace: bool


class Memory:
    """Limits the growth of the process's address space."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        self._hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        self._first = self._sizes()[1]

    def _sizes(self) -> tuple[int, int]:
        """Bytes of address space, and bytes in memory."""
        size, resident, *_ = os.pread(self._statm, 200, 0).split()
        return int(size) * PAGE_BYTES, int(resident) * PAGE_BYTES

    @contextmanager
    def limited(self) -> Iterator[None]:
        """A context in which allocations beyond the limit raise MemoryError."""
        soft = self._sizes()[0] + self._limit
        ceiling = soft if self._hard == resource.RLIM_INFINITY else min(soft, self._hard)
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, self._hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (self._hard, self._hard))

    def has_grown(self) -> bool:
        """Whether the process has grown by more than the limit for one item since it started."""
        return self._sizes()[1] - self._first > self._limit


def run_reward(reward: LoadedReward, item: bytes, memory: Memory, loop: asyncio.AbstractEventLoop) -> Outcome:
    """Run one reward on one pickled item; every error becomes a failure with a kind."""
    started = time.perf_counter()
    parts: dict[str, float | None] = {}
    failure: str | None = None
    detail = ""
    try:
        with memory.limited():
            returned = reward(_unpickle(item))
            if inspect.isawaitable(returned):
                returned = loop.run_until_complete(returned)
        parts = read_return(reward.name, returned)
    except (InvalidReturnError, RewardError) as error:
        failure, detail = "invalid", str(error)
    except MemoryError:
        failure, detail = (
            "memory",
            f"reward `{reward.name}` took more memory for one item than graders.memory_mb allows",
        )
    except TimeoutError as error:
        failure, detail = "timeout", _describe(reward.name, error)
    except BaseException as error:  # also SystemExit, and errors of libraries that derive from BaseException
        failure, detail = "exception", _describe(reward.name, error)
    return Outcome(parts, failure, detail, time.perf_counter() - started)


def _unpickle(item: bytes) -> GradeItem:
    graded = pickle.loads(item)
    assert isinstance(graded, GradeItem)
    return graded


def _describe(name: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"reward `{name}`: {type(error).__name__}: {str(error)[:1000]}{place}"


def end_with_parent(lifeline: int) -> None:
    """Let the kernel end this process group when the parent's end of the lifeline closes, however the parent ends.

    SIGIO ends a process by default, even one that hangs in C code. (PR_SET_PDEATHSIG would fire as soon as the parent's
    *thread* that started this process ends.)
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def serve(connection: Connection) -> None:
    """Load the rewards, report that to the parent, and answer requests until the parent closes the socket."""
    setup: Setup = connection.recv()
    try:
        rewards = [load_reward(config) for config in setup.rewards]
    except RewardError as error:
        connection.send(Started(error=str(error)))
        return
    connection.send(Started({reward.name: sorted(reward.required) for reward in rewards}))
    loop = asyncio.new_event_loop()
    memory = Memory(setup.memory_bytes)
    while True:
        task, indices, item = connection.recv()
        for index in indices:
            outcome = run_reward(rewards[index], item, memory, loop)
            connection.send(Answer(task, index, outcome, outcome.failure == "memory" or memory.has_grown()))


def main(arguments: list[str]) -> None:
    """Start the worker; the arguments are the file descriptors of the socket and of the lifeline."""
    connection_fd, lifeline_fd = map(int, arguments)
    end_with_parent(lifeline_fd)
    try:
        serve(Connection(connection_fd))
    except (EOFError, ConnectionError):
        return  # the parent has closed the socket
