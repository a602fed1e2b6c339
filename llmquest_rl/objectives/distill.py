"""Distillation: the model learns from a teacher, a frozen model that reads the same tokens.

On-policy (`source: rollout`): the model samples completions, the teacher scores each of their tokens, and a token's
advantage is log(pi_teacher / pi_old). Its policy gradient is that of -KL(pi || pi_teacher) of the next token, at the
states that the model itself reaches (K. Lu, "On-Policy Distillation", Thinking Machines 2025; arXiv 2306.13649 has the
same states). The section `algorithm` says how the advantages become a loss, and how samples of an older or rounded
policy are corrected.

Self-distillation: without `teacher`, the teacher is the model itself, which reads a hint or the gold answer beside the
prompt (OPSD, arXiv 2601.18734; SDFT, arXiv 2601.19897).

Offline (`source: dataset`): KL(pi_teacher || pi) of the next token at every target of given sequences (Hinton et al.
2015, arXiv 1503.02531), over all tokens, or over the teacher's most likely ones, which a file keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.sequence_groups import group_metrics
from llmquest_rl.algorithms.variant import Weight
from llmquest_rl.batch import SequenceGroup, TokenBatch
from llmquest_rl.deferred import torch
from llmquest_rl.loader import ComponentError
from llmquest_rl.metrics import Derived, Metrics
from llmquest_rl.objectives import Descriptions, Loss, ModelOutput, Objective, Supervised, Teacher, with_aux
from llmquest_rl.objectives.next_token import NextToken
from llmquest_rl.objectives.policy import Policy
from llmquest_rl.options import Options
from llmquest_rl.types import Group, Sampling

if TYPE_CHECKING:
    from torch import nn

METRICS: Descriptions = {
    "train/reverse_kl": (
        "nats",
        "log(pi_old / pi_teacher) of a sampled token, mean: an estimate of KL(pi || pi_teacher) of the next token.",
    ),
    "train/kl": ("nats", "KL(pi_teacher || pi) of the next token, mean over the targets."),
    "train/nll": ("nats", "Negative log-prob of a target token, mean."),
    "train/tokens": ("tokens", "Target tokens in the loss."),
}

NOT_READ = {
    "advantage": "reward",
    "phantom_reward": None,
    "normalization": "none",
    "positive_weight": 1.0,
    "negative_weight": 1.0,
    "length_penalty": "none",
    "overlong_filter": False,
    "dynamic_sampling": False,
    "beta": 0.0,
    "ref_sync_interval": None,
}
"""Settings of `algorithm` that on-policy distillation does not read, with the values that change nothing."""


class Config(Options):
    """The teacher, and the sequences that it judges."""

    teacher: str | None = None
    """The model to learn from: a folder in the Hub's layout, or a Hub id, with the tokenizer of the student. null = the
    student's own initial weights, which then read `hint`."""
    source: Literal["rollout", "dataset"] = "rollout"
    """`rollout`: the model's own completions of a task's prompts, with the reverse KL (on-policy). `dataset`: given
    sequences, with the forward KL (offline)."""
    hint: str | None = None
    """The prompt that the teacher reads in place of the student's: `{prompt}` stands for the prompt, `{answer}` for the
    gold answer, and the name of any other column for its value. null = the same prompt."""
    scored_by: Literal["learners", "engine"] = "learners"
    """`rollout`: the processes that hold the teacher. `learners`: each of them holds all of it. `engine`: one further
    worker with the engine of `rollout`, e.g. vLLM; it takes the resources of a rollout worker."""
    teacher_sync_interval: PositiveInt | None = None
    """Self-distillation: steps after which the teacher gets the student's weights. null = it keeps the initial ones."""
    nll_weight: Weight = 0.0
    """`dataset`: weight of the negative log-prob of the given tokens, which is added to the KL."""
    cache: Path | None = None
    """`dataset`: file of the teacher's most likely tokens at every target of the data set. If it is missing, it is made
    before the first step; training then needs no teacher in memory. A file of another teacher or of other data is
    refused. null = the learners hold the teacher, and the KL is over all tokens."""
    top_k: PositiveInt = 64
    """`cache`: number of the teacher's most likely tokens at each target. All others count as one token."""

    @model_validator(mode="after")
    def _teacher_knows_more(self) -> Self:
        if self.teacher is None and self.hint is None:
            raise ValueError(
                "the teacher would be the model itself with the same prompt, so there is nothing to learn: name a "
                '`teacher`, or give a `hint`, e.g. "{prompt} (The answer is {answer}.)"'
            )
        if self.hint is not None and "{prompt}" not in self.hint:
            raise ValueError("the hint must contain {prompt}, the place of the prompt")
        return self

    @model_validator(mode="after")
    def _all_is_read(self) -> Self:
        rollout, dataset = ("source: rollout", self.source == "rollout"), ("source: dataset", self.source == "dataset")
        readers = {
            "hint": rollout,
            "scored_by": ("source: rollout and a `teacher`", self.source == "rollout" and self.teacher is not None),
            "teacher_sync_interval": ("self-distillation, without `teacher`", self.teacher is None),
            "nll_weight": dataset,
            "cache": dataset,
            "top_k": ("a `cache`", self.cache is not None),
        }
        for name, (condition, is_read) in readers.items():
            if not is_read and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is read only with {condition}: leave it out")
        return self


@dataclass(frozen=True, slots=True)
class OnPolicy(Objective):
    """The policy gradient with the advantages log(pi_teacher / pi_old) of the sampled tokens.

    Batches carry the token fields `weights`, `rollout_logprobs` and `ref_logprobs` (the teacher's), and `old_logprobs`
    if a step's batch serves more than one update.
    """

    derived_metrics: ClassVar[Mapping[str, Derived]] = Policy.derived_metrics

    policy: Policy
    teacher: Teacher = field()  # no default, although `Objective` has one
    ref_sync_interval: int | None = None
    source: Literal["rollout", "dataset"] = "rollout"

    @property
    def needs_reference(self) -> bool:
        return not self.teacher.in_engine

    @property
    def temperature(self) -> float:
        return self.policy.temperature

    @property
    def routing_replay(self) -> bool:
        return self.policy.routing_replay

    def computed_logprobs(self, updates: int) -> tuple[str, ...]:
        """See `Objective.computed_logprobs`: those of the policy, and the teacher's if the learners hold it."""
        return (*self.policy.computed_logprobs(updates), *["ref_logprobs"] * self.needs_reference)

    def sequence_groups(self, groups: Sequence[Group]) -> tuple[list[SequenceGroup], Metrics]:
        """See `Objective.sequence_groups`: every completion with a token, whatever its reward."""
        made = (_sequence_group(group) for group in groups)
        return [group for group in made if group.completions], group_metrics(groups)

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """See `Objective.assign_token_weights`: `algorithm.aggregation` gives them."""
        return self.policy.assign_token_weights(groups)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        policy = self.policy
        output = model(batch, temperature=policy.temperature, entropy=policy.entropy or policy.needs_entropy)
        return self.loss_of(output, batch)

    def loss_of(self, output: ModelOutput, batch: TokenBatch) -> Loss:
        """The loss of a microbatch whose forward pass has been computed."""
        fields, limit = batch.token_fields, self.policy.algorithm.advantage_limit
        gains = fields["ref_logprobs"] - self.policy.old_logprobs(output.logprobs.detach(), batch)
        advantages = gains if limit is None else gains.clamp(-limit, limit)
        loss = self.policy.loss_of(output, replace(batch, token_fields={**fields, "advantages": advantages}))
        counted = fields["weights"] != 0
        loss.metrics.mean("train/reverse_kl", -gains[counted].sum(), counted.sum())
        return loss


def _sequence_group(group: Group) -> SequenceGroup:
    kept = [completion for completion in group.completions if completion.token_ids]
    problem = group.problem
    return SequenceGroup(
        problem.prompt_ids,
        [completion.token_ids for completion in kept],
        {"rollout_logprobs": [completion.logprobs for completion in kept]},
        images=None if problem.images is None else torch.from_numpy(problem.images),
        reference_prompt=problem.reference_prompt_ids,
    )


@dataclass(frozen=True, slots=True)
class Offline(Supervised):
    """KL(pi_teacher || pi) of the next token, and `nll_weight` times the negative log-prob, mean over all targets.

    Batches carry the token field `weights`, and the teacher's distributions as `soft_targets`.
    """

    teacher: Teacher = field()
    nll_weight: float = 0.0
    needs_reference: bool = True

    def assign_token_weights(self, groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
        """See `Objective.assign_token_weights`: every target of an update weighs the same, as in `next_token`."""
        return NextToken().assign_token_weights(groups)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Loss:
        return self.loss_of(model(batch), batch)

    def loss_of(self, output: ModelOutput, batch: TokenBatch) -> Loss:
        """The loss of a microbatch whose forward pass has been computed."""
        weights, metrics = batch.token_fields["weights"], Metrics()
        counted = weights != 0
        # Without soft targets a microbatch has nothing but an idle group, of weight 0.
        kl = 0.0 * output.logprobs if output.teacher_kl is None else output.teacher_kl
        value = (weights * (kl - self.nll_weight * output.logprobs)).sum()
        metrics.mean("train/kl", kl.detach()[counted].sum(), counted.sum())
        metrics.mean("train/nll", -output.logprobs.detach()[counted].sum(), counted.sum())
        metrics.sum("train/tokens", counted.sum())
        return with_aux(value, output.aux, batch, metrics)


def build(config: Config, algorithm: Algorithm, sampling: Sampling) -> OnPolicy | Offline:
    """Build the objective. Offline distillation ignores algorithm and sampling.

    Raises:
        ComponentError: `algorithm` has a setting that would change nothing (the message names it), or an engine cannot
            score at the sampling temperature.
    """
    if config.source == "dataset":
        teacher = Teacher(config.teacher, None, True, config.cache, config.top_k)
        return Offline(teacher, config.nll_weight, needs_reference=config.cache is None)
    unread = {name: value for name, neutral in NOT_READ.items() if (value := getattr(algorithm, name)) != neutral}
    if unread:
        given = ", ".join(f"{name}: {value}" for name, value in unread.items())
        raise ComponentError(
            f"distillation takes its advantages from the teacher, so these settings of `algorithm` would change "
            f"nothing: {given}. Use e.g. `algorithm: {{name: reinforce, aggregation: token_mean}}`"
        )
    policy, in_engine = (
        Policy(algorithm, sampling.temperature or 1.0, sampling.max_tokens),
        config.scored_by == "engine",
    )
    if in_engine and policy.temperature != 1:
        raise ComponentError(
            f"an engine scores at temperature 1, but rollout.sampling.temperature is {policy.temperature:g}: set it to "
            "1, or objective.scored_by: learners"
        )
    return OnPolicy(policy, Teacher(config.teacher, config.hint, in_engine=in_engine), config.teacher_sync_interval)
