"""Preference optimisation: DPO and its relatives, one loss for every row of `algorithms/preference/presets.py`.

The loss of a pair is link(score(chosen), score(rejected)). The margin of the row scores an answer by its log-probs
under the policy and, for most rows, under a frozen reference model. The loss of an update is the mean over its pairs,
plus `nll_weight` times the negative log-prob of the chosen answers. `kto` takes answers one by one.

The answers are those of a data set (`preferences`, `unpaired_preferences`), or the best and the worst of the
completions that the run samples and grades (`source: rollout_pairs`), which makes online DPO a recipe of the RL loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from llmquest_rl.algorithms.preference.answers import (
    rollout_pair,
    sides,
    weight_answers,
    weight_good_tokens,
    with_mismatched,
    with_sides,
)
from llmquest_rl.algorithms.preference.links import LINKS
from llmquest_rl.algorithms.preference.margins import MARGINS, Answers
from llmquest_rl.algorithms.preference.method import READERS, Method
from llmquest_rl.algorithms.preference.presets import PRESETS, resolve
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.ratios import totals
from llmquest_rl.algorithms.sequence_groups import group_metrics
from llmquest_rl.algorithms.unused_settings import check_read
from llmquest_rl.batch import BAD, GOOD, MISMATCHED, SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.objectives import Descriptions, Loss, Objective, with_aux
from llmquest_rl.types import Group, Sampling

if TYPE_CHECKING:
    from torch import Tensor, nn

METRICS: Descriptions = {
    "train/loss": ("nats", "Loss of a pair (`kto`: of an answer), mean, without `pair_weight` and `nll_weight`."),
    "train/accuracy": ("share", "Pairs whose chosen answer has the higher score."),
    "train/margin": ("score", "Implicit reward of the chosen answers minus that of the rejected ones, mean."),
    "train/chosen_reward": ("reward", "Implicit reward of a chosen answer, beta times its score, mean."),
    "train/rejected_reward": ("reward", "Implicit reward of a rejected answer, mean."),
    "train/chosen_logprob": ("nats", "Log-prob of a chosen answer, summed over its tokens, mean."),
    "train/rejected_logprob": ("nats", "Log-prob of a rejected answer, summed over its tokens, mean."),
    "train/chosen_tokens": ("tokens", "Length of a chosen answer, mean."),
    "train/rejected_tokens": ("tokens", "Length of a rejected answer, mean."),
    "train/nll": ("nats", "Negative log-prob of a token of the chosen answers, mean. Only with `nll_weight`."),
    "train/pairs": ("count", "Pairs in the loss (`kto`: answers)."),
    "train/kl": (
        "nats",
        "KL to the reference model per answer. `kto`: its estimate from mismatched answers. `rollout_pairs`: mean over "
        "the policy's own answers.",
    ),
}


class Config(Method):
    """A preference method: a row of the table and any settings that override it.

    The defaults below apply to settings that the row does not set; `llmquest-rl algorithms` lists those that it sets.
    """

    method: str = "dpo"
    """Row of `llmquest_rl/algorithms/preference/presets.py`: `dpo`, `simpo`, `orpo`, `kto`, ..."""
    source: Literal["dataset", "rollout_pairs"] = "dataset"
    """`dataset`: pairs of a data set. `rollout_pairs`: the run samples and grades completions of a task's prompts, and
    the best and the worst completion of each group are a pair (online DPO)."""
    pair_threshold: float | None = None
    """`rollout_pairs`: the reward that a chosen completion must reach and a rejected one must not. null = any two
    rewards that differ make a pair."""

    reference_cache: Path | None = None
    """File of the reference's log-probs of the data set. If it is missing, it is made before the first step; the
    learners then need no reference model. A file of another model, data set or chat template is refused. null = the
    learners hold the reference model and compute its log-probs in every step."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_row(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        name = value.get("method", "dpo")
        resolve(name)
        return {**PRESETS[name], "method": name, **value}

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        check_read(self, resolve(self.method), READERS)
        if self.pair_threshold is not None and self.source == "dataset":
            raise ValueError("pair_threshold is read only with source: rollout_pairs: leave it out")
        if self.reference_cache is not None:
            self._check_cache()
        if self.source == "rollout_pairs" and not self.takes_pairs:
            raise ValueError("kto takes answers one by one: use a row of pairs with source: rollout_pairs")
        return self

    def _check_cache(self) -> None:
        reasons = (
            (not self.needs_reference, f"the margin {self.margin!r} needs no reference model"),
            (self.source == "rollout_pairs", "with source: rollout_pairs every step has new answers"),
            (not self.takes_pairs, "kto estimates a KL on answers to other prompts, which differ in every epoch"),
        )
        for is_so, reason in reasons:
            if is_so:
                raise ValueError(f"reference_cache: {reason}, so there is nothing to cache: leave it out")


def _margin(chosen: float, rejected: float) -> float:
    return chosen - rejected


@dataclass(frozen=True, slots=True)
class Preference(Objective):
    """The loss of one preference method. Batches carry the token fields `weights`, `sides` and, for some, others."""

    derived_metrics: ClassVar[Mapping[str, Derived]] = {
        "train/margin": (("train/chosen_reward", "train/rejected_reward"), _margin)
    }

    method: Config
    temperature: float = 1.0

    @property
    def source(self) -> Literal["rollout", "dataset"]:
        return "dataset" if self.method.source == "dataset" else "rollout"

    @property
    def needs_reference(self) -> bool:
        return self.method.needs_reference and self.reference_cache is None

    @property
    def reference_cache(self) -> Path | None:
        return self.method.reference_cache

    @property
    def needs_whole_group(self) -> int:
        return 2 if self.method.takes_pairs else 3

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        is_kl_estimated = not self.method.takes_pairs
        old = ("old_logprobs",) if is_kl_estimated or (self.source == "rollout" and updates > 1) else ()
        return (*old, "ref_logprobs") if self.needs_reference else old

    def sequence_groups(self, groups: Sequence[Group]) -> tuple[list[SequenceGroup], Metrics]:
        """See `Objective.sequence_groups`: a pair of every group whose best and worst completion differ."""
        pairs = (rollout_pair(group, self.method.pair_threshold) for group in groups)
        return [pair for pair in pairs if pair is not None], group_metrics(groups)

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """See `Objective.assign_token_weights`: every pair of an update weighs the same, and so do its two answers.

        Raises:
            ValueError: a group is not a pair, or, for `kto`, not one or two answers.
        """
        sided = [with_sides(group) for group in groups]
        for group in sided:
            self._check(group)
        if not self.method.takes_pairs:
            sided = [with_mismatched(group, sided[(i + 1) % len(sided)]) for i, group in enumerate(sided)]
        weighted = weight_answers(sided)
        if self.method.nll_weight == 0:
            return weighted
        return weight_good_tokens(weighted, of_tokens=self.method.nll_mean == "token")

    def _check(self, group: SequenceGroup) -> None:
        found = sides(group)
        if (found == [GOOD, BAD]) if self.method.takes_pairs else found and set(found) <= {GOOD, BAD}:
            return
        wanted, data = (
            ("pairs of a chosen and a rejected answer", "preferences")
            if self.method.takes_pairs
            else ("answers that are good or bad", "unpaired_preferences")
        )
        raise ValueError(
            f"the method {self.method.method!r} learns from {wanted}: use a data set of them, e.g. "
            f"`data: {{dataset: {{name: {data}, path: answers.jsonl}}}}`"
        )

    def with_shared_values(
        self, microbatches: list[TokenBatch], all_reduce: Callable[[Tensor], object]
    ) -> list[TokenBatch]:
        """See `Objective.with_shared_values`: `kto` needs the KL, estimated on the mismatched answers of the update."""
        if self.method.takes_pairs:
            return microbatches
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in microbatches:
            fields, ids = batch.token_fields, batch.sequence_ids
            is_mismatched = totals(fields["sides"], ids) == MISMATCHED * totals(torch.ones_like(fields["sides"]), ids)
            gaps = totals(fields["old_logprobs"] - fields["ref_logprobs"], ids)[is_mismatched]
            sums += torch.tensor([float(gaps.sum()), len(gaps)], dtype=torch.float64)
        all_reduce(sums)
        kl = float((sums[0] / sums[1].clamp(min=1)).clamp(min=0))
        return [
            replace(batch, token_fields={**batch.token_fields, "kl": torch.full_like(batch.token_fields["sides"], kl)})
            for batch in microbatches
        ]

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        output = model(batch, temperature=self.temperature)
        value, metrics = self.pair_losses(output.logprobs, batch)
        return with_aux(value, output.aux, batch, metrics)

    def pair_losses(self, logprobs: Tensor, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """The weighted loss of a microbatch, a scalar, and metrics.

        Args:
            logprobs: log-probs of the targets under the current policy `[targets]`, with gradient.
            batch: the microbatch.
        """
        method, fields, ids = self.method, batch.token_fields, batch.sequence_ids
        tokens = totals(torch.ones_like(logprobs), ids)
        side = totals(fields["sides"], ids) / tokens.clamp(min=1)
        reference = fields["ref_logprobs"] if self.method.needs_reference else torch.zeros_like(logprobs)
        answers = Answers(totals(logprobs, ids), totals(reference, ids), tokens.clamp(min=1))
        scores, weights = MARGINS[method.margin].function(answers), totals(fields["weights"], ids)
        good, bad = side == GOOD, side == BAD
        link = LINKS[method.link].configured(method)
        if method.takes_pairs:
            losses, of_loss = link(scores[good], scores[bad]), weights[good] + weights[bad]
        else:
            own, kl = good | bad, totals(fields["kl"], ids) / tokens.clamp(min=1)
            losses, of_loss = link(scores[own], side[own], kl[own]), weights[own]
        value = method.pair_weight * (of_loss * losses).sum()
        metrics = self._metrics(losses, scores.detach(), answers, good, bad)
        if method.nll_weight > 0:
            counted = fields["nll_weights"] > 0
            value = value - method.nll_weight * (fields["nll_weights"] * logprobs).sum()
            metrics.mean("train/nll", -logprobs.detach()[counted].sum(), counted.sum())
        self._kl_metrics(metrics, logprobs.detach(), batch, good | bad)
        return value, metrics

    def _metrics(self, losses: Tensor, scores: Tensor, answers: Answers, good: Tensor, bad: Tensor) -> Metrics:
        metrics = Metrics()
        metrics.mean("train/loss", losses.detach().sum(), len(losses))
        metrics.sum("train/pairs", len(losses))
        if self.method.takes_pairs:
            metrics.mean("train/accuracy", (scores[good] > scores[bad]).sum(), len(losses))
        rewards, logprobs = self.method.beta * scores, answers.logprobs.detach()
        for name, values, own in (
            ("train/chosen_reward", rewards, good),
            ("train/chosen_logprob", logprobs, good),
            ("train/chosen_tokens", answers.tokens, good),
            ("train/rejected_reward", rewards, bad),
            ("train/rejected_logprob", logprobs, bad),
            ("train/rejected_tokens", answers.tokens, bad),
        ):
            metrics.mean(name, values[own].sum(), own.sum())
        return metrics

    def _kl_metrics(self, metrics: Metrics, logprobs: Tensor, batch: TokenBatch, own: Tensor) -> None:
        """The KL to the reference, and for sampled answers the gap between the engine's and the learner's log-probs."""
        fields = batch.token_fields
        if "kl" in fields:
            metrics.mean("train/kl", fields["kl"].mean() * own.sum(), own.sum())
        if "rollout_logprobs" not in fields:
            return
        counted = fields["weights"] != 0
        ours = fields.get("old_logprobs", logprobs)
        gaps = (ours - fields["rollout_logprobs"])[counted].abs()
        metrics.mean("policy/logp_gap", gaps.sum(), counted.sum())
        if self.method.needs_reference:
            kl = totals(logprobs - fields["ref_logprobs"], batch.sequence_ids)[own]
            metrics.mean("train/kl", kl.sum(), own.sum())


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> Preference:
    """Build the objective. It ignores the section `algorithm`; sampled answers have the sampling's temperature."""
    return Preference(config, (sampling.temperature or 1.0) if config.source == "rollout_pairs" else 1.0)
