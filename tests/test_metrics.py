"""Merging of metrics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquest_rl.metrics import Metrics


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1), min_size=1, max_size=6))
def test_merged_parts_are_the_whole(parts: list[list[float]]) -> None:
    pieces = []
    for part in parts:
        metrics = Metrics()
        metrics.mean("a/mean", torch.tensor(part, dtype=torch.float64).sum(), len(part))
        metrics.max("a/max", max(part))
        metrics.sum("a/sum", sum(part))
        pieces.append(metrics.fetched())
    values = [value for part in parts for value in part]
    floats = Metrics().merge(pieces).to_floats()
    assert floats["a/mean"] == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-9)
    assert floats["a/max"] == max(values)
    assert floats["a/sum"] == pytest.approx(sum(values), rel=1e-9, abs=1e-9)


def test_a_mean_of_nothing_is_left_out() -> None:
    metrics = Metrics()
    metrics.mean("a/b", torch.tensor(0.0), torch.tensor(0))
    assert metrics.to_floats() == {}


def test_mixed_floats_and_tensors() -> None:
    metrics = Metrics()
    metrics.max("a/max", 1.0)
    metrics.max("a/max", torch.tensor(3.0))
    metrics.mean("a/mean", 1.0)
    metrics.mean("a/mean", torch.tensor(3.0))
    assert metrics.to_floats() == {"a/max": 3.0, "a/mean": 2.0}
