"""Attention over packed tokens, and the interface that it shares with the caches used in generation.

The packed form never pads what its caller sees. On a CPU, segments of similar shape are attended together in one batched call;
on a GPU one FlexAttention kernel walks the blocks of the pack that hold visible pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
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
    """Causal attention within each segment of a layout, plus the whole of the segment's parent. Nothing crosses otherwise.

    Built once for a batch: index tensors and masks are shared by all layers.
    """

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        assert all(parent < 0 or layout.parents[parent] < 0 for parent in layout.parents), "a parent has no parent itself"
        device = torch.device(device)
        self._backend: _Bucketed | _Flex = (_Flex if device.type == "cuda" else _Bucketed)(layout, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `AttentionContext.attend`; every layer is treated alike."""
        return self._backend(q, k, v, scale)


# --- CPU: one batched call for each bucket of similar segments ---

MAX_PADDING = 0.25
"""Share of a bucket's score area that may be padding: below it a batched call is cheaper than several calls."""


@dataclass(frozen=True)
class _Bucket:
    query_rows: Tensor
    """[batch * query length]: the packed row of each padded query; padding repeats a row whose result is thrown away."""
    key_rows: Tensor
    """[batch * key length]: the parent's rows, then the segment's own."""
    batch: int
    mask: Tensor | None
    """[query length, key length], added to the scores; None = plain causal."""


class _Bucketed:
    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.buckets: list[_Bucket] = []
        position_of = torch.empty(layout.num_tokens, dtype=torch.long)
        num_rows = 0
        for parent_length, members in _group(layout):
            bucket = _make_bucket(layout, parent_length, members, device)
            width = len(bucket.query_rows) // bucket.batch
            for i, segment in enumerate(members):
                start, length = layout.starts[segment], layout.lengths[segment]
                position_of[start : start + length] = torch.arange(length) + num_rows + i * width
            num_rows += len(bucket.query_rows)
            self.buckets.append(bucket)
        self.position_of = position_of.to(device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = [_attend_bucket(bucket, q, k, v, scale) for bucket in self.buckets]
        return torch.cat(outputs).index_select(0, self.position_of) if outputs else q


def _group(layout: Layout) -> list[tuple[int, list[int]]]:
    """Segments that can share a call: (length of the parent, segments), with bounded padding."""
    by_parent: dict[int, list[int]] = {}
    for segment, (length, parent) in enumerate(zip(layout.lengths, layout.parents, strict=True)):
        if length:
            by_parent.setdefault(layout.lengths[parent] if parent >= 0 else 0, []).append(segment)
    groups = []
    for parent_length, segments in by_parent.items():
        longest_first = sorted(segments, key=lambda segment: -layout.lengths[segment])
        for segment in longest_first:
            width = layout.lengths[groups[-1][1][0]] if groups and groups[-1][0] == parent_length else 0
            if layout.lengths[segment] >= (1 - MAX_PADDING) * width and width:
                groups[-1][1].append(segment)
            else:
                groups.append((parent_length, [segment]))
    return groups


def _make_bucket(layout: Layout, parent_length: int, members: Sequence[int], device: torch.device) -> _Bucket:
    width = max(layout.lengths[segment] for segment in members)
    offsets = torch.arange(width)
    starts, queries, keys = layout.starts, [], []
    for segment in members:
        own = starts[segment] + offsets.clamp(max=layout.lengths[segment] - 1)
        parent = layout.parents[segment]
        queries.append(own)
        keys.append(torch.cat((starts[parent] + torch.arange(parent_length), own)) if parent_length else own)
    mask = None
    if parent_length:
        future = torch.full((width, width), float("-inf")).triu(1)
        mask = torch.cat((torch.zeros(width, parent_length), future), dim=1).to(device)
    return _Bucket(torch.cat(queries).to(device), torch.cat(keys).to(device), len(members), mask)


def _attend_bucket(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    def padded(x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows).view(bucket.batch, -1, *x.shape[1:]).transpose(1, 2)

    repeats = q.shape[1] // k.shape[1]
    keys, values = (padded(x, bucket.key_rows).repeat_interleave(repeats, dim=1) for x in (k, v))
    mask = bucket.mask if bucket.mask is None else bucket.mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        padded(q, bucket.query_rows), keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
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
