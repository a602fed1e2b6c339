"""A small decoder that mixes every kind of layer that a cache serves, to test caches without a real architecture."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.models.base import CausalLM, Hidden

VOCAB, SIZE, HEADS, HEAD_DIM, VALUE_DIM, LATENT = 256, 24, 4, 8, 6, 10


class Attention(nn.Module):
    """Two key/value heads, values narrower than keys; `options` go to `attend`."""

    def __init__(
        self, layer: int, window: int | None = None, softcap: float | None = None, sinks: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.window, self.softcap = layer, window, softcap
        self.query = nn.Linear(SIZE, HEADS * HEAD_DIM)
        self.key = nn.Linear(SIZE, 2 * HEAD_DIM)
        self.value = nn.Linear(SIZE, 2 * VALUE_DIM)
        self.output = nn.Linear(HEADS * VALUE_DIM, SIZE)
        self.sinks = nn.Parameter(torch.ones(HEADS)) if sinks else None

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        q, k = (linear(x).unflatten(-1, (-1, HEAD_DIM)) for linear in (self.query, self.key))
        v = self.value(x).unflatten(-1, (-1, VALUE_DIM))
        options = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        return self.output(context.attend(self.layer, q, k, v, 0.4, **options).flatten(1))


class Latent(nn.Module):
    """Latent attention: keys and values of each head are projections of one latent, and only it is cached."""

    def __init__(self, layer: int, window: int | None = None) -> None:
        super().__init__()
        self.layer, self.window = layer, window
        self.query = nn.Linear(SIZE, HEADS * HEAD_DIM)
        self.latent = nn.Linear(SIZE, LATENT)
        self.key = nn.Parameter(torch.zeros(HEADS, HEAD_DIM, LATENT))
        self.value = nn.Parameter(torch.zeros(HEADS, VALUE_DIM, LATENT))
        self.output = nn.Linear(HEADS * VALUE_DIM, SIZE)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        q = self.query(x).unflatten(-1, (-1, HEAD_DIM))
        latent = self.latent(x)[:, None]  # [T, 1, LATENT]
        if context.is_decoding:
            absorbed = torch.einsum("thc,hcl->thl", q, self.key)
            mixed = context.attend(self.layer, absorbed, latent, None, 0.4, window=self.window)
            v = torch.einsum("thl,hvl->thv", mixed, self.value)
        else:
            k, v = (torch.einsum("til,hcl->thc", latent, weight) for weight in (self.key, self.value))
            v = context.attend(self.layer, q, k, v, 0.4, window=self.window, cache_entry=latent)
        return self.output(v.flatten(1))


class Recurrent(nn.Module):
    """A recurrence with two states: its own float32 vector, and the last input in the model's dtype."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input = nn.Linear(SIZE, SIZE)
        self.carry = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        rows = len(context.layout.lengths)
        kept = context.load_state(self.layer)
        state, last = kept if kept is not None else (x.new_zeros(rows, SIZE).float(), x.new_zeros(rows, SIZE))
        assert state.dtype == torch.float32 and last.dtype == x.dtype
        state, last = state.clone(), last.clone()
        out = torch.empty_like(x)
        token = 0
        for row, (length, parent) in enumerate(zip(context.layout.lengths, context.layout.parents, strict=True)):
            if parent >= 0:
                state[row], last[row] = state[parent], last[parent]
            for _ in range(length):
                state[row] = torch.tanh(
                    self.input(x[token]) + self.carry(last[row]) + 0.5 * state[row].to(x.dtype)
                ).float()
                last[row] = x[token]
                out[token] = state[row].to(x.dtype)
                token += 1
        context.store_state(self.layer, (state, last))
        return out


Kind = Callable[[int], nn.Module]


class HandMade(CausalLM):
    """One block for each of `kinds`; positions are learned."""

    def __init__(self, *kinds: Kind) -> None:
        super().__init__(SimpleNamespace(vocab_size=VOCAB, initializer_range=0.25))
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.position = nn.Embedding(256, SIZE)
        self.blocks = nn.ModuleList(kind(layer) for layer, kind in enumerate(kinds))
        self.norm = nn.LayerNorm(SIZE)
        self.head = LMHead(SIZE, VOCAB)
        self.init_weights(torch.Generator().manual_seed(1))

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`."""
        x = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            x = x + block(x, context)
        return Hidden(self.norm(x), {})


def windowed(window: int, softcap: float | None = None, sinks: bool = False) -> Kind:
    """Attention that sees the last `window` tokens."""
    return lambda layer: Attention(layer, window, softcap, sinks)


MODELS: dict[str, Callable[[], HandMade]] = {
    "full": lambda: HandMade(Attention, Attention),
    "window 1": lambda: HandMade(windowed(1), windowed(1)),
    "window 2": lambda: HandMade(windowed(2), windowed(2)),
    "windows within tails": lambda: HandMade(windowed(5), windowed(8)),
    "window over tails": lambda: HandMade(windowed(20), windowed(13)),
    "window over all": lambda: HandMade(windowed(1000), windowed(60)),
    "softcap and sinks": lambda: HandMade(
        windowed(6, 2.0, True), lambda layer: Attention(layer, softcap=1.0), lambda layer: Attention(layer, sinks=True)
    ),
    "latent": lambda: HandMade(Latent, Latent),
    "windowed latent": lambda: HandMade(lambda layer: Latent(layer, 5), lambda layer: Latent(layer, 20)),
    "recurrent": lambda: HandMade(Recurrent, Recurrent),
    "mixed": lambda: HandMade(windowed(5), Recurrent, Attention, windowed(9), Latent, Recurrent, windowed(5)),
}
