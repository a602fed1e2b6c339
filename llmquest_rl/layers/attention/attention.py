"""Attention over packed tokens, and the interface that it shares with the caches used in generation.

The packed form never pads what its caller sees.
"""

from typing import Protocol

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.cpu import BucketedAttention
from llmquest_rl.layers.attention.gpu import FlexAttention
from llmquest_rl.layers.attention.scores import ScoreOptions


class AttentionContext(Protocol):
    """What a model's layers need from the outside: which earlier tokens each token sees, and what was kept of them.

    A layer uses either `attend` or the pair `load_state` and `store_state`.
    """

    @property
    def is_decoding(self) -> bool:
        """False: whole packed sequences. True: one new token of each sequence, which continues what is kept."""
        ...

    @property
    def layout(self) -> Layout:
        """The segments of the packed tokens; while decoding each row is a segment of one token without a parent."""
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
        """Attention output [tokens, heads, value_dim].

        Args:
            layer: Index of the layer that asks; a cache keeps keys and values by it.
            q: Queries [tokens, heads, head_dim], positions already applied.
            k: Keys [tokens, kv_heads, head_dim]; query head h reads kv head `h // (heads / kv_heads)`.
            v: Values [tokens, kv_heads, value_dim]; None = the keys are the values.
            scale: Multiplies the scores before the softmax.
            window: A token sees the last `window` positions, itself included; None = all.
            softcap: Scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2, arXiv:2408.00118, 2).
            sinks: Logits [heads], one more in each head's softmax, which has no value (gpt-oss, arXiv:2508.10925).
            kept: What a cache keeps in place of keys and values [tokens, 1, size] (DeepSeek-V2, arXiv:2405.04434,
                2.1): while decoding such a layer passes it as `k`, `v=None`, and queries projected onto it.
        """
        ...

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """The recurrent state that each row continues (first dimension = rows); None = sequences start here."""
        ...

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """Keep the state after the last token of each segment (first dimension = segments; rows while decoding)."""
        ...


class PackedAttention:
    """Causal attention within each segment of a layout, which continues its parent. Nothing else is seen.

    Built once for a batch: index tensors and masks are made for each window when it is first asked for, and shared by
    all layers that have it.
    """

    is_decoding = False

    def __init__(self, layout: Layout, device: torch.device | str) -> None:
        assert all(parent < 0 or layout.parents[parent] < 0 for parent in layout.parents), "parents have no parents"
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
        """See `AttentionContext.attend`; every layer is treated alike, and `kept` is of no use here."""
        assert window is None or window > 0, "a token sees itself at least"
        values = k if v is None else v
        if not self.layout.num_tokens:  # nothing to compute, but what made the inputs gets gradients, of zero
            return values.new_empty(0, q.shape[1], values.shape[2]) + (q.sum() + k.sum() + values.sum())
        hides = window is not None and window < self._longest
        return self._backend(q, k, values, window if hides else None, ScoreOptions(scale, softcap, sinks))

    def load_state(self, layer: int) -> tuple[Tensor, ...] | None:
        """Nothing is kept: every sequence starts here."""
        return None

    def store_state(self, layer: int, state: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""
