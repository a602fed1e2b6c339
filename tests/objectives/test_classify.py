"""Classification loss against a NumPy oracle in float64; every sequence of an update weighs the same."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from llmquest_rl.algorithms.presets import resolve
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.sequence_classifier import SequenceClassifier, SequenceClassifierConfig
from llmquest_rl.objectives.classify import Classify, Config, build, cross_entropy
from llmquest_rl.types import Sampling

LABELS = ("low", "middle", "high")
OBJECTIVE = Classify(LABELS)


def tiny() -> SequenceClassifier:
    model = SequenceClassifier(
        SequenceClassifierConfig(
            "LlamaForSequenceClassification", replace(LlamaConfig.tiny(), initializer_range=0.2), LABELS
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def labelled(ids: list[int], label: int) -> SequenceGroup:
    return SequenceGroup([], [[*ids, label]], mask=[[*[False] * len(ids), True]])


def oracle(scores: NDArray[np.float64], targets: list[int], smoothing: float) -> tuple[NDArray[np.float64], ...]:
    """Losses [targets], and the gradient of their sum with respect to the scores: softmax - q."""
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    softmax = shifted / shifted.sum(-1, keepdims=True)
    wanted = np.full(scores.shape, smoothing / scores.shape[-1])
    wanted[np.arange(len(targets)), targets] += 1 - smoothing
    return -(wanted * np.log(softmax)).sum(-1), softmax - wanted


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(2, 5), st.sampled_from([0.0, 0.1, 0.6]))
def test_loss_and_gradient_equal_the_oracle(data: st.DataObject, rows: int, labels: int, smoothing: float) -> None:
    numbers = st.lists(st.floats(-20, 20), min_size=labels, max_size=labels)
    scores = np.array(data.draw(st.lists(numbers, min_size=rows, max_size=rows)))
    targets = data.draw(st.lists(st.integers(0, labels - 1), min_size=rows, max_size=rows))
    ours = torch.tensor(scores, requires_grad=True)
    losses = cross_entropy(ours, torch.tensor(targets), smoothing)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    expected, gradient = oracle(scores, targets, smoothing)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_it_is_the_mean_over_sequences_whatever_their_length(smoothing: float) -> None:
    model, objective = tiny(), Classify(LABELS, smoothing)
    groups = [labelled([5, 9, 2, 7], 2), labelled([1], 0), SequenceGroup([4, 4, 8], [[1]])]
    loss = objective.loss(model, collate(objective.assign_token_weights(groups)))
    scores = torch.cat([model(collate([group])).values for group in groups])
    targets = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss.value, F.cross_entropy(scores, targets, label_smoothing=smoothing))
    floats = loss.metrics.to_floats(objective.derived_metrics)
    assert floats["train/sequences"] == 3
    assert floats["train/loss"] == pytest.approx(float(loss.value.detach()), rel=1e-6)
    assert floats["train/accuracy"] == pytest.approx(float((scores.argmax(-1) == targets).float().mean()))
    assert "train/perplexity" not in floats, "that is a number of language models"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=6), st.integers(0, 2)), min_size=2, max_size=6
    ),
    st.integers(2, 4),
)
def test_split_changes_nothing(rows: list[tuple[list[int], int]], parts: int) -> None:
    model = tiny()
    groups = [SequenceGroup(ids, [[label]]) if label == 1 else labelled(ids, label) for ids, label in rows]
    weighted = OBJECTIVE.assign_token_weights(groups)
    whole = OBJECTIVE.loss(model, collate(weighted)).value
    split = sum(OBJECTIVE.loss(model, collate(weighted[i::parts])).value for i in range(parts) if weighted[i::parts])
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)


def test_a_microbatch_without_weight_adds_nothing() -> None:
    idle = collate([SequenceGroup([0], [[0]], {"weights": [[0.0]]})])
    loss = OBJECTIVE.loss(tiny(), idle)
    assert float(loss.value.detach()) == 0.0
    assert loss.metrics.to_floats() == {"train/sequences": 0.0}


@pytest.mark.parametrize(
    ("group", "number"),
    [
        (SequenceGroup([1, 2], [[3]]), 1),  # a token beyond the labels
        (SequenceGroup([1, 2], [[0, 1]]), 2),  # a reply
        (SequenceGroup([], [[5, 9, 2]]), 2),  # text
        (SequenceGroup([1], [[0], []]), 0),
    ],
)
def test_what_is_no_label_is_refused(group: SequenceGroup, number: int) -> None:
    with pytest.raises(ValueError, match=f"a sequence with {number} targets, .* one of its 3 labels: .*`labelled`"):
        OBJECTIVE.assign_token_weights([labelled([1], 0), group])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "labels"),
        ({"labels": ["one"]}, "at least 2"),
        ({"labels": ["a", "b", "a"]}, "two labels have the same name: a"),
        ({"labels": ["a", "b"], "label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(options)


def test_build_takes_the_options() -> None:
    config = Config(labels=("a", "b"), label_smoothing=0.1)
    assert build(config, resolve("grpo", {}), Sampling(max_tokens=4)) == Classify(("a", "b"), 0.1)


def test_a_wrong_and_certain_answer_costs_what_it_should() -> None:
    """The measure itself, by hand: scores 0 and log 3 give probabilities 1/4 and 3/4."""
    scores = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    assert float(cross_entropy(scores, torch.tensor([0]), 0.0)) == pytest.approx(math.log(4))
    assert float(cross_entropy(scores, torch.tensor([1]), 0.0)) == pytest.approx(math.log(4 / 3))
