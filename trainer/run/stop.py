"""Stops a run on a signal: the first signal ends it after the current step, the second one immediately."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType


class StopSignal:
    """The first Ctrl-C or SIGTERM asks the run to finish its step, save and stop; the second one aborts it.

    Use it as a context manager in the main thread. It does nothing in other threads, which get no signals.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.requested = True
        name = signal.Signals(number).name
        message = f"\n{name}: finishing this step, then saving. A second one aborts without saving.\n"
        # rich could deadlock here, because the handler may interrupt the code that holds the console's lock.
        os.write(2, message.encode())

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """Yield the given steps until a stop is requested."""
        for step in steps:
            if self.requested:
                return
            yield step
