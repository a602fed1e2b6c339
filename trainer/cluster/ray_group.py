"""A group of Ray actors: answers in order, time limits whose errors name the worker, and restarts of dead workers."""

import contextlib
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from trainer.cluster.worker_group import Answer, Arguments, ClusterError, Worker, WorkerGroup, free_port

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Attempts at one piece of work before the run stops: work that kills this many workers is itself the cause."""

GRACE_S = 5.0
"""Seconds that a failure waits for news of a death: when one worker of a collective dies, the others fail too, often
before Ray has noticed the death."""

CLOSE_S = 30.0
"""Seconds that a worker may take to close before it is killed."""

Work = tuple[int, tuple[Any, ...]]
"""The index of a piece of work, and its arguments."""


class WorkerDiedError(ClusterError):
    """The process of one worker ended."""


class Host:
    """The actor: builds the worker inside its own process and redirects the output to the worker's log file."""

    def __init__(self, log_file: str) -> None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        stream = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.close(stream)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
        self.worker: Any = None

    def rendezvous(self) -> dict[str, Any]:
        """The address at which the workers of a collective meet: this process's node and one of its free ports."""
        address = ray.util.get_node_ip_address()
        return {"master_address": address, "master_port": free_port(address)}

    def build(self, cls: type, kwargs: dict[str, Any]) -> int:
        self.worker = cls(**kwargs)
        return os.getpid()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    def call_deferred(self, method: str, *args: Any) -> tuple[None, Any]:
        """Like `call`, but return two objects: None, to wait for without a transfer, and the answer itself."""
        return None, self.call(method, *args)

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()


class RayWorkerGroup(WorkerGroup[Worker]):
    """Workers are Ray actors inside a placement group."""

    in_this_process = False

    def __init__(
        self,
        name: str,
        size: int,
        start: Callable[[int], ActorHandle],
        build: Callable[[ActorHandle, int], Any],
        max_restarts: int,
        start_timeout_s: float,
        log_dir: Path,
    ) -> None:
        """`start` starts a worker's process; `build` builds the worker in it and returns a reference to wait for."""
        super().__init__(name, size)
        self.start = start
        self.build = build
        self.max_restarts = max_restarts
        self.log_dir = log_dir
        self.start_timeout_s = start_timeout_s
        self.silent: set[int] = set()
        self.actors = [start(i) for i in range(size)]
        self.built = [build(actor, i) for i, actor in enumerate(self.actors)]
        self.is_ready = False

    def wait_ready(self) -> None:
        if not self.is_ready:
            self._gather(self.built, range(self.size), "start", self.start_timeout_s)
            self.is_ready = True

    def call(
        self, worker: int, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> Answer:
        self.wait_ready()
        ref = self.actors[worker].call.remote(method.__name__, *arguments)
        return cast(Answer, self._gather([ref], [worker], method.__name__, timeout_s)[0])

    def call_all(
        self, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> list[Answer]:
        self.wait_ready()
        if self.max_restarts:
            queues: list[deque[Work]] = [deque([(i, arguments)]) for i in range(self.size)]
            return self._work(method.__name__, queues, timeout_s)
        refs = [actor.call.remote(method.__name__, *arguments) for actor in self.actors]
        return self._gather(refs, range(self.size), method.__name__, timeout_s)

    def call_deferred(
        self, method: Callable[[Worker, *Arguments], Answer], *arguments: *Arguments, timeout_s: float
    ) -> list[Answer]:
        self.wait_ready()
        pairs = [
            actor.call_deferred.options(num_returns=2).remote(method.__name__, *arguments) for actor in self.actors
        ]
        self._gather([done for done, _ in pairs], range(self.size), method.__name__, timeout_s)
        return [answer for _, answer in pairs]

    def call_each(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        self.wait_ready()
        refs = [
            actor.call.remote(method.__name__, *arguments) for actor, arguments in zip(self.actors, work, strict=True)
        ]
        return self._gather(refs, range(self.size), method.__name__, timeout_s)

    def map(
        self, method: Callable[[Worker, *Arguments], Answer], work: Sequence[tuple[*Arguments]], *, timeout_s: float
    ) -> list[Answer]:
        self.wait_ready()
        queue: deque[Work] = deque(enumerate(work))
        return self._work(method.__name__, [queue] * self.size, timeout_s)

    def close(self) -> None:
        refs = {actor.close.remote(): i for i, actor in enumerate(self.actors) if i not in self.silent}
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=CLOSE_S) if refs else ([], [])
        for ref in done:
            with contextlib.suppress(RayActorError):  # already dead: nothing left to close
                self._report_failed_close(refs[ref], ref)
        if late:
            log.warning(
                "%s: %d of %d workers did not close within %g s and were killed",
                self.name,
                len(late),
                self.size,
                CLOSE_S,
            )
        for actor in self.actors:
            ray.kill(actor)

    def _report_failed_close(self, worker: int, ref: Any) -> None:
        """Log the failure: a run that ends with an error must report that error, not one of the clean-up."""
        try:
            ray.get(ref)
        except RayTaskError as error:
            log.warning("%s-%d failed to close: %s", self.name, worker, error)

    def _gather(self, refs: list[Any], workers: Sequence[int], method: str, timeout_s: float) -> list[Any]:
        """Answers in order. The first failure is raised at once: other workers of a collective would wait for ever."""
        pending = dict(zip(refs, workers, strict=True))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not done:
                raise self._late(method, pending.values(), timeout_s)
            worker = pending.pop(done[0])
            try:
                answers[worker] = self._get(worker, method, done[0])
            except WorkerDiedError:
                raise
            except Exception as error:
                if death := self._death(pending, method):
                    raise death from error
                raise
        return [answers[worker] for worker in workers]

    def _death(self, pending: dict[Any, int], method: str) -> WorkerDiedError | None:
        """The death of another worker, if there was one: a death explains a failure, and not the other way round."""
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_S) if pending else ([], [])
        for ref in done:
            try:
                self._get(pending[ref], method, ref)
            except WorkerDiedError as death:
                return death
            except Exception as other:
                log.debug("%s-%d failed too: %s", self.name, pending[ref], other)
        return None

    def _work(self, method: str, queues: list[deque[Work]], timeout_s: float) -> list[Any]:
        """Run one piece of work at a time on each worker, from the worker's queue; workers may share a queue."""
        indices = sorted({index for queue in queues for index, _ in queue})
        answers: dict[int, Any] = {}
        deaths: Counter[int] = Counter()
        running: dict[Any, tuple[int, Work, float]] = {}
        while len(answers) < len(indices):
            busy = {worker for worker, _, _ in running.values()}
            for worker in range(self.size):
                if worker not in busy and queues[worker]:
                    work = queues[worker].popleft()
                    ref = self.actors[worker].call.remote(method, *work[1])
                    running[ref] = (worker, work, time.monotonic() + timeout_s)
            first = min(deadline for _, _, deadline in running.values())
            done, _ = ray.wait(list(running), num_returns=1, timeout=max(first - time.monotonic(), 0.0))
            if not done:
                late = [worker for worker, _, deadline in running.values() if deadline < first + 1]
                raise self._late(method, late, timeout_s)
            worker, work, _ = running.pop(done[0])
            try:
                answers[work[0]] = self._get(worker, method, done[0])
            except WorkerDiedError as error:
                deaths[work[0]] += 1
                if deaths[work[0]] >= MAX_ATTEMPTS:
                    raise ClusterError(
                        f"{error} This work has killed {MAX_ATTEMPTS} workers and is not repeated."
                    ) from error
                self._restart(worker, error)
                queues[worker].appendleft(work)
        return [answers[index] for index in indices]

    def _restart(self, worker: int, error: "WorkerDiedError") -> None:
        if self.restarts >= self.max_restarts:
            raise ClusterError(f"{error} It is not restarted: {self.max_restarts} restarts are the limit.") from error
        self.restarts += 1
        log.warning("%s It is restarted and its work is repeated (restart %d).", error, self.restarts)
        ray.kill(self.actors[worker])  # an actor that only seems dead would keep the resources of the new one
        self.actors[worker] = self.start(worker)
        self._gather([self.build(self.actors[worker], worker)], [worker], "start", self.start_timeout_s)
        if self.on_restart is not None:
            self.on_restart(worker)

    def _get(self, worker: int, method: str, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayActorError as error:
            reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
            who = f"{self.name}-{worker} died during {method} ({reason})"
            raise WorkerDiedError(f"{who}; its log: {self._log(worker)}.") from error
        except RayTaskError as error:
            raise error.cause from error

    def _late(self, method: str, workers: Iterable[int], timeout_s: float) -> ClusterError:
        workers = list(workers)
        self.silent |= set(workers)
        who = ", ".join(f"{self.name}-{worker} (log: {self._log(worker)})" for worker in sorted(workers))
        return ClusterError(
            f"no answer to {method} within {timeout_s:g} s from {who}. If the work is only slow, raise timeout_s (or "
            "start_timeout_s) in the section of these workers."
        )

    def _log(self, worker: int) -> Path:
        return self.log_dir / f"{self.name}-{worker}.log"
