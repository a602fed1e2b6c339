"""GPT-2 beyond the tests of all families: layouts of files, the limit of positions, and initial weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.gpt2 import GPT2, GPT2Config
from llmquest_rl.models.weight_map import disk_tensors
from tests.models.families import tiny_folder, write_reference

torch.set_num_threads(1)

PREFIX = "transformer."


def with_masks(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Write tensors as older versions of transformers did: with the causal mask of each layer."""
    masks = {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(3)}
    return tensors | masks | {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_layouts_of_older_files(variant: str, prefix: str, tmp_path: Path) -> None:
    """The file of the first GPT-2 has no prefix, and a mask in each layer. Our file has a prefix and no mask."""
    folder = write_reference(tmp_path, ("gpt2", variant))
    tensors = load_file(folder / "model.safetensors")
    expected = dict(disk_tensors(load_model(folder, torch.float32)))
    old = {
        prefix + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key: value for key, value in tensors.items()
    }
    save_file(with_masks(old, prefix), folder / "model.safetensors", metadata={"format": "pt"})
    model = load_model(folder, torch.float32)
    found = dict(disk_tensors(model))
    assert found.keys() == expected.keys() == tensors.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    save_model(folder, disk_tensors(model), tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


def test_matrices_lie_transposed(tmp_path: Path) -> None:
    model = new_model(tiny_folder(tmp_path, "GPT2LMHeadModel"), torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in disk_tensors(model)}
    assert shapes["transformer.h.1.attn.c_attn.weight"] == (64, 192)
    assert shapes["transformer.h.1.mlp.c_proj.weight"] == (256, 64)
    assert shapes["transformer.wte.weight"] == (256, 64)
    assert model.get_parameter("blocks.1.attention.query_key_value.weight").shape == (192, 64)


def test_a_sequence_beyond_the_learned_positions() -> None:
    model = GPT2(
        GPT2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, max_positions=6)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    model(collate([SequenceGroup([1, 2, 3], [[4, 5, 6, 7], [1]])]))  # the last token predicts nothing
    for group in (SequenceGroup([1, 2, 3], [[1], [4, 5, 6, 7, 8]]), SequenceGroup([], [[1] * 8])):
        with pytest.raises(ValueError, match="a sequence has 7 tokens.*n_positions 6"):
            model(collate([group]))


def test_what_is_added_to_the_residual_stream_starts_smaller() -> None:
    config = GPT2Config(vocab_size=64, hidden_size=128, intermediate_size=512, num_layers=8, num_heads=2)
    model = GPT2(config)
    model.init_weights(torch.Generator().manual_seed(0))
    deviations = {name: float(weight.detach().std()) for name, weight in model.blocks[3].named_parameters()}
    for name in ("attention.query_key_value.weight", "mlp.up.weight"):
        assert deviations[name] == pytest.approx(0.02, rel=0.05)
    for name in ("attention.output.weight", "mlp.down.weight"):
        assert deviations[name] == pytest.approx(0.02 / 4, rel=0.05)


def test_what_config_json_leaves_out() -> None:
    """The first file has no field for the inner size, the scaling, or the tied output layer."""
    path = Path(__file__).parents[2] / "configs" / "models" / "gpt2.json"
    config = GPT2Config.from_hf(json.loads(path.read_text()))
    assert config == GPT2Config(
        vocab_size=50257, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12, max_positions=1024
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "n_embd 64 is not a multiple of n_head 3"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"n_positions": None}, "n_positions is None"),
        ({"vocab_size": "50257"}, "vocab_size is '50257'"),
        ({"activation_function": "gelu_quick"}, "activation_function 'gelu_quick' is not implemented"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config.from_hf({**GPT2Config.tiny().to_hf(), **change})
