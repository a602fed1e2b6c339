"""The native engine: completions drawn by our own models with continuous batching.

Exactness: the same requests, sampling and weights give the same bits when run again with the same torch build on the
same kind of CPU with the same number of threads, whatever was generated before. A completion's random numbers depend on
(seed, completion, position) alone; in other company it differs only as products of another shape round differently.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.generation.batch import (
    CacheCapacity,
    Caches,
    GenerationError,
    RunningBatch,
    RunningCompletion,
    RunningPrompt,
    pack_slices,
    waiting_queue,
)
from llmquest_rl.models.base import CausalLM, image_format
from llmquest_rl.types import Completion, Request, Sampling

TextDecoder = Callable[[list[list[int]], Sequence[str]], list[str]]
"""Decodes completions without special tokens, each cut before the earliest of the stop strings."""

STOP_SLACK = 8
"""Tokens looked at beyond the bytes of a stop string: special tokens and parts of a character have no text."""


class NativeGenerator:
    """Draws completions from a model of ours. Not thread-safe: one `generate` at a time.

    Attributes:
        version: put on every completion; whoever replaces the model's weights counts it up.
    """

    def __init__(
        self,
        model: CausalLM,
        eos_ids: frozenset[int],
        context_tokens: int,
        max_sequences: int = 128,
        cache_tokens: int = 65536,
        texts: TextDecoder | None = None,
    ) -> None:
        """Wrap `model`, whose weights may change between calls.

        Args:
            model: On its device, in its dtype.
            eos_ids: Tokens that end a completion.
            context_tokens: Longest prompt plus completion.
            max_sequences: Most completions at the same time.
            cache_tokens: Most tokens kept at the same time; further completions wait.
            texts: Decodes; without it texts are empty and stop strings are refused.
        """
        self.model = model
        self.eos_ids = eos_ids
        self.context_tokens = context_tokens
        self.max_sequences = max_sequences
        self.cache_tokens = cache_tokens
        self.version = 0
        self._texts = texts
        self._caches: Caches | None = None

    @property
    def cache_bytes(self) -> int:
        """Memory reserved for keys and values at present."""
        return 0 if self._caches is None else self._caches.num_bytes

    def release(self) -> None:
        """Give the cache's memory back; the next `generate` takes it again."""
        self._caches = None

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: [requests][n].

        Raises:
            ValueError: a prompt is empty, holds an unknown token, fills the context or does not fit into the cache;
                images that the model does not read, of another size, or not as many as the prompt has room for;
                stop strings without a decoder.
            GenerationError: the model's logits hold NaN or infinity.
        """
        if sampling.stop and self._texts is None:
            raise ValueError("stop strings need a tokenizer to find them with: leave `stop` empty")
        limits = [self._limit(i, request, sampling) for i, request in enumerate(requests)]
        waiting = waiting_queue(requests, limits)
        done: list[list[RunningCompletion | None]] = [[None] * request.n for request in requests]
        if waiting:
            capacity = self._choose_capacity(requests, limits)
            batch = RunningBatch(self.model, self._reserve(capacity), capacity, sampling, self.eos_ids)
            try:
                self._run(batch, waiting, sampling, done)
            except GenerationError:
                self.release()  # it holds NaN, which no mask silences
                raise
        return self._completions(done, sampling)

    def _run(
        self,
        batch: RunningBatch,
        waiting: deque[RunningPrompt],
        sampling: Sampling,
        done: Sequence[list[RunningCompletion | None]],
    ) -> None:
        """Draw until nobody waits and nobody is left, and put each row where it belongs in `done`."""
        while waiting or batch.rows:
            batch.admit(waiting)
            batch.sample_next()
            self._find_stops(batch.rows, sampling.stop)
            for row in batch.retire():
                done[row.prompt.request][row.index] = row

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Log-prob at temperature 1 of each token given those before it: [sequences][len - 1]. No cache is involved.

        Raises:
            ValueError: a token is not in the vocabulary.
        """
        for i, sequence in enumerate(sequences):
            self._check_tokens(f"sequence {i}", sequence)
        device = next(self.model.parameters()).device
        results: list[list[float]] = []
        for pack in pack_slices([len(sequence) for sequence in sequences]):
            batch = collate([SequenceGroup([], [list(sequence)]) for sequence in sequences[pack]]).to(device)
            counts = [max(len(sequence) - 1, 0) for sequence in sequences[pack]]
            results += [part.tolist() for part in self.model(batch).logprobs.split(counts)]
        return results

    def _limit(self, index: int, request: Request, sampling: Sampling) -> int:
        """Longest completion of a request."""
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise ValueError(f"request {index} has an empty prompt: give it at least one token")
        if prompt >= self.context_tokens:
            raise ValueError(
                f"request {index} has a prompt of {prompt} tokens, which leaves no room in a context of "
                f"{self.context_tokens}: shorten or drop it, or raise the engine's context"
            )
        self._check_tokens(f"request {index}", request.prompt_ids)
        self._check_images(index, request)
        return min(sampling.max_tokens, self.context_tokens - prompt)

    def _check_images(self, index: int, request: Request) -> None:
        images = request.images
        wanted = image_format(self.model.config)
        if wanted is None and images is not None:
            name = type(self.model).__name__
            raise ValueError(f"request {index} has {len(images)} images, but the model ({name}) reads text only")
        if wanted is None:
            return
        size = (wanted.channels, wanted.height, wanted.width)
        if images is not None and images.shape[1:] != size:
            raise ValueError(
                f"request {index} has images of {list(images.shape[1:])}, but the model takes {list(size)} "
                "(channels, height, width)"
            )
        found, number = request.prompt_ids.count(wanted.token_id), 0 if images is None else len(images)
        if found != number * wanted.tokens:
            raise ValueError(
                f"request {index} has {found} image tokens (id {wanted.token_id}), but its {number} images need "
                f"{wanted.tokens} each"
            )

    def _check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        vocab_size = int(self.model.config.vocab_size)
        wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} holds token {wrong}, but the model knows tokens 0 to {vocab_size - 1} only")

    def _choose_capacity(self, requests: Sequence[Request], limits: Sequence[int]) -> CacheCapacity:
        """The largest batch that the work can fill and the cache can hold."""
        asked = [request for request in requests if request.n > 0]
        longest_prompt = max(len(request.prompt_ids) for request in asked)
        longest_completion = max(limit for request, limit in zip(requests, limits, strict=True) if request.n > 0)
        fewest = min(request.n for request in asked)
        for rows in range(min(self.max_sequences, sum(request.n for request in asked)), 0, -1):
            prompts = min(len(asked), rows // fewest + 1, rows)
            capacity = CacheCapacity(prompts, longest_prompt, rows, max(longest_completion - 1, 1))
            if capacity.tokens <= self.cache_tokens:
                return capacity
        raise ValueError(
            f"a prompt of {longest_prompt} tokens and a completion of up to {longest_completion} tokens do not fit "
            f"into a cache of {self.cache_tokens} tokens: raise the engine's cache_tokens to "
            f"{longest_prompt + longest_completion}, or lower max_tokens"
        )

    def _reserve(self, capacity: CacheCapacity) -> Caches:
        if self._caches is None or not self._caches.capacity.covers(capacity):
            self._caches = None  # freed before the new one is taken
            self._caches = Caches(capacity, next(self.model.parameters()).device)
        return self._caches

    def _find_stops(self, rows: Sequence[RunningCompletion], stop: Sequence[str]) -> None:
        """End the rows whose text has come to hold a stop string. Only the last few tokens are decoded."""
        if not stop or self._texts is None:
            return
        width = max(len(string.encode()) for string in stop) + STOP_SLACK
        for row, text in zip(rows, self._texts([row.tokens[-width:] for row in rows], ()), strict=True):
            if any(string in text for string in stop):
                row.finish = "stop"

    def _completions(
        self, done: Sequence[Sequence[RunningCompletion | None]], sampling: Sampling
    ) -> list[list[Completion]]:
        rows = [row for group in done for row in group if row is not None]
        texts = self._texts([row.tokens for row in rows], sampling.stop) if self._texts else [""] * len(rows)
        flat = iter(
            Completion(row.tokens, row.logprobs, text, row.finish or "length", self.version)
            for row, text in zip(rows, texts, strict=True)
        )
        return [[next(flat) for _ in group] for group in done]
