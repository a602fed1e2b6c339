"""A folder with a new vision-language model, from whatever names its parts: what `llmquest-rl assemble` does."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from llmquest_rl.data.images import image_reader
from llmquest_rl.data.tokenizer import PLAIN, Tokenizer, load_tokenizer, prompt_renderer
from llmquest_rl.models.base import image_format
from llmquest_rl.models.checkpoint.assemble_vlm import assemble
from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.load_save import read_shape


def assemble_folder(
    vision: str,
    language: str,
    out: Path,
    image_token: str,
    adapter: str = "mlp",
    frozen: Sequence[str] = (),
    tokenizer: str | None = None,
) -> int:
    """Write the folder, and return the image token's id.

    Args:
        vision: a Vision Transformer: a folder, a Hub id, or a config.json for one with random weights.
        language: a decoder, the same.
        out: where to; made if needed.
        image_token: the token that stands for a vision token, as the tokenizer writes it: one that texts never hold.
        adapter: see `VLMConfig`, as `frozen`.
        frozen: weights that will not be trained.
        tokenizer: the model whose tokenizer is taken; None = that of `language`.

    Raises:
        ValueError: `out` is not empty, a part cannot be had, the tokenizer lacks the token, or a choice is not sound.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another folder")
    with TemporaryDirectory() as scratch:
        tower, decoder = _folder(vision, Path(scratch, "vision")), _folder(language, Path(scratch, "language"))
        source = decoder if tokenizer is None else resolve_model(tokenizer)
        words = load_tokenizer(source)
        id_ = _token_id(words, image_token)
        assemble(tower, decoder, out, id_, adapter, frozen, tokenizer=source)
    _, shape = read_shape(out)
    wanted = image_format(shape)
    assert wanted is not None, "it reads images"
    prompt_renderer(words, chat_template=PLAIN, images=image_reader(out, wanted))  # refuses what no run could use
    if len(words) > shape.vocab_size:
        raise ValueError(f"the tokenizer has {len(words)} tokens, and the decoder's vocabulary {shape.vocab_size}")
    return id_


def _folder(reference: str, scratch: Path) -> Path:
    """The folder of a model; a config.json gets one of its own."""
    file = Path(reference).expanduser()
    if not file.is_file():
        return resolve_model(reference)
    scratch.mkdir()
    shutil.copyfile(file, scratch / "config.json")
    return scratch


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    id_ = tokenizer.get_vocab().get(token)
    if id_ is None:
        reserved = ", ".join(sorted(map(str, tokenizer.added_tokens_decoder.values())))
        raise ValueError(f"the tokenizer has no token {token!r}: choose one that texts never hold, of {reserved}")
    return int(id_)
