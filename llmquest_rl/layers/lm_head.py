"""The output layer: log-probabilities of given tokens without ever holding tokens x vocabulary.

Rows are worked through in chunks, in buffers that all chunks share. Backward computes each chunk's probabilities a
second time: one more matrix product, instead of keeping the largest tensor of the whole model.
"""

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
"""Logits held at once, by device: enough rows for a fast matrix product, and no more."""

MIN_CHUNK_ROWS = 64
"""Fewer rows would read the whole weight too often."""


class LMHead(nn.Module):
    """A [vocab, size] matrix, its own or the embedding's. No bias."""

    def __init__(self, size: int, vocab_size: int, tied_to: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size)) if tied_to is None else tied_to

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocab] of `states` [n, size], in the model's dtype: what `forward` avoids, so for few rows."""
        return states @ self.weight.t()

    def forward(
        self, states: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target, and the entropy of the distribution that it stands in.

        Matrix products are in the weight's dtype, all else is float32. The entropy is a metric: it has no gradient.

        Args:
            states: Final hidden states [n, size].
            targets: Token ids [n].
            temperature: Divides the logits first.
            entropy: Also compute the entropy, in nats.

        Returns:
            Log-probs [n] and entropy [n] (None unless asked for), float32.
        """
        inputs = (states, self.weight, targets, temperature, entropy)
        logprobs, entropies = _ChunkedLogProbs.apply(*inputs)  # type: ignore[no-untyped-call]
        return logprobs, entropies if entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        buffers = _Buffers(states, weight, temperature)
        chosen = states.new_empty(len(states), dtype=torch.float32)
        entropies = torch.empty_like(chosen) if entropy else chosen.new_empty(0)
        for rows in buffers.chunks:
            logits, logprobs = buffers.logits(rows)
            torch._log_softmax(logits, -1, False, out=logprobs)
            chosen[rows] = logprobs.gather(-1, targets[rows, None]).squeeze(-1)
            if entropy:
                entropies[rows] = -torch.linalg.vecdot(torch.exp(logprobs, out=logits), logprobs)
        ctx.save_for_backward(states, weight, targets)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """d logprob / d logits = (onehot - softmax(logits / T)) / T. A row's factor goes to the smaller operand."""
        states, weight, targets = ctx.saved_tensors
        scale = (-grads[0] / ctx.temperature)[:, None]
        scaled = states * scale.to(states.dtype)
        grad_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffers = _Buffers(states, weight, ctx.temperature)
        for rows in buffers.chunks:
            logits, probs = buffers.logits(rows)
            torch._softmax(logits, -1, False, out=probs)
            probs.scatter_add_(-1, targets[rows, None], probs.new_full((len(probs), 1), -1.0))
            errors = buffers.narrow(probs)
            if grad_states is not None:
                torch.mul(errors @ weight, scale[rows], out=grad_states[rows])
            if grad_weight is not None:
                _add_product(grad_weight, errors.t(), scaled[rows])
        return grad_states, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


class _Buffers:
    """Memory for one chunk, and the chunks. Fresh tensors for each chunk would cost more time than the softmax does."""

    def __init__(self, states: Tensor, weight: Tensor, temperature: float) -> None:
        self.states, self.weight, self.temperature = states, weight, temperature
        limit = CHUNK_ELEMENTS.get(states.device.type, CHUNK_ELEMENTS["cpu"])
        size = min(len(states), max(MIN_CHUNK_ROWS, limit // len(weight)))
        self.chunks = [slice(start, min(start + size, len(states))) for start in range(0, len(states), max(size, 1))]
        shape = (size, len(weight))
        self.products = states.new_empty(shape)
        self.results = states.new_empty(shape, dtype=torch.float32)
        self.wide = self.products if states.dtype == torch.float32 else torch.empty_like(self.results)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The chunk's logits divided by the temperature, and room for a result: float32 [rows, vocab] both."""
        num_rows = rows.stop - rows.start
        products, wide = self.products[:num_rows], self.wide[:num_rows]
        torch.mm(self.states[rows], self.weight.t(), out=products)
        if wide.dtype != products.dtype:
            wide.copy_(products)
        if self.temperature != 1.0:
            wide.div_(self.temperature)
        return wide, self.results[:num_rows]

    def narrow(self, values: Tensor) -> Tensor:
        """Float32 [rows, vocab] values in the dtype of the weight; overwrites the products."""
        return values if values.dtype == self.products.dtype else self.products[: len(values)].copy_(values)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where the float32 total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
