"""Short causal depthwise convolution over packed sequences (Fu et al. 2023, arXiv:2212.14052, section 3.1).

A token sees itself and the `width - 1` inputs before it, those of its segment's parent included. The inputs before a
sequence are zeros.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquest_rl.batch import Layout


class _ConvIndex(NamedTuple):
    """Rows of a layout's tokens after `width - 1` rows are inserted before every segment. All tensors are long."""

    tokens: Tensor
    """Row of each token `[tokens]`."""
    inherited: Tensor
    """Inserted rows that hold tokens of the segment's parent `[inherited]`."""
    sources: Tensor
    """Rows of the same tokens in the parent `[inherited]`."""
    state_rows: Tensor
    """Last rows of each segment `[segments, width - 1]`; they reach back before a segment shorter than that."""


class ShortConv(nn.Module):
    """Computes `y[t] = sum_j weight[j] * x[t - width + 1 + j]` for each channel, without bias."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))  # the weight shape of `nn.Conv1d`
        self.width = width

    def forward(self, x: Tensor, layout: Layout, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve. Products and sums are float32 and rounded once, to the dtype of `x`.

        Args:
            x: Packed inputs `[T, channels]`.
            layout: The segments of the inputs.
            state: The last `width - 1` inputs of each of T sequences, oldest first `[T, width - 1, channels]`; `x` is
                then the next token of each sequence. None = all sequences start with this batch.

        Returns:
            Outputs `[T, channels]`, and the state after each segment `[segments, width - 1, channels]`.
        """
        taps = self.weight.squeeze(1).float()  # [channels, width]
        if state is not None:
            seen = torch.cat((state.to(x.dtype), x.unsqueeze(1)), dim=1)
            return (seen.float() * taps.t()).sum(1).to(x.dtype), seen[:, 1:]
        index = _conv_index(layout, self.width, x.device)
        rows = x.new_zeros(x.shape[0] + len(layout.lengths) * (self.width - 1), x.shape[1])
        rows = rows.index_copy(0, index.tokens, x)
        if len(index.inherited):
            rows = rows.index_copy(0, index.inherited, rows.index_select(0, index.sources))
        wide, size = rows.float(), max(len(rows) - self.width + 1, 0)
        out = wide[:size] * taps[:, 0]
        for j in range(1, self.width):
            out = torch.addcmul(out, wide[j : j + size], taps[:, j])
        return out.index_select(0, index.tokens - self.width + 1).to(x.dtype), rows[index.state_rows]


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # a cached result of generation must be usable in training
def _conv_index(layout: Layout, width: int, device: torch.device) -> _ConvIndex:
    """Compute the rows of a layout. The result is cached, because all layers of a model use the same one."""
    before = width - 1
    lengths, parents = (torch.tensor(numbers, dtype=torch.long) for numbers in (layout.lengths, layout.parents))
    starts = (
        lengths.cumsum(0) - lengths + before * torch.arange(1, len(lengths) + 1)
    )  # row of each segment's first token
    tokens = torch.arange(int(lengths.sum())) + (before * torch.arange(1, len(lengths) + 1)).repeat_interleave(lengths)
    ends = starts + lengths
    back = torch.arange(-before, 0)
    inherits = (parents >= 0)[:, None] & (back >= -lengths[parents][:, None])
    inherited, sources = starts[:, None] + back, ends[parents][:, None] + back
    index = (tokens, inherited[inherits], sources[inherits], ends[:, None] + back)
    return _ConvIndex(*(x.to(device) for x in index))
