"""What a learner runs: minibatches cut into packed microbatches, as many on every process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.layers.moe.routing_replay import num_changed_choices, record_routing, routers
from llmquest_rl.objectives import Loss, Objective
from llmquest_rl.packing import pack
from llmquest_rl.types import ImageFormat

Plan = list[list[TokenBatch]]
"""[minibatches][microbatches]"""


@dataclass(frozen=True, slots=True)
class _Local:
    """What the other processes must know about this one's share."""

    counts: list[int]
    """Microbatches in each minibatch."""
    token_fields: list[str]
    has_images: bool


def fitting(
    groups: Sequence[SequenceGroup], tokens_per_microbatch: int, shares_prompts: bool, needs_whole_group: bool
) -> list[SequenceGroup]:
    """Groups as a model can compute them: a group beyond the budget is cut into its completions, each with its prompt.

    Args:
        groups: any.
        tokens_per_microbatch: the budget.
        shares_prompts: as the model says; without it every completion gets its own copy of the prompt.
        compares: as the objective says; completions then stay together, for which a rule of the configuration makes
            room.
    """
    if needs_whole_group:
        return [group if shares_prompts else group.unshared() for group in groups]
    limit = tokens_per_microbatch if shares_prompts else 0
    return [part for group in groups for part in ([group] if group.num_tokens <= limit else group.expanded())]


def plan_microbatches(
    minibatches: Sequence[Sequence[SequenceGroup]], tokens_per_microbatch: int, images: ImageFormat | None
) -> Plan:
    """Pack this process's share of every minibatch into microbatches within the token budget.

    With ZeRO-2 and 3 every microbatch holds collectives, so all processes must compute as many, with the same modules.
    Where this one has fewer microbatches it gets others that hold an idle group alone; where any process has images, a
    microbatch without one gets an idle group with a blank image, beyond its budget. A collective call.

    Args:
        minibatches: this process's share of each.
        tokens_per_microbatch: the budget.
        images: how the model wants them; None = it reads text only.
    """
    packed = [pack(groups, tokens_per_microbatch) for groups in minibatches]
    token_fields = sorted({name for groups in minibatches for group in groups for name in group.token_fields})
    has_images = any(group.images is not None for groups in minibatches for group in groups)
    everyone: list[_Local] = [_Local([], [], False) for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, _Local([len(parts) for parts in packed], token_fields, has_images))
    names = sorted({name for local in everyone for name in local.token_fields})
    assert all(len(local.counts) == len(packed) for local in everyone), "every learner gets a share of each minibatch"
    idle = idle_group(names, images, any(local.has_images for local in everyone))
    plan = []
    for i, parts in enumerate(packed):
        missing = max(1, *(local.counts[i] for local in everyone)) - len(parts)
        plan.append([collate(_in_step(part, idle)) for part in [*parts, *[[]] * missing]])
    return plan


def _in_step(groups: list[SequenceGroup], idle: SequenceGroup) -> list[SequenceGroup]:
    """The groups of a microbatch, with the idle one where the others' microbatches compute what these do not."""
    is_complete = bool(groups) and (idle.images is None or any(group.images is not None for group in groups))
    return groups if is_complete else [*groups, idle]


def idle_group(
    token_fields: Sequence[str], images: ImageFormat | None = None, with_image: bool = False
) -> SequenceGroup:
    """One target whose weight is 0: it goes through every layer and changes nothing.

    Args:
        token_fields: names of the fields of the other groups.
        images: how the model wants them, if it reads any.
        with_image: whether it goes through the vision tower, too.
    """
    zeros = {name: [[0.0]] for name in token_fields}
    if images is None or not with_image:
        text = 0 if images is None or images.token_id != 0 else 1
        return SequenceGroup([text], [[0]], zeros)
    blank = torch.zeros(1, images.channels, images.height, images.width)
    return SequenceGroup([images.token_id] * images.tokens, [[0]], zeros, images=blank)


def num_tokens(plan: Plan) -> int:
    """Tokens in a plan, empty microbatches left out."""
    batches = (batch for microbatches in plan for batch in microbatches)
    return sum(len(batch.tokens) for batch in batches if bool(torch.any(batch.token_fields["weights"] != 0)))


@torch.no_grad()
def add_logprobs(
    plan: Plan, name: str, model: nn.Module, temperature: float, device: torch.device, record_experts: bool
) -> Plan:
    """The plan with the token field `name`: the model's log-probs of the targets.

    With `record_experts` also with the experts that computed them, where the model has any. They wait in host memory.
    """
    watched = routers(model) if record_experts else []

    def with_token_field(batch: TokenBatch) -> TokenBatch:
        with record_routing(watched) as choices:
            logprobs: Tensor = model(batch.to(device), temperature=temperature).logprobs
        token_fields = {**batch.token_fields, name: logprobs.to("cpu", torch.float32)}
        return replace(
            batch, token_fields=token_fields, experts=torch.stack(choices).cpu() if choices else batch.experts
        )

    return [[with_token_field(batch) for batch in microbatches] for microbatches in plan]


def loss_and_changes(objective: Objective, model: nn.Module, batch: TokenBatch) -> Loss:
    """The objective's loss; where experts were recorded, its metrics say how many of the choices are others by now.

    Args:
        objective: what is minimised.
        model: the current policy.
        batch: a microbatch on the model's device.
    """
    if batch.experts is None:
        return objective.loss(model, batch)
    with record_routing(routers(model)) as choices:
        loss = objective.loss(model, batch)
    is_counted = (batch.token_fields["weights"] != 0).any()
    changed = num_changed_choices(batch.experts, choices)
    loss.metrics.mean("moe/changed_share", changed * is_counted, batch.experts.numel() * is_counted)
    return loss
