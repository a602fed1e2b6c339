"""Policy gradient on graded rollouts: one loss for every row of the algorithm table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from llmquest_rl.algorithms import covariance, gae
from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.credit import CREDITS
from llmquest_rl.algorithms.is_correction import CORRECTIONS, Gap
from llmquest_rl.algorithms.kl import KL_ESTIMATORS, k3
from llmquest_rl.algorithms.masks import most_uncertain, on_policy_enough
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.ratios import RATIOS, bounded_exp, sum_to_end, totals
from llmquest_rl.algorithms.sequence_groups import make_sequence_groups, token_weights
from llmquest_rl.algorithms.surrogates import Tokens
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Derived, Metrics, ratio
from llmquest_rl.objectives import CriticOptions, Descriptions, Loss, ModelOutput, Objective, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Group, Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

RARE = math.log(0.1)
"""A token is rare if its log-prob under the old policy is lower: reasoning branches there (arXiv 2506.13585, 3.1)."""


METRICS: Descriptions = {
    "policy/loss": ("", "Weighted mean of the token losses. It is near 0 while ratios are 1: advantages sum to 0."),
    "policy/tokens": ("tokens", "Completion tokens in the loss."),
    "policy/entropy": ("nats", "Entropy of the next-token distribution, mean."),
    "policy/ratio": ("ratio", "Importance ratio of the current to the old policy, mean."),
    "policy/ratio_max": ("ratio", "Largest importance ratio."),
    "policy/clip_frac": (
        "share",
        "Tokens that the surrogate clipped. They have no gradient, or another weight with `clipped_weight`.",
    ),
    "policy/clip_low_frac": ("share", "Tokens that were clipped at the lower bound."),
    "policy/clip_high_frac": ("share", "Tokens that were clipped at the upper bound or at `dual_clip`."),
    "policy/clip_frac_rare": ("share", "Clipped tokens among those with a probability below 0.1 in the old policy."),
    "policy/clip_frac_common": ("share", "Clipped tokens among the other ones."),
    "policy/kl": ("nats", "Estimate k3 of KL(policy || reference), mean."),
    "policy/kl_sequence": ("nats", "The same, summed over the tokens of a completion, mean over completions."),
    "policy/approx_kl": ("nats", "Estimate k3 of KL(old policy || current policy), mean."),
    "policy/logp_gap": ("nats", "Absolute difference of the engine's and the learner's log-prob of a token, mean."),
    "policy/logp_gap_max": ("nats", "Largest such difference."),
    "policy/logp_gap_k3": ("nats", "Estimate k3 of KL(engine || learner), mean."),
    "policy/tis_weight": ("ratio", "Importance weight between engine and learner after the bounds, mean."),
    "policy/tis_square": ("", "Square of that weight, mean."),
    "policy/tis_capped_share": ("share", "Tokens whose importance weight was cut at a bound, or dropped."),
    "policy/tis_ess": ("share", "Effective sample size of the importance weights. 1 = engine and learner agree."),
    "policy/off_policy_share": ("share", "Tokens that `off_policy_delta` left out of the policy loss."),
    "policy/low_entropy_share": ("share", "Tokens that `top_entropy_fraction` left out of the policy loss."),
    "policy/high_covariance_share": ("share", "Tokens that `covariance` restrained."),
    "policy/credit_factor": ("ratio", "Factor of a token's advantage by `credit`, mean."),
    **gae.METRICS,
}


class Config(Options):
    """The policy-gradient objective. The section `algorithm` says which loss it computes."""

    entropy: bool = True
    """Log the policy's entropy. It costs about one more pass over the logits."""
    critic: CriticOptions = CriticOptions()
    """The critic of `algorithm.advantage: gae`: `{lr: 1e-5, path: runs/models/reward-model}`."""


def _effective_sample_size(weight: float, square: float) -> float:
    return ratio(weight**2, square)


@dataclass(frozen=True, slots=True)
class Policy(Objective):
    """sum_t weight_t (kept_t x correction_t x surrogate(ratio_t, advantage_t) + beta x kl_t - bonus x entropy_t).

    Batches carry the token fields `weights`, `advantages` and `rollout_logprobs`. They have `old_logprobs` only if a
    step's batch serves more than one update, because in a first update the old policy is the current one, and
    `ref_logprobs` only if beta > 0.
    """

    derived_metrics: ClassVar[Mapping[str, Derived]] = {
        "policy/tis_ess": (("policy/tis_weight", "policy/tis_square"), _effective_sample_size),
        **gae.DERIVED,
    }

    algorithm: Algorithm
    temperature: float = field()  # no default, although `Objective` has one
    max_tokens: int
    entropy: bool = True
    critic: CriticOptions | None = None
    source: Literal["rollout", "dataset"] = "rollout"

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.beta > 0

    @property
    def ref_sync_interval(self) -> int | None:
        return self.algorithm.ref_sync_interval

    @property
    def routing_replay(self) -> bool:
        return self.algorithm.routing_replay

    @property
    def needs_entropy(self) -> bool:
        """Whether the loss itself depends on the entropy."""
        return self.algorithm.entropy_bonus > 0 or self.algorithm.top_entropy_fraction < 1

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        algorithm = self.algorithm
        in_reward = self.critic is not None and algorithm.beta > 0 and algorithm.kl_in == "reward"
        old = ("old_logprobs",) if in_reward or (updates > 1 and algorithm.old_policy == "learner") else ()
        return (*old, "ref_logprobs") if self.needs_reference else old

    def sequence_groups(self, groups: Sequence[Group]) -> tuple[list[SequenceGroup], Metrics]:
        return make_sequence_groups(groups, self.algorithm, self.max_tokens)

    def with_shared_values(
        self, microbatches: list[TokenBatch], all_reduce: Callable[[Tensor], object]
    ) -> list[TokenBatch]:
        return gae.with_advantages(microbatches, self.algorithm, all_reduce) if self.critic else microbatches

    def value_loss(self, critic: nn.Module, batch: TokenBatch) -> Loss:
        scores = critic(batch)
        value, metrics = gae.critic_loss(scores.values[:, 0], batch, self.algorithm.value_clip)
        return Loss(
            value + sum(batch.token_fields["value_weights"].sum() * term for term in scores.aux.values()), metrics
        )

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        weighted = token_weights(groups, self.algorithm, self.max_tokens)
        if self.algorithm.covariance == "none":
            return weighted
        return covariance.with_high_covariance(weighted, self.algorithm.covariance, self.algorithm)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        output = model(batch, temperature=self.temperature, entropy=self.entropy or self.needs_entropy)
        return self.loss_of(output, batch)

    def loss_of(self, output: ModelOutput, batch: TokenBatch) -> Loss:
        """The loss of a microbatch whose forward pass has been computed."""
        losses, metrics = self.token_losses(output.logprobs, batch, output.entropy)
        weights = batch.token_fields["weights"]
        value = (weights * losses).sum()
        metrics.mean("policy/loss", value.detach(), weights.sum())
        if output.entropy is not None:
            counted = weights != 0
            metrics.mean("policy/entropy", output.entropy.detach()[counted].sum(), counted.sum())
        return with_aux(value, output.aux, batch, metrics)

    def token_losses(
        self, logprobs: Tensor, batch: TokenBatch, entropies: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        """Compute the unweighted loss of each token `[targets]`, and metrics over the tokens with a weight.

        Args:
            logprobs: log-probs of the targets under the current policy `[targets]`, with gradient.
            batch: the microbatch.
            entropies: entropy of the distribution of each target in nats `[targets]`; required if `needs_entropy`.
        """
        algorithm, ids, metrics = self.algorithm, batch.sequence_ids, Metrics()
        old = self.old_logprobs(logprobs, batch)
        counted = batch.token_fields["weights"] != 0
        advantages = self._advantages(logprobs.detach(), old, batch, metrics)
        ratios = RATIOS[algorithm.ratio].configured(algorithm)(logprobs, old, ids)
        tokens = Tokens(ratios, logprobs, old, advantages, ids)
        losses = SURROGATES[algorithm.surrogate].configured(algorithm)(tokens)
        losses = losses * self._correction(logprobs.detach(), old, batch, metrics)
        for kept in self._masks(logprobs, advantages, entropies, batch, metrics):
            losses = losses * kept
        if algorithm.beta > 0:
            losses = losses + self._kl(logprobs, old, batch, metrics)
        if covariance.COVARIANCES[algorithm.covariance].penalizes:
            losses = losses + self._covariance_penalty(logprobs, old, batch, metrics)
        if algorithm.entropy_bonus > 0 and entropies is not None:
            losses = losses - algorithm.entropy_bonus * entropies
        self._ratio_metrics(metrics, tokens, counted)
        metrics.mean("policy/approx_kl", k3(old, logprobs.detach())[counted].sum(), counted.sum())
        metrics.sum("policy/tokens", counted.sum())
        return losses, metrics

    def old_logprobs(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Log-probs `[targets]` of the old policy, the denominator of the ratio."""
        if self.algorithm.old_policy == "engine":
            return batch.token_fields["rollout_logprobs"]
        return batch.token_fields.get("old_logprobs", logprobs.detach())

    def _advantages(self, logprobs: Tensor, old: Tensor, batch: TokenBatch, metrics: Metrics) -> Tensor:
        """Advantages `[targets]`: those of the batch, minus the KL in the reward (summed from each token to the end),
        times the credit of each token."""
        algorithm, advantages = self.algorithm, batch.token_fields["advantages"]
        if algorithm.beta > 0 and algorithm.kl_in == "reward" and self.critic is None:
            kl = KL_ESTIMATORS[algorithm.kl].configured(algorithm)(old, batch.token_fields["ref_logprobs"])
            advantages = advantages - algorithm.beta * sum_to_end(kl, batch.sequence_ids)
        if algorithm.credit == "uniform":
            return advantages
        factors = CREDITS[algorithm.credit].configured(algorithm)(advantages, logprobs - old, batch.sequence_ids)
        counted = batch.token_fields["weights"] != 0
        metrics.mean("policy/credit_factor", factors[counted].sum(), counted.sum())
        return advantages * factors

    def _correction(self, logprobs: Tensor, old: Tensor, batch: TokenBatch, metrics: Metrics) -> Tensor:
        """Correction factor `[targets]` for the engine's rounding; 1 if the old policy is the engine's."""
        algorithm, rollout = self.algorithm, batch.token_fields["rollout_logprobs"]
        counted = batch.token_fields["weights"] != 0
        ours = logprobs if algorithm.old_policy == "engine" else old
        gap = Gap(ours, rollout, batch.sequence_ids)
        _mean_and_max(metrics, "policy/logp_gap", gap.log_ratio[counted].abs())
        metrics.mean("policy/logp_gap_k3", k3(rollout, ours)[counted].sum(), counted.sum())
        if algorithm.tis_cap is None or algorithm.old_policy == "engine":
            return torch.ones_like(rollout)
        correct = CORRECTIONS[algorithm.is_correction].configured(algorithm)
        weights, cut = correct(gap, algorithm.tis_floor, algorithm.tis_cap)
        metrics.mean("policy/tis_weight", weights[counted].sum(), counted.sum())
        metrics.mean("policy/tis_capped_share", cut[counted].sum(), counted.sum())
        metrics.mean("policy/tis_square", weights[counted].square().sum(), counted.sum())
        return weights

    def _masks(
        self, logprobs: Tensor, advantages: Tensor, entropies: Tensor | None, batch: TokenBatch, metrics: Metrics
    ) -> list[Tensor]:
        """Masks `[targets]` of the tokens that the policy loss keeps, one for each setting that leaves some out."""
        algorithm, ids, masks = self.algorithm, batch.sequence_ids, {}
        if algorithm.off_policy_delta is not None:
            rollout = batch.token_fields["rollout_logprobs"]
            kept = on_policy_enough(logprobs, rollout, advantages, ids, algorithm.off_policy_delta)
            masks["policy/off_policy_share"] = kept
        if algorithm.top_entropy_fraction < 1 and entropies is not None:
            masks["policy/low_entropy_share"] = most_uncertain(entropies.detach(), ids, algorithm.top_entropy_fraction)
        if covariance.COVARIANCES[algorithm.covariance].masks_tokens:
            masks["policy/high_covariance_share"] = batch.token_fields[covariance.FIELD] == 0
        counted = batch.token_fields["weights"] != 0
        for name, kept in masks.items():
            metrics.mean(name, (~kept)[counted].sum(), counted.sum())
        return list(masks.values())

    def _kl(self, logprobs: Tensor, old: Tensor, batch: TokenBatch, metrics: Metrics) -> Tensor:
        """The KL's term of the loss `[targets]`; 0 if the KL is in the reward."""
        algorithm, reference = self.algorithm, batch.token_fields["ref_logprobs"]
        counted = batch.token_fields["weights"] != 0
        estimates = torch.where(counted, k3(logprobs.detach(), reference), 0.0)
        metrics.mean("policy/kl", estimates.sum(), counted.sum())
        completions = totals(counted.float(), batch.sequence_ids) > 0
        metrics.mean("policy/kl_sequence", estimates.sum(), completions.sum())
        if algorithm.kl_in == "reward":
            return torch.zeros_like(reference)
        weight = bounded_exp(logprobs - old) if algorithm.kl_unbiased else 1.0
        return algorithm.beta * weight * KL_ESTIMATORS[algorithm.kl].configured(algorithm)(logprobs, reference)

    def _covariance_penalty(self, logprobs: Tensor, old: Tensor, batch: TokenBatch, metrics: Metrics) -> Tensor:
        """|log pi - log pi_old| of the tokens with the largest covariances, with its weight `[targets]`."""
        chosen, counted = batch.token_fields[covariance.FIELD], batch.token_fields["weights"] != 0
        metrics.mean("policy/high_covariance_share", chosen[counted].sum(), counted.sum())
        weight: float = self.algorithm.cov_kl
        return weight * chosen * (logprobs - old).abs()

    def _ratio_metrics(self, metrics: Metrics, tokens: Tokens, counted: Tensor) -> None:
        ratios = tokens.ratio.detach()[counted]
        cuts = SURROGATES[self.algorithm.surrogate].cuts
        if cuts is not None:
            low, high = (cut[counted] for cut in cuts(tokens, self.algorithm))
            rare = tokens.old_logprobs[counted] < RARE
            metrics.mean("policy/clip_frac", (low | high).sum(), ratios.numel())
            metrics.mean("policy/clip_frac_rare", (low | high)[rare].sum(), rare.sum())
            metrics.mean("policy/clip_frac_common", (low | high)[~rare].sum(), (~rare).sum())
            metrics.mean("policy/clip_low_frac", low.sum(), ratios.numel())
            metrics.mean("policy/clip_high_frac", high.sum(), ratios.numel())
        _mean_and_max(metrics, "policy/ratio", ratios)


def _mean_and_max(metrics: Metrics, name: str, values: Tensor) -> None:
    metrics.mean(name, values.sum(), values.numel())
    if values.numel():
        metrics.max(f"{name}_max", values.max())


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> Policy:
    """Build the objective of one run.

    A sampling temperature of 0 (greedy) has no distribution to train on. Engines then return log-probs at temperature
    1, and the objective uses temperature 1 as well.
    """
    if config.critic != CriticOptions() and not algorithm.has_critic:
        raise ValueError("objective.critic is read only with algorithm.advantage: gae, e.g. algorithm.name: ppo")
    critic = config.critic if algorithm.has_critic else None
    return Policy(algorithm, sampling.temperature or 1.0, sampling.max_tokens, config.entropy, critic)
