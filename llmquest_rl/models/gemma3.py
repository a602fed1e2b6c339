"""Gemma 3, text (Gemma Team 2025, arXiv:2503.19786, section 2; parts from Gemma 2, arXiv:2408.00118, section 2).

Most layers attend to a short sliding window, every sixth one to the whole text; each type of layer has its own rotary
parameters. Attention and feed-forward have norms before *and* after them, queries and keys are normalised, and the
feed-forward is GeGLU. The vision tower of the larger checkpoints is not implemented.
Shapes: T tokens of a pack, D hidden size, H query heads, K key/value heads, C head size, W window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.mlp import GatedMLP, check_activation
from llmquest_rl.layers.norm import OffsetRMSNorm
from llmquest_rl.layers.rope import RoPE, Rotary, rope_parameters, rotate
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.checks import (
    FULL,
    SLIDING,
    check_heads,
    check_sizes,
    check_whole_rotation,
    check_windows,
    listed_layer_types,
)
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap


@dataclass(frozen=True)
class Gemma3Config:
    """The shape of a Gemma 3."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scalar: float
    """Attention scores are divided by its square root. It is the head size in all published checkpoints but 27B."""
    layer_types: tuple[str, ...]
    """`SLIDING` or `FULL` for each layer."""
    window: int | None
    """Number of tokens that a sliding layer attends to, the current one included."""
    rope: Mapping[str, Mapping[str, Any]]
    """Rotary parameters of each type of layer."""
    rms_norm_eps: float = 1e-6
    tied: bool = True
    """The output layer shares the weight of the embedding."""
    activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    attention_softcap: float | None = None
    """Soft cap of attention scores: `cap * tanh(score / cap)`; None = no cap, as in all published checkpoints."""
    final_softcap: float | None = None
    """Soft cap of the output logits; None = no cap."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 131072
    """Longest sequence the model was trained for, in tokens."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        check_sizes(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.max_positions,
        )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        check_activation(self.activation, "hidden_activation")
        check_windows(self.layer_types, self.window)
        for rope in self.rope.values():
            check_whole_rotation(rope)
        caps = {"attn_logit_softcapping": self.attention_softcap, "final_logit_softcapping": self.final_softcap}
        for name, value in {**caps, "query_pre_attn_scalar": self.query_scalar}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} {value} is not positive")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        if values.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention is true: only causal attention is implemented")
        try:
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                num_heads=values["num_attention_heads"],
                num_kv_heads=values["num_key_value_heads"],
                head_dim=values["head_dim"],
                query_scalar=values["query_pre_attn_scalar"],
                layer_types=layer_types(values),
                window=values.get("sliding_window"),
                rope=rope_by_kind(values),
                rms_norm_eps=values.get("rms_norm_eps", 1e-6),
                tied=values.get("tie_word_embeddings", True),
                activation=values.get("hidden_activation", "gelu_pytorch_tanh"),
                attention_bias=values.get("attention_bias", False),
                attention_softcap=values.get("attn_logit_softcapping"),
                final_softcap=values.get("final_logit_softcapping"),
                initializer_range=values.get("initializer_range", 0.02),
                max_positions=values.get("max_position_embeddings", 131072),
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a Gemma 3 lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "gemma3_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "query_pre_attn_scalar": self.query_scalar,
            "layer_types": list(self.layer_types),
            "sliding_window": self.window,
            "rope_parameters": {kind: dict(parameters) for kind, parameters in self.rope.items()},
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "hidden_activation": self.activation,
            "attention_bias": self.attention_bias,
            "attn_logit_softcapping": self.attention_softcap,
            "final_logit_softcapping": self.final_softcap,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: a sliding layer and a full one, a window shorter than the texts of most tests."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            query_scalar=32,
            layer_types=(SLIDING, FULL),
            window=8,
            rope=rope_by_kind({}),
            max_positions=2048,
        )


def layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the type of each layer: `layer_types`, or in older files `sliding_window_pattern` (every n-th is full).

    Raises:
        ValueError: `layer_types` has another length than the number of layers, or the pattern is not positive.
    """
    listed = listed_layer_types(values)
    if listed is not None:
        return listed
    period = values.get("sliding_window_pattern", 6)
    check_sizes(sliding_window_pattern=period)
    return tuple(FULL if (layer + 1) % period == 0 else SLIDING for layer in range(values["num_hidden_layers"]))


def rope_by_kind(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of each type of layer, from the nested fields of transformers 5 or those of 4.

    Raises:
        ValueError: `rope_parameters` is not nested.
    """
    nested = values.get("rope_parameters") or {}
    if not set(nested) <= {SLIDING, FULL}:
        raise ValueError(f"rope_parameters holds {sorted(nested)}: expected one group for each of {SLIDING}, {FULL}")
    local = {**values, "rope_scaling": None, "rope_theta": values.get("rope_local_base_freq")}
    return {SLIDING: rope_parameters(local, SLIDING, 1e4), FULL: rope_parameters(values, FULL, 1e6)}


class Attention(nn.Module):
    """Grouped-query attention over a sliding window or the whole text, with normalised queries and keys."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.query_scalar**-0.5
        self.window = config.window if config.layer_types[layer] == SLIDING else None
        self.softcap = config.attention_softcap
        self.query = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.key = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.value = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.output = Linear(width, config.hidden_size, bias=config.attention_bias)
        self.query_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q = rotate(self.query_norm(self.query(x).unflatten(-1, (-1, self.head_dim))), rotary)  # [T, H, C]
        k = rotate(self.key_norm(self.key(x).unflatten(-1, (-1, self.head_dim))), rotary)  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        mixed = context.attend(self.layer, q, k, v, self.scale, window=self.window, softcap=self.softcap)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with norms before and after it, and a residual around them."""

    def __init__(self, config: Gemma3Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.attention_out_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation=config.activation)
        self.mlp_out_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), rotary, context))
        out: Tensor = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return out


class Gemma3(CausalLM):
    """The Gemma 3 language model."""

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        tied_to = self.embedding.weight if config.tied else None
        self.head = LMHead(config.hidden_size, config.vocab_size, tied_to, config.final_softcap)
        self.ropes = {kind: RoPE(config.head_dim, config.rope[kind]) for kind in sorted(set(config.layer_types))}

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`."""
        x = self.embedding(tokens)  # [T, D]
        x = x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)  # rounded to the dtype, as in the published model
        rotaries = {kind: rope(positions, x.dtype) for kind, rope in self.ropes.items()}
        for kind, block in zip(self.config.layer_types, self.blocks, strict=True):
            x = self.run_block(block, x, rotaries[kind], context)
        return Hidden(self.norm(x), {})

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """See `Model.init_weights`. The weights of norms start at 0, because 1 is added to them."""
        super().init_weights(generator)
        for module in self.modules():
            if isinstance(module, OffsetRMSNorm):
                module.weight.zero_()


HF = HFMap(
    architecture="Gemma3ForCausalLM",
    config=Gemma3Config,
    model=Gemma3,
    classifier="Gemma3TextForSequenceClassification",
    vllm=VllmLimits(only={"attn_logit_softcapping": None}),
    names={
        "embedding": "model.embed_tokens",
        "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.attention.query_norm": "model.layers.{i}.self_attn.q_norm",
        "blocks.{i}.attention.key_norm": "model.layers.{i}.self_attn.k_norm",
        "blocks.{i}.attention_out_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
        "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "blocks.{i}.mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm",
        "norm": "model.norm",
        "head": "lm_head",
    },
    refused={
        "Gemma3ForConditionalGeneration": "the multimodal Gemma 3; only its text part is implemented. "
        "Write that part to its own folder first, as docs/models/gemma3.md shows"
    },
)
