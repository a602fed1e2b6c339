"""What a reward model reads: a conversation up to the end of its last reply, where its score is read.

Training pairs and rollouts that are judged are made into tokens here and nowhere else.
"""

from collections.abc import Sequence

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.data.conversation import row_to_group
from llmquest_rl.data.dataset import Fields
from llmquest_rl.data.tokenizer import PromptRenderer


def judged_ids(row: Fields, renderer: PromptRenderer) -> list[int]:
    """The tokens of a row of `prompt` and `completion`, or of `messages` of which the last is the assistant's.

    They end with the reply's end-of-sequence token, which every reply is given; what the chat template puts after it is
    left out.

    Raises:
        DataError: the chat template cannot render it turn by turn.
    """
    group = row_to_group(row, renderer, mask_prompt=True)
    return group.prompt + group.completions[0]


def judged_together(sequences: Sequence[list[int]]) -> SequenceGroup:
    """A group that reads one score at the last token of each sequence; their common beginning is computed once.

    Its only targets are the zeros behind the sequences: what is judged is their source.
    """
    shared = _common_beginning(sequences)
    rests = [ids[shared:] for ids in sequences]
    return SequenceGroup(
        sequences[0][:shared], [[*rest, 0] for rest in rests], mask=[[*[False] * len(rest), True] for rest in rests]
    )


def _common_beginning(sequences: Sequence[list[int]]) -> int:
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if any(ids[i] != sequences[0][i] for ids in sequences)), shortest)
