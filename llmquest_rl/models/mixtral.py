"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the simplest sparse mixture of experts.

Llama's block with E large SwiGLU layers in place of one; a router picks two of them for each token. Optionally, the
capacity of each expert is limited in training, as in Switch (arXiv:2101.03961). Text only, on one device; parallelism,
caches and losses are elsewhere.
Shapes: T tokens of a pack, D hidden size, H query heads, K key/value heads, C head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.moe.experts import RoutedExperts, expert_capacity
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

SUPPORTED_VALUES: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0}
"""Fields of config.json for which one value is implemented; a missing field has it."""


@dataclass(frozen=True)
class MixtralConfig:
    """The shape of a Mixtral."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Intermediate size of one expert."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    """Coefficient of the load-balancing loss in training, a mean over layers; 0 = no such loss."""
    router_z_loss_coef: float = 0.0
    """Coefficient of the router z-loss in training, a mean over layers. This field of config.json is ours."""
    expert_capacity_factor: float | None = None
    """Capacity of an expert in training, in multiples of its even share of a batch; None = no limit. An expert skips
    the tokens above its capacity: these keep their other experts and the residual. Their outputs then depend on the
    batch, and their log-probs differ from those of the rollout. This field of config.json is ours."""
    window: int | None = None
    """Number of tokens that each layer attends to, the current one included; None = all."""
    rms_norm_eps: float = 1e-5
    tied: bool = False
    """The output layer shares the weight of the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 131072
    """Longest sequence the model was trained for, in tokens."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6})

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        check_sizes(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            max_position_embeddings=self.max_positions,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.num_experts_per_tok,
            sliding_window=1 if self.window is None else self.window,
        )
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        check_whole_rotation(self.rope)
        losses = {"router_aux_loss_coef": self.router_aux_loss_coef, "router_z_loss_coef": self.router_z_loss_coef}
        check_router(self.num_experts_per_tok, self.num_experts, "num_local_experts", **losses)
        factor = self.expert_capacity_factor
        if factor is not None and factor <= 0:
            raise ValueError(f"expert_capacity_factor is {factor}: expected a number above 0, or null for no limit")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        check_supported(values, SUPPORTED_VALUES, "Mixtral")
        kept = ["num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef", "expert_capacity_factor"]
        kept += ["rms_norm_eps", "initializer_range"]
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
                num_experts=values["num_local_experts"],
                window=values.get("sliding_window"),
                tied=values.get("tie_word_embeddings", False),
                max_positions=values.get("max_position_embeddings", 131072),
                rope=rope_parameters(values, default_theta=1e6),
                **{name: values[name] for name in kept if values.get(name) is not None},
            )
        except KeyError as missing:
            raise ValueError(f"config.json of a Mixtral lacks {missing}") from missing

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        return {
            "architectures": [HF.architecture],
            "model_type": "mixtral",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "router_z_loss_coef": self.router_z_loss_coef,
            "expert_capacity_factor": self.expert_capacity_factor,
            "sliding_window": self.window,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_positions,
            "rope_parameters": dict(self.rope),
            **SUPPORTED_VALUES,
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: four experts, two of them for each token."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            num_experts=4,
            max_positions=2048,
        )


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions, over all tokens or a
    sliding window (Beltagy et al. 2020, arXiv:2004.05150, section 3.1)."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.window = config.window
        self.query = Linear(config.hidden_size, width, bias=False)
        self.key = Linear(config.hidden_size, kv_width, bias=False)
        self.value = Linear(config.hidden_size, kv_width, bias=False)
        self.output = Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q = rotate(self.query(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, H, C]
        k = rotate(self.key(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5, window=self.window)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class MixtureOfExperts(nn.Module):
    """The SwiGLU layers with the highest router probabilities for each token. Their weights sum to 1, which equals a
    softmax over the chosen experts only (section 2.1)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.capacity_factor = config.expert_capacity_factor
        self.router = SoftmaxRouter(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalize=True)
        self.experts = RoutedExperts(config.num_experts, config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        routing = self.router(x)
        capacity = None
        if self.training and self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, routing.experts, routing.probs.shape[1])
        return self.experts(x, routing.experts, routing.weights, capacity), routing


class Block(nn.Module):
    """One layer: attention and experts, each with a norm before it and a residual connection around it."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> tuple[Tensor, Routing]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        added, routing = self.mlp(self.mlp_norm(x))
        return x + added, routing


class Mixtral(CausalLM):
    """The Mixtral language model."""

    def __init__(self, config: MixtralConfig) -> None:
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
            routings.append(routing)
        if not self.is_trained:
            return Hidden(self.norm(x), {})
        aux = router_losses(routings, self.config.router_aux_loss_coef, self.config.router_z_loss_coef)
        return Hidden(self.norm(x), aux, router_load(routings))


HF = HFMap(
    architecture="MixtralForCausalLM",
    config=MixtralConfig,
    model=Mixtral,
    classifier="MixtralForSequenceClassification",
    vllm=VllmLimits(),
    names={
        "embedding": "model.embed_tokens",
        "blocks.{i}.attention_norm": "model.layers.{i}.input_layernorm",
        "blocks.{i}.attention.query": "model.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.key": "model.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.value": "model.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.output": "model.layers.{i}.self_attn.o_proj",
        "blocks.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "blocks.{i}.mlp.router": "model.layers.{i}.block_sparse_moe.gate",
        "blocks.{i}.mlp.experts.gate_up": Experts("model.layers.{i}.block_sparse_moe.experts.{e}", ("w1", "w3")),
        "blocks.{i}.mlp.experts.down": Experts("model.layers.{i}.block_sparse_moe.experts.{e}", ("w2",)),
        "norm": "model.norm",
        "head": "lm_head",
    },
)
