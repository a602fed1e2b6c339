"""The vLLM engine on a real model: samples, their log-probs, and live updates."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmquest_rl.types import Completion, Request, Sampling
from rollout.engine import EngineError, EngineSetup, check_engine, choose_engine, engine_config
from rollout.worker import RolloutWorker
from tests.rollout.conftest import perturbed, reference_logprobs, sync_weights

QUESTIONS = ["What is 3 + 4? Reply with the number only.", "Name a colour.", "Count from one to five."]


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def requests(prompts: list[list[int]], n: int = 2) -> list[Request]:
    return [Request(prompt, n, seed=i) for i, prompt in enumerate(prompts)]


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [completion for group in groups for completion in group]


def reported_and_reference(
    groups: list[list[Completion]], prompts: list[list[int]], model_path: Path, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-probs [tokens] of all sampled tokens: the engine's, and those of transformers with the given weights."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    scored = reference_logprobs(model_path, tensors, [prompt + c.token_ids for prompt, c in pairs])
    reference = [
        value for (prompt, _), values in zip(pairs, scored, strict=True) for value in values[len(prompt) - 1 :]
    ]
    return torch.tensor([value for _, c in pairs for value in c.logprobs]), torch.tensor(reference)


def test_sampled_logprobs_are_the_models_before_and_after_a_live_update(
    vllm_worker: RolloutWorker, prompts: list[list[int]], model_path: Path, pretrained: dict[str, Tensor]
) -> None:
    sampling = Sampling(max_tokens=12)
    before = vllm_worker.generate(requests(prompts), sampling)
    torch.testing.assert_close(*reported_and_reference(before, prompts, model_path, pretrained), rtol=0, atol=1e-4)
    changed = perturbed(pretrained)
    version = sync_weights(vllm_worker, changed)
    after = vllm_worker.generate(requests(prompts), sampling)
    torch.testing.assert_close(*reported_and_reference(after, prompts, model_path, changed), rtol=0, atol=1e-4)
    assert {c.weight_version for c in flat(after)} == {version}
    old, new = reported_and_reference(after, prompts, model_path, pretrained)
    assert (old - new).abs().mean() > 0.01, "the perturbed model must differ, or this test shows nothing"


def test_given_tokens_are_scored_by_the_weights_in_use(
    vllm_worker: RolloutWorker, prompts: list[list[int]], model_path: Path, pretrained: dict[str, Tensor]
) -> None:
    changed = perturbed(pretrained, seed=1)
    old = vllm_worker.engine.logprobs(prompts)
    sync_weights(vllm_worker, changed)
    new = vllm_worker.engine.logprobs(prompts)
    for scored, tensors in ((old, pretrained), (new, changed)):
        reference = reference_logprobs(model_path, tensors, prompts)
        for ours, theirs in zip(scored, reference, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)
    assert abs(sum(old[0]) - sum(new[0])) > 0.1


def test_a_completion_depends_on_its_seed_and_not_on_its_neighbours(
    vllm_worker: RolloutWorker, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=10)
    alone = vllm_worker.generate([Request(prompts[1], 3, seed=5)], sampling)[0]
    crowd = vllm_worker.generate([*requests(prompts, 4), Request(prompts[1], 3, seed=5)], sampling)[-1]
    other = vllm_worker.generate([Request(prompts[1], 3, seed=6)], sampling)[0]
    assert [c.token_ids for c in alone] == [c.token_ids for c in crowd]
    assert [c.token_ids for c in alone] != [c.token_ids for c in other]
    assert len({tuple(c.token_ids) for c in alone}) > 1, "a group is drawn, not copied"


def test_ends_by_length_end_token_or_stop_string(
    vllm_worker: RolloutWorker, prompts: list[list[int]], model_path: Path
) -> None:
    greedy = Sampling(max_tokens=20, temperature=0)
    (whole,) = vllm_worker.generate([Request(prompts[0], 1, seed=0)], greedy)[0]
    eos = json.loads((model_path / "generation_config.json").read_text())["eos_token_id"]
    assert whole.finish_reason == "stop" and whole.token_ids[-1] == eos
    assert "<|" not in whole.text and whole.text
    (cut,) = vllm_worker.generate([Request(prompts[0], 1, seed=0)], greedy.model_copy(update={"max_tokens": 3}))[0]
    assert cut.finish_reason == "length" and cut.token_ids == whole.token_ids[:3]
    stop = whole.text[2:4]
    (stopped,) = vllm_worker.generate([Request(prompts[0], 1, seed=0)], greedy.model_copy(update={"stop": (stop,)}))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)], "the tokens that formed it stay"
    assert len(stopped.logprobs) == len(stopped.token_ids) < len(whole.token_ids)


def test_greedy_logprobs_are_those_at_temperature_one(
    vllm_worker: RolloutWorker, prompts: list[list[int]], model_path: Path, pretrained: dict[str, Tensor]
) -> None:
    groups = vllm_worker.generate(requests(prompts, 1), Sampling(max_tokens=6, temperature=0))
    torch.testing.assert_close(*reported_and_reference(groups, prompts, model_path, pretrained), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}]
)
def test_logprobs_are_of_the_distribution_that_was_sampled_from(
    vllm_worker: RolloutWorker, prompts: list[list[int]], model_path: Path, cut: dict[str, float]
) -> None:
    sampling = Sampling(max_tokens=1, **cut)
    completions = vllm_worker.generate([Request(prompts[1], 24, seed=3)], sampling)[0]
    probs = {c.token_ids[0]: torch.tensor(c.logprobs[0]).exp().item() for c in completions}
    expected = first_token_distribution(model_path, prompts[1], sampling)
    for token, prob in probs.items():
        assert prob == pytest.approx(expected[token].item(), abs=2e-4)
    assert len(probs) > 1 and sum(probs.values()) <= 1 + 1e-3


@torch.no_grad()
def first_token_distribution(model_path: Path, prompt: list[int], sampling: Sampling) -> Tensor:
    """Probabilities [vocab] after temperature, min-p, top-k and top-p, in the order of vLLM, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, local_files_only=True)
    probs = (model(torch.tensor([prompt])).logits[0, -1].double() / sampling.temperature).softmax(-1)
    probs = torch.where(probs < sampling.min_p * probs.max(), 0, probs)
    if sampling.top_k:
        probs = torch.where(probs < probs.topk(sampling.top_k).values[-1], 0, probs)
    probs = probs / probs.sum()
    ordered, order = probs.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < sampling.top_p
    probs = torch.zeros_like(probs).scatter(0, order[kept], ordered[kept])
    return probs / probs.sum()


def test_foreign_or_old_weights_are_refused_and_change_nothing(
    vllm_worker: RolloutWorker, prompts: list[list[int]], pretrained: dict[str, Tensor]
) -> None:
    before, version = vllm_worker.engine.logprobs(prompts[:1]), vllm_worker.engine.describe()["version"]
    changed = perturbed(pretrained)
    missing = {name: t for name, t in changed.items() if name != "model.layers.3.self_attn.k_proj.weight"}
    with pytest.raises(ValueError, match=r"missing: model\.layers\.3\.self_attn\.k_proj\.weight"):
        sync_weights(vllm_worker, missing)
    with pytest.raises(ValueError, match=r"unknown: model\.extra"):
        sync_weights(vllm_worker, {**changed, "model.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is \[3\] instead of \[576\]"):
        sync_weights(vllm_worker, {**changed, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="not newer"):
        vllm_worker.engine.load_weights(changed.items(), version)
    assert vllm_worker.engine.describe()["version"] == version
    assert vllm_worker.engine.logprobs(prompts[:1]) == before


def test_broken_weights_are_an_error_that_names_the_request(
    vllm_worker: RolloutWorker, prompts: list[list[int]], pretrained: dict[str, Tensor]
) -> None:
    sync_weights(vllm_worker, {**pretrained, "model.norm.weight": torch.full((576,), torch.nan)})
    with pytest.raises(EngineError, match="nan as log-prob of token 0 of a completion of request 0"):
        vllm_worker.generate(requests(prompts), Sampling(max_tokens=2))
    sync_weights(vllm_worker, pretrained)
    assert flat(vllm_worker.generate(requests(prompts), Sampling(max_tokens=2)))


def test_sleeping_frees_the_cache_and_waking_changes_nothing(
    vllm_worker: RolloutWorker, prompts: list[list[int]]
) -> None:
    sampling = Sampling(max_tokens=8)
    before = vllm_worker.generate(requests(prompts), sampling)
    vllm_worker.sleep()
    vllm_worker.sleep()
    assert kv_cache_bytes(vllm_worker) == 0
    with pytest.raises(EngineError, match="wake"):
        vllm_worker.generate(requests(prompts), sampling)
    vllm_worker.wake()
    assert kv_cache_bytes(vllm_worker) > 2**20
    assert [c.token_ids for c in flat(vllm_worker.generate(requests(prompts), sampling))] == [
        c.token_ids for c in flat(before)
    ]


def kv_cache_bytes(worker: RolloutWorker) -> int:
    caches = worker.engine._llm.collective_rpc(lambda w: w.model_runner.kv_caches)[0]
    return sum(cache.untyped_storage().nbytes() for cache in caches)


def test_loggers_that_flood_or_alarm_stay_silent(vllm_worker: RolloutWorker) -> None:
    assert not logging.getLogger("vllm.logging_utils.dump_input").isEnabledFor(logging.ERROR)
    assert not logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").isEnabledFor(logging.WARNING)


def test_bad_prompts_are_named(vllm_worker: RolloutWorker, prompts: list[list[int]]) -> None:
    sampling = Sampling(max_tokens=2)
    with pytest.raises(ValueError, match="request 1 has 0 prompt tokens"):
        vllm_worker.generate([Request(prompts[0], 1, 0), Request([], 1, 0)], sampling)
    with pytest.raises(ValueError, match="request 0 has 128 prompt tokens; this engine takes 1 to 127"):
        vllm_worker.generate([Request([5] * 128, 1, 0)], sampling)
    with pytest.raises(ValueError, match="requests with images need the engine `native`"):
        vllm_worker.generate([Request(prompts[0], 1, 0, np.zeros((1, 3, 16, 16), np.float32))], sampling)
    with pytest.raises(ValueError, match="request 0 has a token outside"):
        vllm_worker.generate([Request([49152], 1, 0)], sampling)
    (full,) = vllm_worker.generate([Request([5] * 126, 1, 0)], Sampling(max_tokens=50, temperature=0))[0]
    assert len(full.token_ids) <= 3


def test_models_that_vllm_cannot_serve_are_refused_before_anything_starts(model_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    config = json.loads((model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    setup = EngineSetup(context_tokens=64)
    with pytest.raises(ValueError, match="heads of size 16.*native"):
        check_engine("vllm", engine_config("vllm")(), tmp_path, setup)
    assert choose_engine(tmp_path, setup)[0] == "native"
    shutil.copyfile(model_path / "config.json", tmp_path / "config.json")
    assert choose_engine(tmp_path, setup)[0] == "vllm"
    with pytest.raises(ValueError, match="8192 positions"):
        check_engine("vllm", engine_config("vllm")(), tmp_path, EngineSetup(context_tokens=9000))
