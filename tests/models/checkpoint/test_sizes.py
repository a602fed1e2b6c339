"""The shapes in configs/models have as many parameters as in transformers and in their publications."""

import json
from pathlib import Path

import pytest
import torch

from llmquest_rl.models.checkpoint.count import config_files, count_parameters

CONFIGS = Path(__file__).parents[3] / "configs" / "models"

PARAMETERS = {
    "deepseek-v3": 671_026_404_352,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-7b": 6_738_415_616,
    "mixtral-8x7b": 46_702_792_704,
    "moonlight-16b-a3b": 15_960_108_544,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "r1-distill-qwen-14b": 14_770_033_664,
    "smollm2-135m": 134_515_008,
    "tiny-vit-32": 5_362_762,
    "vit-base-patch16-224": 86_567_656,
}
PREDICTION = {"deepseek-v3": 11_610_067_968}
"""Parameters for multi-token prediction, which transformers leaves out (14B in the report, with copies on disk)."""
ACTIVE = {"deepseek-v3": 37_552_282_624, "qwen3-30b-a3b": 3_353_032_704, "mixtral-8x7b": 12_879_925_248}


def test_every_shape_is_listed() -> None:
    assert sorted(path.stem for path in config_files([CONFIGS])) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    import transformers

    path = CONFIGS / f"{name}.json"
    values = json.loads(path.read_text())
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**values)
        theirs = getattr(transformers, values["architectures"][0])(config)
    count = count_parameters(path)
    assert count.total == sum(parameter.numel() for parameter in theirs.parameters()) == PARAMETERS[name]
    assert count.mtp == PREDICTION.get(name, 0)
    assert count.active == ACTIVE.get(name, count.active) <= count.total


def test_what_cannot_be_counted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a config.json, a checkpoint folder, or a folder of config files"):
        config_files([tmp_path])
    file = tmp_path / "odd.json"
    values = json.loads((CONFIGS / "qwen3-0.6b.json").read_text())
    file.write_text(json.dumps({**values, "num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="odd.json: num_attention_heads 16 is not a multiple of num_key_value_h"):
        count_parameters(file)
    file.write_text(json.dumps({**values, "architectures": ["OddForCausalLM"]}))
    with pytest.raises(ValueError, match="'OddForCausalLM', which is not supported: .*Qwen3ForCausalLM"):
        count_parameters(file)
