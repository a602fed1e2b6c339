"""The measures compared with closed forms."""

from pathlib import Path

import pytest
import torch

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.checkpoint.load_save import new_model
from llmquest_rl.types import Completion, Group, Problem, Score
from trainer.papers.measures.gradient_noise import gradient_noise
from trainer.papers.measures.kl_estimators import ESTIMATORS, compare, next_token_logprobs


@pytest.fixture
def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(40, 7, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    return policy, reference


def test_every_estimator_beside_the_gradient_of_the_exact_kl(
    distributions: tuple[torch.Tensor, torch.Tensor],
) -> None:
    policy, reference = distributions
    logits = policy.clone().requires_grad_()
    logs = logits.log_softmax(-1)
    exact = (logs.exp() * (logs - reference)).sum(-1)
    [gradient] = torch.autograd.grad(exact.sum(), logits)
    found = {name: compare(estimator, policy, reference) for name, estimator in ESTIMATORS.items()}
    assert found["k2"]["kl"] == pytest.approx(float(exact.detach().mean()))
    # The gradient of k3 in a loss is that of KL(reference || policy), which is p - q.
    other = policy.exp() - reference.exp()
    bias = float((other - gradient).square().sum(-1).mean().sqrt() / gradient.square().sum(-1).mean().sqrt())
    assert found["k3"]["gradient bias"] == pytest.approx(bias)
    assert found["k1"]["gradient bias"] == pytest.approx(1.0)
    assert found["k2"]["gradient bias"] == pytest.approx(0.0, abs=1e-9)
    assert found["k3, ratio-weighted"]["gradient bias"] == pytest.approx(0.0, abs=1e-9)
    assert found["k1"]["value bias"] == pytest.approx(0.0, abs=1e-9)
    assert found["k3"]["value bias"] == pytest.approx(0.0, abs=1e-9)


def test_deviations_are_those_of_samples(distributions: tuple[torch.Tensor, torch.Tensor]) -> None:
    policy, reference = (each[:1] for each in distributions)
    found = compare(ESTIMATORS["k3"], policy, reference)
    drawn = torch.multinomial(policy.exp()[0], 400_000, replacement=True, generator=torch.Generator().manual_seed(1))
    values = ESTIMATORS["k3"](policy[0], reference[0])[drawn]
    assert found["value deviation"] * found["kl"] == pytest.approx(float(values.std()), rel=0.02)
    slopes = 1 - (reference - policy).exp()[0]
    gradients = slopes[drawn, None] * (torch.eye(7, dtype=torch.float64)[drawn] - policy.exp())
    exact = torch.autograd.functional.jacobian(
        lambda z: (z.softmax(-1) * (z.log_softmax(-1) - reference[0])).sum(), policy[0]
    )
    spread = gradients.var(0).sum().sqrt() / exact.norm()
    assert found["gradient deviation"] == pytest.approx(float(spread), rel=0.02)


def test_the_whole_distribution_is_that_of_the_targets(tiny_model: Path) -> None:
    model = new_model(tiny_model, torch.float32, seed=1)
    batch = collate([SequenceGroup([3, 4], [[5, 6, 1], [7]]), SequenceGroup([9], [[2, 3]])])
    logprobs = next_token_logprobs(model, batch)
    expected = model(batch).logprobs.double()
    torch.testing.assert_close(logprobs.gather(1, batch.targets[:, None])[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(batch.targets), dtype=torch.float64))


def _batches(count: int) -> list[list[Group]]:
    generator = torch.Generator().manual_seed(2)

    def group(i: int) -> Group:
        ids = torch.randint(2, 50, (4, 5), generator=generator).tolist()
        values = torch.randint(0, 2, (4,), generator=generator).tolist()
        completions = [Completion(tokens, [-1.0] * 5, "", "stop", 0) for tokens in ids]
        return Group(Problem(f"s{i}", "", [3, 4], ""), completions, [Score(float(value)) for value in values])

    return [[group(i) for i in range(3)] for _ in range(count)]


def test_noise_does_not_depend_on_the_scale_of_advantages(tiny_model: Path) -> None:
    """The leave-one-out baseline is the group's mean scaled by G / (G - 1)."""
    model = new_model(tiny_model, torch.float32, seed=1)
    overrides = {"aggregation": "sequence_sum", "beta": 0.0}
    noises = [gradient_noise(model, _batches(12), resolve(name, overrides), 8) for name in ("rloo", "dr_grpo")]
    assert noises[0] == pytest.approx(noises[1], rel=1e-3)
    other = gradient_noise(model, _batches(12), resolve("reinforce", overrides), 8)
    assert other != pytest.approx(noises[0], rel=1e-2)
