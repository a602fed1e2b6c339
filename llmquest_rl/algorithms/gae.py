"""Generalized advantage estimation, and the loss of the critic (GAE, arXiv 1506.02438; PPO, arXiv 1707.06347).

The critic is a model with one number per token: V(s_t), the reward that it expects before token t of a completion. All
tensors are `[targets]` of packed batches, in which the targets of a completion are adjacent and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmquest_rl.algorithms.advantages import GAE, STD_EPS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS
from llmquest_rl.algorithms.ratios import discounted_sum_to_end
from llmquest_rl.batch import TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Derived, Metrics, ratio

if TYPE_CHECKING:
    from torch import Tensor


METRICS: dict[str, tuple[str, str]] = {
    "policy/value": ("reward", "The critic's value of a token before the step, mean."),
    "policy/return": ("reward", "The target of that value, mean."),
    "policy/value_loss": ("", "Loss of the critic, mean over the tokens."),
    "policy/value_clip_frac": ("share", "Tokens whose value `value_clip` held back."),
    "policy/value_error": ("", "Square of the difference of target and value, mean."),
    "policy/return_square": ("", "Square of the target, mean."),
    "policy/explained_variance": (
        "share",
        "Variance of the targets that the critic explains: 1 = all, 0 = no more than one number for all tokens would.",
    ),
}
"""Metrics of the critic, as in an objective's file."""


class ValueLoss(NamedTuple):
    """The loss of the critic `[targets]`."""

    losses: Tensor
    cut: Tensor
    """Bool: tokens whose value has moved so far that they have no gradient."""


def gae(rewards: Tensor, values: Tensor, sequence_ids: Tensor, settings: GAE) -> Tensor:
    """sum_k (gamma lambda)^k delta_{t+k} with delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (GAE, equations 10 and 16).

    The value behind the last token of a completion is 0, also if the token limit cut it.
    """
    deltas = rewards + settings.gae_gamma * _next(values, sequence_ids) - values
    return discounted_sum_to_end(deltas, sequence_ids, settings.gae_gamma * settings.gae_lambda)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, limit: float | None) -> ValueLoss:
    """max((V - G)^2, (V_old + clip(V - V_old, -limit, limit) - G)^2) / 2: the value is clipped as the policy is.

    It is not in PPO's paper, but in its authors' code (S. Huang et al., "The 37 Implementation Details of PPO", 2022).
    """
    free = (values - returns).square()
    if limit is None:
        return ValueLoss(free / 2, torch.zeros_like(free, dtype=torch.bool))
    clipped = (old_values + (values - old_values).clamp(-limit, limit) - returns).square()
    return ValueLoss(torch.maximum(free, clipped) / 2, clipped > free)


def _explained_variance(error: float, square: float, mean: float) -> float:
    return 1 - ratio(error, square - mean**2)


DERIVED: dict[str, Derived] = {
    "policy/explained_variance": (("policy/value_error", "policy/return_square", "policy/return"), _explained_variance)
}
"""Metrics that are computed from merged ones."""


def critic_loss(values: Tensor, batch: TokenBatch, limit: float | None) -> tuple[Tensor, Metrics]:
    """The loss of the critic on a microbatch: the sum of the tokens' losses, each over the tokens of the update.

    Args:
        values: the critic's values of the states before the targets `[targets]`, with gradient.
        batch: the microbatch, with the token fields `values`, `returns` and `value_weights`.
        limit: see `value_loss`.
    """
    fields, metrics = batch.token_fields, Metrics()
    losses, cut = value_loss(values, fields["values"], fields["returns"], limit)
    counted = fields["weights"] != 0
    for name, observed in (
        ("policy/value", fields["values"]),
        ("policy/return", fields["returns"]),
        ("policy/value_loss", losses.detach()),
        ("policy/value_clip_frac", cut),
        ("policy/value_error", (fields["returns"] - fields["values"]).square()),
        ("policy/return_square", fields["returns"].square()),
    ):
        metrics.mean(name, observed[counted].sum(), counted.sum())
    return (fields["value_weights"] * losses).sum(), metrics


def with_advantages(
    microbatches: Sequence[TokenBatch], algorithm: Any, all_reduce: Callable[[Tensor], object]
) -> list[TokenBatch]:
    """Replace the token field `advantages`, which holds the reward of each completion, and add `returns` and the weight
    of each token in the critic's loss, `value_weights`.

    Args:
        microbatches: those of one update, with the token field `values` of the critic before the step.
        algorithm: the row; with `normalization: whiten` the advantages get mean 0 and deviation 1 over the update.
        all_reduce: sums a tensor over the processes, in place.
    """
    estimated = [_with_estimates(batch, algorithm) for batch in microbatches]
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in estimated:
        values = batch.token_fields["advantages"][batch.token_fields["weights"] != 0].double()
        sums += torch.tensor([len(values), float(values.sum()), float(values.square().sum())], dtype=torch.float64)
    all_reduce(sums)
    _, total, squares = (sums / sums[0].clamp(min=1)).tolist()
    mean, scale = 0.0, 1.0
    if algorithm.normalization == "whiten":
        mean, scale = total, 1 / (max(squares - total**2, 0.0) ** 0.5 + STD_EPS)
    return [_finished(batch, mean, scale, 1 / max(float(sums[0]), 1.0)) for batch in estimated]


def _finished(batch: TokenBatch, mean: float, scale: float, weight: float) -> TokenBatch:
    fields = batch.token_fields
    return _with_fields(
        batch,
        advantages=(fields["advantages"] - mean) * scale,
        value_weights=weight * (fields["weights"] != 0).to(fields["values"].dtype),
    )


def _with_estimates(batch: TokenBatch, algorithm: Any) -> TokenBatch:
    fields, ids = batch.token_fields, batch.sequence_ids
    rewards = fields["advantages"].where(_is_last(ids), 0.0)
    if algorithm.beta > 0 and algorithm.kl_in == "reward":
        kl = KL_ESTIMATORS[algorithm.kl].configured(algorithm)(fields["old_logprobs"], fields["ref_logprobs"])
        rewards = rewards - algorithm.beta * kl
    advantages = gae(rewards, fields["values"], ids, algorithm)
    return _with_fields(batch, advantages=advantages, returns=advantages + fields["values"])


def _with_fields(batch: TokenBatch, **fields: Tensor) -> TokenBatch:
    return replace(batch, token_fields={**batch.token_fields, **fields})


def _next(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """The value of the next target of the same sequence; 0 behind the last one."""
    return torch.cat((values[1:], values.new_zeros(1))).masked_fill(_is_last(sequence_ids), 0.0)[: len(values)]


def _is_last(sequence_ids: Tensor) -> Tensor:
    """Whether a target is the last one of its sequence, bool."""
    last = torch.ones_like(sequence_ids, dtype=torch.bool)
    last[:-1] = sequence_ids[1:] != sequence_ids[:-1]
    return last
