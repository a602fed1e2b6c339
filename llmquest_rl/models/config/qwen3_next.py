"""The shape of a Qwen3-Next and its config.json.

Fields have the names of config.json, except for those that have a common name in all architectures here.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from llmquest_rl.layers.rope import RoPE, rope_parameters
from llmquest_rl.models.config.checks import check_heads, check_sizes, check_supported, listed_layer_types

LINEAR, FULL = "linear_attention", "full_attention"
"""The types of layers, in the words of config.json."""

OTHER_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tied": "tie_word_embeddings",
    "max_positions": "max_position_embeddings",
}
"""The names in config.json of fields that have another name here."""

DERIVED = ("layer_types", "mlp_only_layers", "rope", "num_mtp_layers")
"""Fields that are not read from one value of config.json."""

SUPPORTED_VALUES: dict[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0}
"""Fields of config.json for which one value is implemented; a missing field has it."""


@dataclass(frozen=True)
class Qwen3NextConfig:
    """The shape of a Qwen3-Next."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Intermediate size of dense feed-forward layers; the published models have none."""
    num_heads: int
    """Number of query heads of full attention."""
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    """`LINEAR` or `FULL` for each layer."""
    linear_num_key_heads: int
    """Number of query heads and of key heads in linear attention; each serves the same number of value heads."""
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    """Width in tokens of the convolution before linear attention."""
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    """Intermediate size of one expert."""
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    decoder_sparse_step: int = 1
    """Every n-th layer has experts, counted from 1; the others are dense."""
    mlp_only_layers: tuple[int, ...] = ()
    """Indices of layers that are dense in any case."""
    router_aux_loss_coef: float = 0.001
    """Coefficient of the load-balancing loss in training, a mean over layers; 0 = no such loss."""
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tied: bool = False
    """The output layer shares the weight of the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of random weights."""
    max_positions: int = 32768
    """Longest sequence the model was trained for, in tokens."""
    rope: Mapping[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    )
    num_mtp_layers: int = 0
    """Number of layers of the MTP module in the weight files; config.json does not hold it."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes; messages use the names of config.json."""
        sizes = {_config_name(item.name): getattr(self, item.name) for item in fields(self) if item.type is int}
        del sizes["num_mtp_layers"]
        check_sizes(num_hidden_layers=self.num_layers, **sizes)
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        RoPE(self.head_dim, self.rope)  # raises an error if the rotation is impossible
        unknown = sorted({str(kind) for kind in self.layer_types} - {LINEAR, FULL})
        outside = [layer for layer in self.mlp_only_layers if layer not in range(self.num_layers)]
        faults = {
            f"layer_types holds {unknown}: expected {LINEAR!r} or {FULL!r}": unknown,
            f"mlp_only_layers {outside} are not among the {self.num_layers} layers": outside,
            f"linear_num_value_heads {self.linear_num_value_heads} is not a multiple of linear_num_key_heads "
            f"{self.linear_num_key_heads}": self.linear_num_value_heads % self.linear_num_key_heads,
            f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}": (
                self.num_experts_per_tok > self.num_experts
            ),
            f"router_aux_loss_coef {self.router_aux_loss_coef} is below 0": self.router_aux_loss_coef < 0,
        }
        found = [message for message, holds in faults.items() if holds]
        if found:
            raise ValueError("; ".join(found))

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """Read a config.json of transformers 4 or 5.

        Raises:
            ValueError: a required field is missing, or a value is not implemented.
        """
        if values.get("quantization_config"):
            raise ValueError("quantization_config: the weights are quantised; dequantise them to bfloat16 first")
        check_supported(
            {name: value for name, value in values.items() if value is not None}, SUPPORTED_VALUES, "Qwen3-Next"
        )
        plain = [item for item in fields(cls) if item.name not in DERIVED]
        found: dict[str, Any] = {item.name: values.get(_config_name(item.name)) for item in plain}
        given = {name: value for name, value in found.items() if value is not None}
        missing = [_config_name(item.name) for item in plain if item.default is MISSING and item.name not in given]
        if values.get("num_hidden_layers") is None:
            missing.append("num_hidden_layers")
        if missing:
            raise ValueError(f"config.json of a Qwen3-Next lacks {', '.join(missing)}")
        return cls(
            **given,
            layer_types=_layer_types(values),
            mlp_only_layers=tuple(values.get("mlp_only_layers") or ()),
            rope={"partial_rotary_factor": 0.25, **rope_parameters(values)},
        )

    def to_hf(self) -> dict[str, Any]:
        """Return a config.json that transformers 5 and vLLM read."""
        plain = [item.name for item in fields(self) if item.name not in DERIVED]
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            **{_config_name(name): getattr(self, name) for name in plain},
            **SUPPORTED_VALUES,
            "num_hidden_layers": self.num_layers,
            "layer_types": list(self.layer_types),
            "mlp_only_layers": list(self.mlp_only_layers),
            "rope_parameters": dict(self.rope),
        }

    @classmethod
    def tiny(cls) -> Self:
        """Return a shape for tests: a linear layer and a full one, each with six experts."""
        return cls(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            layer_types=(LINEAR, FULL),
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=128,  # the kernels of vLLM support 64 and 128
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            max_positions=2048,
        )


def _config_name(field_name: str) -> str:
    return OTHER_NAMES.get(field_name, field_name)


def _layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the type of each layer: `layer_types`, or one full layer every `full_attention_interval` layers.

    Raises:
        ValueError: `layer_types` has another length than the number of layers, or a number is not positive.
    """
    num_layers, interval = values["num_hidden_layers"], values.get("full_attention_interval") or 4
    check_sizes(num_hidden_layers=num_layers, full_attention_interval=interval)
    listed = listed_layer_types(values)
    if listed is not None:
        return listed
    return tuple(LINEAR if (layer + 1) % interval else FULL for layer in range(num_layers))
