"""Storage for generation: what is kept of each sequence, in equal slots without holes.

Slots `0 .. n-1` are in use, so that a batched product over all sequences is one view of one tensor, with nothing
gathered and nothing copied. Each layer's storage is made when the layer first writes, in that layer's own shape:

* keys and values, two tensors [slots, K, room, C] and [slots, K, room, Cv];
* one tensor [slots, 1, room, L] where the values are the keys (latent attention);
* recurrent states, tensors [slots, ...] of any shape.

`room` is the capacity, or less for a layer with a window. Keys and values are float32 whatever the model's dtype:
batched products round their results to the dtype of their inputs, and scores in bfloat16 would cost the log-probs two
digits. States keep the dtype they come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PADDING_TOKENS = 512
"""Padding tokens that a bucket may hold before another call is cheaper: reading one token's keys takes about 0.1 us."""


@dataclass(frozen=True, slots=True)
class SlotBucket:
    """Neighbouring slots that are attended in one call, as if each held `length` tokens."""

    start: int
    stop: int
    length: int


def slot_buckets(lengths: Sequence[int]) -> list[SlotBucket]:
    """Split slots into runs of similar length: as few as keep the padding of each below `CALL_COST` tokens."""
    buckets: list[SlotBucket] = []
    start, longest, total = 0, 0, 0
    for slot, length in enumerate(lengths):
        widest = max(longest, length)
        if widest * (slot + 1 - start) - total - length > MAX_PADDING_TOKENS:
            buckets.append(SlotBucket(start, slot, longest))
            start, widest, total = slot, length, 0
        longest, total = widest, total + length
    if len(lengths) > start:
        buckets.append(SlotBucket(start, len(lengths), longest))
    return buckets


class SlotCache:
    """What every layer keeps, in slots of equal capacity."""

    def __init__(self, slots: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.slots = slots
        self.capacity = capacity
        self.device = device
        self._tokens: dict[int, tuple[Tensor, ...]] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory reserved. On a CPU the system hands out a page when it is first written."""
        entries = [*self._tokens.values(), *self._states.values()]
        return sum(tensor.nbytes for tensors in entries for tensor in tensors)

    def write(self, layer: int, slots: Tensor, offsets: Tensor, entries: Sequence[Tensor], capacity: int) -> None:
        """Store (keys, values) or the one tensor that is both, [tokens, K, C] each.

        Args:
            layer: Index of the layer.
            slots: Slot of each token [tokens].
            places: Index of each token in its slot [tokens], below `room`.
            kept: What to store.
            room: Tokens for which the layer has room in each slot, the same at every call.
        """
        if layer not in self._tokens:
            # Zeros, because a weight of zero does not silence the NaN that fresh memory may hold.
            shapes = [(self.slots, x.shape[1], capacity, x.shape[2]) for x in entries]
            self._tokens[layer] = tuple(torch.zeros(shape, device=self.device) for shape in shapes)
        for tensor, x in zip(self._tokens[layer], entries, strict=True):
            tensor[slots, :, offsets] = x.float()

    def write_states(self, layer: int, slots: Tensor | slice, states: Sequence[Tensor]) -> None:
        """Store recurrent states, the first dimension of each being that of `slots`."""
        if layer not in self._states:
            shapes = [(self.slots, *x.shape[1:]) for x in states]
            self._states[layer] = tuple(
                torch.zeros(shape, dtype=x.dtype, device=self.device) for shape, x in zip(shapes, states, strict=True)
            )
        for tensor, x in zip(self._states[layer], states, strict=True):
            tensor[slots] = x

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """The states of all slots [slots, ...]."""
        return self._states[layer]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot, or as many as a layer keeps, and its states over another."""
        for tokens in self._tokens.values():
            for tensor in tokens:
                tensor[target, :, :length] = tensor[source, :, :length]
        for states in self._states.values():
            for tensor in states:
                tensor[target] = tensor[source]

    def scores(self, layer: int, q: Tensor, buckets: Sequence[SlotBucket], out: Tensor) -> None:
        """Dot products of `q` [slots in use, K, rows, C] with the keys, into `out` [slots in use, K, rows, longest]."""
        keys = self._tokens[layer][0]
        for bucket in buckets:
            rows = slice(bucket.start, bucket.stop)
            shape = (bucket.stop - bucket.start, *q.shape[1:3], bucket.length)
            products = torch.bmm(q[rows].flatten(0, 1), keys[rows, :, : bucket.length].flatten(0, 1).transpose(1, 2))
            out[rows, ..., : bucket.length] = products.view(shape)

    def weighted_values(self, layer: int, weights: Tensor, buckets: Sequence[SlotBucket]) -> Tensor:
        """Values weighted by `weights` [slots in use, K, rows, longest]: [slots in use, K, rows, Cv]."""
        values = self._tokens[layer][-1]
        parts = []
        for bucket in buckets:
            rows = slice(bucket.start, bucket.stop)
            mine = weights[rows, ..., : bucket.length].flatten(0, 1)
            parts.append(torch.bmm(mine, values[rows, :, : bucket.length].flatten(0, 1)))
        return torch.cat(parts).view(*weights.shape[:3], -1)
