"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section 2), V3.1, R1 and Moonlight.

A pre-norm decoder with three ideas. Latent attention caches one vector per token instead of keys and values
(`layers/attention/mla.py`). After the first few layers, the feed-forward layers are many small experts, of which a
router picks some for each token, and a shared expert that all tokens use (DeepSeekMoE, arXiv:2401.06066); a bias on
the choice, corrected after each update, balances the experts. Multi-token prediction (MTP) trains modules at the end
to predict tokens further ahead.
Shapes: T tokens of a pack, D hidden size.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from llmquest_rl.batch import Layout, TokenBatch
from llmquest_rl.layers.attention.attention import AttentionContext, PackedAttention
from llmquest_rl.layers.attention.mla import LatentAttention
from llmquest_rl.layers.linear import Linear
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.layers.mlp import GatedMLP
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.layers.moe.moe import RouterLoad, Routing, SigmoidRouter, router_load, sequence_balance_loss
from llmquest_rl.layers.mtp import mtp_depths
from llmquest_rl.layers.norm import RMSNorm
from llmquest_rl.layers.rope import RoPE, Rotary
from llmquest_rl.models import weight_map
from llmquest_rl.models.base import CausalLM, Hidden
from llmquest_rl.models.config.deepseek_v3 import DeepseekV3Config
from llmquest_rl.models.serving import VllmLimits
from llmquest_rl.models.weight_map import HFMap


class MixtureOfExperts(nn.Module):
    """The routed experts and the shared expert (section 2.1.2, eq. 12 to 16)."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.router = SigmoidRouter(
            config.hidden_size,
            config.n_routed_experts,
            config.num_experts_per_tok,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.n_group,
            config.topk_group,
        )
        self.experts = RoutedExperts(config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens."""
        routing = self.router(x)
        return self.experts(x, routing.experts, routing.weights) + self.shared(x), routing


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a norm before it and a residual connection around it."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LatentAttention(config.attention, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_dense = layer < config.first_k_dense_replace
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if self.is_dense else MixtureOfExperts(config)

    def forward(self, x: Tensor, rotary: Rotary, context: AttentionContext) -> tuple[Tensor, Routing | None]:
        """Map `x` `[T, D]` to the same shape; also return the routing of its tokens, None for a dense layer."""
        x = x + self.attention(self.attention_norm(x), rotary, context)
        normed = self.mlp_norm(x)
        added, routing = (self.mlp(normed), None) if self.is_dense else self.mlp(normed)
        return x + added, routing


class MTPModule(nn.Module):
    """A module of multi-token prediction (section 2.2). It uses the embedding and the head of the model."""

    def __init__(self, config: DeepseekV3Config, layer: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.projection = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, states: Tensor, embedded: Tensor, rotary: Rotary, context: AttentionContext
    ) -> tuple[Tensor, Routing | None]:
        """Compute the states for a prediction one token further ahead (eq. 21 to 23).

        Eq. 21 concatenates the states first; the published weights have the embedding first.

        Args:
            states: The previous states `[T, D]`, after the last norm.
            embedded: The embeddings `[T, D]` of the tokens further ahead.
            rotary: The rotation at the positions of these tokens.
            context: Decides which tokens attend to which.

        Returns:
            The states `[T, D]`, and the routing; None for a dense layer.
        """
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(states)), -1)
        x, routing = self.block(self.projection(joined), rotary, context)
        return self.norm(x), routing


class DeepseekV3(CausalLM):
    """The DeepSeek-V3 language model."""

    float32: ClassVar[tuple[str, ...]] = ("*.e_score_correction_bias",)

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = LMHead(config.hidden_size, config.vocab_size, self.embedding.weight if config.tied else None)
        self.mtp = nn.ModuleList(MTPModule(config, config.num_layers + k) for k in range(config.num_mtp_layers))
        self.mtp.requires_grad_(config.mtp_loss_weight > 0)
        self.rope = RoPE(config.qk_rope_head_dim, config.rope)

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Hidden:
        """See `CausalLM.hidden`."""
        x = self.embedding(tokens)  # [T, D]
        rotary = self.rope(positions, x.dtype)
        routings = []
        for block in self.blocks:
            x, routing = self.run_block(block, x, rotary, context)
            routings.append(routing)
        return self._with_routing(self.norm(x), routings, context.layout)

    def with_targets(self, hidden: Hidden, batch: TokenBatch) -> Hidden:
        """Add the loss of multi-token prediction (eq. 24 and 25, where T is the number of targets of the batch).

        It is computed in training only, and does not change the states of the model.
        """
        if not (self.is_trained and self.mtp and self.config.mtp_loss_weight > 0):
            return hidden
        found, total = hidden, hidden.states.new_zeros((), dtype=torch.float32)
        for module, depth in zip(self.mtp, mtp_depths(batch, len(self.mtp)), strict=True):
            context = PackedAttention(depth.layout, batch.tokens.device)
            embedded = self.embedding(depth.tokens)
            rotary = self.rope(depth.positions, embedded.dtype)
            states = found.states.index_select(0, depth.rows)
            states, routing = self.run_block(module, states, embedded, rotary, context)
            logprobs, _ = self.head(states.index_select(0, depth.sources), depth.targets)
            total = total - logprobs.sum() / max(len(batch.targets), 1)
            found = _joined(found, self._with_routing(states, [routing], depth.layout))
        loss = self.config.mtp_loss_weight / len(self.mtp) * total
        return Hidden(hidden.states, {**found.aux, "mtp": loss}, found.loads)

    def _with_routing(self, states: Tensor, routings: Sequence[Routing | None], layout: Layout) -> Hidden:
        """Return the states with the balance loss and the loads of the routers."""
        routed = [routing for routing in routings if routing is not None]
        if not (routed and self.is_trained):
            return Hidden(states, {})
        loss = torch.stack([sequence_balance_loss(routing, layout) for routing in routed]).sum()
        return Hidden(states, {"balance": self.config.aux_loss_alpha * loss}, router_load(routed))

    def balance(self, counts: Tensor) -> None:
        """Raise the biases of experts with less than the mean load and lower those of the others (Wang et al. 2024,
        arXiv:2408.15664, algorithm 1). The biases affect only the choice of experts, not their weights."""
        routers = [module for module in self.modules() if isinstance(module, SigmoidRouter)]
        for router, count in zip(routers, counts, strict=False):  # MTP modules that are not trained have no counts
            bias = router.get_buffer("e_score_correction_bias")
            bias.add_((count.mean() - count).sign().to(bias), alpha=self.config.router_bias_update_rate)


def _joined(first: Hidden, second: Hidden) -> Hidden:
    """Return the states of the second, with the losses and loads of both."""
    aux = dict(first.aux)
    for name, term in second.aux.items():
        aux[name] = aux[name] + term if name in aux else term
    parts = [hidden.loads for hidden in (first, second) if hidden.loads is not None]
    loads = RouterLoad(*(torch.cat(part) for part in zip(*parts, strict=True))) if parts else None
    return Hidden(second.states, aux, loads)


def _block_names(ours: str, disk: str) -> dict[str, str | weight_map.Form]:
    """Return the names on disk of one layer's weights."""
    attention = {
        "query": "q_proj",
        "query.down": "q_a_proj",
        "query.norm": "q_a_layernorm",
        "query.up": "q_b_proj",
        "latent_down": "kv_a_proj_with_mqa",
        "latent_norm": "kv_a_layernorm",
        "latent_up": "kv_b_proj",
        "output": "o_proj",
    }
    experts = f"{disk}.mlp.experts.{{e}}"
    return {
        f"{ours}.attention_norm": f"{disk}.input_layernorm",
        **{f"{ours}.attention.{name}": f"{disk}.self_attn.{theirs}" for name, theirs in attention.items()},
        f"{ours}.mlp_norm": f"{disk}.post_attention_layernorm",
        **{f"{ours}.mlp.{name}": f"{disk}.mlp.{name}_proj" for name in ("gate", "up", "down")},
        **{f"{ours}.mlp.shared.{name}": f"{disk}.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
        f"{ours}.mlp.router": f"{disk}.mlp.gate",
        f"{ours}.mlp.experts.gate_up": weight_map.Experts(
            experts, ("gate_proj", "up_proj"), fused=f"{disk}.mlp.experts.gate_up_proj"
        ),
        f"{ours}.mlp.experts.down": weight_map.Experts(experts, ("down_proj",), fused=f"{disk}.mlp.experts.down_proj"),
    }


def _copies(config: DeepseekV3Config) -> dict[str, str]:
    """Return the copies of embedding and head that each MTP module has on disk; see `HFMap.copies`."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    layers = [f"model.layers.{config.num_layers + k}" for k in range(config.num_mtp_layers)]
    return {f"{layer}.embed_tokens.weight": "model.embed_tokens.weight" for layer in layers} | {
        f"{layer}.shared_head.head.weight": head for layer in layers
    }


def _fit(config: DeepseekV3Config, keys: Collection[str]) -> DeepseekV3Config:
    """Drop the MTP modules if the file has none: transformers leaves them out, though config.json announces them."""
    has_mtp = any(key.startswith(f"model.layers.{config.num_layers}.") for key in keys)
    return config if has_mtp else replace(config, num_mtp_layers=0)


def _vllm_problems(config: DeepseekV3Config) -> Iterator[str]:
    """See `VllmLimits.problems`."""
    if config.rms_norm_eps > 1e-5:
        yield f"rms_norm_eps is {config.rms_norm_eps}, which vLLM also uses for the latents' norms (theirs is 1e-6)"


HF = HFMap(
    architecture="DeepseekV3ForCausalLM",
    config=DeepseekV3Config,
    model=DeepseekV3,
    classifier="DeepseekV3ForSequenceClassification",
    vllm=VllmLimits(
        required={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        only={"rope_interleave": True, "attention_bias": False, "tie_word_embeddings": False},
        problems=_vllm_problems,
    ),
    names={
        "embedding": "model.embed_tokens",
        **_block_names("blocks.{i}", "model.layers.{i}"),
        "norm": "model.norm",
        "head": "lm_head",
        **_block_names("mtp.{i}.block", "model.layers.{n+i}"),
        "mtp.{i}.embedding_norm": "model.layers.{n+i}.enorm",
        "mtp.{i}.hidden_norm": "model.layers.{n+i}.hnorm",
        "mtp.{i}.projection": "model.layers.{n+i}.eh_proj",
        "mtp.{i}.norm": "model.layers.{n+i}.shared_head.norm",
    },
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    copies=_copies,
    fit=_fit,
)
