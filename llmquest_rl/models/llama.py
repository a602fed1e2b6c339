"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783, section 3.2), and SmolLM2.

A pre-norm decoder with RMSNorm, grouped-query attention, rotary positions and SwiGLU, without dropout.
Text only, on one device; parallelism, caches and losses are elsewhere.
Shapes: T tokens of a pack, D hidden size, H query heads, K key/value heads, C head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.mlp import GatedMLP
from llmquest_rl.layers.norm import RMSNorm
from llmquest_rl.layers.rope import RoPE, Rotary, rope_parameters, rotate
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.checks import (
    check_heads,
    check_sizes,
    check_supported,
    check_whole_rotation,
    head_dim_of,
)
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tied: bool
    """The output layer shares the weight of the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 2048
    """Longest sequence the model was trained for, in tokens."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

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
        check_whole_rotation(self.rope)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        check_supported(values, {"hidden_act": "silu"}, "Llama")
        try:
            heads = values["num_attention_heads"]
            kv_heads = values.get("num_key_value_heads")
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                num_layers=values["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=head_dim_of(values),
                rms_norm_eps=values.get("rms_norm_eps", 1e-6),
                tied=values.get("tie_word_embeddings", False),
                attention_bias=values.get("attention_bias", False),
                mlp_bias=values.get("mlp_bias", False),
                initializer_range=values.get("initializer_range", 0.02),
                max_positions=values.get("max_position_embeddings", 2048),
                rope=rope_parameters(values),
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a Llama lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": dict(self.rope),
            "hidden_act": "silu",
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: two query heads on one key/value head, tied."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            rms_norm_eps=1e-5,
            tied=True,
        )


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.query = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.key = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.value = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.output = Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q = rotate(self.query(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, H, C]
        k = rotate(self.key(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(CausalLM):
    """The Llama language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)
        self.rope = RoPE(config.head_dim, config.rope)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`."""
        x = self.embedding(tokens)  # [T, D]
        rotary = self.rope(positions, x.dtype)
        for block in self.blocks:
            x = self.run_block(block, x, rotary, context)
        return Hidden(self.norm(x), {})


HF = HFMap(
    architecture="LlamaForCausalLM",
    config=LlamaConfig,
    model=Llama,
    classifier="LlamaForSequenceClassification",
    vllm=VllmLimits(),
    names={
        "embedding": "model.embed_tokens",
        "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
        "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
