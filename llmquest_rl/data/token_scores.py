"""Tokens of raw text: the places where they end, and the scores that a proxy model gives them.

A proxy is a language model that reads a text once, before training, to find the tokens that are hard to predict. Data
import no model, so tasks are given an opener of proxies (`OpenProxy`), whose models `rollout/proxy.py` runs.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmquest_rl.data.rows import DataError
from llmquest_rl.data.tokenizer import Tokenizer

TOP = 16
"""Number of the most likely tokens over which an entropy is taken (RPT, arXiv 2506.08007, section 3.3)."""
INSIDE = -1
"""The end of a token that ends inside a character: such a text cannot be cut there."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as tokens."""

    ids: list[int]
    ends: list[int]
    """Number of the text's characters up to the end of each token, or `INSIDE`."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A proxy's prediction of each token from those before it, for sequences laid end to end.

    The first token of a sequence has none: its entropy and log-prob are NaN.
    """

    entropies: NDArray[np.float32]
    """Entropy `[tokens]` in nats of the `TOP` most likely tokens, whose probabilities are scaled to the sum 1."""
    top_ids: NDArray[np.int32]
    """The most likely tokens `[tokens, TOP]`, in order; fewer if the vocabulary is smaller."""
    top_probs: NDArray[np.float32]
    """Their probabilities `[tokens, TOP]` among all tokens."""
    logprobs: NDArray[np.float32]
    """Log-prob `[tokens]` of the token itself, in nats."""

    def part(self, begin: int, end: int) -> "TokenScores":
        """The scores of a range of tokens."""
        columns = self.entropies, self.top_ids, self.top_probs, self.logprobs
        return TokenScores(*(values[begin:end] for values in columns))  # type: ignore[arg-type]


class ProxyModel(Protocol):
    """A model that scores the tokens of texts."""

    @property
    def prefix(self) -> list[int]:
        """Token ids that the tokenizer puts before every text, e.g. a beginning-of-sequence token."""
        ...

    def tokens(self, text: str) -> Tokens:
        """The tokens of a text.

        Raises:
            DataError: the model that is trained reads the text as other tokens.
        """
        ...

    def token_text(self, id_: int) -> str:
        """The text of a token by itself."""
        ...

    def scores(self, sequences: Sequence[list[int]], file: Path | None) -> TokenScores:
        """The scores of sequences of token ids, from the file if they were computed before.

        Args:
            sequences: Token ids, without the prefix.
            file: The file that keeps the scores; None = one in the user's cache, by the key of model and text.

        Raises:
            ValueError: the file holds the scores of another model or of another text.
        """
        ...


OpenProxy = Callable[[str | None], ProxyModel]
"""Opens a proxy by its reference: a folder or Hub id; None = the model that is trained, as it is before training."""


class EndTokenizer:
    """Cuts text into tokens and tells where each of them ends."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        """Take the tokenizer of a model; `name` stands in messages.

        Raises:
            DataError: the tokenizer is written in Python and does not tell the places of its tokens.
        """
        from tokenizers import Tokenizer as Backend

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"the tokenizer of {name} does not tell where tokens end: it needs a tokenizer.json")
        # A post-processor may leave the space of a token out of its place.
        settings = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        self._backend = Backend.from_str(json.dumps(settings))
        first = tokenizer.encode("")[:1]
        self.prefix: list[int] = first if first and first[0] == tokenizer.bos_token_id else []

    def __call__(self, text: str) -> Tokens:
        """The tokens of a text, without special tokens around it."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        # The bytes of a character may be several tokens, all of which are given the character's place.
        next_starts = [*starts[1:], len(text)]
        ends = [end if start >= end else INSIDE for (_, end), start in zip(encoding.offsets, next_starts, strict=True)]
        return Tokens(list(encoding.ids), ends)

    def text(self, id_: int) -> str:
        """The text of a token. A decoder may drop a space at the beginning, so it is decoded behind another token."""
        before = self._backend.encode("a", add_special_tokens=False).ids
        alone, both = (self._backend.decode(ids, skip_special_tokens=False) for ids in (before, [*before, id_]))
        return str(both.removeprefix(alone))


def cut(tokens: Tokens, length: int) -> Iterator[tuple[int, int]]:
    """Cut a text between characters into ranges (first token, token after the last) of at most `length` tokens."""
    first, count = 0, len(tokens.ids)
    while first < count:
        stop = min(first + length, count)
        while stop < count and stop > first + 1 and tokens.ends[stop - 1] == INSIDE:
            stop -= 1
        yield first, stop
        first = stop
