"""Cache storage for generation: keys, values and recurrent states of each sequence, in slots of equal size.

Slots `0 .. n-1` are in use, without holes. So a batched matrix product over all sequences reads a view of one tensor,
and nothing is gathered or copied. A layer's storage is allocated on the layer's first write, in one of these shapes:

* keys and values: two tensors `[slots, K, capacity, C]` and `[slots, K, capacity, Cv]`;
* keys that serve as values (latent attention): one tensor `[slots, 1, capacity, L]`;
* recurrent states: tensors `[slots, ...]` of any shape.

A layer with a window has a smaller capacity than the cache. Keys and values are float32 for any dtype of the model:
batched products round their results to the dtype of their inputs, and bfloat16 scores would cost the log-probs two
digits. States keep their dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_PADDING_TOKENS = 512
"""Maximum padding tokens per bucket. Beyond it another call is cheaper: reading one token's keys takes about 0.1 us."""


@dataclass(frozen=True, slots=True)
class SlotBucket:
    """Neighbouring slots `start .. stop-1` that are read in one call, as if each held `length` tokens."""

    start: int
    stop: int
    length: int


def slot_buckets(lengths: Sequence[int]) -> list[SlotBucket]:
    """Split slots into as few buckets as possible, with at most `MAX_PADDING_TOKENS` tokens of padding in each."""
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
    """The cache of all layers, in slots of equal capacity."""

    def __init__(self, slots: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.slots = slots
        self.capacity = capacity
        self.device = device
        self._tokens: dict[int, tuple[Tensor, ...]] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}

    @property
    def num_bytes(self) -> int:
        """Reserved memory in bytes. On a CPU the operating system provides a page on its first write."""
        entries = [*self._tokens.values(), *self._states.values()]
        return sum(tensor.nbytes for tensors in entries for tensor in tensors)

    def write(self, layer: int, slots: Tensor, offsets: Tensor, entries: Sequence[Tensor], capacity: int) -> None:
        """Store (keys, values) or the one tensor that is both, `[tokens, K, C]` each.

        Args:
            layer: Index of the layer.
            slots: Slot of each token `[tokens]`.
            offsets: Index of each token in its slot `[tokens]`, below `capacity`.
            entries: Keys and values, or the one tensor.
            capacity: Tokens that the layer stores in each slot; the same at every call.
        """
        if layer not in self._tokens:
            # Zeros, because fresh memory may hold NaN, and zero times NaN is NaN.
            shapes = [(self.slots, x.shape[1], capacity, x.shape[2]) for x in entries]
            self._tokens[layer] = tuple(torch.zeros(shape, device=self.device) for shape in shapes)
        for tensor, x in zip(self._tokens[layer], entries, strict=True):
            tensor[slots, :, offsets] = x.float()

    def write_states(self, layer: int, slots: Tensor | slice, states: Sequence[Tensor]) -> None:
        """Store recurrent states `[len(slots), ...]`, one tensor for each state of the layer."""
        if layer not in self._states:
            shapes = [(self.slots, *x.shape[1:]) for x in states]
            self._states[layer] = tuple(
                torch.zeros(shape, dtype=x.dtype, device=self.device) for shape, x in zip(shapes, states, strict=True)
            )
        for tensor, x in zip(self._states[layer], states, strict=True):
            tensor[slots] = x

    def states(self, layer: int) -> tuple[Tensor, ...]:
        """The states of all slots `[slots, ...]`."""
        return self._states[layer]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot over another: its first `length` tokens, or as many as a layer stores, and its states."""
        for tokens in self._tokens.values():
            for tensor in tokens:
                tensor[target, :, :length] = tensor[source, :, :length]
        for states in self._states.values():
            for tensor in states:
                tensor[target] = tensor[source]

    def scores(self, layer: int, q: Tensor, buckets: Sequence[SlotBucket], out: Tensor) -> None:
        """Write the scores of `q` `[used slots, K, rows, C]` on the keys to `out` `[used slots, K, rows, longest]`."""
        keys = self._tokens[layer][0]
        for bucket in buckets:
            rows = slice(bucket.start, bucket.stop)
            shape = (bucket.stop - bucket.start, *q.shape[1:3], bucket.length)
            products = torch.bmm(q[rows].flatten(0, 1), keys[rows, :, : bucket.length].flatten(0, 1).transpose(1, 2))
            out[rows, ..., : bucket.length] = products.view(shape)

    def weighted_values(self, layer: int, weights: Tensor, buckets: Sequence[SlotBucket]) -> Tensor:
        """Sum values `[used slots, K, rows, Cv]` with `weights` `[used slots, K, rows, longest]`."""
        values = self._tokens[layer][-1]
        parts = []
        for bucket in buckets:
            rows = slice(bucket.start, bucket.stop)
            mine = weights[rows, ..., : bucket.length].flatten(0, 1)
            parts.append(torch.bmm(mine, values[rows, :, : bucket.length].flatten(0, 1)))
        return torch.cat(parts).view(*weights.shape[:3], -1)
