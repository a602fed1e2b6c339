"""Accuracy, mean@k and pass@k with 95 % confidence intervals.

Outcomes are given by problem: `outcomes[problem][sample]`, right or wrong. Problems may have different numbers of
samples (unscored ones are left out), but each at least one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, variance

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95 % CI {self.low:.3f} to {self.high:.3f})"


def wilson(share: float, count: float) -> Estimate:
    """The score interval of a share among `count` independent trials.

    Unlike share ± 1.96 standard errors it stays within [0, 1] and has a width when all trials agree.
    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Raises:
        ValueError: there are no trials, or the share is outside [0, 1].
    """
    if count <= 0 or not 0 <= share <= 1:
        raise ValueError(f"a share of {share} among {count} trials has no confidence interval")
    squared = Z95**2 / count
    centre = (share + squared / 2) / (1 + squared)
    half = Z95 * sqrt(share * (1 - share) / count + squared / (4 * count)) / (1 + squared)
    # The ends are exact where rounding would miss them.
    return Estimate(share, 0.0 if share == 0 else centre - half, 1.0 if share == 1 else centre + half)


def clustered(means: Sequence[float], samples: int) -> Estimate:
    """The mean over problems of values in [0, 1], each itself a mean or estimate over samples of that problem.

    Samples of one problem are not independent, so the width follows from the spread between problems: it is Wilson's
    interval with the number of independent trials that would have the same standard error.
    Source: Dean and Pagano (2015), "Evaluating confidence interval methods for binomial proportions in clustered
    surveys", with the standard error of Miller (2024), "Adding error bars to evals", section 2.2.

    Args:
        means: one value for each problem, drawn independently.
        samples: number of samples over all problems, which is the maximum number of independent trials.

    Raises:
        ValueError: there are no problems.
    """
    if not means:
        raise ValueError("no outcomes: nothing was graded")
    share = min(max(fmean(means), 0.0), 1.0)
    between = variance(means) if len(means) > 1 else 0.0
    if share in (0.0, 1.0) or len(means) == 1:
        return wilson(share, len(means))
    trials = share * (1 - share) * len(means) / between if between > 0 else float(samples)
    return wilson(share, min(trials, float(samples)))


def accuracy(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """The share of right samples, each problem with the same weight: with k samples for each problem, mean@k.

    Raises:
        ValueError: there is no problem, or one without a sample.
    """
    _check(outcomes)
    if all(len(samples) == 1 for samples in outcomes):
        return wilson(fmean(samples[0] for samples in outcomes), len(outcomes))
    return clustered([fmean(samples) for samples in outcomes], sum(map(len, outcomes)))


def pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> Estimate:
    """The chance that at least one of k samples is right, averaged over problems.

    For n samples of which c are right: 1 - C(n - c, k) / C(n, k), which has no bias, unlike 1 - (1 - c/n)^k.
    Source: Chen et al. (2021), "Evaluating large language models trained on code", equation 1.

    Raises:
        ValueError: k is below 1 or above the number of samples of a problem.
    """
    _check(outcomes)
    fewest = min(map(len, outcomes))
    if not 1 <= k <= fewest:
        raise ValueError(f"pass@{k} needs 1 to {fewest} samples: a problem has only {fewest} that were scored")
    return clustered([_pass_at_k(len(samples), sum(samples), k) for samples in outcomes], sum(map(len, outcomes)))


def _pass_at_k(n: int, c: int, k: int) -> float:
    # Whole numbers divide exactly rounded; the product form of the paper rounds at every factor.
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def _check(outcomes: Sequence[Sequence[bool]]) -> None:
    if not outcomes or any(len(samples) == 0 for samples in outcomes):
        raise ValueError("every problem needs at least one scored sample: leave out those that have none")
