"""The chunked head: exact values and gradients, and memory that does not grow with tokens x vocabulary."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llmquest_rl.generation.packed_weights import PackedHead
from llmquest_rl.layers import lm_head, soft_targets
from llmquest_rl.layers.lm_head import LMHead
from llmquest_rl.soft_targets import TeacherHead

torch.set_num_threads(1)


def make(
    n: int,
    vocab: int = 97,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
) -> tuple[LMHead, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    head = LMHead(size, vocab, softcap=softcap)
    torch.nn.init.normal_(head.weight, generator=generator)
    states = torch.randn(n, size, generator=generator).to(dtype).requires_grad_()
    return head.to(dtype), states, torch.randint(vocab, (n,), generator=generator)


def reference(
    head: LMHead, states: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, entropy and a copy of the leaves, in float64."""
    wide_states = states.detach().double().requires_grad_()
    wide_weight = head.weight.detach().double().requires_grad_()
    logits = wide_states @ wide_weight.t()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logprobs = torch.log_softmax(logits / temperature, -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy, wide_states, wide_weight


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", {"cpu": 0})
    monkeypatch.setattr(lm_head, "MIN_CHUNK_COLUMNS", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("n", [1, 8, 21])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_values_and_gradients_equal_float64(
    n: int, temperature: float, softcap: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    head, states, targets = make(n, dtype=dtype, softcap=softcap)
    upstream = torch.linspace(-1.0, 2.0, n)
    logprobs, entropy = head(states, targets, temperature, entropy=True)
    expected, expected_entropy, wide_states, wide_weight = reference(head, states, targets, temperature)
    assert entropy is not None
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=tolerance, rtol=tolerance)
    logprobs.backward(upstream)
    expected.backward(upstream.double())
    for ours, theirs in ((states.grad, wide_states.grad), (head.weight.grad, wide_weight.grad)):
        assert ours is not None
        assert theirs is not None
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * float(theirs.abs().max()), rtol=0.0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_the_gradient_of_the_entropy(
    temperature: float, softcap: float | None, share: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Checks the gradient of the entropy together with a fraction of the log-probs' gradient, and alone."""
    head, states, targets = make(9, dtype=dtype, softcap=softcap)
    upstream = torch.linspace(-1.0, 2.0, 9)
    logprobs, entropy = head(states, targets, temperature, entropy=True)
    expected, expected_entropy, wide_states, wide_weight = reference(head, states, targets, temperature)
    assert entropy is not None
    parts = [(entropy * upstream.flip(0)).sum(), *([(logprobs * upstream).sum()] if share else [])]
    torch.stack(parts).sum().backward()
    ((expected_entropy * upstream.flip(0)).sum() + share * (expected * upstream).sum()).backward()
    for ours, theirs in ((states.grad, wide_states.grad), (head.weight.grad, wide_weight.grad)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance * float(theirs.abs().max()), rtol=0.0)


def test_an_entropy_that_nobody_asked_for_is_none() -> None:
    head, states, targets = make(5)
    assert head(states, targets)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capped_logits_are_those_of_the_log_probs(dtype: torch.dtype) -> None:
    """The packed head of generation gives the same logits: the cap is applied in float32 everywhere."""
    head, states, targets = make(5, dtype=dtype, softcap=5.0)
    with torch.no_grad():
        logits = head.logits(states)
        assert logits.dtype == torch.float32
        assert 4.0 < float(logits.abs().max()) < 5.0
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        torch.testing.assert_close(head(states, targets)[0], chosen, atol=1e-5, rtol=0.0)
        packed = PackedHead(head)
        packed.pack()
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2  # products are rounded to the dtype of the weight
        torch.testing.assert_close(packed.logits(states), logits, atol=tolerance, rtol=0.0)


def test_saturated_logits_have_no_gradient() -> None:
    head, states, targets = make(3, softcap=0.5)
    head(states * 1e4, targets)[0].sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, torch.zeros_like(states))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_targets(softcap: float | None) -> None:
    """A microbatch without targets still takes part: backward gives zeros, not missing gradients."""
    head, states, targets = make(0, softcap=softcap)
    logprobs, entropy = head(states, targets, 1.0, True)
    assert logprobs.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)
    logprobs.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_frozen_weight_and_tied_weight() -> None:
    head, states, targets = make(5)
    head.weight.requires_grad_(False)
    head(states, targets)[0].sum().backward()
    assert states.grad is not None
    assert head.weight.grad is None
    embedding = torch.nn.Embedding(97, 16)
    assert LMHead(16, 97, embedding.weight).weight is embedding.weight


def peak_bytes(n: int, vocab: int, softcap: float | None, teacher: bool = False) -> int:
    """Largest memory held by tensors beyond those that existed before, over forward and backward."""
    head, states, targets = make(n, vocab, softcap=softcap)
    frozen = TeacherHead(torch.randn(n, 8), torch.randn(vocab, 8)) if teacher else None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        logprobs, kl = head(states, targets, 0.9, entropy=not teacher, soft_targets=frozen)
        (logprobs.sum() if kl is None or not teacher else kl.sum()).backward()
    current = peak = 0
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 8192
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", {"cpu": 64 * vocab})
    monkeypatch.setattr(lm_head, "MIN_CHUNK_COLUMNS", 16)
    small, large = (peak_bytes(n, vocab, softcap) for n in (256, 4096))
    logits = 4096 * vocab * 4
    assert large < logits / 10
    assert (
        large - small < 4096 * 16 * 4 * 8
    )  # a few tensors of the size of the states: nothing with the vocabulary in it


def test_the_kl_to_a_teacher_holds_one_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 8192
    monkeypatch.setattr(soft_targets, "BLOCK_ELEMENTS", {"cpu": 16 * vocab})
    small, large = (peak_bytes(n, vocab, None, teacher=True) for n in (128, 1024))
    assert large < 1024 * vocab * 4 / 2
    assert large - small < 1024 * 16 * 4 * 8
