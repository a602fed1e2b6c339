"""Workers for the cluster's tests: small classes that Ray actors can build."""

import os
import signal
import time
from pathlib import Path
from typing import Any


class Worker:
    """A worker that answers, dies, hangs or raises on request."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.value: Any = None

    def whoami(self) -> int:
        return self.number

    def square(self, x: int) -> int:
        return x * x

    def store(self, value: Any) -> Any:
        self.value = value
        return value

    def stored(self) -> Any:
        return self.value

    def die_once(self, marker: str, x: int) -> int:
        """Kill this process at the first call for `marker`; answer at the next."""
        path = Path(marker)
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def fail(self) -> None:
        raise ValueError("as asked")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        """Nothing to close."""


class Slow(Worker):
    """A worker that takes `number` seconds to be built; number 2 cannot be."""

    def __init__(self, number: int) -> None:
        time.sleep(number)
        if number == 2:
            raise ValueError("its model is damaged")
        super().__init__(number)
