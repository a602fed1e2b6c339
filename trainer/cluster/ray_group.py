"""A group of Ray actors: order, time limits that name who did not answer, and restarts of those that died."""

import contextlib
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from trainer.cluster.worker_group import ClusterError, WorkerGroup, free_port

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How often one piece of work is redone on a fresh member before the run stops: it is then the work that kills."""

GRACE_S = 5.0
"""How long a failure waits for news of a death: members in step fail when one dies, often before Ray has noticed."""

CLOSE_S = 30.0
"""How long a member may take to close before it is killed."""

Work = tuple[int, tuple[Any, ...]]
"""The index of a piece of work, and its arguments."""


class MemberDiedError(ClusterError):
    """The process of one member ended."""


class Host:
    """What Ray runs: builds the member inside the actor's process, its output in a log file of its own."""

    def __init__(self, log_file: str) -> None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        stream = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.close(stream)
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
        self.member: Any = None

    def rendezvous(self) -> dict[str, Any]:
        """Where the members of a group that works in step can meet: this process's node and a free port of it."""
        address = ray.util.get_node_ip_address()
        return {"master_address": address, "master_port": free_port(address)}

    def build(self, cls: type, kwargs: dict[str, Any]) -> int:
        self.member = cls(**kwargs)
        return os.getpid()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.member, method)(*args)

    def hold(self, method: str, *args: Any) -> tuple[None, Any]:
        """As `call`, in two answers: the first comes with the second, but weighs nothing."""
        return None, self.call(method, *args)

    def close(self) -> None:
        if self.member is not None:
            self.member.close()


class RayWorkerGroup(WorkerGroup):
    """Members are Ray actors inside a placement group."""

    def __init__(
        self,
        name: str,
        size: int,
        start: Callable[[int], ActorHandle],
        build: Callable[[ActorHandle, int], Any],
        max_restarts: int,
        log_dir: Path,
    ) -> None:
        """`start` makes the process of a member, `build` makes the member in it and returns a reference to wait for."""
        super().__init__(name, size)
        self.start = start
        self.build = build
        self.max_restarts = max_restarts
        self.log_dir = log_dir
        self.start_timeout_s = 0.0
        self.silent: set[int] = set()
        self.actors = [start(i) for i in range(size)]
        self.built = [build(actor, i) for i, actor in enumerate(self.actors)]

    def wait_ready(self, timeout_s: float) -> None:
        self.start_timeout_s = timeout_s
        self._gather(self.built, range(self.size), "start", timeout_s)

    def one(self, member: int, method: str, *args: Any, timeout_s: float) -> Any:
        return self._gather([self.actors[member].call.remote(method, *args)], [member], method, timeout_s)[0]

    def all(self, method: str, *args: Any, timeout_s: float, fetch: bool = True) -> list[Any]:
        if not fetch:
            pairs = [actor.hold.options(num_returns=2).remote(method, *args) for actor in self.actors]
            self._gather([made for made, _ in pairs], range(self.size), method, timeout_s)
            return [answer for _, answer in pairs]
        if self.max_restarts:
            return self._work(method, [deque([(i, args)]) for i in range(self.size)], timeout_s)
        refs = [actor.call.remote(method, *args) for actor in self.actors]
        return self._gather(refs, range(self.size), method, timeout_s)

    def each(self, method: str, items: Sequence[Any], *, timeout_s: float) -> list[Any]:
        refs = [actor.call.remote(method, item) for actor, item in zip(self.actors, items, strict=True)]
        return self._gather(refs, range(self.size), method, timeout_s)

    def map(self, method: str, items: Sequence[tuple[Any, ...]], *, timeout_s: float) -> list[Any]:
        return self._work(method, [deque(enumerate(items))] * self.size, timeout_s)

    def close(self) -> None:
        refs = {actor.close.remote(): i for i, actor in enumerate(self.actors) if i not in self.silent}
        done, late = ray.wait(list(refs), num_returns=len(refs), timeout=CLOSE_S) if refs else ([], [])
        for ref in done:
            with contextlib.suppress(RayActorError):  # already dead: nothing left to close
                self._report_failed_close(refs[ref], ref)
        if late:
            log.warning("%d of %d %s did not close within %g s: killed", len(late), self.size, self.name, CLOSE_S)
        for actor in self.actors:
            ray.kill(actor)

    def _report_failed_close(self, member: int, ref: Any) -> None:
        """A run that ends with an error must end with that one, not with one of its clearing up."""
        try:
            ray.get(ref)
        except RayTaskError as error:
            log.warning("%s-%d failed to close: %s", self.name, member, error)

    def _gather(self, refs: list[Any], members: Sequence[int], method: str, timeout_s: float) -> list[Any]:
        """Answers in order; the first failure raises, since members in step would wait for the failed one."""
        pending = dict(zip(refs, members, strict=True))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not done:
                raise self._late(method, pending.values(), timeout_s)
            member = pending.pop(done[0])
            try:
                answers[member] = self._get(member, method, done[0])
            except MemberDiedError:
                raise
            except Exception as error:
                if death := self._death(pending, method):
                    raise death from error
                raise
        return [answers[member] for member in members]

    def _death(self, pending: dict[Any, int], method: str) -> MemberDiedError | None:
        """The death of another member, if there was one: it explains a failure, and not the other way round."""
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_S) if pending else ([], [])
        for ref in done:
            try:
                self._get(pending[ref], method, ref)
            except MemberDiedError as death:
                return death
            except Exception as other:
                log.debug("%s-%d failed too: %s", self.name, pending[ref], other)
        return None

    def _work(self, method: str, queues: list[deque[Work]], timeout_s: float) -> list[Any]:
        """One piece in flight for each member, taken from the member's queue (which members may share)."""
        indices = sorted({index for queue in queues for index, _ in queue})
        answers: dict[int, Any] = {}
        deaths: Counter[int] = Counter()
        running: dict[Any, tuple[int, Work, float]] = {}
        while len(answers) < len(indices):
            busy = {member for member, _, _ in running.values()}
            for member in range(self.size):
                if member not in busy and queues[member]:
                    work = queues[member].popleft()
                    ref = self.actors[member].call.remote(method, *work[1])
                    running[ref] = (member, work, time.monotonic() + timeout_s)
            first = min(deadline for _, _, deadline in running.values())
            done, _ = ray.wait(list(running), num_returns=1, timeout=max(first - time.monotonic(), 0.0))
            if not done:
                late = [member for member, _, deadline in running.values() if deadline < first + 1]
                raise self._late(method, late, timeout_s)
            member, work, _ = running.pop(done[0])
            try:
                answers[work[0]] = self._get(member, method, done[0])
            except MemberDiedError as error:
                deaths[work[0]] += 1
                if deaths[work[0]] >= MAX_ATTEMPTS:
                    raise ClusterError(f"{error} Its work has killed {MAX_ATTEMPTS} members: not redone.") from error
                self._restart(member, error)
                queues[member].appendleft(work)
        return [answers[index] for index in indices]

    def _restart(self, member: int, error: "MemberDiedError") -> None:
        if self.restarts >= self.max_restarts:
            raise ClusterError(f"{error} Not restarted: {self.max_restarts} restarts are the limit.") from error
        self.restarts += 1
        log.warning("%s A new one is started and its work redone (restart %d).", error, self.restarts)
        ray.kill(self.actors[member])  # also one that only seems dead would hold the new one's place
        self.actors[member] = self.start(member)
        self._gather([self.build(self.actors[member], member)], [member], "start", self.start_timeout_s)
        if self.on_restart is not None:
            self.on_restart(member)

    def _get(self, member: int, method: str, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayActorError as error:
            reason = str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
            who = f"{self.name}-{member} died during {method} ({reason})"
            raise MemberDiedError(f"{who}; its log: {self._log(member)}.") from error
        except RayTaskError as error:
            raise error.cause from error

    def _late(self, method: str, members: Iterable[int], timeout_s: float) -> ClusterError:
        members = list(members)
        self.silent |= set(members)
        who = ", ".join(f"{self.name}-{member} (log: {self._log(member)})" for member in sorted(members))
        return ClusterError(f"no answer to {method} within {timeout_s:g} s from {who}.")

    def _log(self, member: int) -> Path:
        return self.log_dir / f"{self.name}-{member}.log"
