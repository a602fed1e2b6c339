"""Fake quantisation: rounds weights to the values that a quantised engine would use, but stores them as floats.

It serves to study the mismatch between a quantised engine and the learner, and saves no memory. The scheme is symmetric
round-to-nearest with one scale per row (output feature), the usual one for integer weights without calibration
(Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2.1, row-wise absmax). Embeddings and the output layer are
not rounded, as in quantised engines.
"""

import torch
from torch import Tensor, nn

from llmquest_rl.layers.moe.experts import RoutedExperts


@torch.no_grad()
def fake_quantize_model(model: nn.Module, bits: int) -> None:
    """Round the weights of all linear layers and experts in place to `2^bits - 1` levels per row."""
    for module in model.modules():
        if isinstance(module, nn.Linear | RoutedExperts):
            for weight in module.parameters(recurse=False):
                if weight.ndim >= 2:
                    weight.copy_(fake_quantize(weight, bits))


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """Round `weight` `[..., rows, columns]` to the quantisation grid of each row; returns the same shape."""
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(weight.dtype).tiny)
    nearest: Tensor = (weight / scale).round().clamp(-largest, largest) * scale
    return nearest
