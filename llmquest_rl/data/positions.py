"""Positions of text whose next token is to be predicted, chosen by the entropy of a proxy's prediction."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmquest_rl.data.rows import DataError, Row
from llmquest_rl.data.token_scores import TokenScores

Selection = Literal["entropy", "random", "all"]

DIFFICULTIES: dict[str, float] = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
"""Difficulty of the positions whose entropy in nats is above a threshold, so that hard ones are easy ones, too (RPT,
arXiv 2506.08007, section 4.1)."""
QUANTILES = (0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text, or a part of a long one, with a proxy's scores of its tokens."""

    id: str
    text: str
    ids: list[int]
    """Token ids `[tokens]`."""
    ends: list[int]
    """Number of characters up to the end of each token `[tokens]`; below 0 where a token ends inside a character."""
    start: int
    """First character that may be predicted: the beginning of an answer, or 0."""
    scores: TokenScores
    """The proxy's scores `[tokens]`."""

    @property
    def positions(self) -> list[int]:
        """Indices of the tokens that may be predicted: the text before them is not empty and ends with a character."""
        first, last = max(self.start, 1), len(self.text)
        return [i for i in range(1, len(self.ids)) if first <= self.ends[i - 1] < last]

    def above(self, threshold: float) -> list[int]:
        """The positions with an entropy above a threshold in nats."""
        return [i for i in self.positions if self.scores.entropies[i] > threshold]


@dataclass(frozen=True, slots=True)
class PositionRows:
    """Rows that are made when they are read, because together their contexts are far longer than the texts."""

    texts: Sequence[ScoredText]
    chosen: Sequence[tuple[int, int]]
    """(index of the text, index of the token to predict) of each row."""
    make: Callable[[ScoredText, int], Row]

    @property
    def size(self) -> int:
        return len(self.chosen)

    def row(self, index: int) -> Row:
        text, position = self.chosen[index]
        return self.make(self.texts[text], position)


def choose(
    texts: Sequence[ScoredText], select: Selection, threshold: float, share: float, seed: int
) -> list[tuple[int, int]]:
    """(text, token) of the positions to train on.

    Args:
        texts: The texts.
        select: `entropy` takes the positions above the threshold, `random` a share of all, `all` every one.
        threshold: For `entropy`, in nats.
        share: For `random`: the probability of a position.
        seed: The seed of `random`.
    """
    generator = random.Random(seed)
    rules: dict[Selection, Callable[[ScoredText], Iterable[int]]] = {
        "entropy": lambda text: text.above(threshold),
        "random": lambda text: (i for i in text.positions if generator.random() < share),
        "all": lambda text: text.positions,
    }
    return [(number, position) for number, text in enumerate(texts) for position in rules[select](text)]


def entropies_of(texts: Iterable[ScoredText]) -> NDArray[np.float32]:
    """The entropies of all positions, `[positions]`."""
    return np.array([text.scores.entropies[i] for text in texts for i in text.positions], dtype=np.float32)


def describe_entropies(entropies: NDArray[np.float32]) -> str:
    """The distribution of entropies, in one sentence."""
    if not len(entropies):
        return "there is no position at all: the text is too short"
    shares = ", ".join(f"{(entropies > limit).mean():.1%} above {limit:g}" for limit in DIFFICULTIES.values())
    quantiles = ", ".join(f"{share:.0%} up to {np.quantile(entropies, share):.3g}" for share in QUANTILES)
    return f"entropies of the {len(entropies)} positions in nats: {shares}; {quantiles}"


def check_some(chosen: Sequence[object], texts: Sequence[ScoredText], side: str, remedy: str) -> None:
    """Check that there is a position to predict.

    Raises:
        DataError: there is none; the message gives the distribution of the entropies.
    """
    if not chosen:
        raise DataError(
            f"next_token_reasoning: no position of the {side} text is chosen; "
            f"{describe_entropies(entropies_of(texts))}. {remedy}"
        )
