"""Entropies over the most likely tokens, against the formula in float64 on all logits."""

import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.generation.uncertainty import next_token_uncertainty
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.llama import Llama, LlamaConfig


def tiny() -> CausalLM:
    model = Llama(LlamaConfig.tiny())
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head.weight *= 4  # so that the distributions differ
    return model.eval()


def expected(model: CausalLM, tokens: list[int], top: int) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """By sorting all probabilities of each prefix, which is computed alone."""
    entropies, ids, probs = [], [], []
    for stop in range(1, len(tokens)):
        batch = collate([SequenceGroup([], [tokens[: stop + 1]])])
        hidden = model.hidden(batch.tokens, batch.positions, PackedAttention(batch.layout, torch.device("cpu")))
        full = model.logits(hidden.states)[-1].double().softmax(0)
        largest = full.sort(descending=True)
        scaled = largest.values[:top] / largest.values[:top].sum()
        entropies.append(float(-(scaled * scaled.log()).sum()))
        ids.append(largest.indices[:top].tolist())
        probs.append(largest.values[:top].tolist())
    return entropies, ids, probs


@torch.no_grad()
def test_entropies_of_the_top_tokens_are_those_of_the_formula() -> None:
    model, generator = tiny(), torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    sequences = [torch.randint(vocab, (n,), generator=generator).tolist() for n in (7, 2, 1, 5)]
    for top in (16, vocab + 5):
        found = next_token_uncertainty(model, sequences, top)
        wanted = [expected(model, sequence, top) for sequence in sequences]
        entropies, ids, probs = ([row for part in parts for row in part] for parts in zip(*wanted, strict=True))
        assert found.top_ids.tolist() == ids
        torch.testing.assert_close(
            found.entropies.double(), torch.tensor(entropies, dtype=torch.float64), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            found.top_probs.double(), torch.tensor(probs, dtype=torch.float64), atol=1e-6, rtol=1e-5
        )
    assert float(found.entropies.std()) > 0.3, "a constant entropy would prove nothing"
    batch = collate([SequenceGroup([], [sequence]) for sequence in sequences])
    torch.testing.assert_close(found.logprobs, model(batch).logprobs)


def test_no_sequence_has_no_scores() -> None:
    assert len(next_token_uncertainty(tiny(), [], 16).entropies) == 0
    assert len(next_token_uncertainty(tiny(), [[3]], 16).entropies) == 0
