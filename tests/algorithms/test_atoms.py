"""Graded groups to atoms: who counts, and with which weight."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.algorithms.atoms import make_atoms, token_weights
from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.metrics import DESCRIPTIONS
from llmquest_rl.types import Completion, Group, Sample, Score

GRPO = resolve("grpo")


def group(rewards: list[float | None], lengths: list[int], prompt: int = 7) -> Group:
    return Group(
        Sample("s", "prompt", [prompt, prompt], None),
        [Completion([i + 1] * n, [-0.5] * n, "text", "length" if n > 3 else "stop", 0) for i, n in enumerate(lengths)],
        [Score(reward, {"exact": reward}, None if reward is not None else "timeout") for reward in rewards],
    )


def test_one_group_by_hand() -> None:
    atoms, metrics = make_atoms([group([1.0, 0.0, 0.0, 1.0], [1, 2, 4, 1])], GRPO)
    assert [a[0] for a in atoms[0].streams["advantages"]] == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    (weighed,) = token_weights(atoms, GRPO, 8)
    assert [w[0] for w in weighed.streams["weights"]] == [1 / 4, 1 / 8, 1 / 16, 1 / 4]
    assert atoms[0].streams["rollout_logprobs"][2] == [-0.5] * 4
    floats = metrics.to_floats()
    assert floats["reward/mean"] == 0.5
    assert floats["rollout/completion_tokens"] == 2.0
    assert floats["rollout/completion_tokens_max"] == 4.0
    assert floats["rollout/truncated_share"] == 0.25
    assert floats["reward/uniform_group_share"] == 0.0


def test_unscored_and_empty_samples_are_in_neither_baseline_nor_loss() -> None:
    with_them, metrics = make_atoms([group([1.0, None, 0.0, 0.5], [1, 2, 3, 0])], GRPO)
    without, _ = make_atoms([group([1.0, 0.0], [1, 3])], GRPO)
    assert [len(completion) for completion in with_them[0].completions] == [1, 3]
    assert with_them[0].streams == without[0].streams
    floats = metrics.to_floats()
    assert (floats["reward/unscored_share"], floats["rollout/empty_samples"]) == (0.25, 1.0)
    assert floats["reward/exact"] == 0.5


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [1.0, None, None], [0.1, 0.1, None]])
def test_nothing_to_compare_with_gives_zero_advantages(rewards: list[float | None]) -> None:
    atoms, metrics = make_atoms([group(rewards, [2, 2, 2])], GRPO)
    assert all(value == 0.0 for values in atoms[0].streams["advantages"] for value in values)
    assert metrics.to_floats()["reward/uniform_group_share"] == 1.0


def test_a_group_without_any_token_gives_no_atom() -> None:
    atoms, metrics = make_atoms([group([None, None], [2, 2]), group([1.0], [0])], GRPO)
    assert atoms == []
    assert all(math.isfinite(value) for value in metrics.to_floats().values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(["grpo", "dapo"]),
)
def test_weights_of_any_set_of_atoms_sum_to_one(lengths: list[list[int]], preset: str) -> None:
    algorithm = resolve(preset)
    atoms, _ = make_atoms([group([float(i) for i in range(len(part))], part) for part in lengths], algorithm)
    for chosen in (atoms, atoms[: len(atoms) // 2 + 1]):
        weighed = token_weights(chosen, algorithm, 8)
        assert sum(w for atom in weighed for row in atom.streams["weights"] for w in row) == pytest.approx(1.0)


def test_every_metric_is_documented() -> None:
    _, metrics = make_atoms([group([1.0, 0.0], [1, 2])], GRPO)
    named = set(metrics.to_floats()) - {"reward/exact"}
    assert named <= set(DESCRIPTIONS)
