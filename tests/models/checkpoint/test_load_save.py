"""The Hub's folder layout: load and save give the same bytes, and an error names every fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquest_rl.models.checkpoint.hub import check_model_files
from llmquest_rl.models.checkpoint.load_save import load_model, new_model, save_model
from llmquest_rl.models.checkpoint.weight_files import weight_entries
from llmquest_rl.models.llama import HF, LlamaConfig
from llmquest_rl.models.weight_map import disk_pieces, disk_tensors

torch.set_num_threads(1)


def write_tiny(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = True, shard: int = 2**30) -> Path:
    """Save a tiny Llama with tokenizer files."""
    source = folder.parent / f"{folder.name}-source"
    source.mkdir()
    values = {**LlamaConfig.tiny().to_hf(), "tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch.")}
    (source / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (source / name).write_text(f"the content of {name}")
    (source / "optimizer.bin").write_text("not for the Hub")
    save_model(source, disk_tensors(new_model(source, dtype, seed=1)), folder, max_shard_bytes=shard)
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [2**30, 60_000])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_keeps_keys_bytes_and_companions(tmp_path: Path, dtype: torch.dtype, shard: int, tied: bool) -> None:
    first = write_tiny(tmp_path / "first", dtype, tied, shard)
    assert (first / "model.safetensors").exists() == (shard == 2**30)
    second = tmp_path / "second"
    save_model(first, disk_tensors(load_model(first, dtype)), second, max_shard_bytes=shard)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert "chat_template.jinja" in names
    assert "optimizer.bin" not in names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    keys = weight_entries(second)
    assert ("lm_head.weight" in keys) == (not tied)
    letters = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert {entry.dtype for entry in keys.values()} == {letters[dtype]}
    check_model_files(second)


def test_saved_dtype_is_noted_in_config(tmp_path: Path) -> None:
    first = write_tiny(tmp_path / "first", torch.bfloat16)
    save_model(first, disk_tensors(load_model(first, torch.float32)), tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["dtype"] == "float32"
    assert {entry.dtype for entry in weight_entries(tmp_path / "second").values()} == {"F32"}


def test_transformers_reads_what_we_save(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny(tmp_path / "a", shard=60_000)
    (folder / "generation_config.json").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    for name, tensor in disk_tensors(load_model(folder, torch.float32)):
        assert torch.equal(tensor, expected.pop(name)), name
    assert not expected


def test_disk_tensors_of_other_values(tmp_path: Path) -> None:
    """Gathered shards or master weights get the same names; a tied weight occurs once."""
    model = load_model(write_tiny(tmp_path / "a"), torch.float32)
    doubled = [(name, parameter * 2) for name, parameter in model.state_dict().items()]
    assert "head.weight" in dict(doubled)
    named = dict(disk_tensors(model, doubled))
    assert list(named) == list(disk_pieces(model)) == [name for name, _ in disk_tensors(model)]
    for name, tensor in disk_tensors(model):
        assert torch.equal(named[name], tensor * 2)


def test_tied_weights_stay_one_parameter(tmp_path: Path) -> None:
    for model in (load_model(write_tiny(tmp_path / "a"), torch.bfloat16), new_model(tmp_path / "a", torch.float32)):
        assert model.head.weight is model.get_parameter("embedding.weight")


def test_new_model_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    a, b, c = (new_model(folder, torch.float32, seed=seed) for seed in (3, 3, 4))
    weights = [model.get_parameter("blocks.0.mlp.up.weight") for model in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().std()) == pytest.approx(0.02, rel=0.05)
    assert bool((a.get_parameter("norm.weight") == 1).all())


def test_biases_start_at_zero(tmp_path: Path) -> None:
    values = {**LlamaConfig.tiny().to_hf(), "attention_bias": True, "mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = new_model(tmp_path, torch.float32)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 7
    assert not any(bool(bias.any()) for bias in biases)


UP = "model.layers.1.mlp.up_proj.weight"

FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(UP), f"missing {UP}"),
    "unknown": (lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}), "unknown model.extra.weight"),
    "transposed": (
        lambda tensors: tensors.update({UP: tensors[UP].t().contiguous()}),
        rf"{UP} is \[64, 128\], config.json says \[128, 64\]",
    ),
    "layer too many": (
        lambda tensors: tensors.update({UP.replace(".1.", ".2."): tensors[UP].clone()}),
        "unknown model.layers.2.mlp.up_proj.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("read", [lambda folder: load_model(folder, torch.float32), check_model_files])
def test_weights_that_do_not_fit(fault: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    change, message = FAULTS[fault]
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    edit_weights(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    )
    load_model(folder, torch.float32)


def test_second_copy_of_a_tied_weight(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    edit_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    load_model(folder, torch.float32)
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("read", [lambda folder: load_model(folder, torch.float32), check_model_files])
def test_damaged_files_are_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged, message in [
        (content[:-100], "model.safetensors is truncated"),
        (content[:50], "model.safetensors is damaged"),
        (b"", "model.safetensors is damaged"),
        (content + b"tail", "model.safetensors is damaged"),
        (content[:8] + b"\xff" * 40 + content[48:], "model.safetensors is damaged"),
    ]:
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        read(folder)
    (folder / "pytorch_model.bin").write_text("")
    with pytest.raises(ValueError, match="pytorch_model.bin: convert"):
        read(folder)


def test_missing_shard_and_lying_index(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a", shard=60_000)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key = next(key for key, name in content["weight_map"].items() if name == shards[0].name)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], key: shards[1].name}}))
    with pytest.raises(ValueError, match=f"places '{key}' in {shards[1].name}"):
        load_model(folder, torch.float32)
    index.write_text(json.dumps(content))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}"):
        check_model_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json does not exist"),
        ("{not json", "config.json is not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "names no architecture.*LlamaForCausalLM"),
        ('{"architectures": ["HubForCausalLM"]}', "'HubForCausalLM', which is not supported: .*LlamaForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"]}', "config.json: .*lacks 'num_attention_heads'"),
        (json.dumps({**LlamaConfig.tiny().to_hf(), "hidden_act": "gelu"}), "hidden_act 'gelu'"),
        (json.dumps({**LlamaConfig.tiny().to_hf(), "rope_parameters": {"rope_type": "odd"}}), "rope_type 'odd'"),
    ],
)
def test_bad_config(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        new_model(tmp_path, torch.float32)


def test_every_parameter_has_a_name_on_disk() -> None:
    """The table has no superfluous row."""
    values = {**LlamaConfig.tiny().to_hf(), "tie_word_embeddings": False}
    names = disk_pieces(HF.model(LlamaConfig.from_hf(values)))
    used = {disk.rpartition(".")[0] for disk in names}
    expected = {disk.replace("{i}", str(i)) for disk in HF.names.values() for i in range(2)}
    assert used == expected
