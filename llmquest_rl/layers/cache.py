"""Keys and values kept between forwards, and the attention contexts that write and read them.

Storage comes in equal slots without holes: slots `0 .. n-1` are in use, so that a batched product over all sequences is
one view of one tensor, with nothing gathered and nothing copied. A prompt has one slot, whatever the number of its
completions; the tokens of each completion have another. Decoding scores every prompt once for all the completions that
share it, every completion's own tokens once, and takes one softmax over both.

Each layer's storage is made when the layer first writes, in that layer's own shape. What is kept is float32 whatever
the model's dtype: batched products round their results to the dtype of their inputs, and scores in bfloat16 would cost
the log-probs two digits.

Shapes: n sequences, G prompts, H query heads, K key/value heads, R = H / K query heads on one of them, C head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention import PackedAttention

CALL_COST = 512
"""Padding tokens that a bucket may hold before another call is cheaper: reading one token's keys takes about 0.1 us."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbouring slots that are attended in one call, as if each held `length` tokens."""

    start: int
    stop: int
    length: int


def buckets(lengths: Sequence[int]) -> list[Bucket]:
    """Split slots into runs of similar length: as few as keep the padding of each below `CALL_COST` tokens."""
    runs: list[Bucket] = []
    start, longest, total = 0, 0, 0
    for slot, length in enumerate(lengths):
        widest = max(longest, length)
        if widest * (slot + 1 - start) - total - length > CALL_COST:
            runs.append(Bucket(start, slot, longest))
            start, widest, total = slot, length, 0
        longest, total = widest, total + length
    if len(lengths) > start:
        runs.append(Bucket(start, len(lengths), longest))
    return runs


class SlotCache:
    """Keys and values of every layer in slots of equal capacity: [slots, K, capacity, C] for each."""

    def __init__(self, slots: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.slots = slots
        self.capacity = capacity
        self.device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory reserved. On a CPU the system hands out a page when it is first written."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)

    def write(self, layer: int, slots: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v` [tokens, K, C] at `positions` [tokens] of `slots` [tokens]."""
        if layer not in self._layers:
            # Zeros, because a weight of zero does not silence the NaN that fresh memory may hold.
            self._layers[layer] = (self._zeros(k), self._zeros(v))
        keys, values = self._layers[layer]
        keys[slots, :, positions] = k.float()
        values[slots, :, positions] = v.float()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot over another."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[target, :, :length] = tensor[source, :, :length]

    def scores(self, layer: int, q: Tensor, runs: Sequence[Bucket], out: Tensor) -> None:
        """Dot products of `q` [slots in use, K, rows, C] with the keys, into `out` [slots in use, K, rows, longest]."""
        keys = self._layers[layer][0]
        for run in runs:
            rows = slice(run.start, run.stop)
            shape = (run.stop - run.start, *q.shape[1:3], run.length)
            products = torch.bmm(q[rows].flatten(0, 1), keys[rows, :, : run.length].flatten(0, 1).transpose(1, 2))
            out[rows, ..., : run.length] = products.view(shape)

    def mix(self, layer: int, weights: Tensor, runs: Sequence[Bucket]) -> Tensor:
        """Values weighted by `weights` [slots in use, K, rows, longest]: [slots in use, K, rows, C]."""
        values = self._layers[layer][1]
        parts = []
        for run in runs:
            rows = slice(run.start, run.stop)
            mine = weights[rows, ..., : run.length].flatten(0, 1)
            parts.append(torch.bmm(mine, values[rows, :, : run.length].flatten(0, 1)))
        return torch.cat(parts).view(*weights.shape[:3], -1)

    def _zeros(self, sample: Tensor) -> Tensor:
        heads, size = sample.shape[1:]
        return torch.zeros(self.slots, heads, self.capacity, size, dtype=torch.float32, device=self.device)


class Prefill:
    """Context of a forward over whole prompts, packed: plain causal attention that also keeps keys and values."""

    def __init__(self, prompts: SlotCache, layout: Layout, slots: Sequence[int]) -> None:
        """Prepare for the prompts of `layout`, one segment each, to be kept in `slots`."""
        lengths = torch.tensor(layout.lengths)
        self._prompts = prompts
        self._attention = PackedAttention(layout, prompts.device)
        self._positions = layout.positions().to(prompts.device)
        self._slots = torch.tensor(slots).repeat_interleave(lengths).to(prompts.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `AttentionContext.attend`."""
        self._prompts.write(layer, self._slots, self._positions, k, v)
        return self._attention.attend(layer, q, k, v, scale)


class Decode:
    """Context of a forward over one new token for each of n sequences, which see their prompt and their own tokens."""

    def __init__(
        self,
        prompts: SlotCache,
        prompt_lengths: Sequence[int],
        tails: SlotCache,
        tail_lengths: Sequence[int],
        parents: Sequence[int],
    ) -> None:
        """Prepare the index tensors and masks that all layers share.

        Args:
            prompts: Where the prompts are kept.
            prompt_lengths: Tokens of each prompt [G], in slot order.
            tails: Where the completions are kept: sequence i in slot i.
            tail_lengths: Tokens of each completion [n] already in there, without the new one.
            parents: Prompt slot of each sequence [n].
        """
        device = tails.device
        self._prompts, self._tails = prompts, tails
        self._prompt_runs = buckets(prompt_lengths)
        self._tail_runs = buckets([length + 1 for length in tail_lengths])
        self._num_prompts, self._longest_prompt = len(prompt_lengths), max(prompt_lengths)
        tail_length = torch.tensor(tail_lengths)
        parent = torch.tensor(parents)
        self._rows = torch.arange(len(parents), device=device)
        self._new = tail_length.to(device)
        self._place, self._width = _places(parents)
        self._place = self._place.to(device)
        in_prompt = torch.arange(self._longest_prompt) < torch.tensor(prompt_lengths)[parent][:, None]
        in_tail = torch.arange(int(tail_length.max()) + 1) <= tail_length[:, None]
        self._hidden = ~torch.cat((in_prompt, in_tail), 1)[:, None, None].to(device)  # [n, 1, 1, prompt + tail]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `AttentionContext.attend`."""
        self._tails.write(layer, self._rows, self._new, k, v)
        own = q.float().mul(scale).view(len(q), k.shape[1], -1, q.shape[-1])  # [n, K, R, C]
        split = self._longest_prompt
        scores = own.new_empty(*own.shape[:3], self._hidden.shape[-1])
        self._tails.scores(layer, own, self._tail_runs, scores[..., split:])
        shared = own.new_empty(self._num_prompts, own.shape[1], self._width * own.shape[2], split)
        self._prompts.scores(layer, self._by_prompt(own), self._prompt_runs, shared)
        scores[..., :split] = self._by_sequence(shared, own.shape[2])
        weights = scores.masked_fill_(self._hidden, float("-inf")).softmax(-1)
        mixed = self._tails.mix(layer, weights[..., split:], self._tail_runs)
        shared = self._prompts.mix(layer, self._by_prompt(weights[..., :split]), self._prompt_runs)
        mixed += self._by_sequence(shared, own.shape[2])
        return mixed.flatten(1, 2).to(q.dtype)

    def _by_prompt(self, x: Tensor) -> Tensor:
        """[n, K, R, c] to [G, K, width * R, c]: a prompt's sequences side by side, with zeros up to width."""
        places = x.new_zeros(self._num_prompts * self._width, *x.shape[1:])
        places[self._place] = x
        return places.view(self._num_prompts, self._width, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

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
