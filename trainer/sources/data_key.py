"""The key of a data set's sequences, by which a cache of what a model computes for them is recognised."""

from collections.abc import Iterable, Sequence

import numpy as np

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.cached_tensors import content_key


def data_key(groups: Iterable[SequenceGroup]) -> str:
    """The key of all tokens and masks, in order. They depend on the rows, the chat template and the tokenizer."""
    parts: list[bytes] = []
    for group in groups:
        parts += [_bytes(ids) for ids in (group.prompt, *group.completions, *(group.mask or ()))]
    return content_key(*parts)


def _bytes(values: Sequence[int]) -> bytes:
    return np.asarray(values, dtype=np.int32).tobytes()
