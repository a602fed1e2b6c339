"""Stopping a run on a signal: the first one ends it after the current step, the second one at once."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to finish the step, save and stop; the second one aborts.

    Used as a context manager in the main thread (elsewhere signals cannot be caught, and nothing changes).
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
        message = f"\n{name}: finishing this step, then saving. Once more aborts without saving.\n"
        # Not through rich: a handler may interrupt the very code that holds the console's lock.
        os.write(2, message.encode())

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """The given steps, until a stop is requested."""
        for step in steps:
            if self.requested:
                return
            yield step
