"""Properties of every row, and of rows compared with each other."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.presets import Algorithm, resolve
from llmquest_rl.batch import SequenceGroup
from tests.algorithms.cases import Case, all_rows, batch_of, policy, random_case, rows, total

CASES = settings(max_examples=25, deadline=None)
PLAIN = {"tis_cap": None, "beta": 0.0, "old_policy": "learner", "covariance": "none"}
every_row = pytest.mark.parametrize("name", all_rows())
seeds = st.integers(0, 2**31)


def with_advantages(case: Case, advantages: list[float]) -> Case:
    """Sequences of the case in turn get these advantages, the same for all their tokens."""
    values = itertools.cycle(advantages)
    sequence_groups = []
    for sequence_group in case.sequence_groups:
        rows = [
            [value] * len(completion) for completion, value in zip(sequence_group.completions, values, strict=False)
        ]
        sequence_groups.append(sequence_group.with_token_field("advantages", rows))
    return case._replace(sequence_groups=sequence_groups)


def value_and_gradient(algorithm: Algorithm, case: Case, old: bool = True) -> tuple[Tensor, Tensor]:
    row = policy(algorithm)
    value, gradient, _, _ = total(row, batch_of(row, case, old), case.new, case.entropies)
    return value, gradient


@CASES
@every_row
@given(seeds)
def test_on_policy_the_gradient_is_the_policy_gradient(name: str, seed: int) -> None:
    """The ratio is 1, for every surrogate. A ratio of sequences spreads a sequence's advantage evenly."""
    algorithm = resolve(name, PLAIN)
    case = with_advantages(random_case(seed), [1.0, -0.5, 2.0])
    row = policy(algorithm)
    batch = batch_of(row, case, old=False)
    _, gradient, _, metrics = total(row, batch, case.new, case.entropies)
    torch.testing.assert_close(gradient, -batch.token_fields["weights"] * batch.token_fields["advantages"])
    floats = metrics.to_floats()
    assert floats["policy/ratio"] == pytest.approx(1.0)
    assert floats["policy/approx_kl"] == pytest.approx(0.0)
    assert floats.get("policy/clip_frac", 0.0) == 0.0


@CASES
@every_row
@given(seeds, st.booleans())
def test_zero_advantages_have_no_gradient(name: str, seed: int, old: bool) -> None:
    case = with_advantages(random_case(seed), [0.0])
    assert not value_and_gradient(resolve(name, {"beta": 0.0}), case, old)[1].any()


@CASES
@pytest.mark.parametrize("name", [name for name in all_rows() if SURROGATES[resolve(name).surrogate].cuts])
@given(seeds)
def test_the_clip_fraction_is_the_share_of_tokens_without_a_gradient(name: str, seed: int) -> None:
    """CISPO is the exception: a cut weight leaves a gradient. The fraction is the sum of both bounds."""
    algorithm = resolve(name, PLAIN)
    row, case = policy(algorithm), with_advantages(random_case(seed), [1.0, -0.5, 2.0])
    _, gradient, _, metrics = total(row, batch_of(row, case), case.new, case.entropies)
    floats = metrics.to_floats()
    assert 0 <= floats["policy/clip_frac"] <= 1
    assert floats["policy/clip_frac"] == pytest.approx(floats["policy/clip_low_frac"] + floats["policy/clip_high_frac"])
    without = 0.0 if algorithm.surrogate == "clipped_weight" else floats["policy/clip_frac"]
    assert float((gradient == 0).double().mean()) == pytest.approx(without)


def parts_of(case: Case, parts: list[list[int]]) -> list[Case]:
    """The case as several, each with some of its sequence groups."""
    sizes = [sum(map(len, sequence_group.completions)) for sequence_group in case.sequence_groups]
    pieces = [tensor.split(sizes) for tensor in case[1:]]
    return [
        Case([case.sequence_groups[i] for i in part], *(torch.cat([piece[i] for i in part]) for piece in pieces))
        for part in parts
    ]


def over_parts(
    algorithm: Algorithm, case: Case, parts: list[list[int]]
) -> tuple[float, list[Tensor], dict[str, float]]:
    """Loss, gradients of each group in its order, and metrics, when microbatches hold `parts` of one update."""
    row = policy(algorithm)
    weighted = case._replace(sequence_groups=row.assign_token_weights(case.sequence_groups))
    sizes = [sum(map(len, sequence_group.completions)) for sequence_group in case.sequence_groups]
    grads: dict[int, Tensor] = {}
    value, merged = 0.0, None
    for part, piece in zip(parts, parts_of(weighted, parts), strict=True):
        batch = batch_of(row, piece)
        loss, gradient, _, metrics = total(row, batch, piece.new, piece.entropies)
        value += float(loss)
        grads |= dict(zip(part, gradient.split([sizes[i] for i in part]), strict=True))
        merged = metrics if merged is None else merged.merge([metrics])
    assert merged is not None
    return value, [grads[i] for i in range(len(sizes))], merged.to_floats()


@settings(max_examples=100, deadline=None)
@given(rows, seeds, st.lists(st.integers(0, 3), min_size=5, max_size=5), st.permutations(range(5)))
def test_microbatches_packing_and_order_change_nothing(
    cells: dict[str, Any], seed: int, places: list[int], order: list[int]
) -> None:
    """This holds for any cells, also for those that compare the tokens of a sequence with each other."""
    case, algorithm = random_case(seed, groups=5), Algorithm(**cells)
    parts = [[i for i in order if places[i] == place] for place in range(4)]
    together = over_parts(algorithm, case, [list(range(5))])
    apart = over_parts(algorithm, case, [part for part in parts if part])
    assert together[0] == pytest.approx(apart[0], rel=1e-9, abs=1e-12)
    torch.testing.assert_close(together[1], apart[1], rtol=1e-9, atol=1e-12)
    assert together[2] == pytest.approx(apart[2], rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows, seeds)
def test_a_prompt_of_its_own_for_each_completion_changes_nothing(cells: dict[str, Any], seed: int) -> None:
    """Models that cannot share prompts get one sequence group for each completion, weighted before."""
    case, algorithm = random_case(seed), Algorithm(**cells)
    row = policy(algorithm)
    weighted = case._replace(sequence_groups=row.assign_token_weights(case.sequence_groups))
    batch = batch_of(row, weighted)
    alone = case._replace(
        sequence_groups=[part for sequence_group in weighted.sequence_groups for part in sequence_group.expanded()]
    )
    expanded = batch_of(row, alone)
    shared, separate = (total(row, b, case.new, case.entropies) for b in (batch, expanded))
    torch.testing.assert_close(shared[:3], separate[:3], rtol=1e-12, atol=1e-14)


def equal_lengths(seed: int, length: int) -> Case:
    return random_case(seed, lengths=(length, length))


@CASES
@given(seeds, st.integers(1, 9))
def test_dapo_is_grpo_when_lengths_and_bounds_are_equal(seed: int, length: int) -> None:
    case = equal_lengths(seed, length)
    grpo, dapo = resolve("grpo", {"beta": 0.0, "clip_high": 0.28}), resolve("dapo")
    torch.testing.assert_close(value_and_gradient(grpo, case), value_and_gradient(dapo, case))


@CASES
@given(seeds)
def test_gspo_is_grpo_for_completions_of_one_token(seed: int) -> None:
    case = equal_lengths(seed, 1)
    bounds = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2}
    grpo = value_and_gradient(resolve("grpo", bounds), case)
    for name in ("gspo", "gspo_token", "luspo"):
        torch.testing.assert_close(grpo, value_and_gradient(resolve(name, bounds), case))


@CASES
@given(seeds)
def test_gspo_token_is_gspo_when_advantages_are_those_of_sequences(seed: int) -> None:
    """arXiv 2507.18071, section 4.3: same value, same gradient. A correction that differs by token would part them."""
    case = with_advantages(random_case(seed), [1.0, -0.7, 0.3])
    cells = {"tis_cap": None, "clip_low": 0.1, "clip_high": 0.1}
    torch.testing.assert_close(
        value_and_gradient(resolve("gspo", cells), case), value_and_gradient(resolve("gspo_token", cells), case)
    )


@CASES
@given(seeds, st.integers(1, 9))
def test_luspo_is_gspo_times_the_length(seed: int, length: int) -> None:
    case = equal_lengths(seed, length)
    gspo, luspo = (value_and_gradient(resolve(name), case) for name in ("gspo", "luspo"))
    torch.testing.assert_close(tuple(length * x for x in gspo), luspo)


@CASES
@given(seeds, st.integers(1, 9))
def test_dr_grpo_is_grpo_at_the_longest_length(seed: int, length: int) -> None:
    """Up to the constant |o| / L_max when all lengths are equal: the rows differ in the weight of lengths."""
    case = equal_lengths(seed, length)
    grpo, dr_grpo = (value_and_gradient(resolve(name, {"beta": 0.0}), case) for name in ("grpo", "dr_grpo"))
    torch.testing.assert_close(tuple(length / 9 * x for x in grpo), dr_grpo)


@CASES
@given(seeds)
def test_cispo_without_bounds_is_the_importance_weighted_policy_gradient(seed: int) -> None:
    case = random_case(seed)
    loose = {"clip_low": 1.0, "clip_high": 1e6, "tis_cap": None, "aggregation": "sequence_mean", "beta": 0.0}
    cispo = value_and_gradient(resolve("cispo", loose), case)[1]
    plain = value_and_gradient(resolve("grpo", loose), case)[1]
    torch.testing.assert_close(cispo, plain)


@CASES
@given(seeds)
def test_sapo_is_grpo_to_first_order(seed: int) -> None:
    """Near ratio 1 the gate's weight is 1 - O((r - 1)^2), while GRPO's is 1."""
    case = random_case(seed, spread=1e-4)
    sapo, grpo = (value_and_gradient(resolve(name, PLAIN), case)[1] for name in ("sapo", "grpo"))
    torch.testing.assert_close(sapo, grpo, rtol=1e-6, atol=1e-9)


@CASES
@given(seeds)
def test_gmpo_is_gspo_when_nothing_is_clipped(seed: int) -> None:
    """The two differ in the place of the clip: tokens before the mean, or the mean."""
    case = with_advantages(random_case(seed, spread=0.02), [1.0, -0.7, 0.3])
    loose = {"clip_low": 1.0, "clip_high": 9.0}
    gmpo, gspo = (value_and_gradient(resolve(name, loose), case) for name in ("gmpo", "gspo"))
    torch.testing.assert_close(gmpo, gspo)


@CASES
@given(seeds)
def test_gmpo_is_grpo_for_completions_of_one_token(seed: int) -> None:
    """GRPO has bounds at e^-0.4 and e^0.4 here."""
    case = equal_lengths(seed, 1)
    bounds = {"clip_low": 1 - np.exp(-0.4), "clip_high": np.exp(0.4) - 1, "beta": 0.0}
    gmpo, grpo = value_and_gradient(resolve("gmpo"), case), value_and_gradient(resolve("grpo", bounds), case)
    torch.testing.assert_close(gmpo, grpo)


@CASES
@given(seeds)
def test_vespo_without_decay_is_the_importance_weighted_policy_gradient(seed: int) -> None:
    """The weight of a whole completion is r^1 exp(0)."""
    case = random_case(seed)
    cells = {"power_positive": 1.0, "power_negative": 1.0, "decay_positive": 1e-12, "decay_negative": 1e-12}
    loose = {"ratio": "sequence_product", "clip_low": 1.0, "clip_high": 1e9}
    torch.testing.assert_close(
        value_and_gradient(resolve("vespo", cells), case)[1], value_and_gradient(resolve("cispo", loose), case)[1]
    )


@CASES
@given(seeds)
def test_dppo_without_bounds_is_the_importance_weighted_policy_gradient(seed: int) -> None:
    """No probability changes by more than 1."""
    case = random_case(seed)
    dppo = resolve("dppo", {**PLAIN, "clip_low": 1.0, "clip_high": 1.0})
    plain = resolve("dr_grpo", {**PLAIN, "clip_low": 1.0, "clip_high": 1e6})
    torch.testing.assert_close(value_and_gradient(dppo, case), value_and_gradient(plain, case))


@CASES
@given(seeds)
def test_the_trust_region_of_dppo_is_around_the_engine(seed: int) -> None:
    """The learner's old log-probs do not matter: the engine's log-probs in their place give the same."""
    case, row = random_case(seed), policy(resolve("dppo"))
    rollout = [
        x
        for sequence_group in case.sequence_groups
        for line in sequence_group.token_fields["rollout_logprobs"]
        for x in line
    ]
    engine = case._replace(old=torch.tensor(rollout, dtype=torch.float64))
    own = resolve("dppo", {"old_policy": "learner", "tis_cap": None})
    expected = value_and_gradient(own, engine)
    torch.testing.assert_close(value_and_gradient(row.algorithm, case), expected)
    torch.testing.assert_close(value_and_gradient(row.algorithm, case, old=False), expected)


@every_row
def test_completions_without_tokens_are_nowhere(name: str) -> None:
    case = random_case(7)
    sequence_groups = []
    for sequence_group in case.sequence_groups:
        token_fields = {key: [rows[0], [], *rows[1:]] for key, rows in sequence_group.token_fields.items()}
        sequence_groups.append(
            SequenceGroup(
                sequence_group.prompt,
                [sequence_group.completions[0], [], *sequence_group.completions[1:]],
                token_fields,
            )
        )
    algorithm = resolve(name, {"beta": 0.1, "off_policy_delta": 0.1, "top_entropy_fraction": 0.5})
    torch.testing.assert_close(
        value_and_gradient(algorithm, case._replace(sequence_groups=sequence_groups)),
        value_and_gradient(algorithm, case),
    )


@CASES
@pytest.mark.parametrize("name", ["grpo", "gmpo", "dppo"])
@given(seeds)
def test_tighter_bounds_cut_more(name: str, seed: int) -> None:
    case = random_case(seed)
    shares = []
    for bound in (0.0, 0.1, 0.3, 0.9):
        row = policy(resolve(name, {"clip_low": bound, "clip_high": bound, "beta": 0.0}))
        shares.append(total(row, batch_of(row, case), case.new, case.entropies)[3].to_floats()["policy/clip_frac"])
    assert shares == sorted(shares, reverse=True)
    assert 0.0 <= shares[-1] <= shares[0] <= 1.0


@CASES
@given(seeds)
def test_the_kl_in_the_reward_pushes_as_the_kl_does(seed: int) -> None:
    """k1 in the reward has, on-policy, the gradient of k2 in the loss for the token itself: (log pi / pi_ref)."""
    case = with_advantages(random_case(seed, lengths=(1, 1)), [0.0])
    reward = value_and_gradient(resolve("reinforce", {"beta": 0.5, "tis_cap": None}), case, old=False)[1]
    cells = {"beta": 0.5, "tis_cap": None, "kl_in": "loss", "kl": "k2"}
    loss = value_and_gradient(resolve("reinforce", cells), case, old=False)[1]
    torch.testing.assert_close(reward, loss)


@every_row
@pytest.mark.parametrize("gap", [80.0, -80.0, 1e3, -1e3])
def test_no_ratio_makes_a_row_nan(name: str, gap: float) -> None:
    """The case is float32, with every option that has an exponential."""
    on = {"beta": 0.1, "kl_unbiased": True, "entropy_bonus": 0.1, "top_entropy_fraction": 0.5, "off_policy_delta": 0.1}
    for cap, correction in itertools.product((None, 2.0), ("token_truncate", "sequence_mask", "geometric_mask")):
        row = policy(resolve(name, {**on, "tis_cap": cap, "is_correction": correction}))
        case = random_case(5)
        batch = batch_of(row, case)
        batch = replace(batch, token_fields={key: values.float() for key, values in batch.token_fields.items()})
        value, gradient, _, metrics = total(row, batch, case.old.float() + gap, case.entropies.float())
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert all(np.isfinite(x) for x in metrics.to_floats().values())
