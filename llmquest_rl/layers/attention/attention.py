"""The attention interface that model layers use, and its packed form for training.

The contexts of generation, which read and write a cache, are in `layers/attention/cache.py`. Inputs and outputs are
packed: the caller never sees padding.
"""

from typing import Protocol

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.cpu import BucketedAttention
from llmquest_rl.layers.attention.gpu import FlexAttention
from llmquest_rl.layers.attention.scores import ScoreOptions


class AttentionContext(Protocol):
    """Gives a model's layers access to earlier tokens: those of the same batch, or those in a cache.

    An attention layer calls `attend`; a recurrent layer calls `load_state` and `store_state`.
    """

    @property
    def is_decoding(self) -> bool:
        """True: the batch is one new token of each cached sequence. False: the batch is whole packed sequences."""
        ...

    @property
    def layout(self) -> Layout:
        """The segments of the packed tokens. During decoding each row is a segment of one token without a parent."""
        ...

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
        """Attention output `[tokens, heads, value_dim]`.

        Args:
            layer: Index of the calling layer; a cache stores keys and values under it.
            q: Queries `[tokens, heads, head_dim]`, with positions already applied.
            k: Keys `[tokens, kv_heads, head_dim]`; query head h reads kv head `h // (heads / kv_heads)`.
            v: Values `[tokens, kv_heads, value_dim]`; None = the keys serve as values.
            scale: Multiplies the scores before the softmax.
            window: A token attends to the last `window` positions, itself included; None = all.
            softcap: Scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2, arXiv:2408.00118, 2).
            sinks: Logits `[heads]`: one extra logit without a value in each head's softmax (gpt-oss, arXiv:2508.10925).
            cache_entry: Tensor `[tokens, 1, size]` that a cache stores instead of keys and values (DeepSeek-V2,
                arXiv:2405.04434, 2.1). During decoding the layer passes it as `k` with `v=None`, and projects its
                queries onto it.
        """
        ...

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """The recurrent state of each row, as tensors `[rows, ...]`; None = all sequences start with this batch."""
        ...

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """Store the state after the last token of each segment, as tensors `[segments, ...]`."""
        ...


class PackedAttention:
    """Causal attention within each segment of a layout and over the segment's parent.

    One context serves all layers of a batch. Index tensors and masks are built on the first use of each window and
    shared by all layers with that window.
    """

    is_decoding = False

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        assert all(parent < 0 or layout.parents[parent] < 0 for parent in layout.parents), "a parent has no parent"
        device = torch.device(device)
        self.layout = layout
        self._longest = 1 + int(layout.positions().max()) if layout.num_tokens else 0
        self._backend: BucketedAttention | FlexAttention = (
            FlexAttention if device.type == "cuda" else BucketedAttention
        )(layout, device)

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
        """See `AttentionContext.attend`. `layer` and `cache_entry` have no effect, because nothing is cached."""
        assert window is None or window > 0, f"window is {window}: a token attends at least to itself"
        values = k if v is None else v
        if not self.layout.num_tokens:  # the sum keeps the inputs in the graph, so that they get zero gradients
            return values.new_empty(0, q.shape[1], values.shape[2]) + (q.sum() + k.sum() + values.sum())
        hides = window is not None and window < self._longest
        return self._backend(q, k, values, window if hides else None, ScoreOptions(scale, softcap, sinks))

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Return None: every sequence starts with this batch."""
        return None

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """Do nothing: training does not continue from a state."""
