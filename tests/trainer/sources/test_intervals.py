"""Estimates against exact enumeration, published values and simulated coverage."""

import random
from itertools import combinations, product
from statistics import fmean

import pytest

from trainer.sources.intervals import accuracy, clustered, pass_at_k, wilson


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for right in range(n + 1):
        samples = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k([samples], k).value == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_has_no_bias() -> None:
    """Averaged over every outcome of 4 draws with p = 0.3, pass@2 is the true chance of 1 in 2."""
    p = 0.3
    expected = 0.0
    for outcome in product([True, False], repeat=4):
        chance = p ** sum(outcome) * (1 - p) ** (4 - sum(outcome))
        expected += chance * pass_at_k([list(outcome)], 2).value
    assert expected == pytest.approx(1 - (1 - p) ** 2, abs=1e-12)


def test_pass_at_k_is_exact_for_large_numbers() -> None:
    assert pass_at_k([[True] + [False] * 9999], 100).value == 0.01
    assert pass_at_k([[False] * 50, [True] * 50], 10).value == 0.5


def test_pass_at_1_is_the_mean() -> None:
    outcomes = [[True, False, False, False], [True, True, True, False], [False] * 4]
    assert pass_at_k(outcomes, 1).value == pytest.approx(accuracy(outcomes).value) == pytest.approx(4 / 12)


def test_problems_weigh_the_same_whatever_their_number_of_samples() -> None:
    assert accuracy([[True, True, True, True], [False]]).value == 0.5


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Roots of (p - share)^2 = z^2 p (1 - p) / n, solved with 50 digits.
    [
        (81, 263, 0.25528851987827, 0.36620957698280),
        (15, 148, 0.06238639953074, 0.16048724172331),
        (0, 20, 0.0, 0.16112515805282),
        (29, 29, 0.88303020150026, 1.0),
    ],
)
def test_wilson_interval(right: int, count: int, low: float, high: float) -> None:
    estimate = wilson(right / count, count)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_ends_of_the_wilson_interval_solve_its_equation() -> None:
    estimate = wilson(0.3, 50)
    for end in (estimate.low, estimate.high):
        assert (end - 0.3) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 50, rel=1e-9)


def test_interval_over_problems_covers_the_truth() -> None:
    """64 problems of very different difficulty, 8 samples each: samples of one problem agree with each other."""
    random.seed(0)
    truth, covered, naive, runs = 2 / 7, 0, 0, 1000
    for _ in range(runs):
        chances = [random.betavariate(0.4, 1.0) for _ in range(64)]
        outcomes = [[random.random() < chance for _ in range(8)] for chance in chances]
        estimate = accuracy(outcomes)
        covered += estimate.low <= truth <= estimate.high
        pooled = wilson(estimate.value, 64 * 8)
        naive += pooled.low <= truth <= pooled.high
    assert 0.93 <= covered / runs <= 0.97
    assert naive / runs < 0.8, "the test could not tell: treating samples as independent covers as well"


def test_interval_stays_within_bounds_and_is_never_empty() -> None:
    for means in ([0.0] * 4, [1.0] * 4, [0.5] * 4, [0.0, 1.0], [0.25]):
        estimate = clustered(means, samples=4 * len(means))
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.high - estimate.low > 0.05
        assert estimate.value == fmean(means)


@pytest.mark.parametrize("outcomes", [[], [[]], [[True], []]])
def test_no_outcomes_is_an_error(outcomes: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="at least one scored sample"):
        accuracy(outcomes)


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_samples_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 to 2"):
        pass_at_k([[True, False], [True] * 5], k)
