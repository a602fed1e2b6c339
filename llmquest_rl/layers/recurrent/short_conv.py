"""Short causal convolution over packed sequences, one filter for each channel (Fu et al. 2023, arXiv:2212.14052, 3.1).

A token sees itself and the `width - 1` inputs before it, its segment's parent included; before a sequence are zeros.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquest_rl.batch import Layout


class _ConvIndex(NamedTuple):
    """Where the tokens of a layout lie if `width - 1` rows are put before every segment."""

    tokens: Tensor
    """[tokens]: the row of each."""
    inherited: Tensor
    """Rows before a segment that hold tokens of its parent."""
    sources: Tensor
    """The rows of those tokens, where they lie in the parent."""
    state_rows: Tensor
    """[segments, width - 1]: the last rows of each segment, with what is before it where it is shorter."""


class ShortConv(nn.Module):
    """`y[t] = sum over j of weight[j] * x[t - width + 1 + j]`, for each channel, without bias."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))  # the shape that `nn.Conv1d` keeps it in
        self.width = width

    def forward(self, x: Tensor, layout: Layout, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve. Products and sums are float32, rounded to the dtype of `x` once.

        Args:
            x: Packed inputs [T, channels].
            layout: Their segments.
            tail: The `width - 1` inputs before each of T sequences, oldest first [T, width - 1, channels]: then `x` is
                the next token of each. None: sequences start here.

        Returns:
            Outputs [T, channels], and the tail after each segment [segments, width - 1, channels].
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
@torch.inference_mode(False)  # what generation asks for first has to serve training too
def _conv_index(layout: Layout, width: int, device: torch.device) -> _ConvIndex:
    """The layers of a model, which ask one after the other, share them. Parents have no parents."""
    before = width - 1
    lengths, parents = (torch.tensor(numbers, dtype=torch.long) for numbers in (layout.lengths, layout.parents))
    starts = lengths.cumsum(0) - lengths + before * torch.arange(1, len(lengths) + 1)  # of each segment's first token
    tokens = torch.arange(int(lengths.sum())) + (before * torch.arange(1, len(lengths) + 1)).repeat_interleave(lengths)
    ends = starts + lengths
    back = torch.arange(-before, 0)
    inherits = (parents >= 0)[:, None] & (back >= -lengths[parents][:, None])
    inherited, sources = starts[:, None] + back, ends[parents][:, None] + back
    index = (tokens, inherited[inherits], sources[inherits], ends[:, None] + back)
    return _ConvIndex(*(x.to(device) for x in index))
