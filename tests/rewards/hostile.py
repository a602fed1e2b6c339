"""Reward functions, imported by worker processes, that break the rules, and some that are unusual but allowed."""

import asyncio
import ctypes
import os
import subprocess
import sys
import time
from typing import Any


def fill_memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(1_000_000))


def hang_in_c_code() -> int:
    return len(str(7 ** (9**9)))  # big-integer arithmetic: no signal handler runs until it is over


def hang_with_a_child() -> None:
    subprocess.run(["sleep", "1000"])


DEEDS: dict[str, Any] = {
    "hang": lambda: time.sleep(1000),
    "hang in C": hang_in_c_code,
    "hang with a child": hang_with_a_child,
    "exit": lambda: os._exit(3),
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), 9),
    "memory": fill_memory,
    "huge list": lambda: len([0] * 10**12),
    "exception": lambda: {}["missing"],
    "sys.exit": lambda: sys.exit(1),
    "own time limit": lambda: asyncio.run(asyncio.wait_for(asyncio.sleep(9), 0.01)),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "string": lambda: "1.0",
    "list": lambda: [1.0, 0.0],
    "object": object,
    "empty dict": lambda: {},
    "dict of strings": lambda: {"a": "1"},
    "dict with nan": lambda: {"a": float("nan")},
}


def reward(completion: str) -> float:
    """Run the deed that the completion names; return 1 if it names none."""
    return DEEDS[completion]() if completion in DEEDS else 1.0


async def slow(completion: str) -> float:
    """Asynchronous, and hangs on `await for ever`."""
    await asyncio.sleep(1000 if completion == "await for ever" else 0.001)
    return 0.5


def typed(completion: str) -> Any:
    """Return each type that a reward may return."""
    import numpy as np

    return {
        "int": 2,
        "bool": True,
        "none": None,
        "numpy": np.float32(0.5),
        "numpy bool": np.bool_(True),
        "sum": {"a": 1, "b": 0.5, "c": None},
        "score": {"score": 0.25, "length": 100},
        "nothing applies": {"a": None},
    }[completion]


def columns(completion: str, level: int, missing: str = "default", **everything: Any) -> float:
    """Wants a column, has a default, takes the rest."""
    assert missing == "default" and everything["prompt"] == "q" and everything["topic"] == "sums"
    return float(level)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's form."""
    return float(solution_str == ground_truth and extra_info["level"] == 3)


def with_options(completion: str, factor: float, offset: float = 0.0) -> float:
    return factor + offset


def loaded_torch(completion: str) -> float:
    """Whether the worker process has imported torch."""
    return float("torch" in sys.modules)


def process(completion: str) -> float:
    """The worker's process id, after a while if the completion is a number of seconds."""
    time.sleep(float(completion or 0))
    return float(os.getpid())


LEAK = []


def leaks(completion: str) -> float:
    """Keeps 8 MB for each item."""
    LEAK.append(bytearray(os.urandom(1) * 8_000_000))
    return float(os.getpid())


def large(completion: str, data: str) -> float:
    if completion == "hang":
        time.sleep(1000)
    return float(len(data))


def prints(completion: str) -> float:
    """Output of a reward goes to the log, not into the answers."""
    print("a line on standard output", flush=True)
    return float(len(sys.stdin.read()))
