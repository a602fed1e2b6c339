"""A new architecture is one file in `llmquest_rl/models`: no other file changes."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmquest_rl import models
from llmquest_rl.batch import SequenceGroup, collate
from llmquest_rl.models import sequence_classifier
from llmquest_rl.models.architectures import architectures
from llmquest_rl.models.base import Model
from llmquest_rl.models.checkpoint.load_classifier import load_classifier
from llmquest_rl.models.checkpoint.load_save import load_any_model, load_model, new_model, save_model
from llmquest_rl.models.weight_map import disk_tensors
from rollout.vllm_limits import check_architecture, read_shape

FILE = '''
"""Llama whose final states are halved."""
from dataclasses import replace
from llmquest_rl.models import llama
from llmquest_rl.models.serving import VllmLimits

class HalfLlamaConfig(llama.LlamaConfig):
    def to_hf(self):
        return {**super().to_hf(), "architectures": [HF.architecture]}

class HalfLlama(llama.Llama):
    def hidden(self, tokens, positions, context):
        found = super().hidden(tokens, positions, context)
        return found._replace(states=found.states / 2)

HF = replace(
    llama.HF,
    architecture="HalfLlamaForCausalLM",
    config=HalfLlamaConfig,
    model=HalfLlama,
    classifier="HalfLlamaForSequenceClassification",
    vllm=VllmLimits(
        required={"halved": True},
        only={"attention_bias": False},
        problems=lambda config: ["mlp_bias is true"] if config.mlp_bias else [],
    ),
)
'''

GROUPS = [SequenceGroup([3, 5], [[7, 11, 2], [4]])]


def forget() -> None:
    """Clear the caches, so that the folder is walked again."""
    for cached in (architectures, sequence_classifier.decoders, sequence_classifier.hf_maps):
        cached.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a checkpoint folder of a model whose file is in a temporary folder on the path of the package."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "half_llama.py").write_text(FILE)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "files")])
    importlib.invalidate_caches()
    forget()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_config(checkpoint)
    yield checkpoint
    monkeypatch.undo()
    sys.modules.pop("llmquest_rl.models.half_llama", None)
    forget()
    assert "HalfLlamaForCausalLM" not in architectures()


def write_config(folder: Path, **changes: object) -> None:
    values = {**architectures()["HalfLlamaForCausalLM"].config.tiny().to_hf(), "halved": True, **changes}
    (folder / "config.json").write_text(json.dumps(values))


def step(model: Model) -> None:
    """Take one step of gradient descent, and check that every weight moves."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    output = model.train()(collate(GROUPS))
    (output.logprobs if hasattr(output, "logprobs") else output.values).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])] == []


def test_it_is_found_trained_saved_and_read_again(folder: Path) -> None:
    model = new_model(folder, torch.float32, seed=1)
    assert type(model).__name__ == "HalfLlama"
    step(model)
    save_model(folder, disk_tensors(model), folder)
    again = load_model(folder, torch.float32)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_classifier_is_made_of_it(folder: Path) -> None:
    source = new_model(folder, torch.float32, seed=1)
    save_model(folder, disk_tensors(source), folder)
    classifier = load_classifier(folder, ("no", "yes"), torch.float32)
    assert type(classifier.get_submodule("decoder")).__name__ == "HalfLlama"
    step(classifier)
    target = folder.parent / "classifier"
    save_model(folder, disk_tensors(classifier), target, config_fields=classifier.config_fields)
    assert json.loads((target / "config.json").read_text())["architectures"] == ["HalfLlamaForSequenceClassification"]
    again = load_any_model(target, torch.float32)
    assert again.config == classifier.config
    assert torch.equal(again(collate(GROUPS)).values, classifier(collate(GROUPS)).values)


def test_its_file_says_what_vllm_serves(folder: Path) -> None:
    check_architecture(folder, read_shape(folder))
    for changes, message in (
        ({"halved": False}, "halved is false, but must be true"),
        ({"attention_bias": True}, "attention_bias is true, but it computes false only"),
        ({"mlp_bias": True}, "cannot serve .*mlp_bias is true. Choose the engine `native`"),
        ({"architectures": ["ViTForImageClassification"]}, "verified for .*HalfLlamaForCausalLM.* only"),
    ):
        write_config(folder, **changes)
        with pytest.raises(ValueError, match=message):
            check_architecture(folder, read_shape(folder))
