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
from llmquest_rl.algorithms.is_correction import CORRECTIONS
from llmquest_rl.algorithms.kl import KL_ESTIMATORS, KLEstimator, k2
from llmquest_rl.algorithms.masks import most_uncertain, on_policy_enough
from llmquest_rl.algorithms.presets import PRESETS, ROWS, Algorithm, resolve
from llmquest_rl.algorithms.ratios import LOG_LIMIT, RATIOS, sequence_mean, sequence_sum, sum_to_end
from llmquest_rl.algorithms.surrogates import Tokens
from llmquest_rl.algorithms.variant import settings_of_variants
from llmquest_rl.options import Options
from tests.algorithms.cases import bounds

CASES = settings(max_examples=200, deadline=None)
LIMITS = bounds(0.2, 0.28)

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
@given(sequence_lengths, st.integers(0, 2**31), st.floats(0, 0.9), st.floats(1.0, 5.0))
def test_corrections(lengths: list[int], seed: int, low: float, high: float) -> None:
    gaps, packed = drawn(lengths, seed, 0.7)

    def of_sequences(value: object) -> np.ndarray:
        return np.concatenate([[value(np.exp(gap))] * len(gap) for gap in gaps])  # type: ignore[operator]

    token, whole = np.exp(np.concatenate(gaps)), of_sequences(np.prod)
    geometric = of_sequences(lambda ratios: np.exp(np.log(ratios).mean()))
    inside = of_sequences(lambda ratios: ((ratios >= low) & (ratios <= high)).all())
    expected = {
        "token_truncate": np.clip(token, low, high),
        "sequence_truncate": np.clip(whole, low, high),
        "token_mask": np.where((token >= low) & (token <= high), token, 0),
        "sequence_mask": np.where((whole >= low) & (whole <= high), whole, 0),
        "geometric_mask": (geometric >= low) & (geometric <= high),
        "reject": inside,
    }
    raw = {"token_truncate": token, "sequence_truncate": whole, "token_mask": token, "sequence_mask": whole}
    assert set(expected) == set(CORRECTIONS)
    for name, values in expected.items():
        weights, cut = CORRECTIONS[name].function(packed, ids_of(lengths), low, high)
        np.testing.assert_allclose(weights, values, rtol=1e-9, err_msg=name)
        np.testing.assert_array_equal(cut, ~np.isclose(values, raw.get(name, 1.0), rtol=1e-12))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_an_engine_that_agrees_needs_no_correction(name: str) -> None:
    weights, cut = CORRECTIONS[name].function(torch.zeros(5), torch.tensor([0, 0, 1, 1, 1]), 0.5, 2.0)
    assert weights.tolist() == [1.0] * 5
    assert not cut.any()


@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (0.5, 1.0)])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_ratio_that_equals_a_bound_is_kept(name: str, low: float, high: float) -> None:
    weights, cut = CORRECTIONS[name].function(torch.zeros(3), torch.tensor([0, 0, 1]), low, high)
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
        assert correct.function(new.detach() - old, ids, 0.0, 2.0).weights.isfinite().all()
    assert float(RATIOS["token"].function(new.detach(), old, ids).max()) <= np.exp(LOG_LIMIT) * (1 + 1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve(name: str) -> None:
    algorithm = resolve(name)
    assert all(getattr(algorithm, cell) == value for cell, value in PRESETS[name].items())
    assert "arXiv" in ROWS[name].paper


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
