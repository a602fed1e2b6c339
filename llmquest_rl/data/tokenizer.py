"""Tokenizers and chat templates. Completions are never tokenised again: training uses the ids that were sampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from jinja2 import TemplateError

from llmquest_rl.data.images import ImageReader
from llmquest_rl.data.rows import DataError
from llmquest_rl.data.tokenizer_files import read_tokenizer
from llmquest_rl.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"
PLAIN = "none"
"""The value of `chat_template` that passes prompts to the model unchanged, for base models."""
IMAGE = "<image>"
"""Marks the place of an image in a prompt."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder in the Hub's layout.

    Raises:
        DataError: the folder has no readable tokenizer.
    """
    if not Path(path).is_dir():
        raise DataError(f"there is no folder {path} to read a tokenizer from")
    try:
        return read_tokenizer(Path(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no readable tokenizer (tokenizer.json, tokenizer_config.json): {error}") from error


@dataclass(frozen=True, slots=True)
class PromptRenderer:
    """Turns prompts into the token ids that the model reads. Make one with `prompt_renderer`."""

    tokenizer: Tokenizer
    system_prompt: str | None
    template: str | None
    """The chat template in Jinja; None = prompts are passed on unchanged."""
    images: ImageReader | None = None
    """Reads the model's images; None = it reads text only."""
    image_token: str = ""
    """The text of the token `ImageFormat.token_id`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that already contains its special tokens, if any."""
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the configured system prompt, unless it has its own."""
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text, with special tokens; no system prompt is added.

        Raises:
            DataError: there is no template, or it refuses these messages.
        """
        if self.template is None:
            raise DataError("messages need a chat template, but data.chat_template is `none`: write prompts as strings")
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the chat template refuses messages with the roles {roles}: {error}") from error
        return cast(str, text)

    def prompt_ids(self, prompt: str | list[Message], images: int = 0) -> list[int]:
        """The token ids of a prompt, ready for generation. A string is one user message.

        Args:
            prompt: `<image>` marks the place of an image; without a mark the images come before the user's text.
            images: The number of images.

        Raises:
            DataError: the numbers of marks and images differ; or there are images, but the model reads text only.
        """
        messages = self.with_image_tokens(as_messages(prompt), images)
        if self.template is None and isinstance(prompt, str):
            ids = cast(list[int], self.tokenizer.encode(messages[0]["content"]))
        else:
            ids = self.encode(self.chat_text(self.with_system(messages), add_generation_prompt=True))
        return self.expanded(ids, images)

    def with_image_tokens(self, messages: Sequence[Message], images: int) -> list[Message]:
        """The conversation with one image token for each image, at its mark or before the first user message's text.

        Raises:
            DataError: see `prompt_ids`.
        """
        if self.images is None and images:
            raise DataError(
                f"the prompt has {images} images, but the model reads text only: choose a vision-language model "
                "(docs/models/vlm.md), or set columns.images to null"
            )
        if self.images is None:
            return list(messages)
        given = [i for i, message in enumerate(messages) if message["role"] != "assistant"]
        marks = sum(messages[i]["content"].count(IMAGE) for i in given)
        first = next((i for i in given if messages[i]["role"] == "user"), None)
        if marks not in (0, images) or (marks == 0 and images and first is None):
            raise DataError(f"the prompt has {marks} places for images ({IMAGE}), but {images} images")
        before = "" if marks else self.image_token * images
        return [
            {**message, "content": before * (i == first) + message["content"].replace(IMAGE, self.image_token)}
            if i in given
            else message
            for i, message in enumerate(messages)
        ]

    def expanded(self, ids: Sequence[int], images: int) -> list[int]:
        """Token ids in which the token of each image is repeated for every vision token of the image.

        Raises:
            DataError: the number of image tokens differs from `images`.
        """
        if self.images is None:
            return list(ids)
        shape = self.images.format
        found = sum(token == shape.token_id for token in ids)
        if found != images:
            raise DataError(
                f"the prompt holds {found} image tokens ({self.image_token!r}, id {shape.token_id}), but {images} "
                "images: this token is reserved, so texts must not contain it"
            )
        return [token for id_ in ids for token in [id_] * (shape.tokens if id_ == shape.token_id else 1)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, for people: special tokens are kept, and an image is shown as its mark."""
        text = cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=False))
        return text if self.images is None else text.replace(self.image_token * self.images.format.tokens, IMAGE)


def as_messages(prompt: str | list[Message]) -> list[Message]:
    """A prompt as a conversation: a string becomes a message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_renderer(
    tokenizer: Tokenizer,
    system_prompt: str | None = None,
    chat_template: str | None = None,
    images: ImageReader | None = None,
) -> PromptRenderer:
    """Check the template settings and make a renderer with them.

    Args:
        chat_template: A Jinja template, a file with one, `none` for plain text, or None for the tokenizer's own.
        images: Reads the model's images; None if it reads text only.

    Raises:
        DataError: there is no template, its file is missing, or a system prompt is set with `none`; or the tokenizer
            does not have the model's image token.
    """
    image_token = "" if images is None else _image_token(tokenizer, images.format.token_id)
    if chat_template == PLAIN:
        if system_prompt is not None:
            raise DataError("data.system_prompt needs a chat template, but data.chat_template is `none`")
        return PromptRenderer(tokenizer, None, None, images, image_token)
    template = _template_text(chat_template) if chat_template is not None else tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DataError(
            "the tokenizer has no chat template: set data.chat_template to a Jinja template or a file with one, "
            "or to `none` to pass prompts to a base model unchanged"
        )
    return PromptRenderer(tokenizer, system_prompt, template, images, image_token)


def _image_token(tokenizer: Tokenizer, id_: int) -> str:
    text = tokenizer.convert_ids_to_tokens(id_)
    if not text or tokenizer.encode(text, add_special_tokens=False) != [id_]:
        raise DataError(
            f"image_token_id {id_} is {text!r} in the tokenizer, but that text is not encoded as this one token: "
            "choose a reserved token in the model's config.json"
        )
    return cast(str, text)


def _template_text(chat_template: str) -> str:
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    file = Path(chat_template)
    if not file.is_file():
        raise DataError(
            f"data.chat_template: {chat_template} is neither a file nor a Jinja template (which has braces)"
        )
    return file.read_text(encoding="utf-8")
