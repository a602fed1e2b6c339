"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, eq. 10), for packed sequences and in steps.

Each head keeps a matrix S [key size, value size] that maps keys to values. A token first lets it fade by `exp(g)`, then
moves what is stored under its key towards its value by the share `beta`, and reads with its query:

    S <- exp(g) S;    S <- S + beta k (v - S^T k)^T;    o = S^T q

For C tokens at once this becomes matrix products (section 3.3 there; the UT transform of Yang et al. 2024,
arXiv:2406.06484, section 3.2). With c = the running sum of g within the chunk, G_ij = exp(c_i - c_j) for i >= j and 0
above the diagonal, and S the state before the chunk:

    E = diag(beta) (V - diag(exp c) K S)                what each token would write if the others of the chunk were not
    R = (I + diag(beta) (K K^T * G, below its diagonal))^-1 E                                   what each really writes
    O = diag(exp c) Q S + (Q K^T * G) R
    S <- exp(c_C) S + (diag(exp(c_C - c)) K)^T R

Only S goes from chunk to chunk, so E, R and S are computed step by step and all else for all chunks in one go. A step
takes all chunks that have equally many before them in their sequence, its shared prompt included. All is float32.

Shapes: T tokens, N chunks, C tokens of a chunk, K key heads, H = K x J value heads (J neighbours share a key head),
A key size, B value size.
"""

from typing import Any

import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.recurrent.delta_chunks import CHUNK, ChunkedLayout, chunk_layout


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The rule over packed sequences from empty states; a segment with a parent starts from its parent's last state.

    Args:
        q: Queries [T, K, A], already normalised and scaled.
        k: Keys [T, K, A], of length 1 at most: longer ones let the state grow without bound.
        v: Values [T, H, B]; value head h reads key head `h // (H / K)`.
        g: Logarithm of what is kept [T, H], at most 0.
        beta: What is written [T, H], between 0 and 1.
        layout: The segments.

    Returns:
        Outputs float32 [T, H, B], and the state after each segment, float32 [segments, H, A, B].
    """
    chunks = chunk_layout(layout, q.device)
    shared = v.shape[1] // k.shape[1]
    queries, keys = (chunks.pad(x.float()).unsqueeze(2) for x in (q, k))  # [N, K, 1, C, A]
    values = chunks.pad(v.float()).unflatten(1, (-1, shared))  # [N, K, J, C, B]
    decayed, writes = (chunks.pad(x.float().unsqueeze(-1)).unflatten(1, (-1, shared)) for x in (g, beta))
    total, between = _Decay.apply(decayed.squeeze(-1))  # type: ignore[no-untyped-call]
    since_start, to_end = total.exp(), between[..., -1, :]
    mixing = keys @ keys.transpose(-1, -2) * between * writes  # [N, K, J, C, C]
    reads, states, last = _Scan.apply(  # type: ignore[no-untyped-call]
        mixing.flatten(1, 2),
        (values * writes).flatten(1, 2),
        (keys * (since_start.unsqueeze(-1) * writes)).flatten(1, 2),
        (keys * to_end.unsqueeze(-1)).flatten(1, 2),
        since_start[..., -1].flatten(1, 2),
        chunks,
    )
    scores = (queries @ keys.transpose(-1, -2) * between).flatten(0, 2)  # [N * H, C, C]
    from_state = (queries * since_start.unsqueeze(-1)).flatten(0, 2)  # [N * H, C, A]
    out = torch.baddbmm(scores @ reads.flatten(0, 1), from_state, states.flatten(0, 1))
    return chunks.unpad(out.unflatten(0, (-1, v.shape[1]))), last


def gated_delta_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for one token of each of n sequences: inputs as above with T = n, `state` [n, H, A, B].

    Returns:
        Outputs float32 [n, H, B] and the new states float32 [n, H, A, B].
    """
    shared = v.shape[1] // k.shape[1]
    query, key = (x.float().repeat_interleave(shared, dim=1).unsqueeze(-2) for x in (q, k))  # [n, H, 1, A]
    decayed = state.float() * g.float().exp()[..., None, None]
    write = (v.float().unsqueeze(-2) - key @ decayed) * beta.float()[..., None, None]  # [n, H, 1, B]
    new = torch.addcmul(decayed, key.transpose(-1, -2), write)
    return (query @ new).squeeze(-2), new


class _Decay(torch.autograd.Function):
    """The running sum of g [..., C], and G [..., C, C].

    Sums are float64 both ways. Forward, the difference of two large sums would lose its digits, and with them what
    neighbours behind a very forgetful token see of each other. Backward, each entry of G adds to one token what it
    takes from another, and what is left is multiplied by a large g.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        total = g.double().cumsum(-1)
        high = total.float()
        low = (total - high).float()  # of each, so that float32 is enough for differences
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
    """The part that goes step by step: R and the state before each chunk, and the state after each segment.

    Written by hand because autograd would keep every step's copies of the state, where one is enough.
    """

    @staticmethod
    def forward(
        ctx: Any, mixing: Tensor, values: Tensor, keys_in: Tensor, keys_out: Tensor, kept: Tensor, chunks: ChunkedLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`mixing` [N, H, C, C] (below the diagonal), `values` [N, H, C, B], keys [N, H, C, A], `kept` [N, H]."""
        eye = torch.eye(CHUNK, device=mixing.device).expand_as(mixing)
        inverse = torch.linalg.solve_triangular(mixing, eye, upper=False, unitriangular=True)
        heads, size, width = kept.shape[1], keys_in.shape[-1], values.shape[-1]
        reads = torch.empty_like(values)
        states = values.new_empty(len(kept), heads, size, width)
        last = values.new_zeros(chunks.num_segments, heads, size, width)
        after = values.new_zeros(1, heads, size, width)
        for level in chunks.levels:
            rows = slice(level.start, level.stop)
            before = torch.index_select(after, 0, level.before, out=states[rows])
            written = values[rows] - keys_in[rows] @ before
            torch.matmul(inverse[rows], written, out=reads[rows])
            after = before * kept[rows, :, None, None] + keys_out[rows].transpose(-1, -2) @ reads[rows]
            last[level.ending] = after[level.ends]
        ctx.save_for_backward(inverse, keys_in, keys_out, kept, reads, states)
        ctx.chunks = chunks
        return reads, states, last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Steps in reverse order; what needs no other step's result is left for one product over all chunks."""
        d_reads, d_states, d_last = gradients
        inverse, keys_in, keys_out, kept, reads, states = ctx.saved_tensors
        d_values, d_keys_out, d_kept = (torch.empty_like(x) for x in (reads, keys_out, kept))
        deepest = ctx.chunks.levels[-1:]
        d_after = torch.zeros_like(states[deepest[0].start :] if deepest else states)
        for level in reversed(ctx.chunks.levels):
            rows = slice(level.start, level.stop)
            d_after.index_add_(0, level.ends, d_last[level.ending])
            torch.matmul(reads[rows], d_after.transpose(-1, -2), out=d_keys_out[rows])
            d_kept[rows] = (d_after * states[rows]).sum((-1, -2))
            d_read = d_reads[rows] + keys_out[rows] @ d_after
            d_written = torch.matmul(inverse[rows].transpose(-1, -2), d_read, out=d_values[rows])
            d_before = d_states[rows] + d_after * kept[rows, :, None, None]
            d_before -= keys_in[rows].transpose(-1, -2) @ d_written
            d_after = d_before.new_zeros(level.num_above, *d_before.shape[1:]).index_add_(0, level.before, d_before)
        d_mixing = -(d_values @ reads.transpose(-1, -2)).tril(-1)
        d_keys_in = -(d_values @ states.transpose(-1, -2))
        return d_mixing, d_values, d_keys_in, d_keys_out, d_kept, None
