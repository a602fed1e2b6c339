"""The frozen reference model of a KL term: syncs it to the policy, saves and loads it."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from llmquest_rl.models.base import Model
from llmquest_rl.models.weight_map import named_weights

FILE = "reference.pt"


@torch.no_grad()
def sync_reference(reference: Model, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy the policy's weights, given by our names, into the reference."""
    ours = dict(named_weights(reference))
    for name, weight in weights:
        ours[name].copy_(weight)


def save_reference(reference: Model, folder: Path) -> None:
    """Write the reference's weights."""
    torch.save(dict(named_weights(reference)), folder / FILE)


def load_reference(reference: Model, folder: Path) -> None:
    """Load the weights that `save_reference` wrote."""
    sync_reference(reference, torch.load(folder / FILE, map_location="cpu", weights_only=True).items())
