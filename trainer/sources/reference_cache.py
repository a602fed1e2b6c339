"""The reference model's log-probs of a data set: computed once, before the first step, and kept in a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from llmquest_rl.batch import LazyGroups, SequenceGroup
from llmquest_rl.cached_tensors import load_tensors, save_tensors
from llmquest_rl.data.stream import SequenceGroupStream
from llmquest_rl.deferred import torch
from trainer.learner.group import LearnerGroup
from trainer.sources.data_key import data_key

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

GROUPS_PER_CALL = 256
"""Groups of each learner in one call; a call has the time limit of an update."""


@dataclass(frozen=True, slots=True)
class WithReference(LazyGroups):
    """Groups with the token field `ref_logprobs`."""

    groups: Sequence[SequenceGroup]
    logprobs: Sequence[Tensor]
    """The log-probs of each group's targets, `[targets]`."""

    def __len__(self) -> int:
        return len(self.groups)

    def at(self, index: int) -> SequenceGroup:
        """See `LazyGroups.at`."""
        return self.groups[index].with_target_values("ref_logprobs", self.logprobs[index].tolist())


def with_reference(
    stream: SequenceGroupStream, seed: int, learners: LearnerGroup, path: Path, made_from: Mapping[str, str]
) -> SequenceGroupStream:
    """A stream of the same data whose groups have the field `ref_logprobs`.

    Args:
        stream: the stream of the data set, at its beginning.
        seed: the stream's seed.
        learners: the learners, which still have the initial weights: those of the reference.
        path: the file; it is made if it is missing.
        made_from: key of the model and of the chat template, by name.

    Raises:
        ValueError: the file was made from another model, chat template or data set, or is damaged.
    """
    data = stream.data
    sides = {"train": data.train, "validation": data.validation}
    keys = {**made_from, "data set": data_key(chain(data.train, data.validation))}
    found = load_tensors(path, keys)
    if found is None:
        log.info("%s is made: the reference's log-probs of %d groups", path, sum(map(len, sides.values())))
        found = {name: _logprobs(groups, learners) for name, groups in sides.items()}
        save_tensors(path, found, keys)
    else:
        log.info("the reference's log-probs are those of %s", path)
    train, validation = (_by_group(found[name], groups) for name, groups in sides.items())
    return SequenceGroupStream(replace(data, train=train, validation=validation), seed)


def _logprobs(groups: Sequence[SequenceGroup], learners: LearnerGroup) -> Tensor:
    """The log-probs of the targets of all groups, `[targets]`."""
    size = GROUPS_PER_CALL * learners.group.size
    parts = [learners.logprobs(groups[start : start + size]) for start in range(0, len(groups), size)]
    return torch.cat([values for part in parts for values in part])


def _by_group(values: Tensor, groups: Sequence[SequenceGroup]) -> WithReference:
    sizes = [sum(map(sum, group.targets)) for group in groups]
    return WithReference(groups, values.split(sizes))
