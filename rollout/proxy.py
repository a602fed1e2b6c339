"""A proxy model: our own model reads a text once, and its scores of the tokens are kept in a file.

See `llmquest_rl.data.token_scores.ProxyModel`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llmquest_rl.cached_tensors import content_key, folder_key, load_tensors, save_tensors
from llmquest_rl.data.rows import DataError
from llmquest_rl.data.token_scores import TOP, EndTokenizer, Tokens, TokenScores
from llmquest_rl.data.tokenizer import load_tokenizer
from llmquest_rl.generation.uncertainty import Uncertainty, next_token_uncertainty
from llmquest_rl.models.checkpoint.hub import cache_dir
from llmquest_rl.models.checkpoint.load_save import load_model
from rollout.engine import cpu_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeProxy:
    """Implements `ProxyModel` with one of our own models, which is loaded only if scores are missing."""

    path: Path
    """Folder of the proxy."""
    encode: EndTokenizer
    """The tokenizer of the model that is trained."""
    own_encode: EndTokenizer | None
    """The proxy's own tokenizer; None = it is the same folder."""
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    threads: int

    @property
    def prefix(self) -> list[int]:
        return self.encode.prefix

    def tokens(self, text: str) -> Tokens:
        """See `ProxyModel.tokens`."""
        tokens = self.encode(text)
        if self.own_encode is not None and self.own_encode(text).ids != tokens.ids:
            raise DataError(
                f"the proxy {self.path} has another tokenizer than the model that is trained: it reads {text[:60]!r} "
                "as other tokens. Name a proxy of the same family"
            )
        return tokens

    def token_text(self, id_: int) -> str:
        """See `ProxyModel.token_text`."""
        return self.encode.text(id_)

    def scores(self, sequences: Sequence[list[int]], file: Path | None) -> TokenScores:
        """See `ProxyModel.scores`."""
        text = content_key(*(np.array([*self.prefix, *ids], dtype=np.int32).tobytes() for ids in sequences))
        made_from = {"proxy model": folder_key(self.path), "text": text, "dtype": self.dtype}
        place = file or cache_dir() / "token_scores" / f"{content_key(*made_from.values())[:32]}.safetensors"
        found = load_tensors(place, made_from)
        if found is None:
            found = self._compute(sequences)
            save_tensors(place, found, made_from)
            log.info("entropies of %d tokens by %s: %s", len(found["entropies"]), self.path, place)
        return TokenScores(*(found[name].numpy() for name in ("entropies", "top_ids", "top_probs", "logprobs")))

    def _compute(self, sequences: Sequence[list[int]]) -> dict[str, Tensor]:
        model = load_model(self.path, getattr(torch, self.dtype), self.device).eval()
        with cpu_threads(self.threads):
            known = next_token_uncertainty(model, [[*self.prefix, *ids] for ids in sequences], TOP)
        return _one_row_per_token(known, [len(ids) for ids in sequences], len(self.prefix))


def _one_row_per_token(known: Uncertainty, lengths: Sequence[int], prefix: int) -> dict[str, Tensor]:
    """Scores `[tokens]` from those of the targets: a first token without a prefix has an entropy of NaN."""
    predicted = torch.ones(sum(lengths), dtype=torch.bool)
    if not prefix:
        predicted[torch.tensor([0, *accumulate(lengths)][:-1])] = False
    made = {}
    for name, values in known._asdict().items():
        rows = values.new_full((len(predicted), *values.shape[1:]), float("nan") if values.dim() == 1 else 0)
        rows[predicted] = values
        made[name] = rows
    return made


def open_proxy(path: Path, trained: Path, threads: int) -> NativeProxy:
    """Open the proxy in a folder for the training of another (or the same) model.

    Raises:
        DataError: a tokenizer does not tell the places of its tokens.
    """
    encode = EndTokenizer(load_tokenizer(trained), str(trained))
    own = None if path == trained else EndTokenizer(load_tokenizer(path), str(path))
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    return NativeProxy(path, encode, own, device, "bfloat16" if device == "cuda" else "float32", threads)
