"""A packed batch equals separate sequences for every architecture, in values and gradients, and nothing leaks."""

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.layers.moe.experts import RoutedExperts
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM
from tests.models.families import LANGUAGE_MODELS

torch.set_num_threads(1)

ARCHITECTURES = {name: architectures()[name] for name in LANGUAGE_MODELS}

GROUPS = [
    SequenceGroup([5, 9, 2, 7], [[3, 8], [1, 1, 4, 6, 2], [9]]),
    SequenceGroup([11, 3], [[7, 7, 7]]),
    SequenceGroup([], [[4, 8, 15, 16, 23, 42]]),
    SequenceGroup([6, 6, 6, 6, 6], [[], [2, 3, 4, 5]], mask=[[], [True, False, True, True]]),
]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> CausalLM:
    hf = ARCHITECTURES[request.param]
    model = hf.model(hf.config.tiny())
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # far from uniform
    return model


def gradients(model: CausalLM, logprobs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], atol=1e-5 * float(gradient.abs().max()), rtol=0.0, msg=name)


def test_shared_prompts_equal_repeated_prompts(model: CausalLM) -> None:
    if not model.shares_prompts:
        pytest.skip("this architecture computes a prompt for each completion")
    shared = model(collate(GROUPS), 0.8, True)
    repeated = model(collate([part for group in GROUPS for part in group.expanded()]), 0.8, True)
    torch.testing.assert_close(shared.logprobs, repeated.logprobs, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(shared.entropy, repeated.entropy, atol=1e-5, rtol=0.0)
    assert_same_gradients(gradients(model, shared.logprobs), gradients(model, repeated.logprobs))


def test_packed_equals_separate(model: CausalLM) -> None:
    groups = [part for group in GROUPS for part in group.expanded()]
    packed = model(collate(groups)).logprobs
    separate = torch.cat([model(collate([group])).logprobs for group in groups])
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=0.0)
    assert_same_gradients(gradients(model, packed), gradients(model, separate))


def test_forward_equals_plain_log_softmax(model: CausalLM) -> None:
    batch = collate([part for group in GROUPS for part in group.expanded()])
    states = model.hidden(batch.tokens, batch.positions, PackedAttention(batch.layout, "cpu")).states
    distribution = torch.log_softmax(model.logits(states).double() / 0.8, -1)[batch.sources]
    output = model(batch, 0.8, True)
    expected = distribution.gather(-1, batch.targets[:, None]).squeeze(-1)
    torch.testing.assert_close(output.logprobs.double(), expected, atol=1e-5, rtol=0.0)
    assert output.entropy is not None
    entropy = -(distribution.exp() * distribution).sum(-1)
    torch.testing.assert_close(output.entropy.double(), entropy, atol=1e-5, rtol=0.0)


def test_a_neighbour_cannot_leak(model: CausalLM) -> None:
    """Changing one completion, or the other group, changes no other log-prob by a single bit; where there are experts,
    by no more than the rounding of a product with another number of rows."""
    groups = [GROUPS[0], GROUPS[1]]
    before = model(collate(groups)).logprobs
    groups[0] = SequenceGroup(GROUPS[0].prompt, [[3, 8], [99, 98, 97, 96, 95], [9]])
    groups[1] = SequenceGroup([50, 51], GROUPS[1].completions)
    after = model(collate(groups)).logprobs
    own = torch.tensor([0, 1, 7])  # completions 0 and 2 of the first group
    has_experts = any(isinstance(module, RoutedExperts) for module in model.modules())
    torch.testing.assert_close(after[own], before[own], atol=5e-6 if has_experts else 0.0, rtol=0.0)
    assert not bool((before[2:7] == after[2:7]).any())
    assert not bool((before[8:] == after[8:]).any())


def test_gradient_checkpointing_gives_the_same_gradients(model: CausalLM) -> None:
    batch = collate(GROUPS)
    plain = gradients(model, model(batch).logprobs)
    saved_plain = saved_bytes(model)
    model.gradient_checkpointing = True
    again = gradients(model, model(batch).logprobs)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert saved_bytes(model) < saved_plain / 3


def saved_bytes(model: CausalLM) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs = model(collate(GROUPS)).logprobs
    assert logprobs.requires_grad
    return sum(kept.values())


def test_checkpointing_does_nothing_without_gradient(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("checkpointed without a gradient to compute")

    monkeypatch.setattr("llmquest_rl.models.base.checkpoint", never)
    model.gradient_checkpointing = True
    with torch.no_grad():
        model(collate(GROUPS))
    with pytest.raises(AssertionError, match="without a gradient"):
        model(collate(GROUPS))


def test_batch_without_targets(model: CausalLM) -> None:
    output = model(collate([SequenceGroup([1, 2, 3], [[]])]), entropy=True)
    assert output.logprobs.shape == (0,)
    assert not any(bool(gradient.any()) for gradient in gradients(model, output.logprobs).values())
