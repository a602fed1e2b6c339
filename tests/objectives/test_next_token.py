"""Next-token loss: every target of an update weighs the same, for any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.llama import Llama, LlamaConfig
from llmquest_rl.objectives.next_token import NextToken


def tiny() -> Llama:
    model = Llama(LlamaConfig.tiny()).double()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_is_cross_entropy_over_documents() -> None:
    model, objective = tiny(), NextToken()
    documents = [[5, 9, 2, 7], [1, 3]]
    loss = objective.loss(
        model, collate(objective.assign_token_weights([SequenceGroup([], [document]) for document in documents]))
    )
    terms = []
    for document in documents:
        output = model(collate([SequenceGroup([document[0]], [document[1:]])]))
        terms.append(output.logprobs)
    torch.testing.assert_close(loss.value, -torch.cat(terms).mean().to(loss.value.dtype), rtol=1e-6, atol=1e-6)
    floats = loss.metrics.to_floats(objective.derived_metrics)
    assert floats["train/tokens"] == 4
    assert floats["train/loss"] == pytest.approx(float(loss.value.detach()), rel=1e-6)
    assert floats["train/perplexity"] == pytest.approx(torch.cat(terms).mean().neg().exp().item(), rel=1e-6)


def test_masked_tokens_do_not_count() -> None:
    objective = NextToken()
    masked, plain = SequenceGroup([1, 2], [[3, 4, 5]], {}, [[False, True, True]]), SequenceGroup([1, 2, 3], [[4, 5]])
    values = [
        objective.loss(tiny(), collate(objective.assign_token_weights([group]))).value for group in (masked, plain)
    ]
    torch.testing.assert_close(values[0], values[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=6), min_size=2, max_size=6), st.integers(2, 4))
def test_split_changes_nothing(documents: list[list[int]], parts: int) -> None:
    model, objective = tiny(), NextToken()
    weighted = objective.assign_token_weights(
        [SequenceGroup([0] if i % 2 else [], [document]) for i, document in enumerate(documents)]
    )
    whole = objective.loss(model, collate(weighted)).value
    split = sum(objective.loss(model, collate(weighted[i::parts])).value for i in range(parts) if weighted[i::parts])
    assert float(whole) == pytest.approx(float(split), rel=1e-5, abs=1e-6)
