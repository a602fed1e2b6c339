"""Covariance of log-prob and advantage: its largest values belong to the few tokens that make the entropy collapse.

    cov_t = (log pi(o_t) - mean log pi) (A_t - mean A)          means over the tokens of an optimizer update

Source: The Entropy Mechanism of RL, arXiv 2505.22617, section 4. The change of the entropy in a step is about minus the
covariance. Each function takes the covariances of all tokens of an update `[tokens]` and a random number for each
`[tokens]`, and returns a mask of the tokens to restrain `[tokens]`. The log-probs are the engine's: they are known
before the update is split into microbatches, so the choice depends neither on these nor on the number of processes.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Self, TypeAlias

from pydantic import Field, model_validator

from llmquest_rl.algorithms.variant import Variant, Weight
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Generator, Tensor

FIELD = "high_covariance"
"""Token field: 1 for the tokens to restrain, 0 for the others."""


class Fraction(Options):
    """Setting of every choice."""

    cov_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    """Share of an update's tokens that the covariance restrains, at least one token."""


class Band(Fraction):
    """Settings of `clip`."""

    cov_low: Weight = 1.0
    """`covariance: clip`: lower end of the band of covariances."""
    cov_high: Weight = 5.0
    """`covariance: clip`: upper end of the band."""

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> Self:
        if self.cov_low >= self.cov_high:
            raise ValueError(f"cov_low is {self.cov_low:g}, but must be below cov_high = {self.cov_high:g}")
        return self


class Penalty(Fraction):
    """Settings of `kl`."""

    cov_kl: Weight = 1.0
    """`covariance: kl`: weight of |log pi - log pi_old|, the penalty of the chosen tokens."""


def none(covariances: Tensor, chances: Tensor) -> Tensor:
    """No token."""
    return torch.zeros_like(covariances, dtype=torch.bool)


def clip(covariances: Tensor, chances: Tensor, settings: Band) -> Tensor:
    """A random choice from the tokens with low < cov < high (Clip-Cov)."""
    inside = (covariances > settings.cov_low) & (covariances < settings.cov_high)
    return _largest(chances.where(inside, -1.0), settings) & inside


def kl(covariances: Tensor, chances: Tensor, settings: Penalty) -> Tensor:
    """The tokens with the largest covariances, if they are above 0 (KL-Cov)."""
    return _largest(covariances, settings) & (covariances > 0)


def _largest(values: Tensor, settings: Fraction) -> Tensor:
    """Mask of the largest values, as many as the fraction says, at least one."""
    count = max(1, int(settings.cov_fraction * len(values)))
    places = values.argsort(descending=True, stable=True)[:count]
    return torch.zeros_like(values, dtype=torch.bool).index_fill(0, places, True)


ChoiceFunction: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True, slots=True)
class Covariance(Variant[ChoiceFunction]):
    """A choice of tokens, and the restraint."""

    masks_tokens: bool = False
    """Whether the chosen tokens leave the policy loss."""
    penalizes: bool = False
    """Whether the chosen tokens get a penalty for leaving the old policy (`cov_kl`)."""


COVARIANCES: dict[str, Covariance] = {
    "none": Covariance(none),
    "clip": Covariance(clip, Band, " {cov_fraction:g} of {cov_low:g} .. {cov_high:g}", masks_tokens=True),
    "kl": Covariance(kl, Penalty, " {cov_kl:g} on {cov_fraction:g}", penalizes=True),
}


def with_high_covariance(groups: Sequence[SequenceGroup], variant: str, settings: Options) -> list[SequenceGroup]:
    """Add the token field `high_covariance` to the sequence groups of one optimizer update.

    Args:
        groups: all groups of the update, with the token fields `advantages` and `rollout_logprobs`.
        variant: the name of the choice.
        settings: the algorithm, whose settings the choice reads.
    """
    choose = COVARIANCES[variant].configured(settings)
    logprobs, advantages = (_flat(groups, name) for name in ("rollout_logprobs", "advantages"))
    chosen = choose((logprobs - logprobs.mean()) * (advantages - advantages.mean()), _chances(groups))
    left = iter(chosen.double().tolist())
    return [group.with_token_field(FIELD, list(_rows(group, left))) for group in groups]


def _flat(groups: Sequence[SequenceGroup], name: str) -> Tensor:
    rows = chain.from_iterable(group.token_fields[name] for group in groups)
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.float64)


def _rows(group: SequenceGroup, values: Iterator[float]) -> Iterator[list[float]]:
    for completion in group.completions:
        yield [next(values) for _ in completion]


def _chances(groups: Sequence[SequenceGroup]) -> Tensor:
    """A random number in [0, 1) for each token `[tokens]`. It is seeded with the completion, so a resumed run draws the
    same, in any order of the groups."""
    drawn = [
        torch.rand(len(completion), generator=_generator(group.prompt + completion), dtype=torch.float64)
        for group in groups
        for completion in group.completions
    ]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *drawn])


def _generator(tokens: list[int]) -> Generator:
    return torch.Generator().manual_seed(zlib.crc32(array("q", tokens).tobytes()))
