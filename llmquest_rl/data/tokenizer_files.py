"""Reads the tokenizer of a model folder, importing no more of transformers than the result needs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL = frozenset({"TokenizersBackend", "PreTrainedTokenizerFast"})
"""Names of the class that takes all it needs from tokenizer.json; transformers 5 writes the first of them."""

OVERRULED = frozenset(
    {"hyperclovax_vision_v2", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"}
    | {"ministral", "ministral3", "mistral", "mistral3", "mixtral", "pixtral", "voxtral", "voxtral_realtime"}
)
"""Model types for which `AutoTokenizer` may take another class than the one that the folder names."""


NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of tokenizer_config.json that name one special token."""
FURTHER_FILES = ("special_tokens_map.json", "added_tokens.json")
"""Files of earlier versions of transformers that may add special tokens."""


class TextDecoder(NamedTuple):
    """Turns tokens into text."""

    texts: Callable[[list[list[int]]], list[str]]
    """The text of each sequence of token ids, without special tokens."""
    eos: int | None
    """The tokenizer's end-of-sequence token."""


def read_decoder(folder: Path) -> TextDecoder:
    """The decoder of a folder's tokenizer.

    Importing transformers takes a second or two in each process. It is needed only if the tokenizer is not all in
    tokenizer.json.

    Raises:
        OSError, ValueError, KeyError: the folder has no readable tokenizer.
    """
    if names_general_class(folder) and not any((folder / name).exists() for name in FURTHER_FILES):
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = _read(folder / "tokenizer_config.json")
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        if set(_special_tokens(settings)) <= special and not _adds_tokens(settings, special):
            eos = _content(settings.get("eos_token"))
            return TextDecoder(backend.decode_batch, None if eos is None else backend.token_to_id(eos))
    tokenizer = read_tokenizer(folder)

    def texts(sequences: list[list[int]]) -> list[str]:
        return list(tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return TextDecoder(texts, None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id))


def _special_tokens(settings: dict[str, Any]) -> Iterator[str]:
    """Every token that tokenizer_config.json calls special."""
    named = [settings.get(name) for name in NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
        further = settings.get(key) or ()
        named += further.values() if isinstance(further, dict) else further
    yield from (content for token in named if (content := _content(token)) is not None)


def _adds_tokens(settings: dict[str, Any], special: set[str]) -> bool:
    """Whether tokenizer_config.json lists added tokens that tokenizer.json does not have in the same way."""
    listed = settings.get("added_tokens_decoder") or {}
    return any(bool(token.get("special")) != (token["content"] in special) for token in listed.values())


def _content(token: Any) -> str | None:
    """The text of a token, which is written as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


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
