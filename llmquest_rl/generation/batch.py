"""The sequences that are being drawn at one moment: who joins, who leaves, and one token for each.

Rows are kept without holes: when a completion ends, the last row moves into its place, in the cache too. A prompt is
computed when its first completion joins and forgotten when its last one has ended.
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
"""Prompt tokens in one forward: enough for full speed, and bounds its memory."""


class GenerationError(RuntimeError):
    """The model gave logits from which nothing can be drawn."""


@dataclass(slots=True, eq=False)
class RunningPrompt:
    """A request on its way: its prompt, and how many of its completions have joined and ended."""

    request: int
    """Its index among the requests."""
    ids: list[int]
    n: int
    limit: int
    """Longest completion, in tokens."""
    keys: list[int]
    """Random stream of each completion [n]."""
    images: Tensor | None = None
    """[images, channels, height, width]; None = text."""
    slot: int = -1
    joined: int = 0
    ended: int = 0
    state: Tensor | None = None
    """The last token's final hidden state [1, size], from which each completion starts."""


@dataclass(slots=True, eq=False)
class RunningCompletion:
    """A completion that is being drawn."""

    prompt: RunningPrompt
    index: int
    """Which of the request's completions it is."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class CacheCapacity:
    """How much a batch can hold at once."""

    prompts: int
    prompt_tokens: int
    """Longest prompt."""
    rows: int
    """Completions at the same time."""
    completion_tokens: int
    """Longest completion that has to be kept: the last token drawn is never looked back at."""

    @property
    def tokens(self) -> int:
        """Tokens of cache that it takes."""
        return self.prompts * self.prompt_tokens + self.rows * self.completion_tokens

    def covers(self, other: "CacheCapacity") -> bool:
        """Whether whatever fits into `other` fits in here."""
        return all(mine >= theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True))


class Caches:
    """The memory of a batch: a cache of prompts and one of completions."""

    def __init__(self, capacity: CacheCapacity, device: torch.device) -> None:
        self.capacity = capacity
        self.prompts = SlotCache(capacity.prompts, capacity.prompt_tokens, device)
        self.completions = SlotCache(capacity.rows, capacity.completion_tokens, device)

    @property
    def num_bytes(self) -> int:
        """Memory reserved by both."""
        return self.prompts.num_bytes + self.completions.num_bytes


def waiting_queue(requests: Sequence[Request], limits: Sequence[int]) -> deque[RunningPrompt]:
    """Requests in the order in which they join: long prompts first, so that neighbours in the cache are alike."""
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
    """Completions that are drawn together."""

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
        """In slot order."""
        self.rows: list[RunningCompletion] = []
        """In slot order; those that joined last, and have no token yet, are at the end."""

    def admit(self, waiting: deque[RunningPrompt]) -> None:
        """Let completions join while there is room, and compute the prompts that are new."""
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
        """What a vision-language model is given beside tokens, where there are images."""
        found = [prompt.images for prompt in prompts if prompt.images is not None]
        if not found:
            return {}
        counts = [0 if prompt.images is None else len(prompt.images) for prompt in prompts]
        return {"images": torch.cat(found).to(self._device), "image_counts": counts}

    def sample_next(self) -> None:
        """Draw the next token of every row, and note which completions it ends.

        Raises:
            GenerationError: the logits of a row hold a NaN or an infinity.
        """
        tokens, logprobs = self._next_tokens(self._next_states())
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if logprob != logprob:  # NaN
                raise GenerationError(
                    f"request {row.prompt.request}, completion {row.index}: the logits of token {len(row.tokens)} hold "
                    "NaN or infinity, so nothing can be drawn: the weights in use are broken"
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
        """The hidden states [rows, size] that predict each row's next token."""
        running = [row for row in self.rows if row.tokens]
        first = [self._prompt_state(row.prompt) for row in self.rows[len(running) :]]
        return torch.cat(([self._decode(running)] if running else []) + first)

    @staticmethod
    def _prompt_state(prompt: RunningPrompt) -> Tensor:
        assert prompt.state is not None, "a completion joins after its prompt was computed"
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
        """Take out the rows that have ended, close the holes, and free prompts that nobody needs any more."""
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
    """Neighbours to be computed in one forward: at most `PREFILL_TOKENS` tokens, or a single one that is longer."""
    slices: list[slice] = []
    start, size = 0, 0
    for i, length in enumerate(lengths):
        if i > start and size + length > PREFILL_TOKENS:
            slices.append(slice(start, i))
            start, size = i, 0
        size += length
    return [*slices, slice(start, len(lengths))] if lengths else []
