"""Qwen3-Next (Qwen team 2025, "Qwen3-Next: Towards Ultimate Training & Inference Efficiency").

A pre-norm decoder in which three of four layers are Gated DeltaNets (arXiv:2412.06464): linear attention, whose state
is one matrix per head instead of a cache of all earlier tokens. The other layers are attention with a gated output
(arXiv:2505.06708) and partial rotation. The feed-forward layers are many small experts, of which a router picks some
for each token, and a shared expert with a gate.
Text only, on one device; parallelism, caches and losses are elsewhere.
Shapes: T tokens of a pack, D hidden size. Attention: H query heads of size C. Gated DeltaNet: K key heads of size A,
V = K x J value heads of size B.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquest_rl.layers.attention.attention import AttentionContext
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.mlp import GatedMLP
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.layers.moe.moe import Routing, SoftmaxRouter, router_load, router_losses
from llmquest_rl.layers.norm import OffsetRMSNorm, RMSNorm
from llmquest_rl.layers.recurrent.delta_rule import gated_delta_rule, gated_delta_step
from llmquest_rl.layers.recurrent.short_conv import ShortConv
from llmquest_rl.layers.rope import RoPE, Rotary, rotate
from llmquest_rl.models import weight_map
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.qwen3_next import FULL, LINEAR, Qwen3NextConfig
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap


class GatedDeltaNet(nn.Module):
    """Linear attention with the gated delta rule (arXiv:2412.06464, section 3.4), a norm and an output gate.

    The rows of the projections are grouped by key head, as on disk: `[q | k | J values | J output gates]` and
    `[J write strengths (b) | J decays (a)]`.
    """

    def __init__(self, config: Qwen3NextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_key_heads, self.key_dim = config.linear_num_key_heads, config.linear_key_head_dim
        self.shared = config.linear_num_value_heads // self.num_key_heads  # J
        self.value_dim = config.linear_value_head_dim
        keys, values = self.num_key_heads * self.key_dim, config.linear_num_value_heads * self.value_dim
        self.in_qkvz = Linear(config.hidden_size, 2 * keys + 2 * values, bias=False)
        self.in_ba = Linear(config.hidden_size, 2 * config.linear_num_value_heads, bias=False)
        self.conv = ShortConv(2 * keys + values, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(config.linear_num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.linear_num_value_heads))
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)
        self.output = Linear(values, config.hidden_size, bias=False)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        tail, state = context.load_state(self.layer) or (None, None)
        qkv, z = self._projected(x)  # [T, 2 K A + V B], [T, V, B]
        qkv, tail = self.conv(qkv, context.layout, tail)
        width = self.num_key_heads * self.key_dim
        q, k, v = F.silu(qkv).split((width, width, qkv.shape[1] - 2 * width), -1)
        q, k = (_unit_length(part.unflatten(-1, (-1, self.key_dim))) for part in (q, k))  # [T, K, A]
        inputs = (q * self.key_dim**-0.5, k, v.unflatten(-1, (-1, self.value_dim)), *self._gates(x))
        if state is None:
            out, state = gated_delta_rule(*inputs, context.layout)
        else:
            out, state = gated_delta_step(*inputs, state)
        context.store_state(self.layer, (tail, state))
        gated = self.norm(out.to(x.dtype)) * F.silu(z.float())  # [T, V, B]
        mixed: Tensor = self.output(gated.to(x.dtype).flatten(1))
        return mixed

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, keys and values `[T, 2 K A + V B]`, and output gates `[T, V, B]`, of all heads."""
        values = self.shared * self.value_dim
        by_head = self.in_qkvz(x).unflatten(-1, (self.num_key_heads, -1))
        q, k, v, z = by_head.split((self.key_dim, self.key_dim, values, values), -1)
        return torch.cat([part.flatten(1) for part in (q, k, v)], -1), z.unflatten(-1, (self.shared, -1)).flatten(1, 2)

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the decay and the write strength of each head, `[T, V]` each."""
        b, a = (part.flatten(1) for part in self.in_ba(x).unflatten(-1, (self.num_key_heads, -1)).chunk(2, -1))
        return -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float()), b.sigmoid()


def _unit_length(x: Tensor) -> Tensor:
    """Divide vectors `[..., size]` by their length, in float32; a small number is added to the squared length."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


class GatedAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys, partial rotation, and an output gate per head (Qiu et
    al. 2025, arXiv:2505.06708, section 2.2). The rows of the query projection are `[query | gate]` of each head."""

    def __init__(self, config: Qwen3NextConfig, layer: int) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.query = Linear(config.hidden_size, 2 * width, bias=config.attention_bias)
        self.key = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.value = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.output = Linear(width, config.hidden_size, bias=config.attention_bias)
        self.query_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = OffsetRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> Tensor:
        """Map `x` `[T, D]` to the same shape."""
        q, gate = self.query(x).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, -1)  # [T, H, C] each
        k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.key, self.value))
        q, k = rotate(self.query_norm(q), rotary), rotate(self.key_norm(k), rotary)
        mixed = context.attend(self.layer, q, k, v, self.head_dim**-0.5)  # [T, H, C]
        out: Tensor = self.output((mixed * gate.sigmoid()).flatten(1))
        return out


class MixtureOfExperts(nn.Module):
    """The routed experts, and the shared expert with a gate for each token."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.router = SoftmaxRouter(size, config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        self.experts = RoutedExperts(config.num_experts, size, config.moe_intermediate_size)
        self.shared = GatedMLP(size, config.shared_expert_intermediate_size)
        self.shared_gate = Linear(size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        routing = self.router(x)
        shared = self.shared_gate(x).sigmoid() * self.shared(x)
        return self.experts(x, routing.experts, routing.weights) + shared, routing


class Block(nn.Module):
    """One layer: attention of either type and feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: Qwen3NextConfig, layer: int, kind: str, has_experts: bool) -> None:
        super().__init__()
        self.mixer_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_linear, self.has_experts = kind == LINEAR, has_experts
        if self.is_linear:
            self.delta_net = GatedDeltaNet(config, layer)
        else:
            self.attention = GatedAttention(config, layer)
        self.mlp_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if has_experts else GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> tuple[Tensor, Routing | None]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens, None for a dense layer."""
        normed = self.mixer_norm(x)
        x = x + (self.delta_net(normed, context) if self.is_linear else self.attention(normed, rotary, context))
        normed = self.mlp_norm(x)
        added, routing = self.mlp(normed) if self.has_experts else (self.mlp(normed), None)
        return x + added, routing


class MTPModule(nn.Module):
    """The module for multi-token prediction (MTP), which serves speculative decoding (`mtp.*` on disk).

    It is read, kept and written again, but neither computed nor trained. After training here its predictions are
    accepted less often than before.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.embedding_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
        self.blocks = nn.ModuleList(Block(config, layer, FULL, has_experts=True) for layer in layers)
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.requires_grad_(False)


class Qwen3Next(CausalLM):
    """The Qwen3-Next language model."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, layer, kind, config.has_experts(layer)) for layer, kind in enumerate(config.layer_types)
        )
        self.norm = OffsetRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)
        self.mtp = MTPModule(config) if config.num_mtp_layers else None
        self.rope = RoPE(config.head_dim, config.rope)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`. The loss and loads of the routers are computed in training only."""
        x = self.embedding(tokens)  # [T, D]
        rotary = self.rope(positions, x.dtype)
        routings = []
        for block in self.blocks:
            x, routing = self.run_block(block, x, rotary, context)
            routings += [] if routing is None else [routing]
        if not (routings and self.is_trained):
            return Hidden(self.norm(x), {})
        return Hidden(self.norm(x), router_losses(routings, self.config.router_aux_loss_coef), router_load(routings))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """See `Model.init_weights`. Norms with an offset start at 0; decay rates are uniform in [0.01, 16]."""
        super().init_weights(generator)
        for module in self.modules():
            if isinstance(module, OffsetRMSNorm):
                module.weight.zero_()
            elif isinstance(module, GatedDeltaNet):
                rates = torch.empty(module.A_log.shape).uniform_(0.01, 16.0, generator=generator)
                module.A_log.copy_(rates.log())
                module.dt_bias.fill_(1.0)


def _block_names(ours: str, disk: str) -> dict[str, str | weight_map.Form]:
    """Return the names on disk of one layer's weights."""
    experts = f"{disk}.mlp.experts.{{e}}"
    attention = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return {
        f"{ours}.mixer_norm": f"{disk}.input_layernorm",
        f"{ours}.delta_net": f"{disk}.linear_attn",  # A_log, dt_bias
        f"{ours}.delta_net.in_qkvz": f"{disk}.linear_attn.in_proj_qkvz",
        f"{ours}.delta_net.in_ba": f"{disk}.linear_attn.in_proj_ba",
        f"{ours}.delta_net.conv": f"{disk}.linear_attn.conv1d",
        f"{ours}.delta_net.norm": f"{disk}.linear_attn.norm",
        f"{ours}.delta_net.output": f"{disk}.linear_attn.out_proj",
        **{f"{ours}.attention.{name}": f"{disk}.self_attn.{theirs}_proj" for name, theirs in attention.items()},
        f"{ours}.attention.query_norm": f"{disk}.self_attn.q_norm",
        f"{ours}.attention.key_norm": f"{disk}.self_attn.k_norm",
        f"{ours}.mlp_norm": f"{disk}.post_attention_layernorm",
        **{f"{ours}.mlp.{name}": f"{disk}.mlp.{name}_proj" for name in ("gate", "up", "down")},
        **{f"{ours}.mlp.shared.{name}": f"{disk}.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
        f"{ours}.mlp.shared_gate": f"{disk}.mlp.shared_expert_gate",
        f"{ours}.mlp.router": f"{disk}.mlp.gate",
        f"{ours}.mlp.experts.gate_up": weight_map.Experts(
            experts, ("gate_proj", "up_proj"), fused=f"{disk}.mlp.experts.gate_up_proj"
        ),
        f"{ours}.mlp.experts.down": weight_map.Experts(experts, ("down_proj",), fused=f"{disk}.mlp.experts.down_proj"),
    }


def _fit(config: Qwen3NextConfig, keys: Collection[str]) -> Qwen3NextConfig:
    """Count the layers of the MTP module: published files hold it, files that transformers saved do not."""
    layers = {key.split(".")[2] for key in keys if key.startswith("mtp.layers.")}
    return replace(config, num_mtp_layers=len(layers))


HF = HFMap(
    architecture="Qwen3NextForCausalLM",
    config=Qwen3NextConfig,
    model=Qwen3Next,
    classifier="Qwen3NextForSequenceClassification",
    vllm=VllmLimits(only={"attention_bias": False, "tie_word_embeddings": False}),
    names={
        "embedding": "model.embed_tokens",
        **_block_names("blocks.{i}", "model.layers.{i}"),
        "norm": "model.norm",
        "head": "lm_head",
        "mtp.projection": "mtp.fc",
        "mtp.embedding_norm": "mtp.pre_fc_norm_embedding",
        "mtp.hidden_norm": "mtp.pre_fc_norm_hidden",
        **_block_names("mtp.blocks.{i}", "mtp.layers.{i}"),
        "mtp.norm": "mtp.norm",
    },
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    fit=_fit,
)
