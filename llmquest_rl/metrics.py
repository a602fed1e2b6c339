"""Metrics that can be merged over microbatches, optimizer updates and processes.

A mean is kept as a sum and a count, so that parts of any size merge into the mean of the whole. A name has the form
`area/quantity_unit`; docs/metrics.md lists all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


Kind = Literal["mean", "sum", "max"]
Number: TypeAlias = "float | Tensor"
"""A float, or a tensor with one element. It stays on its device until `to_floats`, because fetching it blocks."""


Derived = tuple[tuple[str, ...], Callable[..., float]]
"""Names of merged metrics, and a function that computes another metric from their values."""


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 if whole is 0."""
    return part / whole if whole else 0.0


DERIVED: dict[str, Derived] = {"learner/tokens_per_s": (("learner/tokens", "time/learner_update_s"), ratio)}
"""Metrics that are computed from merged ones, by name. An objective may derive more."""


@dataclass(slots=True)
class Entry:
    """One mergeable value: `total / count` for a mean, `total` otherwise."""

    kind: Kind
    total: Number
    count: Number = 1.0


def _largest(a: Number, b: Number) -> Number:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


class Metrics:
    """Mergeable values by name. A name must always have the same kind."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def mean(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add `count` observations with the sum `total`. A mean without observations is left out of `to_floats`."""
        self._add(name, Entry("mean", total, count))

    def sum(self, name: str, value: Number) -> None:
        """Add to a total."""
        self._add(name, Entry("sum", value))

    def max(self, name: str, value: Number) -> None:
        """Keep the largest value."""
        self._add(name, Entry("max", value))

    def _add(self, name: str, new: Entry) -> None:
        old = self.entries.get(name)
        if old is None:
            self.entries[name] = Entry(new.kind, new.total, new.count)
            return
        assert old.kind == new.kind, f"{name} is a {old.kind} and a {new.kind}"
        if new.kind == "max":
            old.total = _largest(old.total, new.total)
        else:
            old.total, old.count = old.total + new.total, old.count + new.count

    def merge(self, others: Iterable[Metrics]) -> Metrics:
        """Add the entries of other metrics to these, and return these."""
        for other in others:
            for name, entry in other.entries.items():
                self._add(name, entry)
        return self

    def fetched(self) -> Metrics:
        """A copy with plain floats, ready to be sent to another process. It takes one transfer from the device."""
        numbers = [number for entry in self.entries.values() for number in (entry.total, entry.count)]
        tensors = [number.detach().double().reshape(()) for number in numbers if isinstance(number, torch.Tensor)]
        values = iter(torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else [])
        floats = iter([next(values) if isinstance(number, torch.Tensor) else float(number) for number in numbers])
        plain = Metrics()
        plain.entries = {name: Entry(entry.kind, next(floats), next(floats)) for name, entry in self.entries.items()}
        return plain

    def to_floats(self, derived: Mapping[str, Derived] = MappingProxyType({})) -> dict[str, float]:
        """The values for a line of the log, by name.

        Args:
            derived: further metrics that are computed from merged ones, by name, in addition to `DERIVED`.
        """
        plain = self.fetched().entries.items()
        floats = {
            name: float(entry.total / entry.count) if entry.kind == "mean" else float(entry.total)
            for name, entry in plain
            if entry.kind != "mean" or entry.count
        }
        for name, (inputs, function) in {**DERIVED, **derived}.items():
            if all(needed in floats for needed in inputs):
                floats[name] = function(*(floats[needed] for needed in inputs))
        return floats
