"""Inputs and targets of multi-token prediction, compared with plain lists."""

import pytest
import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.layers.mtp import mtp_depths

GROUPS = [
    SequenceGroup([5, 9, 2, 7], [[3, 8], [1, 1, 4, 6, 2], [9]]),
    SequenceGroup([11], [[7, 12, 13]]),
    SequenceGroup([], [[4, 8, 15, 16, 23, 42], [17]]),
    SequenceGroup([6, 14], [[], [2, 3, 4, 5, 18]], mask=[[], [True, False, True, False, False]]),
    SequenceGroup([20, 21, 22], []),
    SequenceGroup([24], [[25]]),
]


def expected(depth: int) -> list[tuple[list[tuple[int, int, int]], list[tuple[int, int]]]]:
    """Inputs (position, token, token `depth` ahead) and targets (position, target) of each completion with a target."""
    found = []
    for group in GROUPS:
        for i, completion in enumerate(group.completions):
            mask = group.mask[i] if group.mask else [True] * len(completion)
            whole = group.prompt + completion
            targets = [len(group.prompt) + j for j, keep in enumerate(mask) if keep and (j or group.prompt)]
            if targets:
                inputs = [(at, whole[at], whole[at + depth]) for at in range(targets[-1] - depth)]
                reached = [(target - depth - 1, whole[target]) for target in targets if target > depth]
                found.append((inputs, reached))
    return found


@pytest.mark.parametrize("shared", [True, False])
def test_inputs_and_targets(shared: bool) -> None:
    batch = collate(GROUPS if shared else [part for group in GROUPS for part in group.expanded()])
    trail = torch.arange(len(batch.tokens))  # of each position, the packed row that it comes from
    for number, depth in enumerate(mtp_depths(batch, 3), start=1):
        trail = trail[depth.rows]
        wanted = expected(number)
        assert depth.layout.lengths == tuple(len(inputs) for inputs, _ in wanted)
        assert set(depth.layout.parents) == {-1}
        assert batch.positions[trail].tolist() == depth.positions.tolist()
        columns = (depth.positions, batch.tokens[trail], depth.tokens)
        inputs = list(zip(*(column.tolist() for column in columns), strict=True))
        assert inputs == [row for rows, _ in wanted for row in rows]
        targets = list(zip(depth.positions[depth.sources].tolist(), depth.targets.tolist(), strict=True))
        assert targets == [pair for _, pairs in wanted for pair in pairs]
        starts = torch.tensor(depth.layout.starts)
        segments = torch.bucketize(depth.sources, starts, right=True) - 1
        assert segments.tolist() == [i for i, (_, pairs) in enumerate(wanted) for _ in pairs]


def test_nothing_to_predict() -> None:
    for groups in ([], [SequenceGroup([1, 2], [])], [SequenceGroup([3, 4], [[], []])], [SequenceGroup([], [[5]])]):
        for depth in mtp_depths(collate(groups), 2):
            assert depth.layout.num_tokens == len(depth.rows) == len(depth.targets) == 0
