"""From prompt/completion and messages rows to training sequences whose loss falls on the right tokens.

A conversation is tokenised piece by piece, cut between what is given and what is replied, as it is at generation: a
reply is trained on with exactly the tokens before it that the model will see when it has to write one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.rows import DataError, check_message, check_prompt
from llmquest_rl.data.tokenizer import IMAGE, PromptRenderer, as_messages
from llmquest_rl.types import Message

Piece = tuple[list[int], bool]
"""Token ids, and whether they are targets."""


def check_row(row: Mapping[str, Any]) -> str | None:
    """What makes a supervised row unusable, or None: it has `messages` with a reply, or `prompt` and `completion`."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            return "`messages` must be a list of messages with at least one"
        problem = next((found for message in messages if (found := check_message(message))), None)
        replies = problem is None and any(message["role"] == "assistant" for message in messages)
        return problem if problem or replies else "no message is the assistant's, so there is nothing to learn"
    if "completion" not in row or "prompt" not in row:
        return f"the row has neither `messages` nor `prompt` and `completion`; it has: {', '.join(map(str, row))}"
    return check_prompt(row["prompt"]) or _check_completion(row["completion"])


def _check_completion(completion: object) -> str | None:
    if not isinstance(completion, str | list) or not completion:
        return "the completion is empty, or neither a string nor a list of messages"
    if isinstance(completion, str):
        return None
    problem = next((found for message in completion if (found := check_message(message))), None)
    return problem or (None if completion[-1]["role"] == "assistant" else "the completion's last message is a prompt")


def row_to_group(row: Mapping[str, Any], renderer: PromptRenderer, mask_prompt: bool) -> SequenceGroup:
    """The training sequence of a row that `check_row` found usable.

    The loss falls on the assistant's tokens, each turn's end-of-sequence token included, and, with `mask_prompt` false,
    on all others as well (but the first, which nothing predicts). The images in `row["images"]` are not read here.

    Raises:
        DataError: the chat template cannot be rendered turn by turn; images are not as many as places for them before
            the first reply, or the prompt that they stand in is to be learnt.
    """
    images = len(row.get("images", ()))
    if images and not mask_prompt:
        raise DataError("the row has images, which stand in the prompt: nothing of it can be learnt, set mask_prompt")
    if "messages" not in row and renderer.template is None:
        pieces = _plain_pieces(row, renderer, images)
    else:
        pieces = _pieces_with_images(_messages(row), renderer, images)
    if not mask_prompt:
        return SequenceGroup([], [[token for ids, _ in pieces for token in ids]])
    (prompt, first_is_target), *rest = pieces
    assert not first_is_target, "a conversation starts with what the model does not write"
    while rest and not rest[-1][1]:
        rest.pop()  # nothing is learnt after the last reply
    completion = [token for ids, _ in rest for token in ids]
    mask = [is_target for ids, is_target in rest for _ in ids]
    if prompt:
        return SequenceGroup(prompt, [completion], mask=None if all(mask) else [mask])
    return SequenceGroup([], [completion], mask=[mask])


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    reply = row["completion"]
    said: list[Message] = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
    return [*as_messages(row["prompt"]), *said]


def _plain_pieces(row: Mapping[str, Any], renderer: PromptRenderer, images: int) -> list[Piece]:
    if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
        raise DataError("messages need a chat template, but data.chat_template is `none`: give texts")
    eos = renderer.tokenizer.eos_token_id
    prompt = renderer.prompt_ids(row["prompt"], images)
    return [(prompt, False), ([*renderer.encode(row["completion"]), eos], True)]


def _pieces_with_images(messages: list[Message], renderer: PromptRenderer, images: int) -> list[Piece]:
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if images and any(IMAGE in message["content"] for message in messages[first:] if message["role"] != "assistant"):
        raise DataError("an image stands after the first reply: split the conversation into rows of one reply")
    marked = renderer.with_image_tokens(messages, images)
    (ids, is_target), *others = _chat_pieces(renderer.with_system(marked), renderer)
    return [(renderer.expanded(ids, images), is_target), *others]


def _chat_pieces(messages: list[Message], renderer: PromptRenderer) -> Iterator[Piece]:
    """Alternately what is given and what is to be learnt, by rendering ever longer beginnings of the conversation."""
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = renderer.chat_text(messages[:i], add_generation_prompt=True)
        whole = renderer.chat_text(messages[: i + 1], add_generation_prompt=False)
        if not (head.startswith(done) and whole.startswith(head)):
            raise DataError(
                f"the chat template renders the conversation up to message {i} differently once more messages follow, "
                "so the tokens to learn cannot be told apart: set data.chat_template to one that only appends "
                "(templates that strip earlier reasoning do not), or split conversations into rows of one reply"
            )
        yield renderer.encode(head[len(done) :]), False
        yield from _split_after_eos(renderer.encode(whole[len(head) :]), renderer.tokenizer.eos_token_id)
        done = whole


def _split_after_eos(ids: list[int], eos: int | None) -> Iterator[Piece]:
    """A reply up to its end-of-sequence token is learnt; what the template puts after it (a line break) is not."""
    ends = [j for j, token in enumerate(ids) if token == eos]
    end = ends[-1] + 1 if ends else len(ids)
    yield ids[:end], True
    if end < len(ids):
        yield ids[end:], False


def targets(group: SequenceGroup) -> Iterable[int]:
    """The token ids that the loss falls on, for checks and displays."""
    for i, completion in enumerate(group.completions):
        mask = group.mask[i] if group.mask is not None else [True] * len(completion)
        yield from (t for j, (t, keep) in enumerate(zip(completion, mask, strict=True)) if keep and (j or group.prompt))
