"""The path of one step through the code stays short: the files that it passes, and its calls in `trainer/`.

A step of GRPO (native engine, everything inline, no reference model), from the loop's call of
`source.next` to its call of `run.record`. Graders work in processes of their own, which are not seen here.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

from tests.trainer.conftest import ROOT, Runs

PACKAGES = ("llmquest_rl", "rollout", "rewards", "trainer")
MODEL = ("llmquest_rl/layers/", "llmquest_rl/models/")
LOOP = f"{ROOT}/trainer/loop.py"
MAX_FILES = 39
"""Files outside `MODEL`."""
MAX_ENTRIES = 46
"""Entries of the tree of calls in `trainer/`."""


@dataclass
class Entry:
    """A function in the tree of calls: all calls that come from the same place are one entry."""

    children: dict[str, Self] = field(default_factory=dict)

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The tree below this entry, one line for each entry."""
        for name, child in self.children.items():
            yield "  " * depth + name
            yield from child.lines(depth + 1)


class Trace:
    """A profile function of `sys.setprofile` that watches one step of the loop, counted from 1."""

    def __init__(self, step: int) -> None:
        self.steps_to_come, self.on = step, False
        self.files: set[str] = set()
        self.tree = Entry()
        self.stack: list[Entry] = []
        self.thread = threading.get_ident()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if frame.f_back is not None and frame.f_back.f_code.co_filename == LOOP:
                self.begin_or_end(frame.f_code.co_name)
            if self.on:
                self.enter(frame.f_code)
        elif event == "return" and self.on and threading.get_ident() == self.thread and self.stack:
            self.stack.pop()

    def begin_or_end(self, called: str) -> None:
        """`called` is a function that the loop calls."""
        if called == "next":
            self.steps_to_come -= 1
            self.on = self.steps_to_come == 0
        elif called == "record":
            self.on = False

    def enter(self, code: CodeType) -> None:
        """Comprehensions and lambdas belong to the function around them; other threads count for files only."""
        path = Path(code.co_filename)
        place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if place.startswith(PACKAGES):
            self.files.add(place)
        if threading.get_ident() != self.thread:
            return
        above = self.stack[-1] if self.stack else self.tree
        if place.startswith("trainer/") and "<" not in code.co_name:
            above = above.children.setdefault(f"{place.removeprefix('trainer/')}: {code.co_qualname}", Entry())
        self.stack.append(above)


def test_a_step_passes_few_files_and_few_calls(runs: Runs) -> None:
    trace = Trace(step=2)
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        runs.train("steps=2", "eval.every=0", "checkpoint.every=0")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    files = sorted(file for file in trace.files if not file.startswith(MODEL))
    entries = list(trace.tree.lines())
    assert not trace.on and any("trainer/sources/" in file for file in files), "the step was seen, to its end"
    assert len(files) <= MAX_FILES, "\n".join([f"a step passes {len(files)} files:", *files])
    assert len(entries) <= MAX_ENTRIES, "\n".join([f"a step has {len(entries)} entries in trainer/:", *entries])
