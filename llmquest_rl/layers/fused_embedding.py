"""An embedding in which some tokens are given as vectors: how images enter a model that reads token ids."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class FusedEmbedding(nn.Embedding):
    """Another embedding's table, in which ids after the vocabulary mean rows of features that are given for a while.

    Given features take the place of the table's rows, so whatever the model does to embeddings is done to them.
    """

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight)
        self.weight = plain.weight  # the very same: the output layer may be tied to it
        self._features: Tensor | None = None

    @contextmanager
    def with_features(self, features: Tensor | None) -> Iterator[None]:
        """Meanwhile id `num_embeddings + i` means row i of `features` [rows, D]."""
        self._features = features
        try:
            yield
        finally:
            self._features = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, D] of `tokens` [T]."""
        if self._features is None:
            return super().forward(tokens)
        rows = (tokens >= self.num_embeddings).nonzero().squeeze(-1)
        text = super().forward(tokens.index_fill(0, rows, 0))  # any id: what it gives is replaced
        chosen = self._features[tokens[rows] - self.num_embeddings]
        return text.index_copy(0, rows, chosen.to(text.dtype))
