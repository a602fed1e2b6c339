"""Packed attention on CPUs: query chunks of similar shape are padded to a bucket and computed in one batched call.

A chunk is a run of queries of one segment. Its prefix is the keys before the chunk that its first query sees. Without a
window a chunk is a whole segment and its prefix is the parent. With a window of W tokens a long segment is cut into
chunks of about W / 3 queries, each with a prefix of up to W - 1 keys from its own segment and its parent. The cost then
grows with tokens x W, not with the square of the segment length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.scores import ScoreOptions

MAX_PADDING = 0.25
"""Largest fraction of a chunk's row that may be padding. Up to here one larger call is faster than two calls."""
CHUNKS_PER_WINDOW = 3
"""Chunks per window. Shorter chunks compute fewer masked scores, but read each key more often."""
MIN_CHUNK = 32
"""Fewest queries per chunk, for any window. Many tiny matrix products cost more than a few masked scores."""


class _QueryChunk(NamedTuple):
    segment: int
    start: int
    """Index of the first query in the segment."""
    width: int
    """Number of queries, and of keys besides the prefix."""
    prefix: int
    """Number of keys before `start`."""


@dataclass(frozen=True)
class ChunkBucket:
    """Chunks of equal `prefix`, padded to one width and computed in one call."""

    batch: int
    num_queries: int
    """Number of queries with padding: batch * width."""
    num_keys: int
    """Number of keys with padding: batch * (prefix + width)."""
    mask: Tensor | None
    """Additive mask `[width, prefix + width]`; None = plain causal attention, a fast path of the kernel."""


class BucketPlan:
    """Index tensors and masks for one layout and one window, shared by all layers with that window.

    One gather pads all buckets, because the backward of a gather costs a pass over the whole packed batch.
    """

    def __init__(self, layout: Layout, window: int | None, device: torch.device) -> None:
        groups = _group_similar(_query_chunks(layout, window))
        rows = [_padded_rows(layout, members) for members in groups]
        mask = _full_mask(groups, window).to(device)
        self.buckets = [
            ChunkBucket(len(members), queries.numel(), keys.numel(), _bucket_mask(mask, members[0], window))
            for members, (queries, keys) in zip(groups, rows, strict=True)
        ]
        nothing = torch.zeros(0, dtype=torch.long)
        query_rows = torch.cat([nothing, *(queries.flatten() for queries, _ in rows)])
        self.query_rows = _none_if_identity(query_rows, layout.num_tokens, device)
        """Packed row of each padded query. Padding repeats a chunk's last row, and its result is dropped. None = the
        rows are already in packed order, as with sequences of one length."""
        key_rows = torch.cat([nothing, *(keys.flatten() for _, keys in rows)])
        self.key_rows = _none_if_identity(key_rows, layout.num_tokens, device)
        """Packed row of each padded key: for each chunk the rows of its prefix, then its own; None as above."""
        unpad_rows = torch.empty(layout.num_tokens, dtype=torch.long)
        real = (query_rows.diff(prepend=query_rows.new_tensor([-1])) != 0).nonzero().squeeze(-1)
        unpad_rows[query_rows[real]] = real
        self.unpad_rows = _none_if_identity(unpad_rows, len(query_rows), device)
        """Row of each token's result among the padded results `[tokens]`; None as above."""


class BucketedAttention:
    """Attention over buckets of chunks, in float32 for any dtype: the CPU kernel's backward is faster in float32."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._plans: dict[int | None, BucketPlan] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, options: ScoreOptions) -> Tensor:
        """See `AttentionContext.attend`; `v` may be `k` itself."""
        if window not in self._plans:
            self._plans[window] = BucketPlan(self._layout, window, self._device)
        plan = self._plans[window]
        size = max(
            k.shape[-1], v.shape[-1]
        )  # the kernel needs keys and values of one size: zero padding changes nothing
        queries, keys = (
            _gather(_pad_to_float32(q, size), plan.query_rows),
            _gather(_pad_to_float32(k, size), plan.key_rows),
        )
        values = keys if v is k else _gather(_pad_to_float32(v, size), plan.key_rows)
        num_queries = [bucket.num_queries for bucket in plan.buckets]
        num_keys = [bucket.num_keys for bucket in plan.buckets]
        parts = zip(queries.split(num_queries), keys.split(num_keys), values.split(num_keys), strict=True)
        attend = _attend_sdpa if options.is_scale_only else _attend_eager
        outputs = [attend(bucket, *part, options) for bucket, part in zip(plan.buckets, parts, strict=True)]
        joined = outputs[0] if len(outputs) == 1 else torch.cat([queries[:0], *outputs])
        return _gather(joined, plan.unpad_rows)[..., : v.shape[-1]].to(q.dtype)


def _none_if_identity(rows: Tensor, count: int, device: torch.device) -> Tensor | None:
    """Return the index, or None if it selects all `count` rows in order: a gather would only copy them."""
    return None if torch.equal(rows, torch.arange(count)) else rows.to(device)


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _pad_to_float32(x: Tensor, size: int) -> Tensor:
    x = x.float()
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _query_chunks(layout: Layout, window: int | None) -> list[_QueryChunk]:
    """Cut all segments into chunks. A segment's first chunk ends where the window begins to mask keys."""
    chunks = []
    for segment, (length, parent) in enumerate(zip(layout.lengths, layout.parents, strict=True)):
        before = layout.lengths[parent] if parent >= 0 else 0
        reach = before + length if window is None else window
        step = max(reach // CHUNKS_PER_WINDOW, MIN_CHUNK)
        starts = [0, *range(max(reach - before, step), length, step)] if length else []
        for start, stop in pairwise([*starts, length]):
            chunks.append(_QueryChunk(segment, start, stop - start, min(before + start, reach - 1)))
    return chunks


def _group_similar(chunks: Sequence[_QueryChunk]) -> list[list[_QueryChunk]]:
    """Group chunks of equal `prefix` and similar width, the widest chunk of each group first."""
    groups: list[list[_QueryChunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.prefix, -chunk.width)):
        widest = groups[-1][0] if groups else chunk
        fits = chunk.prefix == widest.prefix and chunk.width >= (1 - MAX_PADDING) * widest.width
        if groups and fits:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _is_causal(chunk: _QueryChunk, window: int | None) -> bool:
    return chunk.prefix == 0 and (window is None or chunk.width <= window)


def _full_mask(groups: Sequence[Sequence[_QueryChunk]], window: int | None) -> Tensor:
    """The largest mask `[width, prefix + width]`, of which every bucket takes a view.

    Query i sees keys i + prefix - window + 1 to i + prefix.
    """
    masked = [members[0] for members in groups if not _is_causal(members[0], window)]
    width = max((chunk.width for chunk in masked), default=0)
    prefix = max((chunk.prefix for chunk in masked), default=0)
    mask = torch.full((width, prefix + width), float("-inf")).triu(prefix + 1)
    if window is not None:
        mask += torch.full_like(mask, float("-inf")).tril(prefix - window)
    return mask


def _bucket_mask(mask: Tensor, widest: _QueryChunk, window: int | None) -> Tensor | None:
    if _is_causal(widest, window):
        return None
    largest = mask.shape[1] - mask.shape[0]
    return mask[: widest.width, largest - widest.prefix : largest + widest.width]


def _padded_rows(layout: Layout, members: Sequence[_QueryChunk]) -> tuple[Tensor, Tensor]:
    """Packed rows of a bucket's queries `[batch, width]` and keys `[batch, prefix + width]`."""
    starts = torch.tensor(layout.starts)
    segments = torch.tensor([chunk.segment for chunk in members])
    parents = torch.tensor(layout.parents)[segments]
    first = torch.tensor([[chunk.start] for chunk in members])
    last = torch.tensor([[chunk.start + chunk.width - 1] for chunk in members])
    offsets = torch.arange(-members[0].prefix, members[0].width)
    own = torch.minimum(first + offsets, last)  # index in the segment; negative = counted from the end of the parent
    ends = starts[parents] + torch.tensor(layout.lengths)[parents]  # not read for segments without a parent
    keys = own + torch.where(own < 0, ends[:, None], starts[segments, None])
    return keys[:, members[0].prefix :], keys


def _unpack_bucket(bucket: ChunkBucket, x: Tensor) -> Tensor:
    return x.view(bucket.batch, -1, *x.shape[1:]).transpose(1, 2)  # [batch, heads, width, size]


def _attend_sdpa(bucket: ChunkBucket, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
    """Attention by the fused kernel of PyTorch: `[batch * width, heads, size]`, padding included."""
    out = F.scaled_dot_product_attention(
        _unpack_bucket(bucket, q),
        _unpack_bucket(bucket, k),
        _unpack_bucket(bucket, v),
        attn_mask=bucket.mask,
        is_causal=bucket.mask is None,
        scale=options.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).reshape(-1, *q.shape[1:])


def _attend_eager(bucket: ChunkBucket, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
    """Attention with a soft cap or sinks, which no fused CPU kernel supports; all scores of a bucket are in memory."""
    queries, keys, values = (_unpack_bucket(bucket, x) for x in (q, k, v))
    width, repeats = queries.shape[2], q.shape[1] // k.shape[1]
    grouped = queries.unflatten(1, (-1, repeats)).flatten(2, 3)  # [batch, kv_heads, repeats * width, size]
    scores = options.apply_softcap(grouped @ keys.transpose(2, 3) * options.scale).unflatten(2, (repeats, width))
    mask = scores.new_full((width, width), float("-inf")).triu(1) if bucket.mask is None else bucket.mask
    scores = scores + mask  # [batch, kv_heads, repeats, width, prefix + width]
    mixed = scores.softmax(-1).flatten(2, 3) @ values
    out = mixed.view(queries.shape).transpose(1, 2)  # [batch, width, heads, size]
    logsumexp = scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)
    return options.apply_sinks(out, logsumexp).flatten(0, 1)
