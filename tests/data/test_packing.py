"""Packing keeps every atom whole and every token; shares are balanced and deterministic."""

from hypothesis import given
from hypothesis import strategies as st

from llmquest_rl.batch import Atom
from llmquest_rl.packing import minibatches, pack, split_ranks

atom = st.builds(
    lambda prompt, sizes: Atom([1] * prompt, [[2] * size for size in sizes]),
    st.integers(0, 9),
    st.lists(st.integers(1, 9), max_size=4),
)
atoms = st.lists(atom, max_size=40)


def flat(parts: list[list[Atom]]) -> list[int]:
    return sorted(id(atom) for part in parts for atom in part)


@given(atoms, st.integers(1, 60))
def test_pack_splits_no_atom_loses_none_and_keeps_the_budget(given_atoms: list[Atom], budget: int) -> None:
    parts = pack(given_atoms, budget)
    assert flat(parts) == sorted(map(id, given_atoms))
    assert all(sum(atom.num_tokens for atom in part) <= budget or len(part) == 1 for part in parts)
    assert [[id(atom) for atom in part] for part in pack(given_atoms, budget)] == [[id(a) for a in p] for p in parts]
    if len(parts) > 1:  # no two microbatches could have been one
        smallest = sorted(sum(atom.num_tokens for atom in part) for part in parts)[:2]
        assert sum(smallest) > budget


@given(atoms, st.integers(1, 5))
def test_split_ranks_loses_no_atom_and_balances_tokens(given_atoms: list[Atom], world_size: int) -> None:
    shares = split_ranks(given_atoms, world_size)
    order = {id(atom): i for i, atom in enumerate(given_atoms)}
    loads = [sum(atom.num_tokens for atom in share) for share in shares]
    assert len(shares) == world_size and flat(shares) == sorted(order)
    assert all([order[id(atom)] for atom in share] == sorted(order[id(atom)] for atom in share) for share in shares)
    assert max(loads) - min(loads) <= max((atom.num_tokens for atom in given_atoms), default=0)


@given(atoms, st.integers(1, 6))
def test_minibatches_keep_the_order_and_none_is_empty(given_atoms: list[Atom], n: int) -> None:
    parts = minibatches(given_atoms, n)
    sizes = [len(part) for part in parts]
    assert [id(atom) for part in parts for atom in part] == [id(atom) for atom in given_atoms]
    assert len(parts) == min(n, len(given_atoms))
    assert not sizes or (min(sizes) >= 1 and max(sizes) - min(sizes) <= 1)
