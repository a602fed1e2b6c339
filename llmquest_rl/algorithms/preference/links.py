"""Links: the loss of a pair, from the scores of its chosen and its rejected answer (`margins.py`).

Each function takes the scores of the chosen and of the rejected answers `[pairs]` and the settings, and returns the
loss of each pair `[pairs]`. `kto` takes the answers one by one. Below, c and r are the two scores and d = c - r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field, NonNegativeFloat

from llmquest_rl.algorithms.variant import PositiveFinite, Variant, Weight
from llmquest_rl.deferred import torch
from llmquest_rl.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class Beta(Options):
    """The setting of every link."""

    beta: PositiveFinite = 0.1
    """Scale of the scores: the implicit reward of an answer is beta times its score. With a reference model, a larger
    beta keeps the policy closer to it."""


class Smoothing(Beta):
    """Settings of links that expect wrong labels."""

    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Expected share of pairs whose two answers are interchanged."""


class Target(Smoothing):
    """Settings of `sigmoid`."""

    target_margin: NonNegativeFloat = 0.0
    """`sigmoid`: difference of the implicit rewards from which a pair counts as learnt (gamma of SimPO)."""


def sigmoid(chosen: Tensor, rejected: Tensor, settings: Target) -> Tensor:
    """-(1 - e) log sigmoid(beta d - gamma) - e log sigmoid(-(beta d - gamma)).

    DPO, arXiv 2305.18290, equation 7 (e = gamma = 0); with label smoothing e: cDPO (E. Mitchell, "A note on DPO with
    noisy preferences and relationship to IPO", 2023); with the target gamma: SimPO, arXiv 2405.14734, equation 6.
    """
    margin = settings.beta * (chosen - rejected) - settings.target_margin
    return -(1 - settings.label_smoothing) * _log_sigmoid(margin) - settings.label_smoothing * _log_sigmoid(-margin)


def robust(chosen: Tensor, rejected: Tensor, settings: Smoothing) -> Tensor:
    """(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e).

    Its mean over labels of which a share e is wrong is the loss of DPO on right labels (arXiv 2403.00409, section 3).
    """
    margin, share = settings.beta * (chosen - rejected), settings.label_smoothing
    return (-(1 - share) * _log_sigmoid(margin) + share * _log_sigmoid(-margin)) / (1 - 2 * share)


def hinge(chosen: Tensor, rejected: Tensor, settings: Beta) -> Tensor:
    """max(0, 1 - beta d) (SLiC-HF, arXiv 2305.10425, equation 1, with log-ratios as in RSO, arXiv 2309.06657)."""
    return torch.relu(1 - settings.beta * (chosen - rejected))


def squared(chosen: Tensor, rejected: Tensor, settings: Beta) -> Tensor:
    """(d - 1 / (2 beta))^2 (IPO, arXiv 2310.12036, equation 17): a pair is not driven beyond its target."""
    return (chosen - rejected - 1 / (2 * settings.beta)).square()


def apo_zero(chosen: Tensor, rejected: Tensor, settings: Beta) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta r): chosen up, rejected down (APO, arXiv 2408.06266, equation 7)."""
    return torch.sigmoid(-settings.beta * chosen) + torch.sigmoid(settings.beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, settings: Beta) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta d): both down, rejected faster (APO, arXiv 2408.06266, equation 8)."""
    return torch.sigmoid(settings.beta * chosen) + torch.sigmoid(-settings.beta * (chosen - rejected))


def sppo(chosen: Tensor, rejected: Tensor, settings: Beta) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: equation 4.7 of SPPO (arXiv 2405.00675) with win rates 1 and 0.

    The paper's eta is 1 / beta.
    """
    target = 1 / (2 * settings.beta)
    return (chosen - target).square() + (rejected + target).square()


class Modulation(Beta):
    """Settings of `discopop`."""

    tau: PositiveFinite = 0.05
    """`discopop`: temperature of the blend of its two losses."""


def discopop(chosen: Tensor, rejected: Tensor, settings: Modulation) -> Tensor:
    """(1 - s) (-log sigmoid(x)) + s exp(-x) with x = beta d and s = sigmoid(x / tau) (arXiv 2406.08414, equation 5)."""
    margin = settings.beta * (chosen - rejected)
    share = torch.sigmoid(margin / settings.tau)
    return -_log_sigmoid(margin) * (1 - share) + torch.exp(-margin) * share


class Utility(Beta):
    """Settings of `kto`."""

    desirable_weight: Weight = 1.0
    """`kto`: weight of good answers. With unequal numbers of both kinds, choose the weights so that each of them counts
    1 to 1.33 times as much as the other (equation 8 of the paper)."""
    undesirable_weight: Weight = 1.0
    """`kto`: weight of bad answers."""


def kto(scores: Tensor, sides: Tensor, kl: Tensor, settings: Utility) -> Tensor:
    """w (1 - sigmoid(beta s (score - z))) of each answer, with s = 1 for good and -1 for bad ones.

    KTO, arXiv 2402.01306, equation 7. `kl` is z, the estimated KL to the reference, without a gradient.

    Args:
        scores: score of each answer `[answers]`.
        sides: 1 for good answers, -1 for bad ones `[answers]`.
        kl: the estimate for each answer `[answers]`, in nats.
        settings: beta and the two weights.
    """
    weights = torch.full_like(scores, settings.undesirable_weight)
    weights = weights.masked_fill(sides > 0, settings.desirable_weight)
    return weights * torch.sigmoid(-settings.beta * sides * (scores - kl))


def _log_sigmoid(values: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(values)


LinkFunction: TypeAlias = "Callable[..., Tensor]"


@dataclass(frozen=True, slots=True)
class Link(Variant[LinkFunction]):
    """A loss of pairs, and its properties."""

    takes_pairs: bool = True
    """Whether it compares the two answers of a pair. Otherwise every answer has a loss of its own."""


SHOW = " (beta {beta:g})"
SHOW_SMOOTHED = " (beta {beta:g}, smoothing {label_smoothing:g})"

LINKS: dict[str, Link] = {
    "sigmoid": Link(sigmoid, Target, " (beta {beta:g}, smoothing {label_smoothing:g}, target {target_margin:g})"),
    "robust": Link(robust, Smoothing, SHOW_SMOOTHED),
    "hinge": Link(hinge, Beta, SHOW),
    "squared": Link(squared, Beta, SHOW),
    "apo_zero": Link(apo_zero, Beta, SHOW),
    "apo_down": Link(apo_down, Beta, SHOW),
    "sppo": Link(sppo, Beta, SHOW),
    "discopop": Link(discopop, Modulation, " (beta {beta:g}, tau {tau:g})"),
    "kto": Link(kto, Utility, SHOW, takes_pairs=False),
}
