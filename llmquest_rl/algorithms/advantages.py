"""Advantages: how much better a completion is than the others of its group.

Each function takes the rewards of one group `[samples]` and the lengths of its completions in tokens `[samples]`, and
returns advantages `[samples]`. If all rewards of a group are equal, the caller sets its advantages to 0, unless the
function is not group-relative (`Advantage.group_relative`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt

from llmquest_rl.algorithms.variant import Variant
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor

STD_EPS = 1e-6
"""Keeps the division finite if the rewards of a group are almost, but not exactly, equal."""


def group_mean(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Without the division by the deviation, very easy and very hard prompts do not weigh more than others.
    """
    return rewards - rewards.mean()


def group_mean_std(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Reward minus the group's mean, in units of the group's standard deviation (DeepSeekMath, arXiv 2402.03300,
    section 4.1.2).

    The paper does not define the deviation. Here it is that of a sample (n - 1), as in the usual implementations.
    """
    return group_mean(rewards, lengths) / (rewards.std() + STD_EPS)


def mean_normalized(rewards: Tensor, lengths: Tensor) -> Tensor:
    """(R - mean) / mean of the group (MaxRL, arXiv 2602.02710).

    With rewards of 0 and 1 the mean estimates the probability p of a right answer. 1 / p is the factor between the
    gradient of log p and that of p, so hard prompts weigh more than easy ones. Rewards must not be below 0.
    """
    return group_mean(rewards, lengths) / rewards.mean()


def leave_one_out(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Reward minus the mean of the other rewards (RLOO, arXiv 2402.14740): n / (n - 1) times `group_mean`."""
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)


def length_weighted_mean(rewards: Tensor, lengths: Tensor) -> Tensor:
    """r_i - sum_j |o_j| r_j / sum_j |o_j| (OPO, arXiv 2505.23585).

    This baseline has the least variance if the squared norm of a sequence's gradient grows with its length.
    """
    return rewards - (lengths * rewards).sum() / lengths.sum()


class PassK(Options):
    """Settings of `pass_at_k`."""

    pass_k: PositiveInt = 4
    """`pass_at_k`: the number k of completions, smaller than `batch.samples_per_prompt`."""


def pass_at_k(rewards: Tensor, lengths: Tensor, settings: PassK) -> Tensor:
    """The value of a sample for pass@k, minus the mean over all k-subsets, in units of their deviation.

    The value of a sample is the mean best reward of the k-subsets that hold it. For rewards of 0 and 1 these are
    equations 14 and 15 of arXiv 2508.10751; the best of any rewards is as in arXiv 2505.15201. With ascending rewards,
    the j-th is the best of C(j - 1, k - 1) subsets, of which C(j - 2, k - 2) hold a given earlier sample.
    """
    n, k = len(rewards), settings.pass_k
    ascending, order = rewards.sort(stable=True)
    # There is one subset only, or all subsets have the same best reward: the exact result is 0, without rounding.
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


def reward(rewards: Tensor, lengths: Tensor) -> Tensor:
    """The reward itself, without a baseline (REINFORCE, Williams 1992)."""
    return rewards


class GAE(Options):
    """Settings of `gae`."""

    gae_gamma: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """`gae`: discount of a reward for each token that it comes later."""
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """`gae`: 1 compares the rest of a completion with the critic's value, 0 the next token's value only."""
    value_clip: PositiveFloat | None = 0.2
    """`gae`: an update moves the critic's value of a token by at most this from its value before the step; null = no
    limit."""


def gae(rewards: Tensor, lengths: Tensor, settings: GAE) -> Tensor:
    """The reward itself: the learner turns it into an advantage of each token, with the critic's values (`gae.py`)."""
    return rewards


def _shares(counts: list[int], total: int, like: Tensor) -> Tensor:
    return torch.tensor([count / total for count in counts], dtype=like.dtype)


AdvantageFunction: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True, slots=True)
class Advantage(Variant[AdvantageFunction]):
    """Advantages of one group `[samples]`, and their properties."""

    group_relative: bool = True
    """Whether the samples of a group are compared with each other: a group of one, or of equal rewards, has
    advantages of 0."""
    by_mean: bool = False
    """Whether a group's mean reward is the baseline: a phantom reward may join that mean."""
    in_deviations: bool = False
    """Whether the advantages are in units of their group's deviation."""
    nonnegative: bool = False
    """Whether rewards below 0 have no meaning."""
    by_critic: bool = False
    """Whether a critic in the learner compares the rewards, token by token."""


ADVANTAGES: dict[str, Advantage] = {
    "group_mean_std": Advantage(group_mean_std, by_mean=True, in_deviations=True),
    "group_mean": Advantage(group_mean, by_mean=True),
    "mean_normalized": Advantage(mean_normalized, nonnegative=True),
    "leave_one_out": Advantage(leave_one_out, by_mean=True),
    "length_weighted_mean": Advantage(length_weighted_mean),
    "pass_at_k": Advantage(pass_at_k, PassK, " (k {pass_k})", in_deviations=True),
    "reward": Advantage(reward, group_relative=False),
    "gae": Advantage(gae, GAE, " (lambda {gae_lambda:g})", group_relative=False, by_critic=True),
}
