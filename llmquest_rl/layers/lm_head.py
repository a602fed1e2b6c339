"""The output layer, which computes log-probabilities of given tokens without a `[tokens, vocab]` tensor.

The vocabulary is processed in chunks of columns that fit into a fast cache, in buffers that all chunks share. Each
weight is read once. Backward computes the probabilities of each chunk again: that costs one more matrix product, but
avoids the largest tensor of the model.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquest_rl.layers.linear import matmul_into, onednn_is_faster, onednn_matmul
from llmquest_rl.layers.soft_targets import logprobs_and_kl
from llmquest_rl.soft_targets import SoftTargets

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits per chunk by device: on a CPU they fit into the last-level cache, on a GPU they occupy all cores."""

MIN_CHUNK_COLUMNS = 256
"""Fewest columns per chunk; the matrix products would be slow with fewer."""


class LMHead(nn.Module):
    """Output projection with a weight `[vocab, size]`, its own or the tied embedding's, and no bias.

    With a soft cap s the logits are `s * tanh(products / s)` (Gemma 2, arXiv:2408.00118, section 2).
    """

    def __init__(self, size: int, vocab_size: int, tied_to: Tensor | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size)) if tied_to is None else tied_to
        self.softcap = softcap

    def logits(self, states: Tensor) -> Tensor:
        """Compute logits `[n, vocab]` of `states` `[n, size]`. Use it for few rows: `forward` avoids this tensor.

        The logits are in the model's dtype, with a soft cap in float32.
        """
        return self.apply_softcap(states @ self.weight.t())

    def apply_softcap(self, products: Tensor) -> Tensor:
        """Turn `products` `[n, vocab]` of states and weight into logits `[n, vocab]`."""
        return products if self.softcap is None else (products.float() / self.softcap).tanh() * self.softcap

    def forward(
        self,
        states: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        soft_targets: SoftTargets | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the log-probability of each target, and the entropy of each row or its KL to a teacher.

        Matrix products are in the weight's dtype, everything else is float32.

        Args:
            states: Final hidden states `[n, size]`.
            targets: Token ids `[n]`.
            temperature: Divides the logits before the softmax.
            entropy: True: also compute the entropy, in nats.
            soft_targets: The teacher's distributions of the n tokens; the KL then takes the entropy's place.

        Returns:
            Log-probs `[n]`, and KLs `[n]` or entropies `[n]` (None with neither), float32.
        """
        if soft_targets is not None:
            return logprobs_and_kl(states, self.weight, self.softcap, targets, temperature, soft_targets)
        inputs = (states, self.weight, targets, temperature, self.softcap, entropy)
        logprobs, entropies = _ChunkedLogProbs.apply(*inputs)  # type: ignore[no-untyped-call]
        return logprobs, entropies if entropy else None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Online softmax: sums exponentials relative to the largest logit so far (Milakov and Gimelshein 2018)."""
        chosen = states.new_zeros(len(states), dtype=torch.float32)
        largest = torch.full_like(chosen, -torch.inf)
        total, weighted = torch.zeros_like(chosen), torch.zeros_like(chosen)
        buffer = chosen.new_empty(0)
        for chunk in _vocab_chunks(states, weight, targets, temperature, softcap):
            logits, exponentials = chunk.logits, buffer.resize_(chunk.logits.shape)
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            shrink = (before - largest).exp_()
            torch.sub(logits, largest[:, None], out=exponentials).exp_()
            total.mul_(shrink).add_(exponentials.sum(-1))
            if entropy:
                weighted.mul_(shrink).add_(torch.linalg.vecdot(exponentials, logits))
            chosen[chunk.rows] = logits[chunk.rows, chunk.targets]
        normalizer = largest + total.log()
        entropies = normalizer - weighted / total
        ctx.save_for_backward(states, weight, targets, normalizer, entropies)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)  # no work for an entropy that is not in the loss
        return chosen - normalizer, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute d logprob / d logits = (onehot - softmax(logits / T)) / T.

        Row factors are multiplied into the smaller operand. A soft cap s adds the factor
        d logits / d products = 1 - (logits / s)^2.
        """
        states, weight, targets, normalizer, entropies = ctx.saved_tensors
        logprob_grad = torch.zeros_like(normalizer) if grads[0] is None else grads[0]
        row_factor = logprob_grad if grads[1] is None else torch.ones_like(logprob_grad)
        scale = (-row_factor / ctx.temperature)[:, None]
        scaled = states * scale.to(states.dtype)
        grad_states = torch.zeros_like(states, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        buffer = normalizer.new_empty(0)
        for chunk in _vocab_chunks(states, weight, targets, ctx.temperature, ctx.softcap):
            softcap_gradient = _softcap_gradient(chunk.logits, ctx.temperature, ctx.softcap, buffer)
            logprobs = chunk.logits.sub_(normalizer[:, None])
            if grads[1] is None:
                logit_gradient = _logit_gradient(logprobs, chunk)
            else:
                logit_gradient = _logit_gradient_with_entropy(logprobs, chunk, logprob_grad, grads[1], entropies)
            logit_gradient = logit_gradient if softcap_gradient is None else logit_gradient.mul_(softcap_gradient)
            logit_gradient = (
                logit_gradient if logit_gradient.dtype == weight.dtype else chunk.products.copy_(logit_gradient)
            )
            if grad_states is not None:
                _add_matmul(grad_states, logit_gradient, weight[chunk.columns])
            if grad_weight is not None:
                matmul_into(logit_gradient.t(), scaled, out=grad_weight[chunk.columns])
        if grad_states is not None:
            grad_states = grad_states.mul_(scale).to(states.dtype)
        return grad_states, grad_weight, None, None, None, None


class _VocabChunk(NamedTuple):
    """A range of columns of the logits."""

    columns: slice
    products: Tensor
    """Products `[n, columns]` in the dtype of the weight; with float32 the same tensor as `logits`."""
    logits: Tensor
    """Logits `[n, columns]`, float32, capped and divided by the temperature; may be overwritten."""
    rows: Tensor
    """Rows whose target is among the columns, long `[hits]`."""
    targets: Tensor
    """The targets of these rows, counted from the first column, long `[hits]`."""


def _vocab_chunks(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float, softcap: float | None
) -> Iterator[_VocabChunk]:
    """Yield all logits chunk by chunk. Chunks share buffers, because allocation would cost more than the softmax."""
    n, vocab = len(states), len(weight)
    elements = CHUNK_ELEMENTS.get(states.device.type, CHUNK_ELEMENTS["cpu"])
    width = min(vocab, max(MIN_CHUNK_COLUMNS, elements // max(n, 1)))
    products = states.new_empty(n * width)
    float32_buffer = products if states.dtype == torch.float32 else torch.empty_like(products, dtype=torch.float32)
    order = targets.argsort()
    starts = torch.arange(0, vocab, width, device=targets.device)
    ends = torch.searchsorted(targets[order], starts + width).tolist()
    for start, first, last in zip(range(0, vocab, width), [0, *ends[:-1]], ends, strict=True):
        columns = slice(start, min(start + width, vocab))
        shape = (n, columns.stop - start)
        chunk, logits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (products, float32_buffer))
        matmul_into(states, weight[columns].t(), out=chunk)
        if float32_buffer is not products:
            logits.copy_(chunk)
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if temperature != 1.0:
            logits.div_(temperature)
        rows = order[first:last]
        yield _VocabChunk(columns, chunk, logits, rows, targets[rows] - start)


def _logit_gradient(logprobs: Tensor, chunk: _VocabChunk) -> Tensor:
    """Compute -d logprob / d logits = softmax - onehot `[n, columns]`, in place of `logprobs` `[n, columns]`."""
    logit_gradient = logprobs.exp_()
    logit_gradient[chunk.rows, chunk.targets] -= 1.0
    return logit_gradient


def _logit_gradient_with_entropy(
    logprobs: Tensor, chunk: _VocabChunk, logprob_grad: Tensor, entropy_grad: Tensor, entropies: Tensor
) -> Tensor:
    """Compute the negative gradient `[n, columns]` of log-probs and entropies H: -dH / d logits = p (log p + H)."""
    factors = logprobs.add(entropies[:, None]).mul_(entropy_grad[:, None]).add_(logprob_grad[:, None])
    logit_gradient = logprobs.exp_().mul_(factors)
    logit_gradient[chunk.rows, chunk.targets] -= logprob_grad[chunk.rows]
    return logit_gradient


def _softcap_gradient(logits: Tensor, temperature: float, softcap: float | None, buffer: Tensor) -> Tensor | None:
    """Compute d logits / d products `[n, columns]` in `buffer`; None = no soft cap, so 1 everywhere."""
    if softcap is None:
        return None
    return torch.mul(logits, temperature / softcap, out=buffer.resize_(logits.shape)).square_().neg_().add_(1.0)


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute `total += left @ right`; `total` is float32, the operands may be bfloat16."""
    if onednn_is_faster(left.numel() * right.shape[1], left, right):
        total += onednn_matmul(left, right)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
