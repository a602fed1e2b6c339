"""The critic's advantages and loss: loops over tokens in float64, limits, packing, processes, metrics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.algorithms import gae
from llmquest_rl.algorithms.presets import Algorithm, resolve
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate

CASES = settings(max_examples=60, deadline=None)
PPO = resolve("ppo")
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def update(sizes: list[int], seed: int) -> TokenBatch:
    """One packed microbatch with the fields that the learner has before the advantages, in float64."""
    draw = np.random.default_rng(seed)
    names = ("values", "old_logprobs", "ref_logprobs")
    fields = {name: [draw.normal(size=n).tolist() for n in sizes] for name in names}
    fields |= {"advantages": [[float(draw.normal())] * n for n in sizes], "weights": [[0.1] * n for n in sizes]}
    batch = collate(
        [SequenceGroup([0], [[1] * n], {k: [v[i]] for k, v in fields.items()}) for i, n in enumerate(sizes)]
    )
    exact = {name: torch.tensor([x for row in rows for x in row], dtype=torch.float64) for name, rows in fields.items()}
    return replace(batch, token_fields=exact)


def estimated(batch: TokenBatch, algorithm: Algorithm) -> TokenBatch:
    (result,) = gae.with_advantages([batch], algorithm, lambda sums: None)
    return result


@CASES
@given(lengths, st.integers(0, 2**31), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_advantages_are_the_loops_of_the_paper(sizes: list[int], seed: int, gamma: float, lam: float) -> None:
    """GAE, equation 16, as the double sum over TD errors; returns are advantages plus values."""
    row = resolve("ppo", {"gae_gamma": gamma, "gae_lambda": lam, "normalization": "none", "beta": 0.3})
    batch = update(sizes, seed)
    result = estimated(batch, row).token_fields
    start = 0
    for n in sizes:
        part = slice(start, start + n)
        start += n
        values, old, ref = (batch.token_fields[k][part].numpy() for k in ("values", "old_logprobs", "ref_logprobs"))
        rewards = -0.3 * (old - ref)
        rewards[-1] += float(batch.token_fields["advantages"][part][0])
        deltas = rewards + gamma * np.append(values[1:], 0.0) - values
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(n)]
        np.testing.assert_allclose(result["advantages"][part], expected, atol=1e-12)
        np.testing.assert_allclose(result["returns"][part], expected + values, atol=1e-12)


@CASES
@given(lengths, st.integers(0, 2**31))
def test_with_lambda_1_the_return_is_the_reward(sizes: list[int], seed: int) -> None:
    """The advantage is then R - V(s_t): the critic is a baseline for every token."""
    batch = update(sizes, seed)
    result = estimated(batch, resolve("ppo", {"gae_lambda": 1.0, "normalization": "none"})).token_fields
    torch.testing.assert_close(result["returns"], batch.token_fields["advantages"])


@CASES
@given(lengths, st.integers(0, 2**31), st.integers(1, 4))
def test_microbatches_and_processes_change_nothing(sizes: list[int], seed: int, cut: int) -> None:
    """Two processes, one with an idle group: each sees the sums of both."""
    first, second = update(sizes, seed), update(sizes[:cut], seed + 1)
    idle = update([1], seed + 2)
    idle.token_fields["weights"] = torch.zeros(1, dtype=torch.float64)
    together = gae.with_advantages([first, second], PPO, lambda sums: None)
    sums: list[torch.Tensor] = []
    for parts in ([first], [second, idle]):
        gae.with_advantages(parts, PPO, lambda own: sums.append(own.clone()))
    apart = [
        gae.with_advantages(parts, PPO, lambda own: own.copy_(sums[0] + sums[1])) for parts in ([first], [second, idle])
    ]
    for name in ("advantages", "returns", "value_weights"):
        for one, other in zip(together, (apart[0][0], apart[1][0]), strict=True):
            torch.testing.assert_close(one.token_fields[name], other.token_fields[name], rtol=1e-9, atol=1e-9)
    assert float(apart[1][1].token_fields["value_weights"].sum()) == 0.0
    whole = torch.cat([batch.token_fields["advantages"] for batch in together])
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(sum(batch.token_fields["value_weights"].sum() for batch in together)) == pytest.approx(1.0)


numbers = st.floats(-3, 3)


@CASES
@given(numbers, numbers, numbers, st.sampled_from([None, 0.2]))
def test_the_value_loss_by_hand(value: float, old: float, target: float, limit: float | None) -> None:
    """The larger of two squared errors, one of them with the value held near the old one; half of it."""
    held = value if limit is None else old + min(max(value - old, -limit), limit)
    expected = max((value - target) ** 2, (held - target) ** 2) / 2
    leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    others = (torch.tensor([x], dtype=torch.float64) for x in (old, target))
    losses, cut = gae.value_loss(leaf, *others, limit)
    assert float(losses.detach()) == pytest.approx(expected)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    assert float(slope) == pytest.approx(0.0 if bool(cut) else value - target)


def test_metrics_of_the_critic() -> None:
    """A critic that is right explains all of the variance; one number for all tokens explains none."""
    batch = estimated(update([3, 2], 0), PPO)
    returns = batch.token_fields["returns"]
    for values, share in ((returns, 1.0), (torch.full_like(returns, float(returns.mean())), 0.0)):
        batch.token_fields["values"] = values
        value, metrics = gae.critic_loss(values, batch, 0.2)
        floats = metrics.to_floats(gae.DERIVED)
        assert floats["policy/explained_variance"] == pytest.approx(share, abs=1e-9)
        assert floats["policy/value_loss"] == pytest.approx(float(value))
    assert set(floats) <= set(gae.METRICS)
