"""Advantages, their normalisation over a step, and length penalties, against the papers' formulas in NumPy float64."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.presets import Algorithm

CASES = settings(max_examples=200, deadline=None)
rewards_of_a_group = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=12)
different = rewards_of_a_group.filter(lambda rewards: np.std(rewards) > 1e-2)


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def advantages_of(name: str, rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    return ADVANTAGES[name].configured(Algorithm(pass_k=k))(rewards, lengths)


def penalties(name: str, rewards: Tensor, lengths: Tensor, max_tokens: int, buffer: float) -> Tensor:
    return LENGTH_PENALTIES[name].configured(Algorithm(overlong_buffer=buffer))(rewards, lengths, max_tokens)


def lengths_for(rewards: list[float], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 50, len(rewards)).astype(np.float64)


@CASES
@given(different, st.integers(0, 2**31))
def test_comparisons_with_the_group(rewards: list[float], seed: int) -> None:
    r, lengths = np.asarray(rewards, dtype=np.float64), lengths_for(rewards, seed)
    n = len(r)
    centred = r - r.sum() / n
    deviation = np.sqrt((centred**2).sum() / (n - 1))
    expected = {
        "group_mean": centred,
        "group_mean_std": centred / (deviation + 1e-6),
        "leave_one_out": [r[i] - np.mean([r[j] for j in range(n) if j != i]) for i in range(n)],
        "length_weighted_mean": r - np.average(r, weights=lengths),
        "reward": r,
        "gae": r,  # until the learner has the critic's values
    }
    assert set(expected) == set(ADVANTAGES) - {"pass_at_k", "mean_normalized"}
    for name, values in expected.items():
        ours = advantages_of(name, tensor(r), tensor(lengths), 4)
        np.testing.assert_allclose(ours, values, rtol=1e-9, atol=1e-12, err_msg=name)


@CASES
@given(different, st.integers(1, 6))
def test_pass_at_k_is_the_mean_over_all_subsets(rewards: list[float], k: int) -> None:
    n = len(rewards)
    ours = advantages_of("pass_at_k", tensor(rewards), tensor([1.0] * n), k)
    if k >= n:
        assert not ours.any()
        return
    best = {subset: max(rewards[i] for i in subset) for subset in combinations(range(n), k)}
    mean, deviation = np.mean(list(best.values())), np.std(list(best.values()))
    worth = [np.mean([value for subset, value in best.items() if i in subset]) for i in range(n)]
    np.testing.assert_allclose(ours, (np.array(worth) - mean) / (deviation + 1e-6), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [3, 8, 16])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_of_right_and_wrong_is_the_papers_closed_form(n: int, k: int) -> None:
    """arXiv 2508.10751, equations 14 and 15, for every number of right answers."""
    if k >= n:
        return

    def choose(a: int, b: int) -> float:
        return float(np.prod([(a - i) / (i + 1) for i in range(b)])) if a >= b else 0.0

    for right in range(1, n):
        wrong = n - right
        mean = 1 - choose(wrong, k) / choose(n, k)
        deviation = np.sqrt(mean * (1 - mean))
        if deviation == 0:  # every subset has a right answer
            continue
        of_right = (1 - mean) / deviation
        of_wrong = (1 - mean - choose(wrong - 1, k - 1) / choose(n - 1, k - 1)) / deviation
        ours = advantages_of("pass_at_k", tensor([1.0] * right + [0.0] * wrong), tensor([1.0] * n), k)
        np.testing.assert_allclose(ours, [of_right] * right + [of_wrong] * wrong, rtol=1e-4, atol=1e-9)


@CASES
@given(rewards_of_a_group, st.integers(0, 2**31))
def test_leave_one_out_is_the_group_mean_scaled(rewards: list[float], seed: int) -> None:
    r, lengths, n = tensor(rewards), tensor(lengths_for(rewards, seed)), len(rewards)
    scaled = advantages_of("group_mean", r, lengths, 1) * n / (n - 1)
    torch.testing.assert_close(advantages_of("leave_one_out", r, lengths, 1), scaled, rtol=1e-9, atol=1e-9)


@CASES
@given(rewards_of_a_group, st.integers(0, 2**31), st.sampled_from(sorted(ADVANTAGES)))
def test_the_order_of_a_group_does_not_matter(rewards: list[float], seed: int, name: str) -> None:
    lengths = lengths_for(rewards, seed)
    rewards = [reward + 4 for reward in rewards] if ADVANTAGES[name].nonnegative else rewards
    order = np.random.default_rng(seed).permutation(len(rewards))
    straight = advantages_of(name, tensor(rewards), tensor(lengths), 3)
    shuffled = advantages_of(name, tensor(rewards)[order], tensor(lengths)[order], 3)
    torch.testing.assert_close(straight[order], shuffled, rtol=1e-6, atol=1e-6)


@CASES
@given(
    different,
    st.integers(0, 2**31),
    st.sampled_from(sorted(name for name, a in ADVANTAGES.items() if a.group_relative and not a.nonnegative)),
)
def test_adding_a_constant_to_all_rewards_changes_nothing(rewards: list[float], seed: int, name: str) -> None:
    lengths = tensor(lengths_for(rewards, seed))
    before, after = (advantages_of(name, tensor(rewards) + shift, lengths, 2) for shift in (0.0, 7.0))
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


groups_of_rewards = st.lists(rewards_of_a_group, min_size=1, max_size=5)


@CASES
@given(groups_of_rewards, st.integers(0, 2**31))
def test_normalizations(rewards: list[list[float]], seed: int) -> None:
    lengths = [lengths_for(group, seed + i) for i, group in enumerate(rewards)]
    centred = [np.asarray(group) - np.mean(group) for group in rewards]
    tokens = np.concatenate([np.repeat(a, n.astype(int)) for a, n in zip(centred, lengths, strict=True)])
    everything = np.concatenate(rewards)
    differ = [len(set(group)) > 1 for group in rewards]
    valid = sum(len(group) for group, differs in zip(rewards, differ, strict=True) if differs)
    white = (tokens.mean(), tokens.std() + 1e-6) if tokens.min() < tokens.max() else (0.0, np.inf)
    spread = everything.std(ddof=1) + 1e-6 if everything.min() < everything.max() else 1.0
    mean = np.concatenate(centred).mean()
    deviation = np.concatenate(centred).std(ddof=1) + 1e-6
    differs = np.ptp(np.concatenate(centred)) > 0
    expected = {
        "none": centred,
        "whiten": [(a - white[0]) / white[1] for a in centred],
        "standardize": [(a - mean) / deviation if differs else 0 * a for a in centred],
        "batch_mean": [a - mean for a in centred],
        "batch_std": [a / spread for a in centred],
        "valid_groups": [a * (len(everything) / valid if valid else 1.0) for a in centred],
    }
    assert set(expected) == set(NORMALIZATIONS)
    for name, values in expected.items():
        ours = NORMALIZATIONS[name].function(*([tensor(v) for v in part] for part in (centred, rewards, lengths)))
        for a, b in zip(ours, values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_tokens() -> None:
    advantages, lengths = [tensor([1.0, -1.0]), tensor([3.0])], [tensor([2.0, 5.0]), tensor([4.0])]
    white = torch.cat(NORMALIZATIONS["whiten"].function(advantages, advantages, lengths))
    tokens = white.repeat_interleave(torch.tensor([2, 5, 4]))
    assert float(tokens.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(tokens.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_groups_without_a_difference_are_made_up_for() -> None:
    """GPG: with half of the samples in groups of equal rewards, the others count twice."""
    advantages = [tensor([0.5, -0.5]), tensor([0.0, 0.0])]
    ours = NORMALIZATIONS["valid_groups"].function(
        advantages, [tensor([1.0, 0.0]), tensor([1.0, 1.0])], [tensor([1, 1])] * 2
    )
    assert [group.tolist() for group in ours] == [[1.0, -1.0], [0.0, 0.0]]


@CASES
@given(st.lists(st.integers(1, 120), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_soft_overlong(lengths: list[int], buffer: float) -> None:
    """DAPO equation 13, by cases."""
    longest, cache = 100, buffer * 100
    expected = []
    for n in lengths:
        if n <= longest - cache:
            expected.append(0.0)
        elif n <= longest:
            expected.append(((longest - cache) - n) / cache)
        else:
            expected.append(-1.0)
    ours = penalties("soft_overlong", tensor([1.0] * len(lengths)), tensor(lengths), longest, buffer)
    np.testing.assert_allclose(ours, expected, atol=1e-9)


@CASES
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), min_size=1, max_size=8))
def test_relative_length(samples: list[tuple[bool, int]]) -> None:
    """Kimi k1.5, section 2.3.3: short right answers gain, long answers lose, wrong ones never gain."""
    lengths = [n for _, n in samples]
    shortest, longest = min(lengths), max(lengths)
    expected = []
    for right, n in samples:
        value = 0.5 - (n - shortest) / (longest - shortest) if longest > shortest else 0.0
        expected.append(value if right else min(0.0, value))
    rewards = tensor([float(right) for right, _ in samples])
    ours = penalties("relative", rewards, tensor(lengths), 100, 0.2)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert not penalties("none", rewards, tensor(lengths), 100, 0.2).any()


@pytest.mark.parametrize("n", [2, 8, 16])
def test_maxrl_of_right_and_wrong_is_the_papers_closed_form(n: int) -> None:
    """With K of N right: N / K - 1 for a right answer, -1 for a wrong one (arXiv 2602.02710)."""
    for right in range(1, n):
        rewards = tensor([1.0] * right + [0.0] * (n - right))
        ours = advantages_of("mean_normalized", rewards, tensor([1.0] * n), 4)
        np.testing.assert_allclose(ours, [n / right - 1] * right + [-1.0] * (n - right), rtol=1e-12)


@CASES
@given(rewards_of_a_group.map(lambda rewards: [abs(x) for x in rewards]).filter(lambda rewards: sum(rewards) > 0))
def test_maxrl_does_not_depend_on_the_scale_of_rewards(rewards: list[float]) -> None:
    once, twice = (advantages_of("mean_normalized", tensor(rewards) * k, tensor(rewards), 4) for k in (1.0, 7.0))
    np.testing.assert_allclose(once, np.asarray(rewards) / np.mean(rewards) - 1, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(once, twice, rtol=1e-9, atol=1e-9)


def test_maxrl_is_the_gradient_of_the_truncated_likelihood() -> None:
    """The paper's theorem by enumeration: over all outcomes of N samples with the probability p of a right one, the
    expected estimator is d/dp of -sum_k (1 - p)^k / k, which is log p for large N. The mean as a baseline takes one
    term off the paper's N, because a group without a right answer has no baseline either."""
    n, p = 6, 0.3
    expected = 0.0
    for outcome in range(2**n):
        rewards = [float(outcome >> i & 1) for i in range(n)]
        chance = np.prod([p if reward else 1 - p for reward in rewards])
        score = np.array([1 / p if reward else -1 / (1 - p) for reward in rewards])  # d log P(sample) / dp
        if sum(rewards):  # the caller has advantages of 0 for a group without a right answer
            ours = advantages_of("mean_normalized", tensor(rewards), tensor([1.0] * n), 4).numpy()
            expected += chance * float((ours * score).mean())
    assert expected == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, n)))


def test_standardize_counts_completions_and_whiten_tokens() -> None:
    advantages, lengths = [tensor([1.0, -1.0]), tensor([3.0])], [tensor([2.0, 5.0]), tensor([4.0])]
    values = torch.cat(NORMALIZATIONS["standardize"].function(advantages, advantages, lengths))
    assert (float(values.mean()), float(values.std())) == (pytest.approx(0.0, abs=1e-9), pytest.approx(1.0, rel=1e-5))


def test_the_mean_of_equal_rewards_is_taken_off_without_rounding() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: a rest of 1e-17 would be a group with an advantage."""
    for name in ("batch_mean", "standardize"):
        groups = [tensor([0.1]), tensor([0.1, 0.1])]
        assert not any(group.any() for group in NORMALIZATIONS[name].function(groups, groups, groups))
