"""Routing replay: records the experts that routers choose in one forward, and reuses them in later forwards.

When the data of a step serves several updates, the router changes between them. After one update about a tenth of the
experts that a token activates differ from those of the old policy's forward (Zheng et al. 2025, arXiv:2507.18071,
section 5.3), and the token's importance ratio jumps. Replay fixes which experts are chosen. Their weights still come
from the current router, which keeps its gradient. The recorded choice is the learner's own, not the rollout engine's as
in Ma et al. 2025 (arXiv:2510.11370).

Shapes: L layers with experts, T packed tokens, k experts per token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmquest_rl.layers.moe.moe import Routing, SigmoidRouter, SoftmaxRouter

Router = SoftmaxRouter | SigmoidRouter


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model in layer order, multi-token prediction modules last; empty for a dense model."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def record_routing(watched: Sequence[Router]) -> Iterator[list[Tensor]]:
    """Record the routers' own choices in one forward, also while other experts are replayed.

    Leave the context before backward, because gradient checkpointing runs the routers again there.

    Args:
        watched: `routers(model)`. The last ones need not run in the forward.

    Yields:
        A list to which each router that runs appends its expert ids, int16 `[T, k]`, on the model's device.
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
    """Make a model's routers send tokens to recorded experts.

    Stay in the context until backward has ended: gradient checkpointing computes layers again, and they must use the
    same experts.

    Args:
        model: The model; its first L routers replay. Routers of multi-token prediction are never recorded or replayed.
        experts: Recorded expert ids, integers `[L, T, k]`, on the model's device; None = every router chooses itself.
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
    """Count the choices that differ from the recorded experts of the same layer and token, in any order.

    Args:
        experts: Recorded expert ids, int16 `[L, T, k]`.
        choices: The choices that `record_routing` yields, `[T, k]` each; only the first L count.

    Returns:
        The count, at most L T k: scalar, long.
    """
    layers = zip(experts, choices[: len(experts)], strict=True)
    return torch.stack([(own[:, :, None] != recorded[:, None]).all(-1).sum() for recorded, own in layers]).sum()
