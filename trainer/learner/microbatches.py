"""What a learner runs: minibatches cut into packed microbatches, as many on every process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmquest_rl.batch import Atom, TokenBatch, collate
from llmquest_rl.layers.moe.routing_replay import noted_choices, num_changed, routers
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
    streams: list[str]
    has_images: bool


def fitting(atoms: Sequence[Atom], tokens_per_microbatch: int, shares_prompts: bool, compares: bool) -> list[Atom]:
    """Atoms as a model can compute them: a group beyond the budget is cut into its completions, each with its prompt.

    Args:
        atoms: any.
        tokens_per_microbatch: the budget.
        shares_prompts: as the model says; without it every completion gets its own copy of the prompt.
        compares: as the objective says; completions then stay together, for which a rule of the configuration makes
            room.
    """
    if compares:
        return [atom if shares_prompts else atom.unshared() for atom in atoms]
    limit = tokens_per_microbatch if shares_prompts else 0
    return [part for atom in atoms for part in ([atom] if atom.num_tokens <= limit else atom.expanded())]


def plan_microbatches(
    minibatches: Sequence[Sequence[Atom]], tokens_per_microbatch: int, images: ImageFormat | None
) -> Plan:
    """Pack this process's share of every minibatch into microbatches within the token budget.

    With ZeRO-2 and 3 every microbatch holds collectives, so all processes must compute as many, with the same modules.
    Where this one has fewer microbatches it gets others that hold an idle atom alone; where any process has images, a
    microbatch without one gets an idle atom with a blank image, beyond its budget. A collective call.

    Args:
        minibatches: this process's share of each.
        tokens_per_microbatch: the budget.
        images: how the model wants them; None = it reads text only.
    """
    packed = [pack(atoms, tokens_per_microbatch) for atoms in minibatches]
    streams = sorted({name for atoms in minibatches for atom in atoms for name in atom.streams})
    has_images = any(atom.images is not None for atoms in minibatches for atom in atoms)
    everyone: list[_Local] = [_Local([], [], False) for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, _Local([len(parts) for parts in packed], streams, has_images))
    names = sorted({name for local in everyone for name in local.streams})
    assert all(len(local.counts) == len(packed) for local in everyone), "every learner gets a share of each minibatch"
    idle = idle_atom(names, images, any(local.has_images for local in everyone))
    plan = []
    for i, parts in enumerate(packed):
        missing = max(1, *(local.counts[i] for local in everyone)) - len(parts)
        plan.append([collate(_in_step(part, idle)) for part in [*parts, *[[]] * missing]])
    return plan


def _in_step(atoms: list[Atom], idle: Atom) -> list[Atom]:
    """The atoms of a microbatch, with the idle one where the others' microbatches compute what these do not."""
    is_complete = bool(atoms) and (idle.images is None or any(atom.images is not None for atom in atoms))
    return atoms if is_complete else [*atoms, idle]


def idle_atom(streams: Sequence[str], images: ImageFormat | None = None, with_image: bool = False) -> Atom:
    """One target whose weight is 0: it goes through every layer and changes nothing.

    Args:
        streams: of the other atoms.
        images: how the model wants them, if it reads any.
        with_image: whether it goes through the vision tower, too.
    """
    zeros = {name: [[0.0]] for name in streams}
    if images is None or not with_image:
        text = 0 if images is None or images.token_id != 0 else 1
        return Atom([text], [[0]], zeros)
    blank = torch.zeros(1, images.channels, images.height, images.width)
    return Atom([images.token_id] * images.tokens, [[0]], zeros, images=blank)


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
