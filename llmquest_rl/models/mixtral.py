"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): the sparse mixture of experts in its plainest form.

Llama's block with E large SwiGLU layers in place of one, of which a router picks two for each token. Optionally, each
expert takes a limited number of tokens in training, as in Switch. Text only, one device: parallelism, caches and losses
live elsewhere.
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
from llmquest_rl.models.config_checks import check_heads, check_sizes, check_whole_rotation, head_dim_of
from llmquest_rl.models.weight_map import Experts, HFMap

ONLY: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0}
"""Fields of config.json for which one value is implemented; they may be left out."""


@dataclass(frozen=True)
class MixtralConfig:
    """The shape of a Mixtral."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of one expert."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.001
    """Weight of the experts' balance loss in training, mean over layers; 0 = without."""
    router_z_loss_coef: float = 0.0
    """Weight of the router z-loss in training, mean over layers. Our own field of config.json."""
    expert_capacity_factor: float | None = None
    """In training an expert takes at most this many times its even share of a batch; None = all that come. A token that
    it does not take keeps its other experts and the residual: its output then depends on the batch, and its log-prob is
    not the one of a rollout. Our own field of config.json."""
    window: int | None = None
    """Tokens that each layer sees, the newest included; None = all."""
    rms_norm_eps: float = 1e-5
    tied: bool = False
    """The output layer is the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 131072
    """Longest sequence the model was trained for, in tokens."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 1e6})

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be, by the names in config.json."""
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
        chosen, experts, factor = self.num_experts_per_tok, self.num_experts, self.expert_capacity_factor
        if chosen > experts:
            raise ValueError(f"num_experts_per_tok {chosen} is more than num_local_experts {experts}")
        if min(self.router_aux_loss_coef, self.router_z_loss_coef) < 0:
            raise ValueError("router_aux_loss_coef and router_z_loss_coef weigh losses: expected 0 or more")
        if factor is not None and factor <= 0:
            raise ValueError(f"expert_capacity_factor is {factor}: expected a number above 0, or null for no limit")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a field without which the shape is unknown is missing, or one asks for what is not implemented.
        """
        for name, value in ONLY.items():
            if values.get(name, value) != value:
                raise ValueError(f"config.json asks for {name} {values[name]!r}; Mixtral here has {value!r} only")
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
        """A config.json that transformers 5 and vLLM read."""
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
            **ONLY,
        }

    @classmethod
    def tiny(cls) -> Self:
        """For tests: four experts, two of them for each token."""
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
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions, over a window of tokens
    (Beltagy et al. 2020, arXiv:2004.05150, section 3.1) or all."""

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
        """`x` [T, D] to the same shape."""
        q = rotate(self.query(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, H, C]
        k = rotate(self.key(x).unflatten(-1, (-1, self.head_dim)), rotary)  # [T, K, C]
        v = self.value(x).unflatten(-1, (-1, self.head_dim))  # [T, K, C]
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5, window=self.window)  # [T, H, C]
        out: Tensor = self.output(mixed.flatten(1))
        return out


class MixtureOfExperts(nn.Module):
    """The most probable SwiGLU layers for each token; their weights sum to 1, so that the softmax could as well be over
    the chosen ones alone (section 2.1)."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.capacity_factor = config.expert_capacity_factor
        self.router = SoftmaxRouter(config.hidden_size, config.num_experts, config.num_experts_per_tok, normalize=True)
        self.experts = RoutedExperts(config.num_experts, config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """`x` [T, D] to the same shape, and where its tokens went."""
        routing = self.router(x)
        capacity = None
        if self.training and self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, routing.experts, routing.probs.shape[1])
        return self.experts(x, routing.experts, routing.weights, capacity), routing


class Block(nn.Module):
    """One layer: attention and experts, each normalised before and added after."""

    def __init__(self, config: MixtralConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> tuple[Tensor, Routing]:
        """`x` [T, D] to the same shape, and where its tokens went."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        added, routing = self.mlp(self.mlp_norm(x))
        return x + added, routing


class Mixtral(CausalLM):
    """The whole model."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)
        self.rope = RoPE(config.head_dim, config.rope)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`. The routers' losses and loads are computed where the model is trained only."""
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
