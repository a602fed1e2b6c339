"""How much better a sample is than its group.

Each function takes the rewards of one group [samples], the lengths of its completions in tokens [samples] and the k of
pass@k, and gives advantages [samples]. Those that compare the samples with each other give 0 where nothing differs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import TYPE_CHECKING

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


STD_EPS = 1e-6
"""Keeps the division finite when the rewards of a group are almost, but not quite, equal."""


def group_mean(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Without the division by the deviation, very easy and very hard prompts do not weigh more than others.
    """
    return rewards - rewards.mean()


def group_mean_std(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The same in units of the group's standard deviation (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The paper does not say which deviation; as in the usual implementations it is the sample's (n - 1).
    """
    return group_mean(rewards, lengths, k) / (rewards.std() + STD_EPS)


def leave_one_out(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """Reward minus the mean of the others (RLOO, arXiv 2402.14740): n / (n - 1) times `group_mean`."""
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def length_weighted_mean(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """r_i - sum_j |o_j| r_j / sum_j |o_j| (OPO, arXiv 2505.23585).

    The baseline of least variance, if the squared norm of a sequence's gradient grows with its length.
    """
    return rewards - (lengths * rewards).sum() / lengths.sum()


def pass_at_k(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """For the best of k: a sample is worth the mean, over all k-subsets that hold it, of their best reward.

    Minus the mean over all k-subsets, in units of their deviation: arXiv 2508.10751, equations 14 and 15, where
    rewards are 0 or 1; the best of any rewards as in arXiv 2505.15201. With ascending rewards, the j-th is the best of
    C(j - 1, k - 1) subsets, of which C(j - 2, k - 2) hold a given earlier sample.
    """
    n = len(rewards)
    ascending, order = rewards.sort(stable=True)
    # One subset only, or the worst best is the best of all: nothing differs, and rounding must not say otherwise.
    if k >= n or ascending[k - 1] == ascending[-1]:
        return torch.zeros_like(rewards)
    chosen = _shares([comb(j, k - 1) for j in range(n)], comb(n, k), rewards)
    mean = (chosen * ascending).sum()
    std = (chosen * (ascending - mean).square()).sum().sqrt()
    as_best = _shares([comb(j, k - 1) for j in range(n)], comb(n - 1, k - 1), rewards)
    below_best = _shares([comb(j - 1, k - 2) if j and k > 1 else 0 for j in range(n)], comb(n - 1, k - 1), rewards)
    later = (below_best * ascending).flip(0).cumsum(0).flip(0) - below_best * ascending
    worth = as_best * ascending + later
    return torch.empty_like(rewards).scatter(0, order, (worth - mean) / (std + STD_EPS))


def reward(rewards: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The reward itself: no baseline (REINFORCE, Williams 1992)."""
    return rewards


def _shares(counts: list[int], total: int, like: Tensor) -> Tensor:
    return torch.tensor([count / total for count in counts], dtype=like.dtype)


ADVANTAGES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "group_mean_std": group_mean_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "length_weighted_mean": length_weighted_mean,
    "pass_at_k": pass_at_k,
    "reward": reward,
}

BY_MEAN = frozenset({"group_mean", "group_mean_std", "leave_one_out"})
"""Advantages that a group's mean reward is taken off: a phantom reward may join that mean."""

IN_DEVIATIONS = frozenset({"group_mean_std", "pass_at_k"})
"""Advantages in units of a deviation already."""

WITHOUT_GROUP = frozenset({"reward"})
"""Advantages that do not compare the samples of a group: a group of one, or of equal rewards, teaches something."""
