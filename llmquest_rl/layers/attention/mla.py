"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, 2.1.1).

Keys and values of all heads are projections of one latent vector per token, and a cache stores that vector. Beside it
the cache stores one short rotated key that all heads share, because a rotation cannot be merged into the projections.
The same formula is computed in two forms:

* expanded: the latent is projected up to keys and values, followed by ordinary attention. This form needs the fewest
  products where whole packed sequences are attended, in training and for prompts;
* absorbed: the key projection is applied to the query and the value projection to the output,
  `q (W_k c) = (W_k^T q) c` and `sum_j p_j (W_v c_j) = W_v (sum_j p_j c_j)`. A new token then attends to the latents
  themselves: this is multi-query attention with one key/value head, and cached tokens are never projected again.

Shapes: T tokens, D hidden size, H heads, L latent size; a query head has N dimensions without rotation and R rotated
ones, a value head has V dimensions.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.norm import RMSNorm
from llmquest_rl.layers.rope import Rotary, rotate, rotate_interleaved

LATENT_EPS = 1e-6
"""Epsilon of the norms on the latents; it does not follow the model's other norms."""


@dataclass(frozen=True)
class LatentShape:
    """The sizes of a latent attention layer, under the names of config.json."""

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None
    """Size of the queries' latent; None = queries are projected directly."""
    kv_lora_rank: int
    """L: size of the latent of keys and values."""
    qk_nope_head_dim: int
    """N: dimensions of a query or key head without rotation."""
    qk_rope_head_dim: int
    """R: rotated dimensions of a query or key head."""
    v_head_dim: int
    """V: dimensions of a value head."""
    scale: float
    """Multiplies the scores: `(N + R)^-1/2`, times a YaRN factor if the context was extended."""
    bias: bool = False
    """True if the projections from and to the hidden size have a bias."""
    interleaved: bool = True
    """True: rotated pairs are neighbouring dimensions. False: they are half the rotated dimensions apart."""


class LatentAttention(nn.Module):
    """One multi-head latent attention layer."""

    def __init__(self, shape: LatentShape, layer: int) -> None:
        super().__init__()
        self.shape = shape
        self.layer = layer
        self.rotate = rotate_interleaved if shape.interleaved else rotate
        heads, size, latent = shape.num_heads, shape.hidden_size, shape.kv_lora_rank
        self.query = _query(shape)
        self.latent_down = Linear(size, latent + shape.qk_rope_head_dim, bias=shape.bias)
        self.latent_norm = RMSNorm(latent, LATENT_EPS)
        self.latent_up = Linear(latent, heads * (shape.qk_nope_head_dim + shape.v_head_dim), bias=False)
        self.output = Linear(heads * shape.v_head_dim, size, bias=shape.bias)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Attend from hidden states `x` `[T, D]`; returns `[T, D]`."""
        shape = self.shape
        queries = self.query(x).unflatten(-1, (shape.num_heads, -1))
        q, q_rope = queries.split((shape.qk_nope_head_dim, shape.qk_rope_head_dim), -1)  # [T, H, N], [T, H, R]
        latent, k_rope = self.latent_down(x)[:, None].split((shape.kv_lora_rank, shape.qk_rope_head_dim), -1)
        latent = self.latent_norm(latent)  # [T, 1, L]
        q_rope, k_rope = (
            self.rotate(q_rope, rotary),
            self.rotate(k_rope, rotary),
        )  # [T, H, R], [T, 1, R]; not normalised
        attend = self._absorbed if context.is_decoding else self._expanded
        out: Tensor = self.output(attend(q, q_rope, latent, k_rope, context).flatten(1))
        return out

    def _expanded(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, context: AttentionContext) -> Tensor:
        """Attention output `[T, H, V]`, computed with the keys and values of every head."""
        shape = self.shape
        pairs = self.latent_up(latent[:, 0]).unflatten(-1, (shape.num_heads, -1))
        k, v = pairs.split((shape.qk_nope_head_dim, shape.v_head_dim), -1)  # [T, H, N], [T, H, V]
        k = torch.cat((k, k_rope.expand(-1, shape.num_heads, -1)), -1)  # [T, H, N + R]
        cache_entry = torch.cat((latent, k_rope), -1)  # [T, 1, L + R]
        return context.attend(self.layer, torch.cat((q, q_rope), -1), k, v, shape.scale, cache_entry=cache_entry)

    def _absorbed(self, q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, context: AttentionContext) -> Tensor:
        """Attention output `[T, H, V]`, computed on the cached latents and without keys and values of the heads."""
        shape = self.shape
        up = self.latent_up.weight.unflatten(0, (shape.num_heads, -1))  # [H, N + V, L]
        up_k, up_v = up.split((shape.qk_nope_head_dim, shape.v_head_dim), 1)
        q = torch.cat((torch.einsum("thn,hnl->thl", q, up_k), q_rope), -1)  # [T, H, L + R]
        mixed = context.attend(self.layer, q, torch.cat((latent, k_rope), -1), None, shape.scale)  # [T, H, L + R]
        return torch.einsum("thl,hvl->thv", mixed[..., : shape.kv_lora_rank], up_v)


def _query(shape: LatentShape) -> nn.Module:
    """The projection to all heads' queries, direct or through a normalised latent."""
    width = shape.num_heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    if shape.q_lora_rank is None:
        return Linear(shape.hidden_size, width, bias=False)
    layers: dict[str, nn.Module] = {
        "down": Linear(shape.hidden_size, shape.q_lora_rank, bias=shape.bias),
        "norm": RMSNorm(shape.q_lora_rank, LATENT_EPS),
        "up": Linear(shape.q_lora_rank, width, bias=False),
    }
    return nn.Sequential(OrderedDict(layers))
