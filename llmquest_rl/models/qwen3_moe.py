"""Qwen3-MoE (Yang et al. 2025, arXiv:2505.09388, section 2): 30B-A3B and 235B-A22B.

Qwen3's block with many small experts in place of the feed-forward layer: a router picks k of E for each token, and no
expert is shared. Text only, on one device; parallelism, caches and losses are elsewhere.
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
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.layers.moe.moe import Routing, SoftmaxRouter, router_load, router_losses
from llmquest_rl.layers.norm import RMSNorm
from llmquest_rl.layers.rope import RoPE, Rotary, rope_parameters, rotate
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.checks import (
    check_heads,
    check_router,
    check_sizes,
    check_supported,
    check_whole_rotation,
    head_dim_of,
)
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import Experts, HFMap

SUPPORTED_VALUES: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0}
"""Fields of config.json for which one value is implemented; a missing field has it."""


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """The shape of a Qwen3-MoE."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Intermediate size of dense feed-forward layers; the published models have none."""
    moe_intermediate_size: int
    """Intermediate size of one expert."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    """Whether the weights of a token's experts are divided by their sum. It is true in the published models."""
    decoder_sparse_step: int = 1
    """Every n-th layer has experts, counted from 1."""
    mlp_only_layers: tuple[int, ...] = ()
    """Indices of layers that have a dense feed-forward layer in any case."""
    router_aux_loss_coef: float = 0.001
    """Coefficient of the load-balancing loss in training, a mean over layers; 0 = no such loss."""
    router_z_loss_coef: float = 0.0
    """Coefficient of the router z-loss in training, a mean over layers. This field of config.json is ours."""
    tied: bool = False
    """The output layer shares the weight of the embedding."""
    window: int | None = None
    """Number of tokens that each layer attends to, the current one included; None = all, as in the published models."""
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    initializer_range: float = 0.02
    max_positions: int = 32768
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6})

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        check_sizes(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            moe_intermediate_size=self.moe_intermediate_size,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.max_positions,
            decoder_sparse_step=self.decoder_sparse_step,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            sliding_window=1 if self.window is None else self.window,
        )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        check_whole_rotation(self.rope)
        losses = {"router_aux_loss_coef": self.router_aux_loss_coef, "router_z_loss_coef": self.router_z_loss_coef}
        check_router(self.num_experts_per_tok, self.num_experts, "num_experts", **losses)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        check_supported(values, SUPPORTED_VALUES, "Qwen3-MoE")
        kept = ["norm_topk_prob", "decoder_sparse_step", "router_aux_loss_coef", "router_z_loss_coef"]
        kept += ["rms_norm_eps", "attention_bias", "initializer_range"]
        try:
            heads = values["num_attention_heads"]
            kv_heads = values.get("num_key_value_heads")
            return cls(
                vocab_size=values["vocab_size"],
                hidden_size=values["hidden_size"],
                intermediate_size=values["intermediate_size"],
                moe_intermediate_size=values["moe_intermediate_size"],
                num_layers=values["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=head_dim_of(values),
                num_experts=values["num_local_experts" if "num_local_experts" in values else "num_experts"],
                num_experts_per_tok=values["num_experts_per_tok"],
                mlp_only_layers=tuple(values.get("mlp_only_layers") or ()),
                tied=values.get("tie_word_embeddings", False),
                window=values.get("sliding_window", 4096) if values.get("use_sliding_window", False) else None,
                max_positions=values.get("max_position_embeddings", 32768),
                rope=rope_parameters(values),
                **{name: values[name] for name in kept if values.get(name) is not None},
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a Qwen3-MoE lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": self.decoder_sparse_step,
            "mlp_only_layers": list(self.mlp_only_layers),
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "router_z_loss_coef": self.router_z_loss_coef,
            "use_sliding_window": self.window is not None,
            "sliding_window": self.window,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": dict(self.rope),
            **SUPPORTED_VALUES,
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: eight experts, three of them for each token, and a dense first layer."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            mlp_only_layers=(0,),
        )

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts instead of a dense feed-forward layer."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with normalised queries and keys (Dehghani et al.
    2023, arXiv:2302.05442, section 2). All heads share one norm."""

    def __init__(self, config: Qwen3MoeConfig, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window
        self.query = Linear(config.hidden_size, width, bias=config.attention_bias)
        self.key = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.value = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.output = Linear(width, config.hidden_size, bias=config.attention_bias)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q = self.query_norm(self.query(x).unflatten(-1, (-1, self.head_dim)))  # [T, H, C]
        k = self.key_norm(self.key(x).unflatten(-1, (-1, self.head_dim)))  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        q, k = rotate(q, rotary), rotate(k, rotary)
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5, window=self.window)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class MixtureOfExperts(nn.Module):
    """The k of E small SwiGLU layers with the highest router probabilities for each token."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__()
        experts, size = config.num_experts, config.hidden_size
        self.router = SoftmaxRouter(size, experts, config.num_experts_per_tok, config.norm_topk_prob)
        self.experts = RoutedExperts(experts, size, config.moe_intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        routing = self.router(x)
        return self.experts(x, routing.experts, routing.weights), routing


class Block(nn.Module):
    """One layer: attention and experts or a dense feed-forward, each with a norm before and a residual around it."""

    def __init__(self, config: Qwen3MoeConfig, layer: int) -> None:
        super().__init__()
        self.has_experts = config.has_experts(layer)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = (config.hidden_size, config.intermediate_size)
        self.mlp = MixtureOfExperts(config) if self.has_experts else GatedMLP(*dense)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> tuple[Tensor, Routing | None]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        normed = self.mlp_norm(x)
        added, routing = self.mlp(normed) if self.has_experts else (self.mlp(normed), None)
        return x + added, routing


class Qwen3Moe(CausalLM):
    """The Qwen3-MoE language model."""

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)
        self.rope = RoPE(config.head_dim, config.rope)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`. Losses and loads of the routers are computed in training only."""
        x = self.embedding(tokens)  # [T, D]
        rotary = self.rope(positions, x.dtype)
        routings = []
        for block in self.blocks:
            x, routing = self.run_block(block, x, rotary, context)
            routings += [routing] if routing is not None else []
        if not (routings and self.is_trained):
            return Hidden(self.norm(x), {})
        aux = router_losses(routings, self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
        return Hidden(self.norm(x), aux, router_load(routings))


HF = HFMap(
    architecture="Qwen3MoeForCausalLM",
    config=Qwen3MoeConfig,
    model=Qwen3Moe,
    classifier="Qwen3MoeForSequenceClassification",
    vllm=VllmLimits(only={"attention_bias": False}),
    names={
        "embedding": "model.embed_tokens",
        "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.attention.query_norm": "model.layers.{i}.self_attn.q_norm",
        "blocks.{i}.attention.key_norm": "model.layers.{i}.self_attn.k_norm",
        "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
        "blocks.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
        "blocks.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
        "blocks.{i}.mlp.router": "model.layers.{i}.mlp.gate",
        "blocks.{i}.mlp.experts.gate_up": Experts(
            "model.layers.{i}.mlp.experts.{e}", ("gate_proj", "up_proj"), "model.layers.{i}.mlp.experts.gate_up_proj"
        ),
        "blocks.{i}.mlp.experts.down": Experts(
            "model.layers.{i}.mlp.experts.{e}", ("down_proj",), "model.layers.{i}.mlp.experts.down_proj"
        ),
        "norm": "model.norm",
        "head": "lm_head",
    },
)
