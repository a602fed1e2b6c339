"""A new objective is one file: its options, its loss and its metrics."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmquest_rl import objectives
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.objectives import OBJECTIVES, Objective
from tests.trainer.learner.learner_cases import make_folder, make_setup, whole_weights
from trainer.config.load import ConfigError, parse_config
from trainer.config.rules import from_rollouts
from trainer.learner.learner import Learner

UNLIKELY = '''
"""Unlikelihood: lowers the probability of the given tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import PositiveFloat
from torch import nn

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.objectives import Loss, Supervised, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling


class Config(Options):
    """Options of the objective."""

    strength: PositiveFloat = 1.0
    """Factor of the loss."""


def _double(loss: float) -> float:
    return 2 * loss


@dataclass(frozen=True, slots=True)
class Unlikely(Supervised):
    """-log(1 - p) of every token, summed with equal weights."""

    derived_metrics: ClassVar[Mapping[str, Derived]] = {"train/double": (("train/unlikely",), _double)}
    strength: float = 1.0

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        weight = 1 / sum(len(completion) for group in groups for completion in group.completions)
        return [
            group.with_token_field("weights", [[weight] * len(completion) for completion in group.completions])
            for group in groups
        ]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        output = model(batch)
        losses = -torch.log1p(-output.logprobs.exp())
        weights, metrics = batch.token_fields["weights"], Metrics()
        counted = weights != 0
        metrics.mean("train/unlikely", losses.detach()[counted].sum(), counted.sum())
        return with_aux(self.strength * (weights * losses).sum(), output.aux, batch, metrics)


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> Unlikely:
    return Unlikely(config.strength)
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file lies in a folder of the package's path."""
    (tmp_path / "unlikely.py").write_text(UNLIKELY)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("llmquest_rl.objectives.unlikely", None)


def objective(**options: object) -> Objective:
    config = parse_config(
        {
            "name": "unlikely",
            "steps": 2,
            "cluster": "inline",
            "objective": {"name": "unlikely", **options},
            "data": {"dataset": {"name": "text", "path": "a.txt"}},
        }
    )
    assert not from_rollouts(config)
    section = config.objective
    made: Objective = section.module.build(section.options, config.algorithm, config.rollout.sampling)
    return made


@pytest.mark.usefixtures("added")
def test_it_is_found_with_its_options() -> None:
    assert "unlikely" in OBJECTIVES.names()
    with pytest.raises(ConfigError, match=r"objective\.strenth: unknown key; did you mean strength"):
        objective(strenth=2.0)
    with pytest.raises(ConfigError, match=r"objective\.strength: expected greater than 0"):
        objective(strength=0.0)


@pytest.mark.usefixtures("added")
def test_it_trains(tmp_path: Path) -> None:
    """Two steps make the given tokens less likely, and twice the strength moves the weights elsewhere."""
    groups = [SequenceGroup([], [[5, 9, 2, 7, 7, 1]]), SequenceGroup([3], [[3, 8, 8]])]
    ends = []
    for strength in (1.0, 2.0):
        unlikely = objective(strength=strength)
        learner = Learner(make_setup(make_folder(tmp_path / "model"), objective=unlikely))
        try:
            weighted = unlikely.assign_token_weights(groups)
            first, second = (learner.update([weighted], 1) for _ in range(2))
            held_out = learner.evaluate(weighted)
            ends.append(whole_weights(learner))
        finally:
            learner.close()
        assert first["train/unlikely"] > second["train/unlikely"] > held_out["eval/unlikely"] > 0
        assert second["train/double"] == pytest.approx(2 * second["train/unlikely"])
        assert first["learner/skipped_updates"] == 0
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
