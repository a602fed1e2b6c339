"""The published shapes in configs/models: as many parameters as in transformers, and as their publishers say."""

import json
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.hf import find_architecture

CONFIGS = Path(__file__).parents[2] / "configs" / "models"

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = CONFIGS / f"{name}.json"
    values = json.loads(path.read_text())
    hf = find_architecture(values, path)
    with torch.device("meta"):
        ours = hf.model(hf.config.from_hf(values))
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
    assert counts == [PARAMETERS[name]] * 2
