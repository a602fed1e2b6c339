"""Tokenizers and chat templates. Completions are never tokenised again: their ids are those that the engine sampled."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmquest_rl.data.rows import DataError
from llmquest_rl.types import Message

Tokenizer: TypeAlias = PreTrainedTokenizerBase
PLAIN = "none"
"""As `chat_template`: prompts are given to the model as they are, for base models."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder in the Hub's layout.

    Raises:
        DataError: the folder has no readable tokenizer.
    """
    if not Path(path).is_dir():
        raise DataError(f"there is no folder {path} to read a tokenizer from")
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(str(path), local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no readable tokenizer (tokenizer.json, tokenizer_config.json): {error}") from error


def eos_ids(path: str | Path, tokenizer: Tokenizer) -> list[int]:
    """Every token id that ends a sequence, ascending: of the tokenizer, config.json and generation_config.json.

    Chat models often have several (end of turn, end of text); an engine must stop at each.
    """
    ids = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        file = Path(path) / name
        listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        ids |= set(listed) if isinstance(listed, list) else {listed}
    found = sorted(i for i in ids if isinstance(i, int))
    if not found:
        raise DataError(
            f"{path} names no end-of-sequence token, so completions would never end: "
            "add `eos_token` to tokenizer_config.json"
        )
    return found


@dataclass(frozen=True, slots=True)
class PromptRenderer:
    """Turns prompts into the token ids that the model sees. Make one with `prompt_renderer`."""

    tokenizer: Tokenizer
    system_prompt: str | None
    template: str | None
    """Jinja text; None = prompts as they are."""

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which special tokens, if any, are already written out."""
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with the configured system prompt, unless it brings its own."""
        if self.system_prompt is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system_prompt}, *messages]

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as text, special tokens written out; no system prompt is added here.

        Raises:
            DataError: the template refuses these messages, or there is none.
        """
        if self.template is None:
            raise DataError("messages need a chat template, but data.chat_template is `none`: give prompts as strings")
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

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """The ids of a prompt, ready for generation: a string is one user message; messages may be of several turns."""
        if self.template is None and isinstance(prompt, str):
            return cast(list[int], self.tokenizer.encode(prompt))
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode(self.chat_text(self.with_system(messages), add_generation_prompt=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text with special tokens, for people."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=False))


def prompt_renderer(
    tokenizer: Tokenizer, system_prompt: str | None = None, chat_template: str | None = None
) -> PromptRenderer:
    """Check the template settings once and return what renders prompts with them.

    Args:
        chat_template: a Jinja template, a file with one, `none` for plain text, or None for the tokenizer's own.

    Raises:
        DataError: there is no template, its file is missing, or a system prompt comes with plain text.
    """
    if chat_template == PLAIN:
        if system_prompt is not None:
            raise DataError("data.system_prompt needs a chat template, but data.chat_template is `none`")
        return PromptRenderer(tokenizer, None, None)
    template = _template_text(chat_template) if chat_template is not None else tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise DataError(
            "the tokenizer has no chat template: set data.chat_template to a Jinja template or a file with one, "
            "or to `none` to give prompts to a base model as they are"
        )
    return PromptRenderer(tokenizer, system_prompt, template)


def _template_text(chat_template: str) -> str:
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    file = Path(chat_template)
    if not file.is_file():
        raise DataError(
            f"data.chat_template: {chat_template} is neither a file nor a Jinja template (those have braces)"
        )
    return file.read_text(encoding="utf-8")
