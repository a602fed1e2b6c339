"""Optimizer groups: parameters with weight decay, and parameters without."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Make two optimizer groups: matrices with `weight_decay`; norms, biases and other vectors without.

    Frozen parameters are in neither group, and an empty group is left out. Call this before ZeRO-3 partitions the
    parameters, because it hides their shapes.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
