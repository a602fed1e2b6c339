"""The input of a reward model: a conversation up to the end of its last reply, where the score is read.

Training pairs and the rollouts of a policy are tokenised here, so that both look the same to a reward model.
"""

from collections.abc import Sequence

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import tokenize_row
from llmquest_rl.data.dataset import Fields
from llmquest_rl.data.tokenizer import PromptRenderer


def conversation_ids(row: Fields, renderer: PromptRenderer) -> list[int]:
    """The tokens of a row of `prompt` and `completion`, or of `messages` that end with the assistant's.

    Every reply gets an end-of-sequence token, which is the last token; the chat template's text after it is left out.

    Raises:
        DataError: the chat template cannot render the conversation turn by turn.
    """
    group = tokenize_row(row, renderer, mask_prompt=True)
    return group.prompt + group.completions[0]


def group_for_scoring(sequences: Sequence[list[int]]) -> SequenceGroup:
    """A group that has one score for each sequence, at its last token; the common beginning is computed once.

    The only target of a sequence is a zero appended to it, so that its last token is the source of a prediction.
    """
    shared = _common_beginning(sequences)
    rests = [ids[shared:] for ids in sequences]
    return SequenceGroup(
        sequences[0][:shared], [[*rest, 0] for rest in rests], mask=[[*[False] * len(rest), True] for rest in rests]
    )


def _common_beginning(sequences: Sequence[list[int]]) -> int:
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if any(ids[i] != sequences[0][i] for ids in sequences)), shortest)
