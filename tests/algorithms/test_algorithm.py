"""The cells of the loss, one by one: the papers' formulas in NumPy float64, their gradients, bounds and limits.

Surrogates have a file of their own.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import model_validator
from torch import Tensor

from llmquest_rl.algorithms.aggregation import AGGREGATIONS
from llmquest_rl.algorithms.algorithm import SharedSettings
from llmquest_rl.algorithms.cells import CELLS, SURROGATES
from llmquest_rl.algorithms.covariance import COVARIANCES, FIELD, with_high_covariance
from llmquest_rl.algorithms.credit import CREDITS
from llmquest_rl.algorithms.is_correction import CORRECTIONS, Gap
from llmquest_rl.algorithms.kl import KL_ESTIMATORS, KLEstimator, k2
from llmquest_rl.algorithms.masks import most_uncertain, on_policy_enough
from llmquest_rl.algorithms.presets import PRESETS, ROWS, Algorithm, resolve
from llmquest_rl.algorithms.ratios import (
    LOG_LIMIT,
    RATIOS,
    discounted_sum_to_end,
    sequence_mean,
    sequence_sum,
    sum_to_end,
)
from llmquest_rl.algorithms.surrogates import Tokens
from llmquest_rl.algorithms.variant import settings_of_variants
from llmquest_rl.batch import SequenceGroup
from llmquest_rl.options import Options
from tests.algorithms.cases import bounds

CASES = settings(max_examples=200, deadline=None)
LIMITS = bounds(0.2, 0.28, divergence_limit=0.1)

log_probs = st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), min_size=1, max_size=20)
sequence_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def ids_of(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def drawn(lengths: list[int], seed: int, scale: float = 1.0) -> tuple[list[np.ndarray], Tensor]:
    """Random values of each sequence, and packed."""
    draw = np.random.default_rng(seed)
    parts = [draw.normal(0, scale, n) for n in lengths]
    return parts, tensor(np.concatenate(parts))


@CASES
@given(sequence_lengths, st.integers(0, 2**31))
def test_sums_over_sequences(lengths: list[int], seed: int) -> None:
    parts, packed = drawn(lengths, seed)
    ids = ids_of(lengths)
    np.testing.assert_allclose(sequence_sum(packed, ids), np.concatenate([[p.sum()] * len(p) for p in parts]))
    np.testing.assert_allclose(sequence_mean(packed, ids), np.concatenate([[p.mean()] * len(p) for p in parts]))
    to_end = np.concatenate([[p[t:].sum() for t in range(len(p))] for p in parts])
    np.testing.assert_allclose(sum_to_end(packed, ids), to_end, atol=1e-12)


@CASES
@given(sequence_lengths, st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.98, 1.0]))
def test_discounted_sums(lengths: list[int], seed: int, discount: float) -> None:
    parts, packed = drawn(lengths, seed)
    expected = [sum(discount**k * x for k, x in enumerate(part[t:])) for part in parts for t in range(len(part))]
    np.testing.assert_allclose(discounted_sum_to_end(packed, ids_of(lengths), discount), expected, atol=1e-12)


def test_sums_of_long_sequences_keep_small_terms_in_float32() -> None:
    values = torch.full((40_000,), 1e-3)
    values[:20_000] = 100.0
    ids = torch.arange(2).repeat_interleave(20_000)
    last = sum_to_end(values, ids)[[-1, -10, -100]]
    torch.testing.assert_close(last, torch.tensor([1e-3, 1e-2, 1e-1]), rtol=1e-2, atol=0.0)


@CASES
@given(sequence_lengths, st.integers(0, 2**31))
def test_ratios(lengths: list[int], seed: int) -> None:
    """PPO's, GSPO's equation 7 and 14, and the plain product."""
    (new, packed_new), (old, packed_old) = drawn(lengths, seed), drawn(lengths, seed + 1)
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    expected = {
        "token": np.concatenate([np.exp(gap) for gap in gaps]),
        "sequence": np.concatenate([[np.prod(np.exp(gap)) ** (1 / len(gap))] * len(gap) for gap in gaps]),
        "sequence_token": np.concatenate([[np.prod(np.exp(gap)) ** (1 / len(gap))] * len(gap) for gap in gaps]),
        "sequence_product": np.concatenate([[np.prod(np.exp(gap))] * len(gap) for gap in gaps]),
    }
    assert set(expected) == set(RATIOS)
    for name, values in expected.items():
        np.testing.assert_allclose(RATIOS[name].function(packed_new, packed_old, ids_of(lengths)), values, rtol=1e-9)


@CASES
@given(sequence_lengths, st.integers(0, 2**31))
def test_gradients_of_sequence_ratios(lengths: list[int], seed: int) -> None:
    """d s_i / d log pi_t is s_i / |o_i| for every token of the sequence; for GSPO-token it is s_i for its own alone."""
    _, old = drawn(lengths, seed)
    _, new = drawn(lengths, seed + 1)
    ids = ids_of(lengths)
    _, upstream = drawn(lengths, seed + 2)
    grads = {}
    for name in ("sequence", "sequence_token"):
        leaf = new.clone().requires_grad_()
        (RATIOS[name].function(leaf, old, ids) * upstream).sum().backward()
        grads[name] = leaf.grad
    ratio = RATIOS["sequence"].function(new, old, ids)
    torch.testing.assert_close(grads["sequence"], ratio * sequence_mean(upstream, ids))
    torch.testing.assert_close(grads["sequence_token"], ratio * upstream)


@CASES
@given(log_probs)
def test_kl_estimators(pairs: list[tuple[float, float]]) -> None:
    new, reference = np.asarray(pairs).T
    r = np.exp(reference) / np.exp(new)
    expected = {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": r - 1 - np.log(r), "abs": abs(np.log(r))}
    assert set(expected) == set(KL_ESTIMATORS)
    for name, values in expected.items():
        ours = KL_ESTIMATORS[name].function(tensor(new), tensor(reference))
        np.testing.assert_allclose(ours, values, rtol=1e-9, atol=1e-12)
        assert name == "k1" or bool((ours >= 0).all())


def two_distributions() -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(0)
    logits, reference = (tensor(generator.normal(size=7)) for _ in range(2))
    return logits, reference.log_softmax(-1)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_kl_estimators_are_unbiased(name: str) -> None:
    logits, reference = two_distributions()
    logprobs = logits.log_softmax(-1)
    value = (logprobs.exp() * KL_ESTIMATORS[name].function(logprobs, reference)).sum()
    torch.testing.assert_close(value, (logprobs.exp() * (logprobs - reference)).sum())


HAVE_THE_GRADIENT = {("loss", "k2"), ("weighted", "k1"), ("weighted", "k3"), ("reward", "k1")}


@pytest.mark.parametrize("where", ["loss", "weighted", "reward"])
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_which_estimators_have_the_gradient_of_the_kl(name: str, where: str) -> None:
    """The expected gradient over all tokens against the KL's own; weighted: the claim of DeepSeek-V3.2, equation 7."""
    logits, reference = two_distributions()
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    (logprobs.exp() * (logprobs - reference)).sum().backward()
    assert leaf.grad is not None
    expected, leaf.grad = leaf.grad, None
    logprobs = leaf.log_softmax(-1)
    kl = KL_ESTIMATORS[name].function(logprobs, reference)
    terms = {"loss": kl, "weighted": (logprobs - logprobs.detach()).exp() * kl, "reward": kl.detach() * logprobs}
    (logprobs.detach().exp() * terms[where]).sum().backward()
    assert torch.allclose(leaf.grad, expected, rtol=1e-9, atol=1e-12) == ((where, name) in HAVE_THE_GRADIENT)


@CASES
@given(sequence_lengths, st.integers(0, 2**31), st.floats(0, 0.9), st.floats(1.0, 5.0), st.sampled_from([0.01, 0.1]))
def test_corrections(lengths: list[int], seed: int, low: float, high: float, limit: float) -> None:
    gaps, packed = drawn(lengths, seed, 0.7)

    def of_sequences(value: object) -> np.ndarray:
        return np.concatenate([[value(np.exp(gap))] * len(gap) for gap in gaps])  # type: ignore[operator]

    token, whole = np.exp(np.concatenate(gaps)), of_sequences(np.prod)
    geometric = of_sequences(lambda ratios: np.exp(np.log(ratios).mean()))
    inside = of_sequences(lambda ratios: ((ratios >= low) & (ratios <= high)).all())
    p = np.random.default_rng(seed).uniform(0.01, 0.99, len(token)) / (1 + token)  # of the engine
    q = p * token  # of the old policy, below 1 as well
    gap = Gap(tensor(np.log(q)), tensor(np.log(p)), ids_of(lengths))

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b)))

    def mean(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[part.mean()] * len(part) for part in np.split(values, np.cumsum(lengths)[:-1])])

    expected = {
        "token_truncate": np.clip(token, low, high),
        "sequence_truncate": np.clip(whole, low, high),
        "token_mask": np.where((token >= low) & (token <= high), token, 0),
        "sequence_mask": np.where((whole >= low) & (whole <= high), whole, 0),
        "geometric_mask": (geometric >= low) & (geometric <= high),
        "reject": inside,
        "token_binary_kl": np.where(np.maximum(kl(p, q), kl(q, p)) <= limit, token, 0),
        "token_binary_tv": np.where(abs(p - q) <= limit, token, 0),
        "sequence_binary_kl": np.where(mean(kl(p, q)) <= limit, token, 0),
        "sequence_binary_tv": np.where(mean(abs(p - q)) <= limit, token, 0),
    }
    raw = {"token_truncate": token, "sequence_truncate": whole, "token_mask": token, "sequence_mask": whole}
    raw |= {name: token for name in expected if "binary" in name}
    assert set(expected) == set(CORRECTIONS)
    for name, values in expected.items():
        correct = CORRECTIONS[name].configured(bounds(divergence_limit=limit))
        weights, cut = correct(gap, low, high)
        np.testing.assert_allclose(weights, values, rtol=1e-9, err_msg=name)
        np.testing.assert_array_equal(cut, ~np.isclose(values, raw.get(name, 1.0), rtol=1e-12))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_an_engine_that_agrees_needs_no_correction(name: str) -> None:
    gap = Gap(-torch.ones(5), -torch.ones(5), torch.tensor([0, 0, 1, 1, 1]))
    weights, cut = CORRECTIONS[name].configured(Algorithm())(gap, 0.5, 2.0)
    assert weights.tolist() == [1.0] * 5
    assert not cut.any()


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.5, 1.0)])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_ratio_that_equals_a_bound_is_kept(name: str, low: float, high: float) -> None:
    gap = Gap(-torch.ones(3), -torch.ones(3), torch.tensor([0, 0, 1]))
    weights, cut = CORRECTIONS[name].configured(bounds(divergence_limit=0.0))(gap, low, high)
    assert weights.tolist() == [1.0] * 3 and not cut.any()


def test_a_sequence_as_far_off_policy_as_allowed_is_kept() -> None:
    new, rollout, advantages = torch.tensor([-1.0]), torch.tensor([-0.5]), torch.tensor([-1.0])
    assert on_policy_enough(new, rollout, advantages, torch.tensor([0]), 0.5).tolist() == [True]
    assert on_policy_enough(new, rollout, advantages, torch.tensor([0]), 0.25).tolist() == [False]


def test_a_share_that_is_a_whole_number_of_tokens_is_not_rounded_up() -> None:
    """0.07 x 100 is above 7 in binary."""
    assert int(most_uncertain(tensor(range(100)), ids_of([100]), 0.07).sum()) == 7


@CASES
@given(sequence_lengths, st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_off_policy_sequences(lengths: list[int], seed: int, delta: float) -> None:
    """DeepSeek-V3.2, equation 9."""
    (new, packed_new), (rollout, packed_rollout) = drawn(lengths, seed), drawn(lengths, seed + 1)
    (advantages, packed_advantages) = drawn(lengths, seed + 2)
    expected = [
        not (a < 0 and np.mean(r - n) > delta)
        for n, r, values in zip(new, rollout, advantages, strict=True)
        for a in values
    ]
    kept = on_policy_enough(packed_new, packed_rollout, packed_advantages, ids_of(lengths), delta)
    assert kept.tolist() == expected


@CASES
@given(st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.0]), min_size=1, max_size=9), min_size=1, max_size=5))
def test_most_uncertain_tokens(entropies: list[list[float]]) -> None:
    """Entropies may be equal, and the result must not depend on the other sequences of the batch."""
    for share in (0.01, 0.2, 0.5, 1.0):
        together = most_uncertain(tensor(sum(entropies, [])), ids_of([len(part) for part in entropies]), share)
        expected: list[bool] = []
        for part in entropies:
            count = max(1, int(np.ceil(round(share * len(part), 6))))
            chosen = sorted(range(len(part)), key=lambda t: (-part[t], t))[:count]  # noqa: B023
            expected += [t in chosen for t in range(len(part))]
        assert together.tolist() == expected


@CASES
@given(st.lists(st.lists(st.integers(0, 50), max_size=4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_aggregations(lengths: list[list[int]], seed: int) -> None:
    """Empty sequences, empty groups and empty updates included."""
    draw = np.random.default_rng(seed)
    losses = [[draw.normal(size=n) for n in group] for group in lengths]
    filled = [loss for group in losses for loss in group if len(loss)]
    groups = [np.concatenate(group) for group in losses if sum(map(len, group))]
    nothing = {name: 0.0 for name in AGGREGATIONS}
    expected = nothing if not filled else {
        "sequence_mean": np.mean([loss.mean() for loss in filled]),
        "sequence_sum": np.mean([loss.sum() for loss in filled]),
        "token_mean": np.concatenate(filled).mean(),
        "prompt_mean": np.mean([group.mean() for group in groups]),
        "max_tokens_mean": sum(loss.sum() for loss in filled) / (len(filled) * 50),
    }  # fmt: skip
    assert set(expected) == set(AGGREGATIONS)
    for name, value in expected.items():
        weights = AGGREGATIONS[name].function(lengths, 50)
        pairs = (
            (w, loss) for row, part in zip(weights, losses, strict=True) for w, loss in zip(row, part, strict=True)
        )
        np.testing.assert_allclose(sum(w * loss.sum() for w, loss in pairs), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [-80.0, 80.0, -1e4, 1e4])
def test_ratios_beyond_all_bounds_stay_finite(gap: float) -> None:
    """e^80 and more, in float32: values and gradients, of every cell that has an exponential."""
    old, ids = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0, 0, 1])
    new = (old + gap).requires_grad_()
    for ratio in RATIOS.values():
        for surrogate in SURROGATES.values():
            for advantages in (torch.ones(3), -torch.ones(3), torch.zeros(3)):
                for limits in (LIMITS, bounds(1.0, 1e9), bounds(0.2, 0.2, 3.0)):
                    tokens = Tokens(ratio.function(new, old, ids), new, old, advantages, ids)
                    loss = surrogate.configured(limits)(tokens).sum()
                    (gradient,) = torch.autograd.grad(loss, new, allow_unused=True)
                    assert loss.isfinite()
                    assert gradient.isfinite().all()
    for estimator in KL_ESTIMATORS.values():
        value = (RATIOS["token"].function(new, old, ids) * estimator.function(new, old)).sum()
        assert value.isfinite()
        assert torch.autograd.grad(value, new)[0].isfinite().all()
    for correct in CORRECTIONS.values():
        assert correct.configured(LIMITS)(Gap(new.detach(), old, ids), 0.0, 2.0).weights.isfinite().all()
    assert float(RATIOS["token"].function(new.detach(), old, ids).max()) <= np.exp(LOG_LIMIT) * (1 + 1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve(name: str) -> None:
    algorithm = resolve(name)
    assert all(getattr(algorithm, cell) == value for cell, value in PRESETS[name].items())
    assert any(place in ROWS[name].paper for place in ("arXiv", "github.com", "notion.site"))


def test_every_row_has_a_paper_and_is_a_row_of_its_own() -> None:
    assert all(row.paper for row in ROWS.values())
    assert len({resolve(name).model_dump_json() for name in PRESETS}) == len(PRESETS)


def test_grpo_is_the_papers_row() -> None:
    expected = Algorithm(
        advantage="group_mean_std", aggregation="sequence_mean", kl="k3", beta=0.04, clip_low=0.2, clip_high=0.2
    )
    assert resolve("grpo") == expected


def test_cells_are_overridable() -> None:
    assert resolve("grpo", {"beta": 0.0, "clip_high": 0.28}).clip_high == 0.28


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("grpoo", {}, "did you mean grpo"),
        ("grpo", {"bta": 0.1}, "bta"),
        ("grpo", {"kl": "k4"}, "k1, k2, k3"),
        ("grpo", {"beta": -1}, "beta"),
        ("grpo", {"tis_cap": 0}, "tis_cap"),
        ("grpo", {"tis_floor": 2.0}, "tis_floor is 2, but must be below"),
        ("grpo", {"dual_clip": 1.1}, "dual_clip is 1.1, but must be above"),
        ("grpo", {"positive_weight": 0, "negative_weight": 0}, "nothing is left to learn from"),
        ("grpo", {"top_entropy_fraction": 0}, "top_entropy_fraction"),
        ("gspo", {"ratio": "seqence"}, "sequence, sequence_token"),
        ("gspo", {"covariance": "clip"}, "covariance: clip.*would keep a gradient"),
        ("gmpo", {"covariance": "clip"}, "covariance: clip.*would keep a gradient"),
        ("clip_cov", {"cov_low": 5.0}, "cov_low is 5, but must be below cov_high"),
        ("kl_cov", {"cov_fraction": 0.0}, "cov_fraction"),
        ("fipo", {"future_low": 1.2}, "future_low is 1.2, but must be below future_high"),
        ("fipo", {"future_half_life": 0.0}, "future_half_life"),
        ("kpop", {"divergence_limit": 0.0}, "divergence_limit"),
        ("drpo", {"shift_limit": 0.0}, "shift_limit"),
        ("maxrl", {"length_penalty": "soft_overlong"}, "length_penalty: none"),
        ("gdpo", {"phantom_reward": 1.0}, "decoupled_rewards.*no phantom_reward"),
        ("gdpo", {"advantage": "reward"}, "decoupled_rewards.*group_mean_std"),
        ("ppo", {"normalization": "batch_mean"}, "computed in the learner.*whiten or none"),
        ("ppo", {"advantage_limit": 3.0}, "computed in the learner.*no advantage_limit"),
        ("ppo", {"positive_weight": 0.5}, "computed in the learner"),
    ],
)
def test_mistakes_are_named(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(name, overrides)


class _TakesBeta(Options):
    beta: float = 1.0


class _TakesTau(Options):
    tau_positive: float = 1.0


class _Checks(Options):
    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "_Checks":
        return self


@pytest.mark.parametrize(
    ("settings", "name"), [(_TakesBeta, "beta"), (_TakesTau, "tau_positive"), (_Checks, "_bounds_are_in_order")]
)
def test_two_settings_of_one_name_are_an_error(
    settings: type[Options], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one name is declared twice, one would hide the other: a shared setting, another variant's, a validator."""
    assert settings_of_variants(CELLS, SharedSettings)
    monkeypatch.setitem(CELLS, "kl", {**KL_ESTIMATORS, "new": KLEstimator(k2, settings)})
    with pytest.raises(TypeError, match=f"both declare '{name}'"):
        settings_of_variants(CELLS, SharedSettings)


def of_update(logprobs: list[list[float]], advantages: list[list[float]]) -> list[SequenceGroup]:
    """A group of one completion for each list."""
    return [
        SequenceGroup([0], [list(range(len(row)))], {"rollout_logprobs": [row], "advantages": [values]})
        for row, values in zip(logprobs, advantages, strict=True)
    ]


def chosen_of(groups: list[SequenceGroup], variant: str, **settings: float) -> list[bool]:
    """The tokens that a covariance restrains, in order."""
    marked = with_high_covariance(groups, variant, Algorithm(covariance=variant, **settings))
    assert [group.completions for group in marked] == [group.completions for group in groups]
    return [value == 1.0 for group in marked for row in group.token_fields[FIELD] for value in row]


@CASES
@given(sequence_lengths, st.integers(0, 2**31), st.sampled_from([1e-4, 0.2, 0.5, 1.0]))
def test_covariances_choose_the_papers_tokens(lengths: list[int], seed: int, fraction: float) -> None:
    """KL-Cov: the largest; Clip-Cov: as many, at random, of those within its band. arXiv 2505.22617, section 4."""
    (logprobs, flat), (advantages, flat_advantages) = drawn(lengths, seed), drawn(lengths, seed + 1)
    groups = of_update([part.tolist() for part in logprobs], [part.tolist() for part in advantages])
    logprob, advantage = flat.numpy(), flat_advantages.numpy()
    covariances = (logprob - logprob.mean()) * (advantage - advantage.mean())
    count = max(1, int(fraction * len(covariances)))
    largest = set(np.argsort(-covariances)[:count]) & set(np.flatnonzero(covariances > 0))
    assert set(np.flatnonzero(chosen_of(groups, "kl", cov_fraction=fraction))) == largest
    band = set(np.flatnonzero((covariances > 0.1) & (covariances < 1.0)))
    settings = {"cov_fraction": fraction, "cov_low": 0.1, "cov_high": 1.0}
    clipped = set(np.flatnonzero(chosen_of(groups, "clip", **settings)))
    assert clipped <= band and len(clipped) == min(count, len(band))
    assert clipped == set(np.flatnonzero(chosen_of(groups, "clip", **settings))), "a resumed run makes the same choice"
    assert not any(chosen_of(groups, "none"))


def test_another_batch_is_another_choice_of_clip_cov() -> None:
    """Of 100 tokens in the band ten are chosen; they are not the same ten in each of two updates."""
    choices = []
    for shift in (0, 1):
        tokens = [n + shift for n in range(200)]
        signs = [[1.0] * 100 + [-1.0] * 100]
        fields = {"rollout_logprobs": [[-1.0] * 100 + [-3.0] * 100], "advantages": signs}
        choices.append(chosen_of([SequenceGroup([0], [tokens], fields)], "clip", cov_fraction=0.05, cov_low=0.5))
    assert [sum(choice) for choice in choices] == [10, 10]
    assert choices[0] != choices[1]


def test_equal_advantages_restrain_no_token() -> None:
    groups = of_update([[-1.0, -2.0], [-3.0]], [[0.5, 0.5], [0.5]])
    assert not any(chosen_of(groups, "kl", cov_fraction=1.0)) and not any(chosen_of(groups, "clip", cov_low=0.0))


@pytest.mark.parametrize("variant", COVARIANCES)
def test_an_update_without_groups_has_no_choice(variant: str) -> None:
    assert with_high_covariance([], variant, Algorithm(covariance=variant)) == []


def test_credit_by_hand() -> None:
    """FIPO with a half-life of one token: what follows counts half, a quarter, ... Ratios above 4 count nothing."""
    numbers = {"future_half_life": 1.0, "future_low": 0.5, "future_high": 2.0, "future_max_ratio": 4.0}
    limits = Algorithm(credit="future_kl", **numbers)
    log_ratio = tensor(np.log([1.1, 1.2, 5.0, 0.9, 3.0, 0.1]))
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    last = [np.log(0.9), np.log(0.1)]
    third = 0 + last[0] / 2
    second = np.log(1.2) + third / 2
    expected = np.exp([np.log(1.1) + second / 2, second, third, last[0], np.log(3.0) + last[1] / 2, last[1]])
    credit = CREDITS["future_kl"].configured(limits)
    np.testing.assert_allclose(credit(tensor([1.0] * 6), log_ratio, ids), np.clip(expected, 0.5, 2.0))
    assert CREDITS["uniform"].function(tensor([1.0] * 6), log_ratio, ids).tolist() == [1.0] * 6


def test_a_mistake_that_became_much_likelier_is_not_weighted_up() -> None:
    """The first token has a ratio of 9 and a likely future: its factor is 1.2, or 1 if its advantage is negative."""
    log_ratio, ids = tensor(np.log([9.0, 3.0])), torch.tensor([0, 0])
    credit = CREDITS["future_kl"].configured(Algorithm(credit="future_kl", future_max_ratio=4.0))
    for advantage, factors in ((1.0, [1.2, 1.2]), (-1.0, [1.0, 1.2])):
        assert credit(tensor([advantage] * 2), log_ratio, ids).tolist() == factors
