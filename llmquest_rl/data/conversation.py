"""From prompt/completion and messages rows to training sequences whose loss falls on the right tokens.

A conversation is tokenised piece by piece, cut between what is given and what is replied, as it is at generation: a
reply is trained on with exactly the tokens before it that the model will see when it has to write one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmquest_rl.batch import Atom
from llmquest_rl.data.rows import DataError, check_message, check_prompt
from llmquest_rl.data.tokenizer import PromptRenderer
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
    if not isinstance(row["completion"], str) or not row["completion"]:
        return "the completion is empty or no string"
    return check_prompt(row["prompt"])


def row_atom(row: Mapping[str, Any], renderer: PromptRenderer, mask_prompt: bool) -> Atom:
    """The training sequence of a row that `check_row` found usable.

    The loss falls on the assistant's tokens, each turn's end-of-sequence token included, and, with `mask_prompt` false,
    on all others as well (but the first, which nothing predicts).

    Raises:
        DataError: the chat template cannot be rendered turn by turn.
    """
    if "messages" not in row and renderer.template is None:
        pieces = _plain_pieces(row, renderer)
    else:
        pieces = list(_chat_pieces(renderer.with_system(_messages(row)), renderer))
    if not mask_prompt:
        return Atom([], [[token for ids, _ in pieces for token in ids]])
    (prompt, first_is_target), *rest = pieces
    assert not first_is_target, "a conversation starts with what the model does not write"
    while rest and not rest[-1][1]:
        rest.pop()  # nothing is learnt after the last reply
    completion = [token for ids, _ in rest for token in ids]
    mask = [is_target for ids, is_target in rest for _ in ids]
    if prompt:
        return Atom(prompt, [completion], mask=None if all(mask) else [mask])
    return Atom([], [completion], mask=[mask])


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row:
        return list(row["messages"])
    prompt = row["prompt"]
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return [*messages, {"role": "assistant", "content": row["completion"]}]


def _plain_pieces(row: Mapping[str, Any], renderer: PromptRenderer) -> list[Piece]:
    if not isinstance(row["prompt"], str):
        raise DataError("a prompt of messages needs a chat template, but data.chat_template is `none`")
    eos = renderer.tokenizer.eos_token_id
    return [(renderer.prompt_ids(row["prompt"]), False), ([*renderer.encode(row["completion"]), eos], True)]


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


def targets(atom: Atom) -> Iterable[int]:
    """The token ids that the loss falls on, for checks and displays."""
    for i, completion in enumerate(atom.completions):
        mask = atom.mask[i] if atom.mask is not None else [True] * len(completion)
        yield from (t for j, (t, keep) in enumerate(zip(completion, mask, strict=True)) if keep and (j or atom.prompt))
