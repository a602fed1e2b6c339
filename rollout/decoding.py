"""From tokens to text, the same for every engine: what ends a completion, and what its text is."""

import json
from collections.abc import Sequence
from pathlib import Path

from llmquest_rl.data.tokenizer_files import read_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder that has one of these has a tokenizer."""


class Decoder:
    """The tokenizer of a model folder, as far as engines need it.

    A folder without a tokenizer is allowed: its texts are empty, and stop strings are refused.

    Attributes:
        eos_ids: every token that ends a completion: those of generation_config.json (config.json where there is none)
            and the tokenizer's own; chat models often have two.
    """

    def __init__(self, model_path: Path) -> None:
        has_tokenizer = any((model_path / name).exists() for name in TOKENIZER_FILES)
        self.tokenizer = read_tokenizer(model_path) if has_tokenizer else None
        self.eos_ids = _configured_eos_ids(model_path)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self.eos_ids |= {int(self.tokenizer.eos_token_id)}

    def check_stop(self, stop: Sequence[str]) -> None:
        """Raise ValueError when stop strings are asked for and there is no tokenizer to find them with."""
        if stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and the model folder has none: leave `stop` empty")

    def texts(self, sequences: list[list[int]], stop: Sequence[str] = ()) -> list[str]:
        """Decode completions without special tokens, each cut before the earliest stop string."""
        if self.tokenizer is None:
            return [""] * len(sequences)
        texts: list[str] = self.tokenizer.batch_decode(
            sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [text[: stop_index(text, stop)] for text in texts]


def stop_index(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins; None when there is none."""
    return min((index for string in stop if (index := text.find(string)) >= 0), default=None)


def _configured_eos_ids(model_path: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        path = model_path / name
        if path.exists() and (value := json.loads(path.read_text()).get("eos_token_id")) is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()
