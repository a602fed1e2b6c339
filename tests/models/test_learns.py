"""Every language model trains: it starts at chance, every parameter gets a gradient, and it memorises a batch."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from llmquest_rl.batch import SequenceGroup, TokenBatch, collate
from llmquest_rl.models.base import CausalLM
from llmquest_rl.models.checkpoint.load_save import new_model
from tests.models.families import LANGUAGE_MODELS, tiny_folder

torch.set_num_threads(1)

every_architecture = pytest.mark.parametrize("architecture", LANGUAGE_MODELS)

LENGTH = 12


def sequences(vocab_size: int, with_prompt: bool = False) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (8, LENGTH), generator=generator).tolist()
    return collate([SequenceGroup(row[:1] if with_prompt else [], [row[1:] if with_prompt else row]) for row in rows])


def fresh(architecture: str, folder: Path) -> CausalLM:
    return new_model(tiny_folder(folder, architecture), torch.float32, seed=1).train()


def loss(model: nn.Module, batch: TokenBatch) -> torch.Tensor:
    output = model(batch)
    return -output.logprobs.mean() + sum(output.aux.values())


@every_architecture
def test_a_new_model_is_at_chance_and_every_parameter_is_reached(architecture: str, tmp_path: Path) -> None:
    model = fresh(architecture, tmp_path)
    batch = sequences(model.config.vocab_size)
    start = float(-model(batch).logprobs.mean().detach())
    assert start == pytest.approx(math.log(model.config.vocab_size), rel=0.1)
    loss(model, batch).backward()
    unreached = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.isfinite().all()))
    ]
    assert unreached == []


@every_architecture
def test_eight_sequences_are_learned_by_heart(architecture: str, tmp_path: Path) -> None:
    model = fresh(architecture, tmp_path)
    batch = sequences(model.config.vocab_size, with_prompt=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        model.after_update(True, lambda tensor: None)
        if float(-model(batch).logprobs.mean().detach()) < 0.03:
            break
    model.eval()
    assert float(-model(batch).logprobs.mean().detach()) < 0.05


@every_architecture
def test_gradient_checkpointing_changes_nothing(architecture: str, tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = fresh(architecture, tmp_path)
        model.gradient_checkpointing = checkpointing
        loss(model, sequences(model.config.vocab_size)).backward()
        metrics = model.after_update(True, lambda tensor: None)
        gradients.append(({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, metrics))
    (plain, plain_metrics), (again, again_metrics) = gradients
    assert plain.keys() == again.keys()
    assert plain_metrics == again_metrics
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@every_architecture
def test_router_metrics_count_training_only(architecture: str, tmp_path: Path) -> None:
    model = fresh(architecture, tmp_path)
    batch = sequences(model.config.vocab_size)
    with torch.no_grad():
        model(batch)
    model.eval()
    model(batch)
    assert model.after_update(True, lambda tensor: None) == {}
    model.train()
    model(batch)
    assert model.after_update(False, lambda tensor: None) == {}, "a skipped update leaves nothing behind"
    model(batch)
    metrics = model.after_update(True, lambda tensor: None)
    assert all(math.isfinite(value) for value in metrics.values())
