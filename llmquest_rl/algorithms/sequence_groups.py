"""Turns graded groups into sequence groups: an advantage for every completion, and a weight for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from math import nan
from typing import TYPE_CHECKING, NamedTuple

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.deferred import torch
from llmquest_rl.metrics import Metrics
from llmquest_rl.types import Completion, Group, Score

if TYPE_CHECKING:
    from torch import Tensor


REPEATED = 4
"""Number of tokens in a row that count as a repetition when they occur again."""


class _Compared(NamedTuple):
    """The samples of a group that are compared: those with a score and at least one token."""

    group: Group
    completions: list[Completion]
    rewards: Tensor
    """Float64 `[samples]`."""
    lengths: Tensor
    """Float64 `[samples]`, in tokens."""
    scores: list[Score]
    length_penalty: Tensor | None = None
    """The part of `rewards` that is the length penalty `[samples]`."""


def make_sequence_groups(
    groups: Sequence[Group], algorithm: Algorithm, max_tokens: int
) -> tuple[list[SequenceGroup], Metrics]:
    """Make one sequence group of each group, with the token fields `advantages` and `rollout_logprobs`.

    Unscored samples and empty completions are in neither the baseline nor the loss; with `overlong_filter` completions
    cut at the token limit are in the baseline only. If advantages are group-relative, those of a group with one
    sample left, or with equal rewards, are zero. A group without a sample left makes no sequence group.

    Args:
        groups: all groups of a step with completions and scores, because advantages may be normalised over the step.
        algorithm: names the advantage, the normalisation and the length penalty.
        max_tokens: maximum completion length.

    Returns:
        The sequence groups, and metrics on rewards and lengths.
    """
    metrics = group_metrics(groups)
    scored = [part for group in groups if (part := _compared(group)) is not None]
    compared = [_with_length_penalty(part, algorithm, max_tokens, metrics) for part in scored]
    if not compared:
        return [], metrics
    sequence_groups = (
        _sequence_group(part, advantages.tolist(), algorithm)
        for part, advantages in zip(compared, _advantages(compared, algorithm), strict=True)
    )
    return [sequence_group for sequence_group in sequence_groups if sequence_group.completions], metrics


def is_usable(group: Group, algorithm: Algorithm) -> bool:
    """Whether a group has a gradient: some completion that is in the loss has an advantage other than 0.

    With rewards of 0 and 1 and a group-relative advantage, this is 0 < correct completions < all (DAPO, arXiv
    2503.14476, equation 11), among the completions with a score and a token. As in the paper, the length penalty does
    not count. `overlong_filter` does: a group is not usable if only its cut completions have an advantage.
    """
    part = _compared(group)
    if part is None:
        return False
    advantages = _times_sign_weight(_group_advantages(part, algorithm), algorithm).tolist()
    pairs = zip(part.completions, advantages, strict=True)
    return any(advantage != 0 and _in_loss(completion, algorithm) for completion, advantage in pairs)


def token_weights(
    sequence_groups: Sequence[SequenceGroup], algorithm: Algorithm, max_tokens: int
) -> list[SequenceGroup]:
    """Add the token field `weights` to the sequence groups of one optimizer update.

    The weights depend on all of them, so pass the groups of all processes at once.
    """
    lengths = [[len(completion) for completion in sequence_group.completions] for sequence_group in sequence_groups]
    weights = AGGREGATIONS[algorithm.aggregation].configured(algorithm)(lengths, max_tokens)
    return [
        sequence_group.with_constants("weights", own)
        for sequence_group, own in zip(sequence_groups, weights, strict=True)
    ]


def _compared(group: Group) -> _Compared | None:
    kept = [
        (completion, score)
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score.value is not None and completion.token_ids
    ]
    if not kept:
        return None
    rewards = torch.tensor([score.value for _, score in kept], dtype=torch.float64)
    lengths = torch.tensor([len(completion.token_ids) for completion, _ in kept], dtype=torch.float64)
    completions, scores = map(list, zip(*kept, strict=True))
    return _Compared(group, completions, rewards, lengths, scores)


def _with_length_penalty(part: _Compared, algorithm: Algorithm, max_tokens: int, metrics: Metrics) -> _Compared:
    if algorithm.length_penalty == "none":
        return part
    penalty = LENGTH_PENALTIES[algorithm.length_penalty].configured(algorithm)
    added = penalty(part.rewards, part.lengths, max_tokens)
    metrics.mean("reward/length_penalty", float(added.sum()), len(part.completions))
    return part._replace(rewards=part.rewards + added, length_penalty=added)


def _advantages(compared: Sequence[_Compared], algorithm: Algorithm) -> list[Tensor]:
    """Advantages `[samples]` of each group."""
    estimated = [_group_advantages(part, algorithm) for part in compared]
    if ADVANTAGES[algorithm.advantage].by_critic:
        return estimated
    normalized = estimated
    if algorithm.normalization != "none":
        rewards, lengths = [part.rewards for part in compared], [part.lengths for part in compared]
        normalized = NORMALIZATIONS[algorithm.normalization].configured(algorithm)(estimated, rewards, lengths)
    limit = algorithm.advantage_limit
    weighted = [_times_sign_weight(group, algorithm) for group in normalized]
    return weighted if limit is None else [group.clamp(-limit, limit) for group in weighted]


def _times_sign_weight(advantages: Tensor, algorithm: Algorithm) -> Tensor:
    """Advantages times the weight of their sign."""
    return advantages.clamp(min=0) * algorithm.positive_weight + advantages.clamp(max=0) * algorithm.negative_weight


def _group_advantages(part: _Compared, algorithm: Algorithm) -> Tensor:
    """Advantages `[samples]`, from the total reward or from each reward by itself."""
    if not algorithm.decoupled_rewards:
        return _comparison(part.rewards, part.lengths, algorithm)
    advantages = torch.zeros_like(part.rewards)
    for weight, values in _each_reward(part):
        known = ~values.isnan()
        advantages[known] += weight * _comparison(values[known], part.lengths[known], algorithm)
    return advantages


def _each_reward(part: _Compared) -> Iterator[tuple[float, Tensor]]:
    """Weight and values `[samples]` of each reward; a value is NaN where the reward does not apply."""
    if not all(score.weights for score in part.scores):
        raise ValueError(
            "algorithm.decoupled_rewards compares each reward by itself, but these scores do not say how their rewards "
            "are weighted: an earlier version saved them. Sample again, e.g. with `llmquest-rl rollout`"
        )
    weights = {name: weight for score in part.scores for name, weight in score.weights.items()}
    for name, weight in weights.items():
        values = [score.parts.get(name) for score in part.scores]
        yield weight, part.rewards.new_tensor([nan if value is None else value for value in values])
    if part.length_penalty is not None:
        yield 1.0, part.length_penalty


def _comparison(rewards: Tensor, lengths: Tensor, algorithm: Algorithm) -> Tensor:
    """Advantages `[samples]` of these rewards of one group."""
    phantom = [] if algorithm.phantom_reward is None else [algorithm.phantom_reward]
    compared = torch.cat((rewards, rewards.new_tensor(phantom)))
    nothing_differs = len(rewards) < 2 or bool((compared == compared[0]).all())
    advantage = ADVANTAGES[algorithm.advantage]
    if advantage.nonnegative and bool((rewards < 0).any()):
        raise ValueError(
            f"advantage: {algorithm.advantage} divides by the mean reward of a group, so no reward may be below 0, but "
            f"one is {float(rewards.min()):g}: use rewards of 0 and 1, or advantage: group_mean"
        )
    if nothing_differs and advantage.group_relative:
        return torch.zeros_like(rewards)
    return advantage.configured(algorithm)(compared, lengths)[: len(rewards)]


def _sequence_group(part: _Compared, advantages: list[float], algorithm: Algorithm) -> SequenceGroup:
    kept = [
        (completion, advantage)
        for completion, advantage in zip(part.completions, advantages, strict=True)
        if _in_loss(completion, algorithm)
    ]
    images = part.group.problem.images
    return SequenceGroup(
        prompt=part.group.problem.prompt_ids,
        completions=[completion.token_ids for completion, _ in kept],
        token_fields={
            "advantages": [[advantage] * len(completion.token_ids) for completion, advantage in kept],
            "rollout_logprobs": [completion.logprobs for completion, _ in kept],
        },
        images=None if images is None else torch.from_numpy(images),
    )


def _in_loss(completion: Completion, algorithm: Algorithm) -> bool:
    return not (algorithm.overlong_filter and completion.finish_reason == "length")


def _std(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else 0.0


def repetition(token_ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that occurred before in the text; 0 if it is shorter.

    This is seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319, section 6.1).
    """
    runs = [tuple(token_ids[i : i + REPEATED]) for i in range(len(token_ids) - REPEATED + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def group_metrics(groups: Sequence[Group]) -> Metrics:
    """Metrics on the rewards and the lengths of the completions of a step."""
    metrics = Metrics()
    rewards = [[score.value for score in group.scores if score.value is not None] for group in groups]
    scored = list(chain.from_iterable(rewards))
    completions = sum(len(group.scores) for group in groups)
    metrics.mean("reward/mean", sum(scored), len(scored))
    metrics.mean("reward/std", _std(scored))
    metrics.mean("reward/group_std", sum(_std(values) for values in rewards), len(rewards))
    metrics.mean("reward/zero_std_group_share", sum(len(set(values)) < 2 for values in rewards), len(rewards))
    metrics.mean("reward/unscored_share", completions - len(scored), completions)
    metrics.sum("reward/scored_samples", len(scored))
    for score in chain.from_iterable(group.scores for group in groups):
        for name, part in score.parts.items():
            if part is not None:
                metrics.mean(f"reward/{name}", part)
    for completion in chain.from_iterable(group.completions for group in groups):
        metrics.mean("rollout/completion_tokens", len(completion.token_ids))
        metrics.max("rollout/completion_tokens_max", len(completion.token_ids))
        metrics.mean("rollout/truncated_share", float(completion.finish_reason == "length"))
        metrics.sum("rollout/empty_samples", float(not completion.token_ids))
        metrics.mean("rollout/repetition", repetition(completion.token_ids))
    return metrics
