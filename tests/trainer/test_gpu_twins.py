"""The paper recipes at the papers' size: checked as far as a machine without GPUs and network can."""

import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest

from llmquest_rl.models.count import count_parameters
from rollout.engine import check_context
from rollout.vllm_limits import check_computed_alike, read_shape
from trainer.assemble import needs
from trainer.config import Config
from trainer.config_load import load_config
from trainer.config_rules import sizes
from trainer.parts import Parts

CONFIGS = Path(__file__).parents[2] / "configs"
PAPERS = CONFIGS / "papers"
TWINS = sorted((PAPERS / "gpu").glob("*.yaml"))

SHAPES = {
    "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-32B": "qwen2.5-32b",
    "Qwen/Qwen2.5-Math-1.5B": "qwen2.5-math-1.5b",
    "Qwen/Qwen2.5-Math-7B": "qwen2.5-math-7b",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3-30b-a3b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2-3b",
}
"""Hub id to the file in configs/models with the same layers: of other releases positions alone may differ."""

DEEPSEEK_MATH = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}
"""config.json of deepseek-ai/deepseek-math-7b-instruct."""

HARDWARE = re.compile(r"^# Hardware: (\d+) NVIDIA GPUs of (\d+) GB\b.*Not run by us", re.MULTILINE)
ARGUMENTS = re.compile(r"^#   ([^:=\n]+): (\S+=.*)$", re.MULTILINE)

by_name = pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub id to a folder with the model's config.json."""
    made = {}
    for name in [*SHAPES, "deepseek-ai/deepseek-math-7b-instruct"]:
        made[name] = tmp_path_factory.mktemp("shape")
        if name in SHAPES:
            shutil.copy(CONFIGS / "models" / f"{SHAPES[name]}.json", made[name] / "config.json")
        else:
            (made[name] / "config.json").write_text(json.dumps(DEEPSEEK_MATH))
    return made


def hardware(path: Path) -> tuple[int, int]:
    """GPUs, and gigabytes of each, as the comment has them."""
    found = HARDWARE.search(path.read_text())
    assert found, f"{path.name} must say '# Hardware: 8 NVIDIA GPUs of 80 GB ... Not run by us.'"
    return int(found[1]), int(found[2])


def variants(path: Path) -> dict[str, list[str]]:
    """The arguments that the comment lists, by label; none are the file itself."""
    listed = ARGUMENTS.findall(path.read_text())
    assert listed, f"{path.name} lists no arguments for the paper's other curves"
    return {"the file": []} | {label: shlex.split(arguments) for label, arguments in listed}


@cache
def num_parameters(folder: Path) -> int:
    return count_parameters(folder).total


def learner_gb(config: Config, parameters: int) -> float:
    """Gigabytes that weights and optimizer take on a learner's GPU at their most: while it loads, or while it trains.

    Every learner loads the whole model in bfloat16, and keeps the whole reference; gradients, master weights and the
    two averages of AdamW are float32 and shared out.
    """
    weights = 2e-9 * parameters
    reference = weights * (config.algorithm.beta > 0)
    kept = weights / config.learner.processes if config.learner.zero_stage == 3 else weights
    return reference + max(weights, kept + 16e-9 * parameters / config.learner.processes)


def test_every_recipe_has_a_twin() -> None:
    assert {path.stem for path in TWINS} == {path.stem for path in PAPERS.glob("*.yaml")}


@by_name
def test_the_comment_says_what_whose_and_on_what(path: Path) -> None:
    first, second, *rest = path.read_text().splitlines()
    assert first.startswith("# ") and first.endswith("."), "one sentence that says what it shows"
    assert second.startswith(("# Paper: ", "# Source: "))
    assert any(line.startswith("# Ours: ") for line in rest), "what is not the paper's"
    gpus, _ = hardware(path)
    config = load_config(path)
    assert config.name == f"{path.stem.replace('_', '-')}-gpu"
    assert {what: number for what, number, _ in sizes(config)}["GPUs"] == str(gpus)


@by_name
def test_it_and_its_variants_fit_their_gpus(path: Path, folders: dict[str, Path]) -> None:
    gpus, gigabytes = hardware(path)
    for label, arguments in variants(path).items():
        config = load_config(path, arguments)
        assert sum(need.count * need.gpus for need in needs(config, samples=True)) <= gpus, label
        parameters = num_parameters(folders[config.model.path])
        assert learner_gb(config, parameters) < 0.75 * gigabytes, f"{label}: activations need the rest"
        share = config.rollout.engine.options.model_dump()["gpu_memory_utilization"]
        assert 2e-9 * parameters < 0.75 * share * gigabytes, f"{label}: keys and values need the rest"


@by_name
def test_it_and_its_variants_assemble_with_their_models_shape(path: Path, folders: dict[str, Path]) -> None:
    for label, arguments in variants(path).items():
        folder = folders[load_config(path, arguments).model.path]
        parts = Parts(load_config(path, [*arguments, f"model.path={folder}"]))
        assert parts.objective.source == "rollout", label
        parts.check_experts()
        setup = parts.learner_setup(folder)
        assert (setup.device, setup.dtype) == ("cuda", "bfloat16"), label
        shape = read_shape(folder)
        check_computed_alike(folder, shape)
        check_context(folder, shape["max_position_embeddings"], parts.engine_setup)
