"""Parity with transformers in values and gradients, on random checkpoints that it wrote itself, and on SmolLM2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquest_rl.batch import Layout
from llmquest_rl.layers.attention import PackedAttention
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.hf import architectures, disk_tensors, load_model, save_model
from llmquest_rl.models.hub import check_model_files, resolve_model
from llmquest_rl.models.parity import parity

torch.set_num_threads(1)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "tied, 3 heads on 1": {"tie_word_embeddings": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "untied, 4 heads on 2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "no grouping, odd head size": {
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "hidden_size": 50,
        "head_dim": 10,
    },
    "head size apart from width": {"head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama 3 rope": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another epsilon and base": {
        "rms_norm_eps": 0.01,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "bfloat16 on disk": {"save_dtype": torch.bfloat16},
    "sharded": {"max_shard_size": "20KB"},
}


def write_llama(folder: Path, **overrides: Any) -> Path:
    """A random Llama checkpoint, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_dtype = overrides.pop("save_dtype", torch.float32)
    max_shard_size = overrides.pop("max_shard_size", "1GB")
    shape = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **overrides}))
    for name, parameter in model.named_parameters():  # so that a norm or bias that is left out shows
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.to(save_dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path, **VARIANTS[name])
    assert (folder / "model.safetensors.index.json").exists() == (name == "sharded")
    report = parity(folder)
    assert report.architecture == "LlamaForCausalLM"
    assert report.positions > 100
    assert report.worst <= 1e-5


@pytest.mark.parametrize("architecture", architectures())
def test_tiny_shape_equals_transformers(architecture: str, tmp_path: Path) -> None:
    """Every architecture file: its own config.json and names are read by transformers, with the same logits."""
    hf = architectures()[architecture]
    (tmp_path / "source").mkdir()
    config = hf.config.tiny()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config.to_hf()))
    assert hf.config.from_hf(config.to_hf()) == config
    torch.manual_seed(0)
    model = hf.model(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(tmp_path / "source", disk_tensors(model), tmp_path / "saved")
    check_model_files(tmp_path / "saved")
    assert parity(tmp_path / "saved").worst <= 1e-5


def test_version_4_config_is_read(tmp_path: Path) -> None:
    """Most folders on the Hub hold rope_theta, rope_scaling and torch_dtype."""
    folder = write_llama(tmp_path, rope_parameters=LLAMA3_ROPE, num_key_value_heads=2)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert parity(folder).worst <= 1e-5


@pytest.mark.parametrize("name", ["tied, 3 heads on 1", "biases", "llama 3 rope"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_llama(tmp_path, **VARIANTS[name])
    model = load_model(folder, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(101, (length,), generator=generator) for length in (9, 30, 5)]
    layout = Layout((9, 30, 5), (-1, -1, -1))
    states, _ = model.hidden(torch.cat(sequences), layout.positions(), PackedAttention(layout, "cpu"))
    logprobs, _ = model.head(states, torch.cat(sequences))
    logprobs.sum().backward()
    for sequence in sequences:
        logits = theirs(sequence[None]).logits[0]
        torch.log_softmax(logits, -1).gather(-1, sequence[:, None]).sum().backward()
    expected: dict[str, Tensor | None] = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = dict(disk_tensors(model, named_gradients(model)))
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        theirs_gradient = expected[key]
        assert theirs_gradient is not None
        scale = float(theirs_gradient.abs().max())
        torch.testing.assert_close(gradient, theirs_gradient, atol=2e-5 * scale, rtol=0.0, msg=key)


def named_gradients(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    gradients = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients.append((name, parameter.grad))
    return gradients


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
    """The measure itself: with two matrices of one layer exchanged in our copy, parity is lost."""

    def exchanged(path: Path, dtype: torch.dtype) -> CausalLM:
        model = load_model(path, dtype)
        mlp = model.blocks[1].get_submodule("mlp")
        gate, up = mlp.get_parameter("gate.weight"), mlp.get_parameter("up.weight")
        with torch.no_grad():
            first, second = gate.clone(), up.clone()
            gate.copy_(second)
            up.copy_(first)
        return model

    folder = write_llama(tmp_path)
    monkeypatch.setattr("llmquest_rl.models.parity.load_model", exchanged)
    assert parity(folder).worst > 1e-3
