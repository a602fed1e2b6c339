"""Schedules and decay groups."""

import math

import pytest
from torch import nn

from llmquest_rl.optim.groups import decay_groups
from llmquest_rl.optim.schedules import SCHEDULES, lr_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_to_the_peak(schedule: str) -> None:
    assert [lr_factor(schedule, u, 100, warmup=4) for u in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_shapes_by_hand() -> None:
    assert [lr_factor("linear", u, 4) for u in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert lr_factor("cosine", 25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor("cosine", 200, 100, min_ratio=0.1) == pytest.approx(0.1)
    assert {lr_factor("constant", u, 10) for u in range(20)} == {1.0}


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model[2].weight.requires_grad_(False)
    groups = decay_groups(model.named_parameters(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model[0].weight]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in (model[1].weight, model[1].bias, model[2].bias)}
