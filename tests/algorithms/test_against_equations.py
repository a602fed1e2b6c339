"""Rows, and any combination of cells, against the loops of `oracle.py`: values and gradients in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.presets import Algorithm, resolve
from tests.algorithms import oracle
from tests.algorithms.cases import (
    MAX_TOKENS,
    Case,
    all_rows,
    batch_of,
    policy,
    random_case,
    rows,
    total,
    without_chance,
)


def expected(case: Case, algorithm: Algorithm, new: np.ndarray, entropies: np.ndarray, old: np.ndarray) -> float:
    groups = oracle.sequences(case.sequence_groups, new, case.new.numpy(), old, case.reference.numpy(), entropies)
    return oracle.loss(groups, algorithm, MAX_TOKENS)


def check(algorithm: Algorithm, case: Case, reused: bool, differences: int = 6) -> None:
    row = policy(algorithm)
    batch = batch_of(row, case, old=reused)
    value, gradient, entropy_gradient, _ = total(row, batch, case.new, case.entropies)
    new, entropies = case.new.numpy(), case.entropies.numpy()
    old = (case.old if reused else case.new).numpy()
    np.testing.assert_allclose(float(value), expected(case, algorithm, new, entropies, old), rtol=1e-9, atol=1e-11)
    for i in np.random.default_rng(0).integers(0, len(new), differences):
        for grads, array in ((gradient, new), (entropy_gradient, entropies)):
            step = np.zeros_like(array)
            step[i] = 1e-6
            ends = [
                expected(case, algorithm, *((x, entropies) if array is new else (new, x)), old)
                for x in (array + step, array - step)
            ]
            np.testing.assert_allclose(float(grads[i]), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@settings(max_examples=300, deadline=None)
@given(rows, st.integers(0, 2**31), st.booleans())
def test_any_combination_of_cells(cells: dict[str, Any], seed: int, reused: bool) -> None:
    if not reused and cells["clip_low"] * cells["clip_high"] == 0:
        cells = {**cells, "clip_low": 0.2, "clip_high": 0.2}  # at ratio 1 a bound of 1 is a kink
    check(Algorithm(**cells), random_case(seed), reused, differences=2)


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", oracle.known_rows())
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_rows(name: str, seed: int, reused: bool, beta: float) -> None:
    case = random_case(seed, spread=0.02 if "gspo" in name else 0.4)
    check(resolve(name, {"beta": beta, **without_chance(name)}), case, reused)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 2**31))
def test_one_group_of_one_sample_of_one_token(cells: dict[str, Any], seed: int) -> None:
    case = random_case(seed, groups=1, lengths=(1, 1))
    check(Algorithm(**cells), case, reused=True, differences=1)


def test_a_batch_without_targets_is_nothing() -> None:
    for name in all_rows():
        row = policy(
            resolve(name, {"beta": 0.1, "entropy_bonus": 0.1, "top_entropy_fraction": 0.5, "off_policy_delta": 0.1})
        )
        batch = batch_of(row, random_case(0))
        token_fields = {key: values[:0] for key, values in batch.token_fields.items()}
        batch = replace(batch, sequence_ids=batch.sequence_ids[:0], token_fields=token_fields)
        nothing = torch.zeros(0, dtype=torch.float64)
        value, _, _, metrics = total(row, batch, nothing, nothing)
        assert float(value) == 0.0
        assert set(metrics.to_floats()) == {"policy/tokens"}


def test_every_surrogate_has_its_equation() -> None:
    losses = sorted(SURROGATES.keys() - oracle.EQUATIONS.keys())
    assert not losses, f"tests/algorithms/oracle.py: add the loss of a token with {', '.join(losses)} to EQUATIONS"
    settings = sorted({name for one in SURROGATES.values() for name in one.reads} - oracle.SETTINGS.keys())
    assert not settings, f"tests/algorithms/oracle.py: add random values of {', '.join(settings)} to SETTINGS"
