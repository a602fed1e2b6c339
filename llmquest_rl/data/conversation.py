"""Turns rows of prompt and completion, or of messages, into training sequences, and chooses the tokens of the loss.

A conversation is tokenised piece by piece, with a cut before and after every reply. So the tokens before a reply are
exactly those that the model sees at generation.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.rows import DataError, check_message, check_prompt
from llmquest_rl.data.tokenizer import IMAGE, PromptRenderer, as_messages
from llmquest_rl.types import Message

Piece = tuple[list[int], bool]
"""Token ids, and whether the loss covers them."""


def check_row(row: Mapping[str, Any]) -> str | None:
    """The reason why a row is unusable, or None. A row needs `messages` with a reply, or `prompt` and `completion`."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return "`messages` must be a list of messages with at least one"
        problem = next((found for message in messages if (found := check_message(message))), None)
        replies = problem is None and any(message["role"] == "assistant" for message in messages)
        return problem if problem or replies else "no message has the role `assistant`, so there is nothing to learn"
    if "completion" not in row or "prompt" not in row:
        return f"the row has neither `messages` nor `prompt` and `completion`; it has: {', '.join(map(str, row))}"
    return check_prompt(row["prompt"]) or check_completion(row["completion"])


def check_completion(completion: object) -> str | None:
    """The reason why a completion is unusable, or None. It must be a string, or messages that end with a reply."""
    if not isinstance(completion, str | list) or not completion:
        return "the completion is empty, or neither a string nor a list of messages"
    if isinstance(completion, str):
        return None
    problem = next((found for message in completion if (found := check_message(message))), None)
    return problem or (
        None if completion[-1]["role"] == "assistant" else "the completion must end with the assistant's message"
    )


def is_blank(reply: str | list[Message]) -> bool:
    """Whether a reply, or the last of its messages, is empty or white space."""
    return not (reply if isinstance(reply, str) else reply[-1]["content"]).strip()


def tokenize_row(row: Mapping[str, Any], renderer: PromptRenderer, mask_prompt: bool) -> SequenceGroup:
    """The training sequence of a row that `check_row` found usable.

    The loss covers the assistant's tokens, with the end-of-sequence token of each turn. If `mask_prompt` is false it
    covers all other tokens, too, except the first, which has no prediction. The images in `row["images"]` are not read.

    Raises:
        DataError: the chat template cannot be rendered turn by turn; the number of images differs from the number of
            their places before the first reply; or a prompt with images is to be learnt.
    """
    if row.get("images") and not mask_prompt:
        raise DataError("the row has images in its prompt, so the prompt cannot be learnt: set mask_prompt: true")
    if not mask_prompt:
        return SequenceGroup([], [_joined(_pieces(row, renderer))])
    (prompt, first_is_target), *rest = _up_to_last_reply(row, renderer)
    assert not first_is_target, "a conversation starts with a message that the model does not write"
    completion = _joined(rest)
    mask = [is_target for ids, is_target in rest for _ in ids]
    if prompt:
        return SequenceGroup(prompt, [completion], mask=None if all(mask) else [mask])
    return SequenceGroup([], [completion], mask=[mask])


def split_at_last_reply(row: Mapping[str, Any], renderer: PromptRenderer) -> tuple[list[int], list[int]]:
    """The tokens before the last reply of a usable row, and the reply's with its end-of-sequence token.

    Both are the tokens of `tokenize_row`.

    Raises:
        DataError: see `tokenize_row`.
    """
    *before, (reply, _) = _up_to_last_reply(row, renderer)
    return _joined(before), reply


def _up_to_last_reply(row: Mapping[str, Any], renderer: PromptRenderer) -> list[Piece]:
    """The pieces of a row without those after its last reply, which the loss never covers."""
    pieces = _pieces(row, renderer)
    while not pieces[-1][1]:
        pieces.pop()
    return pieces


def _joined(pieces: Iterable[Piece]) -> list[int]:
    return [token for ids, _ in pieces for token in ids]


def _pieces(row: Mapping[str, Any], renderer: PromptRenderer) -> list[Piece]:
    images = len(row.get("images", ()))
    if "messages" not in row and renderer.template is None:
        return _plain_pieces(row, renderer, images)
    return _pieces_with_images(_messages(row), renderer, images)


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    reply = row["completion"]
    said: list[Message] = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    return [*as_messages(row["prompt"]), *said]


def _plain_pieces(row: Mapping[str, Any], renderer: PromptRenderer, images: int) -> list[Piece]:
    if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
        raise DataError("messages need a chat template, but data.chat_template is `none`: use strings")
    eos = renderer.tokenizer.eos_token_id
    prompt = renderer.prompt_ids(row["prompt"], images)
    return [(prompt, False), ([*renderer.encode(row["completion"]), eos], True)]


def _pieces_with_images(messages: list[Message], renderer: PromptRenderer, images: int) -> list[Piece]:
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if images and any(IMAGE in message["content"] for message in messages[first:] if message["role"] != "assistant"):
        raise DataError("there is an image after the first reply: split the conversation into rows of one reply")
    marked = renderer.with_image_tokens(messages, images)
    (ids, is_target), *others = _chat_pieces(renderer.with_system(marked), renderer)
    return [(renderer.expanded(ids, images), is_target), *others]


def _chat_pieces(messages: list[Message], renderer: PromptRenderer) -> Iterator[Piece]:
    """Prompt and reply pieces in turn, found by rendering longer and longer beginnings of the conversation."""
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = renderer.chat_text(messages[:i], add_generation_prompt=True)
        whole = renderer.chat_text(messages[: i + 1], add_generation_prompt=False)
        if not (head.startswith(done) and whole.startswith(head)):
            raise DataError(
                f"the chat template renders the conversation up to message {i} differently once more messages follow, "
                "so the tokens to learn cannot be found: set data.chat_template to one that only appends "
                "(templates that strip earlier reasoning do not), or split conversations into rows of one reply"
            )
        yield renderer.encode(head[len(done) :]), False
        yield from _split_after_eos(renderer.encode(whole[len(head) :]), renderer.tokenizer.eos_token_id)
        done = whole


def _split_after_eos(ids: list[int], eos: int | None) -> Iterator[Piece]:
    """Cut a reply after its end-of-sequence token: the template's text after it (a line break) is not learnt."""
    ends = [j for j, token in enumerate(ids) if token == eos]
    end = ends[-1] + 1 if ends else len(ids)
    yield ids[:end], True
    if end < len(ids):
        yield ids[end:], False
