"""A teacher's most likely tokens at every target of a data set: computed once by the learners, kept in a file."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
from torch import Tensor

from llmquest_rl.batch import LazyGroups, SequenceGroup
from llmquest_rl.cached_tensors import load_tensors, save_tensors
from llmquest_rl.data.stream import SequenceGroupStream
from llmquest_rl.objectives import Teacher
from llmquest_rl.soft_targets import TopTokens, joined
from trainer.learner.group import LearnerGroup
from trainer.sources.data_key import data_key

log = logging.getLogger(__name__)


def with_teacher_cache(
    stream: SequenceGroupStream, seed: int, teacher: Teacher, made_by: dict[str, str], learners: LearnerGroup
) -> SequenceGroupStream:
    """The stream with the teacher's most likely tokens; if the file is missing, the learners make it now.

    Args:
        stream: the sequences of the run's data set.
        seed: the seed of the stream's order.
        teacher: has a `cache`.
        made_by: key of each thing that decides what the teacher computes, by a name for error messages.
        learners: hold no model but the student before and after this call.

    Raises:
        ValueError: the file was made by another teacher, with another `top_k` or from other data, or is damaged.
    """
    assert teacher.cache is not None, "only a teacher with a cache comes here"
    data = stream.data
    sides: tuple[Sequence[SequenceGroup], Sequence[SequenceGroup]] = (data.train, data.validation)
    keys = {**made_by, "data set": data_key(chain(*sides)), "top_k": str(teacher.top_k)}
    found = load_tensors(teacher.cache, keys) or _make(teacher.cache, keys, sides, learners)
    counts = [sum(map(len, group.completions)) for side in sides for group in side]
    starts = list(accumulate(counts, initial=0))
    train = Labelled(data.train, found, starts)
    validation = Labelled(data.validation, found, starts[len(data.train) :])
    return SequenceGroupStream(replace(data, train=train, validation=validation), seed)


@dataclass(frozen=True, slots=True)
class Labelled(LazyGroups):
    """Sequence groups with a teacher's most likely tokens."""

    groups: Sequence[SequenceGroup]
    tensors: dict[str, Tensor]
    """`ids` and `logprobs` of all tokens of all completions `[tokens, k]`."""
    starts: Sequence[int]
    """First row of each group."""

    def __len__(self) -> int:
        return len(self.groups)

    def at(self, index: int) -> SequenceGroup:
        """See `LazyGroups.at`."""
        group = self.groups[index]
        ends = list(accumulate(map(len, group.completions), initial=self.starts[index]))
        ids, logprobs = self.tensors["ids"], self.tensors["logprobs"]
        # Copies: a view would be sent to another process with the whole file.
        tokens = [TopTokens(ids[a:b].long(), logprobs[a:b].clone()) for a, b in pairwise(ends)]
        return replace(group, top_tokens=tokens)


def _make(
    path: Path, keys: dict[str, str], sides: Sequence[Sequence[SequenceGroup]], learners: LearnerGroup
) -> dict[str, Tensor]:
    groups = [group for side in sides for group in side]
    log.info("the teacher scores %d sequences once, for %s", len(groups), path)
    found = joined([tokens for row in learners.top_tokens(groups) for tokens in row])
    tensors = {"ids": found.ids.to(torch.int32), "logprobs": found.logprobs}
    save_tensors(path, tensors, keys)
    return tensors
