"""Routers of a mixture of experts, their load-balancing losses, and the measured load of the experts.

The experts are in `layers/moe/experts.py`. Routers compute in float32 from the logits on, because a rounded score can
change which experts are chosen.

Shapes: T tokens, D hidden size, E experts, k experts chosen per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmquest_rl.batch import Layout


class Routing(NamedTuple):
    """The routing of one layer: the experts of each token and their weights.

    A block returns it beside its output, so that a block that gradient checkpointing computes twice counts once.
    """

    experts: Tensor
    """Expert ids, long `[T, k]`."""
    weights: Tensor
    """Factor of each expert's output, float32 `[T, k]`."""
    probs: Tensor
    """Distribution over experts for each token, float32 `[T, E]`."""
    logits: Tensor
    """Router logits, float32 `[T, E]`."""


class SoftmaxRouter(nn.Module):
    """Router to the k most probable experts under a softmax over all (Shazeer et al. 2017, arXiv:1701.06538, eq. 2-5).

    The matrix product is in the dtype of the weights, as Qwen and Mixtral were trained; the softmax is in float32.
    """

    replayed_experts: Tensor | None = None
    """Recorded expert ids that replace the router's own choice, long `[T, k]` (`layers/moe/routing_replay.py`)."""

    def __init__(self, size: int, num_experts: int, num_chosen: int, normalize: bool) -> None:
        """Make a router.

        Args:
            size: Hidden size, D.
            num_experts: Number of experts, E.
            num_chosen: Experts per token, k.
            normalize: True: a token's weights sum to 1. False: they are the probabilities themselves.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size).normal_(0.0, size**-0.5))
        self.num_chosen = num_chosen
        self.normalize = normalize

    def forward(self, x: Tensor) -> Routing:
        """Route `x` `[T, D]`."""
        logits = F.linear(x, self.weight).float()
        probs = logits.softmax(-1)
        experts = self._top_experts(probs) if self.replayed_experts is None else self.replayed_experts
        weights = probs.gather(1, experts)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(experts, weights, probs, logits)

    def own_choice(self, routing: Routing) -> Tensor:
        """Return the experts `[T, k]` that this router itself chooses for a routing, also while others are replayed."""
        return self._top_experts(routing.probs)

    def _top_experts(self, probs: Tensor) -> Tensor:
        experts: Tensor = probs.detach().topk(self.num_chosen, dim=-1).indices
        return experts


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's router with a sigmoid affinity per expert (arXiv:2412.19437, eq. 13-16).

    A bias per expert balances the load; it affects the choice of experts, not their weights. Experts form groups
    (machines), and a token's experts come from a few groups only (section 2.1.2).

    `e_score_correction_bias` has no gradient; the model's `balance` updates it (Wang et al. 2024, arXiv:2408.15664).
    """

    replayed_experts: Tensor | None = None
    """See `SoftmaxRouter.replayed_experts`."""

    def __init__(
        self,
        size: int,
        num_experts: int,
        num_chosen: int,
        normalize: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        groups_chosen: int = 1,
    ) -> None:
        """Make a router.

        Args:
            size: Hidden size, D.
            num_experts: Number of experts, E.
            num_chosen: Experts per token, k.
            normalize: True: a token's weights sum to `scale`. False: they are `scale` x affinity.
            scale: Multiplies the weights.
            num_groups: Number of expert groups, of equal size, with at least two experts each.
            groups_chosen: Groups that a token's experts may come from.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, size).normal_(0.0, size**-0.5))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.num_chosen = num_chosen
        self.normalize = normalize
        self.scale = scale
        self.num_groups = num_groups
        self.groups_chosen = groups_chosen

    def forward(self, x: Tensor) -> Routing:
        """Route `x` `[T, D]`; `probs` are the affinities divided by their sum (eq. 19)."""
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid()
        experts = self._top_experts(scores) if self.replayed_experts is None else self.replayed_experts
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.scale, scores / (scores.sum(-1, keepdim=True) + 1e-20), logits)

    def own_choice(self, routing: Routing) -> Tensor:
        """Return the experts `[T, k]` that this router itself chooses for a routing, also while others are replayed."""
        return self._top_experts(routing.logits.sigmoid())

    def _top_experts(self, scores: Tensor) -> Tensor:
        choices = self._mask_other_groups(scores.detach() + self.get_buffer("e_score_correction_bias"))
        experts: Tensor = choices.topk(self.num_chosen, dim=-1, sorted=False).indices
        return experts

    def _mask_other_groups(self, choices: Tensor) -> Tensor:
        """Set choices to -inf outside of the best groups; a group's score is the sum of its two best experts."""
        grouped = choices.unflatten(-1, (self.num_groups, -1))  # [T, groups, experts of each]
        sums = grouped.topk(2, dim=-1).values.sum(-1)
        best = sums.topk(self.groups_chosen, dim=-1, sorted=False).indices
        outside = torch.ones_like(sums, dtype=torch.bool).scatter_(1, best, False)
        allowed: Tensor = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
        return allowed


def expert_counts(routing: Routing) -> Tensor:
    """Count how often each expert was chosen: float32 `[E]`, without gradient."""
    chosen = routing.experts.flatten()
    counts = torch.zeros(routing.probs.shape[1], device=chosen.device)
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))


def balance_loss(routing: Routing) -> Tensor:
    """Load-balancing loss of one layer: `E sum_e f_e P_e` (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6).

    f_e is the fraction of all choices that fall on expert e, and P_e is the mean probability of e over tokens. The
    gradient flows through P only. The loss is 1 for a balanced load and E/k if all tokens choose the same experts.
    `load_balancing_loss_func` of transformers divides the counts by T instead of T k, so it is k times as large for one
    layer. It also averages f and P over all layers first, so that imbalances of different layers can cancel.
    """
    experts, (tokens, num_experts) = routing.experts, routing.probs.shape
    shares = expert_counts(routing) / max(experts.numel(), 1)
    return num_experts * (shares * routing.probs.sum(0) / max(tokens, 1)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss of one layer: the mean of `logsumexp(logits)^2` over tokens.

    It keeps the logits small, where exponentials lose least precision. Source: Zoph et al. 2022, arXiv:2202.08906,
    eq. 5.
    """
    return routing.logits.logsumexp(-1).square().sum() / max(len(routing.logits), 1)


def router_losses(routings: Sequence[Routing], balance: float, z: float = 0.0) -> dict[str, Tensor]:
    """Weighted router losses by name, averaged over layers.

    Args:
        routings: The routing of each layer.
        balance: Weight of the load-balancing loss.
        z: Weight of the z-loss.

    Returns:
        The losses with a positive weight.
    """
    losses = {"balance": (balance, balance_loss), "router_z": (z, z_loss)}
    return {
        name: weight * torch.stack([loss(routing) for routing in routings]).mean()
        for name, (weight, loss) in losses.items()
        if weight > 0
    }


def sequence_balance_loss(routing: Routing, layout: Layout) -> Tensor:
    """DeepSeek-V3's sequence-wise balance loss of one layer, without the factor alpha (arXiv:2412.19437, eq. 17-20).

    For a sequence of T tokens it is `sum_e f_e P_e`, where f_e is E / (k T) times the number of choices of e, and P_e
    is the mean of `probs` over the tokens. The result is the mean over sequences. A sequence is a segment without
    continuations, together with its parent: a prompt that is computed once for several completions counts in each of
    them. The gradient flows through P only.
    """
    probs, (tokens, choices) = routing.probs, routing.experts.shape
    lengths = torch.tensor(layout.lengths, dtype=torch.long)
    segment = torch.arange(len(lengths)).repeat_interleave(lengths).to(probs.device)  # [T]
    counts = torch.zeros_like(probs).scatter_add_(1, routing.experts, probs.new_ones(tokens, choices))
    ones = probs.new_ones(tokens, 1)
    sums = probs.new_zeros(len(lengths), 2 * probs.shape[1] + 1)  # counts, probabilities, tokens
    sums = sums.index_add(0, segment, torch.cat((counts, probs, ones), 1))
    continued = set(layout.parents)
    last = [i for i in range(len(lengths)) if i not in continued]
    inherited = torch.cat((sums, torch.zeros_like(sums[:1])))[[layout.parents[i] for i in last]]  # -1: the row of zeros
    counts, summed, length = (sums[last] + inherited).split((probs.shape[1], probs.shape[1], 1), 1)
    terms = probs.shape[1] / choices * (counts * summed).sum(-1, keepdim=True) / length.clamp(min=1).square()
    mean: Tensor = terms.sum() / (length > 0).sum().clamp(min=1)
    return mean


class RouterLoad(NamedTuple):
    """The load of the experts in one forward, as sums that can be added over forwards and processes."""

    counts: Tensor
    """Number of times that each expert was chosen, float32 `[MoE layers, experts]`."""
    entropy: Tensor
    """Entropy of the router's distribution in nats, summed over tokens, float32 `[MoE layers]`."""
    tokens: Tensor
    """Number of routed tokens, float32 `[MoE layers]`."""

    def plus(self, other: "RouterLoad | None") -> "RouterLoad":
        """Add two loads; None counts as zero."""
        return self if other is None else RouterLoad(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Metrics by name. MaxVio is max count / mean count - 1 (Wang et al. 2024, arXiv:2408.15664, eq. 4)."""
        mean = self.counts.mean(-1)
        violation = self.counts.amax(-1) / mean - 1
        return {
            "moe/max_vio": float(violation.mean()),
            "moe/max_vio_worst": float(violation.max()),
            "moe/expert_tokens_min": float(self.counts.amin()),
            "moe/expert_tokens_max": float(self.counts.amax()),
            "moe/idle_share": float((self.counts == 0).float().mean()),
            "moe/entropy": float((self.entropy / self.tokens).mean()),
        }


@torch.no_grad()
def router_load(routings: Sequence[Routing]) -> RouterLoad | None:
    """Sum up the routings of a model's MoE layers in one forward; returns None for a model without such layers."""
    if not routings:
        return None
    return RouterLoad(
        torch.stack([expert_counts(routing) for routing in routings]),
        torch.stack([torch.special.entr(routing.probs).sum() for routing in routings]),
        torch.tensor([float(len(routing.probs)) for routing in routings], device=routings[0].probs.device),
    )
