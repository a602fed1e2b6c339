"""Packed attention on a GPU: one FlexAttention kernel walks the blocks of the pack that hold visible pairs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.scores import ScoreOptions

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) to whether the packed token `query` may read the packed token `key`."""


class FlexAttention:
    """One block mask for each window, shared by all layers that have it."""

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
    """The test that tells which pairs of packed tokens are scored (index tensors that broadcast)."""
    lengths = torch.tensor(layout.lengths, dtype=torch.long)
    segments = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    parents = torch.tensor(layout.parents, dtype=torch.long).repeat_interleave(lengths).to(device)
    positions = layout.positions().to(device)

    def in_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (segments[query] == segments[key]) & (key <= query)
        return same | (parents[query] == segments[key])

    if window is None:
        return in_sequence
    oldest = positions - window  # of each query: the last position that it does not see

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return in_sequence(batch, head, query, key) & (positions[key] > oldest[query])

    return in_window


def flex_attend(flex_attention: Any, block_mask: Any, q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions) -> Tensor:
    """One call of `flex_attention`, compiled or not: [tokens, heads, value_dim]."""
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
    """The same function object for the same cap, so that the kernel is compiled once."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
