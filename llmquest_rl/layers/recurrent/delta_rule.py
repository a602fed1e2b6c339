"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, eq. 10), packed and in single steps.

Each head has a state matrix S `[key size, value size]` that maps keys to values. A token first decays the state by
`exp(g)`, then moves the value stored under its key towards its own value by the fraction `beta`, and reads with its
query:

    S <- exp(g) S;    S <- S + beta k (v - S^T k)^T;    o = S^T q

For a chunk of C tokens the rule becomes matrix products (section 3.3, with the UT transform of Yang et al. 2024,
arXiv:2406.06484, section 3.2). Let c be the running sum of g within the chunk, G_ij = exp(c_i - c_j) for i >= j
and 0 above the diagonal, and S the state before the chunk:

    E = diag(beta) (V - diag(exp c) K S)                                the write of each token if no other token wrote
    R = (I + diag(beta) (K K^T * G, below its diagonal))^-1 E                            the actual write of each token
    O = diag(exp c) Q S + (Q K^T * G) R
    S <- exp(c_C) S + (diag(exp(c_C - c)) K)^T R

Only S is passed from chunk to chunk. So E, R and S are computed step by step, the rest for all chunks at once. One step
processes all chunks of one depth (`delta_chunks.py`), and a shared prompt is computed once. Everything is float32.

Shapes: T tokens, N chunks, C tokens per chunk, K key heads, H = K x J value heads (J neighbours share a key head),
A key size, B value size.
"""

from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.recurrent.delta_chunks import CHUNK, ChunkedLayout, chunk_layout


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Apply the rule to packed sequences. States start at zero; a segment with a parent starts from its parent's state.

    Args:
        q: Queries `[T, K, A]`, already normalised and scaled.
        k: Keys `[T, K, A]`, of norm 1 at most, because longer keys let the state grow without bound.
        v: Values `[T, H, B]`; value head h reads key head `h // (H / K)`.
        g: Logarithm of the decay factor `[T, H]`, at most 0.
        beta: Write strength `[T, H]`, between 0 and 1.
        layout: The segments.

    Returns:
        Outputs `[T, H, B]` and the state after each segment `[segments, H, A, B]`, both float32.
    """
    chunks = chunk_layout(layout, q.device)
    shared = v.shape[1] // k.shape[1]
    queries, keys = (chunks.pad(x.float()).unsqueeze(2) for x in (q, k))  # [N, K, 1, C, A]
    values = chunks.pad(v.float()).unflatten(1, (-1, shared))  # [N, K, J, C, B]
    gates, betas = (chunks.pad(x.float().unsqueeze(-1)).unflatten(1, (-1, shared)) for x in (g, beta))
    total, between = _Decay.apply(gates.squeeze(-1))  # type: ignore[no-untyped-call]
    since_start, to_end = total.exp(), between[..., -1, :]
    mixing = keys @ keys.transpose(-1, -2) * between * betas  # [N, K, J, C, C]
    writes, states, last = _Scan.apply(  # type: ignore[no-untyped-call]
        mixing.flatten(1, 2),
        (values * betas).flatten(1, 2),
        (keys * (since_start.unsqueeze(-1) * betas)).flatten(1, 2),
        (keys * to_end.unsqueeze(-1)).flatten(1, 2),
        since_start[..., -1].flatten(1, 2),
        chunks,
    )
    scores = (queries @ keys.transpose(-1, -2) * between).flatten(0, 2)  # [N * H, C, C]
    from_state = (queries * since_start.unsqueeze(-1)).flatten(0, 2)  # [N * H, C, A]
    out = torch.baddbmm(scores @ writes.flatten(0, 1), from_state, states.flatten(0, 1))
    return chunks.unpad(out.unflatten(0, (-1, v.shape[1]))), last


def gated_delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the rule to one token of each of n sequences.

    Args:
        q: Queries `[n, K, A]`, as in `gated_delta_rule`.
        k: Keys `[n, K, A]`.
        v: Values `[n, H, B]`.
        g: Logarithm of the decay factor `[n, H]`.
        beta: Write strength `[n, H]`.
        state: State of each sequence `[n, H, A, B]`.

    Returns:
        Outputs `[n, H, B]` and the new states `[n, H, A, B]`, both float32.
    """
    shared = v.shape[1] // k.shape[1]
    query, key = (x.float().repeat_interleave(shared, dim=1).unsqueeze(-2) for x in (q, k))  # [n, H, 1, A]
    decayed = state.float() * g.float().exp()[..., None, None]
    write = (v.float().unsqueeze(-2) - key @ decayed) * beta.float()[..., None, None]  # [n, H, 1, B]
    new = torch.addcmul(decayed, key.transpose(-1, -2), write)
    return (query @ new).squeeze(-2), new


class _Decay(torch.autograd.Function):
    """Computes the running sum of g `[..., C]` and the decay matrix G `[..., C, C]`.

    Sums are float64 in both directions. In forward, the difference of two large sums would lose its digits: after a
    token with a very small decay factor the entries of G would be wrong. In backward, each entry of G adds to one
    token's gradient what it subtracts from another's, and the small difference is multiplied by a large g.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        total = g.double().cumsum(-1)
        high = total.float()
        low = (total - high).float()  # rounding error of `high`, so that float32 is enough for differences
        above = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).triu(1)
        between = high.unsqueeze(-1) - high.unsqueeze(-2)
        between += low.unsqueeze(-1) - low.unsqueeze(-2)
        between.masked_fill_(above, float("-inf")).exp_()
        ctx.save_for_backward(between)
        return high, between

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        d_total, d_between = gradients
        (between,) = ctx.saved_tensors
        moved = (d_between * between).double()
        d_sums: Tensor = d_total.double() + moved.sum(-1) - moved.sum(-2)
        return d_sums.flip(-1).cumsum(-1).flip(-1).float()


class _Scan(torch.autograd.Function):
    """The sequential part: computes R, the state before each chunk, and the state after each segment.

    The backward is written by hand, because autograd would save several copies of the state per step, where one is
    enough.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixing: Tensor,
        values: Tensor,
        keys_in: Tensor,
        keys_out: Tensor,
        decays: Tensor,
        chunks: ChunkedLayout,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scan over the levels of `chunks`.

        Args:
            ctx: Context of autograd.
            mixing: diag(beta) (K K^T * G) `[N, H, C, C]`, of which the part below the diagonal is read.
            values: diag(beta) V `[N, H, C, B]`.
            keys_in: diag(beta exp c) K, which reads from the state before `[N, H, C, A]`.
            keys_out: diag(exp(c_C - c)) K, which writes to the state after `[N, H, C, A]`.
            decays: exp(c_C), the decay over a whole chunk `[N, H]`.
            chunks: The chunks.

        Returns:
            R `[N, H, C, B]`, the state before each chunk `[N, H, A, B]`, and after each segment `[segments, H, A, B]`.
        """
        eye = torch.eye(CHUNK, device=mixing.device).expand_as(mixing)
        inverse = torch.linalg.solve_triangular(mixing, eye, upper=False, unitriangular=True)
        heads, size, width = decays.shape[1], keys_in.shape[-1], values.shape[-1]
        writes = torch.empty_like(values)
        states = values.new_empty(len(decays), heads, size, width)
        last = values.new_zeros(chunks.num_segments, heads, size, width)
        after = values.new_zeros(1, heads, size, width)
        for level in chunks.levels:
            rows = slice(level.start, level.stop)
            before = torch.index_select(after, 0, level.before, out=states[rows])
            written = values[rows] - keys_in[rows] @ before
            torch.matmul(inverse[rows], written, out=writes[rows])
            after = before * decays[rows, :, None, None] + keys_out[rows].transpose(-1, -2) @ writes[rows]
            last[level.ending] = after[level.ends]
        ctx.save_for_backward(inverse, keys_in, keys_out, decays, writes, states)
        ctx.chunks = chunks
        return writes, states, last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Run the steps in reverse order; gradients that need no other step are computed for all chunks at once."""
        d_writes, d_states, d_last = gradients
        inverse, keys_in, keys_out, decays, writes, states = ctx.saved_tensors
        d_values, d_keys_out, d_decays = (torch.empty_like(x) for x in (writes, keys_out, decays))
        deepest = ctx.chunks.levels[-1:]
        d_after = torch.zeros_like(states[deepest[0].start :] if deepest else states)
        for level in reversed(ctx.chunks.levels):
            rows = slice(level.start, level.stop)
            d_after.index_add_(0, level.ends, d_last[level.ending])
            torch.matmul(writes[rows], d_after.transpose(-1, -2), out=d_keys_out[rows])
            d_decays[rows] = (d_after * states[rows]).sum((-1, -2))
            d_write = d_writes[rows] + keys_out[rows] @ d_after
            d_written = torch.matmul(inverse[rows].transpose(-1, -2), d_write, out=d_values[rows])
            d_before = d_states[rows] + d_after * decays[rows, :, None, None]
            d_before -= keys_in[rows].transpose(-1, -2) @ d_written
            d_after = d_before.new_zeros(level.num_above, *d_before.shape[1:]).index_add_(0, level.before, d_before)
        d_mixing = -(d_values @ writes.transpose(-1, -2)).tril(-1)
        d_keys_in = -(d_values @ states.transpose(-1, -2))
        return d_mixing, d_values, d_keys_in, d_keys_out, d_decays, None
