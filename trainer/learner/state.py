"""A learner's state besides model and optimizer: random number generators and the count of skipped updates."""

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmquest_rl.batch import SequenceGroup

log = logging.getLogger(__name__)


class TooManySkippedUpdatesError(RuntimeError):
    """Too many updates in a row had NaN or inf in loss or gradients."""


class SkippedUpdates:
    """Counts updates that were skipped, and stops the run after too many in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def record_skipped(self, update: int, groups: Sequence[SequenceGroup], save_to: Path) -> None:
        """Record that update number `update` was skipped.

        Raises:
            TooManySkippedUpdatesError: more than `limit` in a row; this process's share of the batch is saved first.
        """
        self.total += 1
        self.in_a_row += 1
        log.warning("update %d had NaN or inf in loss or gradients and was skipped", update)
        if self.in_a_row > self.limit:
            save_to.parent.mkdir(parents=True, exist_ok=True)
            torch.save(list(groups), save_to)
            raise TooManySkippedUpdatesError(
                f"{self.in_a_row} updates in a row had NaN or inf in loss or gradients (learner.max_skipped_updates is "
                f"{self.limit}); the weights are those before these updates. The last batch is in {save_to}: "
                "torch.load(path, weights_only=False) returns its groups. Lower optimizer.lr or max_grad_norm."
            )

    def state_dict(self) -> dict[str, int]:
        """The state for an exact resume."""
        return {"skipped_updates": self.total, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.total, self.in_a_row = state["skipped_updates"], state["skipped_in_a_row"]


def seed_everything(seed: int, rank: int) -> None:
    """Seed Python, NumPy and torch; processes differ from each other."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def save_rng(path: Path) -> None:
    """Write the state of every random number generator of this process."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, path)


def load_rng(path: Path) -> None:
    """Restore the state that `save_rng` wrote."""
    states = torch.load(path, weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
