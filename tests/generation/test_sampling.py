"""Sampling against exact distributions, transformers' processors and vLLM's kernels."""

import math

import pytest
import torch
from torch import Tensor

from llmquest_rl.generation.sampling import (
    keep_min_p,
    keep_top_k,
    keep_top_p,
    processed_logits,
    sample_tokens,
    stream_keys,
    stream_uniforms,
)
from llmquest_rl.types import Sampling

SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.7),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.15),
    "all": Sampling(temperature=1.3, top_k=8, top_p=0.8, min_p=0.05),
}


def random_logits(rows: int, vocab: int = 24, spread: float = 1.5) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * spread


def exact_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [vocab], written from the definitions in float64 with loops."""
    probs = (logits.double() / sampling.temperature).softmax(-1)
    probs = torch.where(probs >= sampling.min_p * probs.max(), probs, 0.0)
    order = probs.argsort(descending=True).tolist()
    kept = order[: sampling.top_k or len(order)]
    total, mass, nucleus = sum(float(probs[i]) for i in kept), 0.0, []
    for i in kept:
        if mass < sampling.top_p * total:
            nucleus.append(i)
        mass += float(probs[i])
    result = torch.zeros_like(probs)
    result[nucleus] = probs[nucleus]
    return result / result.sum()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_follow_the_exact_distribution(name: str) -> None:
    sampling, count = SAMPLINGS[name], 40_000
    logits = random_logits(1)
    expected = exact_probs(logits[0], sampling)
    uniforms = stream_uniforms(stream_keys(11, count), torch.zeros(count, dtype=torch.long))
    tokens, _ = sample_tokens(logits.expand(count, -1), sampling, uniforms)
    observed = torch.bincount(tokens, minlength=24).double()
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = float(((observed - count * expected)[kept] ** 2 / (count * expected[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_logprobs_are_those_of_the_distribution_sampled_from(name: str) -> None:
    sampling, logits = SAMPLINGS[name], random_logits(50)
    tokens, logprobs = sample_tokens(logits, sampling, stream_uniforms(stream_keys(0, 50), torch.arange(50)))
    for row, token, logprob in zip(logits, tokens.tolist(), logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(math.log(exact_probs(row, sampling)[token]), abs=1e-5)


def test_greedy_takes_the_likeliest_with_its_logprob_at_temperature_1() -> None:
    logits = random_logits(8)
    tokens, logprobs = sample_tokens(
        logits, Sampling(temperature=0, top_k=3, top_p=0.5), torch.zeros(8, dtype=torch.float64)
    )
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1))


def test_filters_keep_what_transformers_keeps() -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(64, vocab=500, spread=2.0)
    ids = torch.zeros(64, 0, dtype=torch.long)
    pairs = [(keep_top_k(logits, k), TopKLogitsWarper(k)) for k in (1, 7, 499)]
    pairs += [(keep_top_p(logits, p), TopPLogitsWarper(p)) for p in (0.05, 0.5, 0.9, 0.999)]
    pairs += [(keep_min_p(logits, p), MinPLogitsWarper(p)) for p in (0.01, 0.3, 1.0)]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs(ids, logits.clone()))


def test_filters_together_keep_what_vllm_keeps() -> None:
    kernels = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits = random_logits(64, vocab=500, spread=2.0)
    for sampling in (Sampling(top_k=20, top_p=0.9), Sampling(temperature=0.7, top_p=0.8), Sampling(top_k=3)):
        k = torch.full((64,), sampling.top_k) if sampling.top_k else None
        p = torch.full((64,), sampling.top_p) if sampling.top_p < 1 else None
        theirs = kernels.apply_top_k_top_p_pytorch(logits / sampling.temperature, k, p, allow_cpu_sync=True)
        assert torch.equal(processed_logits(logits, sampling), theirs)


def test_ties_at_the_kth_place_are_all_kept() -> None:
    kept = keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0]]), 2)
    assert kept.isfinite().tolist() == [[False, True, True, True, True]]


def test_the_largest_and_smallest_numbers_still_draw_a_kept_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.1, -math.inf]])
    for uniform, token in ((0.0, 1), (1 - 2.0**-53, 2)):
        tokens, logprobs = sample_tokens(logits, Sampling(), torch.tensor([uniform], dtype=torch.float64))
        assert tokens.tolist() == [token]
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_give_nan_logprobs_in_their_row_only(bad: float, temperature: float) -> None:
    logits = random_logits(3)
    logits[1, 4] = bad
    _, logprobs = sample_tokens(logits, Sampling(temperature=temperature), torch.full((3,), 0.5, dtype=torch.float64))
    assert logprobs.isnan().tolist() == [False, True, False]


def test_streams_are_uniform_distinct_and_independent_of_their_neighbours() -> None:
    keys = stream_keys(-5, 64)
    table = stream_uniforms(keys[:, None], torch.arange(512))
    assert len(set(table.flatten().tolist())) == table.numel()
    assert float(table.min()) >= 0 and float(table.max()) < 1
    assert abs(float(table.mean()) - 0.5) < 4 / math.sqrt(12 * table.numel())
    centred = table - 0.5
    for correlation in ((centred[1:] * centred[:-1]).mean(), (centred[:, 1:] * centred[:, :-1]).mean()):
        assert abs(float(correlation)) < 4 / 12 / math.sqrt(table.numel())
    assert torch.equal(stream_keys(-5, 3), keys[:3])
    assert not set(stream_keys(-4, 64).tolist()) & set(keys.tolist())
    assert stream_keys(2**64 + 7, 2).tolist() == stream_keys(7, 2).tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("min_p", 2.0)]
    + [("max_tokens", 0), ("stop", ("",))],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Sampling\n{name}"):
        Sampling(**{name: value})
