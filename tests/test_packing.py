"""Packing keeps every group whole and every token; shares are balanced and deterministic."""

from hypothesis import given
from hypothesis import strategies as st

from llmquest_rl.batch import SequenceGroup
from llmquest_rl.packing import minibatches, pack, split_ranks

group = st.builds(
    lambda prompt, sizes: SequenceGroup([1] * prompt, [[2] * size for size in sizes]),
    st.integers(0, 9),
    st.lists(st.integers(1, 9), max_size=4),
)
groups = st.lists(group, max_size=40)


def flat(parts: list[list[SequenceGroup]]) -> list[int]:
    return sorted(id(group) for part in parts for group in part)


@given(groups, st.integers(1, 60))
def test_pack_splits_no_group_loses_none_and_keeps_the_budget(given_groups: list[SequenceGroup], budget: int) -> None:
    parts = pack(given_groups, budget)
    assert flat(parts) == sorted(map(id, given_groups))
    assert all(sum(group.num_tokens for group in part) <= budget or len(part) == 1 for part in parts)
    assert [[id(group) for group in part] for part in pack(given_groups, budget)] == [[id(a) for a in p] for p in parts]
    if len(parts) > 1:  # no two microbatches could have been one
        smallest = sorted(sum(group.num_tokens for group in part) for part in parts)[:2]
        assert sum(smallest) > budget


@given(groups, st.integers(1, 5))
def test_split_ranks_loses_no_groups_and_balances_tokens(given_groups: list[SequenceGroup], world_size: int) -> None:
    shares = split_ranks(given_groups, world_size)
    order = {id(group): i for i, group in enumerate(given_groups)}
    loads = [sum(group.num_tokens for group in share) for share in shares]
    assert len(shares) == world_size and flat(shares) == sorted(order)
    assert all([order[id(group)] for group in share] == sorted(order[id(group)] for group in share) for share in shares)
    assert max(loads) - min(loads) <= max((group.num_tokens for group in given_groups), default=0)


@given(groups, st.integers(1, 6))
def test_minibatches_keep_the_order_and_none_is_empty(given_groups: list[SequenceGroup], n: int) -> None:
    parts = minibatches(given_groups, n)
    sizes = [len(part) for part in parts]
    assert [id(group) for part in parts for group in part] == [id(group) for group in given_groups]
    assert len(parts) == min(n, len(given_groups))
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)
