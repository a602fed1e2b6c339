"""Sequence groups from graded groups: the completions that count, and the weights of their tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.algorithms.advantages import ADVANTAGES
from llmquest_rl.algorithms.lengths import LENGTH_PENALTIES
from llmquest_rl.algorithms.normalization import NORMALIZATIONS
from llmquest_rl.algorithms.presets import PRESETS, resolve
from llmquest_rl.algorithms.sequence_groups import is_usable, make_sequence_groups, token_weights
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.types import Completion, Group, Problem, Score
from trainer.run.metric_table import METRICS

GRPO = resolve("grpo")
MAX_TOKENS = 8


def group(rewards: list[float | None], lengths: list[int], prompt: int = 7) -> Group:
    return Group(
        Problem("s", "prompt", [prompt, prompt], None),
        [Completion([i + 1] * n, [-0.5] * n, "text", "length" if n > 3 else "stop", 0) for i, n in enumerate(lengths)],
        [Score(r, {"exact": r}, None if r is not None else "timeout", weights={"exact": 1.0}) for r in rewards],
    )


def test_one_group_by_hand() -> None:
    sequence_groups, metrics = make_sequence_groups([group([1.0, 0.0, 0.0, 1.0], [1, 2, 4, 1])], GRPO, MAX_TOKENS)
    assert [a[0] for a in sequence_groups[0].token_fields["advantages"]] == pytest.approx(
        [0.866, -0.866, -0.866, 0.866], abs=1e-3
    )
    (weighted,) = token_weights(sequence_groups, GRPO, MAX_TOKENS)
    assert [w[0] for w in weighted.token_fields["weights"]] == [1 / 4, 1 / 8, 1 / 16, 1 / 4]
    assert sequence_groups[0].token_fields["rollout_logprobs"][2] == [-0.5] * 4
    floats = metrics.to_floats()
    assert floats["reward/mean"] == 0.5
    assert floats["rollout/completion_tokens"] == 2.0
    assert floats["rollout/completion_tokens_max"] == 4.0
    assert floats["rollout/truncated_share"] == 0.25
    assert floats["reward/zero_std_group_share"] == 0.0


def test_unscored_and_empty_samples_are_in_neither_baseline_nor_loss() -> None:
    with_them, metrics = make_sequence_groups([group([1.0, None, 0.0, 0.5], [1, 2, 3, 0])], GRPO, MAX_TOKENS)
    without, _ = make_sequence_groups([group([1.0, 0.0], [1, 3])], GRPO, MAX_TOKENS)
    assert [len(completion) for completion in with_them[0].completions] == [1, 3]
    assert with_them[0].token_fields == without[0].token_fields
    floats = metrics.to_floats()
    assert (floats["reward/unscored_share"], floats["rollout/empty_samples"]) == (0.25, 1.0)
    assert floats["reward/exact"] == 0.5


@pytest.mark.parametrize("rewards", [[0.3, 0.3, 0.3], [1.0, None, None], [0.1, 0.1, None]])
def test_nothing_to_compare_with_gives_zero_advantages(rewards: list[float | None]) -> None:
    sequence_groups, metrics = make_sequence_groups([group(rewards, [2, 2, 2])], GRPO, MAX_TOKENS)
    assert all(value == 0.0 for values in sequence_groups[0].token_fields["advantages"] for value in values)
    assert metrics.to_floats()["reward/zero_std_group_share"] == 1.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=8),
    st.sampled_from(["group_mean_std", "group_mean", "leave_one_out"]),
    st.sampled_from([1.0, 2.0]),
)
def test_a_phantom_reward_joins_the_groups_mean_and_deviation(
    rewards: list[float], advantage: str, phantom: float
) -> None:
    """It counts like one more sample of the group that is not trained on."""
    row = resolve("grpo", {"advantage": advantage, "phantom_reward": phantom})
    sequence_groups, _ = make_sequence_groups([group(list(rewards), [2] * len(rewards))], row, MAX_TOKENS)
    joined = np.array([*rewards, phantom])
    centred = joined - joined.mean()
    expected = {
        "group_mean": centred,
        "group_mean_std": centred / (joined.std(ddof=1) + 1e-6),
        "leave_one_out": joined - (joined.sum() - joined) / len(rewards),
    }[advantage][:-1]
    if (joined == joined[0]).all():
        expected = np.zeros(len(rewards))
    ours = [values[0] for values in sequence_groups[0].token_fields["advantages"]]
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_with_a_phantom_reward_a_group_of_wrong_answers_teaches() -> None:
    wrong, right = group([0.0, 0.0, 0.0], [2, 2, 2]), group([1.0, 1.0, 1.0], [2, 2, 2])
    row = resolve("grpo", {"phantom_reward": 1.0})
    assert (is_usable(wrong, GRPO), is_usable(wrong, row), is_usable(right, row)) == (False, True, False)
    sequence_groups, _ = make_sequence_groups([wrong, right], row, MAX_TOKENS)
    assert all(value < 0 for values in sequence_groups[0].token_fields["advantages"] for value in values)
    assert not any(value for values in sequence_groups[1].token_fields["advantages"] for value in values)
    with pytest.raises(ValueError, match="phantom_reward.*pass_at_k.*group_mean"):
        resolve("pass_at_k", {"phantom_reward": 1.0})


def test_a_group_without_any_token_gives_no_groups() -> None:
    sequence_groups, metrics = make_sequence_groups([group([None, None], [2, 2]), group([1.0], [0])], GRPO, MAX_TOKENS)
    assert sequence_groups == []
    assert all(math.isfinite(value) for value in metrics.to_floats().values())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(["sequence_mean", "token_mean", "prompt_mean"]),
)
def test_weights_of_any_set_of_groups_sum_to_one(lengths: list[list[int]], aggregation: str) -> None:
    algorithm = resolve("grpo", {"aggregation": aggregation})
    sequence_groups, _ = make_sequence_groups(
        [group([float(i) for i in range(len(part))], part) for part in lengths], algorithm, MAX_TOKENS
    )
    for chosen in (sequence_groups, sequence_groups[: len(sequence_groups) // 2 + 1]):
        weighted = token_weights(chosen, algorithm, MAX_TOKENS)
        assert sum(
            w for sequence_group in weighted for row in sequence_group.token_fields["weights"] for w in row
        ) == pytest.approx(1.0)


def advantages(sequence_groups: list[SequenceGroup]) -> list[list[float]]:
    """The first token's advantage of each completion of each group."""
    return [[values[0] for values in sequence_group.token_fields["advantages"]] for sequence_group in sequence_groups]


def test_soft_overlong_punishment_counts_before_the_comparison() -> None:
    cells = {"advantage": "group_mean", "overlong_filter": False, "overlong_buffer": 0.5, "length_weight": 0.5}
    algorithm = resolve("dapo", cells)
    sequence_groups, metrics = make_sequence_groups([group([1.0, 1.0, 1.0, 0.0], [4, 6, 8, 2])], algorithm, MAX_TOKENS)
    rewards = np.array([1.0, 1.0 - 0.5 * 2 / 4, 1.0 - 0.5 * 1.0, 0.0])
    assert advantages(sequence_groups)[0] == pytest.approx(rewards - rewards.mean())
    floats = metrics.to_floats()
    assert floats["reward/length_penalty"] == pytest.approx(-0.75 / 4)
    assert floats["reward/mean"] == 0.75


def test_overlong_completions_are_in_the_baseline_and_not_in_the_loss() -> None:
    algorithm = resolve("dapo", {"advantage": "group_mean", "length_penalty": "none"})
    groups = [group([1.0, 0.0, 0.0], [2, 8, 3]), group([1.0, 0.0], [5, 6])]
    sequence_groups, _ = make_sequence_groups(groups, algorithm, MAX_TOKENS)
    assert advantages(sequence_groups) == [pytest.approx([2 / 3, -1 / 3])]
    assert [len(completion) for completion in sequence_groups[0].completions] == [2, 3]
    (weighted,) = token_weights(sequence_groups, algorithm, MAX_TOKENS)
    assert weighted.token_fields["weights"] == [[1 / 5] * 2, [1 / 5] * 3]


def test_the_parts_of_an_advantage_follow_each_other() -> None:
    """Comparison, normalisation over the step, weights of signs, limit."""
    cells = {"normalization": "whiten", "positive_weight": 0.5, "negative_weight": 2.0, "advantage_limit": 1.5}
    algorithm = resolve("rloo", cells)
    groups = [group([1.0, 0.0, 0.0], [1, 2, 3]), group([4.0, 0.0], [3, 1])]
    sequence_groups, _ = make_sequence_groups(groups, algorithm, MAX_TOKENS)
    left_out = np.array([1.0, -0.5, -0.5, 4.0, -4.0])
    tokens = np.repeat(left_out, [1, 2, 3, 3, 1])
    white = (left_out - tokens.mean()) / tokens.std()
    expected = np.clip(np.where(white > 0, 0.5 * white, 2.0 * white), -1.5, 1.5)
    assert sum(advantages(sequence_groups), []) == pytest.approx(expected, rel=1e-5)
    assert min(expected) == -1.5


def test_without_a_baseline_a_group_of_equal_rewards_teaches() -> None:
    for rewards in ([1.0], [1.0, 1.0]):
        sequence_groups, _ = make_sequence_groups(
            [group(rewards, [2] * len(rewards))], resolve("reinforce"), MAX_TOKENS
        )
        assert advantages(sequence_groups) == [[1.0] * len(rewards)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([None, 0.0, 1.0, -1.0, 0.1, 1e30]), st.integers(0, 8)), min_size=1, max_size=5
        ),
        max_size=4,
    ),
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(sorted(NORMALIZATIONS)),
    st.sampled_from(sorted(LENGTH_PENALTIES)),
)
def test_whatever_comes_back_advantages_and_weights_are_finite(
    parts: list[list[tuple[float | None, int]]], preset: str, normalization: str, penalty: str
) -> None:
    """All-equal rewards, groups of one, failures, empty completions."""
    advantage = ADVANTAGES[resolve(preset).advantage]
    if advantage.by_critic:
        normalization = "whiten"  # the learner normalises the critic's advantages, so other values are refused
    if advantage.nonnegative:
        penalty, parts = "none", [[(reward and abs(reward), length) for reward, length in part] for part in parts]
    algorithm = resolve(preset, {"normalization": normalization, "length_penalty": penalty})
    groups = [group([reward for reward, _ in part], [length for _, length in part]) for part in parts]
    sequence_groups, metrics = make_sequence_groups(groups, algorithm, MAX_TOKENS)
    values = [
        value
        for sequence_group in sequence_groups
        for row in sequence_group.token_fields["advantages"]
        for value in row
    ]
    weights = [
        w
        for sequence_group in token_weights(sequence_groups, algorithm, MAX_TOKENS)
        for row in sequence_group.token_fields["weights"]
        for w in row
    ]
    assert all(math.isfinite(value) for value in values)
    assert all(math.isfinite(weight) and weight > 0 for weight in weights)
    assert len(values) == len(weights)
    assert all(math.isfinite(value) for value in metrics.to_floats().values())


def test_every_metric_is_documented() -> None:
    _, metrics = make_sequence_groups([group([1.0, 0.0], [1, 2])], resolve("dapo"), MAX_TOKENS)
    named = set(metrics.to_floats()) - {"reward/exact"}
    assert named <= set(METRICS)


@pytest.mark.parametrize(
    ("rewards", "lengths", "cells", "usable"),
    [
        ([1.0, 0.0], [1, 2], {}, True),
        ([1.0, 1.0], [1, 2], {}, False),
        ([0.0, 0.0, 0.0], [1, 2, 3], {}, False),
        ([0.3, 0.3 + 1e-9], [1, 2], {}, True),
        ([1.0, None, 1.0], [1, 2, 3], {}, False),
        ([1.0, None], [1, 2], {}, False),
        ([None, None], [1, 2], {}, False),
        ([1.0, 0.0], [1, 0], {}, False),
        ([1.0, 1.0], [1, MAX_TOKENS], {"length_penalty": "soft_overlong"}, False),
        ([0.0, 0.0], [1, 2], {"phantom_reward": 1.0}, True),
        ([0.0, 0.0], [1, 2], {"phantom_reward": 1.0, "negative_weight": 0.0}, False),
        ([0.0, None], [1, 2], {"phantom_reward": 1.0}, False),
        ([1.0, 1.0, 1.0, 0.0], [1, 2, 3, 4], {"advantage": "pass_at_k", "pass_k": 2}, False),
        ([1.0, 0.0, 0.0, 0.0], [1, 2, 3, 4], {"advantage": "pass_at_k", "pass_k": 2}, True),
        ([1.0] * 3 + [0.0] * 3, [1] * 6, {"advantage": "pass_at_k", "pass_k": 4}, False),
        ([1.0] * 3 + [0.0] * 3, [1] * 6, {"advantage": "pass_at_k", "pass_k": 3}, True),
    ],
)
def test_a_group_is_usable_when_its_rewards_give_an_advantage(
    rewards: list[float | None], lengths: list[int], cells: dict[str, object], usable: bool
) -> None:
    """Equal, unscored and empty ones do not; lengths do not count; with fewer wrong than k, the best of k is right."""
    assert is_usable(group(rewards, lengths), resolve("grpo", cells)) == usable


def test_a_group_of_which_all_that_differs_was_cut_is_not_usable() -> None:
    made = group([1.0, 0.0], [1, 2])
    cut = [replace(completion, finish_reason="length") for completion in made.completions]
    assert not is_usable(replace(made, completions=cut), resolve("dapo"))
    assert is_usable(replace(made, completions=cut), resolve("dapo", {"overlong_filter": False}))
    assert is_usable(replace(made, completions=[cut[0], made.completions[1]]), resolve("dapo"))


def of_two_rewards(parts: list[tuple[float, float | None]], weights: tuple[float, float] = (1.0, 0.5)) -> Group:
    """A group whose score is the weighted sum of two rewards, one of which need not apply."""
    made = group([0.0] * len(parts), [2] * len(parts))
    names = ("exact", "short")
    scores = [
        Score(
            sum(w * value for w, value in zip(weights, values, strict=True) if value is not None),
            dict(zip(names, values, strict=True)),
            weights=dict(zip(names, weights, strict=True)),
        )
        for values in parts
    ]
    return replace(made, scores=scores)


def standardised(values: list[float]) -> np.ndarray:
    return np.asarray((np.array(values) - np.mean(values)) / (np.std(values, ddof=1) + 1e-6))


def test_each_reward_is_compared_by_itself() -> None:
    """GDPO's example: the sums are 1, 2, 2 and 3, so GRPO does not see which reward a completion has."""
    row = resolve("gdpo", {"normalization": "none"})
    made = of_two_rewards([(1.0, 0.0), (0.0, 4.0), (1.0, 2.0), (1.0, 4.0)])
    grpo, _ = make_sequence_groups([made], GRPO, MAX_TOKENS)
    gdpo, _ = make_sequence_groups([made], row, MAX_TOKENS)
    assert advantages(grpo)[0][1] == advantages(grpo)[0][2]
    expected = standardised([1.0, 0.0, 1.0, 1.0]) + 0.5 * standardised([0.0, 4.0, 2.0, 4.0])
    assert advantages(gdpo)[0] == pytest.approx(expected)


def test_a_reward_that_does_not_apply_is_left_out_of_its_own_comparison() -> None:
    row = resolve("gdpo", {"normalization": "none"})
    groups, _ = make_sequence_groups([of_two_rewards([(1.0, 3.0), (0.0, None), (1.0, 5.0)])], row, MAX_TOKENS)
    first, second = standardised([1.0, 0.0, 1.0]), standardised([3.0, 5.0])
    assert advantages(groups)[0] == pytest.approx(first + 0.5 * np.array([second[0], 0.0, second[1]]))


def test_a_reward_that_is_equal_throughout_does_not_hide_another() -> None:
    """Nor does one that outweighs it: a group whose sums are equal has advantages."""
    row = resolve("gdpo", {"normalization": "none"})
    hidden = of_two_rewards([(1.0, 0.0), (0.0, 2.0)])
    assert [score.value for score in hidden.scores] == [1.0, 1.0]
    assert not is_usable(hidden, GRPO)
    assert is_usable(hidden, row)
    constant = of_two_rewards([(1.0, 0.0), (1.0, 2.0)])
    groups, _ = make_sequence_groups([constant], row, MAX_TOKENS)
    assert advantages(groups)[0] == pytest.approx(0.5 * standardised([0.0, 2.0]))


def test_with_decoupled_rewards_the_length_penalty_is_a_reward_of_its_own() -> None:
    row = resolve("gdpo", {"normalization": "none", "length_penalty": "soft_overlong", "overlong_buffer": 0.5})
    lengths = group([0.0] * 3, [4, 6, 8]).completions
    made = replace(of_two_rewards([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]), completions=lengths)
    groups, _ = make_sequence_groups([made], row, MAX_TOKENS)
    rewards = standardised([1.0, 0.0, 1.0]) + 0.5 * standardised([0.0, 1.0, 1.0])
    expected = rewards + standardised([0.0, -0.5, -1.0])
    assert advantages(groups)[0] == pytest.approx(expected)


def test_scores_without_weights_cannot_be_decoupled() -> None:
    made = group([1.0, 0.0], [1, 2])
    old = replace(made, scores=[replace(score, weights={}) for score in made.scores])
    with pytest.raises(ValueError, match=r"decoupled_rewards.*Sample again"):
        make_sequence_groups([old], resolve("gdpo"), MAX_TOKENS)


def test_one_reward_alone_is_compared_as_before() -> None:
    groups = [group([1.0, 0.0, 0.0], [1, 2, 3]), group([0.0, 1.0], [2, 2])]
    one, other = (
        make_sequence_groups(groups, resolve("gdpo", {"decoupled_rewards": each}), MAX_TOKENS)[0]
        for each in (True, False)
    )
    assert sum(advantages(one), []) == pytest.approx(sum(advantages(other), []))


def test_maxrl_refuses_rewards_below_0() -> None:
    row = resolve("maxrl")
    sequence_groups, _ = make_sequence_groups([group([1.0, 0.0, 0.0, 0.0], [1, 2, 3, 4])], row, MAX_TOKENS)
    assert advantages(sequence_groups) == [[3.0, -1.0, -1.0, -1.0]]
    with pytest.raises(ValueError, match="mean_normalized.*no reward may be below 0, but one is -1"):
        make_sequence_groups([group([1.0, -1.0], [1, 2])], row, MAX_TOKENS)


def test_one_sample_of_each_prompt_is_compared_with_the_step() -> None:
    """FlashREINFORCE: the baseline is the mean reward of the step, so a group of one has an advantage."""
    groups = [group([reward], [2]) for reward in (1.0, 0.0, 0.0, 0.0)]
    sequence_groups, _ = make_sequence_groups(groups, resolve("flash_reinforce"), MAX_TOKENS)
    assert advantages(sequence_groups) == [[0.75], [-0.25], [-0.25], [-0.25]]
