"""Groups of answers to one prompt, with the token field `sides`: which answers are good, and which are bad.

A pair is a good and a bad answer, in this order. A group may also hold a mismatched answer, which belongs to another
prompt: it has no loss, and `kto` estimates the KL with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llmquest_rl.batch import BAD, GOOD, MISMATCHED, SequenceGroup
from llmquest_rl.deferred import torch
from llmquest_rl.types import Group

USED = ("sides", "rollout_logprobs", "ref_logprobs")
"""Token fields of a data set, of rollouts or of a cache that a preference method uses."""


def with_sides(group: SequenceGroup) -> SequenceGroup:
    """The group with the field `sides` and without unused ones; two answers without `sides` are a pair."""
    used = replace(group, token_fields={name: group.token_fields[name] for name in USED if name in group.token_fields})
    is_pair = "sides" not in group.token_fields and len(group.completions) == 2
    return used.with_constants("sides", (GOOD, BAD)) if is_pair else used


def sides(group: SequenceGroup) -> list[float]:
    """The side of each answer; empty if the group has none."""
    return [values[-1] for values in group.token_fields.get("sides", ())]


def with_mismatched(group: SequenceGroup, other: SequenceGroup) -> SequenceGroup:
    """The group with the first answer of another group as a mismatched answer to its own prompt.

    Other token fields than `sides` are left out.
    """
    answer, mask = other.completions[0], other.targets[0]
    return replace(
        group,
        completions=[*group.completions, answer],
        token_fields={"sides": [*group.token_fields["sides"], [MISMATCHED] * len(answer)]},
        mask=[*group.targets, mask],
    )


def weight_answers(groups: Sequence[SequenceGroup]) -> list[SequenceGroup]:
    """Add the token field `weights`: every group of an update weighs the same, and so do its good and bad answers."""
    weighted = []
    for group in groups:
        own = [side in (GOOD, BAD) for side in sides(group)]
        share = 1 / (max(1, len(groups)) * max(1, sum(own)))
        weights = [share / sum(mask) if is_own else 0.0 for mask, is_own in zip(group.targets, own, strict=True)]
        weighted.append(group.with_constants("weights", weights))
    return weighted


def weight_good_tokens(groups: Sequence[SequenceGroup], of_tokens: bool) -> list[SequenceGroup]:
    """Add the token field `nll_weights`, whose sum over the good answers of an update is 1.

    Args:
        groups: all groups of the update.
        of_tokens: every token of the good answers weighs the same; otherwise every answer does.
    """
    lengths = [
        [sum(mask) if side == GOOD else 0 for mask, side in zip(group.targets, sides(group), strict=True)]
        for group in groups
    ]
    tokens, answers = sum(map(sum, lengths)), sum(length > 0 for group in lengths for length in group)
    return [
        group.with_constants(
            "nll_weights",
            [0.0 if not length else 1 / tokens if of_tokens else 1 / (answers * length) for length in own],
        )
        for group, own in zip(groups, lengths, strict=True)
    ]


def rollout_pair(group: Group, threshold: float | None) -> SequenceGroup | None:
    """The best and the worst completion of a group as a pair; None if they do not differ.

    Completions without a score or a token are left out. Of equal rewards the first completion is taken.

    Args:
        group: a prompt with graded completions.
        threshold: the reward that the chosen completion must reach and the rejected one must not; None = any two that
            differ.
    """
    scored = [
        (score.value, completion)
        for completion, score in zip(group.completions, group.scores, strict=True)
        if score.value is not None and completion.token_ids
    ]
    if not scored:
        return None
    values = [value for value, _ in scored]
    best, worst = values.index(max(values)), values.index(min(values))
    if values[best] <= values[worst] or (threshold is not None and not values[worst] < threshold <= values[best]):
        return None
    chosen, rejected = scored[best][1], scored[worst][1]
    images = group.problem.images
    pair = SequenceGroup(
        group.problem.prompt_ids,
        [chosen.token_ids, rejected.token_ids],
        {"rollout_logprobs": [chosen.logprobs, rejected.logprobs]},
        images=None if images is None else torch.from_numpy(images),
    )
    return with_sides(pair)
