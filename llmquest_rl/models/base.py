"""What every decoder-only language model here has in common, and the table that ties one to the Hub's file layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmquest_rl.batch import TokenBatch
from llmquest_rl.layers.attention import AttentionContext, PackedAttention
from llmquest_rl.layers.lm_head import LMHead


class Hidden(NamedTuple):
    """Final hidden states, and losses that the model itself asks for."""

    states: Tensor
    """[tokens, size], after the last norm."""
    aux: dict[str, Tensor]
    """Scalar losses by name, already scaled (a router's balance loss); empty for dense models."""


class Output(NamedTuple):
    """What training needs to know about a batch's targets."""

    logprobs: Tensor
    """Float32 [targets]."""
    entropy: Tensor | None
    """Float32 [targets] in nats, without gradient; None unless asked for."""
    aux: dict[str, Tensor]


class ModelConfig(Protocol):
    """An architecture's shape."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def initializer_range(self) -> float: ...

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a config.json."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that gives this shape."""
        ...

    @classmethod
    def tiny(cls) -> Self:
        """A shape small enough for tests."""
        ...


class CausalLM(nn.Module):
    """A decoder. A subclass makes `embedding`, `blocks` and `head`, and implements `hidden`."""

    shares_prompts: ClassVar[bool] = True
    """Whether a prompt is computed once for all its completions. A model with a recurrent state says False."""

    head: LMHead
    blocks: nn.ModuleList

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        """Keep only each block's input and compute the rest again in backward: less memory, a third more time."""

    @property
    def num_layers(self) -> int:
        """Layers that call `context.attend`: what a cache has to hold."""
        return len(self.blocks)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of each layer."""
        return int(self.config.num_kv_heads)

    @property
    def head_dim(self) -> int:
        """Size of one key or value head."""
        return int(self.config.head_dim)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """Final hidden states of `tokens` [tokens] at `positions` [tokens], which see what `context` lets them see."""
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocab] of hidden `states` [n, size]."""
        return self.head.logits(states)

    def forward(self, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False) -> Output:
        """Log-probs of the batch's targets, in memory that does not grow with tokens x vocabulary."""
        context = PackedAttention(batch.layout, batch.tokens.device)
        states, aux = self.hidden(batch.tokens, batch.positions, context)
        logprobs, entropies = self.head(states.index_select(0, batch.sources), batch.targets, temperature, entropy)
        return Output(logprobs, entropies, aux)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Call one block, through gradient checkpointing where that is on and there is a gradient to compute."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights as the family starts from: matrices normal with `initializer_range`, biases 0, norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                values = torch.empty(parameter.shape, dtype=torch.float32)
                parameter.copy_(values.normal_(0.0, self.config.initializer_range, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@dataclass(frozen=True)
class HFMap:
    """How an architecture lies on disk. Each architecture file ends with one, named `HF`."""

    architecture: str
    """As in `architectures` of config.json."""
    config: type[ModelConfig]
    model: type[CausalLM]
    names: Mapping[str, str]
    """Our module path to the one on disk; `{i}` stands for a layer number. The ending (`.weight`, `.bias`) stays."""
    ignored: tuple[str, ...] = ()
    """Shell patterns of keys that old files carry and that hold no weights."""
