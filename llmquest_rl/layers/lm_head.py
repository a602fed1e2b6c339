"""The output layer: log-probabilities of given tokens without ever holding tokens x vocabulary.

Rows are worked through in chunks. Backward computes each chunk's logits a second time: one more matrix product instead of
keeping (or writing to memory) the largest tensor of the whole model.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

CHUNK_ELEMENTS = 2**23
"""Logits held at once: 32 MiB in float32, whatever the number of tokens. More rows in a chunk make the product no faster."""


class LMHead(nn.Module):
    """A [vocab, size] matrix, owned or shared with the embedding. No bias."""

    def __init__(self, size: int, vocab_size: int, tied_to: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size)) if tied_to is None else tied_to

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocab] of `states` [n, size], in the model's dtype. For few rows: this is the tensor that `forward` avoids."""
        return states @ self.weight.t()

    def forward(
        self, states: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target, and the entropy of the distribution it was drawn from.

        Softmax and sums are float32 whatever the dtype of the weights. The entropy is a metric: no gradient flows through it.

        Args:
            states: Final hidden states [n, size].
            targets: Token ids [n].
            temperature: Divides the logits first.
            entropy: Also compute the entropy, in nats.

        Returns:
            Log-probs [n] and entropy [n] (None unless asked for), float32.
        """
        logprobs, entropies = _ChunkedLogProbs.apply(states, self.weight, targets, temperature, entropy)
        return logprobs, entropies if entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, states: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        normalisers = states.new_empty(len(states), dtype=torch.float32)
        logprobs = torch.empty_like(normalisers)
        entropies = torch.empty_like(normalisers) if entropy else normalisers.new_empty(0)
        for rows in _chunks(len(states), len(weight)):
            logits = _logits(states[rows], weight, temperature)
            normalisers[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - normalisers[rows]
            if entropy:
                # H = lse - E[logit]
                probs = (logits - normalisers[rows, None]).exp_()
                entropies[rows] = normalisers[rows] - torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(states, weight, targets, normalisers)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[no-untyped-def,override]
        states, weight, targets, normalisers = ctx.saved_tensors
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(states), len(weight)):
            # d logprob / d logits = onehot - probs
            grad_logits = _logits(states[rows], weight, ctx.temperature).sub_(normalisers[rows, None]).exp_()
            grad_rows = grad_logprobs[rows, None] / ctx.temperature
            grad_logits.mul_(-grad_rows).scatter_add_(-1, targets[rows, None], grad_rows)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_states is not None:
                grad_states[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ states[rows]
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _logits(states: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (states @ weight.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(num_rows: int, vocab_size: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
