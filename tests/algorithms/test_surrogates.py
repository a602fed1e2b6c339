"""Surrogates against the papers' formulas in NumPy float64: values, gradients, bounds and limits."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquest_rl.algorithms.cells import SURROGATES
from llmquest_rl.algorithms.presets import Algorithm
from llmquest_rl.algorithms.ratios import RATIOS
from llmquest_rl.algorithms.surrogates import Cuts, Tokens
from tests.algorithms.cases import bounds

BOUNDED = [name for name, surrogate in SURROGATES.items() if surrogate.cuts is not None]
CASES = settings(max_examples=200, deadline=None)

floats = st.floats(-3, 3, allow_nan=False, width=32)
numbers = st.floats(0.1, 4)
by_sign = st.tuples(numbers, numbers)
log_probs = st.floats(-8, -1e-3)
token_values = st.tuples(st.floats(0.01, 9), log_probs, log_probs, floats)


def tensor(values: object) -> Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def tokens(ratio: object, advantages: object, logprobs: object = -1.0, old_logprobs: object = -1.0) -> Tokens:
    """Tokens of one sequence; the ratio and the log-probs take gradients."""
    ratio, advantages = tensor(ratio), tensor(advantages)
    values = (tensor(x).expand_as(ratio).clone() for x in (logprobs, old_logprobs))
    made = Tokens(ratio, *values, advantages, torch.zeros(len(ratio), dtype=torch.long))
    made.ratio.requires_grad_()
    made.logprobs.requires_grad_()
    return made


def of_policies(new: list[float], old: list[float], advantages: list[float]) -> Tokens:
    """Tokens of one sequence from probabilities, with the ratio of each token."""
    leaf, old_logprobs = tensor(np.log(new)).requires_grad_(), tensor(np.log(old))
    ids = torch.zeros(len(new), dtype=torch.long)
    return Tokens(RATIOS["token"].function(leaf, old_logprobs, ids), leaf, old_logprobs, tensor(advantages), ids)


def losses(name: str, values: Tokens, limits: Algorithm) -> Tensor:
    return SURROGATES[name].configured(limits)(values)


def cuts(name: str, values: Tokens, limits: Algorithm) -> Cuts:
    of_bound = SURROGATES[name].cuts
    assert of_bound is not None
    return of_bound(values, limits)


def gradient(name: str, values: Tokens, limits: Algorithm, of: Tensor) -> list[float]:
    """The gradient of the sum of the losses in `of`."""
    result: list[float] = torch.autograd.grad(losses(name, values, limits).sum(), of)[0].tolist()
    return result


@CASES
@given(st.lists(token_values, min_size=1, max_size=20), st.data())
def test_surrogates_by_hand(values: list[tuple[float, float, float, float]], data: st.DataObject) -> None:
    """Formulas, each by itself; the log-probs and the ratio are free of each other. `oracle.py` has every surrogate."""
    low, high = data.draw(st.floats(0.01, 0.9)), data.draw(st.floats(0.01, 3))
    dual = data.draw(st.one_of(st.none(), st.floats(1.1, 3.0).map(lambda x: x * (1 + high))))
    tau, power, decay = (data.draw(by_sign) for _ in range(3))
    signs = ("positive", "negative")
    shift = data.draw(st.floats(0.05, 20.0))
    shapes = {"tau": tau, "power": power, "decay": decay}
    by_name = {f"{key}_{sign}": x for key, pair in shapes.items() for sign, x in zip(signs, pair, strict=True)}
    limits = bounds(low, high, dual, shift_limit=shift, **by_name)
    ratio, logprob, old_logprob, advantage = np.asarray(values).T
    clipped = [
        -a * min(r, 1 + high) if a >= 0 else -a * min(max(r, 1 - low), np.inf if dual is None else dual)
        for r, a in zip(ratio, advantage, strict=True)
    ]
    kept = [min(r, np.exp(high)) if a > 0 else max(r, np.exp(-low)) for r, a in zip(ratio, advantage, strict=True)]
    temperature, k, rate = (np.where(advantage > 0, *pair) for pair in (tau, power, decay))
    p, q = np.exp(logprob), np.exp(old_logprob)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    bound, away = np.where(advantage > 0, high, low), advantage * (p - q) > 0
    expected = {
        "clip": clipped,
        "geometric_clip": -advantage * np.prod(kept) ** (1 / len(kept)),
        "soft_gate": -4 / temperature / (1 + np.exp(-temperature * (ratio - 1))) * advantage,
        "clipped_weight": -np.clip(ratio, 1 - low, 1 + high) * advantage * logprob,
        "gamma_weight": -(ratio**k) * np.exp(rate * (1 - ratio)) * advantage * logprob,
        "binary_tv": np.where(away & (abs(p - q) > bound), 0.0, -ratio * advantage),
        "binary_kl": np.where(away & (kl > bound), 0.0, -ratio * advantage),
        "log_prob": -advantage * logprob,
        "unclipped": -ratio * advantage,
        "shift_penalty": -ratio * advantage + abs(advantage) * q * (ratio - 1) ** 2 / (2 * shift),
    }
    for name, value in expected.items():
        ours = losses(name, tokens(ratio, advantage, logprob, old_logprob), limits).detach()
        np.testing.assert_allclose(ours, value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_at_ratio_1_the_gradient_is_the_policy_gradient(name: str, advantage: float) -> None:
    """The gradient is in log pi, and the ratio is its exponential."""
    values = of_policies([0.3, 0.9, 0.01], [0.3, 0.9, 0.01], [advantage] * 3)
    assert gradient(name, values, bounds(), values.logprobs) == pytest.approx([-advantage] * 3)
    assert not any(cut.any() for name in BOUNDED for cut in cuts(name, values, bounds(dual=3.0)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        *((1.3, 1.0, 0), (0.7, 1.0, 1), (1.3, -1.0, 1), (0.7, -1.0, 0), (2.5, -1.0, 1), (3.5, -1.0, 0)),
        *((1.25, 1.0, 1), (0.75, -1.0, 0)),
    ],
)
def test_clip_stops_the_gradient_only_where_it_would_go_too_far(ratio: float, advantage: float, slope: int) -> None:
    """The bounds are 0.2, 0.28 and a dual bound of 3. A cut token has no gradient."""
    values, limits = tokens([ratio], [advantage]), bounds(0.2, 0.28, 3.0)
    assert gradient("clip", values, limits, values.ratio) == [-advantage * slope]
    low, high = cuts("clip", values, limits)
    assert bool(low | high) == (slope == 0)


def test_which_weights_are_cut() -> None:
    low, high = cuts("clipped_weight", tokens([0.1, 0.5, 1.9, 4.0, 6.0], [1.0, -1.0] * 2 + [1.0]), bounds(0.8, 4.0))
    assert (low.tolist(), high.tolist()) == ([True] + [False] * 4, [False] * 4 + [True])


@CASES
@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([1.0, -0.7])), min_size=1, max_size=9))
def test_a_token_beyond_the_geometric_clip_loses_its_own_gradient_alone(pairs: list[tuple[float, float]]) -> None:
    """GMPO's gradient with its clip: A s / |o| for all others, s the geometric mean that holds the cut ones."""
    log_ratio, advantages = np.asarray(pairs).T
    assume(np.abs(log_ratio - 0.3).min() > 1e-9 and np.abs(log_ratio + 0.4).min() > 1e-9)  # the kinks
    advantages[:] = advantages[0]
    leaf, ids = tensor(log_ratio).requires_grad_(), torch.zeros(len(pairs), dtype=torch.long)
    values = Tokens(leaf.exp(), leaf, torch.zeros_like(leaf), tensor(advantages), ids)
    limits = bounds(0.4, 0.3)
    cut = log_ratio > 0.3 if advantages[0] > 0 else log_ratio < -0.4
    mean = np.exp((log_ratio.clip(max=0.3) if advantages[0] > 0 else log_ratio.clip(min=-0.4)).mean())
    np.testing.assert_allclose(
        gradient("geometric_clip", values, limits, leaf), np.where(cut, 0.0, -advantages * mean), rtol=1e-9, atol=1e-12
    )
    low, high = cuts("geometric_clip", values, limits)
    np.testing.assert_array_equal(low | high, cut)


def test_a_geometric_mean_hardly_sees_an_outlier() -> None:
    """Ratios 1, 1.1, 0.9 and 8: the clip takes the last one's gradient; unclipped it weighs 8^(1/4)."""
    values = tokens([1.0, 1.1, 0.9, 8.0], [1.0] * 4)
    loose, tight = (-losses("geometric_clip", values, bounds(0.4, high)) for high in (9.0, 0.4))
    assert loose.tolist() == pytest.approx([7.92**0.25] * 4)
    assert tight.tolist() == pytest.approx([(0.99 * np.exp(0.4)) ** 0.25] * 4)


@CASES
@given(st.floats(0.0, 6.0), floats, numbers, numbers)
def test_the_soft_gate_is_the_policy_gradient_times_4_p_1_minus_p(
    ratio: float, advantage: float, positive: float, negative: float
) -> None:
    values = tokens([ratio], [advantage])
    slope = gradient("soft_gate", values, bounds(tau_positive=positive, tau_negative=negative), values.ratio)
    tau = positive if advantage > 0 else negative
    p = 1 / (1 + np.exp(-tau * (ratio - 1)))
    np.testing.assert_allclose(slope, [-advantage * 4 * p * (1 - p)], rtol=1e-9, atol=1e-12)


@CASES
@given(st.floats(0.0, 6.0), st.floats(0.2, 4), st.floats(0.01, 2), st.sampled_from([1.0, -1.0]))
def test_a_larger_tau_closes_the_gate_faster(ratio: float, tau: float, more: float, advantage: float) -> None:
    """Monotone in tau: the weight of a gradient away from ratio 1 only falls, and at 1 it stays 1."""
    values, mine = tokens([ratio, 1.0], [advantage] * 2), "tau_positive" if advantage > 0 else "tau_negative"
    less, further = (
        gradient("soft_gate", values, bounds(**{mine: value}), values.ratio) for value in (tau, tau + more)
    )
    assert abs(further[0]) <= abs(less[0]) + 1e-12
    assert (less[1], further[1]) == (pytest.approx(-advantage), pytest.approx(-advantage))


def test_a_clipped_weight_leaves_every_token_its_gradient() -> None:
    values, limits = tokens([0.1, 1.0, 9.0, 9.0], [1.0, -1.0, 1.0, -1.0]), bounds(1.0, 4.0)
    assert gradient("clipped_weight", values, limits, values.logprobs) == [-0.1, 1.0, -5.0, 5.0]
    low, high = cuts("clipped_weight", values, limits)
    assert (low.tolist(), high.tolist()) == ([False] * 4, [False, False, True, True])


def gamma_weights(ratio: object, advantage: float, limits: Algorithm) -> np.ndarray:
    values = tokens(ratio, np.full(np.shape(ratio), advantage))
    return np.asarray(gradient("gamma_weight", values, limits, values.logprobs)) / -advantage


@pytest.mark.parametrize(("advantage", "power", "decay"), [(2.0, 2.0, 3.0), (-0.5, 3.0, 2.0)])
def test_a_gamma_weight_is_bounded_as_the_paper_says(advantage: float, power: float, decay: float) -> None:
    """Its largest value stands at k / lambda (equation 45); the weight is at most K times the ratio (19)."""
    ratio = np.linspace(1e-4, 20, 20_001)
    weights = gamma_weights(ratio, advantage, bounds())
    assert weights.max() == pytest.approx((power / decay) ** power * np.exp(decay - power), rel=1e-5)
    assert ratio[weights.argmax()] == pytest.approx(power / decay, abs=1e-3)
    steepest = ((power - 1) / decay) ** (power - 1) * np.exp(decay - power + 1)
    assert (weights / ratio).max() == pytest.approx(steepest, rel=1e-5)


def test_gamma_weights_of_the_papers_numbers() -> None:
    """Its appendix C: largest weights 1.21 and 1.24; negative advantages are held back more where r < 1."""
    ratio = np.linspace(0.01, 3, 3000)
    positive, negative = (gamma_weights(ratio, advantage, bounds()) for advantage in (1.0, -1.0))
    assert (positive.max(), negative.max()) == (pytest.approx(1.21, abs=5e-3), pytest.approx(1.24, abs=5e-3))
    assert (negative < positive)[ratio < 0.6].all()
    assert (negative > positive)[ratio > 1.5].all()


def test_a_gamma_weight_is_finite_whatever_its_numbers() -> None:
    """Its largest value would be e^260, which float32 does not hold."""
    ratio, one = torch.tensor([500.0]), torch.ones(1)
    values = Tokens(ratio, -one, -one, one, torch.zeros(1, dtype=torch.long))
    assert losses("gamma_weight", values, bounds(power_positive=50.0, decay_positive=0.1)).isfinite().all()


@pytest.mark.parametrize("name", ["clipped_weight", "gamma_weight"])
def test_weights_have_no_gradient_of_their_own(name: str) -> None:
    values = tokens([0.5, 2.0], [1.0, -1.0])
    loss = losses(name, values, bounds()).sum()
    assert torch.autograd.grad(loss, values.ratio, allow_unused=True) == (None,)


@pytest.mark.parametrize(("name", "cut"), [("clip", "rare"), ("binary_tv", "common"), ("binary_kl", "common")])
def test_divergences_cut_where_probability_moves_and_not_where_ratios_do(name: str, cut: str) -> None:
    """DPPO's example, section 4.2: from 1e-4 to 1e-2 the ratio is 100, from 0.99 to 0.8 it is 0.81."""
    values = of_policies([1e-2, 0.8], [1e-4, 0.99], [1.0, -1.0])
    limits = bounds(0.2, 0.2) if name == "clip" else bounds(0.15, 0.15)
    low, high = cuts(name, values, limits)
    assert (low.tolist(), high.tolist()) == ([False, cut == "common"], [cut == "rare", False])
    slope = gradient(name, values, limits, values.logprobs)
    assert [x == 0 for x in slope] == [cut == "rare", cut == "common"]


@CASES
@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6), st.sampled_from(["binary_tv", "binary_kl"]))
def test_a_way_back_into_the_region_is_always_open(new: float, old: float, name: str) -> None:
    """The bounds are 0: only the direction counts, and a kept token has the gradient of r A."""
    towards = 1.0 if new < old else -1.0
    values = of_policies([new, new], [old, old], [towards, -towards])
    kept, cut = gradient(name, values, bounds(0.0, 0.0), values.logprobs)
    assert kept == pytest.approx(-towards * new / old)
    assert cut == 0 or new == pytest.approx(old, rel=1e-3)  # of closer ones the KL is lost in rounding


@CASES
@given(st.integers(2, 9), st.integers(0, 2**31))
def test_binary_divergences_are_at_most_those_of_the_whole_vocabulary(vocabulary: int, seed: int) -> None:
    """DPPO, appendix B: so nothing is cut within a bound of the whole; with two tokens the two are equal."""
    draw = np.random.default_rng(seed)
    new, old = (x / x.sum() for x in draw.dirichlet(np.ones(vocabulary), 2).clip(1e-9))
    whole = {"binary_tv": abs(new - old).sum() / 2, "binary_kl": (old * np.log(old / new)).sum()}
    values = of_policies(new.tolist(), old.tolist(), np.sign(new - old).tolist())
    for name, divergence in whole.items():
        above, below = (bounds(divergence * x, divergence * x) for x in (1 + 1e-6, 1 - 1e-6))
        assert not any(cut.any() for cut in cuts(name, values, above))
        if vocabulary == 2:
            low, high = cuts(name, values, below)
            assert (low | high).all()


def test_a_token_that_is_certain_has_finite_divergences() -> None:
    """1 - p is 0 in float32 under the old policy, the current one, or both."""
    logprobs, old = torch.tensor([-1.0, 0.0, 0.0]), torch.tensor([0.0, -1.0, 0.0])
    ratio, ids = (logprobs - old).exp(), torch.zeros(3, dtype=torch.long)
    values = Tokens(ratio, logprobs, old, torch.tensor([-1.0, 1.0, 1.0]), ids)
    for name in ("binary_tv", "binary_kl"):
        low, high = cuts(name, values, bounds(0.15, 0.15))
        assert (low.tolist(), high.tolist()) == ([True, False, False], [False, True, False])
        assert losses(name, values, bounds(0.15, 0.15)).tolist() == [0.0, 0.0, -1.0]


@CASES
@given(st.floats(1e-3, 0.99), st.floats(1e-3, 0.99), floats, st.floats(0.05, 20.0))
def test_the_shift_penalty_is_a_smooth_mask(new: float, old: float, advantage: float, limit: float) -> None:
    """DRPO: the gradient of r A, times 1 - sign(A) (p - p_old) / limit. So it is 0 where DPPO's mask begins."""
    values = of_policies([new], [old], [advantage])
    weight = 1 - np.sign(advantage) * (new - old) / limit
    slope = gradient("shift_penalty", values, bounds(shift_limit=limit), values.logprobs)
    np.testing.assert_allclose(slope, [-advantage * new / old * weight], rtol=1e-9, atol=1e-12)


def test_beyond_the_limit_the_shift_penalty_leads_back() -> None:
    """A wrong token that lost 0.2 of its probability, with a limit of 0.15, is made likelier again."""
    values = of_policies([0.3, 0.4], [0.5, 0.5], [-1.0, -1.0])
    back, on = gradient("shift_penalty", values, bounds(shift_limit=0.15), values.logprobs)
    assert back < 0 < on
