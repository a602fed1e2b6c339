"""Weights rounded as a quantised engine holds them: to see what its mismatch with the learner does, not to save memory.

Symmetric, with one scale for each row (output feature), round to nearest: the usual scheme of integer weights without
calibration (Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, section 2.1, absmax by rows). Embeddings and output
layer stay as they are, as engines leave them.
"""

import torch
from torch import Tensor, nn

from llmquest_rl.layers.moe.experts import RoutedExperts


@torch.no_grad()
def fake_quantize_model(model: nn.Module, bits: int) -> None:
    """Round every linear layer's and expert's weights in place to `2^bits - 1` levels."""
    for module in model.modules():
        if isinstance(module, nn.Linear | RoutedExperts):
            for weight in module.parameters(recurse=False):
                if weight.ndim >= 2:
                    weight.copy_(fake_quantize(weight, bits))


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    """`weight` [..., rows, columns] on the grid of its rows."""
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(weight.dtype).tiny)
    nearest: Tensor = (weight / scale).round().clamp(-largest, largest) * scale
    return nearest
