"""Groups of replies that are compared: with a score at the end of each, or with the reply's tokens as targets.

Training pairs and the rollouts of a policy are tokenised here, so that both look the same to a reward model.
"""

from collections.abc import Sequence

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import split_at_last_reply
from llmquest_rl.data.dataset import Fields
from llmquest_rl.data.rows import MalformedRowError
from llmquest_rl.data.tokenizer import PromptRenderer

SplitIds = tuple[list[int], list[int]]
"""The tokens of a conversation before its last reply, and those of that reply."""


def conversation_ids(row: Fields, renderer: PromptRenderer) -> list[int]:
    """The tokens of a row of `prompt` and `completion`, or of `messages` that end with the assistant's.

    Every reply gets an end-of-sequence token, which is the last token; the chat template's text after it is left out.

    Raises:
        DataError: the chat template cannot render the conversation turn by turn.
    """
    before, reply = split_at_last_reply(row, renderer)
    return before + reply


def compared_ids(row: Fields, renderer: PromptRenderer) -> SplitIds:
    """The tokens of a row to train on, which are those of `conversation_ids`.

    Raises:
        DataError: the chat template cannot render the conversation turn by turn.
        MalformedRowError: the last reply has no text, e.g. because the chat template removes it.
    """
    before, reply = split_at_last_reply(row, renderer)
    if not str(renderer.tokenizer.decode(reply, skip_special_tokens=True)).strip():
        raise MalformedRowError(f"the tokens of a reply have no text: {renderer.decode(reply)!r}")
    return before, reply


def group_for_scoring(sequences: Sequence[list[int]]) -> SequenceGroup:
    """A group that has one score for each sequence, at its last token; the common beginning is computed once.

    The only target of a sequence is a zero appended to it, so that its last token is the source of a prediction.
    """
    shared = _common_beginning(sequences)
    rests = [ids[shared:] for ids in sequences]
    return SequenceGroup(
        sequences[0][:shared], [[*rest, 0] for rest in rests], mask=[[*[False] * len(rest), True] for rest in rests]
    )


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
