"""Options of an attention layer's scores: the scale, a soft cap and attention sinks."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreOptions(NamedTuple):
    """The score options of one layer. `AttentionContext.attend` describes the fields."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """Logits of the attention sinks `[heads]`; None = no sinks."""

    @property
    def is_scale_only(self) -> bool:
        """True if scores are only scaled, which is all that fused kernels support."""
        return self.softcap is None and self.sinks is None

    def apply_softcap(self, scores: Tensor) -> Tensor:
        """Squash scaled scores of any shape with tanh, so that none exceeds the soft cap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def apply_sinks(self, out: Tensor, logsumexp: Tensor) -> Tensor:
        """Rescale the output of a softmax over the keys alone to the output of a softmax with sinks.

        Let S be the sum of exp(score) over the keys. With one more logit `sink` in the softmax, each key keeps the
        fraction S / (S + exp(sink)) = sigmoid(log S - sink) of its weight. So no column is added to the scores.

        Args:
            out: Attention output without sinks `[..., heads, value_dim]`; float32 for full precision.
            logsumexp: log S `[..., heads]`.

        Returns:
            Attention output with sinks `[..., heads, value_dim]`.
        """
        if self.sinks is None:
            return out
        return out * torch.sigmoid(logsumexp - self.sinks.float()).unsqueeze(-1)
