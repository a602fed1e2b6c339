"""Packed attention on GPUs with FlexAttention (Dong et al. 2024, arXiv:2412.05496).

One kernel visits only the blocks of the packed batch that hold visible (query, key) pairs.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.scores import ScoreOptions

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps index tensors (batch, head, query, key) to True where packed token `query` may attend to packed token `key`."""


class FlexAttention:
    """Attention through `flex_attention`, with one block mask per window that all layers share."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._block_masks: dict[int | None, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None, options: ScoreOptions) -> Tensor:
        """See `AttentionContext.attend`."""
        return flex_attend(_compiled_flex_attention(), self._block_mask(window), q, k, v, options)

    def _block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if window not in self._block_masks:
            size, test = self._layout.num_tokens, build_mask_mod(self._layout, window, self._device)
            self._block_masks[window] = create_block_mask(test, None, None, size, size, device=self._device)
        return self._block_masks[window]


def build_mask_mod(layout: Layout, window: int | None, device: torch.device | str) -> MaskMod:
    """Build the mask function of a layout; its index tensors may have any shapes that broadcast."""
    lengths = torch.tensor(layout.lengths, dtype=torch.long)
    segments = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    parents = torch.tensor(layout.parents, dtype=torch.long).repeat_interleave(lengths).to(device)
    positions = layout.positions().to(device)

    def in_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segments[query] == segments[key]) & (key <= query)
        return same | (parents[query] == segments[key])

    if window is None:
        return in_sequence
    oldest = positions - window  # the last position outside each query's window

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_sequence(batch, head, query, key) & (positions[key] > oldest[query])

    return in_window


def flex_attend(flex_attention: Any, block_mask: Any, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
    """Call `flex_attention`, compiled or not, on packed tokens.

    Args:
        flex_attention: The function of `torch.nn.attention.flex_attention`, or its compiled form.
        block_mask: Block mask of the layout and the window.
        q: Queries `[tokens, heads, head_dim]`.
        k: Keys `[tokens, kv_heads, head_dim]`.
        v: Values `[tokens, kv_heads, value_dim]`.
        options: Scale, soft cap and sinks.

    Returns:
        Attention output `[tokens, heads, value_dim]`.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = flex_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        score_mod=None if options.softcap is None else _softcap_score_mod(options.softcap),
        block_mask=block_mask,
        scale=options.scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=options.sinks is not None),
    )
    result: Tensor = out[0].transpose(0, 1)
    if options.sinks is not None:
        result = options.apply_sinks(result.float(), aux.lse[0].transpose(0, 1)).to(q.dtype)
    return result


@cache
def _softcap_score_mod(softcap: float) -> Callable[..., Tensor]:
    """Return the score function of a cap. It is cached, because a new function object would compile a new kernel."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
