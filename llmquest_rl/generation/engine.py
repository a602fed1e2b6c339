"""The native engine: our own models generate completions with continuous batching.

Reproducibility: the same requests, sampling options and weights give the same bits with the same torch build, type of
CPU and number of threads, regardless of earlier calls. A completion's random numbers depend on (seed, completion,
position) only. In a batch with other requests its log-probs differ by rounding, because matrix products of other shapes
round differently.
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
"""Decodes completions (token ids, stop strings) to texts without special tokens, cut before the first stop string."""

STOP_SLACK = 8
"""Extra tokens to decode in a search for stop strings, because special tokens and parts of characters have no text."""


class NativeGenerator:
    """Samples completions from one of our models. Not thread-safe: one `generate` at a time.

    Attributes:
        version: Version of the weights, copied to every completion. The caller sets it after replacing the weights.
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
            model: The model, on its device and in its dtype.
            eos_ids: Tokens that end a completion.
            context_tokens: Maximum tokens of a prompt and its completion together.
            max_sequences: Maximum completions at the same time.
            cache_tokens: Maximum cached tokens at the same time; further completions wait.
            texts: Text decoder; without it texts are empty and stop strings are an error.
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
        """Memory that the cache reserves now, in bytes."""
        return 0 if self._caches is None else self._caches.num_bytes

    def release(self) -> None:
        """Free the cache; the next `generate` allocates it again."""
        self._caches = None

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Completion]]:
        """Complete each request `n` times: `[requests][n]`.

        Raises:
            ValueError: A prompt is empty, contains an unknown token, fills the context or does not fit into the cache;
                images do not match the model or the prompt's image tokens; or there are stop strings, but no text
                decoder.
            GenerationError: The logits contain NaN or infinity.
        """
        if sampling.stop and self._texts is None:
            raise ValueError("stop strings need a tokenizer, and the engine has none: leave `stop` empty")
        limits = [self._limit(i, request, sampling) for i, request in enumerate(requests)]
        waiting = waiting_queue(requests, limits)
        done: list[list[RunningCompletion | None]] = [[None] * request.n for request in requests]
        if waiting:
            capacity = self._choose_capacity(requests, limits)
            batch = RunningBatch(self.model, self._reserve(capacity), capacity, sampling, self.eos_ids)
            try:
                self._run(batch, waiting, sampling, done)
            except GenerationError:
                self.release()  # the cache contains NaN, and zero times NaN is NaN
                raise
        return self._completions(done, sampling)

    def _run(
        self,
        batch: RunningBatch,
        waiting: deque[RunningPrompt],
        sampling: Sampling,
        done: Sequence[list[RunningCompletion | None]],
    ) -> None:
        """Sample until the queue and the batch are empty, and store each completion in `done[request][index]`."""
        while waiting or batch.rows:
            batch.admit(waiting)
            batch.sample_next()
            self._find_stops(batch.rows, sampling.stop)
            for row in batch.retire():
                done[row.prompt.request][row.index] = row

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """Compute the log-prob of each token given those before it, at temperature 1: `[sequences][len - 1]`.

        It runs packed forwards without a cache.

        Raises:
            ValueError: A token is not in the vocabulary.
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
        """Check a request and return the maximum tokens of each of its completions."""
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise ValueError(f"request {index} has an empty prompt: give it at least one token")
        if prompt >= self.context_tokens:
            raise ValueError(
                f"request {index} has a prompt of {prompt} tokens, which leaves no room in a context of "
                f"{self.context_tokens}: shorten or drop the prompt, or raise the engine's context"
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
            raise ValueError(f"{name} contains token {wrong}, but the model's tokens are 0 to {vocab_size - 1}")

    def _choose_capacity(self, requests: Sequence[Request], limits: Sequence[int]) -> CacheCapacity:
        """Choose the largest batch that the requests can fill and the cache can hold."""
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
            self._caches = None  # free the old cache before the new one is allocated
            self._caches = Caches(capacity, next(self.model.parameters()).device)
        return self._caches

    def _find_stops(self, rows: Sequence[RunningCompletion], stop: Sequence[str]) -> None:
        """Mark the completions whose text contains a stop string as ended. Only the last few tokens are decoded."""
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
