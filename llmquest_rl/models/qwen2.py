"""Qwen2 (Yang et al. 2024, arXiv:2407.10671, section 2.2.1), Qwen2.5 (arXiv:2412.15115, section 2) and Qwen2.5-Math.

Llama's block with biases on queries, keys and values and on nothing else. Layers may attend to a sliding window.
Text only, on one device; parallelism, caches and losses are elsewhere.
Shapes: T tokens of a pack, D hidden size, H query heads, K key/value heads, C head size.
"""

from collections.abc import Iterator, Mapping
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
    FULL,
    SLIDING,
    check_heads,
    check_sizes,
    check_supported,
    check_whole_rotation,
    check_windows,
    head_dim_of,
    windowed_layers,
)
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap


@dataclass(frozen=True)
class Qwen2Config:
    """The shape of a Qwen2."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    """`SLIDING` or `FULL` for each layer; all layers of the published models are full."""
    tied: bool
    """The output layer shares the weight of the embedding."""
    window: int | None = None
    """Number of tokens that a sliding layer attends to, the current one included."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 32768
    """Longest sequence the model was trained for, in tokens."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6})

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
        check_whole_rotation(self.rope)
        check_windows(self.layer_types, self.window)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        check_supported(values, SUPPORTED_VALUES, "Qwen2")
        window = values.get("sliding_window", 4096) if values.get("use_sliding_window", False) else None
        try:
            heads = values["num_attention_heads"]
            kv_heads = values.get("num_key_value_heads")
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                num_heads=heads,
                num_kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=head_dim_of(values),
                layer_types=windowed_layers(values, window),
                tied=values.get("tie_word_embeddings", False),
                window=window,
                rms_norm_eps=values.get("rms_norm_eps", 1e-6),
                initializer_range=values.get("initializer_range", 0.02),
                max_positions=values.get("max_position_embeddings", 32768),
                rope=rope_parameters(values),
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a Qwen2 lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "layer_types": list(self.layer_types),
            "use_sliding_window": self.window is not None,
            "sliding_window": self.window,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
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
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            layer_types=(FULL, FULL),
            tied=True,
            max_positions=2048,
        )


SUPPORTED_VALUES: dict[str, Any] = {"hidden_act": "silu", "is_causal": True, "dual_chunk_attention_config": None}
"""Fields of config.json for which one value is implemented; a missing field has it. Embedding models made of a Qwen2
are not causal, and the 1M models split texts longer than a chunk (arXiv:2501.15383)."""


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with biases on queries, keys and values, and none
    on the output."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window if config.layer_types[layer] == SLIDING else None
        self.query = Linear(config.hidden_size, width, bias=True)
        self.key = Linear(config.hidden_size, kv_width, bias=True)
        self.value = Linear(config.hidden_size, kv_width, bias=True)
        self.output = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q = rotate(self.query(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, H, C]
        k = rotate(self.key(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5, window=self.window)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Qwen2(CausalLM):
    """The Qwen2 language model."""

    def __init__(self, config: Qwen2Config) -> None:
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


def _vllm_problems(config: Qwen2Config) -> Iterator[str]:
    """See `VllmLimits.problems`."""
    if {SLIDING, FULL} <= set(config.layer_types):
        yield "layer_types mixes full and sliding attention"
    if config.head_dim * config.num_heads != config.hidden_size:
        yield f"head_dim is {config.head_dim}, but vLLM supports only hidden_size / num_attention_heads"


HF = HFMap(
    architecture="Qwen2ForCausalLM",
    config=Qwen2Config,
    model=Qwen2,
    classifier="Qwen2ForSequenceClassification",
    vllm=VllmLimits(problems=_vllm_problems),
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
)
