"""Continuous batching: completions join and leave a running batch, and every step samples one token for each.

Rows have no holes: when a completion ends, the last row moves into its place, also in the cache. A prompt is computed
when its first completion joins, and removed when its last completion has ended.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.generation.sampling import sample_tokens, stream_keys, stream_uniforms
from llmquest_rl.layers.attention.cache import DecodeContext, PrefillContext
from llmquest_rl.layers.attention.cache_slots import SlotCache
from llmquest_rl.models.base import CausalLM
from llmquest_rl.types import FinishReason, Request, Sampling

PREFILL_TOKENS = 4096
"""Maximum prompt tokens per forward: enough for full speed, with bounded memory."""


class GenerationError(RuntimeError):
    """The model computed logits that no token can be sampled from."""


@dataclass(slots=True, eq=False)
class RunningPrompt:
    """The prompt of a request, with the progress of its completions."""

    request: int
    """Index of the request."""
    ids: list[int]
    """Token ids of the prompt."""
    n: int
    """Completions to sample."""
    limit: int
    """Maximum tokens per completion."""
    keys: list[int]
    """Random stream of each completion `[n]`."""
    images: Tensor | None = None
    """Images of the prompt `[images, channels, height, width]`; None = text only."""
    slot: int = -1
    """Slot in the prompt cache; -1 = not computed yet."""
    joined: int = 0
    """Completions that have joined the batch."""
    ended: int = 0
    """Completions that have ended."""
    state: Tensor | None = None
    """Final hidden state of the last prompt token `[1, size]`, which predicts the first token of each completion."""


@dataclass(slots=True, eq=False)
class RunningCompletion:
    """A completion that is being sampled."""

    prompt: RunningPrompt
    index: int
    """Index among the completions of its request."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """Maximum numbers of prompts, completions and tokens in a batch."""

    prompts: int
    """Prompts at the same time."""
    prompt_tokens: int
    """Tokens per prompt."""
    rows: int
    """Completions at the same time."""
    completion_tokens: int
    """Cached tokens per completion; the last sampled token is never read again, so it is not cached."""

    @property
    def tokens(self) -> int:
        """Tokens that the two caches reserve together."""
        return self.prompts * self.prompt_tokens + self.rows * self.completion_tokens

    def covers(self, other: "CacheCapacity") -> bool:
        """True if this capacity is at least `other` in every respect."""
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


class Caches:
    """The caches of a batch: one of prompts and one of completions."""

    def __init__(self, capacity: CacheCapacity, device: torch.device) -> None:
        self.capacity = capacity
        self.prompts = SlotCache(capacity.prompts, capacity.prompt_tokens, device)
        self.completions = SlotCache(capacity.rows, capacity.completion_tokens, device)

    @property
    def num_bytes(self) -> int:
        """Reserved memory of both caches, in bytes."""
        return self.prompts.num_bytes + self.completions.num_bytes


def waiting_queue(requests: Sequence[Request], limits: Sequence[int]) -> deque[RunningPrompt]:
    """Queue up requests in the order in which they join the batch.

    Long prompts come first, so that neighbouring cache slots have similar lengths and buckets need little padding.

    Args:
        requests: The requests; those without completions are left out.
        limits: Maximum tokens per completion of each request.
    """
    prompts = [
        RunningPrompt(
            i,
            request.prompt_ids,
            request.n,
            limit,
            stream_keys(request.seed, request.n).tolist(),
            None if request.images is None else torch.tensor(request.images),
        )
        for i, (request, limit) in enumerate(zip(requests, limits, strict=True))
        if request.n > 0
    ]
    return deque(sorted(prompts, key=lambda prompt: -len(prompt.ids)))


class RunningBatch:
    """The completions that are sampled together, and the prompts that they need."""

    def __init__(
        self, model: CausalLM, caches: Caches, capacity: CacheCapacity, sampling: Sampling, eos_ids: frozenset[int]
    ) -> None:
        self._model = model
        self._caches = caches
        self._capacity = capacity
        self._sampling = sampling
        self._eos_ids = eos_ids
        self._device = next(model.parameters()).device
        self._prompts: list[RunningPrompt] = []
        """Prompts in slot order."""
        self.rows: list[RunningCompletion] = []
        """Completions in slot order; those that joined last and have no token yet are at the end."""

    def admit(self, waiting: deque[RunningPrompt]) -> None:
        """Move completions from the queue to the batch while there is room, and compute new prompts."""
        new: list[RunningPrompt] = []
        while waiting and len(self.rows) < self._capacity.rows:
            prompt = waiting[0]
            if prompt.slot < 0:
                if len(self._prompts) == self._capacity.prompts:
                    break
                prompt.slot = len(self._prompts)
                self._prompts.append(prompt)
                new.append(prompt)
            stop = min(prompt.n, prompt.joined + self._capacity.rows - len(self.rows))
            self.rows += [RunningCompletion(prompt, index) for index in range(prompt.joined, stop)]
            prompt.joined = stop
            if prompt.joined == prompt.n:
                waiting.popleft()
        for pack in pack_slices([len(prompt.ids) for prompt in new]):
            self._prefill(new[pack])

    def _prefill(self, prompts: Sequence[RunningPrompt]) -> None:
        layout = Layout(tuple(len(prompt.ids) for prompt in prompts), (-1,) * len(prompts))
        context = PrefillContext(self._caches.prompts, layout, [prompt.slot for prompt in prompts])
        tokens = torch.tensor([token for prompt in prompts for token in prompt.ids])
        positions = layout.positions()
        image_inputs = self._images(prompts)
        states = self._model.hidden(tokens.to(self._device), positions.to(self._device), context, **image_inputs).states
        for prompt, start in zip(prompts, layout.starts, strict=True):
            prompt.state = states[start + len(prompt.ids) - 1, None].clone()

    def _images(self, prompts: Sequence[RunningPrompt]) -> dict[str, Any]:
        """Keyword arguments with the images of the prompts, for a vision-language model; empty without images."""
        found = [prompt.images for prompt in prompts if prompt.images is not None]
        if not found:
            return {}
        counts = [0 if prompt.images is None else len(prompt.images) for prompt in prompts]
        return {"images": torch.cat(found).to(self._device), "image_counts": counts}

    def sample_next(self) -> None:
        """Sample the next token of every row, and mark the completions that it ends.

        Raises:
            GenerationError: The logits of a row contain NaN or infinity.
        """
        tokens, logprobs = self._next_tokens(self._next_states())
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:  # NaN
                raise GenerationError(
                    f"request {row.prompt.request}, completion {row.index}: the logits of token {len(row.tokens)} "
                    "contain NaN or infinity, so no token can be sampled. Check the weights for NaN and infinity."
                )
            row.tokens.append(token)
            row.logprobs.append(logprob)
            if token in self._eos_ids:
                row.finish = "stop"
            elif len(row.tokens) == row.prompt.limit:
                row.finish = "length"

    def _next_tokens(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.tensor([row.prompt.keys[row.index] for row in self.rows])
        uniforms = stream_uniforms(keys, torch.tensor([len(row.tokens) for row in self.rows]))
        tokens, logprobs = sample_tokens(self._model.logits(states), self._sampling, uniforms.to(self._device))
        return tokens, logprobs

    def _next_states(self) -> Tensor:
        """Compute the hidden states `[rows, size]` that predict the next token of each row."""
        running = [row for row in self.rows if row.tokens]
        first = [self._prompt_state(row.prompt) for row in self.rows[len(running) :]]
        return torch.cat(([self._decode(running)] if running else []) + first)

    @staticmethod
    def _prompt_state(prompt: RunningPrompt) -> Tensor:
        assert prompt.state is not None, "a prompt is computed before its completions start"
        return prompt.state

    def _decode(self, rows: Sequence[RunningCompletion]) -> Tensor:
        lengths = [len(prompt.ids) for prompt in self._prompts]
        kept = [len(row.tokens) - 1 for row in rows]
        parents = [row.prompt.slot for row in rows]
        context = DecodeContext(self._caches.prompts, lengths, self._caches.completions, kept, parents)
        tokens = torch.tensor([row.tokens[-1] for row in rows], device=self._device)
        positions = torch.tensor([lengths[p] + k for p, k in zip(parents, kept, strict=True)], device=self._device)
        return self._model.hidden(tokens, positions, context).states

    def retire(self) -> list[RunningCompletion]:
        """Remove and return the completions that have ended, close the holes, and free unused prompts."""
        ended = [row for row in self.rows if row.finish is not None]
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.finish is not None:
                row.prompt.ended += 1
                last = self.rows.pop()
                if last is not row:
                    self.rows[slot] = last
                    self._caches.completions.move(len(self.rows), slot, len(last.tokens) - 1)
        for slot in reversed(range(len(self._prompts))):
            if self._prompts[slot].ended == self._prompts[slot].n:
                self._free_prompt(slot)
        return ended

    def _free_prompt(self, slot: int) -> None:
        self._prompts[slot].state = None
        last = self._prompts.pop()
        if last.slot != slot:
            self._caches.prompts.move(last.slot, slot, len(last.ids))
            self._prompts[slot] = last
            last.slot = slot


def pack_slices(lengths: Sequence[int]) -> list[slice]:
    """Split sequences of these lengths into runs of at most `PREFILL_TOKENS` tokens, or of one longer sequence."""
    slices: list[slice] = []
    start, size = 0, 0
    for i, length in enumerate(lengths):
        if i > start and size + length > PREFILL_TOKENS:
            slices.append(slice(start, i))
            start, size = i, 0
        size += length
    return [*slices, slice(start, len(lengths))] if lengths else []
