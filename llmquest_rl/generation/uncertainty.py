"""The most likely next tokens at every place of given sequences, and the entropy of these few."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.generation.batch import pack_slices
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.lm_head import CHUNK_ELEMENTS
from llmquest_rl.models.base import CausalLM


class Uncertainty(NamedTuple):
    """A model's predictions of given tokens, on the CPU."""

    entropies: Tensor
    """Entropy in nats `[targets]` of the distribution over the top tokens alone, whose sum is 1."""
    top_ids: Tensor
    """The most likely tokens in order, `[targets, top]`."""
    top_probs: Tensor
    """Their probabilities among all tokens, `[targets, top]`."""
    logprobs: Tensor
    """Log-probs of the given tokens in nats, `[targets]`."""


@torch.inference_mode()
def next_token_uncertainty(model: CausalLM, sequences: Sequence[list[int]], top: int) -> Uncertainty:
    """Predict each token of the sequences from those before it; the first token of a sequence is no target.

    The logits of a few rows at a time are in memory.

    Args:
        model: The model, which reads text only.
        sequences: Token ids.
        top: Number of tokens that count; the whole vocabulary if that is smaller.
    """
    device = next(model.parameters()).device
    parts: list[Uncertainty] = []
    for pack in pack_slices([len(sequence) for sequence in sequences]):
        batch = collate([SequenceGroup([], [sequence]) for sequence in sequences[pack]]).to(device)
        context = PackedAttention(batch.layout, device)
        states = model.hidden(batch.tokens, batch.positions, context).states.index_select(0, batch.sources)
        vocab = int(model.config.vocab_size)
        rows = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // vocab)
        parts += [
            _of_logits(model.logits(few).float(), targets, min(top, vocab))
            for few, targets in zip(states.split(rows), batch.targets.split(rows), strict=True)
            if len(few)
        ]
    if not parts:
        return Uncertainty(torch.zeros(0), torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, 0), torch.zeros(0))
    return Uncertainty(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _of_logits(logits: Tensor, targets: Tensor, top: int) -> Uncertainty:
    largest, total = logits.topk(top), logits.logsumexp(-1, keepdim=True)
    logs = largest.values.log_softmax(-1)
    entropies = -(logs.exp() * logs).sum(-1)
    probs, known = (largest.values - total).exp(), (logits.gather(1, targets[:, None]) - total)[:, 0]
    return Uncertainty(entropies.cpu(), largest.indices.int().cpu(), probs.cpu(), known.cpu())
