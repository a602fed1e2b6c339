"""Groups of replies that are compared: with a score at the end of each, or with the reply's tokens as targets.

Training pairs and the rollouts of a policy are tokenised here, so that both look the same to a reward model.
"""

from collections.abc import Sequence

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import split_at_last_reply
from llmquest_rl.data.dataset import Fields
from llmquest_rl.data.rows import MalformedRowError
from llmquest_rl.data.tokenizer import PromptRenderer
from llmquest_rl.types import Pooling

SplitIds = tuple[list[int], list[int]]
"""The tokens of a conversation before its last reply, and those of that reply."""


def compared_ids(row: Fields, renderer: PromptRenderer) -> SplitIds:
    """The tokens of a row to train on: of `prompt` and `completion`, or of `messages` that end with the assistant's.

    Every reply gets an end-of-sequence token, which is the last token; the chat template's text after it is left out.

    Raises:
        DataError: the chat template cannot render the conversation turn by turn.
        MalformedRowError: the last reply has no text, e.g. because the chat template removes it.
    """
    before, reply = split_at_last_reply(row, renderer)
    if not str(renderer.tokenizer.decode(reply, skip_special_tokens=True)).strip():
        raise MalformedRowError(f"the tokens of a reply have no text: {renderer.decode(reply)!r}")
    return before, reply


def read_ids(conversation: SplitIds, pooling: Pooling, eos: int | None) -> SplitIds:
    """The tokens of a conversation that a reward model with this pooling reads.

    With `last_token` the reply has no end-of-sequence token, so that its own last token is the last one.
    """
    before, reply = conversation
    return (before, reply[:-1]) if pooling == "last_token" and reply[-1:] == [eos] else conversation


def group_for_scoring(conversations: Sequence[SplitIds], pooling: Pooling = "eos") -> SequenceGroup:
    """A group with one score for each conversation; the common beginning is computed once.

    A score is the mean over the targets of a conversation. Each target makes the token before it the source of a
    prediction, and its own value is not used: with `mean` every token of the reply is such a source, otherwise only the
    last token of the conversation.
    """
    sequences = [before + reply for before, reply in conversations]
    starts = [
        len(before) if pooling == "mean" and reply else len(before + reply) - 1 for before, reply in conversations
    ]
    shared = min(_common_beginning(sequences), *(start + 1 for start in starts))
    completions = [[*ids[shared:], 0] for ids in sequences]
    mask = [
        [i > start - shared for i in range(len(completion))]
        for start, completion in zip(starts, completions, strict=True)
    ]
    return SequenceGroup(sequences[0][:shared], completions, mask=mask)


def group_for_prediction(conversations: Sequence[SplitIds]) -> SequenceGroup:
    """A group whose targets are the tokens of the last replies; what all have in common before them is computed once.

    Conversations may differ before their last replies. Their completions then begin with tokens that are no targets.

    Raises:
        MalformedRowError: there is no token before a reply, so nothing predicts its first token.
    """
    sequences = [before + reply for before, reply in conversations]
    starts = [len(before) for before, _ in conversations]
    if 0 in starts:
        raise MalformedRowError("the prompt has no tokens, so nothing predicts the first token of the reply")
    shared = min(_common_beginning(sequences), *starts)
    completions = [ids[shared:] for ids in sequences]
    mask = [
        [i >= start - shared for i in range(len(completion))]
        for start, completion in zip(starts, completions, strict=True)
    ]
    return SequenceGroup(sequences[0][:shared], completions, mask=None if max(starts) == shared else mask)


def _common_beginning(sequences: Sequence[list[int]]) -> int:
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if any(ids[i] != sequences[0][i] for ids in sequences)), shortest)
