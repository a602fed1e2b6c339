"""Sharing atoms out: over learners, over minibatches, and over microbatches of a token budget.

An atom is never split. Everything here is deterministic in the order of its input, and nothing changes a gradient:
token weights are fixed on the whole batch before.
"""

import heapq
from collections.abc import Sequence

from llmquest_rl.batch import Atom


def pack(atoms: Sequence[Atom], tokens_per_microbatch: int) -> list[list[Atom]]:
    """Microbatches of at most `tokens_per_microbatch` tokens, as few as first-fit-decreasing finds.

    An atom larger than the budget gets a microbatch of its own. Atoms keep their order within a microbatch, and
    microbatches are ordered by their first atom.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for i in _longest_first(atoms):
        size = atoms[i].num_tokens
        place = next((b for b, room in enumerate(free) if size <= room), None)
        if place is None:
            bins.append([])
            free.append(tokens_per_microbatch)
            place = len(bins) - 1
        bins[place].append(i)
        free[place] -= size
    return [[atoms[i] for i in chosen] for chosen in sorted(map(sorted, bins))]


def split_ranks(atoms: Sequence[Atom], world_size: int) -> list[list[Atom]]:
    """One share for each of `world_size` learners, balanced by tokens (longest first to the least loaded).

    Atoms keep their order within a share. A share is empty when there are fewer atoms than learners.
    """
    loads = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for i in _longest_first(atoms):
        load, rank = heapq.heappop(loads)
        shares[rank].append(i)
        heapq.heappush(loads, (load + atoms[i].num_tokens, rank))
    return [[atoms[i] for i in sorted(share)] for share in shares]


def minibatches(atoms: Sequence[Atom], n: int) -> list[list[Atom]]:
    """At most n consecutive parts whose numbers of atoms differ by one at most; none is empty."""
    n = min(n, len(atoms))
    bounds = [len(atoms) * i // n for i in range(n + 1)] if n else [0]
    return [list(atoms[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _longest_first(atoms: Sequence[Atom]) -> list[int]:
    return sorted(range(len(atoms)), key=lambda i: (-atoms[i].num_tokens, i))
