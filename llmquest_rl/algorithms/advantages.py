"""How much better a sample is than its group: rewards of one group [samples] -> advantages [samples]."""

from collections.abc import Callable

from torch import Tensor

STD_EPS = 1e-6
"""Keeps the division finite when the rewards of a group are almost, but not quite, equal."""


def group_mean(rewards: Tensor) -> Tensor:
    """Reward minus the group's mean (Dr. GRPO, arXiv 2503.20783, section 3.2).

    Without the division by the deviation, very easy and very hard prompts do not weigh more than others.
    """
    return rewards - rewards.mean()


def group_mean_std(rewards: Tensor) -> Tensor:
    """The same in units of the group's standard deviation (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The paper does not say which deviation; as in the usual implementations it is the sample's (n - 1).
    """
    return group_mean(rewards) / (rewards.std() + STD_EPS)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"group_mean": group_mean, "group_mean_std": group_mean_std}
