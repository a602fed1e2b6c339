"""Reads the tokenizer of a model folder, without importing transformers' model code if the result does not need it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Names of the class that takes all it needs from tokenizer.json; transformers 5 writes the first of them."""

OVERRULED = frozenset(
    {"hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"}
    | {"ministral", "ministral3", "mistral", "mistral3", "mixtral", "pixtral", "voxtral", "voxtral_realtime"}
)
"""Model types for which `AutoTokenizer` may take another class than the one that the folder names."""


def read_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that `AutoTokenizer` gives.

    `AutoTokenizer` imports the code of generation and of sharded models, for one to two seconds in each process. It is
    asked only if the folder leaves open which class it will choose.

    Raises:
        OSError, ValueError, KeyError: the folder has no readable tokenizer.
    """
    from transformers import TokenizersBackend

    if names_general_class(folder):
        return cast("PreTrainedTokenizerBase", TokenizersBackend.from_pretrained(folder, local_files_only=True))
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder, local_files_only=True))


def names_general_class(folder: Path) -> bool:
    """Return whether a folder names the general class, and `AutoTokenizer` would not replace it for this model type."""
    if not (folder / "tokenizer.json").is_file():
        return False
    settings, model = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
    named = settings.get("tokenizer_class") in GENERAL and "auto_map" not in settings
    return named and model.get("model_type", "") not in OVERRULED


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or holds another value."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
