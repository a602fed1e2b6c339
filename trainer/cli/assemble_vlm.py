"""`llmquest-rl assemble`: writes the folder of a vision-language model made of a vision model and a decoder."""

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
from trainer.run.folder import check_new_folder


def assemble_folder(
    vision: str,
    language: str,
    out: Path,
    image_token: str,
    adapter: str = "mlp",
    frozen: Sequence[str] = (),
    tokenizer: str | None = None,
) -> int:
    """Write the folder and return the id of the image token.

    Args:
        vision: a Vision Transformer: a model folder, a Hub id, or a config.json for random weights.
        language: a text decoder, given in the same ways.
        out: output folder; created if it does not exist.
        image_token: text of the token that marks image positions; it must be a token that never occurs in texts.
        adapter: layer between the two models; see `VLMConfig`.
        frozen: patterns of weights that training leaves fixed; see `VLMConfig`.
        tokenizer: a model whose tokenizer is used; None = that of `language`.

    Raises:
        ValueError: `out` is not empty, a model cannot be loaded or does not fit, or the tokenizer lacks the token.
    """
    check_new_folder(out)
    with TemporaryDirectory() as scratch:
        tower, decoder = _folder(vision, Path(scratch, "vision")), _folder(language, Path(scratch, "language"))
        source = decoder if tokenizer is None else resolve_model(tokenizer)
        loaded_tokenizer = load_tokenizer(source)
        image_token_id = _token_id(loaded_tokenizer, image_token)
        assemble(tower, decoder, out, image_token_id, adapter, frozen, tokenizer=source)
    _, shape = read_shape(out)
    images = image_format(shape)
    assert images is not None, "an assembled model reads images"
    # This raises an error now if no run could use the model.
    prompt_renderer(loaded_tokenizer, chat_template=PLAIN, images=image_reader(out, images))
    if len(loaded_tokenizer) > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(loaded_tokenizer)} tokens, but the decoder's vocabulary has only "
            f"{shape.vocab_size}: give a tokenizer that fits the decoder"
        )
    return image_token_id


def _folder(reference: str, scratch: Path) -> Path:
    """The folder of a model; a single config.json is copied into `scratch`."""
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
        raise ValueError(
            f"the tokenizer has no token {token!r}: choose one that never occurs in texts, such as {reserved}"
        )
    return int(id_)
