"""Routing replay: what the routers of a mixture chose in one forward is recorded, and given to them in later ones.

When a step's data serves several updates, later updates send tokens to other experts than the forward that computed the
old policy's log-probs: after one update about a tenth of the experts that a token activates are others (Zheng et al.
2025, arXiv:2507.18071, section 5.3). Ratios of single tokens jump with them. Replay fixes which experts are chosen;
what each of them counts still comes from the current router, which keeps its gradient. Recorded is the learner's own
choice, not the rollout engine's (that is Ma et al. 2025, arXiv:2510.11370).
Shapes: L layers with experts, T tokens of a pack, k experts for each token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmquest_rl.layers.moe.moe import Routing, SigmoidRouter, SoftmaxRouter

Router = SoftmaxRouter | SigmoidRouter


def routers(model: nn.Module) -> list[Router]:
    """A model's routers in the order of its layers, those of multi-token prediction last; none for a dense model."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def record_routing(watched: Sequence[Router]) -> Iterator[list[Tensor]]:
    """Note what routers choose in the one forward inside, or would choose if nothing were replayed.

    End it before backward: gradient checkpointing runs routers once more there.

    Args:
        watched: `routers(model)`, of which the last ones may not run.

    Yields:
        A list that grows by an int16 tensor [T, k], on the model's device, for each router that runs.
    """
    choices: list[Tensor] = []

    def note(router: Router, inputs: tuple[Tensor], routing: Routing) -> None:
        assert router is watched[len(choices)], "routers run once each, in the order of their layers"
        chosen = routing.experts if router.replayed_experts is None else router.own_choice(routing)
        choices.append(chosen.to(torch.int16))

    handles = [router.register_forward_hook(note) for router in watched]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_routing(model: nn.Module, experts: Tensor | None) -> Iterator[None]:
    """Inside, a model's routers send tokens to recorded experts.

    Hold it until backward has ended: gradient checkpointing computes layers again, and must find the same experts.

    Args:
        model: Its first L routers replay; those of multi-token prediction, which are never recorded, go on choosing.
        experts: Integers [L, T, k] on the model's device, for the T tokens of the forward inside; None: all choose.
    """
    given = [] if experts is None else list(zip(routers(model), experts.long(), strict=False))
    try:
        for router, chosen in given:
            router.replayed_experts = chosen
        yield
    finally:
        for router, _ in given:
            router.replayed_experts = None


def num_changed_choices(experts: Tensor, choices: Sequence[Tensor]) -> Tensor:
    """How many choices are not among those that were recorded for the same layer and token, in whatever order.

    Args:
        experts: Recorded, int16 [L, T, k].
        choices: As `noted_choices` yields, [T, k] each; those after the first L do not count.

    Returns:
        A whole number, at most L T k, as a scalar.
    """
    layers = zip(experts, choices[: len(experts)], strict=True)
    return torch.stack([(own[:, :, None] != recorded[:, None]).all(-1).sum() for recorded, own in layers]).sum()
