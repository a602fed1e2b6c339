"""Divides groups among learners, minibatches, and microbatches of a token budget.

A group is never split. The result depends on the order of the input alone, and the division does not change a gradient,
because token weights are assigned on the whole batch before it.
"""

import heapq
from collections.abc import Sequence

from llmquest_rl.batch import SequenceGroup


def pack(groups: Sequence[SequenceGroup], tokens_per_microbatch: int) -> list[list[SequenceGroup]]:
    """Pack groups into microbatches of at most `tokens_per_microbatch` tokens, by first-fit decreasing.

    A group larger than the budget gets its own microbatch. Groups keep their order within a microbatch, and
    microbatches are ordered by their first group.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for i in _longest_first(groups):
        size = groups[i].num_tokens
        place = next((b for b, room in enumerate(free) if size <= room), None)
        if place is None:
            bins.append([])
            free.append(tokens_per_microbatch)
            place = len(bins) - 1
        bins[place].append(i)
        free[place] -= size
    return [[groups[i] for i in chosen] for chosen in sorted(map(sorted, bins))]


def split_ranks(groups: Sequence[SequenceGroup], world_size: int) -> list[list[SequenceGroup]]:
    """Divide groups into `world_size` shares with similar numbers of tokens: the longest first to the smallest share.

    Groups keep their order within a share. A share is empty when there are fewer groups than learners.
    """
    loads = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for i in _longest_first(groups):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + groups[i].num_tokens, rank))
    return [[groups[i] for i in sorted(share)] for share in shares]


def minibatches(groups: Sequence[SequenceGroup], n: int) -> list[list[SequenceGroup]]:
    """Divide groups into at most n consecutive, non-empty parts, whose sizes differ by one at most."""
    n = min(n, len(groups))
    bounds = [len(groups) * i // n for i in range(n + 1)] if n else [0]
    return [list(groups[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _longest_first(groups: Sequence[SequenceGroup]) -> list[int]:
    return sorted(range(len(groups)), key=lambda i: (-groups[i].num_tokens, i))
