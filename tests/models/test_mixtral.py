"""Mixtral beyond the tests of all families: capacity, losses of the routers, names on disk, refused shapes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models.checkpoint.weight_files import weight_entries
from llmquest_rl.models.mixtral import HF, Mixtral, MixtralConfig
from tests.models.families import write_reference

torch.set_num_threads(1)

BATCH = collate([SequenceGroup([5, 9, 2, 7], [[3, 8, 1], [1, 1, 4, 6, 2]]), SequenceGroup([11, 3], [[7, 7, 7]])])


def tiny(**changes: Any) -> Mixtral:
    model = Mixtral(replace(MixtralConfig.tiny(), **changes))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.train()


def test_capacity_limits_training_only() -> None:
    free, tight, wide = (tiny(expert_capacity_factor=factor) for factor in (None, 0.5, 4.0))
    expected = free(BATCH).logprobs
    assert torch.equal(wide(BATCH).logprobs, expected)  # 4 experts: all tokens may go to one
    assert not torch.equal(tight(BATCH).logprobs, expected)
    assert torch.equal(tight.eval()(BATCH).logprobs, expected)


def test_capacity_without_gradient_is_that_of_training() -> None:
    """Log-probs before the update and during the update are the same function of the same batch."""
    model = tiny(expert_capacity_factor=0.5)
    with torch.no_grad():
        before = model(BATCH).logprobs
    assert torch.equal(model(BATCH).logprobs, before)


def test_dropped_tokens_are_counted_as_chosen() -> None:
    """Losses and loads count the choices of the router, as in Switch (arXiv:2101.03961, eq. 5)."""
    first, second = (tiny(num_layers=1, expert_capacity_factor=factor) for factor in (None, 0.25))
    torch.testing.assert_close(first(BATCH).aux, second(BATCH).aux)
    metrics = [model.after_update(True, lambda tensor: None) for model in (first, second)]
    assert metrics[0] == metrics[1]


def test_balance_loss_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmquest_rl.models.checkpoint.load_save import load_model

    folder = write_reference(tmp_path, ("mixtral", "odd number of experts"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(101, (30,), generator=torch.Generator().manual_seed(0))
    routers = theirs(tokens[None], output_router_logits=True).router_logits
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    each = [load_balancing_loss_func((logits,), 7, 3) / 3 for logits in routers]
    model = load_model(folder, torch.float32).train()
    ours = model(collate([SequenceGroup([], [[*tokens.tolist(), 0]])])).aux["balance"]
    torch.testing.assert_close(ours, 0.001 * torch.stack(each).mean(), rtol=1e-5, atol=0.0)


def test_names_on_disk_are_the_published_ones(tmp_path: Path) -> None:
    keys = set(weight_entries(write_reference(tmp_path, ("mixtral", "two of four experts"))))
    assert "model.layers.0.block_sparse_moe.gate.weight" in keys
    assert {f"model.layers.2.block_sparse_moe.experts.3.{part}.weight" for part in ("w1", "w2", "w3")} <= keys


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_local_experts 4"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"expert_capacity_factor": 0.0}, "expert_capacity_factor is 0.0"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_bad_shapes_are_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        HF.config.from_hf({**MixtralConfig.tiny().to_hf(), **change})
