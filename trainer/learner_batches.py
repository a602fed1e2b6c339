"""What a learner runs: minibatches cut into packed microbatches, as many on every process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import Atom, TokenBatch, collate
from llmquest_rl.data.packing import pack
from llmquest_rl.layers.routing_replay import noted_choices, num_changed, routers
from llmquest_rl.objectives import Loss, Objective

Plan = list[list[TokenBatch]]
"""[minibatches][microbatches]"""


@dataclass(frozen=True, slots=True)
class _Local:
    """What the other processes must know about this one's share."""

    counts: list[int]
    """Microbatches in each minibatch."""
    streams: list[str]


def plan_microbatches(minibatches: Sequence[Sequence[Atom]], tokens_per_microbatch: int) -> Plan:
    """Pack this process's share of every minibatch into microbatches within the token budget.

    With ZeRO-2 and 3 every microbatch holds collectives, so processes with fewer of them get empty ones (one token
    without weight). A collective call.
    """
    packed = [pack(atoms, tokens_per_microbatch) for atoms in minibatches]
    streams = sorted({name for atoms in minibatches for atom in atoms for name in atom.streams})
    everyone: list[_Local] = [_Local([], []) for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, _Local([len(parts) for parts in packed], streams))
    names = sorted({name for local in everyone for name in local.streams})
    assert all(len(local.counts) == len(packed) for local in everyone), "every learner gets a share of each minibatch"
    plan = []
    for i, parts in enumerate(packed):
        missing = max(1, *(local.counts[i] for local in everyone)) - len(parts)
        plan.append([collate(part) for part in parts] + [empty_microbatch(names) for _ in range(missing)])
    return plan


def empty_microbatch(streams: Sequence[str]) -> TokenBatch:
    """One target whose weight is 0: it goes through every layer and changes nothing."""
    return collate([Atom([0], [[0]], {name: [[0.0]] for name in streams})])


def num_tokens(plan: Plan) -> int:
    """Tokens in a plan, empty microbatches left out."""
    batches = (batch for microbatches in plan for batch in microbatches)
    return sum(len(batch.tokens) for batch in batches if bool(torch.any(batch.streams["weights"] != 0)))


@torch.no_grad()
def add_logprobs(
    plan: Plan, name: str, model: nn.Module, temperature: float, device: torch.device, record_experts: bool
) -> Plan:
    """The plan with stream `name`: the model's log-probs of the targets.

    With `record_experts` also with the experts that computed them, where the model has any. They wait in host memory.
    """
    watched = routers(model) if record_experts else []

    def with_stream(batch: TokenBatch) -> TokenBatch:
        with noted_choices(watched) as choices:
            logprobs: Tensor = model(batch.to(device), temperature=temperature).logprobs
        streams = {**batch.streams, name: logprobs.to("cpu", torch.float32)}
        return replace(batch, streams=streams, experts=torch.stack(choices).cpu() if choices else batch.experts)

    return [[with_stream(batch) for batch in microbatches] for microbatches in plan]


def loss_and_changes(objective: Objective, model: nn.Module, batch: TokenBatch) -> Loss:
    """The objective's loss; where experts were recorded, its metrics say how many of the choices are others by now.

    Args:
        objective: what is minimised.
        model: the current policy.
        batch: a microbatch on the model's device.
    """
    if batch.experts is None:
        return objective.loss(model, batch)
    with noted_choices(routers(model)) as choices:
        loss = objective.loss(model, batch)
    is_counted = (batch.streams["weights"] != 0).any()
    changed = num_changed(batch.experts, choices)
    loss.metrics.mean("moe/changed_share", changed * is_counted, batch.experts.numel() * is_counted)
    return loss
