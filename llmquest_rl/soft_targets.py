"""Next-token distributions that a teacher gives the targets of a batch: over all tokens, or the k most likely ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """Distributions over all tokens, as the factors of their logits: a `[targets, vocab]` tensor is never made."""

    states: Tensor
    """The teacher's final hidden states at the sources of the targets `[targets, size]`."""
    weight: Tensor
    """Its output layer `[vocab, size]`."""
    softcap: float | None = None
    """Its soft cap of logits; None = none."""

    def rows(self, rows: slice) -> TeacherHead:
        """The distributions of some targets."""
        return replace(self, states=self.states[rows])

    def to(self, device: torch.device | str) -> TeacherHead:
        """A copy on `device`."""
        return replace(self, states=self.states.to(device), weight=self.weight.to(device))


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The k most likely tokens of each distribution."""

    ids: Tensor
    """Token ids, int64 `[targets, k]`."""
    logprobs: Tensor
    """Their log-probs among all tokens, float32 `[targets, k]`."""

    def rows(self, rows: slice | list[int]) -> TopTokens:
        """Those of some targets."""
        return TopTokens(self.ids[rows], self.logprobs[rows])

    def to(self, device: torch.device | str) -> TopTokens:
        """A copy on `device`."""
        return TopTokens(self.ids.to(device), self.logprobs.to(device))

    def after(self, count: int) -> TopTokens:
        """These behind `count` rows that stand for tokens without a distribution."""
        return joined([self.blank(count), self])

    def blank(self, count: int) -> TopTokens:
        """`count` rows of the same width, for tokens of weight 0."""
        ids, logprobs = (values.new_zeros(count, values.shape[1]) for values in (self.ids, self.logprobs))
        return TopTokens(ids, logprobs)


SoftTargets: TypeAlias = TeacherHead | TopTokens


def joined(parts: Sequence[TopTokens]) -> TopTokens:
    """The rows of all parts, in order."""
    return TopTokens(torch.cat([part.ids for part in parts]), torch.cat([part.logprobs for part in parts]))


def joined_or_blank(parts: Sequence[TopTokens | int]) -> TopTokens | None:
    """The rows of all parts, with blank rows for a part that is a number of targets; None if all parts are."""
    given = next((part for part in parts if isinstance(part, TopTokens)), None)
    if given is None:
        return None
    return joined([given.blank(part) if isinstance(part, int) else part for part in parts])
