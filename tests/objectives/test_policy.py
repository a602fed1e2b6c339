"""The policy objective against GRPO's equation written out in NumPy float64, sequence by sequence."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
from llmquest_rl.batch import Atom, TokenBatch, collate
from llmquest_rl.metrics import DESCRIPTIONS, Metrics
from llmquest_rl.models.base import Output
from llmquest_rl.objectives.policy import Config, Policy, build
from llmquest_rl.types import Sampling

VOCAB = 11
MAX_TOKENS = 9


class Bigram(nn.Module):
    """The next token depends on the present one alone: logits are rows of a table."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)).double())

    def forward(self, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False) -> Output:
        all_logprobs = (self.table[batch.tokens[batch.sources]] / temperature).log_softmax(-1)
        logprobs = all_logprobs.gather(-1, batch.targets[:, None]).squeeze(-1)
        return Output(logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1).detach() if entropy else None, {})


def logprob(model: Bigram, source: int, target: int, temperature: float = 1.0) -> float:
    row = model.table.detach().numpy()[source] / temperature
    return float(row[target] - np.log(np.exp(row).sum()))


def random_atoms(seed: int, groups: int = 3, streams: tuple[str, ...] = ()) -> list[Atom]:
    draw = np.random.default_rng(seed)
    atoms = []
    for _ in range(groups):
        completions = [
            draw.integers(0, VOCAB, draw.integers(1, MAX_TOKENS)).tolist() for _ in range(draw.integers(1, 4))
        ]
        noise = {
            name: [draw.normal(-2, 0.4, len(c)).tolist() for c in completions]
            for name in ("rollout_logprobs", *streams)
        }
        advantages = [[float(draw.normal())] * len(c) for c in completions]
        atoms.append(Atom(draw.integers(0, VOCAB, 3).tolist(), completions, {"advantages": advantages, **noise}))
    return atoms


def float64(batch: TokenBatch) -> TokenBatch:
    return replace(batch, streams={name: stream.double() for name, stream in batch.streams.items()})


def run(policy: Policy, model: nn.Module, atoms: list[Atom], parts: int = 1) -> tuple[float, list[Tensor], Metrics]:
    """Loss, gradients and metrics of atoms weighed together and computed in several microbatches."""
    model.zero_grad()
    weighed = policy.weigh(atoms)
    total, metrics = 0.0, Metrics()
    for i in range(parts):
        if weighed[i::parts]:
            loss = policy.loss(model, float64(collate(weighed[i::parts])))
            loss.value.backward()  # type: ignore[no-untyped-call]
            total += float(loss.value.detach())
            metrics.merge([loss.metrics])
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None], metrics


def oracle(atoms: list[Atom], model: Bigram, algorithm: Algorithm, temperature: float) -> float:
    """DeepSeekMath equation 3 (its KL: equation 4), and the other rows' aggregation, as loops."""
    per_sequence = []
    for atom in atoms:
        for i, completion in enumerate(atom.completions):
            terms, source = [], atom.prompt[-1]
            for t, token in enumerate(completion):
                new = logprob(model, source, token, temperature)
                old = atom.streams["old_logprobs"][i][t] if "old_logprobs" in atom.streams else new
                ratio, advantage = np.exp(new - old), atom.streams["advantages"][i][t]
                clipped = min(max(ratio, 1 - algorithm.clip_low), 1 + algorithm.clip_high)
                term = min(ratio * advantage, clipped * advantage)
                if algorithm.tis_cap is not None:
                    term *= min(np.exp(old - atom.streams["rollout_logprobs"][i][t]), algorithm.tis_cap)
                if algorithm.beta > 0:
                    r = np.exp(atom.streams["ref_logprobs"][i][t] - new)
                    term -= algorithm.beta * (r - np.log(r) - 1)
                terms.append(term)
                source = token
            per_sequence.append(terms)
    if algorithm.aggregation == "sequence_mean":
        return -float(np.mean([np.mean(terms) for terms in per_sequence]))
    if algorithm.aggregation == "token_mean":
        return -float(np.mean(np.concatenate(per_sequence)))
    return -sum(sum(terms) for terms in per_sequence) / (len(per_sequence) * MAX_TOKENS)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from([0.0, 0.04, 0.5]),
    st.sampled_from([None, 1.0, 2.0]),
    st.booleans(),
    st.sampled_from([1.0, 0.7]),
)
def test_loss_is_the_papers(
    seed: int, preset: str, beta: float, cap: float | None, reused: bool, temperature: float
) -> None:
    algorithm = resolve(preset, {"beta": beta, "tis_cap": cap})
    policy = Policy(algorithm, temperature, MAX_TOKENS)
    model = Bigram(seed % 97)
    needed = policy.streams(2 if reused else 1)
    atoms = random_atoms(seed, streams=needed)
    loss, _, _ = run(policy, model, atoms)
    # Streams travel as float32, hence the tolerance.
    np.testing.assert_allclose(loss, oracle(atoms, model, algorithm, temperature), rtol=2e-6, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(PRESETS)))
def test_gradient_is_that_of_the_papers_loss(seed: int, preset: str) -> None:
    """Central differences of the oracle, with old log-probs and importance weights held fixed."""
    algorithm = resolve(preset, {"beta": 0.1})
    policy = Policy(algorithm, 1.0, MAX_TOKENS)
    model = Bigram(seed % 97)
    atoms = random_atoms(seed, streams=("old_logprobs", "ref_logprobs"))
    _, gradients, _ = run(policy, model, atoms)
    draw = np.random.default_rng(seed)
    for _ in range(4):
        i, j = draw.integers(0, VOCAB, 2)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                model.table[i, j] += step
            values.append(oracle(atoms, model, algorithm, 1.0))
            with torch.no_grad():
                model.table[i, j] -= step
        np.testing.assert_allclose(float(gradients[0][i, j]), (values[0] - values[1]) / 2e-5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_first_update_is_the_plain_policy_gradient(preset: str) -> None:
    policy = Policy(resolve(preset, {"beta": 0.0, "tis_cap": None}), 1.0, MAX_TOKENS)
    model, atoms = Bigram(), random_atoms(3)
    _, gradients, metrics = run(policy, model, atoms)
    model.zero_grad()
    batch = float64(collate(policy.weigh(atoms)))
    (-(batch.streams["weights"] * batch.streams["advantages"] * model(batch).logprobs)).sum().backward()
    torch.testing.assert_close(gradients[0], model.table.grad, rtol=1e-12, atol=1e-14)
    floats = metrics.to_floats()
    assert (floats["policy/ratio"], floats["policy/clip_frac"], floats["policy/approx_kl"]) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("reused", [False, True])
def test_zero_advantages_give_no_gradient(preset: str, reused: bool) -> None:
    policy = Policy(resolve(preset, {"beta": 0.0}), 1.0, MAX_TOKENS)
    atoms = random_atoms(0, streams=policy.streams(2 if reused else 1))
    atoms = [a.with_stream("advantages", [[0.0] * len(c) for c in a.completions]) for a in atoms]
    _, gradients, _ = run(policy, Bigram(), atoms)
    assert not gradients[0].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(PRESETS)), st.integers(2, 5), st.randoms(use_true_random=False))
def test_microbatches_and_order_change_nothing(seed: int, preset: str, parts: int, shuffler: Any) -> None:
    policy = Policy(resolve(preset, {"beta": 0.04}), 0.9, MAX_TOKENS)
    model = Bigram()
    atoms = random_atoms(seed, groups=5, streams=policy.streams(2))
    loss, gradients, metrics = run(policy, model, atoms)
    shuffled = list(atoms)
    shuffler.shuffle(shuffled)
    other_loss, other_gradients, other_metrics = run(policy, model, shuffled, parts)
    assert loss == pytest.approx(other_loss, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-9, atol=1e-12)
    assert metrics.to_floats() == pytest.approx(other_metrics.to_floats(), rel=1e-6)


def test_metrics_by_hand() -> None:
    old, rollout = [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0 - np.log(4), -1.0 + np.log(2), -1.0]
    new = torch.tensor([-1.0, -1 + np.log(1.5), -1 + np.log(0.5), -1 + np.log(1.5)])
    streams = {
        "advantages": [[1.0, 1.0, -1.0, -1.0]],
        "old_logprobs": [old],
        "rollout_logprobs": [rollout],
        "weights": [[0.25] * 4],
    }
    batch = collate([Atom([0], [[1, 2, 3, 4]], streams)])
    policy = Policy(resolve("dapo", {"tis_cap": 2.0}), 1.0, MAX_TOKENS)
    _, metrics = policy.token_losses(new, batch)
    floats = metrics.to_floats()
    assert floats["policy/clip_low_frac"] == 0.25
    assert floats["policy/clip_high_frac"] == 0.25
    assert floats["policy/clip_frac"] == 0.5
    assert floats["policy/ratio_max"] == pytest.approx(1.5)
    assert floats["policy/tis_capped_share"] == 0.25
    assert floats["policy/logp_gap"] == pytest.approx((np.log(4) + np.log(2)) / 4)
    assert floats["policy/logp_gap_max"] == pytest.approx(np.log(4))
    weights = np.array([1, 2, 0.5, 1])
    assert floats["policy/tis_ess"] == pytest.approx(weights.mean() ** 2 / (weights**2).mean())


def test_tokens_without_weight_are_in_no_metric() -> None:
    policy = Policy(resolve("grpo"), 1.0, MAX_TOKENS)
    atoms = policy.weigh(random_atoms(1, streams=("ref_logprobs",)))
    empty = Atom([0], [[0]], {name: [[0.0]] for name in atoms[0].streams})
    model = Bigram()
    alone, padded = (policy.loss(model, float64(collate(a))) for a in (atoms, [*atoms, empty]))
    assert alone.metrics.to_floats() == pytest.approx(padded.metrics.to_floats())
    assert float(alone.value) == pytest.approx(float(padded.value), rel=1e-12)
    assert set(alone.metrics.to_floats()) <= set(DESCRIPTIONS)
    only_empty = policy.loss(model, float64(collate([empty])))
    assert float(only_empty.value) == 0.0
    assert "policy/logp_gap_max" not in only_empty.metrics.to_floats()


def test_what_is_asked_for_depends_on_beta_and_reuse() -> None:
    with_reference, without = (build(Config(), resolve("grpo", {"beta": b}), Sampling()) for b in (0.04, 0.0))
    assert with_reference.needs_reference
    assert not without.needs_reference
    assert without.streams(1) == ()
    assert without.streams(2) == ("old_logprobs",)
    assert with_reference.streams(1) == ("ref_logprobs",)
    assert set(with_reference.streams(4)) == {"old_logprobs", "ref_logprobs"}
    assert build(Config(), resolve("grpo"), Sampling(temperature=0.0)).temperature == 1.0
