"""The input of a model: packed tokens without padding.

In shapes, `tokens` is the number of tokens of a microbatch, and `targets` the number of tokens that get a log-prob.

A `SequenceGroup` is one prompt with the completions that share it; packing does not split it. The prompt is stored and
computed once. `collate` lays groups end to end as segments `[prompt | completion 0 | completion 1 | ...]`. A completion
attends to its own earlier tokens and to its parent segment, the prompt. The first token of every completion is
predicted from the prompt's last token, so predictions are (source, target) pairs and not a shift by one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, overload

from llmquest_rl.deferred import torch
from llmquest_rl.soft_targets import SoftTargets, TopTokens, joined_or_blank

if TYPE_CHECKING:
    from torch import Tensor


GOOD, BAD, MISMATCHED = 1.0, -1.0, 2.0
"""Values of the token field `sides`: the answer is good, is bad, or belongs to another prompt; 0 = it is no answer."""


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """A prompt and the completions that share it, with values per token for the loss."""

    prompt: list[int]
    """Token ids. Empty for a pretraining document; then the first token of each completion is not a target."""
    completions: list[list[int]]
    token_fields: dict[str, list[list[float]]] = field(default_factory=dict)
    """Values by name, one float per token of each completion: `weights`, `advantages`, `rollout_logprobs`, …"""
    mask: list[list[bool]] | None = None
    """True for each completion token that is a target; None = all are."""
    images: Tensor | None = None
    """The images of the prompt `[n, channels, height, width]`, in order; None = text only."""
    reference_prompt: list[int] | None = None
    """The prompt that the reference model reads in place of `prompt`; None = the same."""
    top_tokens: list[TopTokens] | None = None
    """A teacher's most likely tokens at every token of each completion; None = there are none."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the group: an upper bound of those that the model computes."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)

    @property
    def longest_sequence(self) -> int:
        """Number of tokens of the prompt with its longest completion."""
        return len(self.prompt) + max((len(completion) for completion in self.completions), default=0)

    @property
    def targets(self) -> list[list[bool]]:
        """True for each completion token that gets a log-prob; the first one has none without a prompt."""
        masks = self.mask or [[True] * len(completion) for completion in self.completions]
        return masks if self.prompt else [[False] * bool(mask) + mask[1:] for mask in masks]

    def with_token_field(self, name: str, values: list[list[float]]) -> SequenceGroup:
        """A copy of the group with one token field added or replaced."""
        return replace(self, token_fields={**self.token_fields, name: values})

    def with_constants(self, name: str, values: Sequence[float]) -> SequenceGroup:
        """A copy of the group with a token field that has one value for each completion."""
        pairs = zip(values, self.completions, strict=True)
        return self.with_token_field(name, [[value] * len(completion) for value, completion in pairs])

    def with_target_values(self, name: str, values: Sequence[float]) -> SequenceGroup:
        """A copy of the group with a token field that has one value for each target, in order; other tokens have 0."""
        remaining = iter(values)
        by_token = [[next(remaining) if is_target else 0.0 for is_target in mask] for mask in self.targets]
        return self.with_token_field(name, by_token)

    def expanded(self) -> list[SequenceGroup]:
        """One group per completion, each with its own copy of the prompt, for models that cannot share it."""
        return [
            SequenceGroup(
                self.prompt,
                [completion],
                {name: [values[i]] for name, values in self.token_fields.items()},
                None if self.mask is None else [self.mask[i]],
                self.images,
                top_tokens=None if self.top_tokens is None else [self.top_tokens[i]],
            )
            for i, completion in enumerate(self.completions)
        ]

    def unshared(self) -> SequenceGroup:
        """One group in which each completion has its own copy of the prompt, for models that cannot share it.

        Raises:
            ValueError: the group has images, which need a prompt.
        """
        if self.images is not None:
            raise ValueError("a group with images needs a prompt, because the image tokens are in the prompt")
        size = len(self.prompt)
        masks = self.mask or [[True] * len(completion) for completion in self.completions]
        return SequenceGroup(
            [],
            [self.prompt + completion for completion in self.completions],
            {name: [[0.0] * size + row for row in values] for name, values in self.token_fields.items()},
            [[False] * size + mask for mask in masks],
            top_tokens=None if self.top_tokens is None else [tokens.after(size) for tokens in self.top_tokens],
        )


class LazyGroups(Sequence[SequenceGroup], ABC):
    """Sequence groups, each of which is made when it is read."""

    @abstractmethod
    def at(self, index: int) -> SequenceGroup:
        """The group of an index from 0 to the length."""

    @overload
    def __getitem__(self, index: int) -> SequenceGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[SequenceGroup]: ...
    def __getitem__(self, index: int | slice) -> SequenceGroup | list[SequenceGroup]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]


@dataclass(frozen=True, slots=True)
class Layout:
    """The segments of packed tokens. A token attends to earlier tokens of its segment and to the parent segment."""

    lengths: tuple[int, ...]
    """Number of tokens in each segment, in order."""
    parents: tuple[int, ...]
    """Index of the earlier segment that each segment continues (its prompt), or -1."""

    @property
    def starts(self) -> list[int]:
        """Index of each segment's first token."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Position ids `[tokens]`: a continuation starts where its parent ends."""
        ranges = [
            torch.arange(length) + (self.lengths[parent] if parent >= 0 else 0)
            for length, parent in zip(self.lengths, self.parents, strict=True)
        ]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One packed microbatch."""

    tokens: Tensor
    """Token ids, int64 `[tokens]`."""
    positions: Tensor
    """Positions for RoPE or learned embeddings, int64 `[tokens]`."""
    layout: Layout
    sources: Tensor
    """Index into `tokens` of the token that predicts each target, int64 `[targets]`."""
    targets: Tensor
    """Token ids to be predicted, int64 `[targets]`."""
    sequence_ids: Tensor
    """Number of the completion to which each target belongs, int64 `[targets]`."""
    token_fields: dict[str, Tensor]
    """Values by name, float32 `[targets]` each."""
    images: Tensor | None = None
    """The images of all segments `[n, channels, height, width]`, in order; None = text only."""
    image_counts: tuple[int, ...] = ()
    """Number of images of each segment; empty for text only."""
    experts: Tensor | None = None
    """The experts that the old policy's routers chose, int16 `[layers with experts, tokens, k]`; None = not recorded.
    They are not a token field, because token fields have values for targets only."""
    soft_targets: SoftTargets | None = None
    """The distributions that a teacher gives the targets; None = there is no teacher that gives any."""

    def to(self, device: torch.device | str) -> TokenBatch:
        """A copy of the batch with every tensor on `device`."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("tokens", "positions", "sources", "targets", "sequence_ids")
        }
        return replace(
            self,
            **moved,
            token_fields={name: field.to(device) for name, field in self.token_fields.items()},
            images=None if self.images is None else self.images.to(device),
            experts=None if self.experts is None else self.experts.to(device),
            soft_targets=None if self.soft_targets is None else self.soft_targets.to(device),
        )


def collate(groups: Sequence[SequenceGroup]) -> TokenBatch:
    """Lay groups end to end into one packed batch, without the tokens that predict no target (e.g. the last of each).

    Raises:
        ValueError: a token field or mask does not have one value per completion token; a group has images but no
            prompt; or images differ in size.
    """
    names = list(groups[0].token_fields) if groups else []
    packed = _Packed(token_fields={name: [] for name in names})
    for group in groups:
        packed.add(group)
    layout = Layout(tuple(packed.lengths), tuple(packed.parents))
    images, image_counts = _images(groups)
    return TokenBatch(
        tokens=torch.tensor(packed.tokens, dtype=torch.long),
        positions=layout.positions(),
        layout=layout,
        sources=torch.tensor(packed.sources, dtype=torch.long),
        targets=torch.tensor(packed.targets, dtype=torch.long),
        sequence_ids=torch.tensor(packed.sequence_ids, dtype=torch.long),
        token_fields={name: torch.tensor(values, dtype=torch.float32) for name, values in packed.token_fields.items()},
        images=images,
        image_counts=image_counts,
        soft_targets=joined_or_blank(packed.top_tokens) if any(group.top_tokens for group in groups) else None,
    )


@dataclass(slots=True)
class _Packed:
    """The lists that become the tensors of a `TokenBatch`, under its names."""

    token_fields: dict[str, list[float]]
    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    sequence_ids: list[int] = field(default_factory=list)
    top_tokens: list[TopTokens | int] = field(default_factory=list)
    num_sequences: int = 0

    def add(self, group: SequenceGroup) -> None:
        """Append a group: the segment of its prompt, then one segment for each completion."""
        parent, last_prompt_index = -1, -1
        if group.prompt:
            parent, last_prompt_index = len(self.lengths), len(self.tokens) + len(group.prompt) - 1
            self.tokens += group.prompt
            self.lengths.append(len(group.prompt))
            self.parents.append(-1)
        for i, completion in enumerate(group.completions):
            mask = _mask(group, i, list(self.token_fields))
            kept = [j for j, keep in enumerate(mask) if keep and (j > 0 or group.prompt)]
            start = len(self.tokens)
            read = completion[: kept[-1]] if kept else []
            self.tokens += read
            self.lengths.append(len(read))
            self.parents.append(parent)
            self.sources += [start + j - 1 if j > 0 else last_prompt_index for j in kept]
            self.targets += [completion[j] for j in kept]
            self.sequence_ids += [self.num_sequences] * len(kept)
            for name, values in self.token_fields.items():
                values += [group.token_fields[name][i][j] for j in kept]
            self.top_tokens.append(len(kept) if group.top_tokens is None else group.top_tokens[i].rows(kept))
            self.num_sequences += 1


def _mask(group: SequenceGroup, i: int, names: Sequence[str]) -> list[bool]:
    """The target mask of completion `i`, after a check that the mask and token fields have one value per token."""
    completion = group.completions[i]
    mask = group.mask[i] if group.mask is not None else [True] * len(completion)
    signals: list[Sequence[object]] = [mask, *(group.token_fields[name][i] for name in names)]
    if any(len(values) != len(completion) for values in signals):
        raise ValueError(f"completion {i} has {len(completion)} tokens, but a mask or token field of another length")
    return mask


def _images(groups: Sequence[SequenceGroup]) -> tuple[Tensor | None, tuple[int, ...]]:
    """All images `[n, channels, height, width]`, and the number of images of each segment."""
    found = [group.images for group in groups if group.images is not None]
    if not found:
        return None, ()
    if any(group.images is not None and not group.prompt for group in groups):
        raise ValueError("a group has images but no prompt: the image tokens are in the prompt")
    sizes = {tuple(images.shape[1:]) for images in found}
    if len(sizes) > 1:
        raise ValueError(f"the images of a batch differ in size, {sorted(sizes)}: resize them to one size")
    counts: list[int] = []
    for group in groups:
        own = 0 if group.images is None else len(group.images)
        counts += [own] * bool(group.prompt) + [0] * len(group.completions)
    return torch.cat(found), tuple(counts)
