"""Attention over packed tokens, and the interface that it shares with the caches used in generation.

The packed form never pads what its caller sees. On a CPU, segments of similar shape are attended together in one
batched call; on a GPU one FlexAttention kernel walks the blocks of the pack that hold visible pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmquest_rl.batch import Layout


class AttentionContext(Protocol):
    """What a model's attention layers need from the outside: which earlier tokens each token sees."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention output [tokens, heads, head_dim].

        Args:
            layer: Index of the layer that asks; a cache keeps keys and values by it.
            q: Queries [tokens, heads, head_dim], positions already applied.
            k: Keys [tokens, kv_heads, head_dim]; query head h reads kv head `h // (heads / kv_heads)`.
            v: Values, like `k`.
            scale: Multiplies the scores before the softmax.
        """
        ...


class PackedAttention:
    """Causal attention within each segment of a layout, plus the whole of the segment's parent. Nothing else is seen.

    Built once for a batch: index tensors and masks are shared by all layers.
    """

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        assert all(parent < 0 or layout.parents[parent] < 0 for parent in layout.parents), "parents have no parents"
        device = torch.device(device)
        self._backend: _Bucketed | _Flex = (_Flex if device.type == "cuda" else _Bucketed)(layout, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `AttentionContext.attend`; every layer is treated alike."""
        return self._backend(q, k, v, scale)


# --- CPU: one batched call for each bucket of similar segments ---

MAX_PADDING = 0.25
"""Largest share of a segment's row in a bucket that may be padding: below it one larger call beats two calls."""


@dataclass(frozen=True)
class _Bucket:
    batch: int
    num_queries: int
    """batch * width, padding included."""
    num_keys: int
    """batch * (parent length + width), padding included."""
    mask: Tensor | None
    """[width, parent length + width], added to the scores; None = plain causal, a fast path of the kernel."""


class _Bucketed:
    """Scores and sums are float32 for any dtype: that is also the faster way through the CPU kernel's backward.

    All buckets are padded in one gather: the backward of a gather costs a pass over the whole pack.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        groups = _similar_segments(layout)
        rows = [_padded_rows(layout, members) for members in groups]
        mask = _mask(layout).to(device)
        self.buckets = [
            _make_bucket(len(members), queries, keys, mask)
            for members, (queries, keys) in zip(groups, rows, strict=True)
        ]
        nothing = torch.zeros(0, dtype=torch.long)
        query_rows = torch.cat([nothing, *(queries.flatten() for queries, _ in rows)])
        self.query_rows = query_rows.to(device)
        """The packed row of each padded query. Padding repeats a segment's last row; its result is dropped."""
        self.key_rows = torch.cat([nothing, *(keys.flatten() for _, keys in rows)]).to(device)
        """The packed row of each padded key: for each segment the rows of its parent, then its own."""
        unpad_rows = torch.empty(layout.num_tokens, dtype=torch.long)
        real = (query_rows.diff(prepend=query_rows.new_tensor([-1])) != 0).nonzero().squeeze(-1)
        unpad_rows[query_rows[real]] = real
        self.unpad_rows = unpad_rows.to(device)
        """[tokens]: where each token's result lies among the padded results."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        queries = q.float().index_select(0, self.query_rows).split([bucket.num_queries for bucket in self.buckets])
        num_keys = [bucket.num_keys for bucket in self.buckets]
        keys, values = (x.float().index_select(0, self.key_rows).split(num_keys) for x in (k, v))
        outputs = [_attend_bucket(*inputs, scale) for inputs in zip(self.buckets, queries, keys, values, strict=True)]
        return torch.cat([q.float()[:0], *outputs]).index_select(0, self.unpad_rows).to(q.dtype)


def _similar_segments(layout: Layout) -> list[list[int]]:
    """Non-empty segments in groups of equal parent length and similar own length, the longest of each group first."""

    def parent_length(segment: int) -> int:
        parent = layout.parents[segment]
        return layout.lengths[parent] if parent >= 0 else 0

    filled = [segment for segment, length in enumerate(layout.lengths) if length]
    groups: list[list[int]] = []
    for segment in sorted(filled, key=lambda segment: (parent_length(segment), -layout.lengths[segment])):
        first = groups[-1][0] if groups else segment
        fits = layout.lengths[segment] >= (1 - MAX_PADDING) * layout.lengths[first]
        if groups and fits and parent_length(first) == parent_length(segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _mask(layout: Layout) -> Tensor:
    """The mask [width, parent length + width] of the largest continuation: every smaller one is a view of it."""
    continued = [(layout.lengths[parent], layout.lengths[i]) for i, parent in enumerate(layout.parents) if parent >= 0]
    seen, width = (max(sizes) for sizes in zip(*continued, strict=True)) if continued else (0, 0)
    return torch.full((width, seen + width), float("-inf")).triu(seen + 1)


def _padded_rows(layout: Layout, members: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Packed rows of a bucket's queries [batch, width] and keys [batch, parent length + width]."""
    parents = [layout.parents[segment] for segment in members]
    seen = layout.lengths[parents[0]] if parents[0] >= 0 else 0
    starts = torch.tensor(layout.starts)
    lasts = torch.tensor([layout.lengths[segment] - 1 for segment in members])
    own = starts[list(members), None] + torch.minimum(torch.arange(layout.lengths[members[0]]), lasts[:, None])
    return own, torch.cat((starts[parents, None] + torch.arange(seen), own), dim=1)


def _make_bucket(batch: int, queries: Tensor, keys: Tensor, mask: Tensor) -> _Bucket:
    width, seen = queries.shape[1], keys.shape[1] - queries.shape[1]
    largest = mask.shape[1] - mask.shape[0]
    view = mask[:width, largest - seen : largest + width] if seen else None
    return _Bucket(batch, queries.numel(), keys.numel(), view)


def _attend_bucket(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Results [batch * width, heads, head_dim], padding included."""
    batched_q, batched_k, batched_v = (x.view(bucket.batch, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        batched_q,
        batched_k,
        batched_v,
        attn_mask=bucket.mask,
        is_causal=bucket.mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).reshape(-1, *q.shape[1:])


# --- GPU: FlexAttention over the whole pack ---


class _Flex:
    def __init__(self, layout: Layout, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        segments, parents = segment_ids(layout)
        segments, parents = segments.to(device), parents.to(device)
        size = layout.num_tokens

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees(segments, parents, query, key)

        self.block_mask = create_block_mask(visible, None, None, size, size, device=device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out: Tensor = _compiled_flex_attention()(*heads_first, block_mask=self.block_mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


def segment_ids(layout: Layout) -> tuple[Tensor, Tensor]:
    """For each packed token its segment and that segment's parent (-1 if none): two long tensors [tokens]."""
    lengths = torch.tensor(layout.lengths, dtype=torch.long)
    parents = torch.tensor(layout.parents, dtype=torch.long)
    return torch.arange(len(lengths)).repeat_interleave(lengths), parents.repeat_interleave(lengths)


def sees(segments: Tensor, parents: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Whether packed token `query` may read packed token `key` (index tensors that broadcast)."""
    same = (segments[query] == segments[key]) & (key <= query)
    return same | (parents[query] == segments[key])


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
