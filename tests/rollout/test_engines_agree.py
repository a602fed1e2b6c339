"""Every engine gives the same log-probs for the same tokens and weights, before and after a live update."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmquest_rl.types import Request, Sampling
from rollout.engine import engine_config
from rollout.weights import publish
from rollout.worker import RolloutWorker
from tests.rollout.conftest import SETUP, VERSIONS, perturbed

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
    published = publish((perturbed(pretrained, seed=3) if weights == "updated" else pretrained).items())
    version = next(VERSIONS)
    reports = [worker.load_weights(published, version) for worker in workers]
    assert reports[0].checksum == reports[1].checksum

    given = [worker.logprobs(PROMPTS) for worker in workers]
    for native, vllm in zip(*given, strict=True):
        torch.testing.assert_close(torch.tensor(native), torch.tensor(vllm), rtol=0, atol=TOLERANCE)

    for sampler, scorer in (workers, workers[::-1]):
        groups = sampler.generate([Request(p, 2, seed=4) for p in PROMPTS], Sampling(max_tokens=10))
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for completion in group:
                (scored,) = scorer.logprobs([prompt + completion.token_ids])
                assert completion.logprobs == pytest.approx(scored[len(prompt) - 1 :], abs=TOLERANCE)


def test_greedy_tokens_and_endings_agree(
    native_worker: RolloutWorker, vllm_worker: RolloutWorker, pretrained: dict[str, Tensor]
) -> None:
    published = publish(pretrained.items())
    version = next(VERSIONS)
    for worker in (native_worker, vllm_worker):
        worker.load_weights(published, version)
    requests = [Request(prompt, 1, seed=0) for prompt in PROMPTS]
    for sampling in (Sampling(max_tokens=8, temperature=0), Sampling(max_tokens=8, temperature=0, stop=(" ",))):
        native, vllm = (worker.generate(requests, sampling) for worker in (native_worker, vllm_worker))
        for (ours,), (theirs,) in zip(native, vllm, strict=True):
            assert (ours.token_ids, ours.text, ours.finish_reason) == (
                theirs.token_ids,
                theirs.text,
                theirs.finish_reason,
            )
