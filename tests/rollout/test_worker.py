"""The worker around an engine, and the proof that weights arrived: on both engines, inline and through Ray's store."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmquest_rl.types import Request, Sampling
from rollout import ENGINES
from rollout.engine import EngineSetup, engine_config
from rollout.weights import WeightsDamagedError, WeightSnapshot, checksum, take_snapshot, verify
from rollout.worker import RolloutWorker
from tests.rollout.conftest import VERSIONS, perturbed


def test_checksum_sees_every_change_and_only_the_content() -> None:
    tensor = torch.arange(3 * 4099, dtype=torch.float32).reshape(3, 4099)
    same = checksum(tensor)
    assert checksum(tensor.clone()) == same
    assert checksum(tensor.t().contiguous().t()) == same, "the layout in memory is not content"
    assert checksum(torch.cat([torch.zeros(1), tensor.reshape(-1)])[1:].reshape(3, 4099)) == same, "nor is the address"
    in_a_file = torch.frombuffer(bytearray(8) + tensor.numpy().tobytes(), dtype=torch.float32, offset=4)
    assert checksum(in_a_file[1:].reshape(3, 4099)) == same, "nor is the start of the memory"
    for changed in (tensor.reshape(4099, 3), tensor.double(), tensor.flip(0), tensor.flip(1), tensor[:, :-1]):
        assert checksum(changed) != same
    for index in (0, 5000, 12296):
        one_bit = tensor.clone()
        one_bit.view(torch.int32).view(-1)[index] ^= 1
        assert checksum(one_bit) != same
    swapped = tensor.clone()
    swapped.view(-1)[[1, 8191]] = swapped.view(-1)[[8191, 1]]
    assert checksum(swapped) != same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [0, 1, 3, 8, 40001])
def test_checksum_of_any_size_and_dtype(dtype: torch.dtype, size: int) -> None:
    values = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    assert checksum(values) == checksum(values.clone())
    if size:
        changed = values.clone()
        changed[-1] = 1 - changed[-1].int()
        assert checksum(changed) != checksum(values)


def test_all_tensors_of_a_model_have_different_checksums(pretrained: dict[str, Tensor]) -> None:
    tensors, checksums = take_snapshot(pretrained.items())
    assert len(set(checksums.values())) == len(tensors)


def test_damage_on_the_way_is_found(pretrained: dict[str, Tensor]) -> None:
    small = {name: tensor for name, tensor in pretrained.items() if tensor.ndim == 1}
    tensors, checksums = take_snapshot(small.items())
    assert verify(WeightSnapshot(tensors, checksums)) == verify(WeightSnapshot(dict(tensors), dict(checksums)))
    damaged = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e-3}
    with pytest.raises(WeightsDamagedError, match=r"1 of 61 tensors .*model\.norm\.weight"):
        verify(WeightSnapshot(damaged, checksums))
    lost = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(WeightsDamagedError, match=r"same names: model\.norm\.weight"):
        verify(WeightSnapshot(lost, checksums))


@pytest.mark.parametrize("name", ENGINES.names())
def test_unknown_options_are_refused_before_an_engine_library_is_needed(name: str) -> None:
    with pytest.raises(ValueError, match="flux_capacitor"):
        engine_config(name)(flux_capacitor=1)


def test_an_unknown_engine_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match="native, vllm"):
        engine_config("vlm")


def test_a_worker_loads_only_what_was_sent(vllm_worker: RolloutWorker, pretrained: dict[str, Tensor]) -> None:
    before, version = vllm_worker.engine.logprobs([[1, 2, 3, 4]]), vllm_worker.engine.describe()["version"]
    tensors, checksums = take_snapshot(perturbed(pretrained).items())
    damaged = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1e-3}
    with pytest.raises(WeightsDamagedError, match=r"model\.norm\.weight"):
        vllm_worker.load_weights(WeightSnapshot(damaged, checksums), next(VERSIONS))
    assert vllm_worker.engine.describe()["version"] == version
    assert vllm_worker.engine.logprobs([[1, 2, 3, 4]]) == before
    newer = next(VERSIONS)
    report = vllm_worker.load_weights(WeightSnapshot(tensors, checksums), newer)
    assert (report.version, report.num_tensors) == (newer, 272)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert report.checksum == verify(WeightSnapshot(tensors, checksums))
    assert vllm_worker.engine.logprobs([[1, 2, 3, 4]]) != before
    facts = vllm_worker.engine.describe()
    assert facts["engine"] == "vllm" and facts["version"] == newer and facts["dtype_reason"] == "configured"
    assert facts["tensors_read_back"] == 62, "the embedding and the norms: what vLLM keeps unpacked"


def test_tensors_in_read_only_memory_are_loaded_without_complaint(
    vllm_worker: RolloutWorker, pretrained: dict[str, Tensor], recwarn: pytest.WarningsRecorder
) -> None:
    """Objects in shared memory are read-only: numpy arrays without the right to write, seen as tensors."""
    tensors, checksums = take_snapshot(perturbed(pretrained, seed=2).items())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    shared = {}
    for name, array in arrays.items():
        array.flags.writeable = False
        shared[name] = torch.from_numpy(array)
    recwarn.clear()  # from_numpy's own, at the place where tensors are made
    vllm_worker.load_weights(WeightSnapshot(shared, checksums), next(VERSIONS))
    assert not [warning for warning in recwarn if "writ" in str(warning.message)]
    assert verify(WeightSnapshot(tensors, checksums)), "and they were only read"


def test_an_engine_in_another_dtype_takes_float32_weights(model_path: Path, pretrained: dict[str, Tensor]) -> None:
    setup = EngineSetup(context_tokens=64, max_sequences=4, threads=1)
    worker = RolloutWorker("native", engine_config("native")(), model_path, replace(setup, dtype="bfloat16"))
    try:
        sequence = [[1, 504, 2988, 314, 216, 39]]
        before = torch.tensor(worker.engine.logprobs(sequence)[0])
        version = worker.load_weights(take_snapshot(perturbed(pretrained).items()), 7).version
        (completion,) = worker.generate([Request(sequence[0], 1, 0)], Sampling(max_tokens=2))[0]
        assert version == completion.weight_version == worker.engine.describe()["version"] == 7
        assert (torch.tensor(worker.engine.logprobs(sequence)[0]) - before).abs().max() > 0.01
        json.dumps(worker.engine.describe())
    finally:
        worker.close()
