"""Every engine gives the same log-probs for the same tokens and weights, before and after a live update."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmquest_rl.types import Request, Sampling
from rollout.engine import EngineSetup, engine_config
from rollout.weights import take_snapshot
from rollout.worker import RolloutWorker
from tests.rollout.conftest import SETUP, VERSIONS, WorkerElsewhere, perturbed

TOLERANCE = 1e-4
"""Nats, in float32."""

PROMPTS = [[1, 504, 2988, 314, 216], [1, 9690, 198, 2683, 359, 253, 5356, 5646], list(range(40, 90))]


@pytest.fixture(scope="module")
def native_worker(model_path: Path) -> Iterator[RolloutWorker]:
    worker = RolloutWorker("native", engine_config("native")(), model_path, SETUP)
    yield worker
    worker.close()


@pytest.mark.parametrize("weights", ["pretrained", "updated"])
def test_native_and_vllm_agree(
    weights: str, native_worker: RolloutWorker, vllm_worker: RolloutWorker, pretrained: dict[str, Tensor]
) -> None:
    workers = (native_worker, vllm_worker)
    snapshot = take_snapshot((perturbed(pretrained, seed=3) if weights == "updated" else pretrained).items())
    version = next(VERSIONS)
    reports = [worker.load_weights(snapshot, version) for worker in workers]
    assert reports[0].checksum == reports[1].checksum

    given = [worker.engine.logprobs(PROMPTS) for worker in workers]
    for native, vllm in zip(*given, strict=True):
        torch.testing.assert_close(torch.tensor(native), torch.tensor(vllm), rtol=0, atol=TOLERANCE)

    for sampler, scorer in (workers, workers[::-1]):
        groups = sampler.generate([Request(p, 2, seed=4) for p in PROMPTS], Sampling(max_tokens=10))
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                (scored,) = scorer.engine.logprobs([prompt + completion.token_ids])
                assert completion.logprobs == pytest.approx(scored[len(prompt) - 1 :], abs=TOLERANCE)


def test_greedy_tokens_and_endings_agree(
    native_worker: RolloutWorker, vllm_worker: RolloutWorker, pretrained: dict[str, Tensor]
) -> None:
    snapshot = take_snapshot(pretrained.items())
    version = next(VERSIONS)
    for worker in (native_worker, vllm_worker):
        worker.load_weights(snapshot, version)
    requests = [Request(prompt, 1, seed=0) for prompt in PROMPTS]
    for sampling in (Sampling(max_tokens=8, temperature=0), Sampling(max_tokens=8, temperature=0, stop=(" ",))):
        native, vllm = (worker.generate(requests, sampling) for worker in (native_worker, vllm_worker))
        for (ours,), (theirs,) in zip(native, vllm, strict=True):
            assert (ours.token_ids, ours.text, ours.finish_reason) == (
                theirs.token_ids,
                theirs.text,
                theirs.finish_reason,
            )


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama, as transformers saves it, of another kind: heads of 32, untied, scaled RoPE, no tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=[7, 9],
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    path = tmp_path_factory.mktemp("small_llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_model_without_tokenizer_and_with_two_end_tokens(small_llama: Path) -> None:
    pytest.importorskip("vllm")
    setup = EngineSetup(context_tokens=160, max_sequences=16, threads=1)
    workers = [WorkerElsewhere(name, small_llama, setup) for name in ("native", "vllm")]
    prompts = [list(range(10, 110)), [5, 6, 8]]
    try:
        native, vllm = (worker.engine.logprobs(prompts) for worker in workers)
        for ours, theirs in zip(native, vllm, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=TOLERANCE)
        for sampler, scorer in (workers, workers[::-1]):
            (group,) = sampler.generate([Request(prompts[1], 16, seed=1)], Sampling(max_tokens=40, top_k=12))
            assert {c.text for c in group} == {""}
            assert all((c.token_ids[-1] in (7, 9)) == (c.finish_reason == "stop") for c in group)
            assert all(not {7, 9} & set(c.token_ids[:-1]) for c in group)
            everything = Sampling(max_tokens=40)
            (completion,) = sampler.generate([Request(prompts[0], 1, seed=2)], everything)[0]
            (scored,) = scorer.engine.logprobs([prompts[0] + completion.token_ids])
            assert completion.logprobs == pytest.approx(scored[len(prompts[0]) - 1 :], abs=TOLERANCE)
        with pytest.raises(ValueError, match="stop strings need a tokenizer"):
            workers[1].generate([Request(prompts[1], 1, seed=1)], Sampling(stop=("x",)))
    finally:
        for worker in workers:
            worker.close()
