"""The policy objective around a model: the papers' equations in NumPy float64, microbatches, metrics."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmquest_rl.algorithms.presets import PRESETS, Algorithm, resolve
from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.metrics import Metrics
from llmquest_rl.models.base import Output
from llmquest_rl.objectives import CriticOptions
from llmquest_rl.objectives.policy import Config, Policy, build
from llmquest_rl.types import Sampling
from tests.algorithms import oracle
from tests.algorithms.cases import without_chance
from trainer.run.metric_table import METRICS

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
        return Output(logprobs, -(all_logprobs.exp() * all_logprobs).sum(-1) if entropy else None, {})


def logprob(model: Bigram, source: int, target: int, temperature: float = 1.0) -> float:
    row = model.table.detach().numpy()[source] / temperature
    return float(row[target] - np.log(np.exp(row).sum()))


def entropy(model: Bigram, source: int, temperature: float = 1.0) -> float:
    row = model.table.detach().numpy()[source] / temperature
    p = np.exp(row) / np.exp(row).sum()
    return float(-(p * np.log(p)).sum())


def random_groups(seed: int, groups: int = 3, token_fields: tuple[str, ...] = ()) -> list[SequenceGroup]:
    draw = np.random.default_rng(seed)
    sequence_groups = []
    for _ in range(groups):
        completions = [
            draw.integers(0, VOCAB, draw.integers(1, MAX_TOKENS)).tolist() for _ in range(draw.integers(1, 4))
        ]
        noise = {
            name: [draw.normal(-2, 0.4, len(c)).tolist() for c in completions]
            for name in ("rollout_logprobs", *token_fields)
        }
        advantages = [[float(draw.normal())] * len(c) for c in completions]
        sequence_groups.append(
            SequenceGroup(draw.integers(0, VOCAB, 3).tolist(), completions, {"advantages": advantages, **noise})
        )
    return sequence_groups


def float64(batch: TokenBatch) -> TokenBatch:
    return replace(batch, token_fields={name: values.double() for name, values in batch.token_fields.items()})


def run(
    policy: Policy, model: nn.Module, sequence_groups: list[SequenceGroup], parts: int = 1
) -> tuple[float, list[Tensor], Metrics]:
    """Loss, gradients and metrics of sequence groups weighted together and computed in several microbatches."""
    model.zero_grad()
    weighted = policy.assign_token_weights(sequence_groups)
    total, metrics = 0.0, Metrics()
    for i in range(parts):
        if weighted[i::parts]:
            loss = policy.loss(model, float64(collate(weighted[i::parts])))
            loss.value.backward()  # type: ignore[no-untyped-call]
            total += float(loss.value.detach())
            metrics.merge([loss.metrics])
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None], metrics


def oracle_loss(
    sequence_groups: list[SequenceGroup], model: Bigram, algorithm: Algorithm, fixed: Bigram, temperature: float = 1.0
) -> float:
    """The loops of `tests/algorithms/oracle.py`, on the model's log-probs; `fixed` stands where no gradient flows."""
    groups = []
    for sequence_group in sequence_groups:
        group = []
        for i, completion in enumerate(sequence_group.completions):
            sources = [sequence_group.prompt[-1], *completion[:-1]]
            new, frozen = (
                np.array([logprob(m, *pair, temperature) for pair in zip(sources, completion, strict=True)])
                for m in (model, fixed)
            )
            token_fields = {name: np.asarray(rows[i]) for name, rows in sequence_group.token_fields.items()}
            entropies = np.array([entropy(model, source, temperature) for source in sources])
            old, reference = token_fields.get("old_logprobs", frozen), token_fields.get("ref_logprobs", frozen)
            rest = (old, token_fields["rollout_logprobs"], reference, token_fields["advantages"], entropies)
            group.append(oracle.Sequence(new, frozen, *rest))
        groups.append(group)
    return oracle.loss(groups, algorithm, MAX_TOKENS)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(oracle.known_rows()),
    st.sampled_from([0.0, 0.04, 0.5]),
    st.sampled_from([None, 1.0, 2.0]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.sampled_from([1.0, 0.7]),
)
def test_loss_is_the_papers(
    seed: int, preset: str, beta: float, cap: float | None, bonus: float, reused: bool, temperature: float
) -> None:
    algorithm = resolve(preset, {"beta": beta, "tis_cap": cap, "entropy_bonus": bonus, **without_chance(preset)})
    policy = Policy(algorithm, temperature, MAX_TOKENS, entropy=False)
    model = Bigram(seed % 97)
    sequence_groups = random_groups(seed, token_fields=policy.computed_logprobs(2 if reused else 1))
    loss, _, _ = run(policy, model, sequence_groups)
    # Streams travel as float32, hence the tolerance.
    np.testing.assert_allclose(
        loss, oracle_loss(sequence_groups, model, algorithm, model, temperature), rtol=3e-6, atol=3e-6
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(oracle.known_rows()))
def test_gradient_is_that_of_the_papers_loss(seed: int, preset: str) -> None:
    """Central differences of the loops, in the model's weights; entropies are of the model too."""
    bounds = {"clip_low": 0.2, "clip_high": 0.3}  # wide enough that a difference seldom meets a kink
    algorithm = resolve(preset, {"beta": 0.1, "entropy_bonus": 0.1, **bounds, **without_chance(preset)})
    policy = Policy(algorithm, 1.0, MAX_TOKENS)
    model, fixed = Bigram(seed % 97), Bigram(seed % 97)
    sequence_groups = random_groups(seed, token_fields=("old_logprobs", "ref_logprobs"))
    _, gradients, _ = run(policy, model, sequence_groups)
    draw = np.random.default_rng(seed)
    for _ in range(4):
        i, j = draw.integers(0, VOCAB, 2)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                model.table[i, j] += step
            values.append(oracle_loss(sequence_groups, model, algorithm, fixed))
            with torch.no_grad():
                model.table[i, j] -= step
        np.testing.assert_allclose(float(gradients[0][i, j]), (values[0] - values[1]) / 2e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_first_update_is_the_plain_policy_gradient(preset: str) -> None:
    plain = {"beta": 0.0, "tis_cap": None, "old_policy": "learner", "covariance": "none"}
    policy = Policy(resolve(preset, plain), 1.0, MAX_TOKENS)
    model, sequence_groups = Bigram(), random_groups(3)
    _, gradients, metrics = run(policy, model, sequence_groups)
    model.zero_grad()
    batch = float64(collate(policy.assign_token_weights(sequence_groups)))
    (-(batch.token_fields["weights"] * batch.token_fields["advantages"] * model(batch).logprobs)).sum().backward()
    torch.testing.assert_close(gradients[0], model.table.grad, rtol=1e-12, atol=1e-14)
    floats = metrics.to_floats()
    assert (floats["policy/ratio"], floats["policy/approx_kl"]) == (1.0, 0.0)
    assert floats.get("policy/clip_frac", 0.0) == 0.0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("reused", [False, True])
def test_zero_advantages_give_no_gradient(preset: str, reused: bool) -> None:
    policy = Policy(resolve(preset, {"beta": 0.0}), 1.0, MAX_TOKENS)
    sequence_groups = random_groups(0, token_fields=policy.computed_logprobs(2 if reused else 1))
    sequence_groups = [
        a.with_token_field("advantages", [[0.0] * len(c) for c in a.completions]) for a in sequence_groups
    ]
    _, gradients, _ = run(policy, Bigram(), sequence_groups)
    assert not gradients[0].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(PRESETS)), st.integers(2, 5), st.randoms(use_true_random=False))
def test_microbatches_and_order_change_nothing(seed: int, preset: str, parts: int, shuffler: Any) -> None:
    policy = Policy(resolve(preset, {"beta": 0.04}), 0.9, MAX_TOKENS)
    model = Bigram()
    sequence_groups = random_groups(seed, groups=5, token_fields=policy.computed_logprobs(2))
    loss, gradients, metrics = run(policy, model, sequence_groups)
    shuffled = list(sequence_groups)
    shuffler.shuffle(shuffled)
    other_loss, other_gradients, other_metrics = run(policy, model, shuffled, parts)
    assert loss == pytest.approx(other_loss, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-9, atol=1e-12)
    assert metrics.to_floats() == pytest.approx(other_metrics.to_floats(), rel=1e-6)


def test_metrics_by_hand() -> None:
    old, rollout = [-1.0, -1.0, -1.0, -1.0], [-1.0, -1.0 - np.log(4), -1.0 + np.log(2), -1.0]
    ratios = np.array([1.5, 1.5, 0.5, 1.5])
    new = torch.tensor(-1 + np.log(ratios))
    token_fields = {
        "advantages": [[1.0, 1.0, -1.0, -1.0]],
        "old_logprobs": [old],
        "rollout_logprobs": [rollout],
        "ref_logprobs": [[-1.0, -2.0, -1.0, -1.0]],
        "weights": [[0.25] * 4],
    }
    batch = collate([SequenceGroup([0], [[1, 2, 3, 4]], token_fields)])
    policy = Policy(resolve("dapo", {"tis_cap": 2.0, "beta": 0.1}), 1.0, MAX_TOKENS)
    _, metrics = policy.token_losses(new, batch)
    floats = metrics.to_floats(Policy.derived_metrics)
    assert floats["policy/clip_low_frac"] == 0.25
    assert floats["policy/clip_high_frac"] == 0.5
    assert floats["policy/clip_frac"] == 0.75
    assert floats["policy/approx_kl"] == pytest.approx((ratios - 1 - np.log(ratios)).mean()), "KL(old || current)"
    to_reference = np.array([0, -1, 0, 0]) - np.log(ratios)
    assert floats["policy/kl"] == pytest.approx((np.exp(to_reference) - 1 - to_reference).mean()), "KL(current || ref)"
    assert floats["policy/ratio_max"] == pytest.approx(1.5)
    assert floats["policy/tis_capped_share"] == 0.25
    assert floats["policy/logp_gap"] == pytest.approx((np.log(4) + np.log(2)) / 4)
    assert floats["policy/logp_gap_max"] == pytest.approx(np.log(4))
    gaps = np.array([0, np.log(4), -np.log(2), 0])  # of pi_old to the engine
    assert floats["policy/logp_gap_k3"] == pytest.approx((np.exp(gaps) - 1 - gaps).mean())
    weights = np.array([1, 2, 0.5, 1])
    assert floats["policy/tis_ess"] == pytest.approx(weights.mean() ** 2 / (weights**2).mean())


@pytest.mark.parametrize(("cells", "loss"), [({}, 4.0), ({"dual_clip": 3.0}, 3.0)])
def test_a_dual_clip_bounds_what_a_bad_sample_costs(cells: dict[str, float], loss: float) -> None:
    """A sample with A = -1 that has become four times as likely."""
    old = -3.0
    token_fields = {"advantages": [[-1.0]], "rollout_logprobs": [[old]], "old_logprobs": [[old]], "weights": [[1.0]]}
    policy = Policy(resolve("grpo", {"beta": 0.0, **cells}), 1.0, MAX_TOKENS)
    losses, _ = policy.token_losses(torch.tensor([old + np.log(4)]), collate([SequenceGroup([0], [[1]], token_fields)]))
    assert losses.tolist() == pytest.approx([loss])


@pytest.mark.parametrize("cells", [{"beta": 0.1}, {"beta": 0.0, "entropy_bonus": 0.1}])
def test_a_group_without_advantages_has_a_gradient_of_other_terms(cells: dict[str, float]) -> None:
    assert not resolve("grpo", cells).needs_advantage
    assert resolve("grpo", {"beta": 0.0}).needs_advantage


def test_with_every_sample_cut_the_effective_sample_size_is_zero() -> None:
    token_fields = {"advantages": [[1.0]], "rollout_logprobs": [[-1.0]], "old_logprobs": [[-0.1]], "weights": [[1.0]]}
    policy = Policy(resolve("grpo", {"is_correction": "reject", "beta": 0.0}), 1.0, MAX_TOKENS)
    _, metrics = policy.token_losses(torch.tensor([-0.1]), collate([SequenceGroup([0], [[1]], token_fields)]))
    floats = metrics.to_floats(Policy.derived_metrics)
    assert (floats["policy/tis_capped_share"], floats["policy/tis_weight"], floats["policy/tis_ess"]) == (1, 0, 0)


def test_tokens_without_weight_are_in_no_metric() -> None:
    policy = Policy(resolve("grpo"), 1.0, MAX_TOKENS)
    sequence_groups = policy.assign_token_weights(random_groups(1, token_fields=("ref_logprobs", "old_logprobs")))
    empty = SequenceGroup([0], [[0]], {name: [[0.0]] for name in sequence_groups[0].token_fields})
    model = Bigram()
    alone, padded = (policy.loss(model, float64(collate(a))) for a in (sequence_groups, [*sequence_groups, empty]))
    assert alone.metrics.to_floats() == pytest.approx(padded.metrics.to_floats())
    assert alone.value.item() == pytest.approx(padded.value.item(), rel=1e-12)
    assert set(alone.metrics.to_floats()) <= set(METRICS)
    only_empty = policy.loss(model, float64(collate([empty])))
    assert float(only_empty.value) == 0.0
    assert "policy/logp_gap_max" not in only_empty.metrics.to_floats()


def test_what_is_asked_for_depends_on_beta_and_reuse() -> None:
    with_reference, without = (build(Config(), resolve("grpo", {"beta": b}), Sampling()) for b in (0.04, 0.0))
    assert with_reference.needs_reference
    assert not without.needs_reference
    assert without.computed_logprobs(1) == ()
    assert without.computed_logprobs(2) == ("old_logprobs",)
    assert with_reference.computed_logprobs(1) == ("ref_logprobs",)
    assert set(with_reference.computed_logprobs(4)) == {"old_logprobs", "ref_logprobs"}
    assert build(Config(), resolve("grpo"), Sampling(temperature=0.0)).temperature == 1.0


def test_what_masks_leave_out_is_counted() -> None:
    """Two sequences by hand: the first is off-policy with a negative advantage; half of each sequence's tokens stay."""
    token_fields = {
        "advantages": [[-1.0, -1.0], [-1.0, -1.0]],
        "rollout_logprobs": [[-0.5, -0.5], [-1.0, -1.0]],
        "weights": [[0.25] * 2] * 2,
    }
    batch = collate([SequenceGroup([0], [[1, 2], [3, 4]], token_fields)])
    cells = {"off_policy_delta": 0.4, "top_entropy_fraction": 0.5, "tis_cap": None, "beta": 0.0}
    policy = Policy(resolve("grpo", cells), 1.0, MAX_TOKENS)
    new = torch.full((4,), -1.0).requires_grad_()
    losses, metrics = policy.token_losses(new, batch, torch.tensor([1.0, 2.0, 2.0, 1.0]))
    losses.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0, 1.0, 0.0]
    floats = metrics.to_floats()
    assert (floats["policy/off_policy_share"], floats["policy/low_entropy_share"]) == (0.5, 0.5)
    assert set(floats) <= set(METRICS)


@pytest.mark.parametrize(
    ("cells", "asked"), [({}, False), ({"entropy_bonus": 0.1}, True), ({"top_entropy_fraction": 0.2}, True)]
)
def test_the_entropy_is_computed_when_the_loss_needs_it(cells: dict[str, float], asked: bool) -> None:
    policy = build(Config(entropy=False), resolve("dapo", cells), Sampling())
    _, _, metrics = run(policy, Bigram(), random_groups(0))
    assert ("policy/entropy" in metrics.to_floats()) == asked


def test_the_ratio_may_be_taken_to_the_engine() -> None:
    """No old policy is computed then, and nothing is left to correct: the loss is that of old = rollout log-probs."""
    model, sequence_groups = Bigram(), random_groups(5)
    engine = build(Config(), resolve("grpo", {"beta": 0.0, "old_policy": "engine"}), Sampling(max_tokens=MAX_TOKENS))
    learner = build(Config(), resolve("grpo", {"beta": 0.0, "tis_cap": None}), Sampling(max_tokens=MAX_TOKENS))
    assert engine.computed_logprobs(2) == () and learner.computed_logprobs(2) == ("old_logprobs",)
    given = [
        sequence_group.with_token_field("old_logprobs", sequence_group.token_fields["rollout_logprobs"])
        for sequence_group in sequence_groups
    ]
    value, gradients, metrics = run(engine, model, sequence_groups)
    expected, expected_gradients, _ = run(learner, model, given)
    assert value == pytest.approx(expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)
    assert metrics.to_floats()["policy/logp_gap"] > 0.01


def test_rare_tokens_are_cut_apart_from_others() -> None:
    policy = build(Config(), resolve("grpo", {"beta": 0.0}), Sampling(max_tokens=4))
    sequence_group = SequenceGroup(
        [0],
        [[1, 2, 3, 4]],
        {
            "advantages": [[1.0] * 4],
            "old_logprobs": [[-3.0, -3.0, -0.1, -0.1]],
            "rollout_logprobs": [[-3.0, -3.0, -0.1, -0.1]],
        },
    )
    [batch] = [collate(policy.assign_token_weights([sequence_group]))]
    logprobs = torch.tensor([-2.0, -3.0, -0.1, -0.11])
    metrics = policy.token_losses(logprobs, batch)[1].to_floats()
    assert metrics["policy/clip_frac_rare"] == 0.5
    assert metrics["policy/clip_frac_common"] == 0.0
    assert metrics["policy/clip_frac"] == 0.25


def test_options_of_a_critic_need_a_critic() -> None:
    critic = Config(critic=CriticOptions(lr=1e-3))
    assert build(critic, resolve("ppo"), Sampling()).critic == critic.critic
    assert build(Config(), resolve("grpo"), Sampling()).critic is None
    with pytest.raises(ValueError, match="objective.critic is read only with algorithm.advantage: gae"):
        build(critic, resolve("grpo"), Sampling())


def test_a_group_without_rewards_teaches_a_critic() -> None:
    """Rewards of 0 differ from its values, so such groups are not left out of a step."""
    assert not resolve("ppo").needs_advantage
