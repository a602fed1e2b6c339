"""A pool of worker processes that can be killed. Each works on one task and has a short queue; one more is a spare.

A process pool of the standard library cannot end a task that hangs, and loses all its workers when one dies. Here each
worker has its own socket and answers in order. So if a worker is silent for too long, or gone, its current task is
known: that task fails, the rest of its queue goes to other workers, and the spare replaces the worker at once.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from rewards.config import GraderConfig, RewardConfig
from rewards.load import RewardError
from rewards.worker import MIB, Answer, Outcome, Setup, Started

QUEUE_SECONDS = 0.02
"""Work queued at one worker, in seconds: enough to hide the round trip, but little behind a slow item."""
MAX_QUEUE = 16
MAX_QUEUE_BYTES = 64 * 1024
"""Maximum bytes queued at one worker: below the capacity of a socket, so that sending never blocks on a hung worker."""
MAX_FAILED_STARTS = 3


@dataclass(slots=True)
class Task:
    """One item, and the indices of the rewards that have not graded it yet."""

    id: int
    rewards: list[int]
    item: bytes


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, setup: bytes) -> None:
        ours, theirs = socket.socketpair()
        self._lifeline, their_lifeline = socket.socketpair()
        with theirs, their_lifeline:
            self._process = subprocess.Popen(
                # -P: files in the current folder must not hide modules
                [sys.executable, "-P", "-c", "import sys; from rewards.worker import main; main(sys.argv[1:])"]
                + [str(theirs.fileno()), str(their_lifeline.fileno())],
                pass_fds=[theirs.fileno(), their_lifeline.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # a process group, so that children of a reward are killed with it
            )
        self.connection = Connection(ours.detach())
        self.queue: deque[Task] = deque()
        self.started: Started | None = None
        self.since = time.monotonic()
        """Start time of the task at the head of the queue, or of the process while it starts."""
        self.connection.send_bytes(setup)

    def can_take(self, task: Task, depth: int) -> bool:
        """Whether the task can be sent without blocking: the worker is idle, or its socket has room."""
        if self.started is None:
            return False
        queued = sum(len(queued.item) for queued in self.queue) + len(task.item)
        return not self.queue or (len(self.queue) < depth and queued <= MAX_QUEUE_BYTES)

    def send(self, task: Task) -> bool:
        """Queue a task; False if the process is gone, which is handled when its answers are read."""
        try:
            self.connection.send((task.id, task.rewards, task.item))
        except ConnectionError:
            return False
        if not self.queue:
            self.since = time.monotonic()
        self.queue.append(task)
        return True

    def kill(self) -> str:
        """End the process and its children, unless they have ended, and return how the process ended."""
        if not self.connection.closed:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self.connection.close()
            self._lifeline.close()
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def has_ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None


def _environment() -> dict[str, str]:
    """The parent's environment with its import path. Numeric libraries get one thread, as there are many workers."""
    defaults = {
        "OMP_NUM_THREADS": "1",
        # The memory limit counts address space, of which each arena reserves 64 MiB.
        "MALLOC_ARENA_MAX": "2",
    }
    return {**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


class Pool:
    """Runs tasks on worker processes."""

    def __init__(self, rewards: list[RewardConfig], config: GraderConfig, processes: int, spares: int = 1) -> None:
        """Start the processes and wait until one has loaded the rewards.

        Raises:
            RewardError: the rewards cannot be loaded.
        """
        self._config = config
        self._names = [reward.name for reward in rewards]
        self._setup = pickle.dumps(Setup(rewards, config.memory_mb * MIB))
        self._processes = processes
        self._size = processes + spares
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._seconds = QUEUE_SECONDS
        """Moving average of the seconds per task. With the initial value only one task is sent at a time."""
        self.required: dict[str, list[str]] = {}
        """Required arguments of each reward, by its name."""
        self.replaced = 0
        """Number of workers that were replaced so far."""
        try:
            self._fill()
            while not self._ready():
                self._receive([], deque())
        except BaseException:
            self.close()
            raise

    def _ready(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.started is not None]

    def _fill(self) -> None:
        while len(self._workers) < self._size:
            self._workers.append(Worker(self._setup))

    def run(self, tasks: list[Task]) -> Iterator[tuple[int, int, Outcome]]:
        """Yield `(task id, reward index, outcome)` for every reward of every task, in the order in which they end.

        Raises:
            RewardError: worker processes repeatedly end or hang while they start.
        """
        pending = deque(tasks)
        answers: list[tuple[int, int, Outcome]] = []
        self._fill()
        while pending or any(worker.queue for worker in self._workers):
            self._feed(pending)
            self._receive(answers, pending)
            yield from answers
            answers.clear()

    def _feed(self, pending: deque[Task]) -> None:
        depth = max(1, min(MAX_QUEUE, int(QUEUE_SECONDS / self._seconds)))
        for worker in self._ready():
            if not worker.queue and sum(bool(other.queue) for other in self._workers) >= self._processes:
                continue  # this one is the spare
            while pending and worker.can_take(pending[0], depth) and worker.send(pending[0]):
                pending.popleft()

    def _receive(self, answers: list[tuple[int, int, Outcome]], pending: deque[Task]) -> None:
        """Wait for events: answers, started or ended workers, and time limits that have passed."""
        workers = {worker.connection: worker for worker in self._workers}
        limits = [worker.since + self._limit(worker) for worker in self._workers if self._is_timed(worker)]
        # No worker is timed if a task could not be sent because an idle worker has ended: its end is read at once.
        for connection in wait(list(workers), timeout=max(0.0, min(limits, default=0.0) - time.monotonic())):
            assert isinstance(connection, Connection)
            self._read(workers[connection], answers, pending)
        for worker in list(self._workers):
            if self._is_timed(worker) and time.monotonic() - worker.since > self._limit(worker):
                self._on_silence(worker, answers, pending)
        self._fill()

    @staticmethod
    def _is_timed(worker: Worker) -> bool:
        return worker.started is None or bool(worker.queue)

    def _limit(self, worker: Worker) -> float:
        return self._config.start_timeout_s if worker.started is None else self._config.timeout_s

    def _read(self, worker: Worker, answers: list[tuple[int, int, Outcome]], pending: deque[Task]) -> None:
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if isinstance(message, Started):
                    self._on_start(worker, message)
                elif self._on_answer(worker, message, answers):
                    self._replace(worker, pending)
                    return
        except (EOFError, ConnectionError):
            self._on_end(worker, answers, pending)

    def _on_start(self, worker: Worker, message: Started) -> None:
        if message.error is not None:
            raise RewardError(message.error)
        worker.started = message
        self.required = message.required
        self._failed_starts = 0

    def _on_answer(self, worker: Worker, message: Answer, answers: list[tuple[int, int, Outcome]]) -> bool:
        """Store an answer, and return whether the worker should be replaced."""
        task = worker.queue[0]
        assert task.id == message.task and task.rewards[0] == message.reward, "a worker answers in order"
        answers.append((task.id, message.reward, message.outcome))
        task.rewards = task.rewards[1:]
        if not task.rewards:
            worker.queue.popleft()
        worker.since = time.monotonic()
        self._seconds = 0.9 * self._seconds + 0.1 * message.outcome.seconds
        return message.should_replace

    def _on_silence(self, worker: Worker, answers: list[tuple[int, int, Outcome]], pending: deque[Task]) -> None:
        if worker.started is not None and worker.has_ended():  # a child of the reward holds the socket open
            self._on_end(worker, answers, pending)
        elif worker.started is None:
            limit = self._config.start_timeout_s
            self._on_failed_start(worker, f"importing the rewards took more than {limit:g} s (graders.start_timeout_s)")
        else:
            self._fail(worker, answers, "timeout", f"took more than {self._config.timeout_s:g} s (graders.timeout_s)")
            self._replace(worker, pending)

    def _on_end(self, worker: Worker, answers: list[tuple[int, int, Outcome]], pending: deque[Task]) -> None:
        how = worker.kill()
        if worker.started is None:
            self._on_failed_start(
                worker, f"the process ended while it imported the rewards ({how}); see its output above"
            )
            return
        if worker.queue:
            self._fail(worker, answers, "crash", f"ended its process ({how})")
        self._replace(worker, pending)

    def _on_failed_start(self, worker: Worker, reason: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS or not self._ready():
            raise RewardError(f"rewards {', '.join(self._names)}: {reason}")
        self._replace(worker, deque())

    def _fail(self, worker: Worker, answers: list[tuple[int, int, Outcome]], failure: str, event: str) -> None:
        """Store a failure for the current reward of the worker's current task."""
        task = worker.queue[0]
        reward = task.rewards[0]
        detail = f"reward `{self._names[reward]}` {event}"
        answers.append((task.id, reward, Outcome({}, failure, detail, time.monotonic() - worker.since)))
        task.rewards = task.rewards[1:]
        if not task.rewards:
            worker.queue.popleft()

    def _replace(self, worker: Worker, pending: deque[Task]) -> None:
        """End a worker, give its queue to the others, and start a new worker in the background."""
        worker.kill()
        self._workers.remove(worker)
        pending.extendleft(reversed(worker.queue))
        self.replaced += 1
        self._fill()

    def close(self) -> None:
        """Kill every worker process."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
