"""What turns dot products into attention weights beyond scale and softmax: a soft cap and attention sinks."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreOptions(NamedTuple):
    """How a layer scores; see `AttentionContext.attend` for the fields."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """[heads]."""

    @property
    def is_scale_only(self) -> bool:
        """Whether scores are scaled and nothing else, as in the fused kernels."""
        return self.softcap is None and self.sinks is None

    def apply_softcap(self, scores: Tensor) -> Tensor:
        """Scaled scores of any shape, bent so that none exceeds the soft cap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def apply_sinks(self, out: Tensor, logsumexp: Tensor) -> Tensor:
        """`out` [..., heads, value_dim] of a softmax over the keys alone, less the weight that the sinks draw.

        With S the sum of exp(score) over the keys, a softmax that has one more logit `sink` gives each key S / (S +
        exp(sink)) = sigmoid(log S - sink) of the weight it had: no column is added to the scores.

        Args:
            out: Float32 for full precision.
            logsumexp: log S [..., heads].
        """
        if self.sinks is None:
            return out
        return out * torch.sigmoid(logsumexp - self.sinks.float()).unsqueeze(-1)
