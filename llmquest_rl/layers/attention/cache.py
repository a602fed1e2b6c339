"""The attention contexts of generation, which write and read what is kept of earlier tokens.

A prompt has one slot, whatever the number of its completions; the tokens of each completion have another. Decoding
scores every prompt once for all the completions that share it, every completion's own tokens once, and takes one
softmax over both.

A layer with a window of W tokens keeps the last W - 1 tokens of a prompt and a ring of the last W of a completion. A
prompt's tokens lie newest first: the part of it that a window still reaches shrinks as a completion grows, and is
always at the start of the slot. A ring holds nothing but what the window sees, so that order is of no account there.

Shapes: n sequences, G prompts, H query heads, K key/value heads, R = H / K query heads on one of them, C head size,
Cv size of a value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.attention.cache_slots import Bucket, SlotCache, buckets
from llmquest_rl.layers.attention.scores import Scoring


class _Kept(NamedTuple):
    """Which tokens of a pack are kept, and where: index tensors of equal length."""

    rows: Tensor
    slots: Tensor
    places: Tensor


class Prefill:
    """Context of a forward over whole prompts, packed: plain causal attention that also keeps what decoding reads."""

    decodes = False

    def __init__(self, prompts: SlotCache, layout: Layout, slots: Sequence[int]) -> None:
        """Prepare for the prompts of `layout`, one segment each, to be kept in `slots`."""
        lengths = torch.tensor(layout.lengths)
        self.layout = layout
        self._prompts = prompts
        self._attention = PackedAttention(layout, prompts.device)
        self._segment_slots = torch.tensor(slots)
        self._slots = self._segment_slots.repeat_interleave(lengths)
        self._places = lengths.repeat_interleave(lengths) - 1 - layout.positions()  # newest first
        self._kept: dict[int, _Kept] = {}

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
        kept: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        capacity = self._prompts.capacity
        room = capacity if window is None else min(window - 1, capacity)
        rows, slots, places = self._kept_in(room)
        keep = (kept,) if kept is not None else (k,) if v is None else (k, v)
        self._prompts.write(layer, slots, places, [x.index_select(0, rows) for x in keep], room)
        return self._attention.attend(layer, q, k, v, scale, window=window, softcap=softcap, sinks=sinks)

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Nothing is kept yet: every prompt starts here."""
        return None

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """See `AttentionContext.store_state`."""
        self._prompts.write_states(layer, self._segment_slots.to(self._prompts.device), state)

    def _kept_in(self, room: int) -> _Kept:
        if room not in self._kept:
            rows = (self._places < room).nonzero().squeeze(-1)
            index = (rows, self._slots[rows], self._places[rows])
            self._kept[room] = _Kept(*(x.to(self._prompts.device) for x in index))
        return self._kept[room]


@dataclass(frozen=True)
class _View:
    """What the sequences see through one window: shared by all layers that have it."""

    prompt_runs: list[Bucket]
    tail_runs: list[Bucket]
    longest_prompt: int
    """Most tokens read of a prompt."""
    tail_room: int
    new: Tensor
    """[n]: where each sequence's new token goes."""
    hidden: Tensor
    """Bool [n, 1, 1, longest prompt + longest tail]."""


class Decode:
    """Context of a forward over one new token for each of n sequences, which see their prompt and their own tokens."""

    decodes = True

    def __init__(
        self,
        prompts: SlotCache,
        prompt_lengths: Sequence[int],
        tails: SlotCache,
        tail_lengths: Sequence[int],
        parents: Sequence[int],
    ) -> None:
        """Prepare what all layers share.

        Args:
            prompts: Where the prompts are kept.
            prompt_lengths: Tokens of each prompt [G], in slot order.
            tails: Where the completions are kept: sequence i in slot i.
            tail_lengths: Tokens of each completion [n] already in there, without the new one.
            parents: Prompt slot of each sequence [n].
        """
        self.layout = Layout((1,) * len(parents), (-1,) * len(parents))
        self._prompts, self._tails = prompts, tails
        self._prompt_lengths, self._tail_lengths, self._parents = prompt_lengths, tail_lengths, parents
        self._rows = torch.arange(len(parents), device=tails.device)
        first = torch.tensor([row for row, length in enumerate(tail_lengths) if length == 0], dtype=torch.long)
        self._first = first.to(tails.device)
        self._first_parents = torch.tensor(parents)[first].to(prompts.device)
        place, self._width = _places(parents)
        self._place = place.to(tails.device)
        self._views: dict[int, _View] = {}

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
        kept: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        assert kept is None or (kept is k and v is None), "while decoding, what is kept is what is attended"
        view, scoring = self._view(window), Scoring(scale, softcap, sinks)
        self._tails.write(layer, self._rows, view.new, (k,) if v is None else (k, v), view.tail_room)
        own = q.float().mul(scale).view(len(q), k.shape[1], -1, q.shape[-1])  # [n, K, R, C]
        scores = scoring.capped(self._scores(layer, own, view)).masked_fill_(view.hidden, float("-inf"))
        mixed = self._mix(layer, scores.softmax(-1), view).flatten(1, 2)  # [n, H, Cv]
        if sinks is not None:
            mixed = scoring.without_sink(mixed, scores.logsumexp(-1).flatten(1))
        return mixed.to(q.dtype)

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """See `AttentionContext.load_state`: a sequence's first step continues a copy of its prompt's state."""
        if len(self._first):
            start = [state[self._first_parents] for state in self._prompts.states(layer)]
            self._tails.write_states(layer, self._first, start)
        return tuple(state[: len(self._rows)] for state in self._tails.states(layer))

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """See `AttentionContext.store_state`."""
        self._tails.write_states(layer, slice(len(self._rows)), state)

    def _view(self, window: int | None) -> _View:
        everything = self._prompts.capacity + self._tails.capacity
        window = min(window or everything, everything)
        if window not in self._views:
            self._views[window] = self._make_view(window)
        return self._views[window]

    def _make_view(self, window: int) -> _View:
        """With its new token a completion of t tokens sees min(t, window) of them and window - t of its prompt."""
        device, tail_room = self._tails.device, min(window, self._tails.capacity)
        sizes = [length + 1 for length in self._tail_lengths]
        smallest: dict[int, int] = {}
        for slot, length in zip(self._parents, sizes, strict=True):
            smallest[slot] = min(length, smallest.get(slot, length))
        reach = [min(p, max(window - smallest.get(i, 1), 0)) for i, p in enumerate(self._prompt_lengths)]
        parent, size = torch.tensor(self._parents), torch.tensor(sizes)
        in_prompt = torch.minimum(torch.tensor(self._prompt_lengths)[parent], window - size)  # below 0 counts as 0
        in_tail = size.clamp(max=tail_room)
        prompt_shown = torch.arange(max(reach)) < in_prompt[:, None]
        tail_shown = torch.arange(int(in_tail.max())) < in_tail[:, None]
        return _View(
            prompt_runs=buckets(reach),
            tail_runs=buckets(in_tail.tolist()),
            longest_prompt=max(reach),
            tail_room=tail_room,
            new=((size - 1) % tail_room).to(device),
            hidden=~torch.cat((prompt_shown, tail_shown), 1)[:, None, None].to(device),
        )

    def _scores(self, layer: int, own: Tensor, view: _View) -> Tensor:
        """[n, K, R, longest prompt + longest tail]; what is hidden holds anything."""
        split = view.longest_prompt
        scores = own.new_empty(*own.shape[:3], view.hidden.shape[-1])
        self._tails.scores(layer, own, view.tail_runs, scores[..., split:])
        shared = own.new_empty(len(self._prompt_lengths), own.shape[1], self._width * own.shape[2], split)
        self._prompts.scores(layer, self._by_prompt(own), view.prompt_runs, shared)
        scores[..., :split] = self._by_sequence(shared, own.shape[2])
        return scores

    def _mix(self, layer: int, weights: Tensor, view: _View) -> Tensor:
        """[n, K, R, Cv]."""
        split = view.longest_prompt
        mixed = self._tails.mix(layer, weights[..., split:], view.tail_runs)
        shared = self._prompts.mix(layer, self._by_prompt(weights[..., :split]), view.prompt_runs)
        mixed += self._by_sequence(shared, weights.shape[2])
        return mixed

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[n, K, R, c] to [G, K, width * R, c]: a prompt's sequences side by side, with zeros up to width."""
        places = x.new_zeros(len(self._prompt_lengths) * self._width, *x.shape[1:])
        places[self._place] = x
        table = places.view(len(self._prompt_lengths), self._width, *x.shape[1:])
        return table.transpose(1, 2).flatten(2, 3)

    def _by_sequence(self, x: Tensor, repeats: int) -> Tensor:
        """The inverse: [G, K, width * R, c] to [n, K, R, c]."""
        groups, heads, _, size = x.shape
        places = x.view(groups, heads, self._width, repeats, size).transpose(1, 2).flatten(0, 1)
        return places[self._place]


def _places(parents: Sequence[int]) -> tuple[Tensor, int]:
    """Each sequence's place in a flattened [prompts, width] table [n], and the width, the most that a prompt has."""
    counts: dict[int, int] = {}
    ranks = []
    for parent in parents:
        ranks.append(counts.get(parent, 0))
        counts[parent] = ranks[-1] + 1
    width = max(counts.values())
    return torch.tensor(parents) * width + torch.tensor(ranks), width
