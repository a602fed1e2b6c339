"""Every architecture compared with transformers: logits, gradients, and the bytes on disk, on random checkpoints that
transformers wrote itself; and the logits of SmolLM2."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention.attention import PackedAttention
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import CausalLM, Model
from llmquest_rl.models.checkpoint.hub import check_model_files, resolve_model
from llmquest_rl.models.checkpoint.load_save import load_any_model, load_model, new_model, save_model
from llmquest_rl.models.checkpoint.parity import parity
from llmquest_rl.models.checkpoint.weight_files import weight_entries
from llmquest_rl.models.weight_map import disk_tensors
from tests.models.families import CASES, FAMILIES, LANGUAGE_MODELS, case_name, tiny_folder, write_reference

torch.set_num_threads(1)

every_case = pytest.mark.parametrize("case", CASES, ids=case_name)
every_architecture = pytest.mark.parametrize("architecture", LANGUAGE_MODELS)


def first_case(architecture: str) -> tuple[str, str]:
    family = LANGUAGE_MODELS[architecture]
    return family, next(iter(FAMILIES[family].VARIANTS))


def test_every_language_model_has_variants() -> None:
    """A new architecture needs only a file of variants here. The VLM has no counterpart in transformers."""
    models = {name for name, hf in architectures().items() if issubclass(hf.model, CausalLM)}
    without = models - LANGUAGE_MODELS.keys() - {"VisionLanguageForCausalLM"}
    assert not without, f"tests/models/variants: add a file whose MODEL is {', '.join(without)} (CONTRIBUTING.md)"
    few = [family for family in LANGUAGE_MODELS.values() if len(FAMILIES[family].VARIANTS) < 6]
    assert few == [], "tests/models/variants: VARIANTS of these files should be at least six"


@every_case
def test_logits_equal_transformers(case: tuple[str, str], tmp_path: Path) -> None:
    report = parity(write_reference(tmp_path, case))
    assert report.architecture == FAMILIES[case[0]].MODEL
    assert report.positions > 100
    assert report.max_abs_logit > 0.1
    assert report.worst <= FAMILIES[case[0]].TOLERANCE


@every_case
def test_gradients_equal_transformers(case: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_reference(tmp_path, case)
    model = load_model(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    lengths = (9, 40, 5)
    sequences = [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in lengths]
    layout = Layout(lengths, (-1, -1, -1))
    states = model.hidden(torch.cat(sequences), layout.positions(), PackedAttention(layout, "cpu")).states
    logprobs, _ = model.head(states, torch.cat(sequences))
    logprobs.sum().backward()
    for sequence in sequences:
        logits = theirs(sequence[None], use_cache=False).logits[0]
        torch.log_softmax(logits, -1).gather(-1, sequence[:, None]).sum().backward()
    expected = reference_gradients(theirs, tmp_path / "gradients")
    gradients = dict(disk_tensors(model, named_gradients(model)))
    assert gradients.keys() == expected.keys()
    tolerances = getattr(FAMILIES[case[0]], "GRADIENT_TOLERANCES", {})
    for key, gradient in gradients.items():
        tolerance = tolerances.get(key.rpartition(".")[2], 1e-4)
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(gradient, expected[key], atol=tolerance * scale + 1e-7, rtol=0.0, msg=key)


def named_gradients(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """A weight that a batch did not reach has a gradient of 0."""
    return [
        (name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def reference_gradients(theirs: torch.nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the gradients of a model of transformers by their names on disk, by saving them as weights."""
    from safetensors.torch import load_file

    buffers = {name for name, _ in theirs.named_buffers()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.copy_(gradient)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return {key: value for key, value in load_file(folder / "model.safetensors").items() if key not in buffers}


@every_case
def test_round_trip_gives_the_same_bytes(case: tuple[str, str], tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first = write_reference(tmp_path / f"{dtype}", case, dtype)
        second = tmp_path / f"{dtype} again"
        check_model_files(first)
        save_model(first, disk_tensors(load_model(first, dtype)), second)
        assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
        assert (second / "config.json").read_bytes() == (first / "config.json").read_bytes()


@every_architecture
def test_sharded_files(architecture: str, tmp_path: Path) -> None:
    case = first_case(architecture)
    whole = dict(disk_tensors(load_model(write_reference(tmp_path / "whole", case), torch.float32)))
    sharded = write_reference(tmp_path / "sharded", case, shard="20KB")
    assert (sharded / "model.safetensors.index.json").exists()
    model = load_model(sharded, torch.float32)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in disk_tensors(model))
    save_model(sharded, disk_tensors(model), tmp_path / "again", max_shard_bytes=20_000)
    assert set(weight_entries(tmp_path / "again")) == set(weight_entries(sharded)) == set(whole)


@every_architecture
def test_what_does_not_fit_is_named(architecture: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_reference(tmp_path, first_case(architecture))
    tensors = load_file(folder / "model.safetensors")
    key = sorted(tensors)[len(tensors) // 2]
    lost = tensors.pop(key)
    save_file({**tensors, "model.extra": lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_model(folder, torch.float32)
    assert "unknown model.extra" in str(error.value)
    assert f"missing {key}" in str(error.value)


@every_architecture
def test_what_we_write_equals_transformers(architecture: str, tmp_path: Path) -> None:
    """transformers reads our own config.json and weights, and gets the same logits."""
    hf = architectures()[architecture]
    source = tiny_folder(tmp_path / "source", architecture)
    config = hf.config.tiny()
    assert hf.config.from_hf(config.to_hf()) == config
    save_model(source, disk_tensors(new_model(source, torch.float32)), tmp_path / "saved")
    check_model_files(tmp_path / "saved")
    assert parity(tmp_path / "saved").worst <= FAMILIES[LANGUAGE_MODELS[architecture]].TOLERANCE


@every_architecture
def test_version_4_config_is_read(architecture: str, tmp_path: Path) -> None:
    """Most folders on the Hub hold rope_theta, rope_scaling and torch_dtype."""
    folder = write_reference(tmp_path, first_case(architecture))
    config = json.loads((folder / "config.json").read_text())
    expected = architectures()[architecture].config.from_hf(config)
    rope = config.pop("rope_parameters", None)
    if rope is not None and "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    if rope is not None and "full_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    assert architectures()[architecture].config.from_hf(config) == expected


@pytest.mark.slow
def test_smollm2() -> None:
    """A real pretrained model: its logits reach 30, so float32 itself leaves differences near 1e-4."""
    try:
        folder = resolve_model("smollm2-135m-instruct")
    except ValueError as error:
        pytest.skip(str(error))
    report = parity(folder)
    assert report.max_abs_logit > 10
    assert report.worst <= 1e-4


def test_a_wrong_weight_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself works: it fails if two matrices of one layer are exchanged in our copy."""

    def exchanged(path: Path, dtype: torch.dtype) -> Model:
        model = load_any_model(path, dtype)
        mlp = model.blocks[1].get_submodule("mlp")
        gate, up = mlp.get_parameter("gate.weight"), mlp.get_parameter("up.weight")
        with torch.no_grad():
            first, second = gate.clone(), up.clone()
            gate.copy_(second)
            up.copy_(first)
        return model

    folder = write_reference(tmp_path, first_case("LlamaForCausalLM"))
    monkeypatch.setattr("llmquest_rl.models.checkpoint.parity.load_any_model", exchanged)
    assert parity(folder).worst > 1e-3
