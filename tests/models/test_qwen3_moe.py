"""Qwen3-MoE beyond the tests of all families: router losses and loads, dense layers, files, refused shapes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.models.checkpoint.load_save import load_model
from llmquest_rl.models.qwen3_moe import HF, Qwen3Moe, Qwen3MoeConfig
from llmquest_rl.models.weight_map import disk_tensors
from tests.models.families import write_reference

torch.set_num_threads(1)

BATCH = collate([SequenceGroup([5, 9, 2, 7], [[3, 8, 1], [1, 1, 4, 6, 2]]), SequenceGroup([11, 3], [[7, 7, 7]])])


def tiny(**changes: Any) -> Qwen3Moe:
    model = Qwen3Moe(replace(Qwen3MoeConfig.tiny(), **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.train()


def weighted(batch: TokenBatch, weight: float) -> TokenBatch:
    return replace(batch, token_fields={"weights": torch.full((len(batch.targets),), weight)})


def test_balance_loss_is_that_of_transformers(tmp_path: Path) -> None:
    """With one layer with experts and one sequence, the two definitions differ only by the factor k."""
    from transformers import AutoModelForCausalLM

    folder = write_reference(tmp_path, ("qwen3_moe", "dense layers named"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=True)
    tokens = torch.randint(101, (30,), generator=torch.Generator().manual_seed(0))
    router_logits = [logits for logits in theirs(tokens[None]).router_logits if logits is not None]
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    expected = load_balancing_loss_func(tuple(router_logits), 8, 3)
    model = load_model(folder, torch.float32).train()
    batch = collate([SequenceGroup([], [[*tokens.tolist(), 0]])])
    assert model.config.mlp_only_layers == (0, 2)
    assert isinstance(expected, torch.Tensor)
    torch.testing.assert_close(model(batch).aux["balance"], 0.001 / 3 * expected, rtol=1e-5, atol=0.0)


def test_losses_are_means_over_layers_and_scale_with_their_coefficients() -> None:
    once = tiny(router_aux_loss_coef=1.0, router_z_loss_coef=1.0)(BATCH).aux
    thrice = tiny(router_aux_loss_coef=3.0, router_z_loss_coef=0.5)(BATCH).aux
    assert set(once) == {"balance", "router_z"}
    assert float(once["balance"].detach()) == pytest.approx(1.0, abs=0.5)  # near balance, however many layers
    torch.testing.assert_close(thrice["balance"], 3 * once["balance"])
    torch.testing.assert_close(thrice["router_z"], 0.5 * once["router_z"])


def test_losses_reach_routers() -> None:
    model = tiny(router_aux_loss_coef=1.0, router_z_loss_coef=1.0)
    for name, loss in model(BATCH).aux.items():
        (gradient,) = torch.autograd.grad(loss, model.get_parameter("blocks.1.mlp.router.weight"), retain_graph=True)
        assert bool(gradient.any()), name


def test_routers_are_watched_in_training_only() -> None:
    model = tiny(router_aux_loss_coef=0.0)
    assert model(BATCH).aux == {}
    counted = model._load
    assert counted is not None
    assert counted.counts.sum(-1).tolist() == [3.0 * len(BATCH.tokens)] * 2
    with torch.no_grad():
        assert model(BATCH).aux == {}
    model.eval()
    assert model(BATCH).aux == {}
    assert model._load is counted


def test_an_update_sums_microbatches_and_processes() -> None:
    """Batches in which all weights are 0 only keep processes in step: they are not counted."""
    model = tiny()
    for weight in (1.0, 0.0, 0.5):
        model(weighted(BATCH, weight))
    sums: list[torch.Tensor] = []

    def two_processes(tensor: torch.Tensor) -> None:
        tensor *= 2
        sums.append(tensor)

    metrics = model.after_update(True, two_processes)
    assert sums[0].sum(-1).tolist() == [2 * 2 * 3.0 * len(BATCH.tokens)] * 2
    assert metrics["moe/max_vio"] >= 0
    assert 0 < metrics["moe/entropy"] < 2.08  # ln 8
    assert model.after_update(True, two_processes) == {}


def test_which_layers_have_experts() -> None:
    config = replace(Qwen3MoeConfig.tiny(), num_layers=6, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert [config.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
    dense = tiny(mlp_only_layers=(0, 1, 2))
    assert dense(BATCH).aux == {}
    assert dense.after_update(True, lambda tensor: None) == {}


def test_whole_stacks_on_disk_are_read(tmp_path: Path) -> None:
    """Files that transformers 5 wrote without converting them back are read."""
    from safetensors.torch import load_file, save_file

    folder = write_reference(tmp_path, ("qwen3_moe", "normalized weights"))
    expected = dict(disk_tensors(load_model(folder, torch.float32)))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        path = f"model.layers.{layer}.mlp.experts"
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            rows = [torch.cat([tensors.pop(f"{path}.{e}.{part}.weight") for part in parts]) for e in range(8)]
            tensors[f"{path}.{stack}"] = torch.stack(rows)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = dict(disk_tensors(load_model(folder, torch.float32)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_both_spellings_of_the_number_of_experts(tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts, the published files have num_experts."""
    config = json.loads((write_reference(tmp_path, ("qwen3_moe", "biases")) / "config.json").read_text())
    number = config.pop("num_local_experts", None) or config.pop("num_experts")
    assert HF.config.from_hf({**config, "num_experts": number}) == HF.config.from_hf(
        {**config, "num_local_experts": number}
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than num_experts 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"num_experts": 0}, "num_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
        ({"router_z_loss_coef": -1.0}, "router_z_loss_coef"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_bad_shapes_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        HF.config.from_hf({**Qwen3MoeConfig.tiny().to_hf(), **change})


def test_missing_fields_are_named() -> None:
    values = Qwen3MoeConfig.tiny().to_hf()
    del values["moe_intermediate_size"]
    with pytest.raises(ValueError, match="moe_intermediate_size"):
        HF.config.from_hf(values)
