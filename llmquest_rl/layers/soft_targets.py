"""KL(teacher || student) of next-token distributions, in memory that does not grow with tokens x vocabulary.

Rows of logits are computed in blocks. The backward pass computes each block again, so one block is in memory at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmquest_rl.soft_targets import SoftTargets, TeacherHead, TopTokens

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""Logits per block by device; a block has at least one row."""


def logprobs_and_kl(
    states: Tensor, weight: Tensor, softcap: float | None, targets: Tensor, temperature: float, teacher: SoftTargets
) -> tuple[Tensor, Tensor]:
    """Compute the student's log-prob of each target, and the KL of the teacher's distribution to the student's.

    If the teacher gives all tokens, the KL is sum_v p_v (log p_v - log q_v), with p the teacher's probabilities and q
    the student's. Tokens beyond the smaller of the two vocabularies, which pad a weight matrix, have p = 0. If the
    teacher gives k tokens, all others count as one token, which makes the KL smaller, but 0 only if the k probabilities
    agree (the ghost token of arXiv 2503.16870, section 3.4).

    Args:
        states: The student's final hidden states `[n, size]`.
        weight: Its output layer `[vocab, size]`.
        softcap: Its soft cap of logits; None = none.
        targets: Token ids `[n]`.
        temperature: Divides the logits of both models.
        teacher: The teacher's distributions of the same n tokens.

    Returns:
        Log-probs `[n]` and KLs in nats `[n]`, float32, both with gradient. (Float64 states give float64.)
    """
    logprobs, kl = _Blocks.apply(states, weight, softcap, targets, temperature, teacher)  # type: ignore[no-untyped-call]
    return logprobs, kl


class _Blocks(torch.autograd.Function):
    """`_block` for one block of rows after the other, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        softcap: float | None,
        targets: Tensor,
        temperature: float,
        teacher: SoftTargets,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(states, weight, targets)
        ctx.settings = softcap, temperature, teacher
        parts = [
            _block(states[rows], weight, softcap, targets[rows], temperature, teacher.rows(rows))
            for rows in _blocks(len(states), len(weight), states.device)
        ]
        logprobs, kl = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute each block again, with a graph of its own. Gradients of the weight are summed in float32."""
        states, weight, targets = ctx.saved_tensors
        softcap, temperature, teacher = ctx.settings
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_states, grad_weight = torch.zeros_like(states), torch.zeros_like(weight, dtype=wide)
        for rows in _blocks(len(states), len(weight), states.device):
            leaves = [part.detach().requires_grad_() for part in (states[rows], weight)]
            with torch.enable_grad():
                outputs = _block(leaves[0], leaves[1], softcap, targets[rows], temperature, teacher.rows(rows))
            of_states, of_weight = torch.autograd.grad(outputs, leaves, [grad[rows] for grad in grads])
            grad_states[rows] = of_states
            grad_weight += of_weight
        return grad_states, grad_weight.to(weight.dtype), None, None, None, None


@torch.no_grad()
def top_tokens(teacher: TeacherHead, k: int, vocab_size: int) -> TopTokens:
    """Compute the k most likely tokens at each position, and their log-probs among the first `vocab_size` tokens."""
    weight = teacher.weight[:vocab_size]
    found = [
        _logprobs(teacher.states[rows], weight, teacher.softcap, 1.0).topk(min(k, len(weight)))
        for rows in _blocks(len(teacher.states), len(weight), weight.device)
    ]
    return TopTokens(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))


def _blocks(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose logits fit into a block; one empty slice if there are no rows."""
    height = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cpu"]) // vocab)
    yield from (slice(start, start + height) for start in range(0, max(rows, 1), height))


def _block(
    states: Tensor, weight: Tensor, softcap: float | None, targets: Tensor, temperature: float, teacher: SoftTargets
) -> tuple[Tensor, Tensor]:
    ours = _logprobs(states, weight, softcap, temperature)
    chosen = ours.gather(-1, targets[:, None]).squeeze(-1)
    if isinstance(teacher, TopTokens):
        return chosen, _kl_of_top(teacher, ours)
    shared = min(len(weight), len(teacher.weight))
    theirs = _logprobs(teacher.states, teacher.weight[:shared], teacher.softcap, temperature)
    return chosen, (theirs.exp() * (theirs - ours[:, :shared])).sum(-1)


def _kl_of_top(teacher: TopTokens, ours: Tensor) -> Tensor:
    """The KL of k tokens and one further token, which stands for all others `[n]`."""
    theirs = teacher.logprobs.to(ours.dtype)
    kl = (theirs.exp() * (theirs - ours.gather(-1, teacher.ids))).sum(-1)
    if teacher.ids.shape[-1] == ours.shape[-1]:
        return kl
    rest = (-torch.expm1(theirs.logsumexp(-1))).clamp(min=0)
    our_rest = ours.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1)  # without the cancellation of 1 - sum
    return kl + torch.xlogy(rest, rest) - rest * our_rest


def _logprobs(states: Tensor, weight: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """Log-probs `[n, vocab]`, float32 (float64 of float64 states)."""
    products = states @ weight.t()
    logits = products if products.dtype == torch.float64 else products.float()
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    return (logits / temperature).log_softmax(-1)
