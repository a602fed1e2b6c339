"""Which tokens multi-token prediction works on (DeepSeek-V3, arXiv:2412.19437, section 2.2), for packed batches.

The model itself predicts token i + 1 from token i. Module k = 1, 2, ... predicts token i + k + 1 from the state that
module k - 1 left at i and the embedding of token i + k, so it covers the first n - k of n tokens.

A prompt that several completions share has another future in each: here every completion has its prompt to itself,
though the model has computed it once. Targets are those of the batch, each predicted from k tokens earlier; those with
fewer than k tokens before them have no such prediction.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout, TokenBatch


class MTPDepth(NamedTuple):
    """What one module computes."""

    layout: Layout
    """A segment for each completion that has a target."""
    rows: Tensor
    """Long [tokens]: whose state it continues: index into the states of the module before (the model's, for k = 1)."""
    tokens: Tensor
    """Long [tokens]: the ids whose embeddings join: k tokens ahead of `rows`."""
    positions: Tensor
    """Long [tokens]: those of `rows`."""
    sources: Tensor
    """Long [targets]: index into its own states of the position that predicts the target."""
    targets: Tensor
    """Long [targets]: token ids to be predicted, k + 1 tokens ahead of their sources."""


def mtp_depths(batch: TokenBatch, num_modules: int) -> Iterator[MTPDepth]:
    """The work of modules 1 to `num_modules`, in order."""
    device = batch.tokens.device
    starts = batch.layout.starts
    rows = [_rows(batch.layout, starts, last) for last in _last_sources(batch)]
    owners = batch.sequence_ids.unique_consecutive(return_inverse=True)[1].cpu()  # of targets, among `rows`
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
    """For each completion with a target, the packed row that predicts its last one."""
    counts = batch.sequence_ids.unique_consecutive(return_counts=True)[1]
    return batch.sources[counts.cumsum(0) - 1].tolist()


def _rows(layout: Layout, starts: list[int], last: int) -> Tensor:
    """The packed rows of the sequence that ends in row `last`: the parent's, then its own."""
    segment = bisect_right(starts, last) - 1
    parent = layout.parents[segment]
    own = torch.arange(starts[segment], last + 1)
    if parent < 0:
        return own
    return torch.cat((torch.arange(starts[parent], starts[parent] + layout.lengths[parent]), own))
