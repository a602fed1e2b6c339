"""Inputs and targets of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2) for packed batches.

The model itself predicts token i + 1 from token i. Module k = 1, 2, ... predicts token i + k + 1 from the state of
module k - 1 at i and the embedding of token i + k. So it covers the first n - k of n tokens.

A prompt that several completions share has a different next token in each. So every completion gets a copy of its
prompt here, although the model computes the prompt once. The targets are those of the batch, each predicted from k
tokens earlier. A target with too few tokens before it has no prediction.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout, TokenBatch


class MTPDepth(NamedTuple):
    """The inputs and targets of one prediction module."""

    layout: Layout
    """One segment per completion with a target."""
    rows: Tensor
    """Rows of the input states among the states of the previous module (of the model, for k = 1), long `[tokens]`."""
    tokens: Tensor
    """Ids of the tokens k ahead of `rows`, whose embeddings are the other input, long `[tokens]`."""
    positions: Tensor
    """Position ids of `rows`, long `[tokens]`."""
    sources: Tensor
    """Row of the module's output state that predicts each target, long `[targets]`."""
    targets: Tensor
    """Token ids to predict, k + 1 tokens ahead of their sources, long `[targets]`."""


def mtp_depths(batch: TokenBatch, num_modules: int) -> Iterator[MTPDepth]:
    """Yield the inputs and targets of modules 1 to `num_modules`, in order."""
    device = batch.tokens.device
    starts = batch.layout.starts
    rows = [_rows(batch.layout, starts, last) for last in _last_sources(batch)]
    owners = batch.sequence_ids.unique_consecutive(return_inverse=True)[
        1
    ].cpu()  # index in `rows` of each target's completion
    reached = batch.positions[batch.sources].cpu()
    lengths = torch.tensor([len(path) for path in rows], dtype=torch.long)
    whole = torch.cat([torch.zeros(0, dtype=torch.long), *rows])
    whole_starts = lengths.cumsum(0) - lengths
    before, before_starts = whole, whole_starts
    for k in range(1, num_modules + 1):
        kept = (lengths - k).clamp(min=0)
        layout = Layout(tuple(kept.tolist()), (-1,) * len(kept))
        positions = layout.positions()
        kept_starts = kept.cumsum(0) - kept
        far_enough = reached >= k
        yield MTPDepth(
            layout=layout,
            rows=before[before_starts.repeat_interleave(kept) + positions].to(device),
            tokens=batch.tokens[whole[whole_starts.repeat_interleave(kept) + positions + k].to(device)],
            positions=positions.to(device),
            sources=(kept_starts[owners] + reached - k)[far_enough].to(device),
            targets=batch.targets[far_enough.to(device)],
        )
        before, before_starts = torch.arange(len(positions)), kept_starts


def _last_sources(batch: TokenBatch) -> list[int]:
    """Packed row that predicts the last target of each completion with a target."""
    counts = batch.sequence_ids.unique_consecutive(return_counts=True)[1]
    return batch.sources[counts.cumsum(0) - 1].tolist()


def _rows(layout: Layout, starts: list[int], last: int) -> Tensor:
    """Packed rows of the sequence that ends in row `last`, those of its parent first: long `[tokens]`."""
    segment = bisect_right(starts, last) - 1
    parent = layout.parents[segment]
    own = torch.arange(starts[segment], last + 1)
    if parent < 0:
        return own
    return torch.cat((torch.arange(starts[parent], starts[parent] + layout.lengths[parent]), own))
