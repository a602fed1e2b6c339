"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3).

A pre-norm decoder with LayerNorm, learned absolute positions, multi-head attention, a feed-forward layer with GELU, and
biases everywhere. Published configurations ask for a dropout of 0.1; we train without it, because rollouts have none.
It runs on one device; parallelism, caches and losses are elsewhere.
Shapes: T tokens of a pack, D hidden size, H heads, C = D / H head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.mlp import MLP, check_activation
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.checks import check_sizes
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap, Transposed


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 1024
    """Longest sequence in tokens: the number of learned position vectors."""
    layer_norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tied: bool = True
    """The output layer shares the weight of the embedding."""
    scaled_by_head: bool = True
    """Whether attention scores are divided by the square root of the head size."""
    scaled_by_layer: bool = False
    """Whether attention scores are divided by the index of the layer, counted from 1 (Stanford's Mistral models)."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        check_sizes(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_inner=self.intermediate_size,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            n_positions=self.max_positions,
        )
        if self.hidden_size % self.num_heads:
            raise ValueError(f"n_embd {self.hidden_size} is not a multiple of n_head {self.num_heads}")
        check_activation(self.activation, "activation_function")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        if values.get("add_cross_attention"):
            raise ValueError("config.json asks for add_cross_attention: GPT-2 here is a decoder without an encoder")
        inner = values.get("n_inner")
        try:
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["n_embd"],
                intermediate_size=4 * values["n_embd"] if inner is None else inner,
                num_layers=values["n_layer"],
                num_heads=values["n_head"],
                max_positions=values.get("n_positions", 1024),
                layer_norm_eps=values.get("layer_norm_epsilon", 1e-5),
                activation=values.get("activation_function", "gelu_new"),
                tied=values.get("tie_word_embeddings", True),
                scaled_by_head=values.get("scale_attn_weights", True),
                scaled_by_layer=values.get("scale_attn_by_inverse_layer_idx", False),
                initializer_range=values.get("initializer_range", 0.02),
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a GPT-2 lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_embd": self.hidden_size,
            "n_inner": self.intermediate_size,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "n_positions": self.max_positions,
            "layer_norm_epsilon": self.layer_norm_eps,
            "activation_function": self.activation,
            "tie_word_embeddings": self.tied,
            "scale_attn_weights": self.scaled_by_head,
            "scale_attn_by_inverse_layer_idx": self.scaled_by_layer,
            "initializer_range": self.initializer_range,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: two heads, tied."""
        return cls(vocab_size=256, hidden_size=64, intermediate_size=256, num_layers=2, num_heads=2)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2), with queries, keys and values from
    one matrix. Scores are float32 in a model of any dtype, as `reorder_and_upcast_attn` requires."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.scale = (config.hidden_size // config.num_heads) ** -0.5 if config.scaled_by_head else 1.0
        self.scale /= layer + 1 if config.scaled_by_layer else 1
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [T, H, C] each
        mixed = context.attend(self.layer, q, k, v, self.scale)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.activation)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        x = x + self.attention(self.attention_norm(x), context)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT2(CausalLM):
    """The GPT-2 language model."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`.

        Raises:
            ValueError: a sequence is longer than `n_positions`.
        """
        _check_lengths(context.layout, self.config.max_positions)
        x = self.embedding(tokens) + self.positions(positions)  # [T, D]
        for block in self.blocks:
            x = self.run_block(block, x, context)
        return Hidden(self.norm(x), {})

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """See `Model.init_weights`. The matrices that write to the residual stream are divided by the square root of
        their number, two for each layer (section 2.3)."""
        super().init_weights(generator)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.mul_((2 * self.config.num_layers) ** -0.5)


def _check_lengths(layout: Layout, longest: int) -> None:
    """Check that no sequence is longer than the learned positions.

    The check reads the layout, because the positions may be on a device and reading them would wait for it. While
    decoding the layout has no lengths; there engines limit the context by the configuration.

    Raises:
        ValueError: a sequence is longer.
    """
    lengths = layout.lengths
    for length, parent in zip(lengths, layout.parents, strict=True):
        total = length + (lengths[parent] if parent >= 0 else 0)
        if total > longest:
            raise ValueError(
                f"a sequence has {total} tokens, but this GPT-2 has learned positions only for n_positions {longest}: "
                "shorten the sequences of the data"
            )


HF = HFMap(
    architecture="GPT2LMHeadModel",
    config=GPT2Config,
    model=GPT2,
    classifier="GPT2ForSequenceClassification",
    vllm=VllmLimits(
        only={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        }
    ),
    names={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "blocks.{i}.attention_norm": "transformer.h.{i}.ln_1",
        "blocks.{i}.attention.query_key_value": Transposed("transformer.h.{i}.attn.c_attn"),
        "blocks.{i}.attention.output": Transposed("transformer.h.{i}.attn.c_proj"),
        "blocks.{i}.mlp_norm": "transformer.h.{i}.ln_2",
        "blocks.{i}.mlp.up": Transposed("transformer.h.{i}.mlp.c_fc"),
        "blocks.{i}.mlp.down": Transposed("transformer.h.{i}.mlp.c_proj"),
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    ignored=tuple(f"{prefix}h.*.attn.{mask}" for prefix in ("", "transformer.") for mask in ("bias", "masked_bias")),
    prefix="transformer.",
)
"""The file of the first GPT-2 has no prefix. Some files hold the causal mask (`attn.bias`), which is not a weight."""
