"""The attention contexts of generation: `PrefillContext` fills a cache, `DecodeContext` reads and extends it.

A prompt occupies one slot of the prompt cache, however many completions share it. Each completion occupies one slot of
the completion cache. A decoding step reads each prompt once for all its completions, reads each completion once, and
takes one softmax over both.

A layer with a window of W tokens caches the last W - 1 tokens of a prompt, and a ring buffer of the last W tokens of a
completion. Prompt tokens are stored newest first. The part of the prompt that a window still reaches shrinks as the
completion grows, and in this order it is always at the start of the slot. A ring buffer holds only tokens that the
window sees, so its order does not matter.

Shapes: n sequences, G prompts, H query heads, K key/value heads, R = H / K query heads per key/value head, C head size,
Cv value size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache_slots import SlotBucket, SlotCache, slot_buckets
from llmquest_rl.layers.attention.scores import ScoreOptions


class _CacheIndex(NamedTuple):
    """The packed tokens to cache, and their places in the cache. All tensors are `[cached tokens]`, long."""

    rows: Tensor
    """Packed row of each token."""
    slots: Tensor
    """Slot of each token."""
    offsets: Tensor
    """Index of each token in its slot."""


class PrefillContext:
    """Context of a forward over packed prompts: causal attention that also writes the cache for decoding."""

    is_decoding = False

    def __init__(self, prompts: SlotCache, layout: Layout, slots: Sequence[int]) -> None:
        """Prepare to cache prompts.

        Args:
            prompts: Cache of the prompts.
            layout: One segment per prompt.
            slots: Slot of each prompt.
        """
        lengths = torch.tensor(layout.lengths)
        self.layout = layout
        self._prompts = prompts
        self._attention = PackedAttention(layout, prompts.device)
        self._segment_slots = torch.tensor(slots)
        self._slots = self._segment_slots.repeat_interleave(lengths)
        self._offsets = lengths.repeat_interleave(lengths) - 1 - layout.positions()  # newest first
        self._indices: dict[int, _CacheIndex] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        cache_entry: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        capacity = self._prompts.capacity if window is None else min(window - 1, self._prompts.capacity)
        rows, slots, offsets = self._cache_index(capacity)
        entries = (cache_entry,) if cache_entry is not None else (k,) if v is None else (k, v)
        self._prompts.write(layer, slots, offsets, [x.index_select(0, rows) for x in entries], capacity)
        return self._attention.attend(layer, q, k, v, scale, window=window, softcap=softcap, sinks=sinks)

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Return None: every prompt starts with this batch."""
        return None

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """See `AttentionContext.store_state`."""
        self._prompts.write_states(layer, self._segment_slots.to(self._prompts.device), state)

    def _cache_index(self, capacity: int) -> _CacheIndex:
        if capacity not in self._indices:
            rows = (self._offsets < capacity).nonzero().squeeze(-1)
            index = (rows, self._slots[rows], self._offsets[rows])
            self._indices[capacity] = _CacheIndex(*(x.to(self._prompts.device) for x in index))
        return self._indices[capacity]


@dataclass(frozen=True)
class _WindowView:
    """The cached tokens that each sequence sees through one window; all layers with that window share it."""

    prompt_buckets: list[SlotBucket]
    completion_buckets: list[SlotBucket]
    longest_prompt: int
    """Number of cached tokens that are read of each prompt: as many as are visible of any prompt."""
    completion_capacity: int
    """Tokens that a completion's slot holds in these layers."""
    new: Tensor
    """Offset of each sequence's new token in its slot `[n]`."""
    masked: Tensor
    """True for tokens that are not visible: bool `[n, 1, 1, longest prompt + longest completion]`."""


class DecodeContext:
    """Context of a forward over one new token of each of n sequences, which see their prompts and completions."""

    is_decoding = True

    def __init__(
        self,
        prompts: SlotCache,
        prompt_lengths: Sequence[int],
        completions: SlotCache,
        completion_lengths: Sequence[int],
        parents: Sequence[int],
    ) -> None:
        """Prepare the index tensors that all layers share.

        Args:
            prompts: Cache of the prompts.
            prompt_lengths: Tokens of each prompt `[G]`, in slot order.
            completions: Cache of the completions, sequence i in slot i.
            completion_lengths: Cached tokens of each completion `[n]`, without the new one.
            parents: Prompt slot of each sequence `[n]`.
        """
        self.layout = Layout((1,) * len(parents), (-1,) * len(parents))
        self._prompts, self._completions = prompts, completions
        self._prompt_lengths, self._completion_lengths, self._parents = prompt_lengths, completion_lengths, parents
        self._rows = torch.arange(len(parents), device=completions.device)
        starting = torch.tensor([row for row, length in enumerate(completion_lengths) if length == 0], dtype=torch.long)
        self._starting = starting.to(completions.device)
        self._starting_parents = torch.tensor(parents)[starting].to(prompts.device)
        cells, self._width = _table_cells(parents)
        self._cells = cells.to(completions.device)
        self._views: dict[int, _WindowView] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        cache_entry: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        assert cache_entry is None or (cache_entry is k and v is None), (
            "a decoding layer with a cache entry passes it as keys, with v=None"
        )
        view, options = self._view(window), ScoreOptions(scale, softcap, sinks)
        self._completions.write(layer, self._rows, view.new, (k,) if v is None else (k, v), view.completion_capacity)
        queries = q.float().mul(scale).view(len(q), k.shape[1], -1, q.shape[-1])  # [n, K, R, C]
        scores = options.apply_softcap(self._scores(layer, queries, view)).masked_fill_(view.masked, float("-inf"))
        output = self._weighted_values(layer, scores.softmax(-1), view).flatten(1, 2)  # [n, H, Cv]
        if sinks is not None:
            output = options.apply_sinks(output, scores.logsumexp(-1).flatten(1))
        return output.to(q.dtype)

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """See `AttentionContext.load_state`. A sequence's first step starts from a copy of its prompt's state."""
        if len(self._starting):
            start = [state[self._starting_parents] for state in self._prompts.states(layer)]
            self._completions.write_states(layer, self._starting, start)
        return tuple(state[: len(self._rows)] for state in self._completions.states(layer))

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """See `AttentionContext.store_state`."""
        self._completions.write_states(layer, slice(len(self._rows)), state)

    def _view(self, window: int | None) -> _WindowView:
        everything = self._prompts.capacity + self._completions.capacity
        window = min(window or everything, everything)
        if window not in self._views:
            self._views[window] = self._make_view(window)
        return self._views[window]

    def _make_view(self, window: int) -> _WindowView:
        """Build the view of a window.

        A completion of t tokens, the new one included, sees its last min(t, window) tokens and the last window - t
        tokens of its prompt.
        """
        device, completion_capacity = self._completions.device, min(window, self._completions.capacity)
        sizes = [length + 1 for length in self._completion_lengths]
        smallest: dict[int, int] = {}
        for slot, length in zip(self._parents, sizes, strict=True):
            smallest[slot] = min(length, smallest.get(slot, length))
        reach = [min(p, max(window - smallest.get(i, 1), 0)) for i, p in enumerate(self._prompt_lengths)]
        parent, size = torch.tensor(self._parents), torch.tensor(sizes)
        in_prompt = torch.minimum(torch.tensor(self._prompt_lengths)[parent], window - size)  # negative counts as 0
        in_completion = size.clamp(max=completion_capacity)
        prompt_shown = torch.arange(max(reach)) < in_prompt[:, None]
        completion_shown = torch.arange(int(in_completion.max())) < in_completion[:, None]
        return _WindowView(
            prompt_buckets=slot_buckets(reach),
            completion_buckets=slot_buckets(in_completion.tolist()),
            longest_prompt=max(reach),
            completion_capacity=completion_capacity,
            new=((size - 1) % completion_capacity).to(device),
            masked=~torch.cat((prompt_shown, completion_shown), 1)[:, None, None].to(device),
        )

    def _scores(self, layer: int, queries: Tensor, view: _WindowView) -> Tensor:
        """Scores `[n, K, R, longest prompt + longest completion]`; values at masked places are arbitrary."""
        split = view.longest_prompt
        scores = queries.new_empty(*queries.shape[:3], view.masked.shape[-1])
        self._completions.scores(layer, queries, view.completion_buckets, scores[..., split:])
        shared = queries.new_empty(len(self._prompt_lengths), queries.shape[1], self._width * queries.shape[2], split)
        self._prompts.scores(layer, self._group_by_prompt(queries), view.prompt_buckets, shared)
        scores[..., :split] = self._ungroup(shared, queries.shape[2])
        return scores

    def _weighted_values(self, layer: int, weights: Tensor, view: _WindowView) -> Tensor:
        """Values weighted by `weights` `[n, K, R, longest prompt + longest completion]`: `[n, K, R, Cv]`."""
        split = view.longest_prompt
        output = self._completions.weighted_values(layer, weights[..., split:], view.completion_buckets)
        shared = self._prompts.weighted_values(layer, self._group_by_prompt(weights[..., :split]), view.prompt_buckets)
        output += self._ungroup(shared, weights.shape[2])
        return output

    def _group_by_prompt(self, x: Tensor) -> Tensor:
        """Reshape `[n, K, R, c]` to `[G, K, width * R, c]`: a prompt's sequences side by side, padded with zeros."""
        flat = x.new_zeros(len(self._prompt_lengths) * self._width, *x.shape[1:])
        flat[self._cells] = x
        table = flat.view(len(self._prompt_lengths), self._width, *x.shape[1:])
        return table.transpose(1, 2).flatten(2, 3)

    def _ungroup(self, x: Tensor, repeats: int) -> Tensor:
        """Invert `_group_by_prompt`: `[G, K, width * R, c]` to `[n, K, R, c]`."""
        groups, heads, _, size = x.shape
        flat = x.view(groups, heads, self._width, repeats, size).transpose(1, 2).flatten(0, 1)
        return flat[self._cells]


def _table_cells(parents: Sequence[int]) -> tuple[Tensor, int]:
    """Each sequence's cell `[n]` in a flattened `[prompts, width]`; its width is the most sequences of a prompt."""
    counts: dict[int, int] = {}
    ranks = []
    for parent in parents:
        ranks.append(counts.get(parent, 0))
        counts[parent] = ranks[-1] + 1
    width = max(counts.values())
    return torch.tensor(parents) * width + torch.tensor(ranks), width
