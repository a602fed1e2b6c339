"""The Bradley-Terry loss: against its equation in float64 NumPy, against TRL's, and packed in any way."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.data.pairs import group_for_scoring
from llmquest_rl.metrics import Metrics
from llmquest_rl.models.base import Scores
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from llmquest_rl.objectives import Loss
from llmquest_rl.objectives.reward_model import BINS, RewardModel
from llmquest_rl.types import Pooling
from trainer.learner.microbatches import idle_group
from trainer.run.metric_table import METRICS, entry

score = st.floats(-30, 30, width=32)
Pairs = list[tuple[float, float, float]]
"""Scores of the chosen and the rejected reply, and the margin."""
many = st.lists(st.tuples(score, score, st.floats(0, 3)), min_size=1, max_size=8)


class Given(nn.Module):
    """A model with given scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores, dtype=torch.float64))

    def forward(self, batch: TokenBatch) -> Scores:
        return Scores(self.scores[batch.tokens[batch.sources], None], {})


def sequence_groups(pairs: Pairs) -> list[SequenceGroup]:
    """Pairs of one token each, its number is its place among the scores."""
    made = [SequenceGroup([], [[2 * i, 0], [2 * i + 1, 0]], mask=[[False, True]] * 2) for i in range(len(pairs))]
    return [
        sequence_group.with_token_field("margins", [[m, m]] * 2)
        for sequence_group, (_, _, m) in zip(made, pairs, strict=True)
    ]


def computed(pairs: Pairs, center: float, smoothing: float = 0.0) -> tuple[Loss, Tensor]:
    """Loss and the gradient of every score."""
    model, objective = Given([value for pair in pairs for value in pair[:2]]), RewardModel(center, smoothing)
    batch = collate(objective.assign_token_weights(sequence_groups(pairs)))
    token_fields = {name: values.double() for name, values in batch.token_fields.items()}
    token_fields["margins"] = torch.tensor([m for _, _, m in pairs for _ in range(2)], dtype=torch.float64)
    token_fields["weights"] = torch.full_like(token_fields["weights"], 1 / (2 * len(pairs)))
    loss = objective.loss(model, TokenBatch(**{**{k: getattr(batch, k) for k in FIELDS}, "token_fields": token_fields}))
    [gradient] = torch.autograd.grad(loss.value, model.scores)
    return loss, gradient


FIELDS = ("tokens", "positions", "layout", "sources", "targets", "sequence_ids")


def oracle(pairs: Pairs, center: float, smoothing: float = 0.0) -> tuple[float, list[float]]:
    """Equation 2 of arXiv:2307.09288 and the second term of arXiv:2312.09244, with their derivatives by hand.

    With smoothing the first term is the expectation over a label that is wrong with this probability.
    """
    total, gradient = 0.0, []
    for chosen, rejected, margin in pairs:
        difference = chosen - rejected - margin
        right, wrong = float(np.logaddexp(0.0, -difference)), float(np.logaddexp(0.0, difference))
        total += (1 - smoothing) * right + smoothing * wrong + center * (chosen + rejected) ** 2
        # of -log sigmoid(x): -sigmoid(-x); of -log sigmoid(-x): sigmoid(x)
        slope = -(1 - smoothing) * math.exp(-wrong) + smoothing * math.exp(-right)
        pull = 2 * center * (chosen + rejected)
        gradient += [(slope + pull) / len(pairs), (-slope + pull) / len(pairs)]
    return total / len(pairs), gradient


@settings(max_examples=200, deadline=None)
@given(many, st.sampled_from([0.0, 0.01, 0.5]), st.sampled_from([0.0, 0.1, 0.4]))
def test_equals_the_equation_and_its_gradient(pairs: Pairs, center: float, smoothing: float) -> None:
    loss, gradient = computed(pairs, center, smoothing)
    expected, by_hand = oracle(pairs, center, smoothing)
    assert loss.value.item() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert gradient.tolist() == pytest.approx(by_hand, rel=1e-12, abs=1e-13)


@settings(max_examples=50, deadline=None)
@given(many)
def test_metrics(pairs: Pairs) -> None:
    floats = computed(pairs, 0.1)[0].metrics.to_floats(RewardModel.derived_metrics)
    chosen, rejected, _ = np.array(pairs).T
    scores = np.concatenate([chosen, rejected])
    assert floats["train/loss"] == pytest.approx(oracle(pairs, 0.0)[0], rel=1e-9, abs=1e-12)
    assert floats["train/accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert floats["train/margin"] == pytest.approx(np.mean(chosen - rejected), abs=1e-9)
    assert floats["train/reward_mean"] == pytest.approx(scores.mean(), abs=1e-9)
    assert floats["train/pairs"] == len(pairs)
    if scores.mean() and np.mean(scores**2):
        assert floats["train/reward_std"] == pytest.approx(scores.std(), abs=1e-5)
    assert set(floats) <= set(METRICS) and "train/reward_std" in floats


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(score, score, st.just(0.0)), min_size=1, max_size=40), st.integers(1, 5))
def test_calibration_is_that_of_the_definition_however_pairs_are_split(pairs: Pairs, parts: int) -> None:
    """Guo et al. 2017, equation 3, with bins of equal width over confidences from a half to one."""
    with torch.no_grad():
        losses = [computed_metrics(part) for i in range(parts) if (part := pairs[i::parts])]
    floats = Metrics().merge(losses).to_floats(RewardModel.derived_metrics)
    chosen, rejected, _ = np.array(pairs, dtype=np.float32).T
    difference = (chosen - rejected).astype(np.float64)
    confidence = np.maximum(1 / (1 + np.exp(-difference)), 1 / (1 + np.exp(difference)))
    error = 0.0
    for number in range(BINS):
        low, high = 0.5 + number / (2 * BINS), 0.5 + (number + 1) / (2 * BINS)
        own = (confidence >= low) & ((confidence < high) | (number == BINS - 1))
        error += abs(np.sum(difference[own] > 0) - confidence[own].sum()) / len(pairs)
        assert floats[f"train/pairs_at_{round(100 * low)}"] == pytest.approx(own.sum(), abs=0.01)
    assert floats["train/ece"] == pytest.approx(error, abs=1e-5)
    assert set(floats) == {key for key in floats if entry(key) is not None}


def computed_metrics(pairs: Pairs) -> Metrics:
    """The metrics of held-out pairs."""
    model, objective = Given([value for pair in pairs for value in pair[:2]]), RewardModel()
    return objective.loss(model, collate(objective.assign_token_weights(sequence_groups(pairs)))).metrics


def test_a_model_that_knows_its_errors_is_calibrated() -> None:
    """Nine of ten pairs ranked right with a confidence of 0.9, against a confidence of nearly 1."""
    honest, boastful = math.log(9), 10.0
    pairs = {size: [(size, 0.0, 0.0)] * 9 + [(0.0, size, 0.0)] for size in (honest, boastful)}
    with torch.no_grad():
        errors = {
            size: computed_metrics(many).to_floats(RewardModel.derived_metrics)["train/ece"]
            for size, many in pairs.items()
        }
    assert errors[honest] == pytest.approx(0.0, abs=1e-6) and errors[boastful] == pytest.approx(0.1, abs=1e-3)


def test_the_score_of_mean_pooling_is_the_mean_over_the_reply() -> None:
    """Of the scores that the model gives at each token of the reply, computed one sequence at a time."""
    model, objective = tiny_model(), RewardModel(pooling="mean")
    prompt, replies = [5, 6], [[7, 8, 9], [7, 3]]
    pair = group_for_scoring([(prompt, reply) for reply in replies], "mean")
    batch = collate(objective.assign_token_weights([pair]))
    loss = objective.loss(model, batch)

    def score(reply: list[int]) -> Tensor:
        beginnings = [SequenceGroup([], [[*prompt, *reply[: n + 1], 0]]) for n in range(len(reply))]
        last = [model(collate([one])).values[-1, 0] for one in beginnings]
        return torch.stack(last).mean()

    expected = -torch.nn.functional.logsigmoid(score(replies[0]) - score(replies[1]))
    torch.testing.assert_close(loss.value, expected, rtol=1e-6, atol=1e-7)
    weights = batch.token_fields["weights"]
    assert float(weights.sum()) == pytest.approx(1.0), "the model's own terms count once"


def tiny_model() -> SequenceClassifier:
    model = SequenceClassifier(
        SequenceClassifierConfig("LlamaForSequenceClassification", LlamaConfig.tiny(), ("reward",))
    ).double()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def random_pairs(seed: int, count: int, pooling: Pooling = "eos") -> list[SequenceGroup]:
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        size = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(0, 256, (size,), generator=generator).tolist()

    prompts = [ids(6) for _ in range(count)]
    return [group_for_scoring([(prompt, ids(8)), (prompt, ids(8))], pooling) for prompt in prompts]


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@pytest.mark.parametrize("parts", [2, 5])
def test_split_changes_nothing(parts: int, pooling: Pooling) -> None:
    model, objective = tiny_model(), RewardModel(0.01, 0.1, pooling)
    weighted = objective.assign_token_weights(random_pairs(1, 5, pooling))
    found = []
    for groups in ([weighted], [weighted[i::parts] for i in range(parts)]):
        model.zero_grad()
        losses = [objective.loss(model, collate(group)) for group in groups]
        for loss in losses:
            loss.value.backward()  # type: ignore[no-untyped-call]
        merged = Metrics().merge(loss.metrics for loss in losses).to_floats()
        found.append((sum(loss.value.item() for loss in losses), gradients(model), merged))
    (whole, whole_gradient, metrics), (split, split_gradient, split_metrics) = found
    assert whole == pytest.approx(split, rel=1e-6) and metrics == pytest.approx(split_metrics, rel=1e-6)
    for mine, theirs in zip(whole_gradient, split_gradient, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pooling", ["eos", "mean"])
def test_copies_of_the_prompt_change_nothing(pooling: Pooling) -> None:
    """Models that cannot share a prompt get such groups from the learner."""
    model, objective = tiny_model(), RewardModel()
    weighted = objective.assign_token_weights(
        [
            sequence_group.with_token_field("margins", [[0.5] * len(ids) for ids in sequence_group.completions])
            for sequence_group in random_pairs(2, 4, pooling)
        ]
    )
    shared = objective.loss(model, collate(weighted)).value
    repeated = objective.loss(model, collate([sequence_group.unshared() for sequence_group in weighted])).value
    torch.testing.assert_close(shared, repeated, rtol=1e-9, atol=1e-9)


def test_an_idle_microbatch_changes_nothing() -> None:
    model, objective = tiny_model(), RewardModel(0.1)
    loss = objective.loss(model, collate([idle_group(["margins", "weights"])]))
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert loss.value.item() == 0
    assert all(not gradient.any() for gradient in gradients(model)), "and every parameter was reached"
    assert len(gradients(model)) == len(list(model.parameters()))
    assert loss.metrics.to_floats() == {"train/pairs": 0}


def test_a_margin_that_is_missing_is_none() -> None:
    with_margin, without = random_pairs(3, 2)
    with_margin = with_margin.with_token_field("margins", [[2.0] * len(ids) for ids in with_margin.completions])
    batch = collate(RewardModel().assign_token_weights([with_margin, without]))
    assert batch.token_fields["margins"].tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize(
    "sequence_group",
    [
        SequenceGroup([1], [[2, 3]]),
        SequenceGroup([1], [[2], [3]]),
        SequenceGroup([1], [[2], [3], [4]], mask=[[True]] * 3),
    ],
)
def test_what_is_no_pair_is_refused(sequence_group: SequenceGroup) -> None:
    with pytest.raises(ValueError, match="learns from pairs of replies"):
        RewardModel().assign_token_weights([sequence_group])


@pytest.mark.slow
@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("has_margin", [True, False])
def test_equals_trl(center: float | None, has_margin: bool) -> None:
    """RewardTrainer's own `compute_loss` runs, on scores put in place of its model's."""
    pytest.importorskip("trl", reason="TRL is not installed: requirements/benchmark.txt, see benchmarks/README.md")
    from trl import RewardTrainer

    pairs = [(1.5, 0.25, 1.0), (-2.0, 3.0, 1 / 3), (0.5, 0.5, 0.0)]
    pairs = pairs if has_margin else [(chosen, rejected, 0.0) for chosen, rejected, _ in pairs]
    chosen, rejected, margin = torch.tensor(pairs, dtype=torch.float64).T
    logits = torch.cat([chosen, rejected])[:, None].requires_grad_()

    class Answer(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=logits)

    def gathered(value: Tensor) -> Tensor:
        return value

    class Recorded(dict[str, dict[str, list[Any]]]):
        def __missing__(self, key: str) -> dict[str, list[Any]]:
            self[key] = {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}
            return self[key]

    trainer = SimpleNamespace(
        model=Answer(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=gathered, gather_for_metrics=gathered),
        _metrics=Recorded(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs: dict[str, Any] = {"attention_mask": torch.ones(6, 2)} | ({"margin": margin} if has_margin else {})
    theirs = RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    [gradient] = torch.autograd.grad(theirs, logits)
    ours, our_gradient = computed(pairs, center or 0.0)
    assert ours.value.item() == pytest.approx(theirs.item(), rel=1e-12)
    theirs_by_pair = gradient.reshape(2, -1).T.reshape(-1)
    torch.testing.assert_close(our_gradient, theirs_by_pair, rtol=1e-12, atol=1e-13)
    floats = ours.metrics.to_floats()
    recorded = trainer._metrics["train"]
    assert recorded["accuracy"] == pytest.approx([floats["train/accuracy"]], rel=1e-6)
    assert recorded["margin"] == pytest.approx([floats["train/margin"]], rel=1e-6)
