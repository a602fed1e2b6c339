"""Every cell of the algorithm table against the paper's formula in NumPy float64, written independently."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import SURROGATES

CASES = settings(max_examples=200, deadline=None)

floats = st.floats(-3, 3, allow_nan=False, width=32)
log_probs = st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=20)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


@CASES
@given(st.lists(floats, min_size=2, max_size=16).filter(lambda rewards: np.std(rewards) > 1e-3))
def test_group_advantages(rewards: list[float]) -> None:
    r = np.asarray(rewards, dtype=np.float64)
    centred = r - r.sum() / len(r)
    np.testing.assert_allclose(ADVANTAGES["group_mean"](tensor(r)), centred, atol=1e-12)
    deviation = np.sqrt((centred**2).sum() / (len(r) - 1))
    np.testing.assert_allclose(ADVANTAGES["group_mean_std"](tensor(r)), centred / deviation, rtol=2e-3)
    assert abs(float(ADVANTAGES["group_mean_std"](tensor(r)).sum())) < 1e-9


@CASES
@given(log_probs)
def test_token_ratio(pairs: list[tuple[float, float]]) -> None:
    new, old = np.asarray(pairs).T
    ratio = RATIOS["token"](tensor(new), tensor(old), torch.zeros(len(new), dtype=torch.long))
    np.testing.assert_allclose(ratio, np.exp(new) / np.exp(old), rtol=1e-9)


def clipped_objective(ratio: float, advantage: float, low: float, high: float) -> float:
    """PPO equation 7 by cases: a gain stops counting above the upper bound, a loss below the lower one."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + high)
    return -advantage * max(ratio, 1 - low)


@CASES
@given(st.lists(st.tuples(st.floats(0.01, 5), floats), min_size=1, max_size=20), st.floats(0, 0.9), st.floats(0, 3))
def test_clip(pairs: list[tuple[float, float]], low: float, high: float) -> None:
    ratio, advantage = np.asarray(pairs).T
    expected = [clipped_objective(r, a, low, high) for r, a in pairs]
    np.testing.assert_allclose(SURROGATES["clip"](tensor(ratio), tensor(advantage), low, high), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"), [(1.3, 1.0, 0), (0.7, 1.0, 1), (1.3, -1.0, 1), (0.7, -1.0, 0)]
)
def test_clip_stops_the_gradient_only_where_it_would_go_too_far(ratio: float, advantage: float, gradient: int) -> None:
    r = torch.tensor([ratio], requires_grad=True)
    SURROGATES["clip"](r, torch.tensor([advantage]), 0.2, 0.2).sum().backward()
    assert r.grad is not None
    assert float(r.grad) == -advantage * gradient


@CASES
@given(log_probs)
def test_kl_estimators(pairs: list[tuple[float, float]]) -> None:
    new, reference = np.asarray(pairs).T
    r = np.exp(reference) / np.exp(new)
    np.testing.assert_allclose(KL_ESTIMATORS["k1"](tensor(new), tensor(reference)), -np.log(r), atol=1e-12)
    np.testing.assert_allclose(KL_ESTIMATORS["k2"](tensor(new), tensor(reference)), np.log(r) ** 2 / 2, atol=1e-12)
    k3 = KL_ESTIMATORS["k3"](tensor(new), tensor(reference))
    np.testing.assert_allclose(k3, r - 1 - np.log(r), rtol=1e-9, atol=1e-12)
    assert bool((k3 >= 0).all())


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_estimators_are_unbiased(name: str) -> None:
    generator = np.random.default_rng(0)
    p, q = (x / x.sum() for x in generator.random((2, 7)) + 0.1)
    values = KL_ESTIMATORS[name](tensor(np.log(p)), tensor(np.log(q))).numpy()
    np.testing.assert_allclose((p * values).sum(), (p * np.log(p / q)).sum(), rtol=1e-12)


@CASES
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(0, 2**31))
def test_aggregations(lengths: list[int], seed: int) -> None:
    losses = [np.random.default_rng(seed).normal(size=length) for length in lengths]
    longest = 50
    expected = {
        "sequence_mean": np.mean([loss.mean() for loss in losses]),
        "token_mean": np.concatenate(losses).mean(),
        "max_tokens_mean": sum(loss.sum() for loss in losses) / (len(losses) * longest),
    }
    assert set(expected) == set(AGGREGATIONS)
    for name, value in expected.items():
        weights = AGGREGATIONS[name](lengths, longest)
        total = sum(weight * loss.sum() for weight, loss in zip(weights, losses, strict=True))
        np.testing.assert_allclose(total, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve(name: str) -> None:
    algorithm = resolve(name)
    assert all(getattr(algorithm, cell) == value for cell, value in PRESETS[name].items())


def test_grpo_is_the_papers_row() -> None:
    expected = Algorithm(
        advantage="group_mean_std", aggregation="sequence_mean", kl="k3", beta=0.04, clip_low=0.2, clip_high=0.2
    )
    assert resolve("grpo") == expected


def test_cells_are_overridable() -> None:
    assert resolve("grpo", {"beta": 0.0, "clip_high": 0.28}).clip_high == 0.28


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grpoo", {}, "did you mean grpo"),
        ("grpo", {"bta": 0.1}, "bta"),
        ("grpo", {"kl": "k4"}, "k1, k2, k3"),
        ("grpo", {"beta": -1}, "beta"),
        ("grpo", {"tis_cap": 0}, "tis_cap"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, overrides)
