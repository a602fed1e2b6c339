"""What a model computes on: packed tokens without padding.

Shape legend: `tokens` = all tokens of a microbatch laid end to end; `targets` = the tokens that get a log-prob.

An `Atom` is what packing may not split: one prompt and the completions that share it. The prompt is stored, and
computed, once. `collate` lays atoms end to end as segments `[prompt | completion 0 | completion 1 | ...]`; a completion
sees its own earlier tokens and its parent segment, the prompt, and nothing else. Because the first token of every
completion is predicted from the prompt's last token, predictions are (source, target) pairs, not a shift by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from llmquest_rl.deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Atom:
    """A prompt and the completions that share it, with per-token training signals."""

    prompt: list[int]
    """May be empty (a pretraining document): then the first token of each completion is no target."""
    completions: list[list[int]]
    streams: dict[str, list[list[float]]] = field(default_factory=dict)
    """Signals by name, one float for each token of each completion: `weights`, `advantages`, `rollout_logprobs`, …"""
    mask: list[list[bool]] | None = None
    """Which completion tokens are targets; None = all of them."""
    images: Tensor | None = None
    """Images [n, channels, height, width] that the prompt's image tokens stand for, in their order; None = text."""

    @property
    def num_tokens(self) -> int:
        """Most tokens that the model computes for this atom: all of them but those that predict no target."""
        return len(self.prompt) + sum(len(completion) for completion in self.completions)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt) + max((len(completion) for completion in self.completions), default=0)

    def with_stream(self, name: str, values: list[list[float]]) -> Atom:
        """The same atom with one stream added or replaced."""
        return replace(self, streams={**self.streams, name: values})

    def expanded(self) -> list[Atom]:
        """One atom for each completion, each with its own copy of the prompt: for models that cannot share it."""
        return [
            Atom(
                self.prompt,
                [completion],
                {name: [values[i]] for name, values in self.streams.items()},
                None if self.mask is None else [self.mask[i]],
                self.images,
            )
            for i, completion in enumerate(self.completions)
        ]

    def unshared(self) -> Atom:
        """One atom in which each completion has its own copy of the prompt: for models that cannot share it.

        Raises:
            ValueError: it has images, which stand in a prompt.
        """
        if self.images is not None:
            raise ValueError("an atom with images cannot do without its prompt, where they stand")
        size = len(self.prompt)
        masks = self.mask or [[True] * len(completion) for completion in self.completions]
        return Atom(
            [],
            [self.prompt + completion for completion in self.completions],
            {name: [[0.0] * size + row for row in values] for name, values in self.streams.items()},
            [[False] * size + mask for mask in masks],
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Which packed token may see which: causal within a segment, plus everything in the segment's parent."""

    lengths: tuple[int, ...]
    """Tokens in each segment, in order."""
    parents: tuple[int, ...]
    """For each segment the index of the earlier segment that it continues (its prompt), or -1."""

    @property
    def starts(self) -> list[int]:
        """Index of each segment's first token."""
        return [0, *accumulate(self.lengths)][:-1]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def positions(self) -> Tensor:
        """Position ids [tokens]: a continuation starts where its parent ends."""
        ranges = [
            torch.arange(length) + (self.lengths[parent] if parent >= 0 else 0)
            for length, parent in zip(self.lengths, self.parents, strict=True)
        ]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One packed microbatch."""

    tokens: Tensor
    """Long [tokens]."""
    positions: Tensor
    """Long [tokens]: RoPE / learned positions."""
    layout: Layout
    sources: Tensor
    """Long [targets]: index into `tokens` of the position that predicts the target."""
    targets: Tensor
    """Long [targets]: the token ids to be predicted."""
    sequence_ids: Tensor
    """Long [targets]: the running number of the completion that the target belongs to."""
    streams: dict[str, Tensor]
    """Float32 [targets] each."""
    images: Tensor | None = None
    """Images [n, channels, height, width] of all segments, in their order; None = text only."""
    image_counts: tuple[int, ...] = ()
    """How many of `images` each segment has; empty for text only."""
    experts: Tensor | None = None
    """Int16 [layers with experts, tokens, k]: where the old policy's routers sent the tokens; None = not recorded. No
    stream: every token has them, and targets are fewer."""

    @property
    def num_sequences(self) -> int:
        """Completions in the batch that have at least one target."""
        return int(self.sequence_ids.max()) + 1 if self.sequence_ids.numel() else 0

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("tokens", "positions", "sources", "targets", "sequence_ids")
        }
        return replace(
            self,
            **moved,
            streams={name: stream.to(device) for name, stream in self.streams.items()},
            images=None if self.images is None else self.images.to(device),
            experts=None if self.experts is None else self.experts.to(device),
        )


def collate(atoms: Sequence[Atom]) -> TokenBatch:
    """Lay atoms end to end into one packed batch. Tokens that predict no target, as each last one, are left out.

    Raises:
        ValueError: a stream or mask does not have one value for each completion token; an atom has images without a
            prompt, or images differ in size.
    """
    tokens: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    names = list(atoms[0].streams) if atoms else []
    streams: dict[str, list[float]] = {name: [] for name in names}
    num_sequences = 0
    for atom in atoms:
        parent, last_prompt_index = -1, -1
        if atom.prompt:
            parent, last_prompt_index = len(lengths), len(tokens) + len(atom.prompt) - 1
            tokens += atom.prompt
            lengths.append(len(atom.prompt))
            parents.append(-1)
        for i, completion in enumerate(atom.completions):
            kept = [j for j, keep in enumerate(_mask(atom, i, names)) if keep and (j > 0 or atom.prompt)]
            start = len(tokens)
            read = completion[: kept[-1]] if kept else []
            tokens += read
            lengths.append(len(read))
            parents.append(parent)
            sources += [start + j - 1 if j > 0 else last_prompt_index for j in kept]
            targets += [completion[j] for j in kept]
            sequence_ids += [num_sequences] * len(kept)
            for name in names:
                values = atom.streams[name][i]
                streams[name] += [values[j] for j in kept]
            num_sequences += 1
    layout = Layout(tuple(lengths), tuple(parents))
    images, image_counts = _images(atoms)
    return TokenBatch(
        tokens=torch.tensor(tokens, dtype=torch.long),
        positions=layout.positions(),
        layout=layout,
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.long),
        streams={name: torch.tensor(values, dtype=torch.float32) for name, values in streams.items()},
        images=images,
        image_counts=image_counts,
    )


def _mask(atom: Atom, i: int, names: Sequence[str]) -> list[bool]:
    """Which tokens of completion `i` are targets; whatever belongs to a token is there for each."""
    completion = atom.completions[i]
    mask = atom.mask[i] if atom.mask is not None else [True] * len(completion)
    signals: list[Sequence[object]] = [mask, *(atom.streams[name][i] for name in names)]
    if any(len(values) != len(completion) for values in signals):
        raise ValueError(f"completion {i} has {len(completion)} tokens, but a mask or stream of another length")
    return mask


def _images(atoms: Sequence[Atom]) -> tuple[Tensor | None, tuple[int, ...]]:
    """All images end to end, and how many of them belong to each segment."""
    found = [atom.images for atom in atoms if atom.images is not None]
    if not found:
        return None, ()
    if any(atom.images is not None and not atom.prompt for atom in atoms):
        raise ValueError("an atom has images but no prompt: image tokens stand in the prompt")
    sizes = {tuple(images.shape[1:]) for images in found}
    if len(sizes) > 1:
        raise ValueError(f"the images of a batch differ in size, {sorted(sizes)}: resize them to one")
    counts: list[int] = []
    for atom in atoms:
        own = 0 if atom.images is None else len(atom.images)
        counts += [own] * bool(atom.prompt) + [0] * len(atom.completions)
    return torch.cat(found), tuple(counts)
