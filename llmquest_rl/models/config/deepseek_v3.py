"""The shape of a DeepSeek-V3 (arXiv:2412.19437) and its config.json.

Fields have the names of config.json, except for those that have a common name in all architectures here.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from llmquest_rl.layers.attention.mla import LatentShape
from llmquest_rl.layers.rope import rope_parameters, yarn_mscale
from llmquest_rl.models.config.checks import check_sizes, check_supported, check_whole_rotation

OTHER_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "tied": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
    "num_mtp_layers": "num_nextn_predict_layers",
}
"""The names in config.json of fields that have another name here."""

SUPPORTED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "seq_aux": True,
    "attention_dropout": 0.0,
}
"""Fields of config.json for which one value is implemented; a missing field has it."""

MAY_BE_ZERO = (
    "first_k_dense_replace",
    "num_mtp_layers",
    "aux_loss_alpha",
    "router_bias_update_rate",
    "mtp_loss_weight",
)
"""Fields that may be 0; all other sizes must be positive."""


@dataclass(frozen=True)
class DeepseekV3Config:
    """The shape of a DeepSeek-V3."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Intermediate size of the dense layers."""
    moe_intermediate_size: int
    """Intermediate size of one expert."""
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    """See `LatentShape` for this field and the next four."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    n_shared_experts: int
    """Width of the shared expert, in multiples of `moe_intermediate_size`."""
    num_experts_per_tok: int
    n_group: int
    """Number of groups of experts (nodes in the paper)."""
    topk_group: int
    """Number of groups that the experts of one token may come from."""
    first_k_dense_replace: int
    """Number of dense layers at the start."""
    routed_scaling_factor: float
    norm_topk_prob: bool
    """Whether the weights of a token's experts are divided by their sum."""
    num_mtp_layers: int = 0
    """Number of modules for multi-token prediction: D in section 2.2."""
    rms_norm_eps: float = 1e-6
    rope_interleave: bool = True
    attention_bias: bool = False
    tied: bool = False
    """The output layer shares the weight of the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 4096
    """Longest sequence the model was trained for, in tokens."""
    aux_loss_alpha: float = 0.0001
    """Coefficient of the sequence-wise balance loss: alpha in eq. 17."""
    router_bias_update_rate: float = 0.001
    """Step size of the bias of each expert, per update: gamma in section 2.1.2; 0 = the biases stay."""
    mtp_loss_weight: float = 0.3
    """Coefficient of the MTP loss: lambda in eq. 25; 0 = the modules are neither computed nor trained."""
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        sizes = [item.name for item in fields(self) if item.type is int]
        check_sizes(**{config_name(name): getattr(self, name) for name in sizes if name not in MAY_BE_ZERO})
        check_whole_rotation(self.rope)
        if self.q_lora_rank is not None:
            check_sizes(q_lora_rank=self.q_lora_rank)
        per_group = self.n_routed_experts // self.n_group
        faults = {
            f"{config_name(name)} {getattr(self, name)} is below 0": getattr(self, name) < 0 for name in MAY_BE_ZERO
        } | {
            f"qk_rope_head_dim {self.qk_rope_head_dim} is odd: RoPE rotates pairs of dimensions": (
                self.qk_rope_head_dim % 2 == 1
            ),
            f"n_routed_experts {self.n_routed_experts} in n_group {self.n_group}: expected groups of equal size with "
            "at least 2 experts": self.n_group * per_group != self.n_routed_experts or per_group < 2,
            f"topk_group {self.topk_group} is more than n_group {self.n_group}": self.topk_group > self.n_group,
            f"num_experts_per_tok {self.num_experts_per_tok} is more than topk_group {self.topk_group} groups hold": (
                self.num_experts_per_tok > self.topk_group * per_group
            ),
        }
        found = [message for message, holds in faults.items() if holds]
        if found:
            raise ValueError("; ".join(found))

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5, or of DeepSeek.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        if values.get("quantization_config"):
            raise ValueError("quantization_config: the weights are quantised; dequantise them to bfloat16 first")
        supported = {**SUPPORTED_VALUES, "num_key_value_heads": values.get("num_attention_heads")}
        check_supported({name: value for name, value in values.items() if value is not None}, supported, "DeepSeek-V3")
        ours = {config_name(item.name): item.name for item in fields(cls) if item.name != "rope"}
        given: dict[str, Any] = {ours[name]: value for name, value in values.items() if name in ours}
        given = {name: value for name, value in given.items() if value is not None or name == "q_lora_rank"}
        needed = [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
        missing = [config_name(name) for name in needed if name not in given]
        if missing:
            raise ValueError(f"config.json of a DeepSeek-V3 lacks {', '.join(missing)}")
        return cls(**given, rope=rope_parameters(values))

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        shape = {config_name(item.name): getattr(self, item.name) for item in fields(self) if item.name != "rope"}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **shape,
            **SUPPORTED_VALUES,
            "num_key_value_heads": self.num_heads,
            "rope_parameters": dict(self.rope),
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: a dense layer and one with eight experts in four groups."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_layers=2,
            num_heads=2,
            q_lora_rank=24,
            kv_lora_rank=512,  # the kernels of vLLM support only this rank, with 64 rotated dimensions
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            routed_scaling_factor=2.5,
            norm_topk_prob=True,
        )

    @property
    def attention(self) -> LatentShape:
        """The shape of latent attention. YaRN with `mscale_all_dim` multiplies the scores by the square of mscale."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope["rope_type"] != "default" and self.rope.get("mscale_all_dim"):
            scale *= yarn_mscale(self.rope["factor"], self.rope["mscale_all_dim"]) ** 2
        return LatentShape(
            self.hidden_size,
            self.num_heads,
            self.q_lora_rank,
            self.kv_lora_rank,
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
            scale,
            self.attention_bias,
            self.rope_interleave,
        )


def config_name(field_name: str) -> str:
    """Return the name in config.json of a field of `DeepseekV3Config`."""
    return OTHER_NAMES.get(field_name, field_name)
