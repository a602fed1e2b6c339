"""Packed attention on a CPU: chunks of similar shape are attended together in one batched call.

A chunk is a run of queries of one segment with the keys before it that its first query sees. Without a window a chunk
is a whole segment, and what it sees before is its parent. With a window of W tokens a long segment is cut into chunks
of about W / 3 queries, each with W - 1 keys before it (from its own segment, then from its parent), so that the cost
grows with tokens x W and not with the square of a segment.
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
"""Largest share of a chunk's row in a bucket that may be padding: below it one larger call beats two calls."""
CHUNKS_PER_WINDOW = 3
"""Shorter chunks score fewer pairs that the window hides, but read each key more often."""
MIN_CHUNK = 32
"""Queries of a chunk however short the window: many tiny products cost more than a few scores that are masked."""


class _QueryChunk(NamedTuple):
    segment: int
    start: int
    """Its first query's index in the segment."""
    width: int
    """Queries, and as many keys."""
    prefix: int
    """Keys before `start`."""


@dataclass(frozen=True)
class ChunkBucket:
    """Chunks of equal `seen` that are padded to one width and attended in one call."""

    batch: int
    num_queries: int
    """batch * width, padding included."""
    num_keys: int
    """batch * (seen + width), padding included."""
    mask: Tensor | None
    """[width, seen + width], added to the scores; None = plain causal, a fast path of the kernel."""


class BucketPlan:
    """Index tensors and masks for one layout and one window, shared by all layers that have it.

    All buckets are padded in one gather: the backward of a gather costs a pass over the whole pack.
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
        """The packed row of each padded query. Padding repeats a chunk's last row; its result is dropped. None where
        rows stand as they are packed: sequences of one length, or a single one."""
        key_rows = torch.cat([nothing, *(keys.flatten() for _, keys in rows)])
        self.key_rows = _none_if_identity(key_rows, layout.num_tokens, device)
        """The packed row of each padded key: for each chunk the rows that it sees before itself, then its own."""
        unpad_rows = torch.empty(layout.num_tokens, dtype=torch.long)
        real = (query_rows.diff(prepend=query_rows.new_tensor([-1])) != 0).nonzero().squeeze(-1)
        unpad_rows[query_rows[real]] = real
        self.unpad_rows = _none_if_identity(unpad_rows, len(query_rows), device)
        """[tokens]: where each token's result lies among the padded results."""


class BucketedAttention:
    """Scores and sums are float32 for any dtype: that is also the faster way through the CPU kernel's backward."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._plans: dict[int | None, BucketPlan] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, options: ScoreOptions) -> Tensor:
        """See `AttentionContext.attend`; `v` may be `k` itself."""
        if window not in self._plans:
            self._plans[window] = BucketPlan(self._layout, window, self._device)
        plan = self._plans[window]
        size = max(k.shape[-1], v.shape[-1])  # the kernel wants keys and values of one size: zeros change nothing
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
    """The index, or None where it takes all of `count` rows in their order: a gather would only copy."""
    return None if torch.equal(rows, torch.arange(count)) else rows.to(device)


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _pad_to_float32(x: Tensor, size: int) -> Tensor:
    x = x.float()
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def _query_chunks(layout: Layout, window: int | None) -> list[_QueryChunk]:
    """What the calls have to cover. A segment's first chunk ends where the window begins to hide something."""
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
    """Groups of equal `seen` and similar width, the widest of each group first."""
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
    """The mask [width, seen + width] that all are views of: query i sees keys i + seen - window + 1 to i + seen."""
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
    """Packed rows of a bucket's queries [batch, width] and keys [batch, seen + width]."""
    starts = torch.tensor(layout.starts)
    segments = torch.tensor([chunk.segment for chunk in members])
    parents = torch.tensor(layout.parents)[segments]
    first = torch.tensor([[chunk.start] for chunk in members])
    last = torch.tensor([[chunk.start + chunk.width - 1] for chunk in members])
    offsets = torch.arange(-members[0].prefix, members[0].width)
    own = torch.minimum(first + offsets, last)  # index in the segment; below 0 = from the end of its parent
    ends = starts[parents] + torch.tensor(layout.lengths)[parents]  # of segments without parent never read
    keys = own + torch.where(own < 0, ends[:, None], starts[segments, None])
    return keys[:, members[0].prefix :], keys


def _unpack_bucket(bucket: ChunkBucket, x: Tensor) -> Tensor:
    return x.view(bucket.batch, -1, *x.shape[1:]).transpose(1, 2)  # [batch, heads, width, size]


def _attend_sdpa(bucket: ChunkBucket, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
    """Results [batch * width, heads, size], padding included."""
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
    """The same where scores are more than scaled, which no fused kernel of the CPU does. Scores are kept whole."""
    queries, keys, values = (_unpack_bucket(bucket, x) for x in (q, k, v))
    width, repeats = queries.shape[2], q.shape[1] // k.shape[1]
    grouped = queries.unflatten(1, (-1, repeats)).flatten(2, 3)  # [batch, kv_heads, repeats * width, size]
    scores = options.apply_softcap(grouped @ keys.transpose(2, 3) * options.scale).unflatten(2, (repeats, width))
    mask = scores.new_full((width, width), float("-inf")).triu(1) if bucket.mask is None else bucket.mask
    scores = scores + mask  # [batch, kv_heads, repeats, width, seen + width]
    mixed = scores.softmax(-1).flatten(2, 3) @ values
    out = mixed.view(queries.shape).transpose(1, 2)  # [batch, width, heads, size]
    logsumexp = scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)
    return options.apply_sinks(out, logsumexp).flatten(0, 1)
