"""Packed sequences cut into chunks of equal length, for layers whose state goes from chunk to chunk.

Chunks are sorted by depth: the number of chunks before them in their own sequence, that of the parent included. So a
step takes one run of chunks, whatever the lengths, and only the last chunk of a segment holds padding.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout

CHUNK = 64
"""Tokens of a chunk: longer ones cost more products within a chunk, shorter ones more steps and more states."""


class Level(NamedTuple):
    """The chunks of one depth."""

    start: int
    stop: int
    num_above: int
    """Chunks of the level above; 1 at depth 0, for a state of zeros."""
    before: Tensor
    """[chunks]: which chunk each continues, counted within the level above."""
    ends: Tensor
    """[segments that end in this level]: their last chunk, counted within this level."""
    ending: Tensor
    """[segments that end in this level]: which they are."""


@dataclass(frozen=True)
class ChunkedLayout:
    """Where the tokens of a layout lie."""

    num_chunks: int
    num_segments: int
    rows: Tensor
    """[tokens]: the row of each among the rows of all chunks."""
    levels: tuple[Level, ...]

    def pad(self, x: Tensor) -> Tensor:
        """`x` [tokens, heads, size] as [chunks, heads, CHUNK, size], padded with zeros."""
        rows = x.new_zeros(self.num_chunks * CHUNK, *x.shape[1:]).index_copy(0, self.rows, x)
        by_chunk: Tensor = rows.unflatten(0, (-1, CHUNK)).transpose(1, 2)
        return by_chunk.contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what generation asks for first has to serve training too
def chunk_layout(layout: Layout, device: torch.device) -> ChunkedLayout:
    """The chunks of a layout; the layers of a model, which ask one after the other, share them."""
    lengths, parents = (torch.tensor(numbers, dtype=torch.long) for numbers in (layout.lengths, layout.parents))
    counts = (lengths + CHUNK - 1) // CHUNK
    before = torch.where(parents >= 0, counts[parents], 0)  # chunks of the parent
    first = counts.cumsum(0) - counts  # chunks of the segments before
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
        chunks = (depths == depth).nonzero().squeeze(1)  # in the order of their ranks
        ending = ((last >= 0) & (depths[last] == depth)).nonzero().squeeze(1)
        before = rank[previous[chunks]] - (start - num_above) if depth else torch.zeros_like(chunks)
        ends = rank[last[ending]] - start
        levels.append(Level(start, start + size, num_above, *(x.to(device) for x in (before, ends, ending))))
        start, num_above = start + size, size
    return tuple(levels)
