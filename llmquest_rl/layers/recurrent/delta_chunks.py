"""Cuts packed sequences into chunks of equal length, for layers that pass a state from chunk to chunk.

Chunks are sorted by depth, which is the number of chunks before them in their sequence, the parent's included. One step
of the recurrence then processes one contiguous run of chunks, for any lengths, and only the last chunk of a segment
holds padding.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout

CHUNK = 64
"""Tokens per chunk. Longer chunks cost more products within a chunk, shorter ones more steps and more states."""


class Level(NamedTuple):
    """The chunks `start .. stop-1`, which have the same depth."""

    start: int
    stop: int
    num_above: int
    """Chunks in the level above; 1 at depth 0, for a state of zeros."""
    before: Tensor
    """Index of the previous chunk of each chunk within the level above `[chunks]`."""
    ends: Tensor
    """Index of the last chunk within this level `[segments that end in this level]`."""
    ending: Tensor
    """Index of each segment that ends in this level `[segments that end in this level]`."""


@dataclass(frozen=True)
class ChunkedLayout:
    """The chunks of a layout, and the place of each token in them."""

    num_chunks: int
    num_segments: int
    rows: Tensor
    """Row of each token among the rows of all chunks `[tokens]`."""
    levels: tuple[Level, ...]

    def pad(self, x: Tensor) -> Tensor:
        """Arrange `x` `[tokens, heads, size]` in chunks `[chunks, heads, CHUNK, size]`, padded with zeros."""
        rows = x.new_zeros(self.num_chunks * CHUNK, *x.shape[1:]).index_copy(0, self.rows, x)
        by_chunk: Tensor = rows.unflatten(0, (-1, CHUNK)).transpose(1, 2)
        return by_chunk.contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        """Invert `pad`: `[chunks, heads, CHUNK, size]` to `[tokens, heads, size]`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a cached result of generation must be usable in training
def chunk_layout(layout: Layout, device: torch.device) -> ChunkedLayout:
    """Compute the chunks of a layout. The result is cached, because all layers of a model use the same one."""
    lengths, parents = (torch.tensor(numbers, dtype=torch.long) for numbers in (layout.lengths, layout.parents))
    counts = (lengths + CHUNK - 1) // CHUNK
    before = torch.where(parents >= 0, counts[parents], 0)  # number of chunks of the parent
    first = counts.cumsum(0) - counts  # number of chunks of earlier segments
    within = torch.arange(int(counts.sum())) - first.repeat_interleave(counts)
    depths = within + before.repeat_interleave(counts)
    rank = torch.empty_like(depths)
    rank[depths.argsort(stable=True)] = torch.arange(len(depths))
    last = torch.where(counts > 0, first + counts - 1, -1)
    last = torch.where((counts == 0) & (before > 0), last[parents], last)  # an empty segment ends where its parent does
    previous = torch.where(within > 0, torch.arange(len(depths)) - 1, last[parents].repeat_interleave(counts))
    token = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return ChunkedLayout(
        num_chunks=len(depths),
        num_segments=len(lengths),
        rows=(rank[first.repeat_interleave(lengths) + token // CHUNK] * CHUNK + token % CHUNK).to(device),
        levels=_levels(depths, rank, previous, last, device),
    )


def _levels(depths: Tensor, rank: Tensor, previous: Tensor, last: Tensor, device: torch.device) -> tuple[Level, ...]:
    sizes = depths.bincount().tolist()
    levels = []
    start, num_above = 0, 1
    for depth, size in enumerate(sizes):
        chunks = (depths == depth).nonzero().squeeze(1)  # in rank order
        ending = ((last >= 0) & (depths[last] == depth)).nonzero().squeeze(1)
        before = rank[previous[chunks]] - (start - num_above) if depth else torch.zeros_like(chunks)
        ends = rank[last[ending]] - start
        levels.append(Level(start, start + size, num_above, *(x.to(device) for x in (before, ends, ending))))
        start, num_above = start + size, size
    return tuple(levels)
