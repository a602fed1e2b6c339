"""Routing replay on every MoE model: experts are replayed, their weights are not, and replay ends with its context."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.layers.moe.moe import Routing, SigmoidRouter, SoftmaxRouter
from llmquest_rl.layers.moe.routing_replay import Router, num_changed_choices, record_routing, replay_routing, routers
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM

torch.set_num_threads(1)

MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "DeepseekV3ForCausalLM": {"num_mtp_layers": 1},
    "MixtralForCausalLM": {"expert_capacity_factor": 1.0},
}
"""Architectures with routers, and how their tiny shapes are changed."""

BATCH = collate(
    [
        SequenceGroup([5, 9, 2, 7], [[3, 8, 1], [1, 1, 4, 6, 2], [9]]),
        SequenceGroup([], [[4, 8, 15, 16, 23, 42]]),
        SequenceGroup([11, 3], [[7, 7, 7]]),
    ]
)


def make(architecture: str) -> CausalLM:
    hf = architectures()[architecture]
    shape = replace(hf.config.tiny(), initializer_range=0.1, **MIXTURES[architecture])
    model = hf.model(shape)
    assert isinstance(model, CausalLM)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.train()


def record(model: CausalLM) -> Tensor:
    with torch.no_grad(), record_routing(routers(model)) as choices:
        model(BATCH)
    return torch.stack(choices)


@torch.no_grad()
def move(watched: Sequence[Router]) -> None:
    """Change the routers as an update would, but more strongly."""
    generator = torch.Generator().manual_seed(1)
    for router in watched:
        router.weight += 0.1 * torch.randn(router.weight.shape, generator=generator)


def gradients(model: CausalLM, experts: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs, and the gradient of their sum and the model's own losses."""
    model.zero_grad()
    with replay_routing(model, experts):
        output = model(BATCH)
        (output.logprobs.sum() + sum(output.aux.values())).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logprobs.detach(), found


@contextmanager
def used_experts(model: CausalLM) -> Iterator[list[Tensor]]:
    """The experts that each router sent tokens to."""
    used: list[Tensor] = []

    def note(router: Router, inputs: tuple[Tensor], routing: Routing) -> None:
        used.append(routing.experts)

    hooks = [router.register_forward_hook(note) for router in routers(model)]
    yield used
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "router",
    [
        SoftmaxRouter(16, 12, 3, normalize=True),
        SoftmaxRouter(16, 12, 3, normalize=False),
        SigmoidRouter(16, 12, 3, normalize=True, scale=2.5, num_groups=4, groups_chosen=2),
        SigmoidRouter(16, 12, 3, normalize=False),
    ],
    ids=["softmax", "softmax, not normalised", "sigmoid in groups", "sigmoid, not normalised"],
)
def test_a_router_takes_given_experts_with_weights_of_its_own(router: Router) -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    before = router(x).experts
    move([router])
    own = router(x)
    assert not torch.equal(own.experts, before)
    router.replayed_experts = before
    routing = router(x)
    assert torch.equal(routing.experts, before)
    assert torch.equal(router.own_choice(routing), own.experts)
    assert torch.equal(routing.logits, own.logits)
    logits = routing.logits.detach().double()
    scores = logits.softmax(-1) if isinstance(router, SoftmaxRouter) else logits.sigmoid()
    expected = scores.gather(1, before)
    if router.normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    if isinstance(router, SigmoidRouter):
        expected = expected * router.scale
    torch.testing.assert_close(routing.weights.double(), expected, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(routing.weights.square().sum(), router.weight)
    assert bool(gradient.any())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_replay_with_unchanged_weights_is_no_replay_to_the_bit(architecture: str) -> None:
    model = make(architecture)
    logprobs, expected = gradients(model, None)
    replayed, found = gradients(model, record(model))
    assert torch.equal(replayed, logprobs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_after_an_update_tokens_go_to_the_recorded_experts(architecture: str) -> None:
    """Those of a router further ahead (multi-token prediction) are not recorded: it chooses by itself."""
    model = make(architecture)
    experts = record(model)
    modules_ahead = MIXTURES[architecture].get("num_mtp_layers", 0)
    assert experts.dtype == torch.int16
    assert experts.shape[:2] == (len(routers(model)) - modules_ahead, len(BATCH.tokens))
    move(routers(model))
    with used_experts(model) as used, record_routing(routers(model)) as choices:
        logprobs, _ = gradients(model, experts)
    assert len(used) == len(choices) == len(experts) + modules_ahead
    assert torch.equal(torch.stack(used[: len(experts)]), experts.long())
    assert int(num_changed_choices(experts, choices)) > 0
    assert int(num_changed_choices(experts, list(experts))) == 0
    assert not torch.equal(logprobs, gradients(model, None)[0])
    for router in routers(model)[: len(experts)]:
        assert router.weight.grad is not None and bool(router.weight.grad.any())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_gradient_checkpointing_replays_in_backward_too(architecture: str) -> None:
    model = make(architecture)
    experts = record(model)
    move(routers(model))
    logprobs, expected = gradients(model, experts)
    model.gradient_checkpointing = True
    with used_experts(model) as used:
        again, found = gradients(model, experts)
    assert len(used) == 2 * len(routers(model)), "forward, and once more in backward"
    assert torch.equal(again, logprobs)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_replay_and_notes_end_with_an_exception() -> None:
    model = make("DeepseekV3ForCausalLM")
    experts = record(model)
    with pytest.raises(ZeroDivisionError), replay_routing(model, experts), record_routing(routers(model)):
        assert [router.replayed_experts is not None for router in routers(model)] == [True, False]
        _ = 1 / 0
    assert all(router.replayed_experts is None for router in routers(model))
    assert not any(router._forward_hooks for router in routers(model))


def test_changed_choices_are_counted_as_sets() -> None:
    generator = torch.Generator().manual_seed(3)
    recorded, own = (torch.rand(2, 3, 40, 9, generator=generator).topk(4, dim=-1).indices.to(torch.int16)).unbind()
    pairs = zip(recorded.flatten(0, 1).tolist(), own.flatten(0, 1).tolist(), strict=True)
    expected = sum(len(set(chosen) - set(before)) for before, chosen in pairs)
    ahead = torch.zeros(5, 4, dtype=torch.int16)
    assert int(num_changed_choices(recorded, [*own, ahead])) == expected > 0
    assert int(num_changed_choices(recorded, list(recorded.flip(-1)))) == 0


def test_a_router_that_runs_twice_is_not_recorded_as_two_layers() -> None:
    model = make("Qwen3MoeForCausalLM")
    first, second = routers(model)
    x = torch.zeros(2, model.config.hidden_size)
    with record_routing([first, second]), pytest.raises(AssertionError, match="once each"):
        first(x)
        first(x)


def test_a_dense_model_has_nothing_to_record() -> None:
    hf = architectures()["LlamaForCausalLM"]
    assert routers(hf.model(hf.config.tiny())) == []
