"""Microbatches: every minibatch is split into packed batches within a token budget, equally many on every process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.layers.moe.routing_replay import num_changed_choices, record_routing, routers
from llmquest_rl.models.base import Model, image_format
from llmquest_rl.objectives import Loss, Objective
from llmquest_rl.packing import pack
from llmquest_rl.types import ImageFormat
from trainer.learner.setup import LearnerSetup

Plan = list[list[TokenBatch]]
"""Packed batches by minibatch and microbatch: `[minibatches][microbatches]`."""


@dataclass(frozen=True, slots=True)
class _Local:
    """The properties of this process's share that the other processes need to know."""

    counts: list[int]
    """Microbatches in each minibatch."""
    token_fields: list[str]
    has_images: bool


def split_to_budget(
    groups: Sequence[SequenceGroup], tokens_per_microbatch: int, shares_prompts: bool, needs_whole_group: int
) -> list[SequenceGroup]:
    """Split each group that exceeds the token budget into its completions, each with its prompt.

    Args:
        groups: sequence groups of any size.
        tokens_per_microbatch: maximum tokens in a microbatch.
        shares_prompts: whether the model can compute a prompt once for all its completions; otherwise every completion
            gets its own copy.
        needs_whole_group: whether the objective compares the completions of a group, so that they stay together; a
            configuration rule makes the budget large enough.
    """
    if needs_whole_group:
        return [group if shares_prompts else group.unshared() for group in groups]
    limit = tokens_per_microbatch if shares_prompts else 0
    return [part for group in groups for part in ([group] if group.num_tokens <= limit else group.expanded())]


def plan_microbatches(
    minibatches: Sequence[Sequence[SequenceGroup]], tokens_per_microbatch: int, images: ImageFormat | None
) -> Plan:
    """Pack this process's share of every minibatch into microbatches within the token budget.

    With ZeRO-2 and 3 every microbatch runs collectives, so all processes must compute equally many microbatches and
    pass through the same modules. A process with fewer microbatches gets additional ones that hold an idle group only.
    If any process has images, a microbatch without one gets an idle group with a blank image, which may exceed the
    budget. This call is a collective.

    Args:
        minibatches: this process's share of each minibatch.
        tokens_per_microbatch: maximum tokens in a microbatch.
        images: the format of the model's images; None = the model reads text only.
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
        plan.append([collate(_with_idle_group(part, idle)) for part in [*parts, *[[]] * missing]])
    return plan


def _with_idle_group(groups: list[SequenceGroup], idle: SequenceGroup) -> list[SequenceGroup]:
    """The groups of a microbatch, and the idle group if they skip a module that other processes compute."""
    is_complete = bool(groups) and (idle.images is None or any(group.images is not None for group in groups))
    return groups if is_complete else [*groups, idle]


def idle_group(
    token_fields: Sequence[str], images: ImageFormat | None = None, with_image: bool = False
) -> SequenceGroup:
    """A group with one target of weight 0: it passes through every layer and changes nothing.

    Args:
        token_fields: names of the fields of the other groups.
        images: the format of the model's images, if it reads any.
        with_image: whether it also passes through the vision tower.
    """
    zeros = {name: [[0.0]] for name in token_fields}
    if images is None or not with_image:
        text = 0 if images is None or images.token_id != 0 else 1
        return SequenceGroup([text], [[0]], zeros)
    blank = torch.zeros(1, images.channels, images.height, images.width)
    return SequenceGroup([images.token_id] * images.tokens, [[0]], zeros, images=blank)


def num_tokens(plan: Plan) -> int:
    """Tokens in a plan, without microbatches whose weights are all 0."""
    batches = (batch for microbatches in plan for batch in microbatches)
    return sum(len(batch.tokens) for batch in batches if bool(torch.any(batch.token_fields["weights"] != 0)))


@torch.no_grad()
def add_logprobs(
    plan: Plan, name: str, model: nn.Module, temperature: float, device: torch.device, record_experts: bool
) -> Plan:
    """The plan with the token field `name`: the model's log-probs of the targets.

    With `record_experts` it also gets the experts of each token, if the model has any. Both are kept in host memory.
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


def target_logprobs(
    groups: Sequence[SequenceGroup], model: Model, forward: nn.Module, setup: LearnerSetup
) -> list[Tensor]:
    """The log-probs of the targets of each group, float32 `[targets]`, in the order of its completions. A collective.

    Args:
        groups: this process's groups.
        model: the model, which says how groups are packed.
        forward: the model itself, or DeepSpeed's engine around it.
        setup: the learner's setup.
    """
    counts = [[sum(mask) for mask in group.targets] for group in groups]
    numbers = iter(range(1, 1 + sum(map(len, counts))))  # an idle group has the number 0
    numbered = [
        replace(group, token_fields={}).with_constants("number", [float(next(numbers)) for _ in group.completions])
        for group in groups
    ]
    budget, temperature, device = setup.tokens_per_microbatch, setup.objective.temperature, torch.device(setup.device)
    fitted = split_to_budget(numbered, budget, model.shares_prompts, needs_whole_group=0)
    plan = plan_microbatches([fitted], budget, image_format(model.config))
    [batches] = add_logprobs(plan, "logprobs", forward, temperature, device, record_experts=False)
    number, logprobs = (torch.cat([batch.token_fields[name] for batch in batches]) for name in ("number", "logprobs"))
    in_order = logprobs[number.argsort(stable=True)][int((number == 0).sum()) :]
    return list(in_order.split([sum(own) for own in counts]))


def loss_and_changes(objective: Objective, model: nn.Module, batch: TokenBatch) -> Loss:
    """The objective's loss. If experts were recorded, a metric gives the share of choices that have changed since.

    Args:
        objective: the objective.
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
