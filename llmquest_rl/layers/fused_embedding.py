"""An embedding that replaces image tokens with feature vectors, so that a text model can read images."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class FusedEmbedding(nn.Embedding):
    """An embedding in which token ids beyond the vocabulary stand for rows of given features.

    Features take the place of embeddings, so any scaling that the model applies to embeddings applies to them too.
    """

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, _weight=plain.weight)
        self.weight = plain.weight  # the same parameter, because the output layer may be tied to it
        self._features: Tensor | None = None

    @contextmanager
    def with_features(self, features: Tensor | None) -> Iterator[None]:
        """Use row i of `features` `[rows, D]` for token id `num_embeddings + i`; None = there are no such tokens."""
        self._features = features
        try:
            yield
        finally:
            self._features = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up embeddings `[T, D]` of `tokens` `[T]`."""
        if self._features is None:
            return super().forward(tokens)
        rows = (tokens >= self.num_embeddings).nonzero().squeeze(-1)
        text = super().forward(tokens.index_fill(0, rows, 0))  # any valid id: the result is replaced below
        chosen = self._features[tokens[rows] - self.num_embeddings]
        return text.index_copy(0, rows, chosen.to(text.dtype))
