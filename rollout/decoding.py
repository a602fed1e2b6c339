"""Detokenisation for all engines: the tokens that end a completion, its text, and its stop strings."""

import json
from collections.abc import Sequence
from pathlib import Path

from llmquest_rl.data.tokenizer_files import TextDecoder, read_decoder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files that mark a folder with a tokenizer; one of them is enough."""


class Decoder:
    """Decodes completions with the tokenizer of a model folder.

    A folder may have no tokenizer. Texts are then empty, and stop strings are an error.

    Attributes:
        eos_ids: All tokens that end a completion: those of generation_config.json (else config.json) and the
            tokenizer's own. Chat models often have two.
    """

    def __init__(self, model_path: Path) -> None:
        has_tokenizer = any((model_path / name).exists() for name in TOKENIZER_FILES)
        self.decoder: TextDecoder | None = read_decoder(model_path) if has_tokenizer else None
        self.eos_ids = _configured_eos_ids(model_path)
        if self.decoder is not None and self.decoder.eos is not None:
            self.eos_ids |= {self.decoder.eos}

    def check_stop(self, stop: Sequence[str]) -> None:
        """Check that stop strings can be found.

        Raises:
            ValueError: there are stop strings, but the folder has no tokenizer.
        """
        if stop and self.decoder is None:
            raise ValueError("stop strings need a tokenizer, and the model folder has none: leave `stop` empty")

    def texts(self, sequences: list[list[int]], stop: Sequence[str] = ()) -> list[str]:
        """Decode completions without special tokens, each cut before the earliest stop string."""
        if self.decoder is None:
            return [""] * len(sequences)
        return [text[: stop_index(text, stop)] for text in self.decoder.texts(sequences)]


def stop_index(text: str, stop: Sequence[str]) -> int | None:
    """Index in `text` where the earliest stop string begins; None if there is none."""
    return min((index for string in stop if (index := text.find(string)) >= 0), default=None)


def _configured_eos_ids(model_path: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        path = model_path / name
        if path.exists() and (value := json.loads(path.read_text()).get("eos_token_id")) is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
