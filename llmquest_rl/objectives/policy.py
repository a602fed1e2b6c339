"""Policy gradient on graded rollouts: one loss for every row of the algorithm table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from llmquest_rl.algorithms.atoms import token_weights
from llmquest_rl.algorithms.kl import KL_ESTIMATORS, k3
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import SURROGATES
from llmquest_rl.batch import Atom, TokenBatch
from llmquest_rl.metrics import Metrics
from llmquest_rl.objectives import Loss, with_aux
from llmquest_rl.options import Options
from llmquest_rl.types import Sampling


class Config(Options):
    """The policy-gradient objective; what it computes is in the section `algorithm`."""

    entropy: bool = True
    """Log the policy's entropy: about one more pass over the logits."""


@dataclass(frozen=True, slots=True)
class Policy:
    """sum_t weight_t x tis_t x surrogate(ratio_t, advantage_t) + beta x weight_t x kl_t.

    Batches carry the streams `weights`, `advantages`, `rollout_logprobs`; `old_logprobs` only when a step's batch
    serves more than one update, because in a first update the old policy is the current one; `ref_logprobs` only when
    beta > 0.
    """

    algorithm: Algorithm
    temperature: float
    max_tokens: int
    entropy: bool = True
    source: Literal["rollout", "dataset"] = "rollout"

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.beta > 0

    def streams(self, updates: int) -> tuple[str, ...]:
        old = ("old_logprobs",) if updates > 1 else ()
        return (*old, "ref_logprobs") if self.needs_reference else old

    def weigh(self, atoms: Sequence[Atom]) -> list[Atom]:
        return token_weights(atoms, self.algorithm, self.max_tokens)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        output = model(batch, temperature=self.temperature, entropy=self.entropy)
        losses, metrics = self.token_losses(output.logprobs, batch)
        weights = batch.streams["weights"]
        value = (weights * losses).sum()
        metrics.mean("policy/loss", value.detach(), weights.sum())
        if output.entropy is not None:
            counted = weights != 0
            metrics.mean("policy/entropy", output.entropy[counted].sum(), counted.sum())
        return with_aux(value, output.aux, batch, metrics)

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Unweighted loss of each token [targets], and metrics over the tokens with a weight.

        Args:
            logprobs: of the current policy [targets], with gradient.
            batch: the microbatch.
        """
        algorithm, streams = self.algorithm, batch.streams
        old = streams.get("old_logprobs", logprobs.detach())
        ratio = RATIOS[algorithm.ratio](logprobs, old, batch.sequence_ids)
        losses = SURROGATES[algorithm.surrogate](ratio, streams["advantages"], algorithm.clip_low, algorithm.clip_high)
        counted = streams["weights"] != 0
        metrics = Metrics()
        if algorithm.tis_cap is not None:
            correction = (old - streams["rollout_logprobs"]).exp().clamp(max=algorithm.tis_cap)
            losses = losses * correction
            _tis_metrics(metrics, correction[counted], algorithm.tis_cap)
        if algorithm.beta > 0:
            reference = streams["ref_logprobs"]
            losses = losses + algorithm.beta * KL_ESTIMATORS[algorithm.kl](logprobs, reference)
            metrics.mean("policy/kl", k3(logprobs.detach(), reference)[counted].sum(), counted.sum())
        gap = (old - streams["rollout_logprobs"])[counted].abs()
        _mean_and_max(metrics, "policy/logp_gap", gap)
        self._ratio_metrics(metrics, ratio.detach()[counted], streams["advantages"][counted])
        metrics.mean("policy/approx_kl", k3(old, logprobs.detach())[counted].sum(), counted.sum())
        metrics.sum("policy/tokens", counted.sum())
        return losses, metrics

    def _ratio_metrics(self, metrics: Metrics, ratio: Tensor, advantages: Tensor) -> None:
        low = (ratio < 1 - self.algorithm.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.algorithm.clip_high) & (advantages > 0)
        metrics.mean("policy/clip_frac", (low | high).sum(), ratio.numel())
        metrics.mean("policy/clip_low_frac", low.sum(), ratio.numel())
        metrics.mean("policy/clip_high_frac", high.sum(), ratio.numel())
        _mean_and_max(metrics, "policy/ratio", ratio)


def _mean_and_max(metrics: Metrics, name: str, values: Tensor) -> None:
    metrics.mean(name, values.sum(), values.numel())
    if values.numel():
        metrics.max(f"{name}_max", values.max())


def _tis_metrics(metrics: Metrics, weights: Tensor, cap: float) -> None:
    metrics.mean("policy/tis_weight", weights.sum(), weights.numel())
    metrics.mean("policy/tis_capped_share", (weights >= cap).sum(), weights.numel())
    metrics.mean("policy/tis_square", weights.square().sum(), weights.numel())


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> Policy:
    """The objective of one run.

    A sampling temperature of 0 (greedy) has no distribution to train on; engines then give log-probs at temperature 1,
    and so does the objective.
    """
    return Policy(algorithm, sampling.temperature or 1.0, sampling.max_tokens, config.entropy)
